"""bag.prefetch, growth up to the ceiling, tables that fit, and the bytes that a cache holds.

    python -m pytest tests/test_prefetch_growth.py

Proves: prefetched rows stay until the first forward that uses them or the next prefetch, and nobody can tell from the
results; a cache that is too small grows, with one warning, to its ceiling, under a Parameter of one shape and with
graphs in flight, without changing a bit; a table with a slot for every row never misses; on the training device nothing
grows with the rows, and the index stays within a quarter of the bytes of 32-float rows.
"""

import warnings

import numpy as np
import pytest
import torch
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

from colossal_freqcache import CacheTooSmallError, FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection

POLICY_NAMES = ("dataset", "lfu", "lru", "s3fifo", "lookahead")


def resident(bag, *ids):
    return [bool(bag._cache.slots.slot_of_id[number]) for number in ids]


def look_up(bag, ids):
    with torch.no_grad():
        bag(torch.as_tensor(ids).reshape(1, -1))


def fixed_bag(num_slots, **options):
    """A bag that cannot grow."""
    return make_bag(num_slots, max_cache_bytes=num_slots * DIM * 4, **options)


# ---- prefetch ----------------------------------------------------------------------------------------------------


def test_prefetched_rows_stay_whatever_comes_in_between(policy, kernels):
    """Other batches fill the rest of the cache again and again; then the forward finds its rows there."""
    bag = fixed_bag(10, evict_strategy=policy, kernels=kernels, ids_freq_mapping=counts())
    ids = [100, 101, 102, 103]
    bag.prefetch(torch.tensor([ids]))
    for first in range(0, 60, 6):
        look_up(bag, list(range(first, first + 6)))
        assert all(resident(bag, *ids))
        bag._cache.check()
    fetched = bag.stats.rows_fetched
    look_up(bag, ids)
    assert bag.stats.rows_fetched == fetched
    assert bag._cache.slots.num_pinned == 0


def test_the_first_forward_that_uses_them_ends_the_protection(kernels):
    """Row by row: what a batch used may leave, the rest of the prefetch stays."""
    bag = fixed_bag(6, evict_strategy="lru", kernels=kernels)
    bag.prefetch(torch.tensor([[1, 2, 3, 4]]))
    look_up(bag, [1, 2])
    look_up(bag, [10, 11])
    look_up(bag, [12, 13])
    look_up(bag, [14, 15])
    assert resident(bag, 1, 2, 3, 4) == [False, False, True, True]
    look_up(bag, [3, 4])
    look_up(bag, list(range(20, 26)))
    assert resident(bag, 3, 4) == [False, False]
    bag._cache.check()


def test_the_next_prefetch_ends_the_protection(kernels):
    bag = fixed_bag(6, evict_strategy="lru", kernels=kernels)
    bag.prefetch(torch.tensor([[1, 2, 3, 4]]))
    bag.prefetch(torch.tensor([[3, 5, 6]]))
    assert bag._cache.slots.num_pinned == 3
    look_up(bag, [10, 11, 12])
    assert resident(bag, 1, 2, 4) == [False] * 3 and all(resident(bag, 3, 5, 6))
    bag.prefetch(torch.empty(0, dtype=torch.int64))
    assert bag._cache.slots.num_pinned == 0
    bag._cache.check()


def test_a_forward_that_finds_no_room_beside_the_prefetch_says_so(kernels):
    bag = fixed_bag(6, kernels=kernels)
    bag.prefetch(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(CacheTooSmallError, match="prefetch"):
        look_up(bag, [10, 11, 12])
    look_up(bag, [1, 2, 10, 11])
    bag._cache.check()


def test_rows_of_a_prefetch_and_of_a_waiting_graph(kernels):
    """A row may be held by both; each lets go for itself."""
    bag = fixed_bag(6, kernels=kernels, evict_strategy="lru")
    out = bag(torch.tensor([[1, 2]]))
    bag.prefetch(torch.tensor([[2, 3]]))
    bag.prefetch(torch.tensor([[4]]))
    look_up(bag, [10, 11, 12])
    assert resident(bag, 1, 2, 3, 4) == [True, True, False, True]
    del out
    look_up(bag, [20, 21, 22, 23, 24])
    assert resident(bag, 1, 2, 4) == [False, False, True]
    bag._cache.check()


@pytest.mark.parametrize("guess", ["right", "wrong", "half"])
def test_the_same_bits_with_and_without(guess, policy, kernels, optimizer):
    """Prefetching the next batch, another one, or half of it, before each backward: nothing changes but the fetches."""
    results = []
    for prefetching, num_slots in ((True, 60), (False, 60), (False, NUM_ROWS)):
        bag = make_bag(num_slots, evict_strategy=policy, kernels=kernels, ids_freq_mapping=counts())
        opt = make_optimizer(optimizer, bag.parameters())
        generator = torch.Generator().manual_seed(1)
        batches = [skewed_ids(generator) for _ in range(9)]
        others = [skewed_ids(generator) for _ in range(9)]
        outputs = []
        for ids, following, other in zip(batches, batches[1:], others, strict=False):
            out = bag(ids)
            if prefetching:
                bag.prefetch({"right": following, "wrong": other, "half": following[::2]}[guess])
                bag._cache.check()
            loss_of(out).backward()
            opt.step()
            opt.zero_grad()
            outputs.append(out.detach().clone())
        assert num_slots == NUM_ROWS or bag.stats.evictions > 0
        results.append([*outputs, *everything(bag, opt)])
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


def test_prefetch_takes_what_forward_takes(kernels):
    """2-D; 1-D with offsets or without; int32; padding is not fetched; a collection in its own form."""
    for call in (
        lambda bag: bag.prefetch(torch.tensor([[1, 2], [2, 0]])),
        lambda bag: bag.prefetch(torch.tensor([1, 2, 2, 0]), torch.tensor([0, 3])),
        lambda bag: bag.prefetch(torch.tensor([1, 2, 2, 0])),
        lambda bag: bag.prefetch(torch.tensor([1, 2, 2, 0], dtype=torch.int32)),
    ):
        bag = make_bag(padding_idx=0, kernels=kernels)
        call(bag)
        assert resident(bag, 0, 1, 2) == [False, True, True] and bag.stats.misses == 3
    bag = make_bag(include_last_offset=True, kernels=kernels)
    bag.prefetch(torch.tensor([1, 2]))
    bag.prefetch(torch.tensor([1, 2]), torch.tensor([0, 2]))
    assert bag.stats.misses_unique == 2


def test_prefetch_changes_no_value_and_no_mark(kernels):
    """With max_norm too: rows are renormalised by the forward, not before; nothing is dirty, no graph is made."""
    bag = make_bag(max_norm=0.5, kernels=kernels)
    before = bag.logical_weight()
    bag.prefetch(torch.arange(10))
    assert torch.equal(bag.logical_weight(), before)
    slots = bag._cache.slots
    assert not slots.marked(slots.DIRTY).any() and bag._cached_weight.num_tokens == 0


def test_prefetch_in_inference_mode_and_then_training(kernels):
    with torch.inference_mode():
        bag = make_bag(num_slots=60, kernels=kernels)
        bag.prefetch(torch.arange(20))
    loss_of(bag(torch.arange(20).reshape(1, 20))).backward()
    opt = make_optimizer("SGD", bag.parameters())
    opt.step()
    opt.zero_grad()
    bag._cache.check()


# ---- growth ------------------------------------------------------------------------------------------------------


def test_growth_warns_once_and_keeps_the_parameter(policy, kernels):
    """5 slots, a ceiling of 20: batches of 8, then 20 rows; one warning in all, the same Parameter and shape."""
    bag = make_bag(5, evict_strategy=policy, kernels=kernels, ids_freq_mapping=counts())
    parameter, shape, address = bag.weight, bag.weight.shape, bag.weight.data_ptr()
    table = bag.logical_weight()
    with pytest.warns(UserWarning, match=r"5 slots.*grows to 8 .*ceiling 20.*") as caught:
        for num_ids in (3, 8, 4, 15, 20, 20):
            for first in (0, 50, 100):
                ids = torch.arange(first, first + num_ids)
                with torch.no_grad():
                    out = bag(ids.unsqueeze(1))
                assert torch.equal(out, table[ids])
                bag._cache.check()
    assert len(caught) == 1
    assert bag.weight is parameter and parameter.shape == shape == (20, DIM) and parameter.data_ptr() == address
    assert bag.num_slots == 20 and bag.stats.growths >= 2 and bag.stats.evictions > 0
    with pytest.raises(CacheTooSmallError, match=r"21 rows.*\b20\b"):
        look_up(bag, torch.arange(21))


def test_a_cache_that_need_not_grow_does_not(kernels):
    """Unpinned rows give way first."""
    bag = make_bag(10, kernels=kernels)
    for first in range(0, 100, 10):
        look_up(bag, torch.arange(first, first + 10))
    assert bag.num_slots == 10 and bag.stats.growths == 0 and bag.stats.evictions == 90


def test_growth_with_graphs_in_flight_gives_the_same_bits(policy, kernels, optimizer):
    """Three forwards wait while the cache grows under them; their gradients are those of the resident table."""
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it grows to.*")
        for num_slots in (20, NUM_ROWS):
            bag = make_bag(num_slots, evict_strategy=policy, kernels=kernels, ids_freq_mapping=counts())
            opt = make_optimizer(optimizer, bag.parameters())
            generator = torch.Generator().manual_seed(1)
            outputs = []
            for step in range(6):
                batches = [skewed_ids(generator, (4, 3)) for _ in range(1 if step < 2 else 4)]
                graphs = [bag(ids) for ids in batches]
                sum(loss_of(out) for out in graphs).backward()
                opt.step()
                opt.zero_grad()
                outputs += [out.detach().clone() for out in graphs]
                del graphs
                bag._cache.check()
            if num_slots == 20:
                assert 20 < bag.num_slots <= 80 and bag.stats.growths > 0 and bag.stats.evictions > 0
            results.append([*outputs, *everything(bag, opt)])
    assert_same_bits(*results)


def test_growth_in_inference_mode_and_then_training(kernels):
    """Everything that outlives the call is an ordinary tensor."""
    results = []
    for num_slots in (8, NUM_ROWS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*it grows to.*")
            bag = make_bag(num_slots, kernels=kernels)
            with torch.inference_mode():
                for first in range(0, 100, 20):
                    bag(torch.arange(first, first + 20).reshape(1, 20))
            opt = make_optimizer("Adagrad", bag.parameters())
            generator = torch.Generator().manual_seed(1)
            for _ in range(5):
                loss_of(bag(skewed_ids(generator, (4, 3)))).backward()
                opt.step()
                opt.zero_grad()
        assert num_slots == NUM_ROWS or (bag.stats.growths > 0 and bag.stats.evictions > 0)
        results.append(everything(bag, opt))
    assert_same_bits(*results)


def test_a_prefetch_grows_the_cache_too(kernels):
    bag = make_bag(5, kernels=kernels)
    with pytest.warns(UserWarning, match="grows to"):
        bag.prefetch(torch.arange(12))
    assert bag.num_slots == 12 and all(resident(bag, *range(12)))
    bag._cache.check()


def test_max_cache_bytes_is_the_ceiling(kernels):
    """Bytes of whole records: 12 rows with room for 12; the thirteenth is refused, and nothing passes the bytes."""
    budget = 12 * DIM * 4
    bag = make_bag(5, max_cache_bytes=budget, kernels=kernels)
    assert bag.weight.shape == (12, DIM) and bag.device_bytes()["reserved"] == 7 * DIM * 4
    with pytest.warns(UserWarning, match=r"grows to 12 \(ceiling 12\)"):
        look_up(bag, torch.arange(12))
    assert bag.device_bytes()["cache"] == budget and bag.device_bytes()["reserved"] == 0
    with pytest.raises(CacheTooSmallError, match=rf"13 rows.*{budget} bytes.*{13 * DIM * 4}"):
        look_up(bag, torch.arange(13))


def test_max_cache_bytes_counts_the_optimizers_state():
    """Weight alone before binding; half the slots with Adagrad's sums, reserved by name or by binding."""
    budget = 40 * DIM * 4
    bound = make_bag(None, max_cache_bytes=budget)
    assert bound.num_slots == 40
    make_optimizer("Adagrad", bound.parameters())
    reserved = make_bag(None, max_cache_bytes=budget, optimizer="adagrad")
    assert bound.num_slots == reserved.num_slots == reserved.weight.shape[0] == bound.weight.shape[0] == 20
    for bag in (bound, reserved):
        assert bag.device_bytes()["cache"] <= budget
        bag._cache.check()


def test_a_limit_at_the_initial_size_means_no_growth(kernels):
    bag = fixed_bag(FEW_SLOTS, kernels=kernels)
    assert bag.weight.shape[0] == bag.num_slots == FEW_SLOTS
    with pytest.raises(CacheTooSmallError):
        look_up(bag, torch.arange(FEW_SLOTS + 1))
    assert bag.num_slots == FEW_SLOTS


# ---- tables that fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [{"cache_ratio": 1.0}, {"num_slots": 5000}, {"num_slots": NUM_ROWS}, {"num_slots": None, "max_cache_bytes": 10**6}],
    ids=str,
)
@pytest.mark.parametrize("warmup_ratio", [1.0, 0.0])
@pytest.mark.parametrize("with_counts", [False, True])
def test_a_table_smaller_than_the_cache_is_resident(size, warmup_ratio, with_counts, policy):
    """No miss, no fetch, no eviction, ever, counts or not; after an optimizer was bound as well."""
    torch.manual_seed(0)
    options = {
        "evict_strategy": policy,
        "warmup_ratio": warmup_ratio,
        "ids_freq_mapping": counts() if with_counts else None,
    }
    bag = FreqAwareEmbeddingBag(NUM_ROWS, DIM, mode="sum", **size, **options)
    assert bag.num_slots == bag.weight.shape[0] == NUM_ROWS
    opt = make_optimizer("Adagrad", bag.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        loss_of(bag(skewed_ids(generator))).backward()
        opt.step()
        opt.zero_grad()
    stats = bag.stats
    assert stats.misses == stats.rows_fetched == stats.evictions == stats.rows_written_back == 0
    assert stats.hits == 3 * 24 and stats.hit_ratio == 1.0
    bag._cache.check()


# ---- bytes on the device -----------------------------------------------------------------------------------------


def on_device(bag):
    return {key: value for key, value in bag.device_bytes().items() if "host" not in key}


@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("policy_name", [None, *POLICY_NAMES])
def test_device_bytes_do_not_grow_with_the_rows(policy_name, with_counts, kernels):
    """Equal slots and batches at 10 times the rows: every part without "host" in its name is equal."""
    sizes = []
    for num_rows in (1000, 10_000):
        given = counts(num_rows) if with_counts else None
        bag = make_bag(64, num_rows=num_rows, evict_strategy=policy_name, kernels=kernels, ids_freq_mapping=given)
        make_optimizer("Adagrad", bag.parameters())
        for first in range(0, 1000, 50):
            look_up(bag, torch.arange(first, first + 50))
        assert bag.stats.evictions > 0
        sizes.append(bag.device_bytes())
        assert sizes[-1]["cache"] == 64 * 2 * DIM * 4
    small, large = ({key: value for key, value in size.items() if "host" not in key} for size in sizes)
    assert small == large and sizes[0] != sizes[1]
    assert {"cache", "reserved", "index"} <= set(small)


def test_device_bytes_of_a_collection_do_not_grow_with_the_rows():
    small, large = (
        FreqAwareEmbeddingBagCollection([scale * 30, scale * 70], DIM, num_slots=20, evict_strategy="s3fifo")
        for scale in (1, 10)
    )
    assert on_device(small) == on_device(large)


@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("policy_name", POLICY_NAMES)
def test_the_index_stays_within_a_quarter_of_the_rows(policy_name, with_counts):
    """All that is held per slot beside the record, at 32 floats a row: at most 32 bytes."""
    num_rows, num_slots = 40_000, 10_000
    given = counts(num_rows) if with_counts else None
    bag = make_bag(num_slots, num_rows=num_rows, dim=32, evict_strategy=policy_name, ids_freq_mapping=given)
    held = {key: value for key, value in on_device(bag).items() if key not in ("cache", "reserved", "workspace")}
    per_slot = sum(held.values()) / num_slots
    assert per_slot <= 0.25 * 32 * 4, f"{policy_name}: {per_slot:.1f} bytes a slot, {held}"


def test_what_device_bytes_reports_is_what_is_there():
    """Every array that the cache holds is in one of the parts: nothing per row hides on the device side."""
    bag = make_bag(64, num_rows=5000, evict_strategy="lfu", ids_freq_mapping=counts(5000))
    slots = bag._cache.slots
    arrays = {}
    for value in slots.__dict__.values():
        if torch.is_tensor(value):
            arrays[value.data_ptr()] = value.numel() * value.element_size()
    for value in bag._cache.policy.__dict__.values():
        if isinstance(value, np.ndarray):
            arrays[id(value)] = value.nbytes
    reported = bag.device_bytes()
    assert sum(arrays.values()) == reported["index"] + reported["host_slot_of_id"]
    assert reported["host_store"] == 5000 * DIM * 4 and reported["host_row_order"] == 2 * 4 * 5000
