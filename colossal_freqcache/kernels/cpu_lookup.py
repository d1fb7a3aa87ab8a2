"""The numba functions over ids, slots and offsets: what a batch needs, before any value is read.

Each tells the processor some positions ahead which places it will read. A part of `plan` is a range of tables: each has
ids of its own, and so places in the map of its own. The others are serial.
Shapes as in `kernels`.
"""

import numpy as np
from numba import njit

from ..vectors import prefetch

__all__ = [
    "add_pins",
    "copy_offsets",
    "count_positions",
    "distinct_ids",
    "is_one_hot",
    "order_slots",
    "plan",
    "renumber",
    "unique_range",
]

AHEAD = 24  # positions
# 2**64 / golden ratio: spreads consecutive ids over a hash table (Knuth, TAOCP 3, section 6.4).
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
ID_BITS = 40  # of an entry of the table of `distinct_ids`; the stamp of a call stands above them
MISSED, PREPAID = np.uint8(1), np.uint8(2)
RADIX_BITS = 11


@njit(cache=True, nogil=True)
def copy_offsets(offsets, end, copy):
    """copy = offsets, then `end` if there is room for it; returns whether none of it is below the entry before."""
    for i in range(offsets.size):
        copy[i] = offsets[i]
    if copy.size > offsets.size:
        copy[offsets.size] = end
    falls = False
    for i in range(copy.size - 1):
        falls |= copy[i + 1] < copy[i]
    return not falls


@njit(cache=True, nogil=True)
def is_one_hot(offsets):
    """Whether every bag holds one position, as far as `offsets` go: bag number == position."""
    if offsets.size and offsets[offsets.size - 1] != offsets.size - 1:
        return False
    differs = False
    for i in range(offsets.size):
        differs |= offsets[i] != i
    return not differs


@njit(cache=True, nogil=True)
def plan(
    values,
    offsets,
    table_rows,
    table_starts,
    padding_ids,
    bags_per_table,
    slot_of_id,
    marks,
    prepaid_bit,
    unique_of_position,
    slot_of_unique,
    id_of_unique,
    kind_of_unique,
    counts,
    first_table,
    last_table,
):
    """Fills the outputs of a BatchPlan for tables first_table..last_table-1; returns (U, first bad position or -1).

    Rows are numbered from 0; what is said of them stands in the arrays of length N from the part's first position on.
    An id's entry in the map says -1 - u from its first occurrence on, and is as before again when this returns: so
    further occurrences read one place only, and a missing id needs no other table.
    """
    num_unique = 0
    bad = -1
    start_of_part = offsets[first_table * bags_per_table]
    slot_of_unique = slot_of_unique[start_of_part:]
    id_of_unique = id_of_unique[start_of_part:]
    kind_of_unique = kind_of_unique[start_of_part:]
    for t in range(first_table, last_table):
        rows = table_rows[t]
        start = table_starts[t]
        padding_id = padding_ids[t]
        looked_up = 0
        missed = 0
        missed_unique = 0
        counted_before = 0
        last = offsets[(t + 1) * bags_per_table]
        for i in range(offsets[t * bags_per_table], last):
            if i + AHEAD < last:
                coming = values[i + AHEAD]
                if coming >= 0 and coming < rows:
                    prefetch(slot_of_id, start + coming)
            local = values[i]
            if local < 0 or local >= rows:
                bad = i
                break
            if local == padding_id:
                unique_of_position[i] = -1
                continue
            looked_up += 1
            identity = start + local
            entry = np.int64(slot_of_id[identity])
            if entry >= 0:
                u = num_unique
                num_unique += 1
                slot_of_id[identity] = -1 - u
                slot_of_unique[u] = entry - 1
                id_of_unique[u] = identity
                kind = MISSED
                if entry > 0:
                    kind = PREPAID if marks[entry - 1] & prepaid_bit else np.uint8(0)
                kind_of_unique[u] = kind
                missed_unique += entry == 0
            else:
                u = -1 - entry
            unique_of_position[i] = u
            kind = kind_of_unique[u]
            missed += kind & MISSED
            counted_before += kind >> 1
        if bad >= 0:
            break
        counts[t, 0] = looked_up
        counts[t, 1] = missed
        counts[t, 2] = missed_unique
        counts[t, 3] = counted_before
    for u in range(num_unique):
        if u + AHEAD < num_unique:
            prefetch(slot_of_id, id_of_unique[u + AHEAD])
        slot_of_id[id_of_unique[u]] = slot_of_unique[u] + 1
    return num_unique, bad


@njit(cache=True, nogil=True)
def renumber(unique_of_position, first, last, shift):
    """Adds `shift` to the numbers at positions first..last-1, but for padding."""
    for i in range(first, last):
        if unique_of_position[i] >= 0:
            unique_of_position[i] += shift


@njit(cache=True, nogil=True)
def distinct_ids(values, offsets, table_rows, table_starts, padding_ids, bags_per_table, seen, stamp, ids, table_ends):
    """Fills the outputs of WantedIds; returns the first bad position or -1. `seen`: entries stamp << ID_BITS | id.

    Reads no map, so that another thread than the cache's may run it.
    """
    num_unique = 0
    shift = np.uint64(64)
    size = seen.size
    while size > 1:
        shift -= np.uint64(1)
        size >>= 1
    final = seen.size - 1
    stamp_bits = np.int64(stamp) << ID_BITS
    for t in range(table_rows.size):
        rows = table_rows[t]
        start = table_starts[t]
        last = offsets[(t + 1) * bags_per_table]
        for i in range(offsets[t * bags_per_table], last):
            if i + AHEAD < last:
                prefetch(seen, np.int64((np.uint64(start + values[i + AHEAD]) * _HASH_MULTIPLIER) >> shift) & final)
            local = values[i]
            if local < 0 or local >= rows:
                return i
            if local == padding_ids[t]:
                continue
            entry = stamp_bits | (start + local)
            place = np.int64((np.uint64(start + local) * _HASH_MULTIPLIER) >> shift) & final
            while seen[place] >= stamp_bits and seen[place] != entry:
                place = (place + 1) & final
            if seen[place] != entry:
                seen[place] = entry
                ids[num_unique] = start + local
                num_unique += 1
        table_ends[t + 1] = num_unique
    return -1


@njit(cache=True, nogil=True)
def unique_range(unique_of_position, first, last):
    """(smallest, largest + 1) unique row at positions first..last-1; (0, 0) where all are padding."""
    smallest, largest = np.uint32(0xFFFFFFFF), np.int32(-1)
    for i in range(first, last):
        smallest = min(smallest, np.uint32(unique_of_position[i]))  # -1 is larger than all others
        largest = max(largest, unique_of_position[i])
    if largest < 0:
        return np.int64(0), np.int64(0)
    return np.int64(smallest), np.int64(largest) + 1


@njit(cache=True, nogil=True)
def add_pins(in_use, slots, delta):
    """in_use[slots] += delta; returns by how much the number of slots in use changed."""
    change = 0
    for i in range(slots.size):
        if i + AHEAD < slots.size:
            prefetch(in_use, np.int64(slots[i + AHEAD]))
        slot = slots[i]
        before = in_use[slot]
        after = before + delta
        in_use[slot] = after
        change += (after > 0) - (before > 0)
    return change


@njit(cache=True, nogil=True)
def count_positions(unique_of_position, num_unique):
    """int64[U]: how many positions each unique row has."""
    positions = np.zeros(num_unique, np.int64)
    for i in range(unique_of_position.size):
        if unique_of_position[i] >= 0:
            positions[unique_of_position[i]] += 1
    return positions


@njit(cache=True, nogil=True)
def order_slots(slot_of_unique, sorted_slots, place_of_unique, order, other_order):
    """sorted_slots int64[U]: `slot_of_unique`, ascending; place_of_unique int32[U]: where each went. A radix sort.

    order, other_order: int64[U], scratch: slot << 32 | u, so that each pass reads in order.
    """
    largest = 1
    for u in range(slot_of_unique.size):
        slot = np.int64(slot_of_unique[u])
        order[u] = slot << 32 | u
        largest = max(largest, slot)
    num_bits = 0
    while largest >> num_bits:
        num_bits += 1
    passes = (num_bits + RADIX_BITS - 1) // RADIX_BITS
    digit_bits = (num_bits + passes - 1) // passes
    counts = np.empty(1 << digit_bits, np.int64)
    for number in range(passes):
        shift = 32 + number * digit_bits
        counts[:] = 0
        for i in range(order.size):
            counts[(order[i] >> shift) & (counts.size - 1)] += 1
        total = 0
        for digit in range(counts.size):
            count = counts[digit]
            counts[digit] = total
            total += count
        for i in range(order.size):
            digit = (order[i] >> shift) & (counts.size - 1)
            other_order[counts[digit]] = order[i]
            counts[digit] += 1
        order, other_order = other_order, order
    for place in range(order.size):
        sorted_slots[place] = order[place] >> 32
        place_of_unique[order[place] & 0xFFFFFFFF] = place
