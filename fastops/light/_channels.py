"""Which channels of a model hang together.

Every element of a tensor has a label, a number that says which channel it belongs to. Elements of two labels that have
to go together are tied: the channels of x and of y in x + y, say. What is tied, directly or not, is a class: all of it
is removed, or none. Some labels say that a class stays, and why.

A tensor of labels has stride 0 along every dimension in which it does not vary, which is what `varies` asks.
"""

import torch
from torch import Tensor


class Channels:
    """The labels of one model."""

    def __init__(self) -> None:
        self.count = 0
        self.reasons: dict[int, str] = {}  # by label
        self._pairs: list[Tensor] = []

    def fresh(self, count: int) -> Tensor:
        """Labels that nothing has."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def fixed(self, shape: torch.Size, why: str) -> Tensor:
        """Labels of a tensor that stays as it is."""
        label = self.fresh(1)
        self.reasons[int(label)] = why
        return label.view([1] * len(shape)).expand(shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Elements of a and of b, broadcast, go together."""
        a, b = torch.broadcast_tensors(a, b)
        for d in reversed(range(a.dim())):
            if a.size(d) > 0 and a.stride(d) == b.stride(d) == 0:
                a, b = a.select(d, 0), b.select(d, 0)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            self._pairs.append(torch.unique(pairs, dim=1))

    def keep(self, labels: Tensor, why: str) -> None:
        """The channels of these elements stay."""
        self.tie(labels, self.fixed(torch.Size(), why))

    def classes(self) -> Tensor:
        """The smallest label of each label's class."""
        root = torch.arange(self.count)
        if not self._pairs:
            return root
        a, b = torch.cat(self._pairs, 1)
        while True:
            low = torch.minimum(root[a], root[b])
            # Of the roots, not of the labels: a class then follows its root in one step.
            root = root.scatter_reduce(0, root[a], low, "amin").scatter_reduce(0, root[b], low, "amin")
            while not torch.equal(root, root[root]):
                root = root[root]
            if torch.equal(root[a], root[b]):
                return root

    def kept(self, classes: Tensor) -> dict[int, str]:
        """Why a class stays, by its smallest label."""
        found: dict[int, str] = {}
        for label, why in self.reasons.items():
            found.setdefault(int(classes[label]), why)
        return found


def compact(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 wherever they do not vary."""
    for d in range(labels.dim()):
        if labels.size(d) > 1 and labels.stride(d) != 0:
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand_as(labels)
    return labels


def varies(labels: Tensor, d: int) -> bool:
    return labels.size(d) > 1 and labels.stride(d) != 0


def varying(labels: Tensor) -> list[int]:
    return [d for d in range(labels.dim()) if varies(labels, d)]
