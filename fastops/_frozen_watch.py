"""Whether the tensors of the model that a frozen model was made from are what they were."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastops import _C


class _Place(NamedTuple):
    """Where a tensor of the model is, and what it was when the model was frozen.

    fingerprint: what its own call of _C.fingerprint gave when its values were last looked at.
    values: what _values gave.
    """

    name: str
    module: Any  # a weak reference
    place: str  # "_parameters", "_buffers" or "_modules"
    key: Any  # None: all that is there
    fingerprint: int
    values: Any

    @property
    def where(self) -> tuple[Any, str, str]:
        return self.module, self.place, self.key

    def now(self) -> Any:
        """What `values` would be."""
        there = vars(self.module()).get(self.place, {})
        return [(name, id(one)) for name, one in there.items()] if self.key is None else _values(there.get(self.key))


class Watch:
    """All parameters and buffers of a model, and of which modules it consists.

    A call compares a fingerprint: which tensors these are, their memory, their versions and a few of their elements.
    That is quick, and changes more often than the values do: share_memory_() moves them, load_state_dict() may write
    what was there. Where it has changed, all values are compared.
    """

    def __init__(self, model: nn.Module | None) -> None:
        """None: what a copy of a frozen model has, which knows no model."""
        self.root = weakref.ref(model) if model is not None else _nothing
        found = [
            (f"{prefix}.{name}" if prefix else name, weakref.ref(module), place, name)
            for prefix, module in (model.named_modules() if model is not None else ())
            if not isinstance(module, torch.jit.ScriptModule)
            for place in ("_parameters", "_buffers")
            for name in vars(module)[place]
        ]
        found += [
            (prefix, weakref.ref(module), "_modules", None)
            for prefix, module in (model.named_modules() if model is not None else ())
            if not isinstance(module, torch.jit.ScriptModule) and vars(module)["_modules"]
        ]
        self._note([one._replace(values=one.now()) for one in (_Place(*one, 0, None) for one in found)])

    def _note(self, places: list[_Place]) -> None:
        self.places = [one._replace(fingerprint=_C.fingerprint([one.where])) for one in places]
        self.where = [one.where for one in places]
        self.fingerprint = _C.fingerprint(self.where)

    def look_closer(self) -> None:
        """Raises if a value has changed. Otherwise the model is gone, or what is left of it has not changed."""
        alive = []
        for one in self.places:
            if one.module() is None:
                if self.root() is None:
                    continue
                same = False
            else:
                same = _C.fingerprint([one.where]) == one.fingerprint or one.now() == one.values
            if not same:
                what = f"'{one.name}' of the model" if one.name else "the model"
                raise RuntimeError(f"fastops.freeze: {what} has changed since it was frozen; call fastops.freeze again")
            alive.append(one)
        self._note(alive)

    def __reduce__(self) -> Any:
        """Copies and pickles do not know the model."""
        return Watch, (None,)


def _nothing() -> None:
    """A reference to a model that is gone."""


def _values(tensor: Any) -> Any:
    """Equal for tensors with the same values, of the same dtype, in any memory."""
    if not isinstance(tensor, Tensor):
        return None
    kind = type(tensor), tensor.dtype, tensor.shape, tensor.device, tensor.layout
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return *kind, id(tensor), 0 if tensor.is_inference() else tensor._version
    return *kind, _C.hash_of_values(tensor.detach().cpu())
