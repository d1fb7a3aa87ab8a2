"""A step that goes into a CUDA graph: prefetched by the host, then looked up, trained and checked by the device alone.

    python -m pytest tests/test_device_replay.py      (skipped where Triton cannot interpret: torch 2.5.1's cannot)

Capturing is pretended: the kernels are interpreted on a CPU, in the way that a capture takes. Proves: after a prefetch,
outputs, table, state and counters are those of steps without a graph; nothing asks the device anything; what a replay
misses, and bad batches, are raised by whatever waits next and train no other row; what cannot be captured is refused.
Not covered: a real capture and replay, which tests/gpu does.
"""

import device_worlds
import pytest
import torch
from device_worlds import id_batches
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import DIM, assert_same_bits, counts, everything, loss_of, make_optimizer

from colossal_freqcache import FreqAwareEmbeddingBagCollection, Lookahead
from colossal_freqcache.device_cache import DeviceCache

device_worlds.problem_with_interpreter()  # before torch imports Triton, for its own compiler

# What needs a value, or a size, from the device.
ASKS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "index.Tensor")


class AsksNothing(TorchDispatchMode):
    """Raises where an operation would make the host wait for a device. on_host: tensors that a GPU does not hold."""

    def __init__(self, on_host):
        super().__init__()
        self.on_host = [tensor.data_ptr() for tensor in on_host]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(asks in name for asks in ASKS):
            assert args[0].data_ptr() in self.on_host, f"{name} within a capture"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch):
    """Its `now`: whether what is launched is taken for a capture."""

    class Capturing:
        now = False

        def __enter__(self):
            self.now = True

        def __exit__(self, *exception):
            self.now = False

    one = Capturing()
    monkeypatch.setattr(DeviceCache, "is_capturing", lambda cache: one.now)
    return one


@pytest.fixture
def triton(monkeypatch):
    """The interpreted kernels."""
    return device_worlds.cpu_world("triton", monkeypatch)


def step(bag, optimizer, *batch):
    """One training step; the output."""
    out = bag(*batch)
    loss_of(out).backward()
    optimizer.step()
    optimizer.zero_grad()
    return out.detach().clone()


def both_ways(capturing, triton, batches, optimizer="SGD", slots=60, make=None, **options):
    """(outputs, table, state) of plain steps, and of prefetched and pretended captured ones; and the two bags."""
    results, bags = [], []
    for replayed in (False, True):
        bag = make() if make else triton.make_bag(slots, **options)
        made = make_optimizer(optimizer, bag.parameters(), fused=True)
        outs = []
        for batch in batches:
            if replayed:
                bag.prefetch(*batch)
                with capturing:
                    outs.append(step(bag, made, *batch))
            else:
                outs.append(step(bag, made, *batch))
        bag._cache.check()
        assert bag.stats.evictions > 5
        results.append(outs + everything(bag, made) if make is None else outs)
        bags.append(bag)
    return results, bags


SETTINGS = [
    ("SGD", "sum", None, False),
    ("Adagrad", "mean", "lru", True),
    ("RowWiseAdagrad", "max", "lfu", True),
    ("Adagrad", "sum", "dataset", True),
]


@pytest.mark.parametrize("optimizer, mode, policy, with_counts", SETTINGS)
def test_the_bits_and_the_counters_of_steps_without_a_graph(optimizer, mode, policy, with_counts, capturing, triton):
    """Prefetch, then the captured step, for ten batches that evict."""
    batches = [(ids,) for ids in id_batches(10)]
    mapping = counts() if with_counts else None
    options = {"mode": mode, "evict_strategy": policy, "ids_freq_mapping": mapping}
    results, (plain, replayed) = both_ways(capturing, triton, batches, optimizer, **options)
    assert_same_bits(*results)
    for bag in (plain, replayed):  # each position once (who is evicted may differ: a prefetch holds its rows longer)
        assert bag.stats.hits + bag.stats.misses == 10 * 24
    assert replayed.stats.misses > 0 and replayed.stats.misses_unique == replayed.stats.rows_fetched


def test_a_collection_with_padding_and_long_rows(capturing, triton):
    """Two tables, bags of unequal length, an id that stands in most positions, padding."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        values = (torch.rand(160, generator=generator) ** 2 * 90).long()
        values[torch.rand(160, generator=generator) < 0.5] = 3
        offsets = torch.sort(torch.randint(0, 161, (11,), generator=generator)).values
        batches.append((values, torch.cat([torch.zeros(1, dtype=torch.int64), offsets])))

    def make():
        torch.manual_seed(0)
        return FreqAwareEmbeddingBagCollection(
            [90, 120], DIM, mode="sum", num_slots=130, padding_idx=[5, None], device=triton.device, kernels="cuda",
            optimizer="sgd",
        )  # fmt: skip

    results, bags = both_ways(capturing, triton, batches, make=make)
    assert_same_bits(*results)
    for table in range(2):
        assert torch.equal(bags[0].logical_weight(table), bags[1].logical_weight(table))


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_asks_the_device(weighted, capturing, triton):
    """Forward and backward of a captured step: no operation that gives the host a value or a size."""
    bag = triton.make_bag(60)
    optimizer = make_optimizer("Adagrad", bag.parameters(), fused=True)
    ids = id_batches(1)[0]
    weights = [torch.rand(ids.shape, requires_grad=True)] if weighted else []
    bag.prefetch(ids)
    steps = [state["step"] for state in optimizer.state.values()]
    with capturing, AsksNothing(steps):
        out = bag(ids, None, *weights)
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not weighted or weights[0].grad.abs().sum() > 0


def asked(bag, how, ids):
    """Something that waits for the device."""
    calls = {
        "forward": lambda: bag(ids),
        "prefetch": lambda: bag.prefetch(ids),
        "stats": lambda: bag.stats,
        "flush": bag.flush,
        "table": bag.logical_weight,
    }
    calls[how]()


@pytest.mark.parametrize("how", ["forward", "prefetch", "stats", "flush", "table"])
def test_rows_that_are_not_resident_are_told_by_what_waits_next(how, capturing, triton):
    """They give zeros and are not trained, the others are; it is said once."""
    bag = triton.make_bag(60)
    optimizer = make_optimizer("SGD", bag.parameters(), fused=True)
    before = bag.logical_weight()
    bag.prefetch(triton.put(1, 2, 3))
    with capturing:
        out = step(bag, optimizer, triton.put(1, 2, 77, 78).reshape(2, 2))
    torch.testing.assert_close(out[0].cpu(), before[1] + before[2])
    assert not out[1].any()
    with pytest.raises(RuntimeError, match=r"met 2 row\(s\) that were not resident, 0 batch"):
        asked(bag, how, triton.put(4, 5).reshape(1, 2))
    asked(bag, how, triton.put(4, 5).reshape(1, 2))
    after = bag.logical_weight()
    changed = (after != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [1, 2]
    bag._cache.check()


def test_positions_in_no_bag_are_not_trained(capturing, triton):
    """Bounds that begin late or end early, in mean: what lies outside is padding, and nothing is divided by 0."""
    bag = triton.make_bag(60, mode="mean", include_last_offset=True)
    optimizer = make_optimizer("SGD", bag.parameters(), fused=True)
    before = bag.logical_weight()
    bag.prefetch(triton.put(1, 2, 3, 4))
    for offsets in ((0, 2, 2), (2, 2, 4)):
        with capturing:
            step(bag, optimizer, triton.put(1, 2, 3, 4), triton.put(*offsets))
        with pytest.raises(RuntimeError, match="1 with bad offsets"):
            asked(bag, "stats", None)
        after = bag.logical_weight()
        assert after.isfinite().all()
        assert (after != before).any(1).nonzero()[:, 0].tolist() == ([1, 2] if offsets[0] == 0 else [3, 4])
        before = after


def test_a_graph_reads_the_callers_own_tensors(capturing, triton):
    """What an eager step has made of the same offsets, or of bags of one size, is not the graph's to read."""
    bag = triton.make_bag(60)
    values, offsets = triton.put(1, 2, 3, 4), triton.put(0, 1)
    with torch.no_grad():
        bag(values, offsets)
        bag(values.reshape(2, 2))
        bag(values, offsets)
    kept = bag._last_ends[1], bag._even_offsets(2, 2)
    with capturing:
        own = bag._batch(values, offsets, None).offsets, bag._even_offsets(2, 2)
    for mine, theirs in zip(own, kept, strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert bag._last_ends[1] is kept[0] and bag._even_offsets(2, 2) is kept[1]


def test_a_prefetch_that_an_eager_step_has_used_is_not_counted_again(capturing, triton):
    """Prefetch, an eager lookup of the batch, then a replay of it: three lookups of it in all, one missed."""
    bag = triton.make_bag(60)
    ids = triton.put(1, 2, 3, 4).reshape(2, 2)
    with torch.no_grad():
        with capturing:
            bag(ids)  # not resident
        with pytest.raises(RuntimeError, match="4 row"):
            bag.flush()
        bag.stats.reset()
        bag.prefetch(ids)
        bag(ids)
        with capturing:
            bag(ids)
    assert (bag.stats.hits, bag.stats.misses) == (4, 4)


def test_a_later_optimizer_starts_afresh_whatever_replays_have_left(capturing, triton):
    """The host may take the state for initial while a graph has trained it: another optimizer of the kind resets it."""
    bag = triton.make_bag(60)
    optimizer = make_optimizer("Adagrad", bag.parameters(), fused=True)
    ids = triton.put(1, 2, 3, 4).reshape(2, 2)
    bag.prefetch(ids)
    with capturing:
        step(bag, optimizer, ids)
    weight = bag._cached_weight
    assert weight.logical("sum").any()
    weight.state_is_initial = True  # as after a reset that was followed by a replay
    make_optimizer("Adagrad", bag.parameters())
    assert not weight.logical("sum").any()


def test_bad_batches_are_told_and_harm_no_other_row(capturing, triton):
    """An id out of range, and offsets that pass the batch's end."""
    bag = triton.make_bag(60)
    optimizer = make_optimizer("SGD", bag.parameters(), fused=True)
    before = bag.logical_weight()
    bag.prefetch(triton.put(1, 2))
    with capturing:
        step(bag, optimizer, triton.put(1, 2, 999, -5).reshape(2, 2))
    with pytest.raises(RuntimeError, match="1 batch.* with ids out of range and 0 with bad"):
        asked(bag, "stats", None)
    with capturing:
        step(bag, optimizer, triton.put(1, 2, 1, 2), triton.put(0, 9, 3))
    with pytest.raises(RuntimeError, match="0 batch.* with ids out of range and 1 with bad"):
        asked(bag, "stats", None)
    assert (bag.logical_weight() != before).any(1).nonzero()[:, 0].tolist() == [1, 2]


def test_an_evaluation_may_be_captured(capturing, triton):
    """Under no_grad, whatever the optimizer, and with none."""
    bag = triton.make_bag(60)
    ids = id_batches(1)[0]
    expected = bag.logical_weight()[ids].sum(1)
    bag.prefetch(ids)
    with capturing, torch.no_grad():
        out = bag(ids)
    torch.testing.assert_close(out, expected)
    assert not bag._cache._held or list(bag._cache._held) == [bag._cache._prefetched.use]


def test_what_cannot_be_captured_says_why(capturing, triton):
    """Updates outside the backward or that count steps, prefetch, a Lookahead's loop, max_norm, a new layout."""
    ids = triton.put(1, 2, 3, 4).reshape(2, 2)

    def captured(optimizer, fused, message, error=RuntimeError, **settings):
        bag = triton.make_bag(60)
        made = make_optimizer(optimizer, bag.parameters(), **({"fused": True} if fused else {}), **settings)
        bag.prefetch(ids)
        with capturing, pytest.raises(error, match=message):
            step(bag, made, ids)
        bag.drop_optimizer_state()  # which a captured graph would not allow

    captured("SGD", False, "fused=True, or look up under torch.no_grad")
    captured("Adam", True, "other numbers at every step")
    captured("Adagrad", True, "other numbers at every step", lr_decay=0.1)
    captured("SGD", True, "without maximize", NotImplementedError, maximize=True)
    bag = triton.make_bag(60)
    with capturing, pytest.raises(RuntimeError, match=r"prefetch\(\) cannot be captured"):
        bag.prefetch(ids)
    for batch in Lookahead([ids, ids, ids], bag, window=2, depth=1):
        with capturing, torch.no_grad(), pytest.raises(RuntimeError, match="within a Lookahead"):
            bag(batch)
        break
    with torch.no_grad():
        bag(ids)
        with capturing:
            bag(ids)
    with pytest.raises(RuntimeError, match="before the capture"):
        make_optimizer("Adagrad", bag.parameters())
    renormed = triton.make_bag(60, max_norm=1.0)
    with capturing, torch.no_grad(), pytest.raises(NotImplementedError, match="max_norm=1.0 in a CUDA graph"):
        renormed(ids)


def test_the_plain_set_cannot_be_captured(capturing, monkeypatch):
    """It asks the device at every turn."""
    twin = device_worlds.cpu_world("twin", monkeypatch)
    bag = twin.make_bag(60)
    with capturing, torch.no_grad(), pytest.raises(NotImplementedError, match="kernels='torch' cannot be captured"):
        bag(twin.put(1, 2).reshape(1, 2))
