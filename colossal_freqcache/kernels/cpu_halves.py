"""The numba functions over records of 16-bit elements: to float32, and back by stochastic rounding.

numba has no such numbers: blocks come as uint16, and each type has its own functions, on bits. What they compute is
written down in `rounding`; the torch set is its plain form. Loops as in `cpu_rows`: flat, indexed by int64.
Shapes as in `kernels`.
"""

import numpy as np
from numba import njit

from ..vectors import bits_of_float, float_of_bits, prefetch_row

__all__ = ["round_rows_bfloat16", "round_rows_float16", "widen_rows_bfloat16", "widen_rows_float16"]

AHEAD = 8  # rows


@njit(cache=True, nogil=True)
def widen_rows_bfloat16(records, slots, rows, first, last):
    """rows[i] = records[slots[i], :width of rows] in float32, for i in first..last-1."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        for d in range(taken):
            rows[i, d] = float_of_bits(np.uint32(np.uint32(records[slot, d]) << np.uint32(16)))


@njit(cache=True, nogil=True)
def widen_rows_float16(records, slots, rows, first, last):
    """The same for float16."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        for d in range(taken):
            half = np.uint32(records[slot, d])
            sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
            bits = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
            if bits >= np.uint32(0x0F800000):  # inf, nan
                bits = np.uint32(bits + np.uint32(224 << 23))
            elif bits >= np.uint32(1 << 23):
                bits = np.uint32(bits + np.uint32(112 << 23))
            else:  # units of 2^-24
                units = np.float32(np.int32(bits >> np.uint32(13))) * np.float32(2.0**-24)
                bits = bits_of_float(units)
            rows[i, d] = float_of_bits(np.uint32(sign | bits))


@njit(inline="always")
def _row_key(stream, identity):
    key = np.uint64(np.uint64(identity) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream))
    key = np.uint64((key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    key = np.uint64((key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(key ^ (key >> np.uint64(31)))


@njit(inline="always")
def _random_bits(low, high, column):
    mixed = np.uint32(low + np.uint32(column * np.uint32(0x9E3779B9)))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(13)) ^ high) * np.uint32(0xC2B2AE35))
    return np.uint32(mixed ^ (mixed >> np.uint32(16)))


@njit(cache=True, nogil=True)
def round_rows_bfloat16(rows, records, slots, stream, ids, columns, first, last):
    """records[slots[i], d] = rows[i, d] for i in first..last-1, rounded by the bits of (stream, ids[i], columns[d])."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        key = _row_key(stream, ids[i])
        low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
        for d in range(taken):
            bits = bits_of_float(rows[i, d])
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            random = _random_bits(low, high, columns[d])
            rounded = np.uint32(np.uint32(magnitude + (random >> np.uint32(16))) >> np.uint32(16))
            rounded = min(rounded, np.uint32(0x7F7F))
            if magnitude >= np.uint32(0x7F800000):
                rounded = np.uint32(0x7F80) + np.uint32(magnitude > np.uint32(0x7F800000))
            records[slot, d] = np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@njit(cache=True, nogil=True)
def round_rows_float16(rows, records, slots, stream, ids, columns, first, last):
    """The same for float16."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        key = _row_key(stream, ids[i])
        low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
        for d in range(taken):
            bits = bits_of_float(rows[i, d])
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            random = _random_bits(low, high, columns[d])
            if magnitude >= np.uint32(0x7F800000):
                rounded = np.uint32(0x7C00) + np.uint32(magnitude > np.uint32(0x7F800000))
            elif magnitude >= np.uint32(113 << 23):
                rounded = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(random >> np.uint32(19)))
                rounded = min(np.uint32(rounded >> np.uint32(13)), np.uint32(0x7BFF))
            else:  # units of 2^-24
                units = float_of_bits(magnitude) * np.float32(2.0**24)
                below = np.int32(units)
                chance = np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24)
                rounded = np.uint32(below + np.int32(chance < units - np.float32(below)))
            records[slot, d] = np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))
