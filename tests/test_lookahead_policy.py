"""The policy "lookahead" with announced batches; without any, it is in tests/test_eviction.py like the others.

    python -m pytest tests/test_lookahead_policy.py

Proves: on random traces with announcements, batches that nobody announced, growth and forgetting, every victim is one
that plain lines over lists allow: a row without a known next use, by score, before one with, by the farthest; that
numbers of entries and times wrap unseen; and that counts of the data set, decay and memory do what they are for.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eviction import LookaheadOracle

from colossal_freqcache.eviction import lookahead
from colossal_freqcache.eviction.lookahead import LookaheadPolicy


class World:
    """Maps around one policy, and lists of what was announced."""

    def __init__(self, num_slots, num_rows):
        self.policy = LookaheadPolicy(num_slots, num_rows)
        self.oracle = LookaheadOracle(num_slots)
        self.in_use = np.zeros(num_slots, np.int32)
        self.row_of_slot = np.full(num_slots, -1, np.int64)
        self.slot_of_id = np.zeros(num_rows, np.int32)
        self.id_of_row = None
        self.announced = []
        self.evicted_known = self.evicted_unknown = 0

    def slots_of(self, rows):
        return self.slot_of_id[rows] - 1

    def next_use(self, row):
        """How many batches ahead, from 1; 0 for none."""
        return next((number for number, rows in enumerate(self.announced, 1) if row in rows), 0)

    def announce(self, rows):
        self.announced.append(rows)
        self.policy.announce(np.array(rows, np.int64), self.slots_of(rows))
        self.check()

    def advance(self):
        rows = self.announced.pop(0)
        self.policy.advance(self.slots_of(rows))
        self.check()
        return rows

    def use(self, rows):
        """Touch, evict, admit, as the cache does; compares the victims."""
        slots = self.slots_of(rows)
        missing = [row for row, slot in zip(rows, slots, strict=True) if slot < 0]
        hits = [row for row in rows if row not in missing]
        self.in_use[slots[slots >= 0]] += 1
        self.policy.touch(slots[slots >= 0])
        self.oracle.touch(hits)
        count = len(missing) - int((self.row_of_slot < 0).sum())
        if count > 0:
            candidates = [row for row in self.oracle.scores if not self.in_use[self.slot_of_id[row] - 1]]
            victims = self.policy.evict(count, self)
            rows_out = self.row_of_slot[victims].tolist()
            unknown = [row for row in candidates if not self.next_use(row)]
            unknown.sort(key=lambda row: self.oracle.scores[row])
            expected = [(0, self.oracle.scores[row]) for row in unknown]
            known = sorted((self.next_use(row) for row in candidates if self.next_use(row)), reverse=True)
            expected += [(1, number) for number in known]
            found = [(1, self.next_use(r)) if self.next_use(r) else (0, self.oracle.scores[r]) for r in rows_out]
            assert found == expected[:count]
            self.evicted_known += sum(kind for kind, _ in found)
            self.evicted_unknown += sum(1 - kind for kind, _ in found)
            for row in rows_out:
                self.oracle.memory[row] = max(self.oracle.scores.pop(row), self.oracle.now - 160)
            self.slot_of_id[rows_out] = 0
            self.row_of_slot[victims] = -1
        taken = np.flatnonzero(self.row_of_slot < 0)[: len(missing)].astype(np.int32)
        self.row_of_slot[taken], self.slot_of_id[missing] = missing, taken + 1
        self.policy.admit(taken, np.array(missing, np.int64))
        self.oracle.admit(missing)
        self.in_use[slots[slots >= 0]] -= 1
        self.check()

    def grow(self, num_slots):
        added = num_slots - len(self.in_use)
        self.in_use = np.append(self.in_use, np.zeros(added, np.int32))
        self.row_of_slot = np.append(self.row_of_slot, np.full(added, -1))
        self.policy.grow(num_slots)
        self.oracle.grow(num_slots)
        self.check()

    def forget(self):
        self.announced.clear()
        self.policy.forget()
        self.check()

    def check(self):
        self.policy.check(self.row_of_slot)
        assert self.policy.num_announced == len(self.announced)


@st.composite
def operations(draw):
    num_slots, num_rows = draw(st.integers(2, 9)), draw(st.sampled_from([12, 40, 1000]))
    row = st.one_of(st.integers(0, 11), st.integers(0, num_rows - 1))
    batch = st.lists(row, min_size=0, max_size=num_slots, unique=True)
    other = st.lists(row, min_size=1, max_size=num_slots, unique=True)
    step = st.one_of(
        batch.map(lambda rows: ("announce", rows)),
        batch.map(lambda rows: ("announce", rows)),
        st.just(("next", None)),
        st.just(("next", None)),
        st.just(("skip", None)),
        other.map(lambda rows: ("use", rows)),
        st.sampled_from([("grow", None), ("forget", None)]),
    )
    return num_slots, num_rows, draw(st.lists(step, min_size=20, max_size=60))


@settings(max_examples=60)
@given(operations())
def test_victims_are_those_that_plain_lines_allow(trace):
    num_slots, num_rows, steps = trace
    world = World(num_slots, num_rows)
    for kind, rows in steps:
        if kind == "announce":
            world.announce(rows)
        elif kind == "use":
            world.use(rows)
        elif kind == "grow":
            world.grow(min(len(world.in_use) + 1, num_rows))
        elif kind == "forget":
            world.forget()
        elif world.announced:
            rows = world.advance()
            if kind == "next":
                world.use(rows)


@pytest.mark.parametrize("wraps", ["neither", "entries", "time"])
def test_a_long_trace(wraps):
    """2,000 batches, 5 known ahead; with the numbers of entries or the scores just below where they wrap."""
    world = World(30, 300)
    if wraps == "entries":
        world.policy._end = 2**32 - 200
    if wraps == "time":
        world.policy._now = world.oracle.now = (1 << 15) - 40
    generator = np.random.default_rng(0)

    def batch():
        return list(dict.fromkeys((generator.random(8) ** 3 * 300).astype(int).tolist()))

    for _ in range(5):
        world.announce(batch())
    for _ in range(2000):
        rows = world.advance()
        world.announce(batch())
        world.use(rows)
    assert world.evicted_unknown > 1000 and world.evicted_known == 0
    assert world.policy._entry_rows.size <= 64


def test_known_rows_leave_where_nothing_else_does_farthest_first():
    world = World(4, 20)
    for rows in ([0, 1], [2, 3], [0, 4], [1, 5], [2, 6], [3, 7]):
        world.announce(rows)
    for _ in range(6):
        world.use(world.advance())
    assert world.evicted_known > 0


def test_counts_of_the_data_set_keep_frequent_rows():
    """Rows that are rare in the data set leave before frequent ones that were used longer ago; without, they stay."""
    counts = np.array([1000] * 4 + [1] * 16)
    survivors = []
    for known in (counts, None):
        policy, maps = LookaheadPolicy(6, 20, known), World(6, 20)
        policy.admit(np.arange(6, dtype=np.int32), np.array([0, 1, 2, 3, 10, 11]))
        maps.row_of_slot[:] = [0, 1, 2, 3, 10, 11]
        survivors.append(sorted(set(maps.row_of_slot) - set(maps.row_of_slot[policy.evict(2, maps)])))
    assert survivors[0] == [0, 1, 2, 3] and survivors[1] == [2, 3, 10, 11]


def test_a_row_that_comes_back_is_remembered():
    """Used often, evicted, admitted again: it outlasts rows that were used once."""
    world = World(3, 30)
    for _ in range(6):
        world.use([0])
    for row in (1, 2, 3, 4, 5, 6, 7, 8, 9):  # in pairs with row 0 in use elsewhere it would stay; let it go
        world.use([row, row + 10, row + 20])
    assert not world.slot_of_id[0]
    world.use([0])
    world.use([1])
    world.use([2])
    world.use([3])
    assert world.slot_of_id[0]


def test_old_uses_fade():
    """A row used 20 times long ago leaves before one used twice lately."""
    world = World(3, 2000)
    for _ in range(20):
        world.use([0])
    for row in range(10, 1000):
        world.use([0, row, row + 1] if row < 12 else [row, row + 1, row + 2])
    world.use([0])
    policy = world.policy
    score = int(policy._scores[world.slot_of_id[0] - 1]) & lookahead.SCORES
    assert score - policy._now < lookahead.STEPS  # a count of less than 2 is left
