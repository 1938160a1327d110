"""fastops.freeze: a model for inference alone. What does not change between two calls is done once.

Batch norms become part of the layers before them (_frozen_norms.py), weights are packed for the kernels
(_frozen_layers.py, csrc/torch/frozen.cpp), layers take their activation and the residual that is added to them
(_freezing.py), and images stay in the layout that suits the convolutions (_frozen_layout.py).
"""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

from fastops import _C
from fastops._freezing import freeze_module, with_its_own_modes
from fastops._frozen_graph import quick_call
from fastops._frozen_layout import suits_channels_last
from fastops._frozen_watch import Watch
from fastops._tracing import is_frozen
from fastops.replace import Row, _check, _table

__all__ = ["FreezeReport", "freeze"]


@dataclass
class FreezeReport:
    """What freeze did. str() is a table: a line for all layers that fared alike.

    Attributes:
        frozen: a Row for every layer whose weights are packed: its name, its class, what it computes now.
        folded: a Row for every batch norm that became part of a layer.
        left: a Row for every other module that is called, and why it is as it was.
        untraced: a Row for every module whose forward could not be followed, and why; its children are frozen on their
            own.
    """

    frozen: list[Row] = field(default_factory=list)
    folded: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    untraced: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (("->", self.frozen), ("into", self.folded), ("left:", self.left), ("untraced:", self.untraced))
        counts = [f"{len(rows)} {name}" for name, rows in vars(self).items()]
        return "\n".join([*_table(*kinds), ", ".join(counts)])


def freeze(model: nn.Module, *, channels_last: bool | None = None) -> nn.Module:
    """The model for inference: batch norms and layer scales folded, weights packed once, layers joined with others.

    Args:
        model: any module. It stays as it is. Its frozen form is that of model.eval(), with the weights of this moment.
            A frozen model is returned as it is.
        channels_last: the layout in which images go from convolution to convolution. None: channels_last where the
            model has convolutions in two dimensions and is in float32 or a 16-bit dtype.

    Returns:
        A module that is called as the model is. It needs no gradients and cannot be trained; it can be copied, pickled,
        moved, exported (torch.export), compiled and traced (torch.jit.trace). `fastops_report` is a FreezeReport.
        Results are those of model.eval() but for roundings: a folded batch norm changes the weights before they are
        rounded. Buffers that the model's forward changes are the frozen model's own.

    Calling it raises RuntimeError if a parameter or buffer of `model` has other values than it had, or if it consists
    of other modules: freeze again. A
    write through .data that leaves out the elements that are looked at (8 of a large tensor) is not noticed. Where the
    values are the same and something else has changed, as after share_memory(), one call reads all of them. It also
    raises RuntimeError if its input requires a gradient. Hooks that the model has are called; those that it gets later
    are not.

    A frozen layer keeps packed weights for up to four kinds of call (batch sizes and the like), and the model that it
    was made from has its own: it takes memory for speed. Drop the model to free its weights.

    It is in eval mode and stays there: train() does nothing to it, so that it can be a part of a model that is trained.
    Where a forward could not be followed and asks for the exact classes of modules, hooks them or changes attributes
    that they read, they are copies that are not frozen. What its forward reads from outside the model, such as global
    variables and configuration objects, is what it was when the model was frozen, as far as the forward could be
    followed.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2017), section 3.2, for folding; torch.fx for the graph.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(fastops.freeze(model).fastops_report)
    0  conv2d                ->    conv2d, activation='relu'
    1  torch.nn.BatchNorm2d  into  0
    1 frozen, 1 folded, 0 left, 0 untraced
    """
    _check(model, "freeze")
    if is_frozen(model):
        return model
    if channels_last is None:
        channels_last = suits_channels_last(model)
    report = FreezeReport()
    frozen = with_its_own_modes(model, report) or freeze_module(model, "", report, channels_last)
    return _class_for(model)(frozen, model, report)


# ---- the frozen model ------------------------------------------------------------------------------------------------


class FrozenModel(nn.Module):
    """What freeze returns. `model` is a torch.fx.GraphModule, a copy of the model with frozen children, or both."""

    _fastops_frozen = True

    def __init__(self, model: nn.Module, source: nn.Module, report: FreezeReport) -> None:
        super().__init__()
        self.model = model
        self.fastops_report = report
        self._watch = Watch(source)
        self._run: Callable[..., Any] | None = None
        self.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.model(*args, **kwargs)
        needs_grad = is_grad_enabled() and any(_needs_grad(one) for one in (*args, *kwargs.values()))
        if needs_grad and not is_inference_mode_enabled():
            raise RuntimeError(
                "fastops.freeze: a frozen model has no gradients, but its input requires one. Call it under "
                "torch.no_grad(), or use the model that it was made from"
            )
        state = self.__dict__
        watch = state["_watch"]
        if _C.fingerprint(watch.where) != watch.fingerprint:
            watch.look_closer()
        run = state["_run"] or self._make_run()
        return run(*args, **kwargs)

    def _make_run(self) -> Callable[..., Any]:
        self._run = quick_call(self.model)
        return self._run

    def train(self, mode: bool = True) -> "FrozenModel":
        return super().train(False)  # a part of a model that is trained stays what it is

    def __reduce__(self) -> Any:
        return _read_frozen, (inspect.signature(type(self).forward),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for first."""
        raise RuntimeError(
            "fastops.freeze: torch.jit.script cannot compile a frozen model. Script the model that it was made from, "
            "torch.jit.freeze(torch.jit.script(model.eval())), or trace this one, torch.jit.trace(frozen, inputs)"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenModel":
        super()._apply(*args, **kwargs)
        self._run = None
        return self


def _needs_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_needs_grad, value))
    return isinstance(value, dict) and any(map(_needs_grad, value.values()))


def _class_for(model: nn.Module) -> type[FrozenModel]:
    """FrozenModel with the signature of the model's forward, which torch.export asks for."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of something that is no function
        return FrozenModel
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    name = "self"
    while name in signature.parameters:
        name += "_"
    self = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    return _with_signature(inspect.Signature([self, *parameters]))


def _with_signature(signature: inspect.Signature) -> type[FrozenModel]:
    plain = FrozenModel.forward
    forward = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__)
    forward.__signature__ = signature
    return type("FrozenModel", (FrozenModel,), {"forward": forward, "__module__": __name__})


def _read_frozen(signature: inspect.Signature) -> FrozenModel:
    cls = _with_signature(signature)
    return cls.__new__(cls)
