"""Host arrays for rows: they start on a cache line, large ones lie in huge pages, and short-lived ones are used again.

A fresh array costs a page fault for every page that is first written: as much time as filling it several times over.
Knows nothing of rows, slots or torch. Measured: docs/measured_facts.md.
"""

import math
import mmap
import sys
import threading

import numpy as np

__all__ = ["RecycledArrays", "aligned_empty", "whole_pages_of"]

CACHE_LINE = 64
PAGE = mmap.PAGESIZE
SMALLEST = 1 << 16  # bytes: malloc hands smaller arrays out again by itself
MOST_KEPT = 8


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type, whole_pages: bool = False) -> np.ndarray:
    """An uninitialised array that starts on a cache line, so that a row touches as few lines as it can.

    numpy asks for huge pages by itself (torch.empty does not), but starts 16 bytes past one.

    whole_pages: it starts on a page, and shares none with anything else, so that its pages can be pinned for a device.
    """
    if not whole_pages:
        return _shaped(_raw(_num_bytes(shape, dtype)), shape, dtype)
    num_bytes = whole_pages_of(_num_bytes(shape, dtype))
    raw = np.empty(num_bytes + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + _num_bytes(shape, dtype)].view(dtype).reshape(shape)


def whole_pages_of(num_bytes: int) -> int:
    """`num_bytes`, rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype | type) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _raw(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes + CACHE_LINE, np.uint8)


def _shaped(raw: np.ndarray, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + _num_bytes(shape, dtype)].view(dtype).reshape(shape)


class RecycledArrays:
    """Hands out uninitialised arrays, and their memory again once nothing refers to it any more.

    Every view of an array, and every torch tensor made by `torch.from_numpy`, counts as a reference for as long as its
    storage lives; so whoever keeps one keeps its values. Arrays below 64 KiB are fresh ones. At most 8 are kept.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()
        # Reference counts are exact only under the interpreter's global lock.
        self._counts = getattr(sys, "_is_gil_enabled", lambda: True)()
        self._unused = _references([_raw(0)], 0)

    def take(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """An array that nobody else refers to; on a cache line, if it is not a small one."""
        num_bytes = _num_bytes(shape, dtype)
        if num_bytes < SMALLEST:
            return np.empty(shape, dtype)
        # Not waited for: a signal handler may have interrupted a call of its own thread.
        if not self._counts or not self._lock.acquire(blocking=False):
            return aligned_empty(shape, dtype)
        try:
            kept = self._kept
            for number in range(len(kept)):
                fits = num_bytes + CACHE_LINE <= kept[number].size <= 2 * num_bytes + CACHE_LINE
                if fits and _references(kept, number) == self._unused:
                    kept.append(kept.pop(number))  # the last used one comes last
                    return _shaped(kept[-1], shape, dtype)
            if len(kept) == MOST_KEPT:
                del kept[0]
            kept.append(_raw(num_bytes + num_bytes // 8))  # the next one may be a little larger
            return _shaped(kept[-1], shape, dtype)
        finally:
            self._lock.release()

    def num_bytes(self) -> int:
        """Bytes kept, in use or not."""
        return sum(array.nbytes for array in list(self._kept))


def _references(arrays: list[np.ndarray], number: int) -> int:
    return sys.getrefcount(arrays[number])
