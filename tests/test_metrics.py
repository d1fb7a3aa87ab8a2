"""CacheStats: what the counters mean, measured on bags whose every miss is known beforehand.

    python -m pytest tests/test_metrics.py

Proves: hits + misses are the occurrences that were looked up, a prefetched miss is counted once, bytes are rows times
record bytes, padding does not count, reading costs nothing and needs no device.
"""

import numpy as np
import pytest
import torch
from worlds import DIM, NUM_ROWS, counts, loss_of, make_bag, make_optimizer, skewed_ids

from colossal_freqcache.metrics import CacheStats


def look_up(bag, ids):
    with torch.no_grad():
        bag(torch.tensor(ids))


def test_occurrences_and_unique_rows(kernels):
    """Each occurrence of a row that had to be fetched is a miss; unique misses count it once a batch."""
    bag = make_bag(3, num_rows=20, kernels=kernels)
    look_up(bag, [[1, 1, 2]])
    assert (bag.stats.hits, bag.stats.misses, bag.stats.misses_unique, bag.stats.evictions) == (0, 3, 2, 0)
    look_up(bag, [[1, 2, 2, 3]])
    assert (bag.stats.hits, bag.stats.misses, bag.stats.misses_unique, bag.stats.evictions) == (3, 4, 3, 0)
    look_up(bag, [[4, 5]])
    assert (bag.stats.hits, bag.stats.misses, bag.stats.misses_unique, bag.stats.evictions) == (3, 6, 5, 2)
    assert bag.stats.hit_ratio == 3 / 9


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 0}, {"padding_idx": 0, "max_norm": 1.0}], ids=lambda o: "-".join(o)
)
def test_hits_and_misses_are_what_was_looked_up(options, kernels, policy):
    """Over random batches; padding is not looked up."""
    bag = make_bag(kernels=kernels, evict_strategy=policy, ids_freq_mapping=counts(), **options)
    generator = torch.Generator().manual_seed(2)
    expected = 0
    for _ in range(20):
        ids = skewed_ids(generator)
        expected += int((ids != options.get("padding_idx", -1)).sum())
        with torch.no_grad():
            bag(ids)
        assert bag.stats.hits + bag.stats.misses == expected
        assert bag.stats.misses >= bag.stats.misses_unique
        # With max_norm the padding row is renormalised, as in torch: it may be fetched, although it is not looked up.
        padding_rows = bag.stats.rows_fetched - bag.stats.misses_unique
        assert 0 <= padding_rows <= (20 if {"padding_idx", "max_norm"} <= options.keys() else 0)
    assert bag.stats.evictions > 0 and 0 < bag.stats.hit_ratio < 1


def test_bytes_are_rows_times_record_bytes(kernels, optimizer):
    """Records carry the optimizer's state, and so do the bytes."""
    bag = make_bag(kernels=kernels)
    opt = make_optimizer(optimizer, bag.parameters())
    width = {"SGD": DIM, "Adagrad": 2 * DIM, "RowWiseAdagrad": DIM + 1, "Adam": 3 * DIM}[optimizer]
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        loss_of(bag(skewed_ids(generator))).backward()
        opt.step()
        opt.zero_grad()
    stats = bag.stats
    assert stats.rows_fetched > 0 and stats.rows_written_back > 0
    assert stats.bytes_fetched == stats.rows_fetched * width * 4
    assert stats.bytes_written_back == stats.rows_written_back * width * 4
    assert bag.device_bytes()["cache"] == bag.num_slots * width * 4


def test_rows_within_max_norm_stay_clean(kernels):
    """Evaluation with max_norm writes back the rows that it renormalised, and no other."""
    bag = make_bag(max_norm=1e6, padding_idx=3, kernels=kernels)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(10):
            bag(skewed_ids(generator))
    assert bag.stats.evictions > 0 and bag.stats.rows_written_back == 0


def test_clean_rows_are_never_written_back_and_dirty_ones_once(kernels):
    """Looking up writes nothing; of the rows that were trained, each is written once when it leaves or at the flush."""
    bag = make_bag(6, num_rows=60, kernels=kernels, evict_strategy="lru")
    opt = make_optimizer("SGD", bag.parameters())
    bag(torch.tensor([[1, 2, 3]])).sum().backward()
    opt.step()
    opt.zero_grad()
    for first in range(10, 40, 6):
        look_up(bag, [list(range(first, first + 6))])
    assert bag.stats.evictions == 27 and bag.stats.rows_written_back == 3
    bag.flush()
    assert bag.stats.rows_written_back == 3
    bag(torch.tensor([[50, 51]])).sum().backward()
    opt.step()
    opt.zero_grad()
    bag.flush()
    bag.flush()
    assert bag.stats.rows_written_back == 5
    look_up(bag, [list(range(10, 16))])
    assert bag.stats.rows_written_back == 5


def test_a_prefetched_miss_is_counted_once(kernels):
    """At admission: the forward that uses the rows counts them neither as hits nor as misses, the one after as hits."""
    bag = make_bag(10, num_rows=60, kernels=kernels)
    ids = torch.tensor([[1, 1, 2], [3, 4, 4]])
    look_up(bag, [[4, 5]])
    bag.prefetch(ids)
    stats = bag.stats
    assert (stats.hits, stats.misses, stats.misses_unique, stats.rows_fetched) == (0, 2 + 4, 2 + 3, 5)
    look_up(bag, ids.tolist())
    assert (stats.hits, stats.misses, stats.misses_unique, stats.rows_fetched) == (2, 6, 5, 5)
    assert stats.hits + stats.misses == 2 + 6
    look_up(bag, ids.tolist())
    assert (stats.hits, stats.misses, stats.misses_unique, stats.rows_fetched) == (8, 6, 5, 5)


def test_with_a_prefetch_before_every_batch_the_sums_stay(kernels):
    """hits + misses after each batch are the occurrences so far, as without prefetching."""
    bag = make_bag(60, kernels=kernels, max_cache_bytes=60 * DIM * 4)
    generator = torch.Generator().manual_seed(2)
    batches = [skewed_ids(generator) for _ in range(12)]
    bag.prefetch(batches[0])
    for number, ids in enumerate(batches):
        with torch.no_grad():
            bag(ids)
        assert bag.stats.hits + bag.stats.misses == (number + 1) * ids.numel()
        if number + 1 < len(batches):
            bag.prefetch(batches[number + 1])
            bag._cache.check()
            following = batches[number + 1].numel()
            assert bag.stats.hits + bag.stats.misses <= (number + 1) * ids.numel() + following
    assert bag.stats.evictions > 0


def test_prefetching_a_batch_twice_counts_its_misses_once(kernels):
    """The second prefetch finds the rows resident and keeps them paid for: the sums are those of one lookup."""
    bag = make_bag(10, num_rows=60, kernels=kernels)
    ids = torch.tensor([[1, 1, 2]])
    bag.prefetch(ids)
    bag.prefetch(ids)
    look_up(bag, ids.tolist())
    assert bag.stats.misses == 3
    assert bag.stats.hits + bag.stats.misses == ids.numel()


def test_hit_ratio_before_the_first_lookup_is_zero():
    assert CacheStats().hit_ratio == 0.0 and make_bag().stats.hit_ratio == 0.0


def test_a_resident_table_only_hits(kernels):
    bag = make_bag(NUM_ROWS, kernels=kernels)
    look_up(bag, [[5, 6, 7]])
    assert bag.stats.hit_ratio == 1.0 and bag.stats.rows_fetched == bag.stats.misses == 0


def test_counters_are_plain_ints_and_can_be_reset():
    bag = make_bag()
    look_up(bag, [[5, 5, 6]])
    values = bag.stats.as_dict()
    assert all(type(value) in (int, float) for value in values.values()), values
    assert values["misses"] == 3 and f"misses={values['misses']}" in repr(bag.stats)
    bag.stats.reset()
    assert all(value == 0 for value in bag.stats.as_dict().values())
    look_up(bag, [[5, 6]])
    assert bag.stats.hits == 2 and bag.stats.misses == 0


def test_tables_add_up():
    stats = CacheStats(3)
    stats.hits_per_table += np.array([1, 2, 3])
    stats.misses_per_table += np.array([0, 4, 0])
    stats.misses_unique_per_table += np.array([0, 2, 0])
    assert (stats.hits, stats.misses, stats.misses_unique, stats.hit_ratio) == (6, 4, 2, 0.6)
