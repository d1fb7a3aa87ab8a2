"""The names of Colossal-AI's earlier embedding cache, as its examples use them. `pytest tests/test_compat.py`

Proves: an old-style script (constructor, keywords, forward, prefetch with set_cache_op, statistics), in one process and
on two ranks, trains with evictions on most steps what nn.EmbeddingBag trains; with counts and pretrained weights every
id finds its own row; statistics never fail; state_dict is the whole table; bad input is named. Workers of two ranks run
the `rank_…` functions, each against nn.EmbeddingBag over the whole batch.
"""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from worlds import DIM, FEW_SLOTS, NUM_ROWS, assert_same_bits, counts, loss_of, make_bag, skewed_ids

from colossal_freqcache import CacheTooSmallError, compat, optim
from colossal_freqcache.compat import (
    CachedEmbeddingBag,
    CachedParamMgr,
    EvictionStrategy,
    ParallelCachedEmbeddingBag,
    ParallelCachedEmbeddingBagTablewise,
    TablewiseEmbeddingBagConfig,
)

RATIO = FEW_SLOTS / NUM_ROWS
STEPS = 60
OPTIMIZERS = {
    "torch SGD": torch.optim.SGD,
    "torch Adagrad": torch.optim.Adagrad,
    "torch SparseAdam": torch.optim.SparseAdam,
    "SGD": optim.SGD,
    "Adagrad": optim.Adagrad,
}
REFERENCES = {**OPTIMIZERS, "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad}


def old_bag(seed=0, **options):
    """A module as an old script builds it; the cache holds one row more than a batch needs, and must not grow."""
    torch.manual_seed(seed)
    options = {"cache_ratio": RATIO, "mode": "sum", "sparse": True, **options}
    return CachedEmbeddingBag(NUM_ROWS, DIM, **options)


def ragged_batch(generator, num_bags=8, most=3, num_rows=NUM_ROWS):
    """(ids, offsets) of bags of 0..most ids."""
    lengths = torch.randint(0, most + 1, (num_bags,), generator=generator)
    ids = skewed_ids(generator, (int(lengths.sum()),), num_rows)
    return ids, lengths.cumsum(0) - lengths


def plain_bag(table, **options):
    return nn.EmbeddingBag(*table.shape, _weight=table.clone(), **{"mode": "sum", "sparse": True, **options})


# ---- the old script, one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", EvictionStrategy)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_script_trains_what_embedding_bag_trains(name, strategy):
    """Ragged bags, 60 steps: outputs and table are nn.EmbeddingBag's within rounding, and our bag's bit for bit."""
    old = old_bag(evict_strategy=strategy, ids_freq_mapping=counts().tolist(), buffer_size=0, pin_weight=False)
    new = make_bag(_weight=old.weight)
    plain = plain_bag(old.weight)
    models = [old, new, plain]
    optimizers = [OPTIMIZERS[name](old.parameters(), lr=0.05), OPTIMIZERS[name](new.parameters(), lr=0.05)]
    optimizers.append(REFERENCES[name](plain.parameters(), lr=0.05))
    generator = torch.Generator().manual_seed(1)
    evicting_steps = evictions = 0
    for _ in range(STEPS):
        ids, offsets = ragged_batch(generator)
        outs = [model(ids, offsets) for model in models]
        for out, optimizer in zip(outs, optimizers, strict=True):
            loss_of(out).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(outs[0], outs[1])
        torch.testing.assert_close(outs[0], outs[2])
        evicting_steps += old.bag.stats.evictions > evictions
        evictions = old.bag.stats.evictions
    assert evicting_steps > 0.8 * STEPS and old.cache_weight_mgr.cuda_row_num == FEW_SLOTS
    assert_same_bits([old.weight], [new.logical_weight()])
    torch.testing.assert_close(old.weight, plain.weight.detach())
    old.bag._cache.check()


@pytest.mark.colossalai
@pytest.mark.parametrize("strategy", EvictionStrategy)
def test_the_old_class_gives_the_same(strategy, monkeypatch):
    """colossalai's own class, its CUDA calls replaced by the CPU's: first weights, SGD training, rows per batch."""
    pytest.importorskip("colossalai", reason="compares with colossalai's own class")
    for name in ("cuda", "pin_memory"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    from colossalai.legacy.nn.parallel.layers import cache_embedding

    bags = []
    for module in (cache_embedding, compat):
        torch.manual_seed(0)
        strategy_of_module = module.EvictionStrategy[strategy.name]
        bags.append(
            module.CachedEmbeddingBag(
                NUM_ROWS, DIM, sparse=True, mode="sum", cache_ratio=RATIO, evict_strategy=strategy_of_module
            )
        )
    assert torch.equal(bags[0].weight, bags[1].weight)
    optimizers = [torch.optim.SGD(bag.parameters(), lr=0.1) for bag in bags]
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids, offsets = ragged_batch(generator)
        outs = [bag(ids, offsets) for bag in bags]
        torch.testing.assert_close(*outs)
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(out).backward()
            optimizer.step()
    rows = [np.add(bag.num_hits_history, bag.num_miss_history).tolist() for bag in bags]
    assert rows[0] == rows[1] and bags[1].bag.stats.evictions > STEPS
    prepared = [bag.cache_weight_mgr.prepare_ids(ids) for bag in bags]
    torch.testing.assert_close(
        *(bag.cache_weight_mgr.cuda_cached_weight[slots] for bag, slots in zip(bags, prepared, strict=True))
    )
    assert prepared[0].shape == prepared[1].shape and prepared[0].dtype == prepared[1].dtype
    for bag in bags:
        bag.cache_weight_mgr.flush()
    torch.testing.assert_close(bags[0].weight, bags[1].weight)


def test_first_weights_are_the_old_ones():
    """Uniform in -1/R..1/R from the same seed, in one draw over the table; padding is zero."""
    torch.manual_seed(5)
    bag = CachedEmbeddingBag(300, 6, padding_idx=-1, cache_ratio=0.1)
    after = torch.rand(1)
    torch.manual_seed(5)
    expected = torch.empty(300, 6).uniform_(-1 / 300, 1 / 300)
    assert torch.equal(after, torch.rand(1))
    expected[299] = 0
    assert torch.equal(bag.weight, expected) and bag.padding_idx == 299


@pytest.mark.parametrize("strategy", EvictionStrategy)
def test_every_id_finds_its_own_row(strategy):
    """Counts that order the rows unlike the ids, and a pretrained table: id i gives row i, resident or not."""
    table = torch.arange(NUM_ROWS * DIM, dtype=torch.float32).view(NUM_ROWS, DIM)
    bag = old_bag(_weight=table, ids_freq_mapping=torch.from_numpy(counts()), evict_strategy=strategy)
    for ids in torch.randperm(NUM_ROWS).split(20):
        assert torch.equal(bag(ids, torch.arange(len(ids))), table[ids])
    manager = bag.cache_weight_mgr
    ids = torch.tensor([199, 3, 3, 77])
    slots = manager.prepare_ids(ids)
    assert torch.equal(manager.cuda_cached_weight[slots], table[ids])
    assert torch.equal(manager.inverted_cached_idx[manager.idx_map[ids]], slots)
    assert torch.equal(manager.cached_idx_map[slots], manager.idx_map[ids])
    assert torch.equal(bag.weight, table) and torch.equal(manager.cpu_weight_data(7), table[7:8])
    assert torch.equal(manager.idx_map.sort().values, torch.arange(NUM_ROWS))


@pytest.mark.parametrize("options", [dict(mode="mean"), dict(mode="max", sparse=False), dict(max_norm=0.3)])
def test_arguments_mean_what_they_mean_in_embedding_bag(options):
    """mode, max_norm, include_last_offset, padding by id, 2-D input, int32, shape_hook."""
    table = torch.randn(NUM_ROWS, DIM)
    options = {"padding_idx": 4, "include_last_offset": True, **options}
    old, plain = old_bag(_weight=table, **options), plain_bag(table, **options)
    ids, offsets = torch.tensor([4, 9, 4, 150, 9]), torch.tensor([0, 2, 2, 5])
    torch.testing.assert_close(old(ids.int(), offsets.int()), plain(ids, offsets))
    torch.testing.assert_close(old(ids.view(1, 5)), plain(ids, torch.tensor([0, 5])))
    hooked = old(ids, offsets, shape_hook=lambda out: out.view(3, 2, -1).transpose(0, 1))
    torch.testing.assert_close(hooked, plain(ids, offsets).view(3, 2, -1).transpose(0, 1))


def test_weights_of_samples():
    table, weights = torch.randn(NUM_ROWS, DIM), torch.rand(6).requires_grad_()
    old, plain = old_bag(_weight=table), plain_bag(table, sparse=False)
    ids, offsets = torch.tensor([1, 2, 3, 1, 1, 0]), torch.tensor([0, 3])
    grads = [torch.autograd.grad(model(ids, offsets, weights).square().sum(), weights)[0] for model in (old, plain)]
    torch.testing.assert_close(*grads)


# ---- prefetch: prepare_ids of many batches, then forwards that take slots -------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_prepared_batches_train_what_embedding_bag_trains(padding_idx):
    """12 groups of 4 ragged batches, with an evaluation of other ids, which evicts, in the middle of each group."""
    table = torch.randn(NUM_ROWS, DIM)
    bag = old_bag(_weight=table, padding_idx=padding_idx, cache_ratio=64 / NUM_ROWS)
    plain = plain_bag(table, padding_idx=padding_idx)
    optimizers = [optim.Adagrad(bag.parameters(), lr=0.05), torch.optim.Adagrad(plain.parameters(), lr=0.05)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        batches = [ragged_batch(generator) for _ in range(4)]
        slots = bag.cache_weight_mgr.prepare_ids(torch.cat([ids for ids, _ in batches]))
        bag.set_cache_op(False)
        for number, ((ids, offsets), own) in enumerate(
            zip(batches, slots.split([len(ids) for ids, _ in batches]), strict=True)
        ):
            outs = [bag(own, offsets), plain(ids, offsets)]
            torch.testing.assert_close(*outs)
            for out, optimizer in zip(outs, optimizers, strict=True):
                loss_of(out).backward()
                optimizer.step()
                optimizer.zero_grad()
            if number == 1:
                bag.set_cache_op(True)
                with torch.no_grad():
                    others = torch.randint(1, NUM_ROWS, (8, 4), generator=generator)
                    torch.testing.assert_close(bag(others), plain(others))
                bag.set_cache_op(False)
    assert bag.bag.stats.evictions > 12 * 20
    assert len(bag.num_miss_history) == 2 * 12  # prepare_ids and the evaluations; not the forwards over slots
    torch.testing.assert_close(bag.weight, plain.weight.detach())
    bag.bag._cache.check()


def test_prepared_rows_stay_until_they_are_used():
    """Later batches that need every other slot push out each other's rows, and none of the prepared ones."""
    bag = old_bag()
    prepared = torch.arange(10)
    slots = bag.cache_weight_mgr.prepare_ids(prepared)
    bag(torch.arange(100, 115).view(1, -1))
    bag(torch.arange(120, 135).view(1, -1))
    assert torch.equal(bag.cache_weight_mgr.cached_idx_map[slots], prepared)
    bag.set_cache_op(False)
    assert torch.equal(bag(slots, torch.arange(10)), bag.weight[:10])
    assert bag.bag.stats.misses_unique == 40 and bag.bag.stats.evictions == 15


def test_prepared_row_that_was_pushed_out_after_its_first_use_comes_back():
    """Rows 0..4 are used by the first of two prepared batches, trained, and evicted before the second names them."""
    bag = old_bag()
    before = bag.weight
    optimizer = optim.SGD(bag.parameters(), lr=1.0)
    slots = bag.cache_weight_mgr.prepare_ids(torch.arange(10))
    bag.set_cache_op(False)
    bag(slots[:5], torch.arange(5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    bag.set_cache_op(True)
    bag(torch.arange(100, 120).view(1, -1))
    assert not torch.isin(torch.arange(5), bag.cache_weight_mgr.cached_idx_map).any()
    bag.set_cache_op(False)
    assert torch.equal(bag(slots, torch.arange(10)), torch.cat([-before[:5], before[5:10]]))


def test_prepare_ids_keeps_shape_and_refuses_what_it_did_not_return():
    bag = old_bag(ids_freq_mapping=counts())
    manager = bag.cache_weight_mgr
    bag.set_cache_op(False)
    with pytest.raises(ValueError, match=r"slot 3 at position 0 is not among the 0 that"):
        bag(torch.tensor([3]), torch.tensor([0]))
    slots = manager.prepare_ids(torch.tensor([[150, 151, 150]], dtype=torch.int32))
    assert slots.shape == (1, 3) and slots.dtype == torch.int64 and slots[0, 0] == slots[0, 2]
    assert torch.equal(bag(slots)[0], bag.weight[[150, 151, 150]].sum(0))
    for wrong in (150, -1, NUM_ROWS + 7, 10**12):
        with pytest.raises(ValueError, match=rf"slot {wrong} at position 1 .*set_cache_op\(True\)"):
            bag(torch.tensor([[int(slots[0, 0]), wrong]]))
    manager.prepare_ids(torch.tensor([9]))
    with pytest.raises(ValueError, match=r"is not among the 1 that"):
        bag(slots[:, 1:2] if int(slots[0, 1]) != int(manager.prepare_ids(torch.tensor([9]))) else slots[:, :1])
    assert manager.prepare_ids(torch.empty(0, dtype=torch.int64)).numel() == 0


# ---- statistics -----------------------------------------------------------------------------------------------------


def read_statistics(bag, capsys):
    """Everything that an old script prints; none of it may raise."""
    for module in (bag, bag.cache_weight_mgr):
        numbers = [*module.num_hits_history, *module.num_miss_history, *module.num_write_back_history]
        assert all(isinstance(number, int) for number in numbers)
        assert module.swap_in_bandwidth >= 0 and module.swap_out_bandwidth >= 0
    bag.print_comm_stats_()
    bag.cache_weight_mgr.print_comm_stats()
    assert capsys.readouterr().out.count("cache miss ratio") == 2
    return sum(bag.num_hits_history), sum(bag.num_miss_history), sum(bag.num_write_back_history)


def test_statistics_at_any_time(capsys):
    """Before the first step, after one, after a flush: right and without an error. A flush keeps the cache warm."""
    bag = old_bag()
    assert read_statistics(bag, capsys) == (0, 0, 0) and bag.swap_in_bandwidth == 0
    bag.cache_weight_mgr.flush()
    assert read_statistics(bag, capsys) == (0, 0, 0)
    bag(torch.tensor([[1, 1, 2], [3, 1, 3]])).sum().backward()
    assert read_statistics(bag, capsys) == (0, 3, 0)
    optim.SGD(bag.parameters(), lr=1.0).step()
    bag.cache_weight_mgr.flush()
    assert read_statistics(bag, capsys) == (0, 3, 0) and bag.swap_in_bandwidth > 0
    bag(torch.tensor([[1, 2, 9]]))
    assert list(bag.num_hits_history) == [0, 2] and list(bag.num_miss_history) == [3, 1]


def test_histories_count_distinct_rows_and_real_write_backs():
    """Against sets in Python; padding is no row. The rows written back are the trained ones that were pushed out."""
    bag = old_bag(padding_idx=5, max_norm=2.0)
    optimizer = optim.SGD(bag.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    manager = bag.cache_weight_mgr
    for _ in range(30):
        resident = set(manager.cached_idx_map.tolist()) - {-1}
        ids = skewed_ids(generator)
        written_back = bag.bag.stats.rows_written_back
        bag(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = set(ids.reshape(-1).tolist()) - {5}
        assert bag.num_hits_history[-1] == len(rows & resident)
        assert bag.num_miss_history[-1] == len(rows - resident)
        assert bag.num_write_back_history[-1] == bag.bag.stats.rows_written_back - written_back
    assert sum(bag.num_write_back_history) > 30 and len(bag.num_hits_history) == 30


def test_histories_are_bounded(monkeypatch):
    monkeypatch.setattr(compat, "HISTORY_LENGTH", 5)
    bag = old_bag()
    for _ in range(8):
        bag(torch.tensor([[1]]))
    assert len(bag.num_hits_history) == len(bag.num_miss_history) == len(bag.num_write_back_history) == 5
    assert np.mean(bag.num_hits_history) == 1.0


def test_sizes():
    bag = old_bag(dtype=torch.float64)
    manager = bag.cache_weight_mgr
    assert bag.element_size() == manager.elem_size_in_byte == 8
    assert (manager.num_embeddings, manager.embedding_dim) == (bag.num_embeddings, bag.embedding_dim) == (NUM_ROWS, DIM)
    assert manager.cuda_row_num == manager.cuda_available_row_num == FEW_SLOTS
    bag(torch.tensor([[1, 2]]))
    assert manager.cuda_available_row_num == FEW_SLOTS - 2 and (manager.cached_idx_map >= 0).sum() == 2


# ---- as an nn.Module ------------------------------------------------------------------------------------------------


def test_state_dict_is_the_table_under_its_old_users_key():
    """In a model: one key, "emb.weight", the newest values; it loads into nn.EmbeddingBag and back."""
    bag = old_bag()
    model = nn.ModuleDict({"emb": bag, "top": nn.Linear(DIM, 1)})
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    for first in range(0, 160, 20):
        model["top"](bag(torch.arange(first, first + 20).view(4, 5))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bag.bag.stats.evictions > 0
    state = model.state_dict()
    assert list(state) == ["emb.weight", "top.weight", "top.bias"]
    assert torch.equal(state["emb.weight"], bag.weight) and state["emb.weight"].shape == (NUM_ROWS, DIM)
    plain_bag(torch.zeros(NUM_ROWS, DIM)).load_state_dict(bag.state_dict())
    other = nn.ModuleDict({"emb": old_bag(seed=1), "top": nn.Linear(DIM, 1)})
    other.load_state_dict(state)
    assert torch.equal(other["emb"].weight, bag.weight)
    assert len(state) == 3  # torch hands a copy to the hooks
    assert [name for name, _ in bag.named_parameters()] == ["weight"]
    assert [parameter is bag.bag.weight for parameter in bag.parameters()] == [True]


def test_state_dict_errors_name_the_users_keys():
    model = nn.ModuleDict({"emb": old_bag()})
    missing = r'Missing key\(s\) in state_dict: "emb.weight"'
    with pytest.raises(RuntimeError, match=missing + r'. \s*Unexpected key\(s\) in state_dict: "emb.other"'):
        model.load_state_dict({"emb.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for emb.weight: found \(3, 8\)"):
        model.load_state_dict({"emb.weight": torch.zeros(3, DIM)})
    result = model.load_state_dict({"emb.other": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys in ([], ["emb.other"])


def test_copy_is_independent():
    bag = old_bag()
    bag(torch.tensor([[1, 2]]))
    other = copy.deepcopy(bag)
    assert torch.equal(other.weight, bag.weight) and other.cache_weight_mgr._bag is other.bag
    other(torch.tensor([[1, 2]])).sum().backward()
    optim.SGD(other.parameters(), lr=1.0).step()
    assert not torch.equal(other.weight, bag.weight) and bag.bag.weight.grad is None
    assert list(other.state_dict()) == ["weight"]


@pytest.mark.parametrize("cls", [CachedEmbeddingBag, ParallelCachedEmbeddingBag])
def test_from_pretrained(cls):
    """Frozen by default; cuda_row_num gives the slots, cache_ratio replaces it."""
    table = torch.randn(NUM_ROWS, DIM)
    bag = cls.from_pretrained(table, cuda_row_num=30, mode="sum", ids_freq_mapping=counts())
    assert torch.equal(bag.weight, table) and bag.cache_weight_mgr.cuda_row_num == 30
    assert not bag(torch.tensor([[1, 2]])).requires_grad
    bag = cls.from_pretrained(table, freeze=False, cache_ratio=0.1, evict_strategy=EvictionStrategy.LFU)
    assert bag(torch.tensor([[1, 2]])).requires_grad and bag.cache_weight_mgr.cuda_row_num == 20
    assert cls.from_pretrained(table).cache_weight_mgr.cuda_row_num == NUM_ROWS
    with pytest.raises(ValueError, match="embedding has 1 dimensions"):
        cls.from_pretrained(torch.zeros(3))


# ---- keywords -------------------------------------------------------------------------------------------------------

OLD_ARGUMENTS = dict(
    num_embeddings=inspect.Parameter.empty,
    embedding_dim=inspect.Parameter.empty,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
    _weight=None,
    mode="mean",
    include_last_offset=False,
    dtype=None,
    device=None,
    cache_ratio=0.01,
    ids_freq_mapping=None,
    warmup_ratio=0.7,
    buffer_size=0,
    pin_weight=False,
    evict_strategy=EvictionStrategy.LFU,
)


@pytest.mark.parametrize(
    ("cls", "others"),
    [
        (CachedEmbeddingBag, {}),
        (ParallelCachedEmbeddingBag, {"buffer_size": 50_000, "evict_strategy": EvictionStrategy.DATASET}),
        (ParallelCachedEmbeddingBagTablewise, {"buffer_size": 50_000}),
    ],
)
def test_arguments_stand_in_the_old_order_with_the_old_defaults(cls, others):
    expected = {**OLD_ARGUMENTS, **others}
    if cls is ParallelCachedEmbeddingBagTablewise:
        expected = {"embedding_bag_config_list": inspect.Parameter.empty, **expected}
        del expected["num_embeddings"], expected["ids_freq_mapping"]
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert list(given.items()) == list(expected.items())


def test_ignored_keywords_warn_once_and_only_where_they_are_set():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls in (CachedEmbeddingBag, ParallelCachedEmbeddingBag):
            cls(NUM_ROWS, DIM, device="cpu").set_cache_mgr_async_copy(False)
        ParallelCachedEmbeddingBag(NUM_ROWS, DIM, buffer_size=50_000)
        ParallelCachedEmbeddingBagTablewise([TablewiseEmbeddingBagConfig(9, 9)], DIM, device="cpu")
    with pytest.warns(UserWarning) as caught:
        bag = CachedEmbeddingBag(NUM_ROWS, DIM, buffer_size=7, pin_weight=True, device="cuda:0")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("device='cuda:0', pin_weight=True, buffer_size=7: ignored")
    with pytest.warns(UserWarning, match="async_copy=True: ignored"):
        bag.set_cache_mgr_async_copy(True)
    with pytest.warns(UserWarning, match="pin_weight=True: ignored"):
        ParallelCachedEmbeddingBagTablewise([TablewiseEmbeddingBagConfig(9, 9)], DIM, pin_weight=True)


def test_keywords_of_the_new_bag_are_taken_too():
    """optimizer, max_cache_bytes, store, kernels, num_slots, and the policies that are new."""
    bag = CachedEmbeddingBag(
        NUM_ROWS,
        DIM,
        num_slots=30,
        optimizer="adagrad",
        kernels="torch",
        store="ram",
        evict_strategy="s3fifo",
        max_cache_bytes=30 * 2 * DIM * 4,
    )
    assert bag.cache_weight_mgr.cuda_row_num == 30 and bag.bag.device_bytes()["cache"] == 30 * 2 * DIM * 4
    with pytest.raises(TypeError, match="cache_rows"):
        CachedEmbeddingBag(NUM_ROWS, DIM, cache_rows=3)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, DIM), {}, ValueError, "0 rows"),
        ((-3, DIM), {}, ValueError, "-3 rows"),
        ((NUM_ROWS, 0), {}, ValueError, "embedding_dim=0"),
        ((NUM_ROWS, DIM), {"cache_ratio": 1.5}, ValueError, "cache_ratio=1.5"),
        ((NUM_ROWS, DIM), {"cache_ratio": 0}, ValueError, "cache_ratio=0"),
        ((NUM_ROWS, DIM), {"warmup_ratio": 2}, ValueError, "warmup_ratio=2"),
        ((NUM_ROWS, DIM), {"padding_idx": NUM_ROWS}, ValueError, "padding_idx=200"),
        ((NUM_ROWS, DIM), {"mode": "median"}, ValueError, "mode='median'"),
        ((NUM_ROWS, DIM), {"evict_strategy": "random"}, ValueError, "unknown evict_strategy 'random'"),
        ((NUM_ROWS, DIM), {"ids_freq_mapping": [1, 2]}, ValueError, "2 counts for 200 ids"),
        ((NUM_ROWS, DIM), {"_weight": torch.zeros(NUM_ROWS, DIM // 2)}, ValueError, r"_weight has shape \(200, 4\)"),
        ((NUM_ROWS, DIM), {"dtype": torch.int32}, ValueError, "torch.int32"),
    ],
)
@pytest.mark.parametrize("cls", [CachedEmbeddingBag, ParallelCachedEmbeddingBag])
def test_bad_arguments(cls, arguments, options, error, message):
    with pytest.raises(error, match=message):
        cls(*arguments, **options)


@pytest.mark.parametrize("cls", [CachedEmbeddingBag, ParallelCachedEmbeddingBag])
def test_bad_batches_change_nothing(cls):
    torch.manual_seed(0)
    limit = {"max_cache_bytes": FEW_SLOTS * DIM * 4}
    bag = cls(NUM_ROWS, DIM, cache_ratio=RATIO, mode="sum", **limit)
    before, manager = bag.weight, bag.cache_weight_mgr
    too_many = torch.arange(FEW_SLOTS + 1)
    for error, call in {
        "id 200 at position 1 is outside the valid range: 0..199": lambda: bag(torch.tensor([[1, NUM_ROWS]])),
        "id -1 at position 0 is outside the valid range: 0..199": lambda: manager.prepare_ids(torch.tensor([-1, 3])),
        "offsets is None": lambda: bag(torch.tensor([1])),
        "26 rows have to be resident": lambda: bag(too_many.view(1, -1)),
        "ids is torch.float32": lambda: manager.prepare_ids(torch.zeros(2)),
        "ids is list": lambda: manager.prepare_ids([1, 2]),
        "input is torch.float32": lambda: bag(torch.zeros(1, 2)),
    }.items():
        with pytest.raises((ValueError, TypeError), match=error):
            call()
    with pytest.raises(CacheTooSmallError):
        manager.prepare_ids(too_many)
    assert not bag.num_hits_history and not bag.bag.stats.misses and torch.equal(bag.weight, before)
    with pytest.raises(ValueError, match=r"row 200 is outside the valid range 0..199"):
        manager.cpu_weight_data(NUM_ROWS)
    bag.bag.max_state_dict_bytes = 100
    with pytest.raises(ValueError, match=".weight as one tensor takes 6400 bytes"):
        bag.weight  # noqa: B018


def test_manager_is_not_built_from_a_weight():
    with pytest.raises(TypeError, match="CachedParamMgr got Tensor.*_weight=weight"):
        CachedParamMgr(torch.zeros(3, 2), 2)


# ---- two ranks, columns ---------------------------------------------------------------------------------------------


def by_table(out):
    """What an example's shape_hook does: bags of 3 tables, one table after the other, become (batch, 3, columns)."""
    return out.view(3, -1, out.shape[1]).transpose(0, 1)


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def rank_trains_columns(rank, world_size, dim, hook, name):
    """Same batch on all ranks, own share of the result; evictions on most steps; the whole table at the end."""
    torch.manual_seed(0)
    table = torch.randn(NUM_ROWS, dim)
    options = dict(sparse=True, mode="sum", ids_freq_mapping=torch.from_numpy(counts()), buffer_size=50_000)
    bag = ParallelCachedEmbeddingBag(NUM_ROWS, dim, _weight=table, cache_ratio=31 / NUM_ROWS, **options)
    one = CachedEmbeddingBag(NUM_ROWS, dim, _weight=table, cache_ratio=1.0, mode="sum")
    plain = plain_bag(table)
    optimizers = [getattr(optim, name)(model.parameters(), lr=0.05) for model in (bag, one)]
    if hasattr(torch.optim, name):
        optimizers.append(getattr(torch.optim, name)(plain.parameters(), lr=0.05))
    generator = torch.Generator().manual_seed(1)
    evicting_steps = evictions = 0
    for _ in range(STEPS):
        ids, offsets = ragged_batch(generator, num_bags=15, most=2)
        share = bag(ids, offsets, shape_hook=hook)
        loss_of(share).backward()
        for model in (one, plain):
            whole = model(ids, offsets)
            parts = (whole if hook is None else hook(whole)).tensor_split(world_size)
            sum(loss_of(part) for part in parts).backward()
            if model is one or len(optimizers) == 3:
                torch.testing.assert_close(share, parts[rank])
        step_all(optimizers)
        plain.zero_grad()
        evicting_steps += bag.bag.stats.evictions > evictions
        evictions = bag.bag.stats.evictions
        assert bag.num_hits_history[-1] + bag.num_miss_history[-1] == ids.unique().numel()
    assert evicting_steps > 0.8 * STEPS and bag.cache_weight_mgr.cuda_row_num == 31
    state = bag.state_dict()
    assert list(state) == ["weight"]
    torch.testing.assert_close(state["weight"], one.weight)
    if len(optimizers) == 3:
        torch.testing.assert_close(state["weight"], plain.weight.detach())
    columns = slice(bag.partition_start_index, bag.partition_end_index)
    assert columns.stop - columns.start == bag.embedding_dim_per_partition == bag.cache_weight_mgr.embedding_dim
    assert torch.equal(bag.weight, state["weight"][:, columns]) and bag.weight.shape[1] < dim
    bag.bag._cache.check()


def rank_uses_the_rest_of_columns(rank, world_size):
    """First weights, prefetch, weights of samples, other dimensions, and errors that all ranks raise together."""
    torch.manual_seed(3)
    bag = ParallelCachedEmbeddingBag(NUM_ROWS, 6, cache_ratio=0.3, mode="sum", padding_idx=2)
    torch.manual_seed(3)
    table = CachedEmbeddingBag(NUM_ROWS, 6, cache_ratio=0.3, padding_idx=2).weight
    assert torch.equal(bag.state_dict()["weight"], table) and not table[2].any()
    plain = plain_bag(table, sparse=False, padding_idx=2)
    generator = torch.Generator().manual_seed(4)
    batches = [ragged_batch(generator) for _ in range(3)]

    slots = bag.cache_weight_mgr.prepare_ids(torch.cat([ids for ids, _ in batches]))
    bag.set_cache_op(False)
    for (ids, offsets), own in zip(batches, slots.split([len(ids) for ids, _ in batches]), strict=True):
        torch.testing.assert_close(bag(own, offsets), plain(ids, offsets).tensor_split(world_size)[rank])
    bag.set_cache_op(True)
    assert len(bag.num_miss_history) == 1 and bag.num_hits_history[0] == 0

    ids, offsets = batches[0]
    weights = torch.rand(len(ids), generator=generator).requires_grad_()
    out = bag(ids, offsets, weights)
    expected = plain(ids, offsets, weights)
    torch.testing.assert_close(out, expected.tensor_split(world_size)[rank])
    grads = torch.autograd.grad(out.square().sum(), weights)[0]
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), weights)[0])

    out = bag(ids, offsets, shape_hook=lambda part: part.t(), scatter_dim=1, gather_dim=0)
    torch.testing.assert_close(out, plain(ids, offsets).t().tensor_split(world_size, 1)[rank])

    bad = ids.clone()
    bad[0] = NUM_ROWS + rank
    good_on_first = ids if rank == 0 else bad
    for error, call in {
        "id 200 at position 0 is outside": lambda: bag(torch.where(ids == ids[0], NUM_ROWS, ids), offsets),
        "different batches": lambda: bag(good_on_first, offsets),
        "rank 1: id 201 at position 0|id 201": lambda: bag.cache_weight_mgr.prepare_ids(good_on_first),
        "different batches .*8, 8": lambda: bag(ids.flip(0) if rank else ids, offsets),
        "different batches .*8, 7": lambda: bag(ids, offsets[:7] if rank else offsets),
        "both 0": lambda: bag(ids, offsets, gather_dim=0),
    }.items():
        with pytest.raises(ValueError, match=error):
            call()
    torch.testing.assert_close(bag(ids, offsets), plain(ids, offsets).tensor_split(world_size)[rank])
    bag.load_state_dict({"weight": torch.ones(NUM_ROWS, 6)})
    assert torch.equal(bag.weight, torch.ones(NUM_ROWS, 3))
    bag.print_comm_stats_()
    other = ParallelCachedEmbeddingBag.from_pretrained(table, cuda_row_num=50)
    assert torch.equal(other.state_dict()["weight"], table) and not other(ids, offsets).requires_grad


def rank_uses_columns(rank, world_size):
    rank_trains_columns(rank, world_size, DIM, None, "SGD")
    rank_trains_columns(rank, world_size, DIM - 1, by_table, "Adagrad")
    rank_trains_columns(rank, world_size, DIM, by_table, "RowWiseAdagrad")
    rank_uses_the_rest_of_columns(rank, world_size)


@pytest.mark.slow
def test_two_ranks_use_columns():
    """Even and uneven columns and shares, with and without a shape_hook; then everything else."""
    run_on_ranks(rank_uses_columns, 2)


# ---- two ranks, whole tables ----------------------------------------------------------------------------------------

SIZES = [40, 60, 7, 50, 43]


class Tables:
    """The reference: an nn.EmbeddingBag for each table, and batches in every form that the module takes."""

    def __init__(self, rank, world_size, plan, padding=None, include_last_offset=False):
        self.rank, self.world_size, self.plan = rank, world_size, plan
        self.include_last_offset = include_last_offset
        torch.manual_seed(7)
        padding = padding or [None] * len(SIZES)
        self.bags = nn.ModuleList(
            plain_bag(torch.randn(rows, DIM), padding_idx=idx) for rows, idx in zip(SIZES, padding, strict=True)
        )
        self.own = [table for table, owner in enumerate(plan) if owner == rank]

    def configs(self, **options):
        return [
            TablewiseEmbeddingBagConfig(rows, 20, assigned_rank=owner, initial_weight=bag.weight.detach(), **options)
            for rows, owner, bag in zip(SIZES, self.plan, self.bags, strict=True)
        ]

    def batch(self, generator, num_bags):
        """A list of (ids, lengths) of each table, bags of 0 to 2 ids."""
        lengths = torch.randint(0, 3, (len(SIZES), num_bags), generator=generator)
        return [
            (torch.randint(0, rows, (int(length.sum()),), generator=generator), length)
            for rows, length in zip(SIZES, lengths, strict=True)
        ]

    def packed(self, batch, tables):
        """(ids, offsets) of `tables`, their ids put one after the other."""
        starts = [sum(SIZES[other] for other in tables[:number]) for number in range(len(tables))]
        empty = torch.empty(0, dtype=torch.int64)
        ids = torch.cat([empty, *(batch[table][0] + start for table, start in zip(tables, starts, strict=True))])
        lengths = torch.cat([empty, *(batch[table][1] for table in tables)])
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return ids, ends if self.include_last_offset else ends[:-1]

    def shares(self, batch):
        """Of each rank: (B, T * D), rank 0's tables first."""
        outs = [bag(ids, lengths.cumsum(0) - lengths) for bag, (ids, lengths) in zip(self.bags, batch, strict=True)]
        order = [table for rank in range(self.world_size) for table, owner in enumerate(self.plan) if owner == rank]
        return torch.cat([outs[table] for table in order], 1).tensor_split(self.world_size)


def rank_trains_tables(rank, world_size, plan, include_last_offset):
    """Batches split along the ranks and whole ones in turn; each rank gets its share of all tables."""
    padding = [None if owner in plan[:table] else 3 for table, owner in enumerate(plan)]  # id 3 of each rank's tables
    tables = Tables(rank, world_size, plan, padding, include_last_offset)
    bag = ParallelCachedEmbeddingBagTablewise(
        tables.configs(ids_freq_mapping=None),
        DIM,
        padding_idx=3,
        mode="sum",
        sparse=True,
        include_last_offset=include_last_offset,
        cache_ratio=0.34,
    )
    num_slots = bag.cache_weight_mgr.cuda_row_num
    optimizers = [optim.Adagrad(bag.parameters(), lr=0.05), torch.optim.Adagrad(tables.bags.parameters(), lr=0.05)]
    generator = torch.Generator().manual_seed(1)
    evicting_steps = evictions = 0
    for step in range(STEPS):
        batch = tables.batch(generator, num_bags=5)
        if step % 2:
            share = bag(*tables.packed(batch, tables.own))
        else:
            share = bag(*tables.packed(batch, list(range(len(SIZES)))), already_split_along_rank=False)
        parts = tables.shares(batch)
        torch.testing.assert_close(share, parts[rank])
        loss_of(share).backward()
        sum(loss_of(part) for part in parts).backward()
        step_all(optimizers)
        evicting_steps += bag.bag.stats.evictions > evictions
        evictions = bag.bag.stats.evictions
    assert evicting_steps > 0.8 * STEPS or not tables.own
    assert bag.cache_weight_mgr.cuda_row_num == num_slots
    state = bag.state_dict()
    assert list(state) == [f"tables.{table}.weight" for table in range(len(SIZES))]
    for table, plain in enumerate(tables.bags):
        torch.testing.assert_close(state[f"tables.{table}.weight"], plain.weight.detach())
    empty = torch.empty(0, DIM)
    assert torch.equal(bag.weight, torch.cat([empty, *(state[f"tables.{table}.weight"] for table in tables.own)]))
    assert bag.weight.shape == (bag.num_embeddings, DIM) and bag.num_embeddings == sum(SIZES[t] for t in tables.own)
    assert bag.cache_weight_mgr.inverted_cached_idx.shape == (bag.num_embeddings,)
    bag.bag._cache.check()


def rank_uses_the_rest_of_tables(rank, world_size):
    """Prefetch, hook, weights of samples, first weights, counts, and errors that all ranks raise together."""
    tables = Tables(rank, world_size, [1, 0, 1, 0, 0])
    own_weight = torch.cat([tables.bags[table].weight.detach() for table in tables.own])
    configs = tables.configs()
    for config in configs:
        config.initial_weight, config.ids_freq_mapping = None, torch.arange(config.num_embeddings)
    options = dict(mode="sum", cache_ratio=0.6)
    torch.manual_seed(rank)
    bag = ParallelCachedEmbeddingBagTablewise(configs, DIM, padding_idx=1, **options)
    torch.manual_seed(rank)
    rows = sum(SIZES[table] for table in tables.own)
    drawn = torch.empty(rows, DIM).uniform_(-1 / rows, 1 / rows)
    drawn[1] = 0
    assert torch.equal(bag.weight, drawn)

    bag = ParallelCachedEmbeddingBagTablewise(configs, DIM, _weight=own_weight, **options)
    assert torch.equal(bag.weight, own_weight)
    generator = torch.Generator().manual_seed(4)
    batches = [tables.batch(generator, 4) for _ in range(2)]
    packed = [tables.packed(batch, tables.own) for batch in batches]
    slots = bag.cache_weight_mgr.prepare_ids(torch.cat([ids for ids, _ in packed]))
    assert torch.equal(
        bag.cache_weight_mgr.cuda_cached_weight[slots], own_weight[torch.cat([ids for ids, _ in packed])]
    )
    bag.set_cache_op(False)
    for batch, (_, offsets), own in zip(batches, packed, slots.split([len(ids) for ids, _ in packed]), strict=True):
        out = bag(own, offsets, shape_hook=lambda out: out.view(-1, len(SIZES), DIM))
        torch.testing.assert_close(out.flatten(1), tables.shares(batch)[rank])
    ids, offsets = tables.packed(batches[0], list(range(len(SIZES))))
    with pytest.raises(ValueError, match=r"already_split_along_rank=False after set_cache_op\(False\)"):
        bag(ids, offsets, already_split_along_rank=False)
    bag.set_cache_op(True)

    weights = torch.rand(len(ids), generator=generator).requires_grad_()
    out = bag(ids, offsets, weights, already_split_along_rank=False)
    ends = [*offsets[::4].tolist(), len(ids)]
    plain = [
        nn.functional.embedding_bag(
            own, module.weight, lengths.cumsum(0) - lengths, mode="sum", per_sample_weights=part
        )
        for module, (own, lengths), part in zip(
            tables.bags, batches[0], weights.split(np.diff(ends).tolist()), strict=True
        )
    ]
    expected = torch.cat([plain[table] for table in (1, 3, 4, 0, 2)], 1)
    torch.testing.assert_close(out, expected.tensor_split(world_size)[rank])
    grads = torch.autograd.grad(out.square().sum(), weights)[0]
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), weights)[0])

    own_ids, own_offsets = packed[0]
    bad = own_ids.clone()
    bad[0] = -1 if rank else own_ids[0]
    for error, call in {
        "id -1 at position 0": lambda: bag(bad, own_offsets),
        "id -1 at position 0 is outside the valid range": lambda: bag.cache_weight_mgr.prepare_ids(bad),
        "3 tables|2 tables": lambda: bag(own_ids, own_offsets[:-1] if rank else own_offsets),
        r"pass \[4, 3\] bags": lambda: bag(*tables.packed(tables.batch(generator, 4 - rank), tables.own)),
        "offsets has 19 entries for 5 tables": lambda: bag(ids, offsets[:19], already_split_along_rank=False),
    }.items():
        with pytest.raises(ValueError, match=error):
            call()
    torch.testing.assert_close(bag(own_ids, own_offsets), tables.shares(batches[0])[rank])


def rank_uses_tables(rank, world_size):
    rank_trains_tables(rank, world_size, [0, 1, 1, 0, 1], include_last_offset=False)
    rank_trains_tables(rank, world_size, [0, 0, 0, 0, 0], include_last_offset=True)
    rank_uses_the_rest_of_tables(rank, world_size)


@pytest.mark.slow
def test_two_ranks_use_tables():
    """Tables on both ranks, then all on one of them; then everything else."""
    run_on_ranks(rank_uses_tables, 2)


def test_tables_in_one_process():
    """Without torch.distributed; bad configs are named."""
    tables = Tables(0, 1, [0] * len(SIZES))
    bag = ParallelCachedEmbeddingBagTablewise(tables.configs(), DIM, mode="sum", cache_ratio=0.3)
    batch = tables.batch(torch.Generator().manual_seed(0), 4)
    torch.testing.assert_close(bag(*tables.packed(batch, tables.own)), tables.shares(batch)[0])
    configs = tables.configs()
    with pytest.raises(ValueError, match="embedding_bag_config_list is empty"):
        ParallelCachedEmbeddingBagTablewise([], DIM)
    with pytest.raises(ValueError, match=r"_weight has shape \(3, 8\); the tables \[0, 1, 2, 3, 4\]"):
        ParallelCachedEmbeddingBagTablewise(configs, DIM, _weight=torch.zeros(3, DIM))
    configs[1].initial_weight = torch.zeros(2, DIM)
    with pytest.raises(ValueError, match=r"initial_weight of table 1 has shape \(2, 8\); the table has \(60, 8\)"):
        ParallelCachedEmbeddingBagTablewise(configs, DIM)
    configs = tables.configs()
    with pytest.raises(ValueError, match=r"padding_idx=200 is outside the valid range -200..199"):
        ParallelCachedEmbeddingBagTablewise(configs, DIM, padding_idx=200)
    configs[2].assigned_rank = 1
    with pytest.raises(ValueError, match=r"plan=\[0, 0, 1, 0, 0\]"):
        ParallelCachedEmbeddingBagTablewise(configs, DIM)
    with pytest.raises(ValueError, match="0 rows"):
        ParallelCachedEmbeddingBagTablewise([TablewiseEmbeddingBagConfig(0, 1)], DIM)
