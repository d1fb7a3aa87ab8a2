"""Rows of bfloat16 and float16: stored in 16 bits, computed in float32, updated with stochastic rounding.

    python -m pytest tests/test_half_precision.py

Proves: (1) the random bits are those of the formula in plain ints, the same in both kernel sets, even, and independent
of slots, order and threads; (2) rounding takes one of the two neighbours, is right on average, keeps what needs no
rounding, and keeps finite values finite; (3) pooling and gradients are float32 sums rounded once; (4) the promise
holds: cached is resident bit for bit, fused is unfused, a resumed run is an uninterrupted one, two ranks are one table;
(5) the error against a float64 run is within 4 times that of torch in the same dtype, and steps far below half a unit
train rows that rounding to the nearest would leave where they are; (6) bytes halve.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from test_equivalence import NAMES, RowWiseAdagradByDefinition
from test_kernels import RULES, block, update
from torch import nn
from worlds import DIM, FEW_SLOTS, NUM_ROWS, assert_same_bits, counts, everything, loss_of, make_bag, skewed_ids

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, Lookahead, checkpoint, optim
from colossal_freqcache.compat import CachedEmbeddingBag
from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.kernels.halves import HalfKernels
from colossal_freqcache.parallel import ShardedFreqAwareEmbeddingBag, ShardedFreqAwareEmbeddingBagCollection
from colossal_freqcache.rounding import HALVES, Rounding, random_bits, round_stochastically, stream_of
from colossal_freqcache.stores import RamStore

STEPS = 24

every_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
every_optimizer = pytest.mark.parametrize("name", NAMES)


def rounding(num_rows, width, seed=0, step=1):
    return Rounding(stream_of(seed, step), torch.arange(num_rows), torch.arange(width))


# ---- random bits -----------------------------------------------------------------------------------------------------


def bits_by_ints(seed, step, identity, column):
    """The formula of `rounding` in Python's ints."""

    def mix64(key):
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        return key ^ key >> 31

    stream = mix64((mix64(seed % 2**64) + step) % 2**64)
    row = mix64((stream + identity * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (row + column * 0x9E3779B9) % 2**32
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
    mixed = (mixed ^ mixed >> 13 ^ row >> 32) * 0xC2B2AE35 % 2**32
    return mixed ^ mixed >> 16


def test_random_bits_are_those_of_the_formula():
    ids, columns = torch.tensor([0, 1, 2**31 + 5, 2**40]), torch.tensor([0, 1, 7, 300, 2**20])
    for seed, step in ((0, 1), (1, 1), (2**63 + 9, 10**6)):
        bits = random_bits(Rounding(stream_of(seed, step), ids, columns))
        expected = [[bits_by_ints(seed, step, i, column) for column in columns.tolist()] for i in ids.tolist()]
        assert bits.tolist() == expected


def test_random_bits_are_even_and_unrelated():
    """Each of the 32 bits is set in half of the cases; neighbours in id, column, step and seed agree in half."""
    num_rows, width = 4096, 32
    bits = random_bits(rounding(num_rows, width))
    others = [bits[1:], bits[:, 1:], random_bits(rounding(num_rows, width, step=2))]
    others.append(random_bits(rounding(num_rows, width, seed=1)))
    of_pairs = [bits, *(bits[: other.shape[0], : other.shape[1]] ^ other for other in others)]
    for number, values in enumerate(of_pairs):
        for place in range(32):
            share = (values >> place & 1).double().mean().item()
            assert abs(share - 0.5) < 5 * 0.5 / values.numel() ** 0.5, (number, place, share)
    counted = torch.bincount(bits.reshape(-1) >> 24, minlength=256).double()
    expected = bits.numel() / 256
    assert ((counted - expected) ** 2 / expected).sum() < 255 + 6 * (2 * 255) ** 0.5  # chi squared


@every_half
def test_both_kernel_sets_round_to_the_same_bits(dtype):
    """Numbers of every size, subnormal ones, inf and nan; columns of a part of a record; rows in any order."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (400, 37), generator=generator).int().view(torch.float32)
    ordinary = torch.randn(400, 37, generator=generator) * 10.0 ** torch.randint(-9, 5, (400, 37), generator=generator)
    values = torch.cat([anything, ordinary, torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan] + 32 * [1.0]])])
    num_rows = values.shape[0]
    how = Rounding(stream_of(5, 3), torch.randint(0, 2**40, (num_rows,), generator=generator), torch.arange(90, 127))
    slots = torch.randperm(1000, generator=generator)[:num_rows].int()
    blocks = [torch.zeros(1000, 40, dtype=dtype) for _ in range(2)]
    for name, half_rows in zip(("cpu", "torch"), blocks, strict=True):
        make_kernels(name).narrow_rows(values, half_rows, slots, how)
    assert torch.equal(*(half_rows.view(torch.int16) for half_rows in blocks))
    order = torch.randperm(num_rows, generator=generator)
    make_kernels("cpu").narrow_rows(values[order], blocks[1], slots[order], how._replace(ids=how.ids[order]))
    assert torch.equal(*(half_rows.view(torch.int16) for half_rows in blocks))
    widened = [make_kernels(name).widen_rows(blocks[0], 40, slots) for name in ("cpu", "torch")]
    assert torch.equal(*(rows.view(torch.int32) for rows in widened)) or torch.equal(
        *(rows.nan_to_num(7.0) for rows in widened)
    )


@every_half
def test_every_number_of_16_bits_is_widened_exactly_and_needs_no_rounding(dtype):
    block = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(256, 256)
    slots = torch.arange(256, dtype=torch.int32)
    for name in ("cpu", "torch"):
        rows = make_kernels(name).widen_rows(block, 256, slots)
        assert torch.equal(rows.nan_to_num(7.0), block.float().nan_to_num(7.0))
        again = torch.zeros_like(block)
        make_kernels(name).narrow_rows(rows, again, slots, rounding(256, 256))
        assert torch.equal(again.nan_to_num(7.0), block.nan_to_num(7.0)), name
        assert torch.equal(again.isnan(), block.isnan())


@every_half
@pytest.mark.parametrize("value", [1.0003, -0.1234567, 300.3, 3e-6, -7e-8, 0.0, 6.1e-5])
def test_rounding_takes_a_neighbour_and_is_right_on_average(dtype, value):
    """Over ids and columns, and over seeds, the mean is the value, within 5 standard errors."""
    values = torch.full((2000, 16), value)
    exact = float(values[0, 0])
    nearest = values[0, 0].to(dtype)
    towards = torch.tensor(torch.inf if exact > float(nearest) else -torch.inf, dtype=dtype)
    other = nearest if exact == float(nearest) else torch.nextafter(nearest, towards)
    for hows in ([rounding(2000, 16)], [rounding(1, 16, seed=seed) for seed in range(100)]):
        taken = [round_stochastically(values[: how.ids.numel()], dtype, random_bits(how)) for how in hows]
        taken = torch.cat(taken)
        assert ((taken == nearest) | (taken == other)).all()
        error = taken.double().mean() - exact
        assert abs(error) <= 5 * abs(float(other) - float(nearest)) / 2 / taken.numel() ** 0.5


@every_half
def test_finite_values_stay_finite(dtype):
    """What would pass the largest number becomes it; inf and nan are kept."""
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest * 1.0001, -largest * 1.0001, torch.finfo(torch.float32).max, torch.inf, torch.nan])
    block = torch.zeros(50, 5, dtype=dtype)
    make_kernels("cpu").narrow_rows(
        values.expand(50, 5).contiguous(), block, torch.arange(50, dtype=torch.int32), rounding(50, 5)
    )
    expected = torch.tensor([largest, -largest, largest, torch.inf], dtype=dtype)
    assert (block[:, :4] == expected).all() and block[:, 4].isnan().all()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@every_half
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_outputs_and_gradients_are_float32_sums_rounded_once(kernels, dtype, mode):
    """Those of a float32 bag over the same numbers, rounded; dtype of output, gradient and state_dict as asked for."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(30, 7, generator=generator).to(dtype)
    values = torch.randint(30, (40,), generator=generator)
    offsets = torch.tensor([0, 0, 1, 9, 20, 20, 31])
    weighted = mode == "sum"
    results = []
    for kind in (dtype, torch.float32):
        bag = FreqAwareEmbeddingBag(30, 7, mode=mode, _weight=table.to(kind), num_slots=30, kernels=kernels)
        weights = torch.rand(40, generator=torch.Generator().manual_seed(3)).to(dtype).to(kind).requires_grad_()
        out = bag(values, offsets, per_sample_weights=weights if weighted else None)
        out.backward(torch.randn(7, 7, generator=torch.Generator().manual_seed(4)).to(dtype).to(kind))
        assert out.dtype == bag.weight.dtype == bag.weight.grad.dtype == bag.state_dict()["weight"].dtype == kind
        results.append([out.detach(), bag.weight.grad.to_dense()] + ([weights.grad] if weighted else []))
    assert_same_bits(results[0], [tensor.to(dtype) for tensor in results[1]])


@every_half
@pytest.mark.parametrize("rule", RULES)
def test_one_pass_gives_the_bits_of_widening_first(dtype, rule):
    """The numba set's own functions for 16 bits, against its float32 functions on widened rows."""
    dim, num_rows = 37, 300
    records, grads = block(rule, dim, torch.float32, num_rows)
    slots = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:250].int()
    how = Rounding(stream_of(1, 2), torch.arange(250) * 2**33, torch.arange(records.shape[1]))
    blocks = []
    for kernels in (make_kernels("cpu", dtype), HalfKernels(make_kernels("cpu"))):
        blocks.append(records.to(dtype))
        update(kernels.with_rounding(how), rule, blocks[-1], dim, slots, grads[:250].to(dtype))
    assert torch.equal(blocks[0], blocks[1]) and not torch.equal(blocks[0], records.to(dtype))


@every_half
def test_one_hot_gradients_are_those_of_the_general_form(dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(50, 3, 9, generator=generator).to(dtype)
    unique = torch.cat([torch.randint(0, 5, (50,), generator=generator) + 5 * table for table in range(3)]).int()
    unique[7] = -1
    arguments = (grad, unique, torch.arange(151), None, False, False, torch.randperm(15, generator=generator).int(), 15)
    ours = make_kernels("cpu", dtype).pool_backward(*arguments)
    assert ours.dtype == dtype
    assert torch.equal(ours, HalfKernels(make_kernels("cpu")).pool_backward(*arguments))
    assert torch.equal(ours, make_kernels("torch", dtype).pool_backward(*arguments))


@every_half
def test_initial_weights_are_those_of_torch(dtype):
    for num_rows in (3, 100):
        torch.manual_seed(4)
        theirs = nn.EmbeddingBag(num_rows, 5, dtype=dtype).weight
        torch.manual_seed(4)
        assert torch.equal(FreqAwareEmbeddingBag(num_rows, 5, dtype=dtype).logical_weight(), theirs)


@every_half
def test_other_arguments_mean_what_they_mean_in_float32(kernels, dtype):
    """padding_idx, max_norm (to the nearest), scale_grad_by_freq; from_pretrained; tables with one position each."""
    table = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([[1, 2, 2], [3, 0, 5], [1, 1, 1]])
    results = []
    for kind, max_norm in ((dtype, 1.5), (torch.float32, None)):
        options = dict(padding_idx=0, max_norm=max_norm, scale_grad_by_freq=True, mode="sum", freeze=False)
        bag = FreqAwareEmbeddingBag.from_pretrained(table.to(kind), num_slots=20, kernels=kernels, **options)
        if results:
            bag.load_state_dict({"weight": results[0][0].float()})
        out = bag(ids)
        out.backward(torch.ones_like(out))
        results.append([bag.logical_weight(), out.detach(), bag.weight.grad.to_dense()])
    norms = torch.linalg.vector_norm(results[0][0][[1, 2, 3, 5]].float(), dim=1)
    assert norms.max() < 1.5 * (1 + torch.finfo(dtype).eps) and (table[:6].float().norm(dim=1) > 1.5).any()
    assert torch.equal(results[0][1].float(), results[1][1].to(dtype).float())
    assert torch.equal(results[0][2], results[1][2].to(dtype))
    bags = FreqAwareEmbeddingBagCollection([9, 3], 6, dtype=dtype, mode="mean", num_slots=12, kernels=kernels)
    out = bags(torch.tensor([8, 2, 2, 0]), torch.arange(4))
    assert torch.equal(out[:, 0], bags.logical_weight(0)[[8, 2]]) and torch.equal(
        out[:, 1], bags.logical_weight(1)[[2, 0]]
    )


# ---- the promise -----------------------------------------------------------------------------------------------------


def half_bag(dtype, num_slots=FEW_SLOTS, **options):
    return make_bag(num_slots, dtype=dtype, ids_freq_mapping=counts(), **options)


def train(bag, optimizer, steps=STEPS, first=0, loader=None):
    """Steps first..first+steps-1 of a fixed stream; all outputs."""
    outs = []
    batches = (skewed_ids(torch.Generator().manual_seed(step)) for step in range(first, first + steps))
    for ids in loader(list(batches)) if loader else batches:
        out = bag(ids)
        loss_of(out.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach())
    return outs


def run(name, dtype, num_slots=FEW_SLOTS, steps=STEPS, lr=0.05, fused=False, loader=None, **options):
    """(outputs, table, states) after `steps`; rows must have been evicted, unless all are resident."""
    bag = half_bag(dtype, num_slots, **options)
    optimizer = getattr(optim, name)(bag.parameters(), lr=lr, fused=fused)
    outs = train(bag, optimizer, steps, loader=None if loader is None else functools.partial(loader, bag))
    bag._cache.check()
    assert bag.num_slots == num_slots
    assert (bag.stats.evictions > steps) == (num_slots < NUM_ROWS)
    return outs + everything(bag, optimizer)


@every_half
@every_optimizer
def test_cached_bits_are_resident_bits(name, kernels, dtype):
    resident = run(name, dtype, NUM_ROWS, kernels=kernels)
    for policy in ("dataset", "s3fifo"):
        assert_same_bits(run(name, dtype, kernels=kernels, evict_strategy=policy), resident)


@every_half
@every_optimizer
def test_fused_is_unfused(name, kernels, dtype):
    assert_same_bits(run(name, dtype, fused=True, kernels=kernels), run(name, dtype, kernels=kernels))


@every_half
def test_lookahead_changes_no_bit(dtype):
    def loader(bag, batches):
        return Lookahead(batches, bag, ids=lambda batch: batch, window=4, depth=1)

    ahead = run("Adagrad", dtype, 2 * FEW_SLOTS, loader=loader)
    assert_same_bits(ahead, run("Adagrad", dtype, NUM_ROWS))


def test_several_backwards_before_a_step_in_bfloat16():
    """torch adds the gradients (in float16 it cannot, on a CPU), in the order of the backwards, wherever rows sit."""
    results = []
    for num_slots in (3 * FEW_SLOTS, NUM_ROWS):
        bag = half_bag(torch.bfloat16, num_slots)
        optimizer = optim.Adam(bag.parameters(), lr=0.05)
        for step in range(20):
            for micro in range(3):
                bag(skewed_ids(torch.Generator().manual_seed(3 * step + micro))).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (bag.stats.evictions > 20) == (num_slots < NUM_ROWS)
        results.append(everything(bag, optimizer))
    assert_same_bits(*results)


@every_half
@every_optimizer
def test_threads_and_pieces_do_not_change_bits(name, dtype):
    """1 and 2 threads, rows enough for both; nor do the pieces of a large update, in whatever slots their rows are."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads, num_slots in ((1, 9000), (2, 9000), (1, 9500)):
            torch.set_num_threads(threads)
            bag = make_bag(num_slots, num_rows=9500, dim=48, dtype=dtype)
            optimizer = getattr(optim, name)(bag.parameters(), lr=0.1)
            for step in range(3):
                ids = torch.randperm(9500, generator=torch.Generator().manual_seed(step))[:9000].reshape(1000, 9)
                bag(ids).float().square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert (bag.stats.evictions > 0) == (num_slots < 9500)
            results.append(everything(bag, optimizer))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@every_half
@every_optimizer
@pytest.mark.parametrize("by", ["state_dict", "checkpoint"])
def test_a_resumed_run_is_an_uninterrupted_one(name, dtype, by, tmp_path):
    """Saved in the middle, loaded into a bag of another seed and size: the rounding goes on with the next step."""
    uninterrupted = run(name, dtype)
    bag = half_bag(dtype)
    optimizer = getattr(optim, name)(bag.parameters(), lr=0.05)
    outs = train(bag, optimizer, STEPS // 2)
    other = half_bag(dtype, 2 * FEW_SLOTS, seed=9)
    resumed = getattr(optim, name)(other.parameters(), lr=0.3)
    if by == "checkpoint":
        checkpoint.save(tmp_path, bag, optimizer, step=7)
        assert checkpoint.load_latest(tmp_path, other, resumed) == 7
    else:
        other.load_state_dict(copy.deepcopy(bag.state_dict()))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    outs += train(other, resumed, STEPS // 2, STEPS // 2)
    assert_same_bits(outs + everything(other, resumed), uninterrupted)


@every_half
def test_torch_optimizers_are_adapted(dtype, tmp_path):
    """torch's SGD and Adagrad give the bits of ours, also resumed in the middle; SGD counts its steps."""
    for name in ("SGD", "Adagrad"):
        expected = run(name, dtype)
        bag = half_bag(dtype)
        optimizer = getattr(torch.optim, name)(bag.parameters(), lr=0.05)
        outs = train(bag, optimizer, STEPS // 2)
        assert float(optimizer.state_dict()["state"][0]["step"]) == STEPS // 2
        for by in ("state_dict", "checkpoint"):
            other = half_bag(dtype, seed=3)
            resumed = getattr(torch.optim, name)(other.parameters(), lr=0.05)
            if by == "checkpoint":
                checkpoint.save(tmp_path / name, bag, optimizer)
                checkpoint.load_latest(tmp_path / name, other, resumed)
            else:
                other.load_state_dict(copy.deepcopy(bag.state_dict()))
                resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            rest = train(other, resumed, STEPS // 2, STEPS // 2)
            assert_same_bits([*outs, *rest, *everything(other, resumed)], expected)


def test_float32_sgd_keeps_the_form_of_torch():
    """No step count where nothing is rounded; one of 16-bit rows is not taken over."""
    bag, half = make_bag(), half_bag(torch.bfloat16)
    optimizer, of_half = optim.SGD(bag.parameters(), lr=0.1), optim.SGD(half.parameters(), lr=0.1)
    train(bag, optimizer, 2)
    train(half, of_half, 2)
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(of_half.state_dict())
    assert optimizer.state_dict()["state"] == {}
    of_half.load_state_dict(optimizer.state_dict())
    train(half, of_half, 1)
    assert float(of_half.state_dict()["state"][0]["step"]) == 1


@every_half
def test_a_deep_copy_goes_on_alike(dtype):
    bag = half_bag(dtype)
    optimizer = optim.SGD(bag.parameters(), lr=0.05)
    train(bag, optimizer, 10)
    other = copy.deepcopy(bag)
    of_copy = optim.SGD(other.parameters(), lr=0.05)
    of_copy.load_state_dict(optimizer.state_dict())
    results = [train(*pair, 10, 10) + everything(*pair) for pair in ((bag, optimizer), (other, of_copy))]
    assert_same_bits(*results)


@every_half
def test_a_store_of_the_users_holds_any_dtype(dtype, kernels):
    """It moves rows by a kernel set that was made without a dtype."""
    expected = run("Adam", dtype, kernels=kernels)
    assert_same_bits(run("Adam", dtype, kernels=kernels, store=RamStore(make_kernels(kernels))), expected)


@every_half
def test_the_seed_decides(dtype):
    runs = [run("Adagrad", dtype, rounding_seed=seed) for seed in (4, 4, 5)]
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0][STEPS], runs[2][STEPS])
    with pytest.raises(ValueError, match="rounding_seed=-1"):
        half_bag(dtype, rounding_seed=-1)


@every_half
def test_state_is_laid_out_late_and_dropped(dtype):
    """The weights stay as they are when an optimizer is bound after training has begun, and when its state goes."""
    bag = half_bag(dtype)
    train(bag, optim.SGD(bag.parameters(), lr=0.05), 5)
    before = bag.logical_weight()
    bag.drop_optimizer_state()
    optimizer = optim.Adam(bag.parameters(), lr=0.05)
    assert torch.equal(bag.logical_weight(), before)
    train(bag, optimizer, 5)
    before = bag.logical_weight()
    bag.drop_optimizer_state()
    assert torch.equal(bag.logical_weight(), before)


def test_a_checkpoint_of_another_dtype_is_rounded_to_the_nearest(tmp_path):
    """float32 into bfloat16 and back, as load_state_dict does."""
    bag, half, again = make_bag(), half_bag(torch.bfloat16, seed=1), make_bag(seed=2)
    checkpoint.save(tmp_path / "float32", bag)
    checkpoint.load_latest(tmp_path / "float32", half)
    assert torch.equal(half.logical_weight(), bag.logical_weight().bfloat16())
    checkpoint.save(tmp_path / "bfloat16", half)
    checkpoint.load_latest(tmp_path / "bfloat16", again)
    assert torch.equal(again.logical_weight(), half.logical_weight().float())


@every_half
def test_the_older_names_take_the_dtype(dtype):
    """`compat`: the host table has it, and trains to the bits of our bag."""
    torch.manual_seed(0)
    old = CachedEmbeddingBag(NUM_ROWS, DIM, mode="sum", dtype=dtype, cache_ratio=0.2, ids_freq_mapping=counts())
    bag = half_bag(dtype, 40)
    bag.load_state_dict({"weight": old.state_dict()["weight"]})
    results = []
    for module in (old, bag):
        optimizer = optim.SGD(module.parameters(), lr=0.05)
        results.append(train(module, optimizer, 10))
    table = old.state_dict()["weight"]
    assert table.dtype == dtype
    assert_same_bits([*results[0], table], [*results[1], bag.logical_weight()])


def test_clipping_takes_the_norm_in_float32():
    bag = half_bag(torch.bfloat16, NUM_ROWS)
    dense = nn.Parameter(torch.ones(3))
    bag(skewed_ids(torch.Generator().manual_seed(0))).float().sum().backward()
    dense.grad = torch.full((3,), 2.0)
    values = bag.weight.grad._values().clone()
    norm = optim.clip_grad_norm_([bag.weight, dense], 1.0)
    expected = (values.double().square().sum() + 12).sqrt()
    torch.testing.assert_close(norm.double(), expected)
    assert torch.equal(bag.weight.grad._values(), values * (1 / (norm + 1e-6)))


# ---- several ranks ---------------------------------------------------------------------------------------------------


def check_ranks(rank, world_size, dtype):
    """Columns, rows, tables; ranks that all see the batch: one process, bit for bit. With shares, within rounding."""
    ids = [skewed_ids(torch.Generator().manual_seed(step)) for step in range(10)]
    for sharding in ("column", "row"):
        for name in ("SGD", "Adagrad", "Adam", "RowWiseAdagrad"):
            results = []
            for kind, options in (
                (FreqAwareEmbeddingBag, {"num_slots": NUM_ROWS}),
                (ShardedFreqAwareEmbeddingBag, {"num_slots": FEW_SLOTS, "sharding": sharding, "output": "gather"}),
            ):
                torch.manual_seed(0)
                bag = kind(NUM_ROWS, DIM, mode="sum", dtype=dtype, rounding_seed=3, **options)
                optimizer = getattr(optim, name)(bag.parameters(), lr=0.05)
                outs = []
                for batch in ids:
                    out = bag(batch)
                    (out.float() ** 2).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    outs.append(out.detach())
                results.append(outs + everything(bag, optimizer))
            assert bag.stats.evictions > 0
            if name == "RowWiseAdagrad" and sharding == "column":  # its mean squares are summed rank by rank
                far = [(a.double() - b.double()).abs().max().item() for a, b in zip(*results, strict=True)]
                assert max(far) < 64 * torch.finfo(dtype).eps, far
            else:
                assert_same_bits(*results)
    sizes = [50, 3, 70]
    results = []
    for kind, options in (
        (FreqAwareEmbeddingBagCollection, {"num_slots": 123}),
        (ShardedFreqAwareEmbeddingBagCollection, {"num_slots": 20, "sharding": "table", "output": "gather"}),
    ):
        torch.manual_seed(0)
        bags = kind(sizes, DIM, mode="sum", dtype=dtype, **options)
        optimizer = optim.Adagrad(bags.parameters(), lr=0.05)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            values = torch.cat([torch.randint(rows, (8,), generator=generator) for rows in sizes])
            (bags(values, torch.arange(0, 24, 2)).float() ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([bags.logical_weight(table) for table in range(3)])
    assert bags.stats.evictions > 0 or bags._cache.num_slots == bags._cache.num_rows
    assert_same_bits(*results)
    for sharding in ("column", "row"):
        tables = []
        for kind, options in ((FreqAwareEmbeddingBag, {}), (ShardedFreqAwareEmbeddingBag, {"sharding": sharding})):
            torch.manual_seed(0)
            bag = kind(NUM_ROWS, DIM, mode="sum", dtype=dtype, num_slots=2 * FEW_SLOTS, **options)
            optimizer = optim.Adagrad(bag.parameters(), lr=0.05)
            for batch in ids:
                share = batch[4 * rank :][:4] if options else batch
                ((bag(share).float() ** 2).sum() / (1 if options else 2)).backward()
                optimizer.step()
                optimizer.zero_grad()
            tables.append(bag.logical_weight().float())
        torch.testing.assert_close(*tables, rtol=0, atol=16 * torch.finfo(dtype).eps)
    torch.manual_seed(0)
    bag = ShardedFreqAwareEmbeddingBag(NUM_ROWS, DIM, mode="sum", dtype=dtype, num_slots=FEW_SLOTS, max_norm=2.0)
    weights = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    out = bag(ids[rank][:4], per_sample_weights=weights)  # shares
    out.float().sum().backward()
    table = bag.logical_weight().float()
    torch.manual_seed(0)
    alone = FreqAwareEmbeddingBag(NUM_ROWS, DIM, mode="sum", dtype=dtype, num_slots=FEW_SLOTS, max_norm=2.0)
    for share in (ids[0], ids[1]):
        alone(share[:4])
    assert torch.equal(alone.logical_weight().float(), table)
    assert (table[ids[0][:4]].norm(dim=2) <= 2.0 * (1 + torch.finfo(dtype).eps)).all()
    torch.testing.assert_close(out.float(), table[ids[rank][:4]].sum(1), rtol=torch.finfo(dtype).eps, atol=1e-3)
    expected = table[ids[rank][:4]].sum(2)
    torch.testing.assert_close(weights.grad.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


@pytest.mark.slow
def test_two_ranks_are_one_table():
    run_on_ranks(check_ranks, 2, torch.bfloat16)


# ---- error -----------------------------------------------------------------------------------------------------------

EPS = {torch.bfloat16: 1e-8, torch.float16: 1e-4}  # what float16 can hold; torch divides by 0 else


class SparseAdamByDefinition:
    """torch.optim.SparseAdam's rule on a dense gradient, in the dtype of the weight."""

    def __init__(self, weights, lr, eps):
        (weight,) = weights
        self.weight, self.lr, self.eps, self.steps = weight, lr, eps, 0
        self.m, self.v = torch.zeros_like(weight.data), torch.zeros_like(weight.data)

    def step(self):
        self.steps += 1
        rows = (self.weight.grad != 0).any(1)
        g, m, v = self.weight.grad[rows], self.m[rows], self.v[rows]
        m, v = m + (g - m) * 0.1, v + (g * g - v) * 0.001
        self.m[rows], self.v[rows] = m, v
        size = self.lr * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        self.weight.data[rows] -= size * (m / (v.sqrt() + self.eps))


def torch_optimizer(name, weight, lr, eps):
    """Of torch; by its definition where torch has none on a CPU: SparseAdam for float16."""
    if name == "SGD":
        return torch.optim.SGD([weight], lr=lr)
    if name == "Adagrad":
        return torch.optim.Adagrad([weight], lr=lr, eps=eps)
    if name == "RowWiseAdagrad":
        return RowWiseAdagradByDefinition(weight, lr, eps)
    kind = SparseAdamByDefinition if weight.dtype == torch.float16 else torch.optim.SparseAdam
    return kind([weight], lr=lr, eps=eps)


def initial_table():
    """Numbers that each dtype can hold."""
    return torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(0)).bfloat16().half()


def run_nn(name, dtype, steps, lr, eps):
    """nn.EmbeddingBag of `dtype`: (outputs, table)."""
    sparse = dtype != torch.float16 or name == "RowWiseAdagrad"  # torch's rules do not take sparse float16
    bag = nn.EmbeddingBag.from_pretrained(initial_table().to(dtype), freeze=False, mode="sum", sparse=sparse)
    optimizer = torch_optimizer(name, bag.weight, lr, eps)
    outs = []
    for step in range(steps):
        out = bag(skewed_ids(torch.Generator().manual_seed(step)))
        (out.to(torch.promote_types(dtype, torch.float32)) ** 2).mean().backward()
        optimizer.step()
        bag.weight.grad = None
        outs.append(out.detach())
    return torch.stack(outs), bag.weight.detach()


def run_ours(name, dtype, steps, lr, eps, kernels):
    """The same for a bag of ours that evicts."""
    options = dict(freeze=False, mode="sum", num_slots=FEW_SLOTS, kernels=kernels)
    bag = FreqAwareEmbeddingBag.from_pretrained(initial_table().to(dtype), **options)
    optimizer = getattr(optim, name)(bag.parameters(), lr=lr, **({} if name == "SGD" else {"eps": eps}))
    outs = []
    for step in range(steps):
        out = bag(skewed_ids(torch.Generator().manual_seed(step)))
        (out.float() ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach())
    assert bag.stats.evictions > steps
    return torch.stack(outs), bag.logical_weight()


@every_half
@every_optimizer
def test_as_right_as_torch_in_the_same_dtype(name, kernels, dtype):
    """Largest error of outputs and table against float64: at most 4 times that of torch's bag and optimizer in this
    dtype, plus one unit in the last place of 1."""
    steps, lr, eps = 100, {"SGD": 0.5}.get(name, 0.01), EPS[dtype]
    exact = run_nn(name, torch.float64, steps, lr, eps)
    theirs = run_nn(name, dtype, steps, lr, eps)
    ours = run_ours(name, dtype, steps, lr, eps, kernels)
    far = [max((a.double() - b).abs().max().item() for a, b in zip(run, exact, strict=True)) for run in (ours, theirs)]
    print(name, dtype, far)
    assert far[0] <= 4 * far[1] + torch.finfo(dtype).eps, far


@every_half
def test_steps_below_half_a_unit_train_on_average(dtype):
    """Weights of 1 and 100 steps of an eighth of a unit: rounded to the nearest (torch) nothing moves; by chance the
    mean moves by 12.5 units, within 5 standard errors, as in float64."""
    step = torch.finfo(dtype).eps / 2 / 8  # below 1 a unit is half of eps
    num_rows, dim = 64, 32
    theirs = nn.Parameter(torch.ones(num_rows, dim, dtype=dtype))
    optimizer = torch.optim.SGD([theirs], lr=step)
    for _ in range(100):
        theirs.grad = torch.ones_like(theirs)
        optimizer.step()
    assert (theirs == 1).all()
    bag = FreqAwareEmbeddingBag.from_pretrained(
        torch.ones(num_rows, dim, dtype=dtype), freeze=False, mode="sum", num_slots=num_rows
    )
    ours = optim.SGD(bag.parameters(), lr=step)
    for _ in range(100):
        bag(torch.arange(num_rows).unsqueeze(1)).sum().backward()
        ours.step()
        ours.zero_grad()
    moved = (1 - bag.logical_weight().double()) / (8 * step)
    deviation = (100 * (1 / 8) * (7 / 8)) ** 0.5
    assert abs(moved.mean() - 12.5) < 5 * deviation / (num_rows * dim) ** 0.5
    assert abs(moved.std() - deviation) < 0.1 * deviation


# ---- bytes -----------------------------------------------------------------------------------------------------------


@every_half
def test_bytes_halve(dtype):
    counted = []
    for kind in (torch.float32, dtype):
        bag = half_bag(kind, optimizer="adagrad")
        optimizer = optim.Adagrad(bag.parameters(), lr=0.05)
        train(bag, optimizer)
        assert bag.stats.bytes_fetched > 0 and bag.stats.bytes_written_back > 0
        stats, held = bag.stats, bag.device_bytes()
        per_row = [stats.bytes_fetched // stats.rows_fetched, stats.bytes_written_back // stats.rows_written_back]
        counted.append(np.array([*per_row, held["cache"], held["reserved"], held["host_store"]]))
    assert (counted[0] == 2 * counted[1]).all()


def test_max_cache_bytes_holds_twice_the_rows():
    slots = [
        make_bag(None, max_cache_bytes=40 * DIM * 4, dtype=dtype).num_slots for dtype in (torch.float32, torch.bfloat16)
    ]
    assert slots == [40, 80]


@every_half
def test_casts_are_refused_and_name_the_keyword(dtype):
    with pytest.raises(TypeError, match="build it with dtype=torch.float32"):
        half_bag(dtype).float()
    with pytest.raises(TypeError, match="per_sample_weights is torch.float32"):
        half_bag(dtype)(torch.tensor([[1, 2]]), per_sample_weights=torch.ones(1, 2))
