"""python -m pytest tests/test_integration.py      (needs colossalai; skipped where it is not installed)

Proves that the cache is a citizen of Colossal-AI, on 1, 2 and 4 gloo ranks: the parallel bag keeps a native Parameter,
its layout gathers to the logical table, the four hook events fire under both plugins; a plain torch DLRM boosted with
FreqCachePlugin, or with HybridParallelPlugin and FreqCachePolicy, trains to the weights of the unboosted one with
evictions on the way, and what the booster saves loads in plain torch and into other plugins; what cannot work is
refused, with the reason, before anything has changed.
"""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("colossalai", reason="colossalai is not installed here")

import colossalai
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin
from colossalai.checkpoint_io.utils import gather_distributed_param
from colossalai.shardformer import ShardConfig, ShardFormer
from colossalai.shardformer.layer import ParallelModule
from colossalai.tensor.d_tensor import get_sharding_spec, is_customized_distributed_tensor, to_global
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from colossalai.testing import parameterize, rerun_if_address_is_in_use, spawn

from colossal_freqcache import FreqAwareEmbeddingBag, ParallelFreqAwareEmbeddingBag, checkpoint, optim
from colossal_freqcache.integration import (
    FreqCacheOpHook,
    FreqCachePlugin,
    FreqCachePolicy,
    ParallelFreqAwareEmbeddingBagCollection,
)
from colossal_freqcache.integration.bags import cached_modules
from colossal_freqcache.integration.policy import divide_slots

pytestmark = pytest.mark.colossalai

SIZES = (200, 5, 400)  # rows of three tables
DIM = 8
BATCH = 6  # samples of a rank
STEPS = 20
NAMES = [f"tables.{table}.weight" for table in range(len(SIZES))]


def section(**settings):
    """A config with these settings of the cache."""
    return {"freq_cache": settings}


class Net(nn.Module):
    """A DLRM in small, written in plain torch."""

    def __init__(self, sparse=True):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="mean", sparse=sparse) for rows in SIZES)
        self.top = nn.Sequential(nn.Linear(DIM * len(SIZES), 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, ids):
        pooled = [table(ids[:, number]) for number, table in enumerate(self.tables)]
        return self.top(torch.cat(pooled, 1)).squeeze(1)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def batches(world_size, steps=STEPS, seed=1):
    """(ids (B, T, 2), labels (B,)) of all ranks; skewed, so that rows come back, and many enough to evict."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        shape = (BATCH * world_size, 2)
        ids = [(torch.rand(shape, generator=generator) ** 2 * rows).long() for rows in SIZES]
        yield torch.stack(ids, 1), torch.randn(shape[0], generator=generator)


def loss_of(model, ids, labels):
    return ((model(ids) - labels) ** 2).mean()


def train(model, optimizer, world_size, share=slice(None), backward=None, steps=STEPS, seed=1):
    """Trains on the share; returns the losses."""
    losses = []
    for ids, labels in batches(world_size, steps, seed):
        loss = loss_of(model, ids[share], labels[share])
        optimizer.zero_grad()
        loss.backward() if backward is None else backward(loss, optimizer)
        optimizer.step()
        losses.append(float(loss))
    return losses


def assert_close(state, expected, what):
    for name, value in expected.items():
        assert torch.allclose(state[name], value, rtol=1e-5, atol=2e-6), (
            f"{what}: {name} differs by {(state[name] - value).abs().max()}"
        )


@contextlib.contextmanager
def quiet():
    """Without the host's warnings (large files, optional packages); growth of a cache stays an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*it grows to.*")
        yield


def enter(rank, world_size, port):
    torch.set_num_threads(1)
    colossalai.launch(rank=rank, world_size=world_size, host="localhost", port=port, backend="gloo", verbose=False)


def need(world_size):
    """One more than the distinct rows of a large table that a batch of all ranks may touch."""
    return 2 * BATCH * world_size + 1


# As many accesses of each table: a budget is divided equally, and what the small table cannot use goes to the others.
COUNTS = {f"tables.{table}": torch.full((rows,), 2000 // rows) for table, rows in enumerate(SIZES)}


def budget(world_size, num_batches=1):
    """Slots for all tables under which each large one holds `num_batches` batches and a row, and the small one all."""
    return 2 * (num_batches * (need(world_size) - 1) + 1) + SIZES[1]


# ---- the bag --------------------------------------------------------------------------------------------------------


@parameterize("sharding", ["column", "row"])
def check_native_parameter_is_kept(sharding):
    native = nn.EmbeddingBag(70, DIM, mode="sum", padding_idx=3, sparse=True)
    expected = native.weight.detach().clone()
    dist.broadcast(expected, 0)
    parameter, optimizer = native.weight, torch.optim.Adagrad(native.parameters(), lr=0.1)
    bag = ParallelFreqAwareEmbeddingBag.from_native_module(native, dist.group.WORLD, num_slots=10, sharding=sharding)
    assert isinstance(bag, ParallelModule) and isinstance(bag, FreqAwareEmbeddingBag)
    assert bag.weight is parameter and [name for name, _ in bag.named_parameters()] == ["weight"]
    assert parameter.shape[0] < 70 and bag.padding_idx == 3 and bag.mode == "sum"
    assert torch.equal(bag.logical_weight(), expected), "the first rank's values are everyone's"
    bag(torch.tensor([[1, 3]])).sum().backward()
    optimizer.step()
    assert "sum" not in optimizer.state[parameter], "the state of the table's shape is released"
    assert not torch.equal(bag.logical_weight()[1], expected[1]) and torch.equal(bag.logical_weight()[3], expected[3])


def check_native_parameter_with_a_gradient_is_refused():
    native = nn.EmbeddingBag(70, DIM)
    native(torch.tensor([[1]])).sum().backward()
    with pytest.raises(RuntimeError, match="has a gradient.*zero_grad"):
        ParallelFreqAwareEmbeddingBag.from_native_module(native)
    with pytest.raises(TypeError, match="Linear: give an nn.EmbeddingBag"):
        ParallelFreqAwareEmbeddingBag.from_native_module(nn.Linear(2, 2))


@parameterize("sharding", ["column", "row"])
@parameterize("counted", [True, False])
def check_layout(sharding, counted):
    """Trained and half evicted, gathered in both ways: the logical table in id order."""
    torch.manual_seed(0)
    counts = torch.arange(64, 0, -1).roll(7) if counted else None
    bag = ParallelFreqAwareEmbeddingBag(64, DIM, mode="sum", num_slots=24, sharding=sharding, ids_freq_mapping=counts)
    optimizer = optim.Adagrad(bag.parameters(), lr=0.1)
    for step in range(8):
        bag(torch.arange(8 * step, 8 * step + 8).view(4, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    table = bag.logical_weight()
    assert is_customized_distributed_tensor(bag.weight)
    assert torch.equal(gather_distributed_param(bag.weight), table)
    if sharding == "column":
        host = bag.host_table()
        spec = get_sharding_spec(host)
        assert host.shape == (64, DIM // dist.get_world_size()) and spec.dim_partition_dict == {1: [0]}
        assert torch.equal(to_global(host), table)
        assert not any(value is host for value in bag.state_dict().values()) and len(list(bag.parameters())) == 1
    else:
        with pytest.raises(ValueError, match="no d_tensor layout.*Gather bag.weight"):
            bag.host_table()


@parameterize("sharding", ["column", "row", "table"])
def check_a_collection_is_parallel_too(sharding):
    torch.manual_seed(0)
    tables = ParallelFreqAwareEmbeddingBagCollection(SIZES, DIM, num_slots=60, sharding=sharding)
    whole = torch.cat([tables.logical_weight(table) for table in range(len(SIZES))])
    assert torch.equal(gather_distributed_param(tables.weight), whole)
    with pytest.raises(TypeError, match="does not become a collection"):
        ParallelFreqAwareEmbeddingBagCollection.from_native_module(nn.EmbeddingBag(3, 2))


@parameterize("sharding", ["column", "row"])
def check_hooks_do_not_change_bits(sharding):
    """Four events a lookup, in order; the same table as without hooks; a frozen table has no backward."""
    tables = []
    for hooked in (False, True):
        torch.manual_seed(0)
        bag = ParallelFreqAwareEmbeddingBag(64, DIM, mode="sum", num_slots=24, sharding=sharding)
        optimizer, hook = torch.optim.SGD(bag.parameters(), lr=0.1), FreqCacheOpHook()
        with ColoParamOpHookManager.use_hooks(hook) if hooked else contextlib.nullcontext():
            for step in range(8):
                bag(torch.arange(8 * step, 8 * step + 8).view(4, 2)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        tables.append(bag.logical_weight())
    assert torch.equal(*tables)
    assert hook.events == dict.fromkeys(("pre_forward", "post_forward", "pre_backward", "post_backward"), 8)
    assert len(hook.lookups) == 8 and sum(sum(lookup.values()) for lookup in hook.lookups) == bag.stats.hits + (
        bag.stats.misses
    )
    bag.weight.requires_grad_(False)
    with ColoParamOpHookManager.use_hooks(hook):
        assert not bag(torch.tensor([[1, 2]])).requires_grad
    assert hook.events["pre_forward"] == 9 and hook.events["pre_backward"] == 8
    assert [name for name, _ in bag.named_parameters()] == ["weight"]


def run_bag(rank, world_size, port):
    enter(rank, world_size, port)
    with quiet():
        torch.manual_seed(rank)  # ranks draw different values: the first one's count
        check_native_parameter_is_kept()
        check_native_parameter_with_a_gradient_is_refused()
        check_layout()
        check_a_collection_is_parallel_too()
        check_hooks_do_not_change_bits()
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2])
@rerun_if_address_is_in_use()
def test_bag(world_size):
    spawn(run_bag, nprocs=world_size)


# ---- both plugins ---------------------------------------------------------------------------------------------------


def boosted(kind, world_size, model, optimizer, dataloader=None, sharding="column", num_batches=1, **options):
    """(booster, model, optimizer, dataloader, this rank's share of a batch) of either plugin."""
    config = dict(num_slots=budget(world_size, num_batches), sharding=sharding, warmup_ratio=0.5)
    options = {"counts": COUNTS, **options}
    if kind == "freqcache":
        plugin = FreqCachePlugin(section(**config), **options)
        share = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    else:
        policy = FreqCachePolicy(section(**config), **options)
        plugin = HybridParallelPlugin(tp_size=world_size, pp_size=1, precision="fp32", custom_policy=policy)
        share = slice(None)
    booster = Booster(plugin=plugin)
    model, optimizer, _, dataloader, _ = booster.boost(model, optimizer, dataloader=dataloader)
    return booster, model, optimizer, dataloader, share


def torch_optimizer(name, model, lr=0.1):
    """torch's. Adagrad with a large eps: with a tiny one a first step is lr * sign(g), and rounding of g shows."""
    return getattr(torch.optim, name)(model.parameters(), lr=lr, **({"eps": 1e-3} if name == "Adagrad" else {}))


def tensors_of(states):
    """{"number.name": tensor} of an optimizer's state."""
    return {
        f"{number}.{name}": value
        for number, state in states.items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@parameterize("kind", ["freqcache", "hybrid"])
@parameterize("sharding", ["column", "row"])
@parameterize("name", ["Adagrad", "SGD"])
def check_boosted_is_unboosted(kind, sharding, name, world_size, folder):
    """Weights, optimizer state and outputs; evictions on the way; all events counted; saved by the booster, model and
    optimizer, whole and sharded; loaded in plain torch, and into a fresh boosted model that goes on as if unbroken."""
    if world_size != 2 and name != "Adagrad":
        return  # the same code; two ranks have shown it
    plain = net()
    plain_optimizer = torch_optimizer(name, plain)
    train(plain, plain_optimizer, world_size)

    model = net()
    native = [table.weight for table in model.tables]
    booster, model, optimizer, _, share = boosted(
        kind, world_size, model, torch_optimizer(name, model), sharding=sharding
    )
    hook = FreqCacheOpHook()
    model.op_hooks.append(hook)
    tables = model.unwrap().tables
    assert all(table.weight is parameter for table, parameter in zip(tables, native, strict=True))
    train(model, optimizer, world_size, share, booster.backward)

    what = f"{kind} {sharding} {name}"
    state = model.unwrap().state_dict()
    assert_close(state, plain.state_dict(), what)
    evictions = sum(table.stats.evictions for table in tables)
    assert evictions > STEPS, f"{what}: {evictions} evictions"
    assert sum(table.num_slots for table in tables) <= budget(world_size)
    assert hook.events == dict.fromkeys(
        ("pre_forward", "post_forward", "pre_backward", "post_backward"), STEPS * len(SIZES)
    ), what

    place = folder / f"{kind}-{sharding}-{name}"
    if dist.get_rank() == 0:
        place.mkdir()
    dist.barrier()
    booster.save_model(model, str(place / "model.pt"))
    booster.save_optimizer(optimizer, str(place / "optimizer.pt"))
    booster.save_model(model, str(place / "model"), shard=True)
    booster.save_optimizer(optimizer, str(place / "optimizer"), shard=True)
    dist.barrier()

    loaded = net(seed=9)
    loaded.load_state_dict(torch.load(place / "model.pt", weights_only=True))
    loaded_optimizer = torch_optimizer(name, loaded, lr=7.0)
    loaded_optimizer.load_state_dict(torch.load(place / "optimizer.pt", weights_only=False))
    assert loaded_optimizer.param_groups[0]["lr"] == 0.1
    ours, theirs = (tensors_of(each.state_dict()["state"]) for each in (loaded_optimizer, plain_optimizer))
    assert ours.keys() == theirs.keys(), what
    assert_close(ours, theirs, f"{what}: optimizer state in plain torch")

    resumed = {}
    for shard in ("whole", "sharded"):
        fresh = net(seed=9)
        again = boosted(kind, world_size, fresh, torch_optimizer(name, fresh, lr=7.0), sharding=sharding)
        suffix = ".pt" if shard == "whole" else ""
        again[0].load_model(again[1], str(place / f"model{suffix}"))
        again[0].load_optimizer(again[2], str(place / f"optimizer{suffix}"))
        for key, value in again[1].unwrap().state_dict().items():
            assert torch.equal(value, state[key]), f"{what}: {shard} {key}"
        train(again[1], again[2], world_size, share, again[0].backward, steps=5, seed=2)
        resumed[shard] = again[1].unwrap().state_dict()
    train(model, optimizer, world_size, share, booster.backward, steps=5, seed=2)
    for key, value in model.unwrap().state_dict().items():
        for shard, unbroken in resumed.items():
            if world_size <= 2:
                assert torch.equal(unbroken[key], value), f"{what}: resumed from {shard}: {key}"
    for shard, unbroken in resumed.items():  # sums over more than two ranks depend on DDP's buckets, which it rebuilds
        assert_close(unbroken, model.unwrap().state_dict(), f"{what}: resumed from {shard}")


def check_checkpoints_of_other_plugins(world_size, folder):
    """What FreqCachePlugin wrote, model and optimizer in one directory, loads under HybridParallelPlugin; a damaged one
    changes nothing; the functions of `checkpoint` take boosted models."""
    model = net()
    booster, model, optimizer, _, share = boosted("freqcache", world_size, model, torch_optimizer("Adagrad", model))
    train(model, optimizer, world_size, share, booster.backward, steps=4)
    state, place = model.unwrap().state_dict(), folder / "one"
    booster.save_model(model, str(place), shard=True)
    booster.save_optimizer(optimizer, str(place), shard=True)
    dist.barrier()
    fresh = net(seed=9)
    other = boosted("hybrid", world_size, fresh, torch_optimizer("Adagrad", fresh))
    other[0].load_model(other[1], str(place / "pytorch_model.bin.index.json"))
    other[0].load_optimizer(other[2], str(place / "pytorch_optim.bin.index.json"))
    for key, value in other[1].unwrap().state_dict().items():
        assert torch.equal(value, state[key]), f"under the other plugin: {key}"
    ours, theirs = (tensors_of(each.unwrap().state_dict()["state"]) for each in (optimizer, other[2]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    path = checkpoint.save(folder / "direct", model, optimizer, step=4)
    assert checkpoint.load(path, other[1], other[2]) == 4

    dist.barrier()
    if dist.get_rank() == 0:
        (dense,) = place.glob("pytorch_model*.bin")
        dense.write_bytes(b"broken")
    dist.barrier()
    train(model, optimizer, world_size, share, booster.backward, steps=1, seed=5)
    before = model.unwrap().state_dict()
    with pytest.raises(pickle.UnpicklingError):
        booster.load_model(model, str(place / "pytorch_model.bin.index.json"))
    for key, value in model.unwrap().state_dict().items():
        assert torch.equal(value, before[key]), f"a failed load changed {key}"


class OfTables(nn.Module):
    """A model of one collection; with output="gather" of a dense part, too: the hybrid plugin's DDP wants one."""

    def __init__(self, output):
        super().__init__()
        self.dense = nn.Linear(1, 1) if output == "gather" else None
        self.tables = ParallelFreqAwareEmbeddingBagCollection(SIZES, DIM, num_slots=300, output=output)

    def forward(self, values, offsets):
        return self.tables(values, offsets)


def check_collections_are_saved(world_size, folder):
    """Under both plugins, in one file and sharded, also without a dense part."""
    for kind, output in (("freqcache", "share"), ("hybrid", "gather")):
        for shard_it in (False, True):
            saved = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                booster, model, *_ = boosted(kind, world_size, OfTables(output), None, counts={})
                path = str(folder / f"{kind}{'' if shard_it else '.pt'}")
                if seed == 1:
                    booster.save_model(model, path, shard=shard_it)
                else:
                    booster.load_model(model, path)
                dist.barrier()
                saved.append(model.unwrap().state_dict())
            assert {f"tables.{name}" for name in NAMES} <= set(saved[0])
            assert_close(saved[1], saved[0], f"{kind} {shard_it}")


def check_what_one_rank_does_raises_on_all(world_size):
    """With the hooks in use, too: an edit of the block on one rank is refused by all, in the lookup's own exchange."""
    model = net()
    _, model, *_ = boosted("freqcache", world_size, model, torch_optimizer("SGD", model))
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.unwrap().tables[0].weight.mul_(2)
    ids, _ = next(batches(world_size))
    with pytest.raises(RuntimeError, match="was changed in place"):
        model(ids[:BATCH])


def check_rows_ahead_give_way(world_size):
    """Rows of an announced batch that never comes do not make a larger one fail."""
    model = nn.Sequential(nn.EmbeddingBag(90, DIM, mode="sum"), nn.Linear(DIM, 1))
    row_bytes = -(-DIM // world_size) * 4
    first, second = (torch.arange(n * 20, n * 20 + 20).view(10, 2) for n in range(2))
    large = torch.arange(40, 80).view(20, 2)  # alone it fits
    loader = [first, second]
    plugin = FreqCachePlugin(section(max_cache_bytes=40 * row_bytes), ids=lambda batch: batch)
    booster = Booster(plugin=plugin)
    model, _, _, loader, _ = booster.boost(model, dataloader=loader)
    table, coming = model.unwrap()[0], iter(loader)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the rows of the next batch do not fit")
        model(next(coming))
        assert table._cache.ahead.num_admitted == 1
        model(large)
        assert table._cache.ahead.num_admitted == 0


def run_plugins(rank, world_size, port, folder):
    enter(rank, world_size, port)
    with quiet():
        check_boosted_is_unboosted(world_size=world_size, folder=folder)
        check_checkpoints_of_other_plugins(world_size, folder)
        check_collections_are_saved(world_size, folder)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@rerun_if_address_is_in_use()
def test_boosted_is_unboosted(world_size, tmp_path):
    spawn(run_plugins, nprocs=world_size, folder=tmp_path)


# ---- FreqCachePlugin ------------------------------------------------------------------------------------------------


@parameterize("kind", ["freqcache", "hybrid"])
def check_clipping(kind, world_size):
    """The norm over dense parameters and the tables of all ranks, and what it does, as torch's on dense gradients."""
    plain = net(sparse=False)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = net()
    booster, model, optimizer, _, share = boosted(kind, world_size, model, torch_optimizer("SGD", model))
    for number, (ids, labels) in enumerate(batches(world_size, 6)):
        loss_of(plain, ids, labels).backward()
        booster.backward(loss_of(model, ids[share], labels[share]), optimizer)
        if number % 2:
            expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
            norm = optimizer.clip_grad_by_norm(0.05)
            assert torch.allclose(norm, expected, rtol=1e-5), f"norm {norm}, torch's {expected}"
            assert expected > 0.05, "nothing was clipped"
        else:
            nn.utils.clip_grad_value_(plain.parameters(), 0.01)
            optimizer.clip_grad_by_value(0.01)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad()
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "clipping")


def check_clipping_in_the_step(world_size):
    """HybridParallelPlugin's max_norm: what torch's clip_grad_norm_ before each step does."""
    plain = net(sparse=False)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = net()
    policy = FreqCachePolicy(section(num_slots=budget(world_size)), counts=COUNTS)
    plugin = HybridParallelPlugin(tp_size=world_size, pp_size=1, precision="fp32", max_norm=0.05, custom_policy=policy)
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, torch_optimizer("SGD", model))
    for ids, labels in batches(world_size, 6):
        loss_of(plain, ids, labels).backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        booster.backward(loss_of(model, ids, labels), optimizer)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad()
        assert optimizer.get_grad_norm() == pytest.approx(float(expected), rel=1e-5) and expected > 0.05
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "max_norm")


def check_accumulation(world_size):
    """Two micro-batches under no_sync and one outside: the sum of three gradients, dense and tables alike."""
    plain = net()
    plain_optimizer = torch_optimizer("Adagrad", plain)
    model = net()
    optimizer = torch_optimizer("Adagrad", model)
    booster, model, optimizer, _, share = boosted("freqcache", world_size, model, optimizer, num_batches=3)
    for step in range(4):
        micro = list(batches(world_size, 3, seed=10 + step))
        for number, (ids, labels) in enumerate(micro):
            loss_of(plain, ids, labels).backward()
            with booster.no_sync(model, optimizer) if number < 2 else contextlib.nullcontext():
                booster.backward(loss_of(model, ids[share], labels[share]), optimizer)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad()
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "accumulation")


def check_loader(world_size):
    """The loader looks ahead: no lookup finds a row missing, and nothing else changes."""
    states = {}
    for ids_function in (None, lambda batch: {f"tables.{t}": batch[0][:, t] for t in range(len(SIZES))}):
        model = net()
        share = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
        loader = [(ids[share], labels[share]) for ids, labels in batches(world_size)]
        config = dict(num_slots=budget(world_size, 2))
        plugin = FreqCachePlugin(section(**config), ids=ids_function, counts=COUNTS)
        booster = Booster(plugin=plugin)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, optimizer, _, boosted_loader, _ = booster.boost(
                model, torch_optimizer("Adagrad", model), dataloader=loader
            )
        said = [str(each.message) for each in caught if "has no `ids` function" in str(each.message)]
        assert len(said) == (ids_function is None) and len(boosted_loader) == STEPS
        seen = missed = 0
        for ids, labels in boosted_loader:
            assert torch.equal(ids, loader[seen][0])
            seen += 1
            before = [table.stats.misses_unique for table in model.unwrap().tables]
            booster.backward(loss_of(model, ids, labels), optimizer)
            missed += [table.stats.misses_unique for table in model.unwrap().tables] != before
            optimizer.step()
            optimizer.zero_grad()
        assert seen == STEPS
        states[ids_function is None] = model.unwrap().state_dict()
        assert missed > 0 if ids_function is None else missed == 0
        assert sum(table.stats.rows_fetched for table in model.unwrap().tables) > 0
        if ids_function is not None:
            with pytest.raises(ValueError, match="names 'nowhere'; the table modules are"):
                boosted_loader._ids = lambda batch: {"nowhere": batch[0]}
                next(iter(boosted_loader))
    for key in states[True]:
        assert torch.equal(states[True][key], states[False][key]), f"lookahead changed {key}"


def check_a_small_cache_is_not_filled_ahead(world_size):
    model = net()
    share = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    loader = [(ids[share], labels[share]) for ids, labels in batches(world_size)]
    row_bytes = -(-DIM // world_size) * 4 * 2
    config = dict(max_cache_bytes=budget(world_size) * row_bytes, optimizer="adagrad")
    ids_function = lambda batch: {f"tables.{t}": batch[0][:, t] for t in range(len(SIZES))}  # noqa: E731
    booster = Booster(plugin=FreqCachePlugin(section(**config), ids=ids_function, counts=COUNTS))
    model, optimizer, _, loader, _ = booster.boost(model, torch_optimizer("Adagrad", model), dataloader=loader)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ids, labels in loader:
            booster.backward(loss_of(model, ids, labels), optimizer)
            optimizer.step()
            optimizer.zero_grad()
    said = sum("rows of the next batch do not fit beside those in use" in str(each.message) for each in caught)
    assert 1 <= said <= len(SIZES), "once per cache"
    plain = net()
    train(plain, torch_optimizer("Adagrad", plain), world_size)
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "no room ahead")


def check_optimizers(world_size):
    """Without a row rule: refused before the swap, naming those that have one. State that is there moves in."""
    model = net()
    with pytest.raises(ValueError, match=r"AdamW has no exact row rule.*optim.Adam.*torch.optim.SGD"):
        boosted("freqcache", world_size, model, torch.optim.AdamW(model.parameters()))
    assert type(model.tables[0]) is nn.EmbeddingBag
    with pytest.raises(ValueError, match="momentum=0.9.*would move rows"):
        boosted("freqcache", world_size, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert all(type(table) is nn.EmbeddingBag for table in model.tables), "refused, and swapped all the same"
    for name in ("Adagrad", "RowWiseAdagrad", "Adam"):
        model = net()
        optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
        boosted("freqcache", world_size, model, optimizer)
        for table in model.tables:
            state = optimizer.state.get(table.weight, {})
            assert not any(value.dim() for value in state.values() if torch.is_tensor(value)), "full-size state stayed"

    plain = net()
    plain_optimizer = torch_optimizer("Adagrad", plain)
    train(plain, plain_optimizer, world_size, steps=4)
    model = net()
    optimizer = torch_optimizer("Adagrad", model)
    train(model, optimizer, world_size, steps=4)  # unboosted, on all ranks alike
    optimizer.zero_grad()
    booster, model, optimizer, _, share = boosted("freqcache", world_size, model, optimizer)
    train(plain, plain_optimizer, world_size, steps=6, seed=3)
    train(model, optimizer, world_size, share, booster.backward, steps=6, seed=3)
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "boosted after 4 steps")


def check_scheduler(world_size):
    """A scheduler over the user's optimizer acts on rows and dense parameters."""
    plain = net()
    plain_optimizer = torch_optimizer("SGD", plain)
    model = net()
    user_optimizer = torch_optimizer("SGD", model)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (plain_optimizer, user_optimizer)]
    _, model, optimizer, _, share = boosted("freqcache", world_size, model, user_optimizer)
    for ids, labels in batches(world_size, 6):
        for each, which in ((plain, slice(None)), (model, share)):
            loss_of(each, ids[which], labels[which]).backward()
        for each in (plain_optimizer, optimizer, *schedulers):
            each.step()
        plain_optimizer.zero_grad()
        optimizer.zero_grad()
    assert_close(model.unwrap().state_dict(), plain.state_dict(), "scheduler")


def check_modules_that_are_there(world_size):
    """A parallel collection in the model is used as it is; an unsharded bag on several ranks is refused."""

    class Shared(nn.Module):
        def __init__(self, tables):
            super().__init__()
            self.embedding = tables
            self.top = nn.Linear(DIM * len(SIZES), 1)

        def forward(self, ids):
            flat = ids.permute(1, 0, 2).reshape(-1)
            out = self.embedding(flat, torch.arange(0, flat.numel(), 2))
            return self.top(out.flatten(1)).squeeze(1)

    torch.manual_seed(0)
    tables = ParallelFreqAwareEmbeddingBagCollection(SIZES, DIM, num_slots=200, sharding="table")
    model = Shared(tables)
    config = dict(freq_cache=dict(num_slots=9, window=0))
    booster = Booster(plugin=FreqCachePlugin(config))
    model, optimizer, *_ = booster.boost(model, torch_optimizer("Adagrad", model))
    assert model.unwrap().embedding is tables
    share = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    train(model, optimizer, world_size, share, booster.backward, steps=3)
    if world_size > 1:
        alone = Shared(FreqAwareEmbeddingBag(9, DIM, num_slots=3))
        with pytest.raises(ValueError, match=f"embedding is a FreqAwareEmbeddingBag shared by 1 of {world_size} ranks"):
            Booster(plugin=FreqCachePlugin(config)).boost(alone)
        other = Shared(ParallelFreqAwareEmbeddingBagCollection(SIZES, DIM, num_slots=200, output="gather"))
        with pytest.raises(ValueError, match="output='gather', which would train apart"):
            Booster(plugin=FreqCachePlugin(config)).boost(other)


def run_freqcache_plugin(rank, world_size, port):
    enter(rank, world_size, port)
    with quiet():
        check_clipping(world_size=world_size)
        check_clipping_in_the_step(world_size)
        check_accumulation(world_size)
        check_loader(world_size)
        check_a_small_cache_is_not_filled_ahead(world_size)
        check_optimizers(world_size)
        check_scheduler(world_size)
        check_what_one_rank_does_raises_on_all(world_size)
        check_rows_ahead_give_way(world_size)
        check_modules_that_are_there(world_size)
    dist.barrier()


@pytest.mark.parametrize("world_size", [2])
@rerun_if_address_is_in_use()
def test_freqcache_plugin(world_size):
    spawn(run_freqcache_plugin, nprocs=world_size)


# ---- the policy -----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Tables in a ModuleDict, a ModuleList, a child's attribute; one small, one tied if asked."""

    def __init__(self, tied=False):
        super().__init__()
        self.by_name = nn.ModuleDict({"user": nn.EmbeddingBag(40, 4), "item": nn.EmbeddingBag(50, 4)})
        self.listed = nn.ModuleList([nn.EmbeddingBag(3, 4), nn.Linear(4, 4)])
        self.tower = nn.Sequential(nn.Identity(), nn.Sequential(nn.EmbeddingBag(60, 4)))
        if tied:
            self.decoder = nn.Linear(4, 40, bias=False)
            self.decoder.weight = self.by_name["user"].weight


def shard(model, policy):
    return ShardFormer(ShardConfig(tensor_parallel_process_group=dist.group.WORLD)).optimize(model, policy)[0]


def check_which_tables_are_swapped():
    swapped = cached_modules(shard(Nested(), FreqCachePolicy(section(num_slots=4))))
    assert list(swapped) == ["by_name.user", "by_name.item", "listed.0", "tower.1.0"]
    swapped = cached_modules(shard(Nested(), FreqCachePolicy(section(num_slots=9), min_rows=10)))
    assert list(swapped) == ["by_name.user", "by_name.item", "tower.1.0"]
    swapped = cached_modules(shard(Nested(), FreqCachePolicy(section(num_slots=9), pattern=["by_name.*", "nothing"])))
    assert list(swapped) == ["by_name.user", "by_name.item"]


def check_models_of_any_shape():
    """A table under two names, the root's class again below it, a frozen table: each swapped once, and right."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.EmbeddingBag(30, 8, mode="sum")
            self.b = self.a
            self.frozen = nn.EmbeddingBag(20, 8, mode="sum")
            self.frozen.weight.requires_grad_(False)

        def forward(self, ids):
            return self.a(ids) + 2 * self.b(ids + 10) + self.frozen(ids)

    ids = torch.tensor([[1, 2], [3, 4]])
    for make in (
        Twice,
        lambda: nn.Sequential(nn.EmbeddingBag(30, 8, mode="sum"), nn.Sequential(nn.Linear(8, 2), nn.Tanh())),
        lambda: nn.Sequential(nn.Sequential(nn.EmbeddingBag(30, 8, mode="sum"), nn.Tanh()), nn.Linear(8, 2)),
    ):
        torch.manual_seed(0)
        native, model = make(), None
        torch.manual_seed(0)
        model = shard(make(), FreqCachePolicy(section(cache_ratio=0.5)))
        assert not any(type(module) is nn.EmbeddingBag for _, module in model.named_modules(remove_duplicate=False))
        for each in (native, model):
            each(ids).square().sum().backward()
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
        assert_close(model.state_dict(), native.state_dict(), str(type(native)))
        torch.testing.assert_close(model(ids), native(ids))


def check_a_refused_swap_changes_nothing(world_size):
    """What the last table has wrong is seen before the first is swapped."""

    def wrong(change):
        model = Net()
        change(model.tables[2])
        return model

    def give_gradient(table):
        table(torch.tensor([[1]])).sum().backward()

    def hook(table):
        table.register_forward_hook(lambda module, args, out: 2 * out)

    cases = [(wrong(give_gradient), "tables.2.weight has a gradient"), (wrong(hook), "tables.2 has _forward_hooks")]
    narrow = Net()
    narrow.tables[2] = nn.EmbeddingBag(9, 1)
    cases += [(narrow, f"tables.2 has 1 columns for {world_size} ranks")] if world_size > 1 else []
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            shard(model, FreqCachePolicy(section(num_slots=50)))
        assert all(type(table) is nn.EmbeddingBag for table in model.tables)


def check_a_copy_gathers_its_own_table():
    bag = ParallelFreqAwareEmbeddingBag(40, DIM, num_slots=9)
    twin = copy.deepcopy(bag)
    bag.init_(lambda values: values.zero_())
    assert torch.equal(gather_distributed_param(twin.weight), twin.logical_weight())
    assert twin.logical_weight().abs().sum() > 0 and bag.logical_weight().abs().sum() == 0


def check_budget_is_divided():
    """By counts where all tables have them, else by rows; no table gets more than its rows, or nothing."""
    counts = {
        "by_name.user": torch.ones(40),
        "by_name.item": torch.full((50,), 9),
        "listed.0": [1, 1, 1],
        "tower.1.0": torch.zeros(60),
    }
    swapped = cached_modules(shard(Nested(), FreqCachePolicy(section(num_slots=30), counts=counts)))
    sizes = {name: module.num_slots for name, module in swapped.items()}
    assert sum(sizes.values()) <= 30 and min(sizes.values()) >= 1
    assert sizes["by_name.item"] > 4 * sizes["by_name.user"] and sizes["tower.1.0"] == 1
    swapped = cached_modules(shard(Nested(), FreqCachePolicy(section(max_cache_bytes=1000))))
    assert sum(module.device_bytes()["cache"] for module in swapped.values()) <= 1000
    policy = FreqCachePolicy(section(num_slots=3))
    with pytest.raises(ValueError, match="a budget of 3 does not hold one row of each of 4 tables"):
        policy.options(policy.tables(Nested()), 1)


def check_models_that_cannot_be_swapped():
    for model, policy, message in (
        (Nested(tied=True), FreqCachePolicy(section()), "by_name.user.weight is shared by 2 modules"),
        (nn.EmbeddingBag(9, 4), FreqCachePolicy(section()), "a bare nn.EmbeddingBag"),
        (nn.Sequential(nn.Linear(2, 2)), FreqCachePolicy(section()), "no nn.EmbeddingBag in the model"),
        (Nested(), FreqCachePolicy(section(), min_rows=100), "no nn.EmbeddingBag of at least 100 rows"),
        (Nested(), FreqCachePolicy(section(), counts={"user": [1]}), r"counts for \['user'\], but the tables are"),
        (nn.Sequential(nn.EmbeddingBag(9, 4).half()), FreqCachePolicy(section()), "torch.float16: rows are float32"),
        (Nested(), FreqCachePolicy(section(sharding="table")), '"column" or "row"'),
    ):
        with pytest.raises(ValueError, match=message):
            shard(model, policy)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="inside DistributedDataParallel already"):
        shard(nn.Sequential(wrapped), FreqCachePolicy(section()))
    with pytest.raises(ValueError, match="unknown 'cache_rate'"):
        FreqCachePolicy(section(cache_rate=0.1))


def check_layouts_that_are_refused(world_size):
    if world_size > 1:
        plugin = HybridParallelPlugin(tp_size=1, pp_size=1, precision="fp32", custom_policy=FreqCachePolicy(section()))
        with pytest.raises(ValueError, match=f"over 1 of {world_size} ranks would give each of {world_size} groups"):
            Booster(plugin=plugin).boost(net())
    for precision in ("fp16", "bf16"):
        plugin = HybridParallelPlugin(
            tp_size=world_size, pp_size=1, precision=precision, custom_policy=FreqCachePolicy(section(num_slots=20))
        )
        with pytest.raises(TypeError, match="a cached table cannot be cast from torch.float32"):
            Booster(plugin=plugin).boost(net())


def run_policy(rank, world_size, port):
    enter(rank, world_size, port)
    with quiet():
        check_which_tables_are_swapped()
        check_models_of_any_shape()
        check_a_refused_swap_changes_nothing(world_size)
        check_a_copy_gathers_its_own_table()
        check_budget_is_divided()
        check_models_that_cannot_be_swapped()
        check_layouts_that_are_refused(world_size)
    dist.barrier()


@pytest.mark.parametrize("world_size", [2])
@rerun_if_address_is_in_use()
def test_policy(world_size):
    spawn(run_policy, nprocs=world_size)


@pytest.mark.parametrize(
    ("budget", "rows", "weights", "expected"),
    [
        (10, [100, 100], [1, 1], [5, 5]),
        (10, [2, 100], [1000, 1], [2, 8]),
        (10, [100, 100], [1, 0], [9, 1]),
        (300, [100, 100], [1, 1], [100, 100]),
        (3, [5, 5, 5], [9, 1, 1], [1, 1, 1]),
        (8, [5, 1], [0, 0], [5, 1]),
    ],
)
def test_slots_are_divided(budget, rows, weights, expected):
    assert divide_slots(budget, rows, weights) == expected
