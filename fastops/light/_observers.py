"""What is seen of a tensor over all batches of a calibration, and the range of levels that follows from it."""

import math

import torch
from torch import Tensor

OBSERVERS = ("minmax", "percentile", "mse")
# What "percentile" cuts off at either end. Of ten thousand numbers one is outside.
_CUT = 1e-4
# Bins of the histogram, of which the numbers of one sign fill at least an eighth.
_BINS = 8192
# The ranges that "mse" tries: these parts of the whole one.
_PARTS = [1 - i / 64 for i in range(52)]


class Observer:
    """Least and greatest number of what is seen, and a histogram.

    The histogram is of [-2^e, 2^e]. Where greater numbers come, neighbouring bins become one: nothing is lost but what
    finer bins would tell.
    """

    def __init__(self, histogram: bool) -> None:
        self.low, self.high, self.finite = math.inf, -math.inf, True
        self.exponent: int | None = None
        self.counts = torch.zeros(_BINS, dtype=torch.float64) if histogram else None

    @property
    def called(self) -> bool:
        return self.low <= self.high or not self.finite

    def see(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        x = tensor.detach().float().flatten()
        low, high = (float(one) for one in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(abs(low), abs(high))
        if self.counts is None or largest == 0:
            if self.counts is not None and self.exponent is not None:
                self.counts[_BINS // 2] += x.numel()
            return
        self._widen(math.frexp(largest)[1])
        limit = 2.0**self.exponent
        self.counts += torch.histc(x, _BINS, -limit, limit).double()

    def _widen(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = pairs
            self.exponent += 1

    def range(self, observer: str, symmetric: bool) -> tuple[float, float]:
        """The least and the greatest number that is to have a level."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if observer == "minmax" or self.exponent is None:
            return low, high
        width = 2.0 ** (self.exponent + 1) / _BINS
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - 2.0**self.exponent
        if observer == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            below = float(middles[int((share < _CUT).sum())]) - width / 2
            above = float(middles[int((share < 1 - _CUT).sum())]) + width / 2
            return max(low, min(below, 0.0)), min(high, max(above, 0.0))
        used = self.counts > 0
        values, weights = middles[used], self.counts[used]
        found, best = (low, high), math.inf
        for part in _PARTS:
            scale, zero = scale_and_zero(low * part, high * part, symmetric)
            levels = (torch.round(values / scale) + zero).clamp(0, 255) - zero
            error = float((weights * (levels * scale - values).square()).sum())
            if error < best:
                found, best = (low * part, high * part), error
        return found


def scale_and_zero(low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """The scale and the zero point of 256 levels from low <= 0 to high >= 0; symmetric: the zero point is 128."""
    least = torch.finfo(torch.float32).tiny
    if symmetric:
        return max(max(-low, high) / 127, least), 128
    scale = max((high - low) / 255, least)
    return scale, min(max(round(-low / scale), 0), 255)
