"""A cache on a GPU: the cases of `tests/test_device_cache.py` there, and what only a GPU can show.

    python -m pytest tests/gpu -q

Proves, with the Triton kernels and with their plain twin: what `device_cases` proves; and that the store's pages are
pinned in place, that a Lookahead's side stream changes no bit over many steps and seeds, how often a step waits for
the device, that device memory does not grow with the rows, that both kernel sets agree, and that ids may come from
anywhere.
FREQCACHE_GPU_TESTS_ON=cpu runs this folder interpreted on a CPU, without what needs a GPU: a check of the tests alone.
Needs torch, triton, numba, numpy, pytest, hypothesis.
"""

import gc
import os
import warnings
from contextlib import contextmanager

import device_worlds
import pytest
import torch
from device_worlds import World, id_batches, train
from worlds import DIM, NUM_ROWS, assert_same_bits, counts, everything, loss_of, make_optimizer, skewed_ids

from colossal_freqcache import Lookahead

pytest.register_assert_rewrite("device_cases", "device_kernel_cases")

from device_cases import *  # noqa: E402, F403  (the tests)

# Of the kernels alone, those cases for which a compiler and threads can differ from the interpreter. Few, since each
# combination of constants takes about a second to compile.
from device_kernel_cases import (  # noqa: E402, F401
    TRAINED,
    test_choose_victims,
    test_exchange,
    test_find,
    test_many_exchanges_at_full_load,
    test_offsets_beyond_two_to_the_31_elements,
    test_plan,
    test_plan_names_the_first_bad_id,
    test_plan_tells_bad_offsets,
    test_sums_do_not_depend_on_where_rows_stand,
    test_victims_of_a_large_window,
)
from device_kernel_cases import test_moves as moves  # noqa: E402
from device_kernel_cases import test_trained_in_the_backward_or_after_it as trained_alike  # noqa: E402

DRY = os.environ.get("FREQCACHE_GPU_TESTS_ON") == "cpu"


def problem() -> str | None:
    """Why these tests do not run here."""
    if DRY:
        return device_worlds.problem_with_interpreter()
    if not torch.cuda.is_available():
        return "no CUDA device"
    if os.environ.get(device_worlds.INTERPRET) == "1":
        return "TRITON_INTERPRET=1: the kernels would not be compiled"
    return None


pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
on_gpu_only = pytest.mark.skipif(DRY, reason="a dry run on a CPU")


@pytest.fixture
def device() -> torch.device:
    """Where the tensors are."""
    return torch.device("cpu") if DRY else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def interpreting(monkeypatch):
    """A dry run's kernels are interpreted."""
    if DRY:
        monkeypatch.setenv(device_worlds.INTERPRET, "1")


@pytest.fixture
def triton(device, monkeypatch) -> World:
    """The Triton set."""
    return device_worlds.cpu_world("triton", monkeypatch) if DRY else World(device, "cuda", True)


@pytest.fixture
def twin(device, monkeypatch) -> World:
    """The plain torch set on the same device."""
    return device_worlds.cpu_world("twin", monkeypatch) if DRY else World(device, "torch", False)


@pytest.fixture(params=["triton", "twin"])
def world(request) -> World:
    """Each kernel set in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("width", [7, 128])
def test_moves_of_rows(width, device):
    """At a width that is a power of two, and at one that is not."""
    moves(width, torch.float32, device)


@pytest.mark.parametrize("case", TRAINED[::3], ids=str)
def test_trained_in_the_backward_or_after_it(case, device):
    """The same bits, as compiled: nothing is contracted that is written as two operations."""
    trained_alike(*case, device)


@on_gpu_only
@pytest.mark.parametrize("with_counts", [False, True])
def test_pages_are_pinned_in_place(with_counts, triton):
    """The store's and the order's memory is registered with CUDA, without a warning, also for small neighbours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bags = [
            triton.make_bag(30, num_rows=rows, ids_freq_mapping=counts(rows) if with_counts else None)
            for rows in (200, 64, 100_000, 64)
        ]
    for bag in bags:
        assert bag._cache._pages.is_pinned
        assert bag._cache._store_records.data_ptr() == bag._cache.store.host_records.data_ptr()
    optimizer = make_optimizer("Adam", bags[0].parameters())  # another store: pinned again
    assert bags[0]._cache._pages.is_pinned
    train(bags[0], optimizer, id_batches(3), triton.device)
    bags[0]._cache.check()
    del bags, optimizer


def looked_ahead(world, batches, depth, fused, waits=None):
    """Outputs, table and state; how often each step waited goes into `waits`."""
    num_slots = 64 * (depth + 3) + 1
    bag = world.make_bag(num_slots, num_rows=2000, dim=32, ids_freq_mapping=counts(2000))
    settings = {"fused": True} if fused else {}
    optimizer = make_optimizer("Adagrad", bag.parameters(), **settings)
    outs = []
    before = 0
    for ids in Lookahead(batches, bag, window=depth + 2, depth=depth) if depth else batches:
        out = bag(ids)
        loss_of(out).backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach())  # no copy to the host: it would hide a race
        if waits is not None:
            waits.append(bag._cache.num_syncs - before)
            before = bag._cache.num_syncs
            if world.is_gpu:
                torch.cuda.synchronize()  # what was sent out has arrived
    if world.is_gpu:
        torch.cuda.synchronize()
    assert bag.stats.evictions > 5 * len(batches)
    bag._cache.check()
    return [out.cpu() for out in outs] + everything(bag, optimizer)


@pytest.mark.parametrize("depth, fused", [(1, True), (2, False), (4, True)])
def test_the_side_stream_changes_no_bit(depth, fused, triton):
    """60 evicting steps, several seeds: a fetch that came too late or too early would show."""
    steps, seeds = (60, range(6)) if triton.is_gpu else (6, range(1))
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        batches = [skewed_ids(generator, (16, 4), 2000).to(triton.device) for _ in range(steps)]
        assert_same_bits(looked_ahead(triton, batches, depth, fused), looked_ahead(triton, batches, 0, fused))


@pytest.mark.parametrize("depth", [0, 1])
def test_how_often_a_step_waits(depth, triton):
    """Without a Lookahead once at most, for the counts; with one not at all, after the first batches."""
    generator = torch.Generator().manual_seed(0)
    batches = [skewed_ids(generator, (16, 4), 2000).to(triton.device) for _ in range(30 if triton.is_gpu else 6)]
    waits = []
    looked_ahead(triton, batches, depth, True, waits)
    assert max(waits) <= 1 + 2 * depth
    assert sum(waits[3:]) == 0 or not depth


@on_gpu_only
def test_device_memory_does_not_grow_with_the_rows(triton):
    """What torch has allocated for a bag that has trained is the same, within 1 MiB, for ten times the rows."""

    def allocated(num_rows):
        gc.collect()  # the bag before
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        bag = triton.make_bag(10_000, num_rows=num_rows, dim=32, ids_freq_mapping=counts(num_rows))
        optimizer = make_optimizer("Adam", bag.parameters())
        train(bag, optimizer, id_batches(3), triton.device)
        torch.cuda.synchronize()
        found = torch.cuda.memory_allocated() - before
        reported = sum(size for name, size in bag.device_bytes().items() if "host" not in name)
        assert abs(found - reported) < 2 << 20
        return found

    allocated(20_000)
    assert abs(allocated(20_000) - allocated(200_000)) < 1 << 20


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_both_kernel_sets_agree(mode, triton, device):
    """Outputs, table and state after ten evicting steps, within float32's error."""
    results = []
    other = World(device, "torch", False) if triton.is_gpu else None
    for world in filter(None, (triton, other)):
        bag = world.make_bag(40, mode=mode, ids_freq_mapping=counts())
        optimizer = make_optimizer("Adam", bag.parameters())
        outs = train(bag, optimizer, id_batches(10), world.device)
        assert bag.stats.evictions > 50
        bag._cache.check()
        results.append(outs + everything(bag, optimizer))
    for a, b in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_ids_from_anywhere(world):
    """On the device, in pageable and in pinned host memory, of either type: the same outputs, on the device."""
    bag = world.make_bag(40, ids_freq_mapping=counts())
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        ids = skewed_ids(generator).reshape(-1)
        offsets = torch.arange(8) * 3
        given = {
            "host": (ids, offsets),
            "device": (ids.to(world.device), offsets.to(world.device)),
            "mixed": (ids.to(world.device), offsets.int()),
            "int32": (ids.int(), offsets.to(world.device)),
        }
        if world.is_gpu:
            given["pinned"] = (ids.pin_memory(), offsets.pin_memory())
        with torch.no_grad():
            outs = {name: bag(*arguments) for name, arguments in given.items()}
            assert torch.equal(outs["host"], bag(ids.reshape(8, 3)))
        expected = bag.logical_weight()[ids.reshape(8, 3)].sum(1)
        for name, out in outs.items():
            assert out.device == bag.weight.device and out.shape == (8, DIM), name
            assert torch.equal(out, outs["host"]), name
        torch.testing.assert_close(outs["host"].cpu(), expected, rtol=1e-5, atol=1e-5)
        assert number == 0 or bag.stats.evictions > 0 or bag._cache.slots.num_used <= 40
    assert bag.stats.evictions > 20


@on_gpu_only
def test_pinned_ids_may_be_refilled_after_the_forward(triton):
    """A loader that uses its pinned buffer again: the backward does not read it."""
    results = []
    for refill in (False, True):
        bag = triton.make_bag(60, ids_freq_mapping=counts())
        optimizer = make_optimizer("SGD", bag.parameters())
        buffer, ends = torch.empty(24, dtype=torch.int64).pin_memory(), (torch.arange(8) * 3).pin_memory()
        for ids in id_batches(6):
            buffer.copy_(ids.reshape(-1))
            ends.copy_(torch.arange(8) * 3)
            out = bag(buffer, ends)
            if refill:
                torch.cuda.synchronize()
                buffer.fill_(0)
                ends.fill_(0)
            loss_of(out).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(bag, optimizer))
    assert_same_bits(*results)


@on_gpu_only
def test_what_is_refused_on_a_gpu(triton):
    """The CPU's kernels there, moves between devices, and rows that do not fit on the device."""
    with pytest.raises(ValueError, match="'cpu'.*'auto', 'cuda' or 'torch'"):
        triton.make_bag(kernels="cpu")
    bag = triton.make_bag()
    with pytest.raises(NotImplementedError, match="build it with device="):
        bag.to("cpu")
    assert bag.to("cuda") is bag
    assert bag.weight.is_cuda and bag.logical_weight().shape == (NUM_ROWS, DIM)


@on_gpu_only
def test_auto_is_the_triton_set(triton):
    """kernels="auto" on a GPU that can."""
    assert triton.make_bag(kernels="auto")._cache.kernels.name == "cuda"


@contextmanager
def captured():
    """A CUDA graph of what runs within; garbage is collected before it."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    with torch.cuda.graph(graph):
        yield graph


@on_gpu_only
def test_a_graph_of_ragged_bags(triton):
    """Offsets change between replays, and eager lookups of other batches come in between."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(16):
        values = skewed_ids(generator, (24,))
        batches.append((values, torch.cat([torch.zeros(1).long(), torch.randint(0, 25, (7,), generator=generator)])))
        batches[-1][1].copy_(batches[-1][1].sort().values)
    results = []
    for replayed in (False, True):
        bag = triton.make_bag(80, ids_freq_mapping=counts())
        optimizer = make_optimizer("SGD", bag.parameters(), fused=True)
        values, offsets = (part.to(triton.device) for part in batches[0])
        outs, graph = [], None
        for number, batch in enumerate(batches):
            if number == 4 and replayed:
                with captured() as graph:
                    out = bag(values, offsets)
                    loss_of(out).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            if graph is not None:
                bag.prefetch(batch[0].to(triton.device), batch[1].to(triton.device))
            values.copy_(batch[0])
            offsets.copy_(batch[1])
            if graph is not None:
                graph.replay()
                outs.append(out.detach().cpu())
            else:
                eager = bag(values, offsets)
                loss_of(eager).backward()
                optimizer.step()
                optimizer.zero_grad()
                outs.append(eager.detach().cpu())
                del eager
            with torch.no_grad():
                bag(triton.put(number, number + 1), triton.put(0))
        assert bag.stats.evictions > 5
        results.append([*outs, bag.logical_weight()])
    assert_same_bits(*results)


@on_gpu_only
@pytest.mark.parametrize("name, mode", [("SGD", "sum"), ("Adagrad", "mean"), ("RowWiseAdagrad", "max")])
def test_a_captured_step(name, mode, triton):
    """Lookup, backward and update as one CUDA graph, replayed after a prefetch: the bits of steps without a graph."""
    batches = id_batches(20)
    results = []
    for replayed in (False, True):
        bag = triton.make_bag(60, mode=mode, ids_freq_mapping=counts())
        optimizer = make_optimizer(name, bag.parameters(), fused=True)
        outs = train(bag, optimizer, batches[:3], triton.device)  # compiles what the capture needs
        if replayed:
            ids = batches[0].to(triton.device)
            with captured() as graph:
                out = bag(ids)
                loss_of(out).backward()
                optimizer.step()
                optimizer.zero_grad()
            for batch in batches[3:]:
                bag.prefetch(batch)
                ids.copy_(batch)
                graph.replay()
                outs.append(out.detach().cpu())
        else:
            outs += train(bag, optimizer, batches[3:], triton.device)
        assert bag.stats.evictions > 20 and bag.stats.hits + bag.stats.misses == 20 * 24
        bag._cache.check()
        state = optimizer.state_dict()["state"].values()
        results.append([*outs, bag.logical_weight(), *(each["sum"] for each in state if "sum" in each)])
    assert_same_bits(*results)


@on_gpu_only
def test_a_replay_that_misses_is_told(triton):
    """By what waits for the device next; the other rows are trained."""
    bag = triton.make_bag(60)
    optimizer = make_optimizer("SGD", bag.parameters(), fused=True)
    first = id_batches(1)[0]
    train(bag, optimizer, [first] * 3, triton.device)
    before = bag.logical_weight()
    ids = first.to(triton.device)
    with captured() as graph:
        loss_of(bag(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    missing = next(row for row in range(NUM_ROWS) if row not in first)
    ids[0, 0] = missing
    graph.replay()
    with pytest.raises(RuntimeError, match=r"met 1 row\(s\) that were not resident"):
        bag(first.to(triton.device))
    changed = (bag.logical_weight() != before).any(1)
    assert not changed[missing] and changed.sum() > 10


@on_gpu_only
def test_counters_are_right_while_batches_are_admitted(triton):
    """Reading `stats` at every step, with a side stream adding to them: every position is counted once."""
    generator = torch.Generator().manual_seed(0)
    batches = [skewed_ids(generator, (16, 4), 2000).to(triton.device) for _ in range(40)]
    bag = triton.make_bag(64 * 6, num_rows=2000, dim=32, ids_freq_mapping=counts(2000))
    optimizer = make_optimizer("SGD", bag.parameters())
    for ids in Lookahead(batches, bag, window=4, depth=2):
        train(bag, optimizer, [ids], triton.device)
        assert bag.stats.hits >= 0
    assert bag.stats.hits + bag.stats.misses == 64 * 40
