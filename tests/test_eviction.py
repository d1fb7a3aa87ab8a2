"""The eviction policies: one conformance suite for all of them, and each one's own rule.

    python -m pytest tests/test_eviction.py

Proves, for every policy: its victims, in their order, are those of a few plain lines of Python, on random traces with
rows in use, growth and one slot; it never evicts what is in use, never a slot twice, and forgets what it evicted; a
call that cannot be met changes nothing; equal calls give equal victims; a call's work and memory do not grow with the
slots or rows; its bytes per slot stay within bounds. Then what each policy is for: LFU recovers when the working set
moves, S3-FIFO keeps its rows under a scan and promotes a row that comes back.
"""

import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_freqcache.eviction import _POLICIES, EvictionStrategy, make_policy

ALL_POLICIES = [strategy.value for strategy in _POLICIES]
every_policy = pytest.mark.parametrize("strategy", ALL_POLICIES)


class World:
    """A cache's maps around one policy: what the SlotTable does, in plain lines. Row r has the id (r * 7 + 3) % R.

    Calls `check()` after every operation, and compares every victim with the oracle if there is one.
    """

    def __init__(self, strategy, num_slots, num_rows, oracle=None, checked=True, ids=True):
        self.policy = make_policy(strategy, num_slots, num_rows)
        self.oracle, self.checked = oracle, checked
        self.in_use = np.zeros(num_slots, np.int32)
        self.row_of_slot = np.full(num_slots, -1, np.int64)
        self.slot_of_id = np.zeros(num_rows, np.int32)
        self.id_of_row = (np.arange(num_rows) * 7 + 3) % num_rows if ids else None
        self.free = list(range(num_slots))[::-1]
        self.rows = {}  # row -> slot
        self.evicted = []  # every victim's row so far
        self.hits = self.misses = 0

    def check(self):
        if self.checked:
            self.policy.check(self.row_of_slot)

    def id_of(self, row):
        return row if self.id_of_row is None else self.id_of_row[row]

    def touch(self, slots):
        self.policy.touch(np.array(slots, np.int32))
        if self.oracle:
            self.oracle.touch([int(self.row_of_slot[slot]) for slot in slots])
        self.check()

    def evict(self, count):
        resident_before = set(self.rows.values())
        slots = self.policy.evict(count, self)
        assert slots.dtype == np.int32 and slots.shape == (count,)
        assert len(set(slots)) == count, "a slot was evicted twice"
        assert set(slots.tolist()) <= resident_before, "a free slot was evicted"
        assert (self.in_use[slots] == 0).all(), "a slot in use was evicted"
        victims = self.row_of_slot[slots].tolist()
        if self.oracle:
            in_use = {row for row, slot in self.rows.items() if self.in_use[slot]}
            assert victims == self.oracle.evict(count, in_use)
        for row, slot in zip(victims, slots.tolist(), strict=True):
            del self.rows[row]
            self.row_of_slot[slot] = -1
            self.slot_of_id[self.id_of(row)] = 0
            self.free.append(slot)
        self.evicted += victims
        self.check()
        return victims

    def admit(self, rows):
        slots = [self.free.pop() for _ in rows]
        for row, slot in zip(rows, slots, strict=True):
            self.rows[row] = slot
            self.row_of_slot[slot] = row
            self.slot_of_id[self.id_of(row)] = slot + 1
        self.policy.admit(np.array(slots, np.int32), np.array(rows, np.int64))
        if self.oracle:
            self.oracle.admit(rows)
        self.check()

    def batch(self, rows):
        """One step over distinct rows: touch the hits, evict (never the batch's own rows), admit the misses."""
        hits = [self.rows[row] for row in rows if row in self.rows]
        missed = [row for row in rows if row not in self.rows]
        self.in_use[hits] += 1
        self.touch(hits)
        self.evict(max(0, len(missed) - len(self.free)))
        self.admit(missed)
        self.in_use[hits] -= 1
        self.hits += len(hits)
        self.misses += len(missed)

    def grow(self, num_slots):
        added = num_slots - len(self.in_use)
        self.in_use = np.append(self.in_use, np.zeros(added, np.int32))
        self.row_of_slot = np.append(self.row_of_slot, np.full(added, -1))
        self.free = list(range(num_slots - added, num_slots))[::-1] + self.free
        self.policy.grow(num_slots)
        if self.oracle:
            self.oracle.grow(num_slots)
        self.check()

    def hit_ratio(self, batches):
        self.hits = self.misses = 0
        for rows in batches:
            self.batch(rows)
        return self.hits / (self.hits + self.misses)


# --- the oracles: each rule as lists over rows, with every row looked at for every victim ---


class SortedOracle:
    """Victims are the rows with the lowest keys; `key(row)` is given by the policy's rule."""

    def __init__(self, num_slots):
        self.resident, self.last_use, self.num_uses, self.priority = [], {}, {}, {}
        self.age = self.now = 0

    def use(self, row, uses):
        self.now += 1
        self.last_use[row], self.num_uses[row] = self.now, min(uses, 255)
        self.priority[row] = self.age + self.num_uses[row]

    def admit(self, rows):
        self.resident += rows
        for row in rows:
            self.use(row, 1)

    def touch(self, rows):
        for row in rows:
            self.use(row, self.num_uses[row] + 1)

    def evict(self, count, in_use):
        victims = sorted((row for row in self.resident if row not in in_use), key=self.key)[:count]
        self.resident = [row for row in self.resident if row not in victims]
        self.age = max([self.age] + [self.priority[row] for row in victims])
        return victims

    def grow(self, num_slots):
        pass


class DatasetOracle(SortedOracle):
    def key(self, row):
        return -row


class LruOracle(SortedOracle):
    def key(self, row):
        return self.last_use[row]


class LfuOracle(SortedOracle):
    def key(self, row):
        return self.priority[row], self.last_use[row]


class S3FifoOracle:
    """S3-FIFO over three lists, oldest first; ghost is (row, clock) pairs."""

    def __init__(self, num_slots):
        self.small, self.main, self.uses = [], [], {}
        self.ghost, self.clock = {}, 0
        self.grow(num_slots)

    def grow(self, num_slots):
        self.forget_old()
        self.share = max(1, num_slots // 10)
        self.ghost_capacity = num_slots - self.share

    def forget_old(self):
        self.ghost = {row: at for row, at in self.ghost.items() if self.clock - at <= self.ghost_capacity}

    def admit(self, rows):
        self.forget_old()
        for row in rows:
            self.uses[row] = 0
            (self.small if self.ghost.pop(row, None) is None else self.main).append(row)

    def touch(self, rows):
        for row in rows:
            self.uses[row] = min(self.uses[row] + 1, 3)

    def evict(self, count, in_use):
        victims, chances = [], 4 * count + 256
        while len(victims) < count:
            small_free = [row for row in self.small if row not in in_use]
            main_free = [row for row in self.main if row not in in_use]
            from_small = len(self.small) + len(victims) >= self.share
            from_small = bool(small_free) if not (small_free and main_free) else from_small
            row = (small_free if from_small else main_free)[0]
            (self.small if from_small else self.main).remove(row)
            if self.uses[row] and chances:
                chances -= 1
                self.uses[row] = 0 if from_small else self.uses[row] - 1
                self.main.append(row)
                continue
            if from_small:
                self.ghost[row] = self.clock
                self.clock += 1
            victims.append(row)
        return victims


class LookaheadOracle:
    """Decayed counts as scores over one list per row; nothing is announced (tests/test_lookahead_policy.py does)."""

    def __init__(self, num_slots):
        self.num_slots, self.now, self.used = num_slots, 4096, 0
        self.scores, self.order, self.memory, self.clock = {}, {}, {}, 0

    def use(self, count):
        self.used += count
        while self.used >= max(1, self.num_slots // 2):  # a sixteenth of 8 times the slots
            self.used -= max(1, self.num_slots // 2)
            self.now += 1

    def place(self, row, since):
        self.clock += 1
        since = min(max(since, -160), 95)
        self.scores[row] = self.now + round(16 * math.log2(1 + 2 ** (since / 16)))
        self.order[row] = self.clock

    def admit(self, rows):
        self.use(len(rows))
        for row in rows:
            self.place(row, (self.memory[row] // 4 - self.now // 4) * 4 if row in self.memory else -160)

    def touch(self, rows):
        self.use(len(rows))
        for row in rows:
            self.place(row, self.scores[row] - self.now)

    def evict(self, count, in_use):
        rows = (row for row in self.scores if row not in in_use)
        victims = sorted(rows, key=lambda row: (self.scores[row], self.order[row]))[:count]
        for row in victims:
            self.memory[row] = max(self.scores.pop(row), self.now - 160)
        return victims

    def grow(self, num_slots):
        self.num_slots = num_slots


ORACLES = {
    "dataset": DatasetOracle,
    "lru": LruOracle,
    "lfu": LfuOracle,
    "s3fifo": S3FifoOracle,
    "lookahead": LookaheadOracle,
}


def test_every_policy_has_an_oracle():
    """A policy without one would skip the comparison below."""
    assert set(ORACLES) == set(ALL_POLICIES)


# --- conformance: what every policy promises ---


@st.composite
def traces(draw):
    """(slots, rows, grown slots, operations); at most 13 slots: there one set of S3-FIFO's ghost holds all of it."""
    num_slots = draw(st.integers(1, 9))
    num_rows = draw(st.sampled_from([num_slots + 1, 20, 64, 65, 5000, 300_000]))
    last = num_rows - 1
    row = st.one_of(st.integers(0, min(last, 15)), st.integers(0, last), st.integers(max(0, last - 3), last))
    batch = st.lists(row, min_size=1, max_size=num_slots, unique=True)
    hold = st.lists(st.integers(0, num_slots - 1), max_size=num_slots - 1, unique=True)
    use, keep = batch.map(lambda rows: ("batch", rows)), hold.map(lambda slots: ("hold", slots))
    operations = st.lists(st.one_of(use, use, use, keep), min_size=20, max_size=60)
    return num_slots, num_rows, draw(st.integers(num_slots, 13)), draw(operations)


def replay(strategy, trace, oracle=None, ids=True):
    """Run a trace: batches, slots held in use over several batches, and growth in the middle; return the world."""
    num_slots, num_rows, grown, operations = trace
    world = World(strategy, num_slots, num_rows, oracle, ids=ids)
    held = []
    for i, (kind, arguments) in enumerate(operations):
        if i == len(operations) // 2:
            world.grow(max(grown, num_slots))
        if kind == "hold":
            world.in_use[held] -= 1
            held = [slot for slot in arguments if world.row_of_slot[slot] >= 0]
            world.in_use[held] += 1
        else:  # cut the batch to what fits beside the held slots
            held_rows = set(world.row_of_slot[held].tolist())
            room = len(world.in_use) - len(held_rows)
            new = [row for row in arguments if row not in held_rows][:room]
            world.batch([row for row in arguments if row in held_rows or row in new])
    return world


@every_policy
def test_victims_are_those_of_the_oracle(strategy):
    """Random traces: every victim and its place in the order equal the plain rule's; check() after each operation."""
    evictions = []

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(traces(), st.booleans())
    def run(trace, ids):
        evictions.append(len(replay(strategy, trace, ORACLES[strategy](trace[0]), ids).evicted))

    run()
    assert sum(evictions) > 1000 and max(evictions) > 50


@every_policy
def test_long_trace_follows_the_oracle(strategy):
    """3,000 skewed batches over 12 slots: counts reach their cap and ages go round their circle."""
    draws = np.random.default_rng(1)
    world = World(strategy, 12, 1000, ORACLES[strategy](12))
    for step in range(3000):
        hot = draws.permutation(6)[:4] + 20 * (step // 1000)
        cold = draws.integers(100, 1000, draws.integers(1, 4))
        world.batch(list(dict.fromkeys([*hot.tolist(), *cold.tolist()])))
    assert len(world.evicted) > 3000 and world.hits > 3000


@every_policy
def test_one_slot(strategy):
    world = World(strategy, 1, 70)
    for row in [5, 69, 5, 5, 0, 69]:
        world.batch([row])
    assert world.evicted == [5, 69, 5, 0]
    assert world.hits == 1


@every_policy
@pytest.mark.parametrize("touched", [0, 1, 5])
def test_all_in_use_but_one(strategy, touched):
    """Whichever slot is the only one not in use, however often used: it is the victim."""
    for spared in range(40):
        world = World(strategy, 40, 1000)
        world.batch(list(range(40)))
        for _ in range(touched):
            world.touch(list(range(40)))
        world.in_use[:] = 1
        world.in_use[spared] = 0
        row = int(world.row_of_slot[spared])
        assert world.evict(1) == [row]
        world.in_use[spared] = 1
        world.admit([500 + spared])


@every_policy
def test_evicts_all_and_starts_again(strategy):
    """Every slot is evicted in one call; the emptied policy takes rows and evicts again."""
    world = World(strategy, 30, 500)
    for first_row in (0, 100, 0):
        world.batch(list(range(first_row, first_row + 30)))
        if world.rows:
            assert sorted(world.evict(30)) == list(range(first_row, first_row + 30))
    assert world.evict(0) == []


@every_policy
def test_too_few_victims_changes_nothing(strategy):
    """Asked for more than there are, it raises, and afterwards goes on as if it had not been asked."""
    worlds = [World(strategy, 20, 1000), World(strategy, 20, 1000)]
    for world in worlds:
        draws = np.random.default_rng(2)
        for _ in range(30):
            world.batch(draws.permutation(40)[:12].tolist())
            world.in_use[sorted(world.rows.values())[5:]] = 1
            if world is worlds[0]:
                for count in (6, 21):
                    with pytest.raises(AssertionError, match=f"asked for {count} victims"):
                        world.policy.evict(count, world)
                    world.check()
            world.evict(3)
            world.in_use[:] = 0
    assert worlds[0].evicted == worlds[1].evicted and len(worlds[0].evicted) > 90


@every_policy
def test_equal_calls_give_equal_victims(strategy):
    """The same trace twice, at a size where S3-FIFO's ghost has many sets."""
    evicted = []
    for _ in range(2):
        world, draws = World(strategy, 300, 5000, checked=False), np.random.default_rng(3)
        for step in range(60):
            world.batch(np.unique((draws.random(150) ** 3 * 5000).astype(np.int64)).tolist())
            if step == 30:
                world.grow(420)
        world.policy.check(world.row_of_slot)
        evicted.append(world.evicted)
    assert evicted[0] == evicted[1] and len(evicted[0]) > 1000


@every_policy
def test_a_held_slot_survives_many_evictions(strategy):
    """One slot in use for ever neither leaves nor keeps the others from leaving (nor, for LFU, the age from rising)."""
    world = World(strategy, 10, 5000)
    world.batch([4999])
    world.in_use[world.rows[4999]] = 1
    for row in range(3000):
        world.batch([row])
    assert 4999 in world.rows and len(world.evicted) == 2991


def lines_run(function, *arguments):
    """Number of Python lines run inside the package by a call."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if "colossal_freqcache" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(None)
    return lines


@pytest.fixture
def interpreted(monkeypatch):
    """The policies' kernels run as Python, so that their steps can be counted."""
    for policy in _POLICIES.values():
        module = sys.modules[policy.__module__]
        for name, function in list(vars(module).items()):
            if hasattr(function, "py_func"):
                monkeypatch.setattr(module, name, function.py_func)
        if hasattr(module, "prefetch"):
            monkeypatch.setattr(module, "prefetch", lambda array, place: None)  # it computes nothing


def work_of_calls(strategy, num_slots, num_rows, touches):
    """(lines of touch, evict and admit of 8 slots) in a full cache whose every slot was touched `touches` times."""
    world = World(strategy, num_slots, num_rows, checked=False, ids=False)
    with np.errstate(over="ignore"):  # the hash multiplies modulo 2^64
        world.admit(list(range(num_slots)))
        for _ in range(touches):
            world.touch(list(range(num_slots)))
        world.in_use[:4] = 1
        slots = np.arange(8, dtype=np.int32)
        new_rows = np.arange(num_rows - 8, num_rows)
        work = [lines_run(world.policy.touch, slots), lines_run(world.policy.evict, 8, world)]
        return [*work, lines_run(world.policy.admit, slots, new_rows)]


@every_policy
@pytest.mark.parametrize("touches", [0, 4])
def test_work_does_not_grow_with_slots_or_rows(strategy, touches, interpreted):
    """Lines run by each call, at 10x the slots and 100x the rows; many touches are the worst case for queues."""
    small = work_of_calls(strategy, 2_000, 10_000, touches)
    large = work_of_calls(strategy, 20_000, 1_000_000, touches)
    assert all(lines > 0 for lines in small)
    for few, many in zip(small, large, strict=True):
        assert many <= 1.3 * few + 50, (small, large)


@every_policy
def test_memory_of_a_call_does_not_grow_with_slots(strategy):
    """A call that looked at all slots with numpy would allocate for them: 100,000 slots, calls over 8 of them."""
    world = World(strategy, 100_000, 200_000, checked=False, ids=False)
    world.admit(list(range(100_000)))
    slots, new_rows = np.arange(8, dtype=np.int32), np.arange(150_000, 150_008)
    for rows in (new_rows, new_rows + 8):  # the first round compiles
        tracemalloc.start()
        world.policy.touch(slots)
        victims = world.policy.evict(8, world)
        world.policy.admit(victims, rows)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        world.row_of_slot[victims] = rows
        world.slot_of_id[rows] = victims + 1
    assert peak < 30_000


@every_policy
def test_bytes_per_slot_are_bounded_and_free_of_rows(strategy):
    """At most 12 bytes a slot (S3-FIFO with its ghost 16), before and after growth; only "host" parts know the rows."""
    bound = {"s3fifo": 16}.get(strategy, 12)
    policy, more_rows = make_policy(strategy, 100_000, 250_000), make_policy(strategy, 100_000, 50_000_000)
    for num_slots in (100_000, 200_000):
        if num_slots > 100_000:
            policy.grow(num_slots)
            more_rows.grow(num_slots)
        parts, parts_of_more = policy.num_bytes(), more_rows.num_bytes()
        assert sum(size for part, size in parts.items() if "host" not in part) <= bound * num_slots + 4096
        assert parts.keys() == parts_of_more.keys()
        assert all((parts[part] < parts_of_more[part]) == ("host" in part) for part in parts)
        assert all(parts[part] == parts_of_more[part] for part in parts if "host" not in part)
        arrays = sum(value.nbytes for value in vars(policy).values() if isinstance(value, np.ndarray))
        assert arrays <= sum(parts.values()) + 4096, "an array is not accounted for"


@every_policy
def test_a_billion_rows_touch_few_pages(strategy):
    """Building a policy over 10^9 rows and using it at both ends of the table leaves its memory untouched."""
    with open("/proc/self/statm") as statm:
        pages_before = int(statm.read().split()[1])
    num_rows = 10**9
    policy = make_policy(strategy, 4, num_rows)
    index = World("lru", 4, 8, checked=False)
    index.row_of_slot = np.array([0, num_rows // 2, num_rows - 1, num_rows - 2])
    policy.admit(np.arange(4, dtype=np.int32), index.row_of_slot)
    index.slot_of_id = {int(row): slot + 1 for slot, row in enumerate(index.row_of_slot)}
    if strategy != "dataset":  # whose map over rows this test leaves out
        assert len(policy.evict(2, index)) == 2
    with open("/proc/self/statm") as statm:
        assert int(statm.read().split()[1]) - pages_before < 10_000


# --- what each policy is for ---


def test_dataset_keeps_the_most_frequent_rows():
    """After any trace the rows with the smallest numbers that were seen are resident, up to the last batch."""
    world, draws = World("dataset", 50, 100_000), np.random.default_rng(4)
    for _ in range(100):
        world.batch(np.unique(draws.integers(0, 100_000, 10)).tolist())
    last = set(world.rows)
    seen = sorted(last | set(world.evicted))
    assert set(seen[:40]) <= last and len(world.evicted) > 500


def test_dataset_walk_agrees_with_sorting_over_many_levels():
    """Rows spread over four levels of the bitset, many of them in use: the largest rows not in use, falling."""
    draws, num_rows = np.random.default_rng(5), 20_000_000
    rows = np.unique(np.concatenate([draws.integers(0, num_rows, 3000), np.arange(500), num_rows - np.arange(1, 200)]))
    world = World("dataset", len(rows), num_rows, checked=False, ids=False)
    world.admit(rows.tolist())
    while len(rows):
        world.in_use[:] = draws.random(len(world.in_use)) < 0.3
        free = rows[world.in_use[[world.rows[row] for row in rows.tolist()]] == 0][::-1]
        victims = world.evict(min(len(free), 700) if len(rows) > 5 else len(free))
        assert victims == free[: len(victims)].tolist()
        rows = np.setdiff1d(rows, victims)
    world.policy.check(world.row_of_slot)


@pytest.mark.parametrize(("later_uses", "victims"), [(253, [2, 1]), (254, [1, 2])])
def test_lfu_counts_to_255(later_uses, victims):
    """Row 1 is used 300 times and counts 255; row 2, used later, leaves before it with 254, after it with 255."""
    world = World("lfu", 2, 100, LfuOracle(2), checked=False)
    world.admit([1, 2])
    for row, uses in ((1, 300), (2, later_uses)):
        for _ in range(uses):
            world.touch([world.rows[row]])
    assert world.evict(2) == victims


def test_lfu_recovers_when_the_hot_set_moves():
    """A hot set used 1,000 times is replaced by another of the same size: the new one is hit as well as the first."""
    world, draws = World("lfu", 100, 100_000, checked=False), np.random.default_rng(6)

    def phase(first_row, steps):
        hot = [(first_row + draws.permutation(80)[:30]).tolist() for _ in range(steps)]
        return [rows + draws.integers(50_000, 100_000, 3).tolist() for rows in hot]

    first = world.hit_ratio(phase(0, 1000))
    world.hit_ratio(phase(1000, 100))
    moved = world.hit_ratio(phase(1000, 200))
    assert first > 0.85 and moved > 0.85, (first, moved)
    assert len(world.evicted) > 1000


def test_lfu_recovers_when_two_working_sets_alternate():
    """Each set alone fits, both do not: in every phase the hit ratio is high again soon, for ever."""
    world = World("lfu", 60, 10_000, checked=False)
    draws = np.random.default_rng(7)
    for phase in range(8):
        batches = [(draws.permutation(50)[:20] + 50 * (phase % 2)).tolist() for _ in range(400)]
        world.hit_ratio(batches[:200])
        assert world.hit_ratio(batches[200:]) > 0.95, phase
    assert len(world.evicted) > 200


def test_lfu_keeps_frequent_rows_that_lru_would_lose():
    """One-hit rows pass through between two uses of each hot row: LFU keeps the hot ones, LRU cannot."""
    ratios = {}
    for strategy in ("lfu", "lru"):
        world = World(strategy, 40, 100_000, checked=False)
        one_hit = iter(range(1000, 100_000))
        world.hit_ratio([list(range(20))] * 50)
        rounds = [[hot] + [next(one_hit) for _ in range(3)] for _ in range(100) for hot in range(20)]
        ratios[strategy] = world.hit_ratio(rounds)
    assert ratios["lfu"] == 0.25 and ratios["lru"] < 0.01, ratios  # of four rows in a batch only one can hit


def test_s3fifo_scan_passes_through_small():
    """Rows used twice sit in main; a scan of ten times the cache evicts its own rows, and none of those."""
    world = World("s3fifo", 100, 100_000)
    for _ in range(3):
        for first in range(0, 80, 10):
            world.batch(list(range(first, first + 10)))
    for first in range(1000, 2000, 5):
        world.batch(list(range(first, first + 5)))
    assert len(world.evicted) == 80 + 1000 - 100
    assert set(world.evicted) <= set(range(1000, 2000))
    assert world.hit_ratio([list(range(80))]) == 1.0


def test_s3fifo_row_that_comes_back_goes_to_main():
    """Row 7 leaves from small and is admitted again while ghost remembers it: a scan no longer pushes it out."""
    world = World("s3fifo", 20, 100_000)
    world.batch([7])
    for row in range(100, 125):
        world.batch([row])
    assert 7 in world.evicted
    world.batch([7])
    assert world.policy._sizes.tolist() == [19, 1]
    for row in range(200, 260):
        world.batch([row])
    assert 7 in world.rows and world.evicted.count(7) == 1


def test_s3fifo_ghost_forgets_after_as_many_rows_as_main_has_slots():
    """18 rows after it left, row 7 is still remembered; one more and it starts in small again."""
    for rows_between, main in ((17, 1), (18, 0)):
        world = World("s3fifo", 20, 100_000)
        world.batch([7])
        for row in range(100, 119):  # fills the cache
            world.batch([row])
        assert world.evict(1) == [7]
        world.admit([500])
        for row in range(600, 600 + rows_between - 1):
            world.batch([row])
        world.batch([7])  # evicts one more before it is admitted
        assert world.policy._sizes[1] == main, rows_between


def test_s3fifo_ghost_remembers_nearly_all_of_its_capacity():
    """2,000 slots, so many sets: of the last 1,800 rows that left, 95 % are remembered; of older ones, none."""
    world, draws = World("s3fifo", 2000, 10**7, checked=False), np.random.default_rng(8)
    rows = draws.choice(10**7, 9000, replace=False)
    for first in range(0, 9000, 50):
        world.batch(rows[first : first + 50].tolist())
    remembered = set(world.policy._remembered()[0].tolist())
    recent = set(world.evicted[-1800:])
    assert remembered <= recent and len(remembered) >= 0.95 * len(recent)
    world.grow(3000)
    after = set(world.policy._remembered()[0].tolist())
    assert after <= remembered and len(after) >= 0.99 * len(remembered)


def test_s3fifo_second_chances_end():
    """All of 600 slots used three times before each call: 256 + 4 per victim move on, then rows leave in order.

    No row comes back, so ghost (of many sets here) is never asked, and the oracle's victims are exact."""
    world = World("s3fifo", 600, 100_000, S3FifoOracle(600))
    world.admit(list(range(600)))
    for first_row in range(600, 1200, 10):
        for _ in range(3):
            world.touch(sorted(world.rows.values()))
        before = world.policy._uses.sum()
        world.evict(10)
        assert before - world.policy._uses.sum() <= (256 + 40) * 3
        world.admit(list(range(first_row, first_row + 10)))


def test_s3fifo_new_row_starts_without_uses():
    """A row left with uses, as chances had run out; the next row in its slot leaves from small as one used once."""
    world = World("s3fifo", 400, 100_000)
    world.admit(list(range(400)))
    world.touch(list(range(400)))
    [victim] = world.evict(1)
    assert world.policy._uses[world.free[-1]] == 1, victim
    world.admit([1000])
    world.in_use[:] = 1
    world.in_use[world.rows[1000]] = 0
    assert world.evict(1) == [1000]
    assert 1000 in world.policy._remembered()[0]


# --- names ---


def test_strategy_names():
    assert EvictionStrategy.parse("LRU") is EvictionStrategy.LRU
    assert EvictionStrategy.parse(EvictionStrategy.S3FIFO) is EvictionStrategy.S3FIFO
    assert EvictionStrategy.DATASET == "dataset"
    for strategy in ALL_POLICIES:
        assert make_policy(EvictionStrategy(strategy), 3, 5).name == strategy


@pytest.mark.parametrize("value", ["clock", "", None, 3])
def test_unknown_strategy_lists_the_choices(value):
    with pytest.raises(ValueError, match='"dataset", "lfu", "lru", "s3fifo", "lookahead"$'):
        EvictionStrategy.parse(value)
