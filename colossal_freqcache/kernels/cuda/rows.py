"""Triton kernels over records: moves between host and cache, pooling, its adjoint, and the row rules.

Shapes: N positions, U unique rows, C slots, W record width (its stride), D embedding width, B bags a table, T tables.
In a captured graph a batch may have rows that are not resident (slot -1): they count as zeros, and are not trained.
A program holds a tile of whole rows, so a row's sums have one order, which depends on nothing but the row's own
positions. Offsets into records are int64 before the first multiplication.
"""

import triton
import triton.language as tl

__all__ = [
    "ADAGRAD",
    "ADAM",
    "CHUNK",
    "KEEP",
    "ROWWISE_ADAGRAD",
    "SGD",
    "SHORT",
    "TILE",
    "copy_rows",
    "pool",
    "pool_max",
    "sum_chunks",
    "sum_long_rows",
    "sum_rows",
    "swap_rows",
    "update_rows",
    "weight_gradient",
]

# What is done with a row's gradient: kept, or applied by a rule at once.
KEEP, SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = range(5)

# A row with more positions in a batch than SHORT is summed in chunks of CHUNK by programs of their own, TILE positions
# side by side: the hottest row of a skewed batch would else keep one program busy long after all others are done.
SHORT, CHUNK, TILE = 32, 256, 16


@triton.jit
def _divided(x, y):
    """x / y, correctly rounded (Triton's own division of float32 is not); y of x's shape."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit(do_not_specialize=["num_rows"])
def copy_rows(
    source, source_rows, target, target_rows, num_rows,
    source_stride: tl.constexpr, target_stride: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target[target_rows[i]] = source[source_rows[i]]; either may be pinned host memory."""
    column = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        i = tile * ROWS + tl.arange(0, ROWS)
        real = i < num_rows
        inside = real[:, None] & (column < width)[None, :]
        from_row = tl.load(source_rows + i, mask=real, other=0).to(tl.int64)
        to_row = tl.load(target_rows + i, mask=real, other=0).to(tl.int64)
        values = tl.load(source + from_row[:, None] * source_stride + column[None, :], mask=inside)
        tl.store(target + to_row[:, None] * target_stride + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swap_rows(
    store, old_rows, new_rows, records, slots, num_rows,
    store_stride: tl.constexpr, stride: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """store[old_rows[i]] = records[slots[i]] where old_rows[i] >= 0, then records[slots[i]] = store[new_rows[i]].

    One pass, so that both directions of the link are busy. No row is both an old and a new one.
    """
    column = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        i = tile * ROWS + tl.arange(0, ROWS)
        real = i < num_rows
        inside = real[:, None] & (column < width)[None, :]
        old_row = tl.load(old_rows + i, mask=real, other=-1).to(tl.int64)
        new_row = tl.load(new_rows + i, mask=real, other=0).to(tl.int64)
        slot = tl.load(slots + i, mask=real, other=0).to(tl.int64)
        leaves = inside & (old_row >= 0)[:, None]
        place = records + slot[:, None] * stride + column[None, :]
        fetched = tl.load(store + new_row[:, None] * store_stride + column[None, :], mask=inside)
        trained = tl.load(place, mask=leaves)
        tl.store(store + old_row[:, None] * store_stride + column[None, :], trained, mask=leaves)
        tl.store(place, fetched, mask=inside)


@triton.jit(do_not_specialize=["num_bags", "bags_per_table", "num_tables"])
def pool(
    records, slot_of_unique, unique_of_position, offsets, weights, out, kept_of_bag,
    num_bags, bags_per_table, num_tables,
    stride: tl.constexpr, dim: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, t] = sum over the bag t*B+b of w_p * row_p, for MEAN divided by kept_of_bag, its positions but padding."""
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = bag < num_bags
    start = tl.load(offsets + bag, mask=real, other=0)
    length = tl.load(offsets + bag + 1, mask=real, other=0) - start
    column = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], records.dtype.element_ty)
    kept_positions = tl.zeros([ROWS], tl.int32)
    longest = tl.max(length, 0)
    for k in range(longest):
        p = start + k
        unique = tl.load(unique_of_position + p, mask=real & (k < length), other=-1)
        kept = unique >= 0
        slot = tl.load(slot_of_unique + unique, mask=kept, other=-1).to(tl.int64)
        place = records + slot[:, None] * stride + column[None, :]
        row = tl.load(place, mask=(slot >= 0)[:, None] & (column < dim)[None, :], other=0.0)
        if HAS_WEIGHTS:
            row = row * tl.load(weights + p, mask=kept, other=0.0)[:, None]
        total += row
        kept_positions += kept.to(tl.int32)
    if MEAN:
        count = tl.maximum(kept_positions, 1).to(total.dtype)
        total = _divided(total, count[:, None] + tl.zeros_like(total))
        tl.store(kept_of_bag + bag, kept_positions, mask=real)
    place = (bag % bags_per_table) * num_tables + bag // bags_per_table
    tl.store(out + place[:, None] * dim + column[None, :], total, mask=real[:, None] & (column < dim)[None, :])


@triton.jit(do_not_specialize=["num_bags", "bags_per_table", "num_tables"])
def pool_max(
    records, slot_of_unique, unique_of_position, offsets, out, chosen, num_bags, bags_per_table, num_tables,
    stride: tl.constexpr, dim: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, t] = elementwise maximum of the bag t*B+b (0 if empty), chosen[bag] the first position that has it, or -1.

    As in a loop that asks "is it greater?": a nan that comes first stays, any other never wins.
    """
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = bag < num_bags
    start = tl.load(offsets + bag, mask=real, other=0)
    length = tl.load(offsets + bag + 1, mask=real, other=0) - start
    column = tl.arange(0, BLOCK)
    best = tl.zeros([ROWS, BLOCK], records.dtype.element_ty)
    where = tl.full([ROWS, BLOCK], -1, tl.int64)
    longest = tl.max(length, 0)
    for k in range(longest):
        p = start + k
        unique = tl.load(unique_of_position + p, mask=real & (k < length), other=-1)
        kept = unique >= 0
        slot = tl.load(slot_of_unique + unique, mask=kept, other=-1).to(tl.int64)
        place = records + slot[:, None] * stride + column[None, :]
        row = tl.load(place, mask=(slot >= 0)[:, None] & (column < dim)[None, :], other=0.0)
        better = kept[:, None] & ((where < 0) | (row > best))
        best = tl.where(better, row, best)
        where = tl.where(better, p[:, None], where)
    inside = real[:, None] & (column < dim)[None, :]
    place = (bag % bags_per_table) * num_tables + bag // bags_per_table
    tl.store(out + place[:, None] * dim + column[None, :], best, mask=inside)
    tl.store(chosen + bag[:, None] * dim + column[None, :], where, mask=inside)


@triton.jit
def _position_gradients(
    grad, bag_of_position, kept_of_bag, weights, chosen, p, kept, column, bags_per_table, num_tables,
    dim: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """(P, BLOCK): what positions p (P,) get of their bags' gradients (B, T, D); 0 where not `kept`."""
    bag = tl.load(bag_of_position + p, mask=kept, other=0).to(tl.int64)
    inside = kept[:, None] & (column < dim)[None, :]
    place = (bag % bags_per_table) * num_tables + bag // bags_per_table
    values = tl.load(grad + place[:, None] * dim + column[None, :], mask=inside, other=0.0)
    if MAX:
        position = tl.load(chosen + bag[:, None] * dim + column[None, :], mask=inside, other=-1)
        values = tl.where(position == p[:, None], values, 0.0)
    if MEAN:
        count = tl.load(kept_of_bag + bag, mask=kept, other=1)
        values = _divided(values, count.to(values.dtype)[:, None] + tl.zeros_like(values))
    if HAS_WEIGHTS:
        values = values * tl.load(weights + p, mask=kept, other=0.0)[:, None]
    return values


@triton.jit
def _use_gradients(
    g, records, values, dirty, slots, places, real, column, a, b, c, d,
    stride: tl.constexpr, dim: tl.constexpr, RULE: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Keeps the gradients g (P, BLOCK) of P rows in values[places], or trains their slots by the rule.

    a, b, c, d: SGD lr; Adagrad, row-wise lr, eps; Adam 1 - beta1, 1 - beta2, eps, step size. One operation after
    the other, each rounded, so that a fused and a separate update give the same bits.
    """
    inside = real[:, None] & (column < dim)[None, :]
    if RULE == 0:
        tl.store(values + places.to(tl.int64)[:, None] * dim + column[None, :], g, mask=inside)
    else:
        row = records + slots.to(tl.int64)[:, None] * stride + column[None, :]
        weight = tl.load(row, mask=inside, other=0.0)
        if RULE == 1:
            weight = weight - g * a
        if RULE == 2:
            state = tl.load(row + dim, mask=inside, other=0.0) + g * g
            tl.store(row + dim, state, mask=inside)
            weight = weight - tl.div_rn(g, tl.sqrt_rn(state) + b) * a
        if RULE == 3:
            squares = g.to(tl.float64) * g.to(tl.float64)
            mean = tl.sum(squares, 1) / dim
            sums = records + slots.to(tl.int64) * stride + dim
            state = (tl.load(sums, mask=real, other=0.0).to(tl.float64) + mean).to(tl.float32)
            tl.store(sums, state, mask=real)
            one = tl.full(state.shape, 1.0, tl.float32)
            weight = weight - g * tl.div_rn(one * a, tl.sqrt_rn(state) + b)[:, None]
        if RULE == 4:
            m = tl.load(row + dim, mask=inside, other=0.0)
            v = tl.load(row + 2 * dim, mask=inside, other=0.0)
            m = m + (g - m) * a
            v = v + (g * g - v) * b
            tl.store(row + dim, m, mask=inside)
            tl.store(row + 2 * dim, v, mask=inside)
            weight = weight - tl.div_rn(m, tl.sqrt_rn(v) + c) * d
        tl.store(row, weight, mask=inside)
        if MARKS:
            tl.store(dirty + slots, tl.full(slots.shape, 1, tl.uint8), mask=real)


@triton.jit
def _list_long_rows(work, unique, count, is_long, most_rows, most_chunks, CHUNK: tl.constexpr):
    """Lists the rows with more than SHORT positions, and their chunks, in `work`: int32, zeros at first.

    [rows, chunks listed | each row's number | its first chunk | each chunk's row | its number within the row]
    Where something stands in the lists depends on the order of the programs; no sum depends on that.
    """
    if tl.max(is_long.to(tl.int32), 0) > 0:
        chunks = tl.where(is_long, (count + CHUNK - 1) // CHUNK, 0)
        place = tl.atomic_add(work, tl.sum(is_long.to(tl.int32), 0)) + tl.cumsum(is_long.to(tl.int32), 0) - 1
        first = tl.atomic_add(work + 1, tl.sum(chunks, 0)) + tl.cumsum(chunks, 0) - chunks
        tl.store(work + 2 + place, unique.to(tl.int32), mask=is_long)
        tl.store(work + 2 + most_rows + place, first, mask=is_long)
        most = tl.max(chunks, 0)
        for k in range(most):
            here = is_long & (k < chunks)
            chunk = work + 2 + 2 * most_rows + first + k
            tl.store(chunk, unique.to(tl.int32), mask=here)
            tl.store(chunk + most_chunks, tl.zeros_like(first) + k, mask=here)


@triton.jit(do_not_specialize=["most_rows", "most_chunks", "bags_per_table", "num_tables"])
def sum_chunks(
    grad, order, starts, bag_of_position, kept_of_bag, weights, chosen, work, sums,
    most_rows, most_chunks, bags_per_table, num_tables,
    dim: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[c] = the gradients of chunk c, TILE positions at a time."""
    chunk = tl.program_id(0).to(tl.int64)
    if chunk < tl.load(work + 1):
        listed = work + 2 + 2 * most_rows + chunk
        unique = tl.load(listed)
        first = tl.load(starts + unique) + tl.load(listed + most_chunks) * CHUNK
        last = tl.minimum(tl.load(starts + unique + 1), first + CHUNK)
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], grad.dtype.element_ty)
        for tile in range(first, last, TILE):
            i = tile + tl.arange(0, TILE)
            p = tl.load(order + i, mask=i < last, other=0)
            g = _position_gradients(
                grad, bag_of_position, kept_of_bag, weights, chosen, p, i < last, column,
                bags_per_table, num_tables, dim, HAS_WEIGHTS, MEAN, MAX,
            )  # fmt: skip
            total += tl.sum(g, 0)
        tl.store(sums + chunk * dim + column, total, mask=column < dim)


@triton.jit(do_not_specialize=["most_rows"])
def sum_long_rows(
    sums, starts, work, slot_of_unique, place_of_unique, records, values, dirty, most_rows, a, b, c, d,
    stride: tl.constexpr, dim: tl.constexpr, RULE: tl.constexpr, BY_FREQUENCY: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each long row from its chunks' sums, kept or used."""
    number = tl.program_id(0)
    if number < tl.load(work):
        unique = tl.load(work + 2 + number)
        count = tl.load(starts + unique + 1) - tl.load(starts + unique)
        first = tl.load(work + 2 + most_rows + number)
        last = first + (count + CHUNK - 1) // CHUNK
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], sums.dtype.element_ty)
        for tile in range(first, last, TILE):
            chunk = tile + tl.arange(0, TILE)
            inside = (chunk < last)[:, None] & (column < dim)[None, :]
            total += tl.sum(
                tl.load(sums + chunk.to(tl.int64)[:, None] * dim + column[None, :], mask=inside, other=0.0), 0
            )
        if BY_FREQUENCY:
            total = _divided(total, count.to(total.dtype) + tl.zeros_like(total))
        row = unique + tl.zeros([1], tl.int32)
        slot = tl.load(slot_of_unique + row)
        place = tl.load(place_of_unique + row)
        real = row >= 0
        if RULE > 0:
            real = slot >= 0
        _use_gradients(
            total[None, :], records, values, dirty, slot, place, real, column, a, b, c, d, stride, dim, RULE, RULE > 0
        )


@triton.jit(do_not_specialize=["most_rows", "most_chunks", "bags_per_table", "num_tables"])
def sum_rows(
    grad, order, starts, bag_of_position, kept_of_bag, weights, chosen, work, slot_of_unique, place_of_unique,
    records, values, dirty, found, most_rows, most_chunks, bags_per_table, num_tables, a, b, c, d,
    stride: tl.constexpr, dim: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr,
    RULE: tl.constexpr, BY_FREQUENCY: tl.constexpr, SHORT: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each row with at most SHORT positions: their sum in the order of the batch, kept or used.

    The others are listed in `work`, for `sum_chunks` and `sum_long_rows`. found[1]: U.
    """
    unique = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = unique < tl.load(found + 1)
    first = tl.load(starts + unique, mask=real, other=0)
    count = tl.load(starts + unique + 1, mask=real, other=0) - first
    _list_long_rows(work, unique, count, real & (count > SHORT), most_rows, most_chunks, CHUNK)
    real = real & (count <= SHORT)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], grad.dtype.element_ty)
    most = tl.max(tl.where(real, count, 0), 0)
    for k in range(most):
        here = real & (k < count)
        p = tl.load(order + first + k, mask=here, other=0)
        total += _position_gradients(
            grad, bag_of_position, kept_of_bag, weights, chosen, p, here, column,
            bags_per_table, num_tables, dim, HAS_WEIGHTS, MEAN, MAX,
        )  # fmt: skip
    if BY_FREQUENCY:
        total = _divided(total, tl.maximum(count, 1).to(total.dtype)[:, None] + tl.zeros_like(total))
    slot = tl.load(slot_of_unique + unique, mask=real, other=-1)
    place = tl.load(place_of_unique + unique, mask=real, other=0)
    if RULE > 0:
        real = real & (slot >= 0)
    _use_gradients(total, records, values, dirty, slot, place, real, column, a, b, c, d, stride, dim, RULE, RULE > 0)


@triton.jit(do_not_specialize=["num_rows"])
def update_rows(
    values, slots, records, num_rows, a, b, c, d,
    stride: tl.constexpr, dim: tl.constexpr, RULE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Trains `slots` by the rule with gradients `values` (U, D)."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = i < num_rows
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=real, other=0)
    g = tl.load(values + i[:, None] * dim + column[None, :], mask=real[:, None] & (column < dim)[None, :], other=0.0)
    _use_gradients(g, records, values, records, slot, slot, real, column, a, b, c, d, stride, dim, RULE, False)


@triton.jit(do_not_specialize=["num_positions", "bags_per_table", "num_tables"])
def weight_gradient(
    grad, records, slot_of_unique, unique_of_position, bag_of_position, out,
    num_positions, bags_per_table, num_tables,
    stride: tl.constexpr, dim: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[p] = dot(gradient of p's bag, p's row), summed in float64; 0 for padding."""
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = p < num_positions
    column = tl.arange(0, BLOCK)
    unique = tl.load(unique_of_position + p, mask=real, other=-1)
    kept = unique >= 0
    inside = kept[:, None] & (column < dim)[None, :]
    slot = tl.load(slot_of_unique + unique, mask=kept, other=-1).to(tl.int64)
    bag = tl.load(bag_of_position + p, mask=kept, other=0).to(tl.int64)
    place = (bag % bags_per_table) * num_tables + bag // bags_per_table
    row = tl.load(records + slot[:, None] * stride + column[None, :], mask=inside & (slot >= 0)[:, None], other=0.0)
    g = tl.load(grad + place[:, None] * dim + column[None, :], mask=inside, other=0.0)
    total = tl.sum(g.to(tl.float64) * row.to(tl.float64), 1)
    tl.store(out + p, total.to(out.dtype.element_ty), mask=real)
