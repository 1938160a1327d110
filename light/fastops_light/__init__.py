"""Runs models that fastops.light.save has written. Needs NumPy and no PyTorch.

>>> import numpy
>>> model = Model("model.fops")
>>> model(numpy.zeros((1, 64), numpy.float32)).shape
(1, 10)
"""

import ctypes
import importlib.util
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

__all__ = ["Model", "isa", "library", "version"]

_MOST_DIMS = 8
# The numbers of fastops_run.h; NumPy has no bfloat16 and no float8, which only weights are of.
_TYPES = {
    0: numpy.dtype(numpy.float32),
    1: numpy.dtype(numpy.float64),
    3: numpy.dtype(numpy.float16),
    4: numpy.dtype(numpy.int8),
    5: numpy.dtype(numpy.uint8),
    6: numpy.dtype(numpy.int32),
    7: numpy.dtype(numpy.int64),
}
_NUMBERS = {dtype: number for number, dtype in _TYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * _MOST_DIMS),
        ("data", ctypes.c_void_p),
    ]


def library() -> Path:
    """Where libfastops_run.so is: $FASTOPS_RUN_LIBRARY, else beside this file, else in an installed fastops.

    Raises:
        ImportError: it is nowhere.
    """
    name = "libfastops_run.so"
    asked = os.environ.get("FASTOPS_RUN_LIBRARY")
    if asked:
        return Path(asked)
    folders = [Path(__file__).resolve().parent]
    spec = importlib.util.find_spec("fastops")  # which is not imported: that would bring PyTorch
    folders += [Path(one) for one in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ImportError(f"fastops_light: there is no {name} in {' or '.join(map(str, folders))}")


def _load() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library()))
    pointer, size, text, tensors = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.POINTER(_Tensor)
    for name, result, arguments in (
        ("open", pointer, [text, ctypes.c_int]),
        ("close", None, [pointer]),
        ("inputs", size, [pointer]),
        ("outputs", size, [pointer]),
        ("input_name", text, [pointer, size]),
        ("output_name", text, [pointer, size]),
        ("input", _Tensor, [pointer, size]),
        ("memory", size, [pointer]),
        ("error", text, []),
        ("version", text, []),
        ("isa", text, []),
    ):
        function = getattr(lib, f"fastops_run_{name}")
        function.restype, function.argtypes = result, arguments
    lib.fastops_run.restype = ctypes.c_int
    lib.fastops_run.argtypes = [pointer, tensors, size, tensors, size]
    return lib


_lib = _load()


def version() -> str:
    """The version of the library."""
    return _lib.fastops_run_version().decode()


def isa() -> str:
    """The instruction set that its kernels use on this processor, such as "avx2"."""
    return _lib.fastops_run_isa().decode()


def _problem() -> str:
    return _lib.fastops_run_error().decode(errors="replace")


class Model:
    """A model that is called with NumPy arrays.

    Args:
        path: of a file that fastops.light.save has written. It is mapped into memory, and must stay as it is.
        threads: how many threads compute, the calling one among them.

    Attributes:
        inputs: the shape and dtype of each input by its name; -1 is a size that is free.
        outputs: the names of the outputs.

    Raises:
        OSError: the file cannot be read, or is damaged. ValueError: arrays do not fit.

    Calls of one model wait for each other; those of two models run side by side.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        self._model = None
        model = _lib.fastops_run_open(os.fsencode(path), threads)
        if not model:
            raise OSError(f"fastops_light: {_problem()}")
        self._model, self._lock = model, threading.Lock()
        self.inputs: dict[str, tuple[tuple[int, ...], numpy.dtype]] = {}
        for i in range(_lib.fastops_run_inputs(model)):
            about = _lib.fastops_run_input(model, i)
            name = _lib.fastops_run_input_name(model, i).decode(errors="replace")
            if about.type not in _TYPES:
                raise OSError(f"fastops_light: input {name} is of bfloat16, which NumPy does not have")
            self.inputs[name] = tuple(about.dims[: max(about.rank, 0)]), _TYPES[about.type]
        count = _lib.fastops_run_outputs(model)
        self.outputs = [_lib.fastops_run_output_name(model, i).decode(errors="replace") for i in range(count)]

    def __call__(self, *arrays: Any) -> Any:
        """The output, or a tuple of them, for an array for each input (or what becomes one), converted to its dtype."""
        if len(arrays) != len(self.inputs):
            raise ValueError(f"fastops_light: the model has {len(self.inputs)} inputs, got {len(arrays)}")
        types = (dtype for _, dtype in self.inputs.values())
        kept = [numpy.ascontiguousarray(one, dtype) for one, dtype in zip(arrays, types, strict=True)]
        inputs = (_Tensor * len(kept))(*map(_tensor, kept))
        outputs = (_Tensor * len(self.outputs))()
        with self._lock:
            if self._model is None:
                raise ValueError("fastops_light: the model is closed")
            if _lib.fastops_run(self._model, inputs, len(inputs), outputs, len(outputs)) != 0:
                raise ValueError(f"fastops_light: {_problem()}")
            results = tuple(map(_array, outputs))
        return results[0] if len(results) == 1 else results

    def memory(self) -> int:
        """Bytes of packed weights and results that it has besides its file."""
        return _lib.fastops_run_memory(self._model)

    def close(self) -> None:
        """Frees everything; further calls raise ValueError."""
        with self._lock:
            model, self._model = self._model, None
            if model is not None:
                _lib.fastops_run_close(model)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()


def _tensor(array: numpy.ndarray) -> _Tensor:
    if array.ndim > _MOST_DIMS:
        raise ValueError(f"fastops_light: an array may have {_MOST_DIMS} dimensions, got {array.ndim}")
    dims = (ctypes.c_int64 * _MOST_DIMS)(*array.shape)
    return _Tensor(_NUMBERS[array.dtype], array.ndim, dims, array.ctypes.data)


def _array(tensor: _Tensor) -> numpy.ndarray:
    shape: Sequence[int] = tensor.dims[: tensor.rank]
    result = numpy.empty(shape, _TYPES[tensor.type])
    if result.nbytes:
        ctypes.memmove(result.ctypes.data, tensor.data, result.nbytes)
    return result
