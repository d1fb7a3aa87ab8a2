"""Evict the resident row that is least frequent in the data set: the one with the largest row number.

The resident rows are a bitset of several levels: bit r of level 0 says that row r is resident, bit w of level k + 1
that word w of level k is not zero. The next smaller resident row is found by climbing until a word has a bit below the
position and descending again along highest bits: O(log64 R), one or two words for most rows. Touches change nothing.

Shapes: R rows, n slots of one call. R/8 bytes of host memory, zeroed lazily: pages without resident rows stay
untouched. Nothing per slot.
Source: Fang et al. 2022 (arXiv:2208.05321), which finds the victims by topk over all slots; here the order is kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from ..vectors import prefetch

AHEAD = 16  # places of a map asked for before they are needed
ONE = np.uint64(1)
BLOCK = 64  # rows taken at least before they are filtered: their look-ups in the maps then overlap


def highest_bit(word) -> int:
    """Position of the highest 1 of a word that is not zero."""
    return int(word).bit_length() - 1


@intrinsic
def _leading_zeros(typing_context, word):
    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), generate


@overload(highest_bit, inline="always")
def _highest_bit(word):
    return lambda word: 63 - _leading_zeros(np.uint64(word))


@njit(cache=True, nogil=True)
def _insert(words, level_start, rows):
    for i in range(rows.size):
        if i + AHEAD < rows.size:
            prefetch(words, rows[i + AHEAD] >> 6)
        position = rows[i]
        for level in range(level_start.size):
            at = level_start[level] + (position >> 6)
            word = words[at]
            words[at] = word | (ONE << np.uint64(position & 63))
            if word != 0:
                break  # the levels above know already that this word is not zero
            position >>= 6


@njit(cache=True, nogil=True)
def _remove(words, level_start, rows):
    for i in range(rows.size):
        if i + AHEAD < rows.size:
            prefetch(words, rows[i + AHEAD] >> 6)
        position = rows[i]
        for level in range(level_start.size):
            at = level_start[level] + (position >> 6)
            word = words[at] & ~(ONE << np.uint64(position & 63))
            words[at] = word
            if word != 0:
                break
            position >>= 6


@njit(cache=True, nogil=True)
def _last_up_to(words, level_start, level, position):
    """The last bit set on a level at or before a position, or -1; found through the words of that level and above."""
    for above in range(level, level_start.size):
        if position < 0:
            break
        word = words[level_start[above] + (position >> 6)] << np.uint64(63 - (position & 63))
        if word != 0:
            position -= 63 - highest_bit(word)
            for below in range(above - 1, level - 1, -1):
                position = (position << 6) + highest_bit(words[level_start[below] + position])
            return position
        position = (position >> 6) - 1
    return np.int64(-1)


@njit(cache=True, nogil=True)
def _take_bits(word, first, rows, taken):
    """rows[taken..]: first + the places of the bits of `word`, falling, as far as they fit; return the new `taken`."""
    while word != 0 and taken < rows.size:
        bit = highest_bit(word)
        word ^= ONE << np.uint64(bit)
        rows[taken] = first + bit
        taken += 1
    return taken


@njit(cache=True, nogil=True)
def _take_below(words, level_start, limit, rows, words_at):
    """Fill rows int64 (n,) with the largest resident rows < limit, falling; return how many there are.

    Level 1 says which words of level 0 come next. Those are listed in words_at int64 (n,) and asked for before the
    first is read, so that their loads overlap.
    """
    at = limit >> 6
    below = ONE << np.uint64(limit & 63)
    taken = _take_bits(words[at] & (below - ONE), at << 6, rows, 0) if limit & 63 else 0
    at -= 1
    while taken < rows.size:
        listed = 0
        while listed < rows.size - taken:
            at = _last_up_to(words, level_start, 1, at)
            if at < 0:
                break
            above = words[level_start[1] + (at >> 6)] << np.uint64(63 - (at & 63))  # its highest bit is that of `at`
            while above != 0 and listed < rows.size - taken:
                skipped = 63 - highest_bit(above)
                at -= skipped
                prefetch(words, at)
                words_at[listed] = at
                listed += 1
                at -= 1
                above = above << np.uint64(skipped) << ONE
        if listed == 0:
            break
        for i in range(listed):
            taken = _take_bits(words[words_at[i]], words_at[i] << 6, rows, taken)
    return taken


@njit(cache=True, nogil=True)
def _choose(words, level_start, num_rows, in_use, slot_of_id, id_of_row, victims, victim_rows):
    """Fill victims int32 (n,) and victim_rows int64 (n,) from the largest row down; return how many there were.

    Takes many rows and looks them up map by map, asking for places ahead; what is in use is left out.
    """
    found = 0
    limit = np.int64(num_rows)
    rows = np.empty(max(victims.size, BLOCK), np.int64)
    places = np.empty(rows.size, np.int64)
    while found < victims.size:
        taken = _take_below(words, level_start, limit, rows[: max(victims.size - found, BLOCK)], places)
        if taken == 0:
            break
        if id_of_row is None:
            places[:taken] = rows[:taken]
        else:
            for i in range(taken):
                if i + AHEAD < taken:
                    prefetch(id_of_row, rows[i + AHEAD])
                places[i] = id_of_row[rows[i]]
        for i in range(taken):
            if i + AHEAD < taken:
                prefetch(slot_of_id, places[i + AHEAD])
            places[i] = slot_of_id[places[i]] - 1
        for i in range(taken):
            if in_use[places[i]] == 0 and found < victims.size:
                victims[found] = places[i]
                victim_rows[found] = rows[i]
                found += 1
        limit = rows[taken - 1]
    return found


class DatasetPolicy:
    """The policy "dataset": resident rows in a bitset of several levels, R/8 bytes; the largest row leaves first."""

    name = "dataset"

    # D1  bit r of level 0 is set  <=>  row r is resident
    # D2  bit w of level k + 1 is set  <=>  word w of level k is not zero; the last level is one word

    def __init__(self, num_slots: int, num_rows: int) -> None:
        level_words = [(num_rows + 63) // 64]
        while len(level_words) < 2 or level_words[-1] > 1:  # two at least: level 0 is walked through level 1
            level_words.append((level_words[-1] + 63) // 64)
        self._num_rows = num_rows
        self._level_start = np.cumsum([0, *level_words[:-1]])
        self._words = np.zeros(sum(level_words), np.uint64)

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        _insert(self._words, self._level_start, rows)

    def touch(self, slots: np.ndarray) -> None:
        pass

    def evict(self, count: int, index) -> np.ndarray:
        victims, victim_rows = np.empty(count, np.int32), np.empty(count, np.int64)
        maps = index.in_use, index.slot_of_id, index.id_of_row
        found = _choose(self._words, self._level_start, self._num_rows, *maps, victims, victim_rows)
        assert found == count, f"asked for {count} victims, but only {found} resident slots are not in use"
        _remove(self._words, self._level_start, victim_rows)
        return victims

    def grow(self, num_slots: int) -> None:
        pass

    def check(self, row_of_slot: np.ndarray) -> None:
        expected = np.sort(row_of_slot[row_of_slot >= 0])
        for words in np.split(self._words, self._level_start[1:]):
            assert np.array_equal(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")), expected)
            expected = np.unique(expected >> 6)

    def num_bytes(self) -> dict[str, int]:
        return {"host_rank_bits": self._words.nbytes}
