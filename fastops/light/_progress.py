"""A line on the terminal that says how far something is."""

import sys
import time


class Progress:
    """Writes "distil 12/30, loss 0.31, 4 s left" over itself, at most ten times a second; nothing unless `shown`."""

    def __init__(self, name: str, total: int, shown: bool) -> None:
        self.name, self.total, self.shown = name, total, shown
        self.done, self._begin, self._last, self._width = 0, time.perf_counter(), 0.0, 0

    def step(self, text: str = "") -> None:
        """One more is done."""
        self.done += 1
        now = time.perf_counter()
        if not self.shown or (now - self._last < 0.1 and self.done < self.total):
            return
        self._last = now
        left = (now - self._begin) / self.done * (self.total - self.done)
        parts = [f"{self.name} {self.done}/{self.total}", text, f"{left:.0f} s left" if left > 0 else ""]
        line = ", ".join(part for part in parts if part)
        end = "\n" if self.done >= self.total else ""
        sys.stderr.write(f"\r{line.ljust(self._width)}{end}")
        sys.stderr.flush()
        self._width = len(line)
