"""The numba functions over records: moves, pooling and its adjoint, row updates.

No fastmath: every sum has the order of the batch's positions, so the bits depend neither on slots nor on threads.
The loops index by int64 and stay free of closures: in that form LLVM vectorises the innermost one over D.
`first`, `last` are the part of a range that a call does (`parts`); no two parts write the same row. `row` is the width
of a row in the form of `vectors`.
Shapes as in `kernels`.
"""

import numpy as np
from numba import njit

from ..vectors import add_row, add_scaled_row, copy_row, prefetch_row, scale_row, subtract_scaled_row

__all__ = [
    "copy_rows",
    "pool",
    "pool_backward",
    "pool_max",
    "pool_max_backward",
    "pool_one_hot",
    "pool_one_hot_backward",
    "renormalize",
    "square_sums",
    "update_adagrad",
    "update_adam",
    "update_rowwise_adagrad",
    "update_sgd",
    "weight_gradient",
]

AHEAD = 8  # rows
MOVED_AHEAD = 16  # rows that are copied: each is a line or more in two arrays


@njit(cache=True, nogil=True)
def copy_rows(source, source_rows, target, target_rows, row, first, last):
    """target[target_rows[i]] = source[source_rows[i]] for i in first..last-1."""
    width = source.shape[1]
    for i in range(first, last):
        if i + MOVED_AHEAD < last:
            prefetch_row(source, np.int64(source_rows[i + MOVED_AHEAD]) * width, row)
            prefetch_row(target, np.int64(target_rows[i + MOVED_AHEAD]) * width, row)
        copy_row(target, np.int64(target_rows[i]) * width, source, np.int64(source_rows[i]) * width, row)


@njit(cache=True, nogil=True)
def pool_one_hot(records, slot_of_unique, unique_of_position, out, row, first, last):
    """`pool` of samples first..last-1 where every bag has one position."""
    bags_per_table, num_tables, dim = out.shape
    width = records.shape[1]
    for b in range(first, last):
        for t in range(num_tables):
            i = t * bags_per_table + b
            if b + 1 < last:
                coming = unique_of_position[i + 1]
                if coming >= 0:
                    prefetch_row(records, np.int64(slot_of_unique[coming]) * width, row)
            u = unique_of_position[i]
            if u < 0:
                for d in range(dim):
                    out[b, t, d] = 0
            else:
                copy_row(out, (b * num_tables + t) * dim, records, np.int64(slot_of_unique[u]) * width, row)


@njit(cache=True, nogil=True, error_model="numpy")
def pool(records, slot_of_unique, unique_of_position, offsets, weights, weighted, mean, out, row, first, last):
    """`pool` of samples first..last-1."""
    bags_per_table, num_tables, dim = out.shape
    width = records.shape[1]
    for b in range(first, last):  # sample by sample, as `out` lies in memory
        for t in range(num_tables):
            bag = t * bags_per_table + b
            to = (b * num_tables + t) * dim
            taken = 0
            for i in range(offsets[bag], offsets[bag + 1]):
                if i + AHEAD < unique_of_position.size:
                    coming = unique_of_position[i + AHEAD]
                    if coming >= 0:
                        prefetch_row(records, np.int64(slot_of_unique[coming]) * width, row)
                u = unique_of_position[i]
                if u < 0:
                    continue
                at = np.int64(slot_of_unique[u]) * width
                if weighted and taken == 0:
                    scale_row(out, to, records, at, row, weights[i])
                elif weighted:
                    add_scaled_row(out, to, records, at, row, weights[i])
                elif taken == 0:
                    copy_row(out, to, records, at, row)
                else:
                    add_row(out, to, records, at, row)
                taken += 1
            if taken == 0:
                for d in range(dim):
                    out[b, t, d] = 0
            elif mean and taken > 1:
                count = out.dtype.type(taken)
                for d in range(dim):
                    out[b, t, d] /= count


@njit(cache=True, nogil=True)
def pool_max(records, dim, slot_of_unique, unique_of_position, offsets, out, chosen, first, last):
    """`pool_max` of samples first..last-1."""
    bags_per_table, num_tables = out.shape[:2]
    for b in range(first, last):  # sample by sample, as `out` lies in memory
        for t in range(num_tables):
            bag = t * bags_per_table + b
            taken = 0
            for d in range(dim):
                out[b, t, d] = 0
                chosen[bag, d] = -1
            for i in range(offsets[bag], offsets[bag + 1]):
                u = unique_of_position[i]
                if u < 0:
                    continue
                slot = np.int64(slot_of_unique[u])
                for d in range(dim):
                    if taken == 0 or records[slot, d] > out[b, t, d]:
                        out[b, t, d] = records[slot, d]
                        chosen[bag, d] = i
                taken += 1


# ---- backward: a part is a range of unique rows; it looks at all positions of their tables and sums those of its own -
# A row belongs to one table, whose positions come in batch order: so do the addends of each sum. The first one is
# stored, not added to zero. place_of_unique[u] is -1 - its place once it was, and as before again on return.


@njit(cache=True, nogil=True)
def pool_one_hot_backward(grad, unique_of_position, place_of_unique, values, row, first_table, last_table, first, last):
    """`pool_backward` where every bag has one position, for unique rows first..last-1, which are of those tables."""
    bags_per_table, num_tables, dim = grad.shape
    for b in range(bags_per_table):  # sample by sample, as `grad` lies in memory
        to_next = np.int64(b + 1 < bags_per_table)
        for t in range(first_table, last_table):
            i = t * bags_per_table + b
            coming = unique_of_position[i + to_next]
            if coming >= first and coming < last:
                place = np.int64(place_of_unique[coming])
                prefetch_row(values, (place ^ (place >> 63)) * dim, row)  # -1 - place where that is stored
                prefetch_row(grad, ((b + 1) * num_tables + t) * dim, row)
            u = unique_of_position[i]
            if u >= first and u < last:
                place = np.int64(place_of_unique[u])
                if place >= 0:
                    place_of_unique[u] = -1 - place
                    copy_row(values, place * dim, grad, (b * num_tables + t) * dim, row)
                else:
                    add_row(values, (-1 - place) * dim, grad, (b * num_tables + t) * dim, row)
    _restore(place_of_unique, first, last)


@njit(cache=True, nogil=True)
def _restore(place_of_unique, first, last):
    for u in range(first, last):
        if place_of_unique[u] < 0:
            place_of_unique[u] = -1 - place_of_unique[u]


@njit(cache=True, nogil=True, error_model="numpy")
def pool_backward(
    grad,
    unique_of_position,
    offsets,
    weights,
    weighted,
    mean,
    positions,
    scaled,
    place_of_unique,
    values,
    row,
    first_table,
    last_table,
    first,
    last,
):
    """`pool_backward` for unique rows first..last-1, which are of tables first_table..last_table-1."""
    bags_per_table, num_tables, dim = grad.shape
    one = grad.dtype.type(1)
    for b in range(bags_per_table):  # sample by sample, as `grad` lies in memory
        for t in range(first_table, last_table):
            bag = t * bags_per_table + b
            of_bag = (b * num_tables + t) * dim
            scale = one
            if mean:
                taken = 0
                for i in range(offsets[bag], offsets[bag + 1]):
                    taken += unique_of_position[i] >= 0
                if taken > 1:
                    scale = one / grad.dtype.type(taken)
            for i in range(offsets[bag], offsets[bag + 1]):
                u = unique_of_position[i]
                if u < first or u >= last:
                    continue
                w = scale
                if weighted:
                    w = weights[i]
                if scaled:
                    w /= grad.dtype.type(positions[u])
                place = np.int64(place_of_unique[u])
                if place >= 0:
                    place_of_unique[u] = -1 - place
                    scale_row(values, place * dim, grad, of_bag, row, w)
                else:
                    add_scaled_row(values, (-1 - place) * dim, grad, of_bag, row, w)
    _restore(place_of_unique, first, last)


@njit(cache=True, nogil=True)
def pool_max_backward(grad, unique_of_position, offsets, chosen, place_of_unique, values):
    """values[place of the chosen position's row, d] += grad of its bag[d]. Serial."""
    bags_per_table = grad.shape[0]
    for bag in range(offsets.size - 1):
        t = bag // bags_per_table
        b = bag - t * bags_per_table
        for d in range(grad.shape[2]):
            i = chosen[bag, d]
            if i >= 0:
                values[place_of_unique[unique_of_position[i]], d] += grad[b, t, d]


@njit(cache=True, nogil=True)
def weight_gradient(grad, records, dim, slot_of_unique, unique_of_position, offsets, out):
    """out[i] = dot(grad of the bag, row of position i). Serial."""
    bags_per_table = grad.shape[0]
    for bag in range(offsets.size - 1):
        t = bag // bags_per_table
        b = bag - t * bags_per_table
        for i in range(offsets[bag], offsets[bag + 1]):
            u = unique_of_position[i]
            total = 0.0
            if u >= 0:
                slot = np.int64(slot_of_unique[u])
                for d in range(dim):
                    total += np.float64(grad[b, t, d]) * np.float64(records[slot, d])
            out[i] = total


@njit(cache=True, nogil=True, error_model="numpy")
def renormalize(records, dim, slots, max_norm, norm_type, changed):
    """row *= max_norm / (norm + 1e-7) where norm > max_norm; changed[i]: whether. Serial."""
    for i in range(slots.size):
        slot = np.int64(slots[i])
        norm = 0.0
        if norm_type == 2.0:
            for d in range(dim):
                norm += np.float64(records[slot, d]) ** 2
            norm = np.sqrt(norm)
        elif norm_type == np.inf:
            for d in range(dim):
                norm = max(norm, np.abs(np.float64(records[slot, d])))
        elif norm_type == -np.inf:
            norm = np.inf
            for d in range(dim):
                norm = min(norm, np.abs(np.float64(records[slot, d])))
        elif norm_type == 0.0:
            for d in range(dim):
                norm += records[slot, d] != 0
        else:
            for d in range(dim):
                norm += np.abs(np.float64(records[slot, d])) ** norm_type
            norm **= 1.0 / norm_type
        changed[i] = norm > max_norm
        if changed[i]:
            scale = records.dtype.type(max_norm / (norm + 1e-7))
            for d in range(dim):
                records[slot, d] *= scale


# ---- updates: a part is a range of `slots` ---------------------------------------------------------------------------
# The divisors are never zero by design (eps) or give what torch gives (inf, nan): without Python's check the loops
# over D vectorise.


@njit(cache=True, nogil=True)
def update_sgd(records, row, slots, grads, lr, first, last):
    """w -= lr * g"""
    width, dim = records.shape[1], grads.shape[1]
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * width, row)
        subtract_scaled_row(records, np.int64(slots[i]) * width, grads, i * dim, row, lr)


@njit(cache=True, nogil=True, error_model="numpy")
def update_adagrad(records, dim, slots, grads, lr, eps, first, last):
    """s += g * g; w -= lr * g / (sqrt(s) + eps)"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], 2 * dim)
        slot = np.int64(slots[i])
        for d in range(dim):
            g = grads[i, d]
            s = records[slot, dim + d] + g * g
            records[slot, dim + d] = s
            records[slot, d] -= lr * (g / (np.sqrt(s) + eps))


@njit(cache=True, nogil=True)
def square_sums(grads, sums, first, last):
    """sums[i] = sum over d of grads[i, d]**2, in float64.

    Each sum has the order of d; four rows at once, since an addition waits for the one before it.
    """
    whole = last - (last - first) % 4
    for i in range(first, whole, 4):
        a = b = c = e = 0.0
        for d in range(grads.shape[1]):
            a += np.float64(grads[i, d]) ** 2
            b += np.float64(grads[i + 1, d]) ** 2
            c += np.float64(grads[i + 2, d]) ** 2
            e += np.float64(grads[i + 3, d]) ** 2
        sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = a, b, c, e
    for i in range(whole, last):
        squares = 0.0
        for d in range(grads.shape[1]):
            squares += np.float64(grads[i, d]) ** 2
        sums[i] = squares


@njit(cache=True, nogil=True, error_model="numpy")
def update_rowwise_adagrad(records, dim, slots, grads, mean_squares, lr, eps, first, last):
    """s += mean_squares[i]; w -= lr / (sqrt(s) + eps) * g"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], dim + 1)
        slot = np.int64(slots[i])
        s = records.dtype.type(records[slot, dim] + mean_squares[i])
        records[slot, dim] = s
        scale = lr / (np.sqrt(s) + eps)
        for d in range(dim):
            records[slot, d] -= scale * grads[i, d]


@njit(cache=True, nogil=True, error_model="numpy")
def update_adam(records, dim, slots, grads, rest1, rest2, eps, step_size, first, last):
    """m += rest1 * (g - m); v += rest2 * (g * g - v); w -= step_size * m / (sqrt(v) + eps)"""
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch_row(records, np.int64(slots[i + AHEAD]) * records.shape[1], 3 * dim)
        slot = np.int64(slots[i])
        for d in range(dim):
            g = grads[i, d]
            m = records[slot, dim + d]
            v = records[slot, 2 * dim + d]
            m += (g - m) * rest1
            v += (g * g - v) * rest2
            records[slot, dim + d] = m
            records[slot, 2 * dim + d] = v
            records[slot, d] -= step_size * (m / (np.sqrt(v) + eps))
