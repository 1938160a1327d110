"""What the functions of fastops.light that prune and factor have done: Changes."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from fastops.replace import Row, _table

__all__ = ["Changes"]


@dataclass
class Changes:
    """What became of each layer. str() is a table: a line for all layers that fared alike, and one of parameters.

    Attributes:
        changed: a Row for every layer that is another now.
        kept: a Row for every layer that could have been and was not, and why.
        untraced: a Row for every module whose forward could not be traced, and why; one call of it was followed
            instead where that calls all of its layers, and what it calls on its own where not.
        before, after: how many parameters the model had, and has. Those that are 0 count.
        removed: of prune_channels_: which channels each layer, norm and parameter lost, ascending, by name.
    """

    changed: list[Row] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    untraced: list[Row] = field(default_factory=list)
    before: int = 0
    after: int = 0
    removed: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = _table(("->", self.changed), ("kept:", self.kept), ("untraced:", self.untraced))
        ratio = f", 1 of {self.before / self.after:.2f}" if 0 < self.after < self.before else ""
        return "\n".join([*lines, f"{self.before} parameters -> {self.after}{ratio}"])


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
