"""Row stores: one conformance suite for all of them, a user's own store in a bag, and stores that fail in between.

    python -m pytest tests/test_stores.py

Proves, for every store: rows come back as they were written, from scattered places, in both types, and `spawn` gives an
independent one. In a bag: only dirty rows are ever written back, and a read or write that raises in the middle of a
batch, at any of its calls and after any share of its rows, leaves every newest value in place: training goes on with
the bits of the bag whose every row is resident.
"""

import threading

import pytest
import torch
from worlds import (
    NUM_ROWS,
    assert_same_bits,
    chunks_of,
    counts,
    everything,
    loss_of,
    make_bag,
    make_optimizer,
    skewed_ids,
)

from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.row_layout import RowLayout
from colossal_freqcache.stores import make_store


class ListStore:
    """A user's own store: one tensor per row in a list, and a count of every row that moved."""

    def __init__(self):
        self.reads, self.writes = [], []

    def allocate(self, num_rows, layout):
        self.rows = [None] * num_rows
        self.layout = layout

    def read(self, rows, records, places):
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            records[place] = self.rows[row]
            self.reads.append(row)

    def write(self, rows, records, places):
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            self.rows[row] = records[place].clone()
            self.writes.append(row)

    def spawn(self):
        return type(self)()

    def num_bytes(self):
        return len(self.rows) * self.layout.row_bytes


# A new store joins the suite by a line.
STORES = {
    "ram, cpu kernels": lambda: make_store("ram", make_kernels("cpu")),
    "ram, torch kernels": lambda: make_store("ram", make_kernels("torch")),
    "a user's own": ListStore,
}
every_store = pytest.mark.parametrize("name", STORES)

LAYOUTS = {
    "weight": RowLayout(4, torch.float32),
    "with state": RowLayout(3, torch.float32, (("sum", 1, 0.5), ("m", 3, 0.0))),
    "one float64": RowLayout(1, torch.float64),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def full_store(name, layout, num_rows=20):
    """(a store whose row r holds records[r], records)"""
    store = STORES[name]()
    store.allocate(num_rows, layout)
    records = torch.randn(num_rows, layout.width, generator=torch.Generator().manual_seed(0)).to(layout.dtype)
    store.write(torch.arange(num_rows), records, torch.arange(num_rows))
    return store, records


def read(store, rows, layout):
    out = torch.empty(len(rows), layout.width, dtype=layout.dtype)
    store.read(torch.tensor(rows, dtype=torch.int64), out, torch.arange(len(rows)))
    return out


@every_store
def test_rows_come_back_as_they_were_written(name, layout):
    store, records = full_store(name, layout)
    rows = [3, 19, 0, 7]
    assert torch.equal(read(store, rows, layout), records[rows])
    assert store.num_bytes() >= 20 * layout.row_bytes


@every_store
@pytest.mark.parametrize("places_type", [torch.int32, torch.int64])
def test_scattered_places_and_nothing_beside_them(name, layout, places_type):
    """Rows go to and come from the places given, in a larger block; every other place and row stays."""
    store, records = full_store(name, layout)
    block = torch.full((9, layout.width), -1.0, dtype=layout.dtype)
    store.read(torch.tensor([5, 2, 11]), block, torch.tensor([8, 0, 4], dtype=places_type))
    assert torch.equal(block[[8, 0, 4]], records[[5, 2, 11]])
    assert (block[[1, 2, 3, 5, 6, 7]] == -1).all()
    block += 100
    store.write(torch.tensor([19, 1]), block, torch.tensor([4, 8], dtype=places_type))
    expected = records.clone()
    expected[[19, 1]] = block[[4, 8]]
    assert torch.equal(read(store, list(range(20)), layout), expected)


@every_store
def test_the_block_may_be_reused_after_a_write(name, layout):
    store, records = full_store(name, layout)
    kept = records.clone()
    records.fill_(0)
    assert torch.equal(read(store, list(range(20)), layout), kept)


@every_store
def test_nothing_to_move(name, layout):
    store, records = full_store(name, layout)
    nothing = torch.empty(0, dtype=torch.int64)
    block = torch.ones(2, layout.width, dtype=layout.dtype)
    store.read(nothing, block, nothing)
    store.write(nothing, block, nothing.int())
    assert (block == 1).all() and torch.equal(read(store, list(range(20)), layout), records)


@every_store
def test_spawn_is_empty_and_independent(name, layout):
    """The table in another layout is written while this one is still read."""
    store, records = full_store(name, layout)
    other = store.spawn()
    wide = RowLayout(layout.width + 2, layout.dtype)
    other.allocate(5, wide)
    other.write(torch.arange(5), torch.zeros(5, wide.width, dtype=wide.dtype), torch.arange(5))
    assert torch.equal(read(store, list(range(20)), layout), records)
    store.write(torch.tensor([0]), torch.ones(1, layout.width, dtype=layout.dtype), torch.tensor([0]))
    assert not read(other, [0, 4], wide).any()
    assert type(other) is type(store)


@every_store
def test_allocated_again_it_takes_the_new_shape(name, layout):
    store, _ = full_store(name, layout)
    wide = RowLayout(layout.width + 1, layout.dtype)
    store.allocate(3, wide)
    records = torch.rand(3, wide.width).to(wide.dtype)
    store.write(torch.arange(3), records, torch.arange(3))
    assert torch.equal(read(store, [2, 0, 1], wide), records[[2, 0, 1]])


def test_rows_beyond_two_to_the_31_elements():
    """A row number times the width passes int32: 70 million rows of 33 floats, of which two pages are ever touched."""
    layout = RowLayout(33, torch.float32)
    for name in ("ram, cpu kernels", "ram, torch kernels"):
        store = STORES[name]()
        store.allocate(70_000_000, layout)
        assert 70_000_000 * layout.width > 2**31
        records = torch.rand(2, layout.width)
        rows = torch.tensor([69_999_999, 1])
        store.write(rows, records, torch.tensor([0, 1]))
        assert torch.equal(read(store, rows.tolist(), layout), records)


# ---- in a bag ----------------------------------------------------------------------------------------------------


def train(bag, optimizer, steps=10, seed=1, after_forward=lambda bag: None):
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(steps):
        out = bag(skewed_ids(generator))
        after_forward(bag)
        outputs.append(out.detach().clone())
        loss_of(out).backward()
        optimizer.step()
        optimizer.zero_grad()
        bag._cache.check()
    return outputs


def test_a_users_own_store_gives_the_same_bits(kernels, policy, optimizer):
    """And binding an optimizer spawns one for the wider records."""
    results = []
    for store, num_slots in ((ListStore(), 25), ("ram", NUM_ROWS)):
        bag = make_bag(num_slots, store=store, kernels=kernels, evict_strategy=policy, ids_freq_mapping=counts())
        opt = make_optimizer(optimizer, bag.parameters())
        results.append([*train(bag, opt), *everything(bag, opt)])
        assert bag.stats.evictions > 0 or num_slots == NUM_ROWS
    assert_same_bits(*results)


def test_no_clean_row_is_ever_written_back(kernels, policy):
    """What the store itself sees: no write while nothing is trained, and only rows that were trained afterwards."""
    store = ListStore()
    bag = make_bag(25, store=store, kernels=kernels, evict_strategy=policy)
    store.reads.clear()
    store.writes.clear()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            bag(skewed_ids(generator))
    bag.flush()
    assert bag.stats.evictions > 0 and store.writes == []
    assert len(store.reads) == bag.stats.rows_fetched
    opt = make_optimizer("SGD", bag.parameters())
    trained = set()
    for step in range(10):
        ids = skewed_ids(generator)
        if step % 2:
            with torch.no_grad():
                bag(ids)
            continue
        trained |= set(ids.reshape(-1).tolist())
        bag(ids).sum().backward()
        opt.step()
        opt.zero_grad()
    bag.flush()
    assert set(store.writes) == trained
    assert len(store.writes) == bag.stats.rows_written_back


def test_a_store_that_lacks_a_method_is_refused():
    class ReadOnly:
        def read(self, rows, records, places): ...

    with pytest.raises(ValueError, match="RowStore"):
        make_bag(store=ReadOnly())


# ---- stores that fail --------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a disk says."""


class FailingStore(ListStore):
    """Raises after it has moved `rows_left` rows of the call numbered `fail_at` of `operation`."""

    operation, fail_at, rows_left, calls = None, 0, 0, 0

    def arm(self, operation, fail_at, rows_left):
        self.operation, self.fail_at, self.rows_left, self.calls = operation, fail_at, rows_left, 0

    def _maybe_fail(self, operation, move, rows, records, places):
        if operation == self.operation:
            self.calls += 1
            if self.calls == self.fail_at:
                move(rows[: self.rows_left], records, places[: self.rows_left])
                self.operation = None
                raise Broken
        move(rows, records, places)

    def read(self, rows, records, places):
        self._maybe_fail("read", super().read, rows, records, places)

    def write(self, rows, records, places):
        self._maybe_fail("write", super().write, rows, records, places)


@pytest.mark.parametrize("failing", [1, 2, NUM_ROWS // 16])
@chunks_of(1)
def test_a_failure_while_the_table_is_filled_is_the_constructors(failing):
    """Which writes in a second thread meanwhile."""
    store = FailingStore()
    store.arm("write", failing, 1)
    with pytest.raises(Broken):
        make_bag(store=store)
    assert store.calls == failing
    assert not [thread for thread in threading.enumerate() if "freqcache-initialize" in thread.name]


@pytest.mark.parametrize("call", ["forward", "prefetch", "flush"])
@pytest.mark.parametrize("rows_left", [0, 1, 3])
@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_failure_in_the_middle_leaves_every_newest_value(operation, rows_left, call, kernels, policy):
    """The call fails once in every step of the training, is tried again, and nobody can tell afterwards."""
    if call == "flush" and operation == "read":
        operation = "write"  # a flush reads nothing
    results = []
    failures = 0
    for failing in (True, False):
        bag = make_bag(
            40 if failing else NUM_ROWS,
            store=FailingStore(),
            kernels=kernels,
            evict_strategy=policy,
            optimizer="adagrad",
        )
        opt = make_optimizer("Adagrad", bag.parameters())
        store = bag._cache.store
        generator = torch.Generator().manual_seed(1)
        outputs = []
        for _ in range(8):
            ids = skewed_ids(generator)
            if failing:
                store.arm(operation, 1, rows_left)
                try:
                    with torch.no_grad():
                        {"forward": bag, "prefetch": bag.prefetch, "flush": lambda _, bag=bag: bag.flush()}[call](ids)
                except Broken:
                    failures += 1
                store.operation = None
                bag._cache.check()
                assert bag._cache.slots.num_pinned == (len(bag._cache._prefetched) if call == "prefetch" else 0)
            out = bag(ids)
            outputs.append(out.detach().clone())
            loss_of(out).backward()
            opt.step()
            opt.zero_grad()
            bag._cache.check()
        assert not failing or bag.stats.evictions > 0
        results.append([*outputs, *everything(bag, opt)])
    assert failures >= 4
    assert_same_bits(*results)


def test_rows_of_waiting_graphs_survive_a_failure(kernels):
    """Forward A waits; forward B fails while it writes back; A's backward and the step train A's rows."""
    results = []
    for failing in (True, False):
        bag = make_bag(10 if failing else NUM_ROWS, store=FailingStore(), kernels=kernels, optimizer="sgd")
        store = bag._cache.store
        opt = make_optimizer("SGD", bag.parameters())
        bag(torch.arange(20, 26).reshape(1, 6)).sum().backward()
        opt.step()
        opt.zero_grad()
        waiting = bag(torch.arange(5).reshape(1, 5))
        if failing:
            store.arm("write", 1, 1)
            with pytest.raises(Broken):
                bag(torch.arange(50, 55).reshape(1, 5))
            bag._cache.check()
        bag(torch.arange(50, 55).reshape(1, 5))
        loss_of(waiting).backward()
        opt.step()
        opt.zero_grad()
        bag._cache.check()
        results.append(everything(bag))
    assert_same_bits(*results)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_failure_while_an_optimizer_is_bound_leaves_the_table(operation, kernels):
    """Re-laying the rows out goes through a second store: until it is complete, the first one serves."""
    bag = make_bag(25, store=FailingStore(), kernels=kernels)
    sgd = make_optimizer("SGD", bag.parameters())
    train(bag, sgd, steps=3)
    bag.drop_optimizer_state()
    table = bag.logical_weight()
    old = bag._cache.store
    if operation == "read":
        old.arm("read", 1, 3)
    else:
        fresh = FailingStore()
        fresh.arm("write", 1, 3)
        old.spawn = lambda: fresh
    with pytest.raises(Broken):
        make_optimizer("Adagrad", bag.parameters())
    bag._cache.check()
    assert bag._cache.store is old and torch.equal(bag.logical_weight(), table)
    old.__dict__.pop("spawn", None)
    opt = make_optimizer("Adagrad", bag.parameters())
    assert torch.equal(bag.logical_weight(), table)
    train(bag, opt, steps=3)


def test_a_failure_while_a_table_is_loaded_leaves_a_consistent_cache(kernels):
    """Lost half way; each row is the old or the new one, the same whether it is resident or fetched again."""
    bag = make_bag(25, store=FailingStore(), kernels=kernels, ids_freq_mapping=counts())
    train(bag, make_optimizer("SGD", bag.parameters()), steps=3)
    old, new = bag.logical_weight(), torch.randn(NUM_ROWS, 8)
    bag._cache.store.arm("write", 1, 100)
    with pytest.raises(Broken):
        bag.load_state_dict({"weight": new})
    bag._cache.check()
    table = bag.logical_weight()
    assert ((table == old).all(1) | (table == new).all(1)).all()
    with torch.no_grad():
        for first in range(0, NUM_ROWS, 20):
            bag(torch.arange(first, first + 20).reshape(1, 20))
    assert torch.equal(bag.logical_weight(), table)
