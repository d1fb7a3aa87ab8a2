"""The numba functions over 16-bit rows: to float32 and back by stochastic rounding, updates, and the one-hot adjoint.

numba has no such numbers. A block of bfloat16 comes as uint16, one of float16 as int16: by these types `widened` and
`rounded` know what the bits mean, and each function is compiled for both. What the random bits and the rounding are is
written down in `rounding`, and the updates are those of `cpu_rows` on widened rows, bit for bit. Loops as there.
Shapes as in `kernels`; `key`: (stream, ids, columns) of a Rounding.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from ..vectors import bits_of_float, float_of_bits, prefetch_row

__all__ = [
    "pool_one_hot_backward",
    "round_rows",
    "update_adagrad",
    "update_adam",
    "update_rowwise_adagrad",
    "update_sgd",
    "widen_rows",
]

AHEAD = 8  # rows


# ---- one element -----------------------------------------------------------------------------------------------------


def widened(half):
    """float32 of the bits of a bfloat16 (uint16) or float16 (int16)."""
    raise NotImplementedError


@overload(widened)
def _widened(half):
    return _widened_bfloat16 if half == types.uint16 else _widened_float16


def _widened_bfloat16(half):
    return float_of_bits(np.uint32(np.uint32(half) << np.uint32(16)))


def _widened_float16(half):
    bits = np.uint32(np.uint16(half))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    bits = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    if bits >= np.uint32(0x0F800000):  # inf, nan
        bits = np.uint32(bits + np.uint32(224 << 23))
    elif bits >= np.uint32(1 << 23):
        bits = np.uint32(bits + np.uint32(112 << 23))
    else:  # units of 2^-24
        bits = bits_of_float(np.float32(np.int32(bits >> np.uint32(13))) * np.float32(2.0**-24))
    return float_of_bits(np.uint32(sign | bits))


def rounded(half, value, random):
    """The bits of `value` (float32), rounded by `random` (uint32) to the type of `half`."""
    raise NotImplementedError


@overload(rounded)
def _rounded(half, value, random):
    return _rounded_bfloat16 if half == types.uint16 else _rounded_float16


def _rounded_bfloat16(half, value, random):
    bits = bits_of_float(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    result = np.uint32(np.uint32(magnitude + (random >> np.uint32(16))) >> np.uint32(16))
    result = min(result, np.uint32(0x7F7F))
    if magnitude >= np.uint32(0x7F800000):
        result = np.uint32(0x7F80) + np.uint32(magnitude > np.uint32(0x7F800000))
    return np.uint16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


def _rounded_float16(half, value, random):
    bits = bits_of_float(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x7F800000):
        result = np.uint32(0x7C00) + np.uint32(magnitude > np.uint32(0x7F800000))
    elif magnitude >= np.uint32(113 << 23):
        result = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(random >> np.uint32(19)))
        result = min(np.uint32(result >> np.uint32(13)), np.uint32(0x7BFF))
    else:  # units of 2^-24
        units = float_of_bits(magnitude) * np.float32(2.0**24)
        below = np.int32(units)
        chance = np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24)
        result = np.uint32(below + np.int32(chance < units - np.float32(below)))
    return np.int16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@njit(inline="always")
def _row_key(stream, identity):
    """(low, high 32 bits) of the row's hash."""
    key = np.uint64(np.uint64(identity) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream))
    key = np.uint64((key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    key = np.uint64((key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    key = np.uint64(key ^ (key >> np.uint64(31)))
    return np.uint32(key), np.uint32(key >> np.uint64(32))


@njit(inline="always")
def _random(low, high, column):
    mixed = np.uint32(low + np.uint32(column * np.uint32(0x9E3779B9)))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(13)) ^ high) * np.uint32(0xC2B2AE35))
    return np.uint32(mixed ^ (mixed >> np.uint32(16)))


# ---- rows ------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def widen_rows(records, slots, rows, first, last):
    """rows[i] = records[slots[i], :width of rows] in float32, for i in first..last-1."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        for d in range(taken):
            rows[i, d] = widened(records[slot, d])


@njit(cache=True, nogil=True)
def round_rows(rows, records, slots, stream, ids, columns, first, last):
    """records[slots[i], d] = rows[i, d] for i in first..last-1, rounded by the bits of (stream, ids[i], columns[d])."""
    width, taken = records.shape[1], rows.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, taken)
        slot = np.int64(slots[i])
        low, high = _row_key(stream, ids[i])
        for d in range(taken):
            records[slot, d] = rounded(records[slot, d], rows[i, d], _random(low, high, columns[d]))


@njit(cache=True, nogil=True)
def pool_one_hot_backward(grad, unique_of_position, place_of_unique, values, first_table, last_table, first, last):
    """values (float32) as `cpu_rows.pool_one_hot_backward`, of a 16-bit `grad`."""
    bags_per_table, num_tables, dim = grad.shape
    for b in range(bags_per_table):  # sample by sample, as `grad` lies in memory
        for t in range(first_table, last_table):
            u = unique_of_position[t * bags_per_table + b]
            if u >= first and u < last:
                prefetch_row(grad, ((b + 2) * num_tables + t) * dim, dim)
                place = np.int64(place_of_unique[u])
                if place >= 0:
                    place_of_unique[u] = -1 - place
                    for d in range(dim):
                        values[place, d] = widened(grad[b, t, d])
                else:
                    for d in range(dim):
                        values[-1 - place, d] += widened(grad[b, t, d])
    for u in range(first, last):
        if place_of_unique[u] < 0:
            place_of_unique[u] = -1 - place_of_unique[u]


# ---- updates: the formulas of `cpu_rows` -----------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def update_sgd(records, dim, slots, grads, stream, ids, columns, lr, first, last):
    """w -= lr * g"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], dim)
        slot = np.int64(slots[i])
        low, high = _row_key(stream, ids[i])
        for d in range(dim):
            w = widened(records[slot, d]) - lr * widened(grads[i, d])
            records[slot, d] = rounded(records[slot, d], w, _random(low, high, columns[d]))


@njit(cache=True, nogil=True, error_model="numpy")
def update_adagrad(records, dim, slots, grads, stream, ids, columns, lr, eps, first, last):
    """s += g * g; w -= lr * g / (sqrt(s) + eps)"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], 2 * dim)
        slot = np.int64(slots[i])
        low, high = _row_key(stream, ids[i])
        for d in range(dim):
            g = widened(grads[i, d])
            s = widened(records[slot, dim + d]) + g * g
            w = widened(records[slot, d]) - lr * (g / (np.sqrt(s) + eps))
            records[slot, dim + d] = rounded(records[slot, dim + d], s, _random(low, high, columns[dim + d]))
            records[slot, d] = rounded(records[slot, d], w, _random(low, high, columns[d]))


@njit(cache=True, nogil=True, error_model="numpy")
def update_rowwise_adagrad(records, dim, slots, grads, stream, ids, columns, mean_squares, lr, eps, first, last):
    """s += mean_squares[i]; w -= lr / (sqrt(s) + eps) * g"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], dim + 1)
        slot = np.int64(slots[i])
        low, high = _row_key(stream, ids[i])
        s = np.float32(widened(records[slot, dim]) + mean_squares[i])
        scale = lr / (np.sqrt(s) + eps)
        records[slot, dim] = rounded(records[slot, dim], s, _random(low, high, columns[dim]))
        for d in range(dim):
            w = widened(records[slot, d]) - scale * widened(grads[i, d])
            records[slot, d] = rounded(records[slot, d], w, _random(low, high, columns[d]))


@njit(cache=True, nogil=True, error_model="numpy")
def update_adam(records, dim, slots, grads, stream, ids, columns, rest1, rest2, eps, step_size, first, last):
    """m += rest1 * (g - m); v += rest2 * (g * g - v); w -= step_size * m / (sqrt(v) + eps)"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], 3 * dim)
        slot = np.int64(slots[i])
        low, high = _row_key(stream, ids[i])
        for d in range(dim):
            g = widened(grads[i, d])
            m = widened(records[slot, dim + d])
            v = widened(records[slot, 2 * dim + d])
            m += (g - m) * rest1
            v += (g * g - v) * rest2
            w = widened(records[slot, d]) - step_size * (m / (np.sqrt(v) + eps))
            records[slot, dim + d] = rounded(records[slot, dim + d], m, _random(low, high, columns[dim + d]))
            records[slot, 2 * dim + d] = rounded(
                records[slot, 2 * dim + d], v, _random(low, high, columns[2 * dim + d])
            )
            records[slot, d] = rounded(records[slot, d], w, _random(low, high, columns[d]))
