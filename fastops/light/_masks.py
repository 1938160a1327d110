"""Which weights of a matrix are 0: masks, element by element, in blocks, or n of m that follow each other."""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pattern = str | tuple[int, int]


class Units(NamedTuple):
    """What goes together in a weight: its score, as a vector, and how to make a mask of those that stay.

    may_go: of "n:m", which ones are not among the n best of theirs; None: all may.
    """

    scores: Tensor
    may_go: Tensor | None
    shape: torch.Size  # of the weight
    block: tuple[int, int]

    def mask(self, stay: Tensor) -> Tensor:
        """(units,) booleans as a mask of the weight's shape."""
        matrix = _matrix_shape(self.shape)
        rows, columns = self.block
        blocks = stay.view(-(-matrix[0] // rows), -(-matrix[1] // columns))
        if self.block != (1, 1):
            blocks = blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: matrix[0], : matrix[1]]
        if len(self.shape) < 3:
            return blocks.reshape(self.shape)
        return blocks.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1).contiguous()


def checked_pattern(pattern: Pattern) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Block size, and n and m of "n:m".

    Raises:
        ValueError: pattern is neither.
    """
    if isinstance(pattern, str) and (found := re.fullmatch(r"(\d+):(\d+)", pattern)):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return (1, 1), (n, m)
    elif isinstance(pattern, tuple) and len(pattern) == 2 and all(type(one) is int and one > 0 for one in pattern):
        return pattern, None
    raise ValueError(f"pattern must be a block size such as (1, 4), or '2:4' or the like, got {pattern!r}")


def units_of(scores: Tensor, pattern: Pattern) -> Units:
    """The units of a weight whose elements have these scores: higher ones stay."""
    (rows, columns), part = checked_pattern(pattern)
    matrix = scores if scores.dim() < 3 else scores.movedim(1, -1)
    matrix = matrix.reshape(_matrix_shape(scores.shape))
    if part is not None:
        n, m = part
        groups = F.pad(matrix.float(), (0, -matrix.shape[1] % m), value=-torch.inf).unflatten(1, (-1, m))
        best = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n, 2).indices, True)
        return Units(matrix.flatten(), ~best.flatten(1)[:, : matrix.shape[1]].flatten(), scores.shape, (1, 1))
    if (rows, columns) == (1, 1):
        return Units(matrix.flatten(), None, scores.shape, (1, 1))
    # The mean of what a block has: it may reach past the edge.
    blocks = F.avg_pool2d(matrix.float()[None], (rows, columns), ceil_mode=True, count_include_pad=False)
    return Units(blocks.flatten(), None, scores.shape, (rows, columns))


def staying(units: list[Units], sparsity: float) -> list[Tensor]:
    """Which units stay, when the part `sparsity` of all together goes: those of the lowest scores."""
    scores = [torch.where(one.may_go, one.scores, torch.inf) if one.may_go is not None else one.scores for one in units]
    scores = torch.cat([one.float() for one in scores])
    free = sum(len(one.scores) if one.may_go is None else int(one.may_go.sum()) for one in units)
    stay = torch.ones_like(scores, dtype=torch.bool)
    count = min(int(sparsity * len(scores) + 1e-6), free)
    stay[scores.nan_to_num(torch.inf).topk(count, largest=False, sorted=False).indices] = False
    return list(stay.split([len(one.scores) for one in units]))


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows: outputs. Columns: inputs, and those of one tap of a kernel side by side."""
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], shape[1:].numel()
