"""The pool that large outputs come from.

PyTorch's CPU allocator gives a large block back to the system when it is freed, so the next output of that size pays
for its page faults again. fastops keeps freed blocks, on huge pages, for the next outputs. It never keeps more than the
limit, and live and cached bytes together never exceed the most that was live at one time by more than
1.6% and 10 MiB.
"""

from fastops import _C


def stats() -> dict[str, int]:
    """What the pool holds, and what it has done since the process started.

    Returns:
        A dict of ints:
        allocated_bytes: held by tensors that are alive,
        cached_bytes: kept for the next outputs,
        peak_allocated_bytes: the most that tensors alive at the same time have held,
        limit_bytes: the bound on cached_bytes,
        threshold_bytes: outputs of this size and larger come from the pool,
        hits, misses: outputs that came from the cache, and in whole or in part from the system.

    Raises nothing. Source: fastops' own, named after torch.cuda.memory_stats.

    >>> y = FF.relu(torch.ones(2048, 1024))  # 8 MiB
    >>> fastops.memory.stats()["allocated_bytes"] >= 8 * 2**20
    True
    """
    return _C.memory_stats()


def set_limit(limit_bytes: int) -> None:
    """Bounds the bytes that the pool keeps for later outputs; gives back at once what is above. 0 keeps nothing.

    Args:
        limit_bytes: an int, at least 0.

    Raises:
        TypeError: limit_bytes is not an int.
        ValueError: limit_bytes is negative.

    Source: fastops' own.

    >>> before = fastops.memory.stats()["limit_bytes"]
    >>> fastops.memory.set_limit(256 * 2**20)
    >>> fastops.memory.stats()["limit_bytes"]
    268435456
    >>> fastops.memory.set_limit(before)
    """
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
        raise TypeError(f"set_limit: limit_bytes must be an int, got {type(limit_bytes).__name__}")
    if limit_bytes < 0:
        raise ValueError(f"set_limit: limit_bytes must not be negative, got {limit_bytes}")
    _C.memory_set_limit(min(limit_bytes, 2**63 - 1))


def empty_cache() -> None:
    """Gives every cached block back to the system. Tensors that are alive are not touched.

    Raises nothing. Source: fastops' own, named after torch.cuda.empty_cache.

    >>> fastops.memory.empty_cache()
    >>> fastops.memory.stats()["cached_bytes"]
    0
    """
    _C.memory_empty_cache()
