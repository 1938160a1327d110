"""What convolutions may trade for speed. The setting holds for the whole process."""

from fastops import _C

_NAMES = {"highest": 0, "medium": 2}  # kernels/common/tensor.h


def set_conv_precision(precision: str) -> None:
    """Chooses the algorithms that float32 convolutions may use, in the whole process.

    Args:
        precision: "highest", the default: the rms error stays within three times that of direct summation.
            "medium": 3x3 convolutions may also use Winograd's F(4x4, 3x3), which is faster, and four to seven times
            less exact.

    Raises:
        ValueError: any other name.

    Source: the names are torch.set_float32_matmul_precision's.

    >>> fastops.set_conv_precision("medium")
    >>> fastops.get_conv_precision()
    'medium'
    >>> fastops.set_conv_precision("highest")
    """
    if precision not in _NAMES:
        raise ValueError(f"set_conv_precision: precision must be 'highest' or 'medium', got {precision!r}")
    _C.set_conv_precision(_NAMES[precision])


def get_conv_precision() -> str:
    """The name that set_conv_precision was last given: "highest", the default, or "medium".

    Raises nothing. Source: named after torch.get_float32_matmul_precision.

    >>> fastops.get_conv_precision()
    'highest'
    """
    return next(name for name, value in _NAMES.items() if value == _C.conv_precision())
