"""The pool that large outputs come from.

PyTorch's CPU allocator gives a large block back to the system at every free, so the next output of that size pays its
page faults again. fastops keeps freed blocks for the next outputs instead, on huge pages. It never keeps more than the
limit, and never lets live and cached bytes together exceed what was live at the peak.
"""

from fastops import _C


def stats() -> dict[str, int]:
    """What the pool holds and has done.

    Returns:
        A dict with
        allocated_bytes: held by tensors that are alive,
        cached_bytes: kept for the next ones,
        peak_allocated_bytes: the most that living tensors have held,
        limit_bytes: the bound on cached_bytes,
        threshold_bytes: outputs of this size and more come from the pool,
        hits, misses: outputs served from the cache, and from the system.
    """
    return _C.memory_stats()


def set_limit(limit_bytes: int) -> None:
    """Bounds the bytes that the pool keeps when no tensor uses them; gives back at once what is above. 0 keeps nothing.

    Raises:
        TypeError: limit_bytes is not an integer.
        ValueError: limit_bytes is negative.
    """
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
        raise TypeError(f"set_limit: limit_bytes must be an int, got {type(limit_bytes).__name__}")
    if limit_bytes < 0:
        raise ValueError(f"set_limit: limit_bytes must not be negative, got {limit_bytes}")
    _C.memory_set_limit(limit_bytes)


def empty_cache() -> None:
    """Gives every cached block back to the system. Tensors that are alive are not touched."""
    _C.memory_empty_cache()
