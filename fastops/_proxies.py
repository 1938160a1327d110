"""What a forward is given while it is traced."""

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.proxy import Attribute, Proxy, TraceError

from fastops import _forward_code
from fastops._nodes import unpack

_MAY_BE_NONE = {"grad", "grad_fn", "_grad", "_grad_fn", "_base"}  # of a tensor: a proxy of it never is


class Input(Proxy):
    """A proxy that Python's in-place operators change in place, and that says nothing wrong about its type."""

    @property
    def __class__(self) -> type:
        # isinstance has found that this is no such object, and looks for what it says it is: PyTorch's own code may,
        # but `if isinstance(x, Tensor)` in a forward would go the wrong way.
        frame = _forward_code.asking(sys._getframe(1))
        if not _forward_code.is_ours(frame) or frame.f_code is torch.is_tensor.__code__:
            raise self._refuse("its forward asks for the type of an input")
        return Input

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        if not (_forward_code.is_ours(_forward_code.asking(frame)) or _forward_code.reads_directly(frame)):
            raise self._refuse("its forward asks what an input has")
        if name in _MAY_BE_NONE and _forward_code.is_users(frame):
            raise self._refuse("its forward asks for a gradient")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not _forward_code.is_ours(_forward_code.asking(sys._getframe(1))):
            raise self._refuse("its forward changes an attribute of a tensor")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise self._refuse("its forward changes an attribute of a tensor")

    def __hash__(self) -> int:
        if not _forward_code.is_ours(_forward_code.asking(sys._getframe(1))):
            raise self._refuse("its forward looks an input up")
        return super().__hash__()

    def __repr__(self) -> str:
        frame = _forward_code.asking(sys._getframe(1))
        if _forward_code.is_users(frame) and not _forward_code.is_for_an_assertion(frame):
            raise self._refuse("its forward makes text of an input")
        return super().__repr__()

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        instruction, count = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if dis.opname[instruction] != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        items = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([items[i] for i in range(count)])

    def _refuse(self, why: str) -> Exception:
        tracer = object.__getattribute__(self, "tracer")
        return tracer.refuse(TraceError(why))

    def __len__(self) -> int:
        raise self._refuse("its forward asks for the length of an input")

    def __int__(self) -> int:
        raise self._refuse("its forward makes a number of an input")

    def __float__(self) -> float:
        raise self._refuse("its forward makes a number of an input")


def _in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    def operate(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operate


class _Attribute(Input, Attribute):
    """x.shape and the like. It is read where the forward reads it, not, as torch.fx has it, where it is first used."""

    def __init__(self, root: Proxy, name: str) -> None:
        super().__init__(root, name)
        self.node  # noqa: B018  which creates it

    def __call__(self, *args: Any, **kwargs: Any) -> Proxy:
        result = super().__call__(*args, **kwargs)
        graph, node = self.tracer.graph, self.node
        if not node.users and not node._erased:  # a method is not read before it is called
            graph.erase_node(node)
        return result


for _name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Input, f"__{_name}__", _in_place(_name))
