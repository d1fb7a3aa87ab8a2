"""in_parts: one kernel over a range, shared out among as many threads as torch would use.

The kernels release the GIL, so Python's own threads do; numba's would start a second pool beside torch's. A kernel may
be shared out only where each part writes what no other part reads or writes: then the bits do not depend on the number.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["in_parts", "num_parts"]

_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pool.clear)  # a child has none of its parent's threads


def num_parts(work: int, grain: int) -> int:
    """In how many parts `work` units are worth doing, each at least `grain`."""
    return max(1, min(torch.get_num_threads(), work // grain))


def in_parts(kernel: Callable[[int, int], object], size: int, parts: int) -> None:
    """kernel(first, last) over `parts` contiguous parts of range(size); returns when all are done."""
    if parts <= 1:
        kernel(0, size)
        return
    bounds = [size * part // parts for part in range(parts + 1)]
    if not _pool:
        _pool.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="freqcache-kernels"))
    others = [_pool[0].submit(kernel, *bounds[part : part + 2]) for part in range(1, parts)]
    try:
        kernel(*bounds[:2])
    finally:
        for other in others:
            other.result()
