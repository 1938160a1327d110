"""torch.optim's SGD, Adam and AdamW, with a step that is one call for all parameters.

The classes are subclasses of torch.optim's: arguments, param_groups, state, state_dict, hooks, schedulers and
GradScaler are PyTorch's. `replace_` turns an optimizer of torch.optim into one of these, and `restore_` back.

Results are those of PyTorch's single-tensor implementation, which it takes on the CPU. In float32 and float64, on a
processor with fused multiply-adds, SGD's parameters and Adam's moments have the same bits; Adam's parameters differ by
the square root, which is correctly rounded here, while PyTorch's, MKL's, is one unit off in a fifth of all cases.
bfloat16 and float16 parameters are updated in float32 and rounded once, where PyTorch rounds after every operation.

PyTorch's own step updates what the kernel does not take: the first step of each parameter that has state, sparse or
complex gradients, tensor subclasses (FSDP2's DTensor), parameters on a device that has no kernels, gradients that lie
in another order than their parameter, betas or weight_decay as tensors, and everything with fused, capturable or
differentiable.

Examples assume `import torch`, `from torch import nn` and `import fastops`.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.optim import optimizer as _torch_optimizer

from fastops import _C

__all__ = ["SGD", "Adam", "AdamW", "replace_", "restore_"]

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)

_is_observed = _C.is_observed
_drop_gradients = _C.drop_gradients
_pre_hooks = _torch_optimizer._global_optimizer_pre_hooks
_post_hooks = _torch_optimizer._global_optimizer_post_hooks


def _unhooked(cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """PyTorch's step without its hooks: the first instance puts those around the class's function."""
    return cls.step.__wrapped__ if getattr(cls.step, "hooked", False) else cls.step


class _OneCall(torch.optim.Optimizer):
    """What the optimizers here share. The class after it in the bases is PyTorch's, `_torch`."""

    _kernel: Callable[..., Any]
    _torch: type[torch.optim.Optimizer]
    _torch_step: Callable[..., Any]  # unhooked

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient; returns the closure's result.

        Args:
            closure: computes the gradients and returns the loss.
        """
        if (
            closure is None
            and not self._optimizer_step_pre_hooks
            and not self._optimizer_step_post_hooks
            and not _pre_hooks
            and not _post_hooks
            and not _is_compiling()
            and not _is_observed()
        ):
            rest = self._kernel(self.param_groups, self.state)
            if rest is not None:
                self._by_torch(rest)
            return None
        # A derived class's step that calls this one has run the hooks itself.
        return _hooked_step(self, closure) if type(self).step is _OneCall.step else _step(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters.

        Args:
            set_to_none: to None, else to zero.
        """
        if not set_to_none or _is_compiling() or _is_observed() or not _drop_gradients(self.param_groups):
            super().zero_grad(set_to_none)

    def _by_torch(self, rest: Any) -> None:
        """PyTorch's step for `rest`, a list of (group, parameters), or for everything."""
        groups = self.param_groups
        if rest is not NotImplemented:
            self.param_groups = [{**group, "params": params} for group, params in rest]
        try:
            self._torch_step()
        finally:
            self.param_groups = groups


def _step(self: _OneCall, closure: Callable[[], Any] | None = None) -> Any:
    if _is_compiling():
        return self._torch_step(closure)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    rest = self._kernel(self.param_groups, self.state)
    if rest is not None:
        self._by_torch(rest)
    return loss


_hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
_OneCall.step.hooked = True  # by _hooked_step, where there is anything to call


class SGD(_OneCall, torch.optim.SGD):
    """torch.optim.SGD, with a step that is one call for all parameters.

    Args: params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: as in
        torch.optim.SGD. foreach changes nothing.

    Shapes: any. Dtypes: float32, float64, bfloat16, float16; the rest is PyTorch's.
    Raises: what torch.optim.SGD raises.
    Source: torch.optim.SGD.

    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = fastops.optim.SGD([weight], lr=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([0.5000, 1.5000], requires_grad=True)
    """

    _kernel = staticmethod(_C.sgd_step)
    _torch = torch.optim.SGD
    _torch_step = _unhooked(torch.optim.SGD)


class Adam(_OneCall, torch.optim.Adam):
    """torch.optim.Adam, with a step that is one call for all parameters.

    Args: params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
        decoupled_weight_decay: as in torch.optim.Adam. foreach changes nothing.

    Shapes: any. Dtypes: float32, float64, bfloat16, float16; the rest is PyTorch's.
    Raises: what torch.optim.Adam raises.
    Source: torch.optim.Adam.

    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = fastops.optim.Adam([weight], lr=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([0.5000, 1.5000], requires_grad=True)
    """

    _kernel = staticmethod(_C.adam_step)
    _torch = torch.optim.Adam
    _torch_step = _unhooked(torch.optim.Adam)


class AdamW(_OneCall, torch.optim.AdamW):
    """torch.optim.AdamW, with a step that is one call for all parameters.

    Args: params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
        torch.optim.AdamW. foreach changes nothing.

    Shapes: any. Dtypes: float32, float64, bfloat16, float16; the rest is PyTorch's.
    Raises: what torch.optim.AdamW raises.
    Source: torch.optim.AdamW.

    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = fastops.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([0.5000, 1.5000], requires_grad=True)
    """

    _kernel = staticmethod(_C.adam_step)
    _torch = torch.optim.AdamW
    _torch_step = _unhooked(torch.optim.AdamW)


_TO_FASTOPS: dict[type, type] = {cls._torch: cls for cls in (SGD, Adam, AdamW)}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FASTOPS.items()}


def replace_(optimizer: _Optimizer) -> _Optimizer:
    """Makes an SGD, Adam or AdamW of torch.optim one of fastops.optim, in place: an assignment to its __class__.

    Parameters, groups, state, hooks and schedulers stay what they are.

    Args:
        optimizer: an instance of torch.optim.SGD, Adam or AdamW, or of fastops.optim's, which stays what it is.

    Returns:
        The optimizer.

    Raises:
        TypeError: optimizer is anything else, also of a derived class. ValueError: its step has been overridden on the
        instance, by other than a scheduler.

    Source: fastops.replace_, for optimizers.

    >>> optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    >>> fastops.optim.replace_(optimizer) is optimizer
    True
    >>> type(optimizer).__module__
    'fastops.optim'
    """
    return _swap(optimizer, _TO_FASTOPS, "replace_")


def restore_(optimizer: _Optimizer) -> _Optimizer:
    """Makes an optimizer of fastops.optim one of torch.optim: the inverse of replace_, also after pickling.

    Args:
        optimizer: an instance of fastops.optim.SGD, Adam or AdamW, or of torch.optim's, which stays what it is.

    Returns:
        The optimizer.

    Raises:
        TypeError, ValueError: as replace_.

    Source: fastops.restore_, for optimizers.

    >>> optimizer = fastops.optim.SGD(nn.Linear(2, 2).parameters())
    >>> type(fastops.optim.restore_(optimizer)).__module__
    'torch.optim.sgd'
    """
    return _swap(optimizer, _TO_TORCH, "restore_")


def _swap(optimizer: _Optimizer, classes: dict[type, type], function: str) -> _Optimizer:
    cls = type(optimizer)
    if cls in classes.values():
        return optimizer
    if cls not in classes:
        expected = " or ".join(f"{c.__module__.rpartition('.')[0]}.{c.__name__}" for c in classes)
        raise TypeError(f"{function}: optimizer must be a {expected}, got {cls.__module__}.{cls.__qualname__}")
    own = vars(optimizer).get("step")
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        raise ValueError(f"{function}: the optimizer's step has been overridden on the instance, by {own!r}")
    optimizer.__class__ = classes[cls]
    optimizer._patch_step_function()
    if own is not None:
        optimizer.step = _tracked(optimizer)
    return optimizer


def _tracked(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The class's step as LRScheduler puts it on an instance, to know that it was called."""
    reference, function = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        held = reference()
        held._opt_called = True
        return function(held, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    return step
