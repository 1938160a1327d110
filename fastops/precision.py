"""What convolutions may trade for speed, for the whole process; the names are torch.set_float32_matmul_precision's."""

from fastops import _C

_NAMES = ("highest", "medium")  # ConvPrecision


def set_conv_precision(precision: str) -> None:
    """Chooses between the algorithms of float32 convolutions.

    Args:
        precision: "highest", the default: the rms error stays within three times that of direct summation.
            "medium": 3x3 convolutions may also use Winograd's F(4x4, 3x3): faster, and four to seven times less exact.

    Raises:
        ValueError: any other name.
    """
    if precision not in _NAMES:
        raise ValueError(f"set_conv_precision: precision must be 'highest' or 'medium', got {precision!r}")
    _C.set_conv_precision(_NAMES.index(precision))


def get_conv_precision() -> str:
    """What set_conv_precision was last told."""
    return _NAMES[_C.conv_precision()]
