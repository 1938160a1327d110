"""Weights that are 0: magnitude and movement pruning, at once or by a schedule, and masks of torch.nn.utils.prune."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fastops.light._changes import Changes, parameters_of
from fastops.light._layers import CONVOLUTIONS, checked_filter, kind_of, why_not_written
from fastops.light._masks import Pattern, checked_pattern, staying, units_of
from fastops.replace import Row
from fastops.replace import _name as class_name

__all__ = ["Pruner", "cubic_sparsity", "prune_weights_", "sparsity_mask", "take_masks_"]

_LAYERS = (nn.Linear, *CONVOLUTIONS)
_METHODS = ("magnitude", "movement")


def sparsity_mask(scores: Tensor, sparsity: float, pattern: Pattern = (1, 1)) -> Tensor:
    """Which weights stay when the part `sparsity` goes: those of the highest scores.

    Args:
        scores: of any shape and real dtype, such as `weight.abs()`. Blocks lie in the matrix of outputs and inputs;
            those of a kernel of 3 x 3, say, are blocks of inputs at one of its taps.
        sparsity: from 0 to 1, rounded down to whole units.
        pattern: (rows, columns) of the blocks that go as a whole, by their mean; (1, 1) is unstructured. Or "2:4": of
            each four inputs that follow each other, at most two go; then sparsity is at most 0.5.

    Returns:
        Booleans of scores' shape.

    Raises:
        ValueError: sparsity or pattern is not one of these.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), for 2:4.

    >>> from fastops import light
    >>> light.sparsity_mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 0.5, "2:4")
    tensor([[False,  True, False,  True]])
    >>> light.sparsity_mask(torch.tensor([[1.0, 4.0, 2.0, 2.0]]), 0.5, (1, 2))
    tensor([[ True,  True, False, False]])
    """
    _check_sparsity("sparsity_mask", sparsity, pattern)
    units = units_of(scores.detach(), pattern)
    return units.mask(staying([units], sparsity)[0])


def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """How sparse weights are at a step: fast first, while many weights do not matter, and slower towards the end.

    s = final + (initial - final) (1 - (step - begin) / (end - begin))^3 between begin and end.

    Args:
        step, begin, end: numbers of steps.
        final, initial: the sparsity from `end` on, and up to `begin`.

    Raises:
        ValueError: end is before begin.

    Source: Zhu and Gupta, "To Prune, or Not to Prune" (2017).

    >>> from fastops import light
    >>> [round(light.cubic_sparsity(step, 10, 30, 0.9), 2) for step in (0, 10, 15, 20, 30, 40)]
    [0.0, 0.0, 0.52, 0.79, 0.9, 0.9]
    """
    if end < begin:
        raise ValueError(f"cubic_sparsity: end must not be before begin, got {end} and {begin}")
    if step >= end:
        return final
    left = 1 - max(step - begin, 0) / (end - begin)
    return final + (initial - final) * left**3


class Pruner:
    """Makes weights of a model 0 while it is trained, more of them step by step, for a loop of one's own:

        pruner = light.Pruner(model, 0.9, begin=100, end=1000)
        for images, targets in batches:
            loss(model(images), targets).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    The model stays as it is, without masks, hooks and new parameters: `step` writes zeros into its weights, and again
    after each step of the optimizer. `light.sparsify_` then makes layers of them that are smaller and faster. Without
    `begin` and `end` the weights are 0 at once, and `step` keeps them so.

    Args:
        model: any module. Masks of torch.nn.utils.prune are made permanent, as by take_masks_, and their zeros stay.
        sparsity: the part of the weights that is 0 in the end.
        method: "magnitude": the smallest weights go, and stay 0. "movement": those that training moves towards 0; they
            come back where it would move them away again. It needs gradients, so call step before zero_grad.
        pattern: as in sparsity_mask: a block size, or "2:4".
        begin, end: between which steps the sparsity rises, by cubic_sparsity. From `end` on the masks stay.
        initial: the sparsity at `begin`.
        every: only each so many steps other weights are chosen.
        scope: "layer": as many of each layer. "global": the lowest of all layers.
        filter_fn: filter_fn(module, fqn) -> bool says which layers to prune; None means all linear layers and
            convolutions.

    Attributes:
        masks: by the weight's name, which weights are not 0: booleans of its shape.
        sparsity: the part of the weights that are 0 by now.
        steps: how often step has been called.

    Shapes and dtypes of weights are any.

    Raises:
        TypeError: model is not a torch.nn.Module. ValueError: another argument is not one of these, or there is no
        layer to prune. RuntimeError: by step, when method is "movement" and no weight has a gradient.

    Source: Zhu and Gupta, "To Prune, or Not to Prune" (2017); Sanh et al., "Movement Pruning" (2020).

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> pruner = light.Pruner(model, 0.75, pattern=(4, 4))
    >>> print(pruner.report())
    0.weight, 2.weight  torch.nn.Linear  ->  75.0% zeros
    4680 parameters -> 4680
    """

    _called = "Pruner"  # in messages

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        method: str = "magnitude",
        pattern: Pattern = (1, 1),
        begin: int = 0,
        end: int = 0,
        initial: float = 0.0,
        every: int = 1,
        scope: str = "layer",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self._called}: model must be a torch.nn.Module, got {type(model).__name__}")
        _check_sparsity(self._called, sparsity, pattern)
        checked_filter(self._called, filter_fn)
        if method not in _METHODS:
            raise ValueError(f"{self._called}: method must be 'magnitude' or 'movement', got {method!r}")
        if scope not in ("layer", "global"):
            raise ValueError(f"{self._called}: scope must be 'layer' or 'global', got {scope!r}")
        if not 0 <= begin <= end or every < 1 or not 0 <= initial <= sparsity:
            raise ValueError(
                f"{self._called}: begin, end, every and initial must be 0 <= begin <= end, every >= 1 and 0 <= initial "
                f"<= sparsity, got {begin}, {end}, {every} and {initial}"
            )
        self.final, self.method, self.pattern, self.scope = sparsity, method, pattern, scope
        self.begin, self.end, self.initial, self.every, self.steps = begin, end, initial, every, 0
        self._model = model
        taken = {row.name for row in take_masks_(model).changed}
        self._weights: dict[str, tuple[nn.Module, str]] = {}
        self._kept: list[Row] = []
        for name, module in model.named_modules():
            if issubclass(kind_of(module), _LAYERS) and (filter_fn is None or filter_fn(module, name)):
                path = f"{name}.weight" if name else "weight"
                why = why_not_written(module)
                if why:
                    self._kept.append(Row(path, class_name(type(module)), why))
                elif not any(one.weight is module.weight for one, _ in self._weights.values()):
                    self._weights[path] = module, class_name(type(module))
        if not self._weights:
            raise ValueError(f"{self._called}: model has no linear layer or convolution whose weight can be pruned")
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self._current().items()}
        # Zeros of PyTorch's masks stay zeros.
        self._may_stay = {name: weight != 0 for name, weight in self._current().items() if name in taken}
        self._scores: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        if method == "movement":
            for name, weight in self._current().items():
                self._scores[name], self._dense[name] = torch.zeros_like(weight), weight.clone()
        if end == 0:
            self._choose(sparsity)
        self._write()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> None:
        """To be called after each step of the optimizer, and before zero_grad.

        >>> from fastops import light
        >>> model = nn.Linear(8, 8)
        >>> pruner = light.Pruner(model, 0.5, end=2)
        >>> for _ in range(3):
        ...     pruner.step()
        >>> pruner.sparsity
        0.5
        """
        if self.method == "movement":
            self._move()
        self.steps += 1
        if self.begin <= self.steps <= self.end and (
            (self.steps - self.begin) % self.every == 0 or self.steps == self.end
        ):
            self._choose(cubic_sparsity(self.steps, self.begin, self.end, self.final, self.initial))
        self._write()

    @property
    def sparsity(self) -> float:
        count = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(count, 1)

    def report(self) -> Changes:
        """How much of each weight is 0, and which layers are not pruned, and why.

        >>> from fastops import light
        >>> light.Pruner(nn.Linear(10, 10), 0.5).report().changed[0].result
        '50.0% zeros'
        """
        count = parameters_of(self._model)
        changes = Changes(kept=self._kept, before=count, after=count)
        for name, (_, kind) in self._weights.items():
            changes.changed.append(Row(name, kind, _zeros(self.masks[name])))
        return changes

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved beside the model, to go on later.

        >>> from fastops import light
        >>> sorted(light.Pruner(nn.Linear(2, 2), 0.5).state_dict())
        ['dense', 'masks', 'may_stay', 'scores', 'steps']
        """
        return {"steps": self.steps, **{key: dict(own) for key, own in self._tensors().items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another Pruner of such a model was; the model's weights are loaded first.

        >>> from fastops import light
        >>> pruner = light.Pruner(nn.Linear(2, 2), 0.5)
        >>> pruner.load_state_dict(pruner.state_dict())
        """
        missing = [key for key in ("steps", *self._tensors()) if key not in state_dict]
        if missing:
            raise ValueError(f"Pruner: state_dict must be one that a Pruner gave, got one without {', '.join(missing)}")
        for name, mask in self.masks.items():
            found = state_dict["masks"].get(name)
            if found is None or found.shape != mask.shape:
                got = "none" if found is None else tuple(found.shape)
                raise ValueError(f"Pruner: state_dict must have a mask {tuple(mask.shape)} for {name}, got {got}")
        self.steps = state_dict["steps"]
        for own, key in (
            (self.masks, "masks"),
            (self._may_stay, "may_stay"),
            (self._scores, "scores"),
            (self._dense, "dense"),
        ):
            own.clear()
            own.update({name: tensor.clone() for name, tensor in state_dict[key].items()})
        with torch.no_grad():
            self._write()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": self.masks, "may_stay": self._may_stay, "scores": self._scores, "dense": self._dense}

    def _current(self) -> dict[str, Tensor]:
        return {name: module.weight.detach() for name, (module, _) in self._weights.items()}

    def _move(self) -> None:
        """A weight's score falls by its gradient times its value: training moves it towards 0 where both agree."""
        if all(module.weight.grad is None for module, _ in self._weights.values()):
            raise RuntimeError("Pruner: no weight has a gradient: call step after optimizer.step and before zero_grad")
        for name, (module, _) in self._weights.items():
            if module.weight.grad is not None:
                self._scores[name] -= module.weight.grad * self._dense[name]
            # What was 0 in this step keeps its value from before: it was not trained.
            self._dense[name] = torch.where(self.masks[name], module.weight, self._dense[name])

    def _choose(self, sparsity: float) -> None:
        scores = self._scores or {name: weight.abs() * self.masks[name] for name, weight in self._current().items()}
        units = [units_of(one, self.pattern) for one in scores.values()]
        together = [units] if self.scope == "global" else [[one] for one in units]
        stay = [which for some in together for which in staying(some, sparsity)]
        for name, one, which in zip(scores, units, stay, strict=True):
            mask = one.mask(which)
            self.masks[name] = mask & self.masks[name] if self.method == "magnitude" else mask
            if name in self._may_stay:
                self.masks[name] &= self._may_stay[name]

    @torch.no_grad()
    def _write(self) -> None:
        for name, (module, _) in self._weights.items():
            with torch.inference_mode(module.weight.is_inference()), torch.no_grad():  # made in it: written to in it
                module.weight.copy_(torch.where(self.masks[name], self._dense.get(name, module.weight), 0))


class _AtOnce(Pruner):
    _called = "prune_weights_"


def prune_weights_(
    model: nn.Module,
    sparsity: float,
    pattern: Pattern = (1, 1),
    scope: str = "layer",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Changes:
    """Makes the smallest weights of a model's linear layers and convolutions 0, in place and at once.

    Training on fills them again, unless a Pruner keeps them 0.

    Args:
        model, sparsity, pattern, scope, filter_fn: as of Pruner. Weights have any shape and dtype.

    Returns:
        Changes: how much of each weight is 0.

    Raises:
        TypeError, ValueError: as Pruner does.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> print(light.prune_weights_(model, 0.9))
    0.weight  torch.nn.Linear  ->  90.0% zeros
    2.weight  torch.nn.Linear  ->  89.8% zeros
    4680 parameters -> 4680
    """
    return _AtOnce(model, sparsity, pattern=pattern, scope=scope, filter_fn=filter_fn).report()


@torch.inference_mode(False)
def take_masks_(model: nn.Module) -> Changes:
    """Makes the masks of torch.nn.utils.prune permanent, in place: `weight` is a parameter again, with zeros in it.

    `weight_orig` and `weight_mask`, and the hook that multiplied them at every call, are gone, and the weight is a
    new parameter: make the model's optimizer afterwards.

    Args:
        model: any module.

    Returns:
        Changes: how much of which tensor is 0.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: torch.nn.utils.prune.remove, for all modules of a model.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(10, 10))
    >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.9)
    >>> print(light.take_masks_(model))
    0.weight  torch.nn.Linear  ->  90.0% zeros
    110 parameters -> 110
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"take_masks_: model must be a torch.nn.Module, got {type(model).__name__}")
    changes = Changes(before=parameters_of(model))
    for name, module in model.named_modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        for key in [hook._tensor_name for hook in hooks]:
            prune.remove(module, key)
            path = f"{name}.{key}" if name else key
            changes.changed.append(Row(path, class_name(type(module)), _zeros(getattr(module, key).detach() != 0)))
    changes.after = parameters_of(model)
    return changes


def _zeros(stay: Tensor) -> str:
    return f"{1 - int(stay.sum()) / max(stay.numel(), 1):.1%} zeros"


def _check_sparsity(function: str, sparsity: float, pattern: Pattern) -> None:
    try:
        _, part = checked_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from None
    most = 1 - part[0] / part[1] if part else 1
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= most:
        raise ValueError(f"{function}: sparsity must be from 0 to {most:g} for pattern {pattern!r}, got {sparsity!r}")
