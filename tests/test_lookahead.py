"""Lookahead: the coming batches' ids are known, the next ones' rows are there; nobody can tell from the results.

    python -m pytest tests/test_lookahead.py

Proves: with and without Lookahead the same bits, whatever window, depth, policy, kernel set and delays, and decisions
that no delay changes; each hazard of moving rows beside training, staged with a store that waits for an event; that
fetches are under way while a batch trains; what a loader may be and do; that nothing is left behind.
"""

import functools
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from worlds import NUM_ROWS, assert_same_bits, counts, everything, loss_of, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, Lookahead, checkpoint, optim
from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.stores import RamStore

WINDOWS = [(1, 1), (16, 4), (64, 1)]
RULES = {"SGD": "sgd", "Adagrad": "adagrad", "RowWiseAdagrad": "rowwise_adagrad", "Adam": "adam"}
not_fitting = pytest.mark.filterwarnings("ignore:.*coming batches are admitted later")


class StagedStore(RamStore):
    """A RamStore that calls before(kind, rows) in the thread that moves, and keeps what was moved by which thread."""

    def __init__(self, before=lambda kind, rows: None):
        super().__init__(make_kernels("cpu"))
        self.before, self.moved = before, []

    def read(self, rows, records, places):
        self._tell("read", rows)
        super().read(rows, records, places)

    def write(self, rows, records, places):
        self._tell("write", rows)
        super().write(rows, records, places)

    def _tell(self, kind, rows):
        in_background = threading.current_thread() is not threading.main_thread()
        self.moved.append((kind, set(rows.tolist()), in_background))
        if in_background:
            self.before(kind, rows)

    def spawn(self):
        return StagedStore(self.before)


def train(bag, optimizer, batches, micro=1):
    outputs, evictions = [], 0
    bag.evicting_steps = 0
    for ids in batches:
        bag.evicting_steps += bag.stats.evictions > evictions
        evictions = bag.stats.evictions
        for part in ids.chunk(micro):
            out = bag(part)
            loss_of(out).backward()
            outputs.append(out.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def id_batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [skewed_ids(generator) for _ in range(steps)]


def trained(steps, window, depth, num_slots=90, name="Adagrad", micro=1, seed=1, **options):
    """(bag, optimizer, outputs) of a training run; window 0: without Lookahead."""
    bag = make_bag(num_slots, ids_freq_mapping=counts(), optimizer=RULES[name], **options)
    optimizer = make_optimizer(name, bag.parameters())
    batches = id_batches(steps, seed)
    loader = Lookahead(batches, bag, window=window, depth=depth) if window else batches
    return bag, optimizer, train(bag, optimizer, loader, micro)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@not_fitting
@pytest.mark.parametrize("policy_name", ["lookahead", "lru", "dataset"])
@pytest.mark.parametrize(("window", "depth"), WINDOWS)
def test_the_same_bits_with_and_without(window, depth, policy_name, kernels):
    """300 steps, rows evicted on most of them; outputs, table and optimizer state."""
    bag, optimizer, outputs = trained(300, window, depth, evict_strategy=policy_name, kernels=kernels, num_slots=70)
    assert bag.evicting_steps > 250 and bag._cache.slots.num_pinned == 0
    assert_same_bits([*outputs, *everything(bag, optimizer)], without_lookahead(kernels))
    bag._cache.check()


@functools.cache
def without_lookahead(kernels):
    bag, optimizer, outputs = trained(300, 0, 0, evict_strategy="lru", kernels=kernels, num_slots=70)
    return [*outputs, *everything(bag, optimizer)]


@not_fitting
@pytest.mark.parametrize("micro", [1, 3])
def test_the_same_bits_for_every_optimizer(optimizer, micro):
    ahead = trained(40, 8, 2, name=optimizer, micro=micro)
    without = trained(40, 0, 0, name=optimizer, micro=micro)
    assert ahead[0].stats.evictions > 40
    assert_same_bits([*ahead[2], *everything(*ahead[:2])], [*without[2], *everything(*without[:2])])


@not_fitting
def test_no_delay_changes_a_bit_or_a_decision():
    """200 runs with random delays in the threads beside training: the same bits, and the same counts of everything."""
    expected, expected_stats = {}, {}
    for run in range(200):
        window, depth = WINDOWS[run % 3]
        delays = random.Random(run)
        store = StagedStore(lambda *_, delays=delays: time.sleep(delays.choice([0, 0, 1e-4, 5e-4])))
        policy = ("lookahead", "lru", "dataset")[run // 3 % 3]
        bag, optimizer, outputs = trained(12, window, depth, num_slots=70, evict_strategy=policy, store=store)
        assert bag.stats.evictions > 12
        case, found = (window, policy), [*outputs, *everything(bag, optimizer)]
        assert_same_bits(found, expected.setdefault("bits", found))
        assert bag.stats.as_dict() == expected_stats.setdefault(case, bag.stats.as_dict())


def test_growth_and_an_optimizer_that_is_bound_in_the_loop():
    """A first batch that is too large grows the cache, the first step re-lays the records out: both beside moves."""
    batches = id_batches(12)
    batches[3] = torch.arange(120).reshape(-1, 3)
    results = []
    for window in (4, 0):
        bag = make_bag(70, ids_freq_mapping=counts(), evict_strategy="lookahead")
        optimizer = make_optimizer("Adagrad", bag.parameters())
        loader = Lookahead(batches, bag, window=4, depth=1) if window else batches
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = train(bag, optimizer, loader)
        assert bag.num_slots > 70
        bag._cache.check()
        results.append([*outputs, *everything(bag, optimizer)])
    assert_same_bits(*results)


@pytest.mark.parametrize("limit", ["rows stay in their slots", "the block gets another shape"])
def test_an_optimizer_bound_between_batches(limit):
    """Its state halves the slots of a budget in bytes, or not: what was admitted ahead stays or is let go."""
    batches, results = id_batches(10), []
    size = dict(max_cache_bytes=200 * 16) if limit == "the block gets another shape" else dict(num_slots=90)
    for ahead in (True, False):
        bag = FreqAwareEmbeddingBag(NUM_ROWS, 4, mode="sum", ids_freq_mapping=counts(), **size)
        bag.init_(lambda values: values.copy_(torch.linspace(-1, 1, values.numel()).view_as(values)))
        optimizer, outputs = None, []
        for ids in Lookahead(batches, bag, window=3, depth=1) if ahead else batches:
            if optimizer is None:
                optimizer = optim.Adagrad(bag.parameters(), lr=0.1)
            outputs += train(bag, optimizer, [ids])
        results.append([*outputs, bag.logical_weight()])
    assert_same_bits(*results)


# ---- hazards, staged -------------------------------------------------------------------------------------------------


class Gate:
    """Lets a background move pass once it is opened: at once ("before"), or a while after training needs it.

    The first batch's fetch, which nothing can hide, passes in any case.
    """

    def __init__(self, when):
        self.event, self.passed = threading.Event(), 0
        if when == "before":
            self.event.set()

    def __call__(self, kind, rows):
        self.passed += 1
        if self.passed == 1:
            return
        assert self.event.wait(20), "nobody opened the gate"

    def open_soon(self):
        if not self.event.is_set():
            threading.Timer(0.05, self.event.set).start()


before_and_after = pytest.mark.parametrize("when", ["before", "after"])


def staged_bag(num_slots, before, policy="lru", **options):
    """A bag of fixed size over a store that waits; row r of the table is (r, r, r, r)."""
    bag = FreqAwareEmbeddingBag(
        50,
        4,
        mode="sum",
        num_slots=num_slots,
        max_cache_bytes=num_slots * 16,
        evict_strategy=policy,
        store=StagedStore(),
        **options,
    )
    bag.init_(lambda values: values.copy_(torch.arange(50.0).view(-1, 1).expand(50, 4)))
    bag._cache.store.before = before
    return bag


def resident(bag, *ids):
    return [bool(bag._cache.slots.slot_of_id[number]) for number in ids]


def batch_of(*ids):
    return torch.tensor([ids])


@before_and_after
def test_a_coming_batchs_rows_are_not_evicted_by_the_one_after_it(when):
    """Early eviction: t, t+1 and t+2 fill all slots; each admission finds victims among older rows only."""
    gate = Gate(when)
    bag = staged_bag(6, gate)
    with torch.no_grad():
        bag(batch_of(40, 41, 42, 43, 44, 45))
    it = iter(Lookahead([batch_of(0, 1), batch_of(2, 3), batch_of(4, 5), batch_of(6, 7)], bag, window=3, depth=2))
    gate.open_soon()
    with torch.no_grad():
        for expected in ((0, 1), (2, 3), (4, 5), (6, 7)):
            ids = next(it)
            assert all(resident(bag, *expected))
            if expected == (0, 1):
                assert resident(bag, *range(6)) == [True] * 6
            assert bag(ids)[0, 0] == sum(expected)
    bag._cache.check()


@before_and_after
def test_what_trains_is_not_written_back(when):
    """Stale slot: while t trains, t+1's move writes rows back; none of them is t's, whose values arrive whole."""
    gate = Gate(when)
    bag = staged_bag(4, gate, optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    expected = torch.arange(50.0)
    batches = [batch_of(0, 1), batch_of(2, 3), batch_of(0, 4), batch_of(5, 1), batch_of(2, 0)]
    gate.open_soon()
    known = 0
    for ids in Lookahead(batches, bag, window=2, depth=1):
        bag(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        written = [rows for kind, rows, beside in bag._cache.store.moved[known:] if beside and kind == "write"]
        assert not set(ids.flatten().tolist()) & set().union(*written)
        known = len(bag._cache.store.moved)  # what follows is the next hand-out's
        expected[ids.flatten()] -= 1
    assert torch.equal(bag.logical_weight()[:, 0], expected)
    assert any(kind == "write" and beside for kind, _, beside in bag._cache.store.moved)


@before_and_after
def test_a_row_is_not_fetched_before_it_was_written(when):
    """Dirty fetch: a trained row is evicted for the next batch; an evaluation wants it back while its write waits."""
    gate = Gate(when)
    bag = staged_bag(4, gate, optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    bag(batch_of(0, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    it = iter(Lookahead([batch_of(2, 3), batch_of(4), batch_of(5)], bag, window=2, depth=1))
    gate.open_soon()
    with torch.no_grad():
        bag(next(it))
        assert not all(resident(bag, 0, 1)), "a trained row was to be evicted"
        assert bag(batch_of(0))[0, 0] == -1 and bag(batch_of(1))[0, 0] == 0
        bag(next(it))
        bag._cache.check()


def test_a_move_reads_what_the_one_before_it_writes():
    """Dirty fetch, by two moves: a row that t trained leaves for t+3, t+4 wants it back, both under way in t+2."""
    opened = threading.Event()

    def wait(kind, rows):
        assert kind != "write" or 0 not in rows or opened.wait(20)

    bag = staged_bag(6, wait, optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    batches = [batch_of(0, 1), batch_of(2, 3), batch_of(4, 5), batch_of(6, 7), batch_of(0, 8)]
    outputs = []
    for number, ids in enumerate(Lookahead(batches, bag, window=4, depth=2)):
        out = bag(ids)
        outputs.append(out[0, 0].item())
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            assert len(bag._cache.ahead._moving) == 2
            time.sleep(0.05)  # enough for a second move that does not wait for the first
            opened.set()
    assert outputs == [1, 5, 9, 13, 7]


@not_fitting
def test_forwards_without_backward_hold_their_rows_and_let_them_go(kernels):
    """Graphs that are kept: less fits ahead, the result is the same; once they are dropped, nothing is held."""
    batches, kept, results = id_batches(12), [], []
    for ahead in (True, False):
        bag = make_bag(300, ids_freq_mapping=counts(), kernels=kernels, evict_strategy="lru", optimizer="adagrad")
        optimizer, outputs = make_optimizer("Adagrad", bag.parameters()), []
        loader = Lookahead(batches, bag, window=4, depth=2) if ahead else batches
        for number, ids in enumerate(loader):
            if number % 3 == 0:
                kept.append(bag(ids))  # never goes backward
            outputs += train(bag, optimizer, [ids])
            bag._cache.check()
        assert bag._cache.slots.num_pinned > 0
        kept.clear()
        bag.flush()
        assert bag._cache.slots.num_pinned == 0
        results.append([*outputs, *everything(bag, optimizer)])
    assert_same_bits(*results)


class StoreError(Exception):
    pass


@pytest.mark.parametrize("failing", ["read", "write"])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_move_that_fails_leaves_every_newest_value(failing, at, policy):
    """The error arrives where the batch is asked for; the maps are sound, no value is lost, and training can go on."""
    moves = []

    def fail(kind, rows):
        moves.append(kind)
        if moves.count(failing) == at and kind == failing:
            raise StoreError("the disk is gone")

    store = StagedStore()
    batches = id_batches(30)
    bag = make_bag(60, ids_freq_mapping=counts(), evict_strategy=policy, optimizer="adagrad", store=store)
    bag._cache.store.before = fail
    optimizer, outputs, steps = make_optimizer("Adagrad", bag.parameters()), [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(StoreError, match="the disk is gone") as raised:
            for ids in Lookahead(batches, bag, window=6, depth=2):
                outputs += train(bag, optimizer, [ids])
                steps += 1
        assert "coming batch" in raised.value.__notes__[0] and steps < 30 and (steps > 0 or at == 1)
        bag._cache.check()
        assert bag._cache.slots.num_pinned == 0
        outputs += train(bag, optimizer, Lookahead(batches[steps:], bag, window=6, depth=2))
    bag._cache.check()
    without = make_bag(60, ids_freq_mapping=counts(), evict_strategy=policy, optimizer="adagrad")
    its_optimizer = make_optimizer("Adagrad", without.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        its_outputs = train(without, its_optimizer, batches)
    assert_same_bits([*outputs, *everything(bag, optimizer)], [*its_outputs, *everything(without, its_optimizer)])


@before_and_after
def test_the_cache_grows_while_rows_move(when):
    gate = Gate(when)
    bag = FreqAwareEmbeddingBag(50, 4, mode="sum", num_slots=4, evict_strategy="lru", store=StagedStore())
    bag.init_(lambda values: values.copy_(torch.arange(50.0).view(-1, 1).expand(50, 4)))
    bag._cache.store.before = gate
    it = iter(Lookahead([batch_of(0, 1), batch_of(2, 3), batch_of(0, 9)], bag, window=2, depth=1))
    gate.open_soon()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bag(next(it))
        assert bag(torch.arange(10, 20).view(1, -1))[0, 0] == 145 and bag.num_slots >= 10
        assert bag(next(it))[0, 0] == 5 and bag(next(it))[0, 0] == 9
    bag._cache.check()


@before_and_after
@pytest.mark.parametrize("what", ["state_dict", "flush", "checkpoint", "logical_weight", "load"])
def test_the_table_is_read_in_the_middle_of_a_window(what, when, tmp_path):
    gate = Gate(when)
    bag = staged_bag(4, gate, optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    expected = torch.arange(50.0)
    for ids in Lookahead([batch_of(n, n + 1) for n in range(0, 24, 2)], bag, window=6, depth=1):
        bag(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected[ids.flatten()] -= 1
        gate.open_soon()
        if what == "state_dict":
            table = bag.state_dict()["weight"]
        elif what == "flush":
            bag.flush()
            table = bag.logical_weight()
        elif what == "checkpoint":
            checkpoint.save(tmp_path / "saved", bag, optimizer)
            other = staged_bag(4, Gate("before"), optimizer="sgd")
            checkpoint.load_latest(tmp_path / "saved", other)
            table = other.logical_weight()
        elif what == "load":
            expected = expected + 1
            bag.load_state_dict({"weight": expected.view(-1, 1).expand(50, 4)})
            table = bag.logical_weight()
        else:
            table = bag.logical_weight()
        assert torch.equal(table, expected.view(-1, 1).expand(50, 4))
        bag._cache.check()


# ---- under way while a batch trains ----------------------------------------------------------------------------------


def test_fetches_are_under_way_while_a_batch_trains():
    """Each fetch but the first waits for an event that the training of the batch before it sets, after its step."""
    trained, under_way, began = threading.Event(), [], threading.Event()

    def wait(kind, rows):
        if kind == "read" and under_way:
            began.set()
            assert trained.wait(20), "training waited for a fetch that was to be hidden"
            trained.clear()

    bag = staged_bag(6, wait, policy="lookahead", optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    batches = [batch_of(n, n + 1) for n in range(0, 40, 2)]
    under_way.append(0)
    trained.set()  # the first batch's fetch has nothing to hide behind
    for number, ids in enumerate(Lookahead(batches, bag, window=8, depth=1)):
        if number < len(batches) - 1:
            assert began.wait(20)
            under_way[0] += 1
        began.clear()
        misses = bag.stats.misses_unique
        bag(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bag.stats.misses_unique == misses
        trained.set()
    assert under_way[0] == len(batches) - 1


# ---- what is held ----------------------------------------------------------------------------------------------------


def test_rows_are_held_until_the_next_batch_is_asked_for():
    """Over all micro-batches, forwarded or not; and every occurrence is counted once."""
    bag = staged_bag(4, lambda *_: None)
    batches = [batch_of(0, 1), batch_of(2, 3), batch_of(4, 5)]
    with torch.no_grad():
        for number, _ in enumerate(Lookahead(batches, bag, window=2, depth=1)):
            assert bag._cache.slots.num_pinned == (4 if number < 2 else 2)
            ids = range(2 * number, 2 * number + 2)
            for _ in range(2):
                for each in ids:
                    bag(batch_of(each))  # a micro-batch
                    assert all(resident(bag, *ids))
    assert bag._cache.slots.num_pinned == 0
    assert (bag.stats.misses, bag.stats.hits) == (6, 6)  # of 12 occurrences; the first of each row was its miss


@not_fitting
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_occurrence_is_counted_once(depth, policy):
    bag, _, _ = trained(30, 4, depth, evict_strategy=policy, num_slots=200)
    assert bag.stats.hits + bag.stats.misses == sum(ids.numel() for ids in id_batches(30))
    assert bag.stats.rows_fetched == bag.stats.misses_unique


def test_what_does_not_fit_ahead_is_said_once_and_admitted_later():
    bag = staged_bag(3, lambda *_: None)
    batches = [batch_of(2 * n, 2 * n + 1) for n in range(6)]
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for number, ids in enumerate(Lookahead(batches, bag, window=4, depth=2)):
            assert bag._cache.ahead.num_admitted == 0 and all(resident(bag, *ids[0].tolist()))
            assert bag(ids)[0, 0] == 4 * number + 1
    assert ["4 for 3 slots" in str(each.message) for each in caught] == [True]
    assert bag.num_slots == 3


def test_rows_ahead_give_way_to_a_forward():
    bag = staged_bag(4, lambda *_: None)
    it = iter(Lookahead([batch_of(0, 1), batch_of(2, 3), batch_of(4, 5)], bag, window=2, depth=1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        next(it)
        assert bag(batch_of(0, 11, 12, 13))[0, 0] == 36
        assert bag(next(it))[0, 0] == 5 and bag(next(it))[0, 0] == 9
    bag._cache.check()
    assert bag.stats.hits + bag.stats.misses == 8


@not_fitting
def test_a_forward_of_other_ids_is_looked_up_like_any_other():
    """The order of the batches is never trusted: swapped, left out, other ones in between."""
    bag = staged_bag(8, lambda *_: None, policy="lookahead")
    batches = [batch_of(n, n + 1) for n in range(0, 30, 2)]
    with torch.no_grad():
        for number, ids in enumerate(Lookahead(batches, bag, window=5, depth=2)):
            if number % 3:
                assert bag(batch_of(48, 49, number))[0, 0] == 97 + number
            if number % 2:
                assert bag(ids.flip(1))[0, 0] == 4 * number + 1
            bag._cache.check()


@pytest.mark.parametrize("how", ["taken out", "autograd.grad"])
def test_a_gradient_kept_by_hand_is_good_until_the_next_forward(how):
    """It is stepped after the next batch was asked for, whose rows may not have taken its slots by then."""
    batches, results = [batch_of(n, (n + 7) % 50) for n in range(0, 40, 2)], []
    for ahead in (True, False):
        bag = staged_bag(6, lambda *_: time.sleep(1e-3), policy="lru", optimizer="sgd")
        optimizer, kept = torch.optim.SGD(bag.parameters(), lr=1.0), None
        for ids in Lookahead(batches, bag, window=3, depth=1) if ahead else batches:
            if kept is not None:
                bag.weight.grad = kept
                optimizer.step()
                optimizer.zero_grad()
            loss = (bag(ids) ** 2).sum() / 100
            if how == "taken out":
                loss.backward()
                kept, bag.weight.grad = bag.weight.grad, None
            else:
                (kept,) = torch.autograd.grad(loss, bag.weight)
        results.append(bag.logical_weight())
    assert_same_bits([results[0]], [results[1]])


def test_a_gradient_kept_too_long_is_refused():
    """After another forward its slots may hold rows of a batch that comes next: pinned, but not for it."""
    bag = staged_bag(4, lambda *_: None, optimizer="sgd")
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    it = iter(Lookahead([batch_of(n, n + 1) for n in range(0, 20, 2)], bag, window=3, depth=1))
    bag(next(it)).sum().backward()
    kept, bag.weight.grad = bag.weight.grad, None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for _ in range(3):
            bag(next(it))
    table = bag.logical_weight()
    bag.weight.grad = kept
    with pytest.raises(RuntimeError, match="rows have moved since"):
        optimizer.step()
    assert torch.equal(bag.logical_weight(), table)


def test_micro_batches_that_share_rows_are_counted_once():
    counted = []
    for ahead in (True, False):
        bag = staged_bag(8, lambda *_: None)
        batches = [torch.tensor([[n, n + 1], [n + 1, n + 1], [n, n]]) for n in range(0, 30, 3)]
        with torch.no_grad():
            for ids in Lookahead(batches, bag, window=3, depth=1) if ahead else batches:
                for part in ids.split(1):
                    bag(part)
        counted.append((bag.stats.hits, bag.stats.misses, bag.stats.misses_unique))
    assert counted[0] == counted[1] and sum(counted[0][:2]) == 60


# ---- loaders ---------------------------------------------------------------------------------------------------------


class Ids(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, number):
        return {"ids": torch.tensor([number % 7, number * 13 % NUM_ROWS]), "number": number}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_over_several_epochs(workers):
    """Batches, their order, len() and attributes are the loader's; the last batch is a part of one."""
    loader = DataLoader(Ids(), batch_size=8, shuffle=True, num_workers=workers, generator=torch.Generator())
    bag = make_bag(60)
    ahead = Lookahead(loader, bag, ids=lambda batch: batch["ids"], window=3, depth=1)
    assert len(ahead) == 7 and ahead.dataset is loader.dataset and ahead.batch_size == 8
    for epoch in range(3):
        loader.generator.manual_seed(epoch)
        expected = [batch["number"].tolist() for batch in loader]
        loader.generator.manual_seed(epoch)
        assert [batch["number"].tolist() for batch in ahead] == expected
        assert len(expected[-1]) == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ahead.no_such_thing


def test_any_iterable_and_bags_of_unequal_length():
    def generate():
        generator = torch.Generator().manual_seed(0)
        for size in (3, 0, 5, 1):
            lengths = torch.randint(0, 4, (size,), generator=generator)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])[:-1]
            yield torch.randint(0, 50, (int(lengths.sum()),), generator=generator), offsets

    bag, plain = staged_bag(20, lambda *_: None), nn.EmbeddingBag(50, 4, mode="sum")
    plain.load_state_dict(bag.state_dict())
    ahead = Lookahead(generate(), bag, window=2, depth=1)
    with pytest.raises(TypeError):
        len(ahead)
    seen = 0
    for ids, offsets in ahead:
        assert torch.equal(bag(ids, offsets), plain(ids, offsets))
        seen += 1
    assert seen == 4 and list(Lookahead([], bag)) == []


def test_several_tables_in_a_model():
    """Each by the path of its module; one that `ids` leaves out is looked up as ever."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = nn.ModuleList(FreqAwareEmbeddingBag(40, 4, mode="sum", num_slots=9) for _ in range(2))
            self.tables = FreqAwareEmbeddingBagCollection([30, 5], 4, mode="sum", num_slots=9)
            self.other = FreqAwareEmbeddingBag(40, 4, mode="sum", num_slots=9, evict_strategy="lru")

    model = Model()
    batches = [torch.tensor([[n % 40, (n * 3) % 40]]) for n in range(30)]
    offsets = torch.tensor([0, 1])

    def ids(batch):
        tables = torch.tensor([batch[0, 0] % 30, batch[0, 1] % 5])
        return {"bags.0": batch, "bags.1": (39 - batch,), "tables": (tables, offsets, "no weights")}

    for batch in Lookahead(batches, model, ids=ids, window=4, depth=1):
        found = [module._cache.stats.misses_unique for module in (*model.bags, model.tables)]
        for path, arguments in ids(batch).items():
            arguments = (arguments,) if torch.is_tensor(arguments) else arguments[:2]
            model.get_submodule(path)(*arguments)
        model.other(batch)
        assert [module._cache.stats.misses_unique for module in (*model.bags, model.tables)] == found
    assert model.other.stats.misses > 0 and model.bags[1].stats.misses > 0
    assert model.bags[0]._cache.strategy == "lookahead" and model.other._cache.strategy == "lru"


def test_an_exception_of_the_loader_comes_after_the_batches_before_it():
    def generate():
        for n in range(5):
            yield batch_of(n)
        raise OSError("the file ends here")

    bag, seen = staged_bag(6, lambda *_: None), []
    with pytest.raises(OSError, match="the file ends here"):
        for ids in Lookahead(generate(), bag, window=3, depth=1):
            seen.append(int(ids))
    assert seen == list(range(5)) and bag._cache.slots.num_pinned == 0


def test_a_bad_id_comes_after_the_batches_before_it():
    bag, seen = staged_bag(6, lambda *_: None), []
    with pytest.raises(ValueError, match="id 50 at position 0 is outside the valid range"):
        for ids in Lookahead([batch_of(n) for n in (0, 1, 2, 3, 50, 4, 5)], bag, window=4, depth=2):
            with torch.no_grad():
                seen.append(int(bag(ids)[0, 0]))
    assert seen == [0, 1, 2, 3] and bag._cache.slots.num_pinned == 0


def test_a_move_that_fails_in_a_forward_and_is_caught_leaves_a_loop_without_lookahead():
    """Whoever needs a record that moves is told of the failure, once; the batches still come, in their order."""
    failures = []

    def fail(kind, rows):
        if kind == "read" and 4 in rows and not failures:
            failures.append(rows)
            raise StoreError("the disk is gone")

    bag, seen = staged_bag(6, fail), []
    with torch.no_grad():
        for ids in Lookahead([batch_of(n, n + 1) for n in range(0, 20, 2)], bag, window=3, depth=1):
            if ids[0, 0] == 2:
                with pytest.raises(StoreError):
                    bag.flush()
            seen.append(int(bag(ids)[0, 0]))
            bag._cache.check()
    assert failures and seen == list(range(1, 40, 4))
    assert bag._cache.slots.num_pinned == 0


def test_one_tables_failure_leaves_no_other_one_held():
    def fail(kind, rows):
        time.sleep(0.02)
        raise StoreError("the disk is gone")

    two = nn.ModuleList([staged_bag(6, lambda *_: None) for _ in range(2)])
    it = iter(Lookahead([batch_of(n, n + 1) for n in range(0, 20, 2)], two, lambda ids: {"0": ids, "1": ids}, 3, 1))
    two[0]._cache.store.before = lambda kind, rows: fail(kind, rows) if 2 in rows else None
    number_of_threads = threading.active_count()
    next(it)
    with pytest.raises(StoreError):
        it.close()
    assert [bag._cache.slots.num_pinned for bag in two] == [0, 0] and two[1]._looks_ahead is None
    assert threading.active_count() == number_of_threads


@pytest.mark.parametrize("where", ["the thread that moves", "the training thread"])
def test_an_iterator_that_the_garbage_collector_ends(where):
    """In any thread and in the middle of anything: nothing is done there but to say so; the next forward cleans up."""

    class Holder:
        pass

    def collect(kind, rows):
        if 2 in rows and where == "the thread that moves":  # the second batch's
            assert ready.wait(20)
            holders.clear()
            gc.collect()

    ready, holders, bag = threading.Event(), [], staged_bag(6, collect)
    gc.disable()
    try:
        holder = Holder()
        holder.itself, holder.it = holder, iter(Lookahead([batch_of(n, n + 1) for n in range(0, 20, 2)], bag, window=3))
        next(holder.it)
        holders.append(holder)
        del holder
        ready.set()
        if where == "the training thread":
            add_pins, calls = bag._cache.kernels.add_pins, []

            def add_pins_and_collect(*arguments):
                calls.append(arguments)
                holders.clear()
                gc.collect()
                return add_pins(*arguments)

            bag._cache.kernels.add_pins = add_pins_and_collect
        with torch.no_grad():
            for n in range(3):
                assert bag(batch_of(n, n + 20))[0, 0] == 2 * n + 20
    finally:
        gc.enable()
    bag._cache.kernels.__dict__.pop("add_pins", None)
    bag.flush()
    bag._cache.check()
    assert not holders and bag._cache.slots.num_pinned == 0 and bag._cache.ahead.num_announced == 0


@pytest.mark.parametrize("leave", ["break", "exception"])
def test_leaving_the_loop_ends_what_runs_ahead(leave):
    bag = staged_bag(8, lambda *_: time.sleep(1e-3), policy="lookahead")
    number_of_threads = threading.active_count()
    for _ in range(3):
        try:
            for number, _ids in enumerate(Lookahead([batch_of(n) for n in range(40)], bag, window=8, depth=3)):
                if number == 4:
                    if leave == "break":
                        break
                    raise StoreError
        except StoreError:
            pass
        assert bag._cache.slots.num_pinned == 0 and bag._cache.ahead.num_announced == 0
        assert threading.active_count() == number_of_threads
        assert bag._cache.policy.num_announced == 0
        bag._cache.check()


def test_one_lookahead_at_a_time():
    bag = staged_bag(8, lambda *_: None)
    first = iter(Lookahead([batch_of(n) for n in range(9)], bag, window=2))
    next(first)
    second = iter(Lookahead([batch_of(n) for n in range(9)], bag, window=2))
    next(second)
    with pytest.raises(RuntimeError, match="another Lookahead"):
        next(first)
    assert [int(ids) for ids in second] == list(range(1, 9))
    assert bag._cache.slots.num_pinned == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=0), "window=0 is not allowed: a number of batches, at least 1"),
        (dict(depth=-1), "depth=-1 is not allowed: a number of batches, at least 0"),
        (dict(window=2.0), "window=2.0 is not allowed"),
        (dict(window=2, depth=3), "depth=3 is not allowed: at most window=2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Lookahead([], staged_bag(8, lambda *_: None), **settings)


def test_bad_ids():
    bag = staged_bag(8, lambda *_: None)
    with pytest.raises(ValueError, match="model is a Linear without a cached table"):
        Lookahead([], nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ids\(batch\) names 'nowhere'; the table modules are \['0'\]"):
        list(Lookahead([batch_of(1)], nn.Sequential(bag), ids=lambda batch: {"nowhere": batch}))
    with pytest.raises(ValueError, match="id 50 at position 1 is outside the valid range: 0..49"):
        list(Lookahead([batch_of(1, 50)], bag))
    with pytest.raises(TypeError, match="input is str"):
        list(Lookahead([("ids",)], bag))
    two = nn.ModuleList([bag, staged_bag(8, lambda *_: None)])
    with pytest.raises(ValueError, match="gave a Tensor, and the model has 2 table modules: give a dict"):
        list(Lookahead([batch_of(1)], two))
    assert bag._cache.slots.num_pinned == 0 and bag._looks_ahead is None


def test_which_policy_looks_ahead():
    """One that was left open becomes "lookahead"; one that was asked for stays."""
    for given, expected in ((None, "lookahead"), ("lru", "lru"), ("s3fifo", "s3fifo")):
        bag = make_bag(60, ids_freq_mapping=counts(), evict_strategy=given)
        list(Lookahead(id_batches(2), bag))
        assert bag._cache.strategy == expected
        bag._cache.check()


# ---- nothing is left behind ------------------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_ten_thousand_evaluations_leave_nothing(ahead):
    bag = make_bag(60, evict_strategy="lookahead")
    batches = id_batches(50)
    loader = Lookahead(batches, bag, window=8, depth=1) if ahead else batches

    def evaluate(count):
        with torch.no_grad():
            for _ in range(count // len(batches)):
                for ids in loader:
                    bag(ids)
        assert bag._cache.slots.num_pinned == 0 and bag._cached_weight.num_tokens == 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(2_000)
        at_first, threads = resident_bytes(), threading.active_count()
        evaluate(10_000)
    assert resident_bytes() - at_first < 4 << 20 and threading.active_count() == threads


def test_a_loop_left_in_the_middle_at_the_end_of_the_program():
    """The interpreter finalizes the iterator when nothing can be compiled any more: it ends without a word."""
    program = """
        import torch
        from colossal_freqcache import FreqAwareEmbeddingBag, Lookahead

        bag = FreqAwareEmbeddingBag(100, 4, num_slots=30, mode="sum")
        batches = [torch.arange(10 * n, 10 * n + 10).view(5, 2) for n in range(10)]
        iterator = iter(Lookahead(batches, bag, ids=lambda batch: (batch,), window=4, depth=1))
        bag(next(iterator))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
