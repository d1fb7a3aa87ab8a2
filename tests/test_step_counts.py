"""What a training step costs, counted instead of timed. `pytest tests/test_step_counts.py`

Proves: a step calls each kernel a fixed number of times, moves the missing rows and no others, allocates nothing anew
that grows with the batch, and touches nothing that grows with the table or the cache; fused=True saves what it says.
"""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, memory, optim

SIZES, DIM, BAGS = [40_000, 5_000, 30], 16, 1500
NUM_SLOTS = 6000


def make(num_slots=NUM_SLOTS, sizes=SIZES, fused=False, **options):
    """(bags that must evict, their optimizer)."""
    torch.manual_seed(0)
    bags = FreqAwareEmbeddingBagCollection(
        sizes, DIM, mode="sum", num_slots=num_slots, optimizer="adagrad", evict_strategy="lru", **options
    )
    return bags, optim.Adagrad(bags.parameters(), lr=0.1, fused=fused)


def batches(count, sizes=SIZES, seed=0):
    """`count` table-major batches of one id a bag, skewed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.cat([(torch.rand(BAGS, generator=generator) ** 3 * rows).long() for rows in sizes])


def step(bags, optimizer, values):
    out = bags(values, torch.arange(values.numel()))
    out.sin().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def counted(kernels, monkeypatch):
    """Counts the calls of every kernel."""
    calls = Counter()
    for name in dir(kernels):
        call = getattr(kernels, name)
        if not name.startswith("_") and callable(call):

            def count(*args, name=name, call=call, **options):
                calls[name] += 1
                return call(*args, **options)

            monkeypatch.setattr(kernels, name, count)
    return calls


@pytest.mark.parametrize("fused", [False, True])
def test_kernel_calls_and_rows_moved(monkeypatch, fused):
    """One plan, one pooling and its adjoint, one update; a write back and a fetch; the rows that were missing."""
    bags, optimizer = make(fused=fused)
    for values in batches(4):
        step(bags, optimizer, values)
    bags.stats.reset()
    calls = counted(bags._cache.kernels, monkeypatch)
    num_missing = 0
    for values in batches(6, seed=1):
        ids = (values.view(len(SIZES), BAGS) + torch.tensor([[0], [40_000], [45_000]])).unique()
        num_missing += int((bags._cache.slots.slot_of_id[ids] == 0).sum())
        step(bags, optimizer, values)
    expected = {"copy_offsets": 1, "plan": 1, "pool": 1, "pool_backward": 1, "update_adagrad": 1, "copy_rows": 2}
    expected |= {"add_pins": 3} if fused else {"add_pins": 3, "order_slots": 1}
    assert calls == {name: 6 * number for name, number in expected.items()}
    stats = bags.stats
    assert stats.rows_fetched == stats.misses_unique == num_missing > 6 * 500
    assert 0 < stats.rows_written_back <= stats.evictions == num_missing


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_that_grows_with_the_batch_is_allocated_anew(monkeypatch, fused):
    """Outputs, gradients, positions: after some steps each lies in memory of an earlier step's."""
    bags, optimizer = make(fused=fused)
    fresh = []
    raw = memory._raw
    monkeypatch.setattr(memory, "_raw", lambda num_bytes: fresh.append(num_bytes) or raw(num_bytes))
    for values in batches(5):
        step(bags, optimizer, values)
    assert max(fresh) >= BAGS * len(SIZES) * DIM * 4  # the output is among them
    fresh.clear()
    for values in batches(10, seed=1):
        step(bags, optimizer, values)
    assert fresh == []


@pytest.mark.parametrize("num_tables", [1, 2])
def test_the_callers_gradient_is_read_where_it_lies(num_tables, monkeypatch):
    """Neither autograd nor we copy it: at 256 floats a row a copy takes longer than the sums."""
    torch.manual_seed(0)
    options = {"mode": "sum", "num_slots": 9, "sparse": True}
    bag = FreqAwareEmbeddingBag(50, 4, **options)
    ids, offsets = torch.arange(6), torch.arange(6)
    if num_tables == 2:
        bag = FreqAwareEmbeddingBagCollection([50, 9], 4, **options)
        ids = torch.tensor([0, 4, 9, 8, 8, 2])
    grad = torch.rand(6, 4) if num_tables == 1 else torch.rand(3, 2, 4)
    seen = []
    kernels, pool_backward = bag._cache.kernels, bag._cache.kernels.pool_backward
    monkeypatch.setattr(kernels, "pool_backward", lambda grad, *rest: seen.append(grad) or pool_backward(grad, *rest))
    bag(ids, offsets).backward(grad)
    assert [found.data_ptr() for found in seen] == [grad.data_ptr()]


def test_outputs_that_are_kept_keep_their_values():
    """Of 12 steps all outputs and gradients are kept, more than are recycled: each is as it was made."""
    bags, optimizer = make()
    kept = []
    for values in batches(12):
        out = bags(values, torch.arange(values.numel()))
        out.sin().sum().backward()
        grad = bags.weight.grad
        kept.append((out, out.detach().clone(), grad, grad._values().clone(), grad._indices().clone()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for out, values, grad, grad_values, grad_indices in kept:
        assert torch.equal(out, values)
        assert torch.equal(grad._values(), grad_values) and torch.equal(grad._indices(), grad_indices)


def test_memory_of_a_step_does_not_grow_with_table_or_cache():
    """Traced bytes at their peak within a step, at 20 times the rows and 8 times the slots."""
    peaks = []
    for factor, num_slots in ((1, 6000), (20, 48_000)):
        sizes = [factor * rows for rows in SIZES]
        bags, optimizer = make(num_slots, sizes)
        warm = [np.arange(BAGS) + BAGS * number for number in range(12)]
        for ids in warm:
            step(bags, optimizer, torch.from_numpy(np.concatenate([ids % rows for rows in sizes])))
        for values in batches(3, SIZES, seed=1):
            step(bags, optimizer, values)
        tracemalloc.start()
        for values in batches(3, SIZES, seed=2):
            step(bags, optimizer, values)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 20_000, peaks
