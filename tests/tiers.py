"""The ISA tiers of this machine that FASTOPS_ISA allows."""

from collections.abc import Iterator

import torch

from fastops import _C

BEST = _C.isa_used()
TIERS = [name for name in ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon") if _C.set_isa(name)]
_C.set_isa(BEST)

# These have kernels for bfloat16 only; whatever else they are asked for is avx512's.
_ONLY_BF16 = ("avx512_bf16", "amx")


def runs(tier: str, dtype: torch.dtype) -> bool:
    """Whether the tier has kernels of its own for this dtype."""
    return tier not in _ONLY_BF16 or dtype == torch.bfloat16


def tiers(dtype: torch.dtype) -> Iterator[str]:
    """Sets one tier after the other, where the reference is worth more than a test of its own for each."""
    try:
        for tier in TIERS:
            if runs(tier, dtype):
                assert _C.set_isa(tier)
                yield tier
    finally:
        _C.set_isa(BEST)
