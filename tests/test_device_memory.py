"""Memory of a device cache that is used again, and what a caller changes under it, with the plain twin on a CPU.

    python -m pytest tests/test_device_memory.py

Proves: a plan's memory is not used again while anybody needs its slots; a gradient that was taken out and put back is
refused once rows have moved; ids that change after a batch was announced are looked up as they are; a prefetched row
that was used may leave; and the side stream waits for all that it must.
"""

import weakref
from types import SimpleNamespace

import pytest
import torch
import worlds

import colossal_freqcache.device_cache
from colossal_freqcache import Lookahead, optim
from colossal_freqcache.device_ahead import DeviceAhead
from colossal_freqcache.kernels.device import DevicePlan, DeviceTorchKernels


class StaticMemory(DeviceTorchKernels):
    """Plans of one shape are written into the same tensors, as a CUDA graph does, once nobody has the last plan."""

    def __init__(self) -> None:
        self._memory: dict[tuple, list] = {}
        self.num_used_again = 0

    def plan(self, values, offsets, tables, slots, use, ahead=False):
        made = super().plan(values, offsets, tables, slots, use, ahead)
        names = [name for name in DevicePlan.__slots__ if name not in ("__weakref__", "zeros")]
        sizes = {name: values.numel() for name in ("id_of_unique", "slot_of_unique")}
        memories = self._memory.setdefault((values.numel(), offsets.numel()), [])
        memory = next((memory for memory in memories if memory["last"]() is None), None)
        if memory is None:
            memory = {}
            for name in names:
                tensor = getattr(made, name)
                memory[name] = tensor.new_zeros(sizes[name]) if name in sizes else torch.zeros_like(tensor)
            memories.append(memory)
        else:
            self.num_used_again += 1
        for name in names:
            memory[name][: getattr(made, name).shape[0]] = getattr(made, name)
        plan = DevicePlan(**{name: memory[name] for name in names})
        memory["last"] = weakref.ref(plan)
        return plan


@pytest.fixture
def static_memory(monkeypatch):
    """Device caches whose plans share memory; the kernel sets that were made."""
    made = []

    def make(name, device):
        made.append(StaticMemory())
        return made[-1]

    monkeypatch.setattr(colossal_freqcache.device_cache, "make_device_kernels", make)
    return made


@pytest.fixture
def twin(monkeypatch):
    """Device caches with the plain twin."""
    monkeypatch.setattr(colossal_freqcache.device_cache, "make_device_kernels", lambda *_: DeviceTorchKernels())


def test_held_slots_keep_their_memory(static_memory):
    """Micro-batches whose graphs are gone, evaluations of the same shape between them: resident bits."""

    def run(num_slots):
        bag = worlds.make_bag(num_slots, kernels="cuda", ids_freq_mapping=worlds.counts())
        optimizer = worlds.make_optimizer("Adagrad", bag.parameters())
        generator = torch.Generator().manual_seed(2)
        for _ in range(30):
            for _ in range(3):
                worlds.loss_of(bag(worlds.skewed_ids(generator))).backward()
                with torch.no_grad():
                    bag(worlds.skewed_ids(generator))
            optimizer.step()
            optimizer.zero_grad()
        bag._cache.check()
        return worlds.everything(bag, optimizer), bag.stats.evictions

    few, evictions = run(100)
    worlds.assert_same_bits(few, run(worlds.NUM_ROWS)[0])
    assert evictions > 500 and all(kernels.num_used_again > 50 for kernels in static_memory)


def test_a_gradient_put_back_after_rows_have_moved_is_refused(twin):
    """As on a CPU: it would train the rows that stand in its slots now."""
    bag = worlds.make_bag(6, kernels="cuda")
    optimizer = optim.SGD(bag.parameters(), lr=1.0)
    bag(torch.arange(5).reshape(1, 5)).sum().backward()
    stale, bag.weight.grad = bag.weight.grad, None
    bag(torch.arange(10, 15).reshape(1, 5)).sum().backward()
    fresh, bag.weight.grad = bag.weight.grad, stale
    with pytest.raises(RuntimeError, match="rows have moved"):
        optimizer.step()
    before = bag.logical_weight()
    bag.weight.grad = fresh * 0.5  # another tensor, of rows that are held: the device is asked
    optimizer.step()
    changed = (bag.logical_weight() != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == list(range(10, 15))


@pytest.mark.parametrize("how", ["numpy", "data", "torch"])
def test_ids_that_change_after_they_were_announced(how, twin):
    """A forward looks up the ids that it is given, not those that the loader gave."""
    bag = worlds.make_bag(25, kernels="cuda")
    table = bag.logical_weight()
    batches = [torch.arange(start, start + 5).reshape(1, 5) for start in range(0, 100, 5)]
    for ids in Lookahead(batches, bag, window=2):
        if how == "numpy":
            ids.numpy()[:] += 1
        else:
            (ids.data if how == "data" else ids).add_(1)
        assert torch.allclose(bag(ids), table[ids].sum(1))
    assert bag.stats.evictions > 50


def test_prefetched_rows_that_were_used_may_leave(twin):
    """Ten slots: eight rows prefetched, six of them used, then eight others."""
    bag = worlds.make_bag(10, kernels="cuda")
    with torch.no_grad():
        bag.prefetch(torch.arange(8))
        bag(torch.arange(6).reshape(1, 6))
        bag(torch.arange(50, 58).reshape(1, 8))
        assert bag._cache._prefetched.slots.numel() == 2
        bag(torch.tensor([[6, 7]]))
        assert bag._cache._prefetched is None


@pytest.mark.parametrize("current, released, waits_for_all", [(7, 7, False), (7, 6, True), (0, 6, True), (7, 8, False)])
def test_what_is_trained_after_the_next_batch_was_handed_out_is_waited_for(current, released, waits_for_all):
    """`released` belongs to an earlier batch than the current one, or the current one was never admitted ahead."""
    ahead = DeviceAhead(None)
    ahead._current, ahead._reached = SimpleNamespace(use=current), "up to the last hand-out"
    ahead.released(released)
    assert (ahead._reached is None) == waits_for_all
