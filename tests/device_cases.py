"""What a cache whose maps are on a device must do, whatever the device and the kernel set. Each test takes `world`.

Run by `tests/test_device_cache.py` on a CPU and by `tests/gpu` on a GPU. Runs that are compared evict at most steps.
"""

import gc
import pickle
from copy import deepcopy

import pytest
import torch
from device_worlds import id_batches, train, trained
from torch import nn
from worlds import (
    DIM,
    FEW_SLOTS,
    NUM_ROWS,
    assert_same_bits,
    counts,
    everything,
    loss_of,
    make_bag,
    make_optimizer,
    skewed_ids,
)

from colossal_freqcache import CacheTooSmallError, FreqAwareEmbeddingBagCollection, Lookahead, checkpoint, optim

EXPECTED = {"SGD": "sgd", "Adagrad": "adagrad", "RowWiseAdagrad": "rowwise_adagrad", "Adam": "adam"}
# (optimizer, mode, trained in the backward, policy, whether counts are given): every value of each with several others
SETTINGS = [
    ("SGD", "sum", False, "dataset", True),
    ("SGD", "max", True, "lru", False),
    ("Adagrad", "mean", False, "lfu", True),
    ("Adagrad", "sum", True, "dataset", True),
    ("RowWiseAdagrad", "max", False, "lru", True),
    ("RowWiseAdagrad", "mean", True, "lfu", False),
    ("Adam", "sum", False, None, False),
    ("Adam", "mean", True, None, True),
]


def cached_equals_resident(world, optimizer, mode, fused, policy, with_counts, steps):
    """Outputs, table and state after some steps: those of a run in which every row has a slot."""
    settings = {"optimizer": optimizer, "mode": mode, "fused": fused, "evict_strategy": policy}
    settings["ids_freq_mapping"] = counts() if with_counts else None
    batches = id_batches(steps)
    assert_same_bits(trained(world, batches, **settings), trained(world, batches, NUM_ROWS, **settings))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_cached_bits_are_resident_bits(setting, world):
    """For each optimizer, mode, policy, with and without counts, trained in the backward and after it."""
    cached_equals_resident(world, *setting, steps=8)


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_of_many_positions(fused, world):
    """Hot rows are summed in chunks: the same bits from a cache as from a resident table, and right."""
    generator = torch.Generator().manual_seed(4)
    batches = [torch.where(torch.rand(100, 9, generator=generator) < 0.8, 7, 0) for _ in range(4)]
    for step, batch in enumerate(batches):
        batch[:, 0] = torch.arange(100) % 20 + 30 * step
    results = [trained(world, batches, slots, "SGD", fused, ids_freq_mapping=counts()) for slots in (30, NUM_ROWS)]
    assert_same_bits(*results)
    plain = make_bag(NUM_ROWS, kernels="torch")
    outs = train(plain, make_optimizer("SGD", plain.parameters()), batches[:1], torch.device("cpu"))
    torch.testing.assert_close(results[0][0], outs[0], rtol=1e-5, atol=1e-5)


class RowWise:
    """Row-wise Adagrad by its definition, on a dense table."""

    def __init__(self, weight):
        self.weight, self.sum = weight, torch.zeros(weight.shape[0], 1, dtype=weight.dtype)

    def step(self):
        grad = self.weight.grad.coalesce()
        rows, g = grad.indices()[0], grad.values()
        self.sum[rows] += (g * g).mean(1, keepdim=True)
        with torch.no_grad():
            self.weight[rows] -= 0.05 / (self.sum[rows].sqrt() + 1e-10) * g


def run_torch(name, batches, dtype):
    """nn.EmbeddingBag over the whole table with torch's optimizer of that name, on the CPU: (outputs, weight)."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True).to(dtype)
    makers = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}
    optimizer = RowWise(bag.weight) if name == "RowWiseAdagrad" else makers[name]([bag.weight], lr=0.05)
    outs = []
    for ids in batches:
        out = bag(ids)
        ((out - 0.3) ** 2).sum().backward()
        optimizer.step()
        bag.weight.grad = None
        outs.append(out.detach())
    return [*outs, bag.weight.detach()]


@pytest.mark.parametrize("name", EXPECTED)
def test_as_right_as_torch(name, world):
    """Against a float64 run of torch, the error is at most 4 times torch's own in float32, plus 1e-7."""
    batches = id_batches(15)
    bag = world.make_bag(ids_freq_mapping=counts())
    optimizer = make_optimizer(name, bag.parameters())
    outs = []
    for ids in batches:
        out = bag(ids.to(world.device))
        ((out - 0.3) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach().cpu())
    assert bag.stats.evictions > 100
    exact = run_torch(name, batches, torch.float64)

    def error(tensors):
        return max((a.double() - b).abs().max().item() for a, b in zip(tensors, exact, strict=True))

    theirs = error(run_torch(name, batches, torch.float32))
    assert error([*outs, bag.logical_weight()]) <= 4 * theirs + 1e-7


# ---- a thousand steps --------------------------------------------------------------------------------------------

ROWS, SLOTS, WIDTH = 40, 12, 2


class Table:
    """A table without a cache: sum pooling, summed gradients, w -= g."""

    def __init__(self, values):
        self.values, self.grad = values.clone(), torch.zeros_like(values)

    def forward(self, bags):
        return torch.stack([self.values[ids].sum(0) for ids in bags])

    def backward(self, bags, grad):
        for ids, row in zip(bags, grad, strict=True):
            for one in ids:
                self.grad[one] += row


# How often each is drawn.
OPERATIONS = {
    "train": 8,
    "hold": 2,
    "backward": 2,
    "drop": 1,
    "evaluate": 3,
    "prefetch": 2,
    "step": 3,
    "flush": 1,
    "bad": 1,
    "too_many": 1,
    "load": 0.2,
}


class Walk:
    """Random operations on a bag and on a Table beside it. Small whole numbers, lr 1: every sum is exact."""

    def __init__(self, world, seed, **options):
        self.world = world
        self.generator = torch.Generator().manual_seed(seed)
        values = self.numbers(9, (ROWS, WIDTH)).float()
        self.table = Table(values)
        self.bag = world.make_bag(SLOTS, num_rows=ROWS, dim=WIDTH, _weight=values, **options)
        self.optimizer = optim.SGD(self.bag.parameters(), lr=1.0)
        self.held = []
        self.refused = 0

    def numbers(self, end, shape=()):
        return torch.randint(0, end, shape, generator=self.generator)

    def some_bags(self, most=3):
        bags = []
        for _ in range(int(self.numbers(3)) + 1):
            size = int(self.numbers(most))
            bags.append(((torch.rand(size, generator=self.generator) ** 2) * ROWS).long().tolist())
        return bags

    def arguments(self, bags):
        values = torch.tensor([one for ids in bags for one in ids], dtype=torch.int64)
        offsets = torch.tensor([sum(len(ids) for ids in bags[:number]) for number in range(len(bags))])
        return values.to(self.world.device), offsets.to(self.world.device)

    def lookup(self, bags):
        """The output; None where the rows that are needed at once do not fit."""
        values, offsets = self.arguments(bags)
        try:
            out = self.bag(values, offsets)
        except CacheTooSmallError:
            cache = self.bag._cache
            slots = [hold.slots.cpu().long() for hold in cache._hold_of_use.values()]
            ids = cache.slots.id_of_slot.cpu()[torch.cat(slots)].tolist() if slots else []
            assert len({*ids, *values.tolist()}) > SLOTS
            self.refused += 1
            return None
        assert torch.equal(out.detach().cpu(), self.table.forward(bags))
        return out

    def hold(self):
        bags = self.some_bags()
        out = self.lookup(bags)
        if out is not None:
            self.held.append((bags, out))

    def backward(self):
        if self.held:
            bags, out = self.held.pop(int(self.numbers(len(self.held))))
            grad = torch.full(out.shape, float(self.numbers(5) - 2))
            out.backward(grad.to(self.world.device))
            self.table.backward(bags, grad)

    def step(self):
        self.optimizer.step()
        self.table.values -= self.table.grad
        self.optimizer.zero_grad(set_to_none=bool(self.numbers(2)))
        self.table.grad.zero_()

    def train(self):
        self.hold()
        self.backward()
        self.step()

    def drop(self):
        if self.held:
            del self.held[int(self.numbers(len(self.held)))]

    def evaluate(self):
        with torch.no_grad():
            self.lookup(self.some_bags(4))

    def prefetch(self):
        try:
            self.bag.prefetch(*self.arguments(self.some_bags(2)))
        except CacheTooSmallError:
            self.refused += 1

    def flush(self):
        self.bag.flush()

    def bad(self):
        with pytest.raises(ValueError, match=f"id {ROWS + 3} at position 2 is outside .*0..{ROWS - 1}"):
            self.bag(self.world.put(1, 2, ROWS + 3, 4, ROWS), self.world.put(0))

    def too_many(self):
        with pytest.raises(CacheTooSmallError, match=f"{SLOTS}"):
            self.bag(torch.arange(SLOTS + 1, device=self.world.device), self.world.put(0))

    def load(self):
        self.table.values += 1
        self.bag.load_state_dict({"weight": self.table.values})

    def go(self, steps):
        names, chances = list(OPERATIONS), torch.tensor(list(OPERATIONS.values()))
        for number in range(steps):
            name = names[int(torch.multinomial(chances, 1, generator=self.generator))]
            getattr(self, name)()
            if number % 20 == 19:
                self.bag._cache.check()
                assert torch.equal(self.bag.logical_weight(), self.table.values)
        return self


def test_a_random_walk(world):
    """400 random operations: every output is the plain table's, and every refusal changes nothing."""
    mapping = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    walk = Walk(world, 5, ids_freq_mapping=mapping).go(400)
    assert walk.bag.stats.evictions > 200 and walk.refused > 0


def test_several_graphs_and_micro_batches(world):
    """Four micro-batches to a step, then two lookups under one loss, with evaluations between: resident bits."""

    def run(num_slots):
        bag = world.make_bag(num_slots, ids_freq_mapping=counts())
        optimizer = make_optimizer("Adam", bag.parameters())
        outs = []
        for number, ids in enumerate(batches):
            ids = ids.to(world.device)
            out = bag(ids)
            with torch.no_grad():
                outs.append(bag(ids.flip(0) // 2).cpu())
            if number % 2:
                out = out * bag((ids * 7) % NUM_ROWS)
            loss_of(out).backward()
            outs.append(out.detach().cpu())
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        assert bag.stats.evictions > len(batches) or num_slots == NUM_ROWS
        bag._cache.check()
        return outs + everything(bag, optimizer)

    batches = id_batches(12)
    assert_same_bits(run(160), run(NUM_ROWS))


# ---- refused -----------------------------------------------------------------------------------------------------


def snapshot(bag):
    """What a refused call leaves alone, as bytes: counters, who sits where, what is dirty and held, every row."""
    cache = bag._cache
    cache.check()
    slots = cache.slots
    stats = bag.stats
    per_table = [getattr(stats, f"{name}_per_table").tolist() for name in ("hits", "misses", "misses_unique")]
    return {
        "stats": pickle.dumps([stats.as_dict(), per_table]),
        "sizes": (slots.num_slots, slots.num_used, bag._cached_weight.num_tokens),
        "held": dict(cache._held),
        "prefetched": None if cache._prefetched is None else cache._prefetched.use,
        "ids": slots.id_of_slot.cpu().numpy().tobytes(),
        "dirty": slots.dirty.cpu().numpy().tobytes(),
        "records": cache.records[: slots.num_used].cpu().numpy().tobytes(),
        "table": cache.read_ids(0, cache.num_rows).numpy().tobytes(),
    }


def assert_refused(bag, call, error, *parts):
    before = snapshot(bag)
    with pytest.raises(error) as raised:
        call()
    for part in parts:
        assert str(part) in str(raised.value), f"{part!r} is not in {raised.value}"
    after = snapshot(bag)
    assert [name for name in before if before[name] != after[name]] == []


def warm_bag(world, num_slots=60, **options):
    """A bag in the middle of training: dirty rows in the cache, others evicted."""
    bag = world.make_bag(num_slots, ids_freq_mapping=counts(), **options)
    optimizer = make_optimizer("SGD", bag.parameters())
    for ids in id_batches(6):
        loss_of(bag(ids.reshape(-1).to(world.device), world.put(*range(0, 24 + bag.include_last_offset, 3)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bag.stats.evictions > 0 and bag._cache.slots.dirty.any()
    return bag


BAD_BATCHES = {
    "past the end": ([5, 6, 200, 300], [0, 1], ["id 200", "position 2", "0..199"]),
    "negative": ([5, -1], [0], ["id -1", "position 1", "0..199"]),
    "huge": ([2**40], [0], [f"id {2**40}", "position 0"]),
    "smallest": ([-(2**63)], [0], [f"id {-(2**63)}"]),
    "not from 0": ([1, 2, 3], [1, 2], ["offsets[0]", "1"]),
    "negative offset": ([1, 2, 3], [-1, 2], ["offsets[0]", "-1"]),
    "decreasing": ([1, 2, 3], [0, 2, 1], ["offsets[2]", "1 after 2", "decrease"]),
    "past the ids": ([1, 2, 3], [0, 4], ["offsets[1]", "4", "past the end", "3"]),
    "in the middle": ([1, 2, 3], [0, 9, 3], ["offsets[2]", "3 after 9"]),
    "no offsets": ([1, 2, 3], [], ["0 entries", "3 ids"]),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_changes_nothing(name, world):
    """The message has the numbers, and the cache, its counters and a prefetch before it are as they were."""
    ids, offsets, parts = BAD_BATCHES[name]
    bag = warm_bag(world)
    bag.prefetch(world.put(120, 121, 122))
    assert_refused(bag, lambda: bag(world.put(*ids), world.put(*offsets)), ValueError, *parts)
    assert_refused(bag, lambda: bag.prefetch(world.put(*ids), world.put(*offsets)), ValueError, *parts)


def test_a_last_offset_that_is_not_the_end(world):
    """With include_last_offset, also where there is no bag at all."""
    bag = warm_bag(world, include_last_offset=True)
    for offsets in ([0, 2], [0, 4], [0], [3]):
        assert_refused(bag, lambda o=offsets: bag(world.put(1, 2, 3), world.put(*o)), ValueError, "offsets")


def test_a_batch_larger_than_the_cache_changes_nothing(world):
    """CacheTooSmallError has the numbers: rows at once, slots."""
    bag = warm_bag(world)
    wide = torch.arange(61, device=world.device).reshape(1, -1)
    assert_refused(bag, lambda: bag(wide), CacheTooSmallError, 61, 60)
    assert_refused(bag, lambda: bag.prefetch(wide), CacheTooSmallError, 61, 60)
    bag(wide[:, :60])
    assert bag._cache.slots.num_used == 60


def test_rows_of_waiting_graphs_count(world):
    """A graph holds 40 rows: 21 others do not fit into 60 slots; 20 do, and the graph's rows are left alone."""
    bag = warm_bag(world)
    held = torch.arange(40, device=world.device).reshape(8, 5)
    out = bag(held)
    others = torch.arange(100, 121, device=world.device).reshape(1, -1)
    assert_refused(bag, lambda: bag(others), CacheTooSmallError, 61, 60)
    bag(others[:, :20])
    assert (bag._cache.kernels.find(held.reshape(-1), bag._cache.slots) >= 0).all()
    loss_of(out).backward()
    make_optimizer("SGD", bag.parameters()).step()
    bag.zero_grad()
    bag(others)
    bag._cache.check()


def test_a_refused_prefetch_keeps_the_one_before_it(world):
    """And training goes on behind it, evicting."""
    bag = warm_bag(world, 30)
    bag.prefetch(torch.arange(100, 110, device=world.device))
    for bad, error in ((torch.arange(31), CacheTooSmallError), (torch.tensor([200]), ValueError)):
        assert_refused(bag, lambda bad=bad: bag.prefetch(bad.to(world.device)), error)
    optimizer = make_optimizer("SGD", bag.parameters())
    train(bag, optimizer, [torch.arange(start, start + 10).reshape(2, 5) for start in (20, 40, 60, 80)], world.device)
    bag._cache.check()


def test_prefetched_rows_stay_until_a_forward_uses_them(world):
    """Whatever other batches come in between; and a miss is counted once, where it was fetched."""
    bag = world.make_bag(FEW_SLOTS, evict_strategy="lru")
    wanted = torch.arange(150, 156, device=world.device)
    bag.prefetch(wanted)
    with torch.no_grad():
        for start in range(0, 120, 12):
            bag(torch.arange(start, start + 12, device=world.device).reshape(2, 6))
    assert bag.stats.evictions > 50
    before = bag.stats.misses
    with torch.no_grad():
        bag(wanted.reshape(1, -1))
        assert bag.stats.misses == before
        assert bag.stats.hits + bag.stats.misses == 120 + 6
        bag(torch.arange(40, 40 + FEW_SLOTS, device=world.device).reshape(1, -1))  # they no longer stand in the way


def test_what_is_not_there_yet_says_what_is(world):
    """Policies of the CPU cache that have no device form name those that have one."""
    for policy in ("s3fifo", "lookahead"):
        with pytest.raises(NotImplementedError, match=f"{policy}.*'dataset', 'lru', 'lfu'"):
            world.make_bag(evict_strategy=policy)


# ---- lookahead ---------------------------------------------------------------------------------------------------

MANY_ROWS = 600


def many_batches(steps, seed=1, last=8):
    generator = torch.Generator().manual_seed(seed)
    batches = [skewed_ids(generator, num_rows=MANY_ROWS) for _ in range(steps)]
    return [*batches[:-1], batches[-1][:last]]


def look_ahead(world, batches, window, depth, num_slots, fused=False, each=lambda bag: None, **options):
    """Trains over a Lookahead (window 0: without); (bag, everything). `each` is called as a batch is handed out."""
    bag = world.make_bag(num_slots, num_rows=MANY_ROWS, ids_freq_mapping=counts(MANY_ROWS), **options)
    settings = {"fused": True} if fused else {}
    optimizer = make_optimizer("Adagrad", bag.parameters(), **settings)
    batches = [ids.to(world.device) for ids in batches]
    outs = []
    for ids in Lookahead(batches, bag, window=window, depth=depth) if window else batches:
        each(bag)
        out = bag(ids)
        loss_of(out).backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach().cpu())
    assert len(outs) == len(batches) and bag.stats.evictions > 50
    bag._cache.check()
    assert not bag._cache._held
    return bag, outs + everything(bag, optimizer)


@pytest.mark.parametrize("window, depth, fused", [(2, 1, False), (4, 2, True), (8, 4, False)])
def test_lookahead_gives_the_same_bits(window, depth, fused, world):
    """And admits `depth` batches ahead, whose forwards look nothing up again."""
    batches = many_batches(16)
    admitted, looked_up = [], []

    def each(bag):
        admitted.append(bag._cache.ahead.num_admitted)
        looked_up.append(bag._cache._last_use)

    _, ahead = look_ahead(world, batches, window, depth, 24 * (depth + 3) + 1, fused, each)
    _, plain = look_ahead(world, batches, 0, 0, 100, fused)
    assert_same_bits(ahead, plain)
    if not world.is_gpu:  # there, counts may be on their way yet
        assert admitted == [min(depth, 15 - step) for step in range(16)]
    assert max(looked_up) <= len(batches) + 2


def test_a_last_batch_of_another_size_costs_nothing(world):
    """Each batch is looked up once, also those before and behind the announcement of a smaller one."""
    bag, _ = look_ahead(world, many_batches(12, last=5), 4, 1, 100)
    assert bag._cache._last_use <= 13


def test_what_runs_ahead_does_not_push_out_what_comes_sooner(world):
    """Where not all that are wanted fit, it is the next ones that are there, and keep their rows."""
    seen = []

    def each(bag):
        ahead = bag._cache.ahead
        seen.append([batch.lookup is not None for batch in (ahead._current, *ahead._coming)])

    batches = many_batches(12)
    _, tight = look_ahead(world, batches, 4, 4, 90, each=each)
    assert_same_bits(tight, look_ahead(world, batches, 0, 0, 90)[1])
    assert all(current for current, *_ in seen[1:])
    assert all(admitted == sorted(admitted, reverse=True) for _, *admitted in seen)


def test_every_occurrence_is_counted_once(world):
    """Hits and misses with Lookahead: together the positions of the batches, and the rows fetched are the misses."""
    batches = many_batches(10)
    for window, slots in ((0, 100), (3, 100), (3, 40)):
        bag, _ = look_ahead(world, batches, window, 1 if window else 0, slots)
        assert bag.stats.hits + bag.stats.misses == 24 * 10
        assert bag.stats.misses_unique <= bag.stats.rows_fetched


def test_a_bad_id_of_a_coming_batch_is_its_own_forwards(world):
    """The batches before it train; its forward raises with its number; training goes on after it."""
    batches = [ids.to(world.device) for ids in id_batches(8)]
    batches[5] = batches[5].clone()
    batches[5][1, 1] = NUM_ROWS
    bag = world.make_bag(110, ids_freq_mapping=counts())
    optimizer = make_optimizer("SGD", bag.parameters())
    seen = 0
    with pytest.raises(ValueError, match=f"id {NUM_ROWS} at position 4 is outside"):
        for ids in Lookahead(batches, bag, window=4, depth=2):
            train(bag, optimizer, [ids], world.device)
            seen += 1
    assert seen == 5
    gc.collect()
    train(bag, optimizer, batches[6:], world.device)
    bag._cache.check()
    assert not bag._cache._held and bag._cache.ahead.num_announced == 0


def test_a_loop_that_is_left_and_evaluations_in_it(world):
    """break in the middle, a no_grad pass over other rows at every step, then another loop: the bits of neither."""

    def run(ahead):
        bag = world.make_bag(130, ids_freq_mapping=counts())
        optimizer = make_optimizer("Adagrad", bag.parameters())
        outs = []
        for first, last in ((0, 4), (4, 9)):
            part = batches[first:]
            for number, ids in enumerate(Lookahead(part, bag, window=3, depth=2) if ahead else part):
                if number == last - first:
                    break
                with torch.no_grad():
                    outs.append(bag((ids * 3) % NUM_ROWS).cpu())
                outs += train(bag, optimizer, [ids], world.device)
            gc.collect()
        train(bag, optimizer, batches[:2], world.device)
        assert bag.stats.evictions > 10 and not bag._cache._held
        bag._cache.check()
        return outs + everything(bag, optimizer)

    batches = [ids.to(world.device) for ids in id_batches(12)]
    assert_same_bits(run(True), run(False))


# ---- save, load, copy, bind --------------------------------------------------------------------------------------


def trained_pair(world, name="Adam", num_slots=60, steps=5, **options):
    bag = world.make_bag(num_slots, ids_freq_mapping=counts(), **options)
    optimizer = make_optimizer(name, bag.parameters())
    train(bag, optimizer, id_batches(steps), world.device)
    return bag, optimizer


def cpu_pair(name="Adam", num_slots=FEW_SLOTS):
    bag = make_bag(num_slots, max_cache_bytes=None, seed=9, kernels="torch", optimizer=EXPECTED[name])
    return bag, make_optimizer(name, bag.parameters())


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
@pytest.mark.parametrize("name", ["Adam", "RowWiseAdagrad"])
def test_between_a_device_and_a_cpu(way, name, world, tmp_path):
    """Table and optimizer state go from a device's bag to a CPU's and back, and training goes on with the same bits."""

    def move(source, target):
        if way == "state_dict":
            target[0].load_state_dict(source[0].state_dict())
            target[1].load_state_dict(source[1].state_dict())
        else:
            checkpoint.save(tmp_path, *source, step=7)
            assert checkpoint.load_latest(tmp_path, *target) == 7
        assert_same_bits(everything(*target), everything(*source))
        target[0]._cache.check()

    first = trained_pair(world, name)
    assert first[0].stats.evictions > 0
    host = cpu_pair(name)
    move(first, host)
    second = trained_pair(world, name, FEW_SLOTS, 2)
    move(host, second)
    outs = [train(*pair, id_batches(5, seed=3), world.device) for pair in (first, second)]
    assert_same_bits(outs[0] + everything(*first), outs[1] + everything(*second))


def test_a_deep_copy_is_a_bag_of_its_own(world):
    """It has the table, on the same device, and what is trained in one is not in the other."""
    bag, optimizer = trained_pair(world)
    copy = deepcopy(bag)
    assert copy._cache.on_device and copy._cache.device == bag._cache.device
    before = bag.logical_weight()
    assert torch.equal(copy.logical_weight(), before)
    train(copy, make_optimizer("Adam", copy.parameters()), id_batches(4), world.device)
    copy._cache.check()
    assert torch.equal(bag.logical_weight(), before) and not torch.equal(copy.logical_weight(), before)
    train(bag, optimizer, id_batches(2), world.device)
    bag._cache.check()


@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_an_optimizer_bound_later(with_counts, used, world):
    """To an empty cache, a warm one, and one in use: the table stays, the state is new, and training goes on."""
    bag = world.make_bag(60, ids_freq_mapping=counts() if with_counts else None)
    if used:
        with torch.no_grad():
            bag(id_batches(1)[0].to(world.device))
    before = bag.logical_weight()
    optimizer = make_optimizer("Adam", bag.parameters())
    assert torch.equal(bag.logical_weight(), before)
    bag._cache.check()
    outs = train(bag, optimizer, id_batches(6), world.device)
    expected = world.make_bag(NUM_ROWS, ids_freq_mapping=counts(), optimizer="adam")
    other = make_optimizer("Adam", expected.parameters())
    assert_same_bits(
        outs + everything(bag, optimizer),
        train(expected, other, id_batches(6), world.device) + everything(expected, other),
    )


def test_dropped_state_and_another_optimizer(world):
    """drop_optimizer_state keeps the table, dirty rows included; SGD, then Adagrad train it."""
    bag, optimizer = trained_pair(world)
    assert bag._cache.slots.dirty.any()
    before = bag.logical_weight()
    del optimizer
    bag.drop_optimizer_state()
    assert torch.equal(bag.logical_weight(), before) and bag._cache.layout.width == DIM
    train(bag, make_optimizer("SGD", bag.parameters()), id_batches(3), world.device)
    bag.drop_optimizer_state()
    train(bag, make_optimizer("Adagrad", bag.parameters()), id_batches(3), world.device)
    bag._cache.check()


def test_initialised_in_the_middle_of_training(world):
    """init_ reaches resident rows and the others."""
    bag, optimizer = trained_pair(world, "SGD")
    bag.init_(lambda values: values.fill_(2.0))
    assert (bag.logical_weight() == 2).all()
    bag._cache.check()
    train(bag, optimizer, id_batches(3), world.device)
    bag._cache.check()


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dataset", "lru", "lfu"])
def test_device_bytes(policy, world):
    """At most 32 bytes a slot beside the rows; the same for ten times the rows."""

    def bytes_of(num_rows):
        bag = world.make_bag(1000, num_rows=num_rows, ids_freq_mapping=counts(num_rows), evict_strategy=policy)
        train(bag, make_optimizer("SGD", bag.parameters()), id_batches(2), world.device)
        return {name: size for name, size in bag.device_bytes().items() if "host" not in name}

    few, many = bytes_of(2000), bytes_of(20_000)
    assert few == many
    assert few["cache"] == 1000 * DIM * 4
    assert few["index"] <= 32 * 1000 + 200
    bag = world.make_bag(1000, num_rows=2000, ids_freq_mapping=counts(2000), evict_strategy=policy)
    for name, value in vars(bag._cache.slots).items():
        if isinstance(value, torch.Tensor):
            assert value.numel() <= 8 * (1000 / 3.5 + 1) + 1, name


class OwnStore:
    """A store of a user's: no memory that a device could read. Raises on demand, after some rows were moved."""

    fails_at = None  # (operation, calls until it fails)

    def allocate(self, num_rows, layout):
        self.rows, self.layout = torch.zeros(num_rows, layout.width, dtype=layout.dtype), layout

    def _maybe_fail(self, operation):
        if self.fails_at is not None and self.fails_at[0] == operation:
            self.fails_at = (operation, self.fails_at[1] - 1)
            if self.fails_at[1] < 0:
                self.fails_at = None
                raise OSError("disk")

    def read(self, rows, records, places):
        assert not rows.is_cuda and not records.is_cuda and not places.is_cuda
        self._maybe_fail("read")
        records[places] = self.rows[rows]

    def write(self, rows, records, places):
        assert not rows.is_cuda and not records.is_cuda and not places.is_cuda
        half = rows.numel() // 2
        self.rows[rows[:half]] = records[places[:half]]
        self._maybe_fail("write")
        self.rows[rows] = records[places]

    def spawn(self):
        return OwnStore()

    def num_bytes(self):
        return self.rows.numel() * self.rows.element_size()


@pytest.mark.parametrize("with_counts", [False, True])
def test_rows_moved_by_way_of_the_host(with_counts, world):
    """A store that the device cannot reach: the bits of one that it can, with a Lookahead too."""
    mapping = counts() if with_counts else None
    batches = id_batches(8)
    staged = trained(world, batches, store=OwnStore(), ids_freq_mapping=mapping)
    assert_same_bits(staged, trained(world, batches, ids_freq_mapping=mapping))
    batches = many_batches(8)
    _, ahead = look_ahead(world, batches, 3, 1, 100, store=OwnStore())
    assert_same_bits(ahead, look_ahead(world, batches, 0, 0, 100)[1])


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("call", ["forward", "prefetch", "load"])
def test_a_store_that_raises_leaves_every_newest_value(operation, call, world):
    """Nobody holds rows after it, the table is what it was, and training goes on."""
    bag = warm_bag(world, 60, store=OwnStore())
    before = bag.logical_weight()
    held = dict(bag._cache._held)
    bag._cache.store.fails_at = (operation, 0)
    ids = torch.arange(100, 150, device=world.device).reshape(5, 10)
    calls = {"forward": lambda: bag(ids), "prefetch": lambda: bag.prefetch(ids)}
    calls["load"] = lambda: bag.load_state_dict({"weight": before})
    with pytest.raises(OSError, match="disk"):
        calls[call]()
    assert bag._cache._held == held
    bag._cache.check()
    assert torch.equal(bag.logical_weight(), before)
    with torch.no_grad():
        out = bag(ids)
    torch.testing.assert_close(out.cpu(), before[ids.cpu()].sum(1))
    train(bag, make_optimizer("SGD", bag.parameters()), id_batches(3), world.device)
    bag._cache.check()


def test_a_load_that_fails_in_the_middle(world):
    """The store has half of the new rows: what is resident is no longer clean, and survives its eviction."""
    bag = warm_bag(world, 60, store=OwnStore())
    bag.flush()
    bag._cache.store.fails_at = ("write", 0)
    with pytest.raises(OSError):
        bag.load_state_dict({"weight": torch.ones(NUM_ROWS, DIM)})
    bag._cache.check()


# ---- arguments ---------------------------------------------------------------------------------------------------

# options, whether with per_sample_weights: against the CPU's plain set
ARGUMENTS = {
    "max_norm": ({"max_norm": 1.0}, False),
    "max_norm 1": ({"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 3}, False),
    "padding": ({"padding_idx": 0, "mode": "mean"}, False),
    "negative padding": ({"padding_idx": -200, "mode": "max"}, False),
    "scaled": ({"scale_grad_by_freq": True}, False),
    "scaled mean": ({"scale_grad_by_freq": True, "mode": "mean"}, False),
    "scaled max": ({"scale_grad_by_freq": True, "mode": "max"}, False),
    "last offset": ({"include_last_offset": True, "mode": "max"}, False),
    "weights": ({}, True),
    "weights and padding": ({"padding_idx": 1, "include_last_offset": True}, True),
    "float64": ({"dtype": torch.float64, "mode": "mean"}, False),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_embedding_bag(name, world):
    """Ragged batches with empty bags, int32 ids: outputs, gradients of the weights and the table are the CPU's."""
    options, weighted = ARGUMENTS[name]
    options = {"ids_freq_mapping": counts(), **options}

    def run(bag, device):
        optimizer = make_optimizer("Adagrad", bag.parameters())
        generator = torch.Generator().manual_seed(5)
        found = []
        for number in range(7):
            lengths = torch.randint(0, 5, (9,), generator=generator)
            ids = skewed_ids(generator, int(lengths.sum()))
            ends = lengths.cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends])[: 9 + bag.include_last_offset]
            weights = torch.rand(ids.numel(), generator=generator).to(device).requires_grad_() if weighted else None
            ids, offsets = (ids.int(), offsets.int()) if number % 2 else (ids, offsets)
            out = bag(ids.to(device), offsets.to(device), *([] if weights is None else [weights]))
            assert out.device.type == device.type and out.shape == (9, DIM)
            ((out - 0.2) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [out.detach().cpu()] + ([] if weights is None else [weights.grad.cpu()])
        assert bag.stats.evictions > 7
        bag._cache.check()
        return [*found, bag.logical_weight()]

    ours = run(world.make_bag(40, **options), world.device)
    theirs = run(make_bag(40, kernels="torch", max_cache_bytes=40 * 2 * DIM * 8, **options), torch.device("cpu"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_batches_without_ids(world):
    """No ids, no bags, bags of no ids in two dimensions: outputs of zeros, and a step over nothing."""
    bag = warm_bag(world)
    optimizer = make_optimizer("SGD", bag.parameters())
    for arguments, shape in (
        ((world.put(), world.put(0, 0)), (2, DIM)),
        ((world.put(), world.put()), (0, DIM)),
        ((world.put().reshape(3, 0),), (3, DIM)),
        ((world.put().reshape(0, 4),), (0, DIM)),
    ):
        out = bag(*arguments)
        assert out.shape == shape and not out.any()
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    bag._cache.check()


def test_a_collection(world):
    """Three tables of unequal size behind one cache: per table what an nn.EmbeddingBag of its own gives."""
    sizes = [50, 3, 400]
    torch.manual_seed(0)
    tables = [nn.EmbeddingBag(rows, DIM, mode="mean", sparse=True, padding_idx=1) for rows in sizes]
    bag = FreqAwareEmbeddingBagCollection(
        sizes,
        DIM,
        mode="mean",
        padding_idx=1,
        _weight=[table.weight.detach() for table in tables],
        num_slots=45,
        device=world.device,
        kernels=world.kernels,
        ids_freq_mapping=torch.arange(sum(sizes)) + 1,
    )
    optimizer = make_optimizer("SGD", bag.parameters())
    others = [torch.optim.SGD(table.parameters(), lr=0.05) for table in tables]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        lengths = torch.randint(0, 4, (3, 4), generator=generator)
        parts = [(torch.rand(int(row.sum()), generator=generator) * size).long() for row, size in zip(lengths, sizes)]
        ends = lengths.reshape(-1).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
        out = bag(torch.cat(parts).to(world.device), offsets.to(world.device))
        starts = [torch.cat([row.new_zeros(1), row.cumsum(0)[:-1]]) for row in lengths]
        expected = torch.stack([table(*pair) for table, *pair in zip(tables, parts, starts)], 1)
        torch.testing.assert_close(out.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
        ((out - 0.1) ** 2).sum().backward()
        ((expected - 0.1) ** 2).sum().backward()
        for one in (optimizer, *others):
            one.step()
            one.zero_grad()
    assert bag.stats.evictions > 20
    bag._cache.check()
    state = bag.state_dict()
    for number, table in enumerate(tables):
        torch.testing.assert_close(state[f"tables.{number}.weight"], table.weight.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="id 3 at position 1 is outside the valid range of table 1: 0..2"):
        bag(world.put(3, 3, 3), world.put(0, 1, 2))
