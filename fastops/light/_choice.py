"""Which channels prune_channels_ removes: how important each class of them is, and how many of a layer stay."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastops.light._flow import Flows, Layer
from fastops.light._layers import BATCH_NORMS, TRANSPOSED, kind_of

IMPORTANCES = ("l1", "l2", "batch_norm")
Importance = str | Callable[[str, nn.Module], Tensor]


@dataclass
class _Class:
    """Channels that go together: how many of each layer, and what each of them is worth."""

    layers: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


Groups = dict[tuple[tuple[str, int], ...], list[tuple[int, _Class]]]


def groups_of(
    layers: dict[str, Layer],
    flows: Flows,
    classes: Tensor,
    kept: dict[int, str],
    importance: Importance,
) -> Groups:
    """The classes that may go, by the layers they are of."""
    table: dict[int, _Class] = defaultdict(_Class)
    for name, layer in layers.items():
        for root, score in zip(classes[layer.outputs].tolist(), _scores(name, layer, importance), strict=True):
            if root not in kept:
                table[root].layers[name] += 1
                table[root].scores.append(score)
    if importance == "batch_norm":
        norms: dict[int, list[float]] = defaultdict(list)
        for layer in flows.layers.values():
            if issubclass(kind_of(layer.module), BATCH_NORMS) and layer.module.weight is not None:
                scores = _relative(layer.module.weight.abs())
                for root, score in zip(classes[layer.outputs].tolist(), scores, strict=True):
                    norms[root].append(score)
        for root, scores in norms.items():
            if root in table:
                table[root].scores = scores
    groups: Groups = defaultdict(list)
    for root, one in sorted(table.items()):
        groups[tuple(sorted(one.layers.items()))].append((root, one))
    return groups


def _scores(name: str, layer: Layer, importance: Importance) -> list[float]:
    module, count = layer.module, len(layer.outputs)
    if callable(importance):
        scores = importance(name, module)
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"prune_channels_: importance must give a tensor of shape ({count},) for {name}, got {found}"
            )
        if bool(scores.isnan().any()):
            raise ValueError(f"prune_channels_: importance must give numbers for {name}, got NaN")
        return _relative(scores)
    weight = module.weight.detach()
    if issubclass(kind_of(module), nn.Embedding):
        weight = weight.t()
    elif isinstance(module, TRANSPOSED):
        weight = weight.view(module.groups, -1, count // module.groups, weight[0, 0].numel()).transpose(1, 2)
    bias = getattr(module, "bias", None)
    parts = [weight.reshape(count, -1), weight.new_zeros(count, 1) if bias is None else bias.detach().unsqueeze(1)]
    order = 1 if importance == "l1" else 2
    return _relative(torch.stack([part.float().norm(order, dim=1) for part in parts]).norm(order, dim=0))


def _relative(scores: Tensor) -> list[float]:
    scores = scores.detach().double().cpu()
    mean = float(scores.abs().mean())
    return (scores / mean if mean > 0 and math.isfinite(mean) else scores).nan_to_num(math.inf).tolist()


def chosen(
    groups: Groups, layers: dict[str, Layer], amount: float | Mapping[str, float], scope: str, round_to: int
) -> set[int]:
    """The classes that go."""
    if isinstance(amount, Mapping):
        free = {name for group in groups for name, _ in group}
        strangers = [name for name in amount if name not in free]
        if strangers:
            found = ", ".join(sorted(free)) or "none"
            raise ValueError(f"prune_channels_: amount names {strangers[0]!r}; layers with channels to remove: {found}")
    counts = dict.fromkeys(groups, 0)
    if scope == "global":
        every = sorted((one.score, root, group) for group, found in groups.items() for root, one in found)
        for _, _, group in every[: int(amount * len(every) + 1e-9)]:
            counts[group] += 1
    else:
        for group, found in groups.items():
            counts[group] = int(_amount_of(group, amount) * len(found) + 1e-9)
    gone: set[int] = set()
    for group, found in groups.items():
        name, each = group[0]
        others = len(layers[name].outputs) - each * len(found)
        left = max(len(found) - counts[group], 1)
        while left < len(found) and (others + each * left) % round_to:
            left += 1
        ranked = sorted(found, key=lambda item: item[1].score)
        gone |= {root for root, _ in ranked[: len(found) - left]}
    return gone


def _amount_of(group: tuple[tuple[str, int], ...], amount: float | Mapping[str, float]) -> float:
    if not isinstance(amount, Mapping):
        return amount
    found = {name: amount[name] for name, _ in group if name in amount}
    if len(set(found.values())) > 1:
        raise ValueError(f"prune_channels_: these layers' channels hang together, and must have one amount: {found}")
    return next(iter(found.values()), 0.0)


def fitting(flows: Flows, classes: Tensor, count: int, budget: float, of_amount: Callable[[float], set[int]]) -> Tensor:
    """The labels that go for the smallest amount with which a model of `count` parameters has at most `budget`."""
    low, high = 0.0, 1.0
    for _ in range(20):
        amount = (low + high) / 2
        fits = count - _fewer(flows, labels_of(classes, of_amount(amount))) <= budget
        low, high = (low, amount) if fits else (amount, high)
    return labels_of(classes, of_amount(high))


def labels_of(classes: Tensor, gone: set[int]) -> Tensor:
    """Which labels are of these classes."""
    return torch.isin(classes, torch.tensor(sorted(gone), dtype=torch.long))


def _fewer(flows: Flows, gone: Tensor) -> int:
    """How many parameters are lost with these labels."""
    lost = 0
    for layer in flows.layers.values():
        sizes = {key: one.numel() for key, one in layer.module._parameters.items() if one is not None}
        outs, ins = (_staying(labels, gone) for labels in (layer.outputs, layer.inputs))
        groups = getattr(layer.module, "groups", 1)
        if groups > 1:  # a group that goes takes its inputs along; the others lose as many each
            alive = int((~gone[layer.inputs]).view(groups, -1).any(1).sum()) / groups
            ins /= max(alive, 1 / groups)
        left = {key: size * outs * (ins if key == "weight" else 1) for key, size in sizes.items()}
        lost += sum(sizes.values()) - round(sum(left.values()))
    return lost + sum(int(gone[labels].sum()) for _, labels in flows.parameters.values())


def _staying(labels: Tensor | None, gone: Tensor) -> float:
    return 1.0 if labels is None else 1 - int(gone[labels].sum()) / max(len(labels), 1)
