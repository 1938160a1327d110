"""The device that the CUDA kernels' tests run on: the emulator, or with FASTOPS_TEST_DEVICE=cuda a GPU.

The emulator (tests/emulator) is built on the first import by build_native.py into build/emulator, then only after a
change.
"""

import importlib.machinery
import importlib.util
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

import build_native
from fastops import _C

ROOT = Path(__file__).resolve().parent.parent
EMULATED = os.environ.get("FASTOPS_TEST_DEVICE", "emulated") == "emulated"
SCHEDULES = ("forward", "reverse", "shuffled") if EMULATED else ("on the device",)
USUAL = 0, 0, 4, 99 << 10  # the emulator's schedule, seed, multiprocessors and shared memory


def _load() -> ModuleType:
    folder = ROOT / "build" / "emulator"
    path = folder / f"_emulator{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    with build_native.locked(folder):
        build_native.build_emulator(folder, path, Path(torch.__file__).parent, sysconfig.get_path("include"))
    spec = importlib.util.spec_from_file_location("_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _C.use_cuda_emulator(module.configure(*USUAL))
    torch.utils.rename_privateuse1_backend("emulated")
    stream = SimpleNamespace(synchronize=lambda: None)
    torch._register_device_module(
        "emulated",
        SimpleNamespace(
            get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            _is_in_bad_fork=lambda: False,
            manual_seed_all=lambda seed: None,
            get_rng_state=lambda device=None: torch.empty(0, dtype=torch.uint8),  # no op here draws numbers
            set_rng_state=lambda state, device=None: None,
            # What runs, has run: torch.distributed.checkpoint asks for streams of whatever device there is.
            current_stream=lambda device=None: stream,
            stream=lambda stream: nullcontext(),
        ),
    )
    return module


_emulator = _load() if EMULATED else None
DEVICE = torch.device("emulated" if EMULATED else "cuda", 0)
_seeds = itertools.count()


def queries() -> int:
    """How often kernels asked the emulator's runtime for properties of the device, or a kernel for shared memory, since
    the last call of this function."""
    return _emulator.take_queries()


@contextmanager
def configured(
    schedule: str = SCHEDULES[0], multiprocessors: int = 4, aligned: bool = True, shared: int = 99
) -> Iterator[None]:
    """How the emulator runs kernels inside: the order of their threads, the size of the chip that they are told, the
    KiB of shared memory that a block may have, and whether memory is aligned as a GPU's is or ends exactly at a page
    that faults. Fails where a kernel wrote past the end of its memory. A GPU has no choice.
    """
    if _emulator is None:
        yield
        return
    _C.use_cuda_emulator(_emulator.configure(SCHEDULES.index(schedule), next(_seeds), multiprocessors, shared << 10))
    _emulator.set_aligned(aligned)
    _emulator.take_overruns()
    try:
        yield
    finally:
        _C.use_cuda_emulator(_emulator.configure(*USUAL))
        _emulator.set_aligned(True)
    overruns = _emulator.take_overruns()
    assert overruns == 0, f"{overruns} bytes were written past the end of an allocation"


def put(tensor: Tensor) -> Tensor:
    """The tensor on DEVICE with its own strides, also where those leave gaps or overlap; a leaf like it."""
    if tensor.is_contiguous():
        return tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)
    low = sum((size - 1) * min(stride, 0) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    high = sum((size - 1) * max(stride, 0) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((high - low + 1 if tensor.numel() else 0,), (1,)).to(DEVICE)
    return flat.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


def compare_second_order(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """The gradients of a gradient: of the first tensor's, of the function on DEVICE and of torch's on the CPU."""
    g = torch.randn_like(theirs(*tensors))
    h = torch.randn_like(tensors[0])

    def second(function: Callable[..., Tensor], place: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        leaves = [place(t).requires_grad_() for t in (*tensors, g)]
        (first,) = torch.autograd.grad(function(*leaves[:-1]), leaves[0], leaves[-1], create_graph=True)
        found = torch.autograd.grad(first, leaves, place(h), allow_unused=True)
        return [None if t is None else t.cpu() for t in found]

    for p, q in zip(second(ours, put), second(theirs, torch.clone), strict=True):
        p, q = (torch.zeros(()) if t is None else t for t in (p, q))
        torch.testing.assert_close(p, q.expand_as(p) if q.dim() == 0 else q, check_dtype=False)
