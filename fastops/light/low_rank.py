"""fastops.light.low_rank_."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastops.nn as fnn
from fastops.light._changes import Changes, parameters_of
from fastops.light._layers import CONVOLUTIONS, checked_filter, kind_of, owners_of, why_not
from fastops.light.weights import take_masks_
from fastops.nn._fused import Fused
from fastops.replace import Row
from fastops.replace import _name as class_name
from fastops.replace import _read_directly as read_directly

__all__ = ["low_rank_"]


@torch.inference_mode(False)
def low_rank_(
    model: nn.Module,
    parameters: float | None = None,
    energy: float | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Changes:
    """Makes two small layers of each large one, in place, by the singular values of its weight.

    A linear layer becomes nn.Sequential of one from its inputs to `rank` features, without bias, and one from these to
    its outputs. A convolution becomes one with its kernel to `rank` channels and one of 1 x 1, or, for two dimensions,
    one of kernel height x 1 and one of 1 x kernel width, whichever keeps more; groups stay apart. The product of the
    two is the nearest to the weight that there is of this rank. Both train on. Names change: `fc.weight` becomes
    `fc.0.weight` and `fc.1.weight`; make the model's optimizer afterwards. A layer stays whose
    two would not be smaller.

    Args:
        model: any module. Masks of torch.nn.utils.prune are made permanent first, as by take_masks_.
        parameters: the part of the weights of these layers that is left, from 0 to 1. All layers keep as much of their
            energies, the most that fits.
        energy: what each layer keeps of its energy, the sum of the squares of its weight's elements, from 0 to 1.
            Either of the two has to be given.
        filter_fn: filter_fn(module, fqn) -> bool says which layers to take; None means all linear layers and
            convolutions, of weights of any shape and floating dtype.

    Returns:
        Changes: the rank of each layer and the part of the energy that it keeps; which layers stayed, and why.

    Raises:
        TypeError: model is not a torch.nn.Module. ValueError: not just one of parameters and energy is given, or it is
        not from 0 to 1. What filter_fn raises; the model is then what it was.

    Source: Eckart and Young (1936); Denton et al., "Exploiting Linear Structure Within Convolutional Networks" (2014),
    for channels; Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions" (2014), for
    height and width.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> print(light.low_rank_(model, parameters=0.5, filter_fn=lambda module, name: name == "0"))
    0  torch.nn.Linear  ->     rank 16 of 64, ...% of its energy
    2  torch.nn.Linear  kept:  filter_fn said no
    4420 parameters -> 2372, 1 of 1.86
    >>> model[0][0]
    Linear(in_features=64, out_features=16, bias=False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"low_rank_: model must be a torch.nn.Module, got {type(model).__name__}")
    checked_filter("low_rank_", filter_fn)
    given = [one for one in (parameters, energy) if one is not None]
    if len(given) != 1 or not isinstance(given[0], (int, float)) or not 0 < given[0] <= 1:
        raise ValueError(
            "low_rank_: one of parameters and energy must be given, and be more than 0 and at most 1, got "
            f"{parameters!r} and {energy!r}"
        )
    changes = Changes(before=parameters_of(model))
    chosen = _layers(model, filter_fn, changes)
    take_masks_(model)
    forms: dict[str, _Form] = {}
    for name, module in chosen.items():
        try:
            found = [form for form in _forms(module) if form.cost < form.full]
        except RuntimeError:  # torch.linalg.LinAlgError, of a weight that is not finite
            changes.kept.append(Row(name, class_name(type(module)), "its weight has no singular values"))
            continue
        if not found:
            changes.kept.append(Row(name, class_name(type(module)), "two layers of rank 1 would not be smaller"))
        elif energy is not None:
            forms[name] = min(found, key=lambda form: form.rank_for(energy) * form.cost)
        else:
            forms[name] = max(found, key=lambda form: form.energy(int(parameters * form.full / form.cost)))
    if energy is not None:
        ranks = {name: form.rank_for(energy) for name, form in forms.items()}
    else:
        ranks = _ranks(forms, parameters * sum(form.full for form in forms.values()))
    places = _places(model)
    for name, form in forms.items():
        module, rank = chosen[name], ranks[name]
        kind = class_name(type(module))
        if rank * form.cost >= form.full:
            changes.kept.append(Row(name, kind, f"two layers of rank {rank} would not be smaller"))
            continue
        result = form.layers(rank).train(module.training)
        for parent, key in places[id(module)]:
            parent._modules[key] = result
        text = f"rank {rank} of {len(form.values)}, {form.energy(rank):.1%} of its energy{form.text}"
        changes.changed.append(Row(name, kind, text))
    changes.after = parameters_of(model)
    return changes


def _layers(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None, changes: Changes
) -> dict[str, nn.Module]:
    owners = owners_of(model)
    direct = read_directly(model, calling=())
    found = {}
    for name, module in model.named_modules():
        if not issubclass(kind_of(module), (nn.Linear, *CONVOLUTIONS)):
            continue
        masked = "weight_orig" in module._parameters and "weight_mask" in module._buffers
        why = "" if masked else why_not(module, name, owners)
        why = why or direct.get(id(module), "") or ("it is the model itself" if module is model else "")
        if not why and not type(module).__module__.startswith(("torch.nn.", "fastops.nn.")):
            why = "a subclass: its forward may differ"
        if not why and filter_fn is not None and not filter_fn(module, name):
            why = "filter_fn said no"
        if why:
            changes.kept.append(Row(name, class_name(type(module)), why))
        else:
            found[name] = module
    return found


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where a module is a child: perhaps of several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, key))
    return found


@dataclass
class _Form:
    """A weight as the products of two: u (groups, rows, rank), values (rank), v (groups, rank, columns).

    cost: how many elements a rank has. full: how many the weight has. layers: the two layers of a rank.
    """

    u: Tensor
    spectrum: Tensor  # (groups, all ranks)
    v: Tensor
    full: int
    text: str
    make: Callable[[Tensor, Tensor], nn.Sequential]

    @property
    def values(self) -> Tensor:
        """The energy of each rank, of all groups together."""
        return self.spectrum.double().square().sum(0)

    @property
    def cost(self) -> int:
        return self.u.shape[0] * (self.u.shape[1] + self.v.shape[2])

    def energy(self, rank: int) -> float:
        total = float(self.values.sum())
        return float(self.values[:rank].sum()) / total if total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        total = self.values.cumsum(0)
        return int((total < energy * total[-1] * (1 - 1e-12)).sum()) + 1

    def layers(self, rank: int) -> nn.Sequential:
        """Both get the square root of each singular value, so that they train alike."""
        root = self.spectrum[:, :rank].sqrt()
        return self.make(root.unsqueeze(2) * self.v[:, :rank], self.u[:, :, :rank] * root.unsqueeze(1))


def _forms(module: nn.Module) -> list[_Form]:
    weight = module.weight.detach()
    groups = getattr(module, "groups", 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)

    def by_channels(first: Tensor, second: Tensor) -> nn.Sequential:
        rank = first.shape[0] * first.shape[1]
        one = _layer(module, rank, None, first.reshape(rank, *weight.shape[1:]))
        return nn.Sequential(one, _layer(module, _outputs(module), module.bias, second.flatten(0, 1), last=True))

    found = [_form(matrix, weight.numel(), "", by_channels)]
    if weight.dim() == 4 and groups == 1 and min(weight.shape[2:]) > 1 and not isinstance(module.padding, str):
        n, c, height, width = weight.shape

        def by_sides(first: Tensor, last: Tensor) -> nn.Sequential:
            rank = first.shape[1]
            one = first[0].view(rank, c, height, 1)
            other = last[0].view(n, width, rank).transpose(1, 2).unsqueeze(2)
            second = _layer(module, n, module.bias, other, side=1, last=True)
            return nn.Sequential(_layer(module, rank, None, one, side=0), second)

        sides = weight.permute(0, 3, 1, 2).reshape(1, n * width, c * height)
        found.append(_form(sides, weight.numel(), f", as {height}x1 and 1x{width}", by_sides))
    return found


def _form(matrix: Tensor, full: int, text: str, make: Callable[[Tensor, Tensor], nn.Sequential]) -> _Form:
    u, spectrum, v = torch.linalg.svd(matrix if matrix.dtype == torch.float64 else matrix.float(), full_matrices=False)
    return _Form(u, spectrum, v, full, text, make)


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, (nn.Linear, fnn.Linear)) else module.out_channels


def _layer(
    module: nn.Module, outputs: int, bias: Tensor | None, weight: Tensor, side: int | None = None, last: bool = False
) -> nn.Module:
    """One of the two layers, of the module's class. side: the dimension of its kernel. last: the second one."""
    plain: Any = kind_of(module)
    options = {"bias": bias is not None, "device": weight.device, "dtype": module.weight.dtype}
    if weight.dim() == 2 and issubclass(plain, nn.Linear):
        layer = plain(weight.shape[1], outputs, **options)
    elif last and side is None:  # of 1 x 1
        weight = weight.view(*weight.shape, *[1] * len(module.kernel_size))
        layer = plain(weight.shape[1] * module.groups, outputs, 1, groups=module.groups, **options)
    else:
        sizes = {key: getattr(module, key) for key in ("stride", "padding", "dilation")}
        if side is not None:
            neutral = {"stride": 1, "padding": 0, "dilation": 1}
            sizes = {
                key: tuple(size if d == side else neutral[key] for d, size in enumerate(value))
                for key, value in sizes.items()
            }
        inputs = weight.shape[1] * module.groups
        kernel, mode = tuple(weight.shape[2:]), module.padding_mode
        layer = plain(inputs, outputs, kernel, **sizes, groups=module.groups, padding_mode=mode, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.weight.requires_grad_(module.weight.requires_grad)
    if bias is not None:
        layer.bias = bias
    if last and isinstance(module, Fused):
        layer.activation = module.activation
    return layer


def _ranks(forms: dict[str, _Form], budget: float) -> dict[str, int]:
    """The ranks of so many parameters with which all layers keep the same part of their energies."""
    low, high = 0.0, 1.0
    for _ in range(50):
        energy = (low + high) / 2
        cost = sum(min(form.rank_for(energy) * form.cost, form.full) for form in forms.values())
        low, high = (energy, high) if cost <= budget else (low, energy)
    return {name: form.rank_for(low) for name, form in forms.items()}
