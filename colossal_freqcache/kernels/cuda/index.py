"""Triton kernels over integers: which unique rows a batch has, where they sit, who leaves, and the hash table of slots.

Shapes: N positions of a batch, U unique rows, M missing ones, C slots, K buckets, T tables, B bags a table.
Counts (U, M) stay on the device: grids are sized by bounds, and programs beyond the count do nothing.

The hash table maps an id to its slot in K buckets of CELLS int32: seven entries and a count, 32 bytes, one memory
sector. An entry is tag << slot_bits | slot, or EMPTY; the tag is as much of the id's hash as fits beside the slot, so
`id_of_slot` is nearly always read for the right entry only. The count says how many ids that belong here, or came by
here, found the bucket full and went on to the next one: a search goes on only where it is not zero. So a row that
leaves leaves no tombstone, and nothing ever has to be rebuilt.
What is found depends on the ids alone; in which cell an entry stands may depend on the order of the writers.
"""

import triton
import triton.language as tl

__all__ = [
    "CELLS",
    "EMPTY",
    "count_candidates",
    "count_protected",
    "exchange_slots",
    "find_slots",
    "insert_entries",
    "list_missing",
    "mark_heads",
    "number_ids",
    "number_uniques",
    "probe_uniques",
    "take_candidates",
    "take_rows",
]

CELLS = 8
EMPTY = -1


@triton.jit
def _bucket_and_tag(ids, num_buckets, slot_bits):
    """(bucket int64, tag int32 in its place in an entry) of int64 ids: a 64-bit mix, multiplied into the range."""
    mixed = ids.to(tl.uint64) * 0x1E3779B97F4A7C15
    mixed = mixed ^ (mixed >> 29)
    mixed = mixed * 0x3F58476D1CE4E5B9
    mixed = mixed ^ (mixed >> 32)
    bucket = ((mixed >> 33).to(tl.int64) * num_buckets) >> 31
    tag = (mixed & 0x7FFFFFFF).to(tl.int32) >> slot_bits
    return bucket, tag << slot_bits


@triton.jit
def _find(entries, id_of_slot, ids, wanted, num_buckets, slot_bits):
    """Slot of each of `ids` (int64), -1 where it is not resident or not `wanted`."""
    bucket, tag = _bucket_and_tag(ids, num_buckets, slot_bits)
    slot_mask = (1 << slot_bits) - 1
    found = tl.where(wanted, -1, -1).to(tl.int32)
    pending = wanted
    while tl.max(pending.to(tl.int32), 0) > 0:
        for cell in tl.static_range(7):
            entry = tl.load(entries + bucket * 8 + cell, mask=pending, other=-1)
            alike = pending & (entry >= 0) & ((entry & ~slot_mask) == tag)
            slot = entry & slot_mask
            same = alike & (tl.load(id_of_slot + slot, mask=alike, other=-1).to(tl.int64) == ids)
            found = tl.where(same, slot, found)
        went_on = tl.load(entries + bucket * 8 + 7, mask=pending, other=0)
        pending = pending & (found < 0) & (went_on > 0)
        bucket = tl.where(bucket + 1 == num_buckets, 0, bucket + 1)
    return found


@triton.jit
def _last_not_above(ends, count, value, wanted, STEPS: tl.constexpr):
    """Index of the last of `count` ascending `ends` that is <= value (0 if none is): where a value belongs."""
    low = tl.zeros_like(value)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(ends + middle, mask=wanted & (middle < count), other=0) <= value
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _add_per_table(counts, column, table, amount, counted):
    """counts[table, column] += amount; one addition for the block where it lies in one table."""
    first = tl.min(tl.where(counted, table, 1 << 30), 0)
    last = tl.max(tl.where(counted, table, -1), 0)
    if first == last:
        tl.atomic_add(counts + first * 4 + column, tl.sum(tl.where(counted, amount, 0), 0))
    elif last >= 0:
        tl.atomic_add(counts + table * 4 + column, amount, mask=counted)


@triton.jit(do_not_specialize=["num_positions", "num_bags", "bags_per_table", "absent"])
def number_ids(
    values,
    offsets,
    table_rows,
    table_starts,
    padding_ids,
    keys,
    bag_of_position,
    found,
    counts,
    num_positions,
    num_bags,
    bags_per_table,
    absent,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys[p] = id over all tables at position p (`absent` for padding), bag_of_position[p], counts[t, 0] positions.

    found[0] = N - the first position with an id outside its table, 0 if there is none; found[3] = 1: bad offsets.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = p < num_positions
    bag = _last_not_above(offsets, num_bags, p, real, STEPS)
    table = bag // bags_per_table
    value = tl.load(values + p, mask=real, other=0)
    bad = real & ((value < 0) | (value >= tl.load(table_rows + table, mask=real, other=0)))
    kept = real & ~bad & (value != tl.load(padding_ids + table, mask=real, other=-1))
    # Where offsets are bad, a position may lie in no bag; a replayed graph takes it for padding.
    in_bags = real & (bag < num_bags)
    kept = kept & (p >= tl.load(offsets + bag, mask=in_bags, other=0))
    kept = kept & (p < tl.load(offsets + bag + 1, mask=in_bags, other=0))
    key = tl.where(kept, tl.load(table_starts + table, mask=real, other=0) + value, absent)
    tl.store(keys + p, key.to(keys.dtype.element_ty), mask=real)
    tl.store(bag_of_position + p, bag.to(tl.int32), mask=real)
    before_end = tl.max(tl.where(bad, num_positions - p, 0), 0)
    if before_end > 0:
        tl.atomic_max(found, before_end)
    _add_per_table(counts, 0, table, kept.to(tl.int64), kept)
    # The same lanes look at the offsets.
    inner = p < num_bags
    start = tl.load(offsets + p, mask=inner, other=0)
    end = tl.load(offsets + p + 1, mask=inner, other=0)
    wrong = inner & ((end < start) | ((p == 0) & (start != 0)) | ((p == num_bags - 1) & (end != num_positions)))
    bags = num_bags + tl.zeros_like(p)
    no_bag = (p == 0) & (bags == 0)
    wrong = wrong | (no_bag & (tl.load(offsets + p, mask=no_bag, other=0) != 0))
    wrong = wrong | (no_bag & (num_positions + tl.zeros_like(p) != 0))
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.atomic_max(found + 3, 1)


@triton.jit(do_not_specialize=["num_positions", "absent"])
def mark_heads(keys, is_head, num_positions, absent, BLOCK: tl.constexpr):
    """is_head[i] = 1 where ascending `keys` start a new id, 0 elsewhere and from the first `absent` on."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_positions
    key = tl.load(keys + i, mask=real, other=0).to(tl.int64)
    before = tl.load(keys + i - 1, mask=real & (i > 0), other=-1).to(tl.int64)
    tl.store(is_head + i, ((key != before) & (key < absent)).to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["num_positions", "absent"])
def number_uniques(
    keys,
    order,
    heads_up_to,
    unique_of_position,
    id_of_unique,
    starts,
    num_positions,
    absent,
    BLOCK: tl.constexpr,
):
    """unique_of_position[order[i]] = heads_up_to[i] - 1 (-1 for `absent`), and each unique row's id and start.

    starts[u]..starts[u+1] are the places in `order` of the positions of unique row u.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_positions
    key = tl.load(keys + i, mask=real, other=0).to(tl.int64)
    before = tl.load(keys + i - 1, mask=real & (i > 0), other=-1).to(tl.int64)
    after = tl.load(keys + i + 1, mask=i + 1 < num_positions, other=absent).to(tl.int64)
    present = real & (key < absent)
    unique = tl.load(heads_up_to + i, mask=real, other=0) - 1
    position = tl.load(order + i, mask=real, other=0)
    tl.store(unique_of_position + position, tl.where(present, unique, -1), mask=real)
    head = present & (key != before)
    tl.store(id_of_unique + unique, key.to(id_of_unique.dtype.element_ty), mask=head)
    tl.store(starts + unique, i.to(tl.int32), mask=head)
    tl.store(starts + unique + 1, (i + 1).to(tl.int32), mask=present & (key != after))


@triton.jit(do_not_specialize=["num_positions", "num_tables", "num_buckets", "slot_bits"])
def probe_uniques(
    entries,
    id_of_slot,
    last_use,
    uses,
    id_of_unique,
    starts,
    heads_up_to,
    table_starts,
    slot_of_unique,
    found,
    counts,
    use_number,
    num_positions,
    num_tables,
    num_buckets,
    slot_bits,
    COUNT_USES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slot_of_unique[u], -1 where missing; last_use[slot] = use_number[0] of the resident; counts of the missing.

    A use_number below 0 marks nothing. found[1] = U, found[2] += missing rows.
    counts[t, 1] += missed positions, counts[t, 2] += missing rows.
    """
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    num_unique = tl.load(heads_up_to + num_positions - 1).to(tl.int64)
    if tl.program_id(0) == 0:
        tl.store(found + 1, num_unique)
    real = u < num_unique
    ids = tl.load(id_of_unique + u, mask=real, other=0).to(tl.int64)
    slot = _find(entries, id_of_slot, ids, real, num_buckets, slot_bits)
    hit = real & (slot >= 0)
    missed = real & (slot < 0)
    tl.store(slot_of_unique + u, slot, mask=u < num_positions)
    use = tl.load(use_number) + tl.zeros_like(slot)
    marked = hit & (use >= 0)
    tl.store(last_use + slot, use, mask=marked)
    if COUNT_USES:
        count = tl.load(uses + slot, mask=marked, other=0)
        tl.store(uses + slot, tl.minimum(count + 1, 1 << 30), mask=marked)
    num_missed = tl.sum(missed.to(tl.int64), 0)
    if num_missed > 0:
        tl.atomic_add(found + 2, num_missed)
        table = _last_not_above(table_starts, num_tables, ids, missed, STEPS)
        first = tl.load(starts + u, mask=missed, other=0)
        last = tl.load(starts + u + 1, mask=missed, other=0)
        _add_per_table(counts, 1, table, (last - first).to(tl.int64), missed)
        _add_per_table(counts, 2, table, missed.to(tl.int64), missed)


@triton.jit(do_not_specialize=["num_unique"])
def list_missing(slot_of_unique, missing_up_to, missing, num_unique, BLOCK: tl.constexpr):
    """missing[missing_up_to[u] - 1] = u for the rows that are missing."""
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = u < num_unique
    lacks = real & (tl.load(slot_of_unique + u, mask=real, other=0) < 0)
    place = tl.load(missing_up_to + u, mask=real, other=1) - 1
    tl.store(missing + place, u, mask=lacks)


@triton.jit(do_not_specialize=["num_missing"])
def take_rows(id_of_unique, missing, row_of_id, rows, num_missing, ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    """rows[i] = row of the unique row missing[i]; `row_of_id` may lie on the host: it is read for missing rows only."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_missing
    row = tl.load(id_of_unique + tl.load(missing + i, mask=real, other=0), mask=real, other=0).to(tl.int64)
    if ORDERED:
        row = tl.load(row_of_id + row, mask=real, other=0).to(tl.int64)
    tl.store(rows + i, row, mask=real)


@triton.jit(do_not_specialize=["num_used", "protected_from"])
def count_protected(last_use, found, num_used, protected_from, BLOCK: tl.constexpr):
    """found[4] += slots that a batch from `protected_from` on has used."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(last_use + slot, mask=slot < num_used, other=-1) >= protected_from
    tl.atomic_add(found + 4, tl.sum(used.to(tl.int64), 0))


@triton.jit(do_not_specialize=["hand", "window", "num_used", "protected_from"])
def count_candidates(last_use, counts, hand, window, num_used, protected_from, BLOCK: tl.constexpr):
    """counts[b] = slots of block b of the window (from `hand` on, around) that no batch from `protected_from` uses."""
    w = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = (hand + w) % num_used
    free = tl.load(last_use + slot, mask=w < window, other=protected_from) < protected_from
    tl.store(counts + tl.program_id(0), tl.sum(free.to(tl.int32), 0))


@triton.jit(do_not_specialize=["hand", "window", "num_used", "protected_from", "limit"])
def take_candidates(
    last_use,
    uses,
    row_of_slot,
    counts_up_to,
    slots,
    keys,
    hand,
    window,
    num_used,
    protected_from,
    limit,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first `limit` of those slots, and the keys by which the greatest leave first; as in `count_candidates`."""
    w = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = (hand + w) % num_used
    inside = w < window
    used = tl.load(last_use + slot, mask=inside, other=protected_from)
    free = (used < protected_from).to(tl.int32)
    before = tl.load(counts_up_to + tl.program_id(0)) - tl.sum(free, 0)
    place = before + tl.cumsum(free, 0) - 1
    taken = (free > 0) & (place < limit)
    tl.store(slots + place, slot.to(tl.int32), mask=taken)
    if KEY == 0:
        key = tl.load(row_of_slot + slot, mask=taken, other=0)
    elif KEY == 1:
        key = -used
    else:
        key = -tl.load(uses + slot, mask=taken, other=0)
        tl.store(uses + slot, (-key) // 2, mask=taken)  # old uses fade where they are looked at
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=taken)


@triton.jit(do_not_specialize=["use", "num_missing", "num_fresh", "num_buckets", "slot_bits"])
def exchange_slots(
    entries,
    id_of_slot,
    row_of_slot,
    last_use,
    uses,
    dirty,
    new_rows,
    targets,
    missing,
    id_of_unique,
    slot_of_unique,
    new_ids,
    old_rows,
    written,
    use,
    num_missing,
    num_fresh,
    num_buckets,
    slot_bits,
    ORDERED: tl.constexpr,
    COUNT_USES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slot targets[i] changes its row: out of the hash table goes the old one's id, into the maps comes the new one's.

    new_ids[i] = id_of_unique[missing[i]], and slot_of_unique[missing[i]] becomes targets[i].
    old_rows[i] = the row to write back, -1 where the slot was free (i < num_fresh) or clean. `written` += their number.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_missing
    slot = tl.load(targets + i, mask=real, other=0)
    leaving = real & (i >= num_fresh)
    old_id = tl.load(id_of_slot + slot, mask=leaving, other=0).to(tl.int64)
    old_row = tl.load(row_of_slot + slot, mask=leaving, other=0).to(tl.int64)
    is_dirty = leaving & (tl.load(dirty + slot, mask=leaving, other=0) > 0)
    tl.store(old_rows + i, tl.where(is_dirty, old_row, -1), mask=real)
    num_dirty = tl.sum(is_dirty.to(tl.int64), 0)
    if num_dirty > 0:
        tl.atomic_add(written, num_dirty)
    bucket, tag = _bucket_and_tag(old_id, num_buckets, slot_bits)
    entry = tag | slot
    pending = leaving
    while tl.max(pending.to(tl.int32), 0) > 0:
        for cell in tl.static_range(7):
            here = pending & (tl.load(entries + bucket * 8 + cell, mask=pending, other=-1) == entry)
            tl.store(entries + bucket * 8 + cell, tl.full([BLOCK], -1, tl.int32), mask=here)
            pending = pending & ~here
        tl.atomic_add(entries + bucket * 8 + 7, tl.full([BLOCK], -1, tl.int32), mask=pending)
        bucket = tl.where(bucket + 1 == num_buckets, 0, bucket + 1)
    unique = tl.load(missing + i, mask=real, other=0)
    new_id = tl.load(id_of_unique + unique, mask=real, other=0).to(tl.int64)
    tl.store(slot_of_unique + unique, slot, mask=real)
    tl.store(new_ids + i, new_id.to(new_ids.dtype.element_ty), mask=real)
    tl.store(id_of_slot + slot, new_id.to(id_of_slot.dtype.element_ty), mask=real)
    if ORDERED:
        new_row = tl.load(new_rows + i, mask=real, other=0)
        tl.store(row_of_slot + slot, new_row.to(row_of_slot.dtype.element_ty), mask=real)
    tl.store(last_use + slot, use + tl.zeros_like(slot), mask=real)
    tl.store(dirty + slot, tl.zeros_like(slot).to(tl.uint8), mask=real)
    if COUNT_USES:
        tl.store(uses + slot, tl.full([BLOCK], 1, tl.int32), mask=real)


@triton.jit(do_not_specialize=["num_new", "num_buckets", "slot_bits"])
def insert_entries(entries, ids, slots, num_new, num_buckets, slot_bits, BLOCK: tl.constexpr):
    """Puts ids[i] -> slots[i] into the hash table; the ids are distinct and not in it. It ends in a spare cell."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_new
    slot = tl.load(slots + i, mask=real, other=0)
    bucket, tag = _bucket_and_tag(tl.load(ids + i, mask=real, other=0).to(tl.int64), num_buckets, slot_bits)
    entry = tag | slot
    nowhere = bucket * 0 + num_buckets * 8
    pending = real
    while tl.max(pending.to(tl.int32), 0) > 0:
        place = tl.full([BLOCK], 7, tl.int32)
        for back in tl.static_range(7):
            cell = 6 - back
            held = tl.load(entries + bucket * 8 + cell, mask=pending, other=0, volatile=True)
            place = tl.where(held == -1, cell, place)
        trying = pending & (place < 7)
        full = pending & (place == 7)
        tl.atomic_add(entries + bucket * 8 + 7, tl.full([BLOCK], 1, tl.int32), mask=full)
        # A lane that does not try compares the spare cell, which is 0, with a value that it never has.
        cell_or_spare = tl.where(trying, bucket * 8 + place, nowhere)
        held = tl.atomic_cas(entries + cell_or_spare, tl.where(trying, -1, -2).to(tl.int32), entry)
        pending = pending & ~(trying & (held == -1))
        following = tl.where(bucket + 1 == num_buckets, 0, bucket + 1)
        bucket = tl.where(full, following, bucket)


@triton.jit(do_not_specialize=["num_ids", "num_buckets", "slot_bits"])
def find_slots(entries, id_of_slot, ids, slots, num_ids, num_buckets, slot_bits, BLOCK: tl.constexpr):
    """slots[i] = slot of int64 ids[i], -1 where it is not resident."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_ids
    wanted = tl.load(ids + i, mask=real, other=0)
    tl.store(slots + i, _find(entries, id_of_slot, wanted, real, num_buckets, slot_bits), mask=real)
