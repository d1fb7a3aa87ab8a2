"""python -m pytest tests/test_checkpoint.py

Proves: training goes on bit for bit after a save in the middle and a load into a fresh model with another cache; plain
torch loads what is read back; memory is bounded; a damaged, missing or foreign file is named and nothing is modified;
a process killed at any instant leaves the last complete checkpoint; ranks and shardings do not matter.
Every training loop here evicts.
"""

import copy
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import nn
from worlds import DIM, NUM_ROWS, assert_same_bits, chunks_of, counts, loss_of, make_bag, skewed_ids

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, checkpoint, optim, parallel
from colossal_freqcache.block import CachedWeight
from colossal_freqcache.checkpoint import CheckpointError

SIZES = [90, 7, 150]
SMALL_SHARDS = dict(shard_bytes=3000)  # several files a table
OURS = {"SGD": optim.SGD, "Adagrad": optim.Adagrad, "RowWiseAdagrad": optim.RowWiseAdagrad, "Adam": optim.Adam}
TORCH = {
    "torch.SGD": torch.optim.SGD,
    "torch.Adagrad": torch.optim.Adagrad,
    "torch.SparseAdam": torch.optim.SparseAdam,
}
EVERY = {**OURS, **TORCH}


class Model(nn.Module):
    """A bag, a collection, dense parameters, a buffer that is saved and one that is not."""

    def __init__(self, num_slots: int = 25, seed: int = 0, sizes=SIZES, **options) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(2 * DIM, 2 * DIM)
        self.make_tables(sizes, num_slots, mode="sum", **options)
        self.norm = nn.BatchNorm1d(2 * DIM)
        self.register_buffer("offset", torch.randn(3, dtype=torch.float64))
        self.register_buffer("scratch", torch.randn(5), persistent=False)

    def make_tables(self, sizes, num_slots, **options) -> None:
        self.bag = FreqAwareEmbeddingBag(NUM_ROWS, DIM, num_slots=num_slots, **options)
        self.many = FreqAwareEmbeddingBagCollection(sizes, DIM, num_slots=3 * num_slots, **options)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = torch.cat([(ids % rows).reshape(-1) for rows in SIZES])
        offsets = torch.arange(0, values.numel(), ids.shape[1])
        pooled = torch.cat([self.bag(ids), self.many(values, offsets).sum(1)], 1)
        return self.norm(self.first(pooled)) + self.offset.sum().float()

    def bags(self) -> list:
        return [self.bag, self.many]


class PlainModel(Model):
    """The same of torch's own modules."""

    def make_tables(self, sizes, num_slots, **options) -> None:
        self.bag = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True)
        self.many = nn.Module()
        self.many.tables = nn.ModuleList([nn.EmbeddingBag(rows, DIM, mode="sum", sparse=True) for rows in sizes])


def parameters_for(model: nn.Module, name: str) -> list:
    """What the optimizer of that name can train: SparseAdam takes no dense gradients."""
    if name != "torch.SparseAdam":
        return list(model.parameters())
    for parameter in [*model.first.parameters(), *model.norm.parameters()]:
        parameter.requires_grad_(False)
    return [bag.weight for bag in model.bags()]


def make(name: str = "Adagrad", lr: float = 0.05, num_slots: int = 25, seed: int = 0, **options):
    """(model, optimizer) that evict on most steps."""
    model = Model(num_slots, seed, **options)
    return model, EVERY[name](parameters_for(model, name), lr=lr)


def train(model, optimizer, start: int, stop: int) -> None:
    """Steps start..stop-1 of a fixed stream."""
    generator = torch.Generator().manual_seed(9)
    for step in range(stop):
        ids = skewed_ids(generator)
        if step >= start:
            loss_of(model(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()


def everything(model, optimizer=None) -> list[torch.Tensor]:
    """Every tensor of model and optimizer by logical value, and the numbers of the param_groups."""
    found = [value.clone() for value in model.state_dict().values()]
    if optimizer is not None:
        state_dict = optimizer.state_dict()
        for number in sorted(state_dict["state"]):
            state = state_dict["state"][number]
            found += [torch.as_tensor(state[key]).clone() for key in sorted(state)]
        found += [torch.tensor(float(group["lr"])) for group in state_dict["param_groups"]]
    return found


def assert_evicted(model, steps: int) -> None:
    for bag in model.bags():
        assert bag.stats.evictions > steps, bag.stats
        bag._cache.check()


def assert_unchanged(model, optimizer, call, *words: str) -> None:
    """call() raises CheckpointError with all of `words`, and no value changes."""
    before = everything(model, optimizer)
    owners = [bag._cached_weight.owner for bag in model.bags()]
    with pytest.raises(CheckpointError) as raised:
        call()
    for word in words:
        assert word in str(raised.value), raised.value
    assert_same_bits(before, everything(model, optimizer))
    assert owners == [bag._cached_weight.owner for bag in model.bags()]


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_training_goes_on_bit_for_bit(name, tmp_path):
    """Saved after 15 of 30 steps; the other half runs in a model of another seed, cache size, policy and row order."""
    model, optimizer = make(name, evict_strategy="lru")
    train(model, optimizer, 0, 10)
    optimizer.param_groups[0]["lr"] = 0.02
    train(model, optimizer, 10, 15)
    path = checkpoint.save(tmp_path, model, optimizer, step=15, **SMALL_SHARDS)
    saved = everything(model, optimizer)
    train(model, optimizer, 15, 30)
    assert_evicted(model, 30)

    fresh, other = make(name, lr=0.5, num_slots=40, seed=3, evict_strategy="s3fifo")
    seen = []
    other.register_step_post_hook(lambda *_: seen.append(fresh.bag.weight.grad is not None))
    assert checkpoint.load_latest(tmp_path, fresh, other) == 15
    assert_same_bits(saved, everything(fresh, other))
    train(fresh, other, 15, 30)
    assert seen == [True] * 15
    assert_evicted(fresh, 15)
    assert_same_bits(everything(model, optimizer), everything(fresh, other))

    # and in one that has trained on something else meanwhile, whose rows are in the middle of their life
    used, third = make(name, seed=4, num_slots=30)
    train(used, third, 3, 9)
    assert checkpoint.load(path, used, third) == 15
    train(used, third, 15, 30)
    assert_same_bits(everything(model, optimizer), everything(used, third))


def test_a_frequency_order_and_reserved_columns_do_not_show(tmp_path):
    """One bag alone; ids in other rows, columns reserved by optimizer=, float64."""
    bag = make_bag(ids_freq_mapping=counts(), dtype=torch.float64)
    opt = optim.Adam(bag.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    batches = [skewed_ids(generator) for _ in range(20)]
    for step, ids in enumerate(batches):
        if step == 10:
            checkpoint.save(tmp_path, bag, opt, step)
        loss_of(bag(ids)).backward()
        opt.step()
        opt.zero_grad()
    other = make_bag(31, seed=2, dtype=torch.float64, optimizer="adam", evict_strategy="lfu")
    resumed = optim.Adam(other.parameters(), lr=0.05)
    assert checkpoint.load_latest(str(tmp_path), other, resumed) == 10
    for ids in batches[10:]:
        loss_of(other(ids)).backward()
        resumed.step()
        resumed.zero_grad()
    assert bag.stats.evictions > 100 and other.stats.evictions > 50
    assert_same_bits(everything(bag, opt), everything(other, resumed))


@pytest.mark.parametrize(("written", "read"), [("torch.Adagrad", "Adagrad"), ("Adagrad", "torch.Adagrad")])
def test_classes_of_one_rule_read_each_other(written, read, tmp_path):
    model, optimizer = make(written)
    train(model, optimizer, 0, 8)
    checkpoint.save(tmp_path, model, optimizer, 8)
    fresh, other = make(read, seed=1)
    checkpoint.load_latest(tmp_path, fresh, other)
    train(model, optimizer, 8, 16)
    train(fresh, other, 8, 16)
    assert_same_bits(everything(model, optimizer), everything(fresh, other))


@pytest.mark.parametrize(("written", "read"), [("Adam", "torch.SparseAdam"), ("torch.SparseAdam", "Adam")])
def test_adam_and_sparse_adam_read_each_other(written, read, tmp_path):
    results = []
    for resume in (False, True):
        bag = make_bag()
        opt = EVERY[written](bag.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        for step in range(12):
            if step == 6 and not resume:
                checkpoint.save(tmp_path, bag, opt, 6)
            elif step == 6:
                bag = make_bag(seed=2)
                opt = EVERY[read](bag.parameters(), lr=0.5)
                checkpoint.load_latest(tmp_path, bag, opt)
                assert isinstance(opt.state[bag.weight]["step"], int if read == "torch.SparseAdam" else torch.Tensor)
            loss_of(bag(skewed_ids(generator))).backward()
            opt.step()
            opt.zero_grad()
        results.append(everything(bag, opt))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", ["Adagrad", "torch.Adagrad", "RowWiseAdagrad", "Adam", "torch.SGD"])
def test_saved_before_the_first_step(name, tmp_path):
    """initial_accumulator_value is the saved one, also in an optimizer that was built with another and has trained."""
    options = {"initial_accumulator_value": 0.5} if "Adagrad" in name else {}

    def build(seed, **options):
        model = Model(seed=seed)
        return model, EVERY[name](parameters_for(model, name), lr=0.05, **options)

    model, optimizer = build(0, **options)
    checkpoint.save(tmp_path, model, optimizer)
    train(model, optimizer, 0, 6)
    for steps_before in (0, 4):
        fresh, other = build(1)
        train(fresh, other, 0, steps_before)
        assert checkpoint.load_latest(tmp_path, fresh, other) == 0
        train(fresh, other, 0, 6)
        assert_same_bits(everything(model, optimizer), everything(fresh, other))


def test_state_that_was_loaded_and_not_stepped_since(tmp_path):
    """A torch optimizer keeps loaded tensors until its next step; they are saved all the same."""
    bag = make_bag()
    opt = torch.optim.Adagrad(bag.parameters(), lr=0.05)
    loss_of(bag(skewed_ids(torch.Generator().manual_seed(1)))).backward()
    opt.step()
    other = make_bag(seed=3)
    waiting = torch.optim.Adagrad(other.parameters(), lr=0.05)
    waiting.load_state_dict(opt.state_dict())
    path = checkpoint.save(tmp_path, other, waiting, 1, **SMALL_SHARDS)
    found = checkpoint.read_optimizer_state_dict(path)["state"][0]
    wanted = opt.state_dict()["state"][0]
    assert torch.equal(found["sum"], wanted["sum"]) and found["step"] == 1 and wanted["sum"].any()


def test_state_that_was_cleared_is_saved_as_cleared(tmp_path):
    bag = make_bag()
    opt = optim.Adam(bag.parameters(), lr=0.05)
    loss_of(bag(skewed_ids(torch.Generator().manual_seed(1)))).backward()
    opt.step()
    opt.zero_grad()
    opt.state.clear()
    path = checkpoint.save(tmp_path, bag, opt)
    assert not opt.state
    with safe_open(path / "table-0000-00000.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["exp_avg", "exp_avg_sq", "weight"] and not file.get_tensor("exp_avg").any()
    other = make_bag(seed=1)
    fresh = optim.Adam(other.parameters(), lr=0.05)
    checkpoint.load(path, other, fresh)
    for each, trainer in ((bag, opt), (other, fresh)):
        loss_of(each(skewed_ids(torch.Generator().manual_seed(2)))).backward()
        trainer.step()
    assert_same_bits(everything(bag, opt), everything(other, fresh))


def test_frozen_table_groups_and_tensor_settings(tmp_path):
    """Two groups, one with a table that is not trained, a tensor lr, a key that a scheduler added, inf."""

    def build(seed, lr):
        model = Model(seed=seed)
        model.many.weight.requires_grad_(False)
        dense = [*model.first.parameters(), *model.norm.parameters()]
        groups = [
            dict(params=[model.bag.weight, model.many.weight], lr=lr),
            dict(params=dense, lr=torch.tensor(lr), betas=(0.5, 0.6), foreach=False),
        ]
        return model, optim.Adam(groups)

    model, optimizer = build(0, 0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.param_groups[0]["limit"] = float("inf")
    train(model, optimizer, 0, 5)
    scheduler.step()
    checkpoint.save(tmp_path, model, optimizer, 5)
    fresh, other = build(1, 0.7)
    checkpoint.load_latest(tmp_path, fresh, other)
    assert fresh.many._cached_weight.owner is None
    ours, theirs = optimizer.param_groups, other.param_groups
    assert [{k: v for k, v in g.items() if k != "params"} for g in ours] == [
        {k: v for k, v in g.items() if k != "params"} for g in theirs
    ]
    assert isinstance(theirs[1]["lr"], torch.Tensor) and isinstance(theirs[1]["betas"], tuple)
    assert not isinstance(theirs[0]["lr"], torch.Tensor) and "initial_lr" in theirs[0]
    for each, trainer in ((model, optimizer), (fresh, other)):
        train(each, trainer, 5, 9)
    assert_same_bits(everything(model, optimizer), everything(fresh, other))


def test_tied_modules_and_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.a = make_bag(seed=seed)
            self.b = self.a
            self.x = nn.Linear(DIM, DIM)
            self.y = nn.Linear(DIM, DIM)
            self.y.weight = self.x.weight

    model = Tied(0)
    path = checkpoint.save(tmp_path, model, optim.SGD(model.parameters(), lr=0.1))
    read = checkpoint.read_state_dict(path)
    wanted = model.state_dict()
    assert list(read) == list(wanted) and len(list(path.glob("table-*"))) == 1
    assert_same_bits(list(wanted.values()), list(read.values()))
    fresh = Tied(1)
    checkpoint.load(path, fresh, optim.SGD(fresh.parameters(), lr=0.1))
    assert_same_bits(everything(model), everything(fresh))


def test_weights_alone(tmp_path):
    """Without an optimizer the weights are loaded, and the rows' state stays: as with model.load_state_dict."""
    model, optimizer = make()
    train(model, optimizer, 0, 5)
    checkpoint.save(tmp_path, model, optimizer, 5)
    other, used = make(seed=1)
    train(other, used, 0, 3)
    state = everything(other, used)[len(other.state_dict()) :]
    assert checkpoint.load_latest(tmp_path, other) == 5
    assert_same_bits(everything(model), everything(other))
    assert_same_bits(state, everything(other, used)[len(other.state_dict()) :])
    path = checkpoint.save(tmp_path, model, step=6)
    assert not (path / "optimizer.safetensors").exists()
    with safe_open(path / "table-0000-00000.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["weight"]
    assert_unchanged(other, used, lambda: checkpoint.load(path, other, used), str(path), "no optimizer")
    with pytest.raises(CheckpointError, match="no optimizer"):
        checkpoint.read_optimizer_state_dict(path)


@pytest.mark.parametrize("name", ["SGD", "RowWiseAdagrad", "torch.Adagrad"])
def test_state_alone(name, tmp_path):
    """weights=False: the weights are kept elsewhere, and are neither written nor touched."""
    model, optimizer = make(name)
    train(model, optimizer, 0, 5)
    path = checkpoint.save(tmp_path, model, optimizer, 5, weights=False, **SMALL_SHARDS)
    other, used = make(name, seed=1, lr=0.3)
    weights = everything(other)
    assert checkpoint.load_latest(tmp_path, other, used, weights=False) == 5
    assert_same_bits(weights, everything(other))
    num_weights = len(weights)
    assert_same_bits(everything(model, optimizer)[num_weights:], everything(other, used)[num_weights:])
    for file in path.glob("table-*"):
        with safe_open(file, framework="pt") as opened:
            assert list(opened.keys()) == ["sum"] and name != "SGD"
    checkpoint.verify(path)
    assert checkpoint.read_optimizer_state_dict(path)["param_groups"][0]["lr"] == 0.05
    for call in (lambda: checkpoint.load(path, other, used), lambda: checkpoint.read_state_dict(path)):
        assert_unchanged(other, used, call, str(path), "weights=False")
    checkpoint.save(tmp_path, model, optimizer, 6)
    train(other, used, 0, 2)
    weights = everything(other)
    assert checkpoint.load_latest(tmp_path, other, used, weights=False) == 6
    assert_same_bits(weights, everything(other))
    for call in (checkpoint.save, checkpoint.load):
        with pytest.raises(ValueError, match="weights=False.*optimizer"):
            call(tmp_path, model, weights=False)


def test_a_dense_optimizer_alone(tmp_path):
    """Any torch optimizer of the dense parameters: its state is tensors and numbers."""
    model = Model()
    dense = [*model.first.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.AdamW(dense, lr=0.1)
    for parameter in dense:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = checkpoint.save(tmp_path, model, optimizer)
    fresh = Model(seed=1)
    other = torch.optim.AdamW([*fresh.first.parameters(), *fresh.norm.parameters()], lr=0.5)
    checkpoint.load(path, fresh, other)
    assert_same_bits(everything(model, optimizer), everything(fresh, other))
    rmsprop = torch.optim.RMSprop([*fresh.first.parameters(), *fresh.norm.parameters()])
    assert_unchanged(fresh, other, lambda: checkpoint.load(path, fresh, rmsprop), "AdamW", "RMSprop")
    tables = optim.SGD([bag.weight for bag in model.bags()], lr=0.1)
    with pytest.warns(UserWarning, match="4 cached tables.*bag.weight.*another optimizer than the AdamW"):
        checkpoint.save(tmp_path, model, optimizer)
    assert tables.param_groups


DTYPES = [torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.uint8]


def test_every_dtype_and_shape_of_buffers(tmp_path):
    """Three elements each: most would be misaligned in the file if it kept their order. Empty and 0-d ones, too."""
    model, fresh = nn.Module(), nn.Module()
    for number, dtype in enumerate(DTYPES):
        for name, shape in (("three", (3,)), ("none", (0, 2)), ("one", ()), ("turned", (3, 2))):
            values = (torch.randn(shape) * 9).to(dtype)
            model.register_buffer(f"{name}_{number}", values.t() if name == "turned" else values)
            fresh.register_buffer(f"{name}_{number}", torch.zeros_like(model.get_buffer(f"{name}_{number}")))
    path = checkpoint.save(tmp_path, model)
    checkpoint.load(path, fresh)
    assert_same_bits(everything(model), everything(fresh))
    data = (path / "dense.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in model.named_buffers())
    read = checkpoint.read_state_dict(path)
    assert [value.dtype for value in read.values()] == [value.dtype for value in model.state_dict().values()]


# ---- plain torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "torch.Adagrad"])
def test_plain_torch_loads_it(name, tmp_path):
    """The uncached model and torch's optimizer of the same name take over, to the parameters' last bit."""
    model, optimizer = make(name)
    train(model, optimizer, 0, 10)
    path = checkpoint.save(tmp_path, model, optimizer, 10, **SMALL_SHARDS)
    state_dict = checkpoint.read_state_dict(path)
    wanted = model.state_dict()
    assert list(state_dict) == list(wanted)
    assert_same_bits(list(wanted.values()), list(state_dict.values()))
    assert {"bag.weight", "many.tables.2.weight", "offset"} <= set(state_dict) and "scratch" not in state_dict

    plain = PlainModel()
    plain.load_state_dict(state_dict)
    plain_optimizer = getattr(torch.optim, name.removeprefix("torch."))(plain.parameters(), lr=1.0)
    plain_optimizer.load_state_dict(checkpoint.read_optimizer_state_dict(path))
    assert plain_optimizer.param_groups[0]["lr"] == 0.05
    ours, theirs = optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"]
    if name != "SGD":
        number = [parameter is model.many.weight for parameter in model.parameters()].index(True)
        for column in [key for key in ours[number] if key != "step"]:
            tables = [theirs[number + table][column] for table in range(len(SIZES))]
            assert torch.equal(torch.cat(tables), ours[number][column])
            assert all(theirs[number + table]["step"] == 10 for table in range(len(SIZES)))
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    plain_optimizer.step()  # nothing that it needs is missing


def test_rowwise_state_has_one_number_a_row(tmp_path):
    model, optimizer = make("RowWiseAdagrad")
    train(model, optimizer, 0, 3)
    path = checkpoint.save(tmp_path, model, optimizer)
    with safe_open(path / "table-0000-00000.safetensors", framework="pt") as file:
        assert file.get_slice("sum").get_shape() == [NUM_ROWS, 1]
    state = checkpoint.read_optimizer_state_dict(path)["state"]
    ours = optimizer.state_dict()["state"]
    number = [parameter is model.bag.weight for parameter in model.parameters()].index(True)
    assert torch.equal(state[number]["sum"], ours[number]["sum"]) and state[number]["sum"].shape == (NUM_ROWS,)


def test_reading_as_tensors_has_a_limit(tmp_path):
    model, optimizer = make()
    path = checkpoint.save(tmp_path, model, optimizer)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert checkpoint.read_state_dict(path, max_bytes=num_bytes)
    with pytest.raises(ValueError, match=f"{num_bytes} bytes.*max_bytes={num_bytes - 1}"):
        checkpoint.read_state_dict(path, max_bytes=num_bytes - 1)
    state = checkpoint.read_optimizer_state_dict(path)["state"].values()
    num_bytes = sum(tensor.numel() * tensor.element_size() for entry in state for tensor in entry.values())
    num_bytes -= 4 * (len(SIZES) - 1)  # one step count for the collection
    assert checkpoint.read_optimizer_state_dict(path, max_bytes=num_bytes)
    with pytest.raises(ValueError, match=f"{num_bytes} bytes.*max_bytes={num_bytes - 1}"):
        checkpoint.read_optimizer_state_dict(path, max_bytes=num_bytes - 1)


# ---- memory ---------------------------------------------------------------------------------------------------------


@chunks_of(4096)
def test_no_tensor_grows_with_the_table(tmp_path, monkeypatch):
    """A table of 8 pieces: no more than one piece of one column is asked for, or written, at a time."""
    piece = 4096 + 16 * DIM * 4
    bag = make_bag(num_rows=1000)
    opt = optim.Adagrad(bag.parameters(), lr=0.1)
    read, write = CachedWeight.logical_chunk, CachedWeight.set_logical
    asked, written = [], []

    def reading(self, column, first, last, to=None):
        values = read(self, column, first, last, to)
        asked.append(values.numel() * values.element_size())
        return values

    def writing(self, column, values, start=0):
        written.append(values.numel() * values.element_size())
        write(self, column, values, start)

    monkeypatch.setattr(CachedWeight, "logical_chunk", reading)
    monkeypatch.setattr(CachedWeight, "set_logical", writing)
    bag.max_state_dict_bytes = 5000  # a whole table as one tensor would raise
    path = checkpoint.save(tmp_path, bag, opt, shard_bytes=10_000)
    checkpoint.load(path, bag, opt)
    assert len(asked) >= 16 and max(asked) <= piece and sum(asked) == 1000 * DIM * 4 * 2
    assert max(written) <= piece and sum(written) == sum(asked)
    sizes = [file.stat().st_size for file in path.glob("table-*")]
    assert len(sizes) == 7 and max(sizes) < 10_000 + 500


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """(path, model, optimizer) of a checkpoint in several files, and another model to load it into."""
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    path = checkpoint.save(tmp_path, model, optimizer, 3, **SMALL_SHARDS)
    other, used = make(seed=1)
    train(other, used, 0, 2)
    return path, other, used


FILES = ["table-0000-00001.safetensors", "table-0003-00000.safetensors", "dense.safetensors", "optimizer.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "swap"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(name, damage, saved):
    path, model, optimizer = saved
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    elif damage == "truncate":
        del data[len(data) // 2 :]
    elif damage == "extend":
        data += b"\0"
    elif damage == "swap":
        data = bytearray(reversed(data))
    (path / name).unlink()
    if damage != "remove":
        (path / name).write_bytes(data)
    for call in (
        lambda: checkpoint.load(path, model, optimizer),
        lambda: checkpoint.load_latest(path.parent, model),
        lambda: checkpoint.verify(path),
        lambda: checkpoint.read_state_dict(path),
        lambda: checkpoint.read_optimizer_state_dict(path),
    ):
        assert_unchanged(model, optimizer, call, str(path / name))


def rewrite(path, change, checksum: bool = True) -> None:
    """Changes the manifest; with `checksum` as somebody would who wants it to be believed."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if checksum:
        manifest["checksum"] = checkpoint._checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("cut", [1, 40, 0.5, 0.999])
def test_a_truncated_manifest_is_named(cut, saved):
    path, model, optimizer = saved
    data = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(data[: cut if cut >= 1 else int(len(data) * cut)])
    for call in (lambda: checkpoint.load(path, model, optimizer), lambda: checkpoint.load_latest(path.parent, model)):
        assert_unchanged(model, optimizer, call, str(path / "manifest.json"))


@pytest.mark.parametrize(
    ("change", "checksum", "words"),
    [
        (lambda m: m.update(step=4), False, ["altered"]),
        (lambda m: m["optimizer"]["param_groups"][0]["settings"].update(lr=9.0), False, ["altered"]),
        (lambda m: m.pop("checksum"), False, ["altered"]),
        (lambda m: m.update(format_version=2, package_version="7.0"), True, ["version 2", "7.0"]),
        (lambda m: m.update(format="something else"), True, ["no manifest"]),
        (lambda m: m["tables"][0].update(rows=300), True, ["bag.weight", "300", "200"]),
        (lambda m: m["tables"][1]["shards"].pop(), True, ["many.tables.0.weight"]),
        (lambda m: m["tables"][0]["shards"].pop(1), True, ["bag.weight", "missing"]),
        (lambda m: m["tables"][0]["columns"].update(weight=9), True, ["table-0000-00000.safetensors"]),
        (lambda m: m["files"].update({"../../etc/passwd": {}}), True, ["passwd"]),
    ],
)
def test_an_altered_manifest_is_named(change, checksum, words, saved):
    path, model, optimizer = saved
    rewrite(path, change, checksum)
    call = lambda: checkpoint.load(path, model, optimizer)  # noqa: E731
    assert_unchanged(model, optimizer, call, str(path), *words)


def test_another_manifest_layout_is_the_same_manifest(saved):
    """The checksum is of what the manifest says, not of its spaces."""
    path, model, optimizer = saved
    rewrite(path, lambda manifest: None, checksum=False)
    assert checkpoint.load(path, model, optimizer) == 3


def test_checksums_are_what_b2sum_prints(saved):
    path, *_ = saved
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        assert hashlib.blake2b((path / name).read_bytes()).hexdigest() == entry["blake2b"]


class Wider(Model):
    def __init__(self, seed):
        super().__init__(seed=seed)
        self.first = nn.Linear(2 * DIM, 5)


class Extra(Model):
    def __init__(self, seed):
        super().__init__(seed=seed)
        self.extra = make_bag()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Model(seed=1, sizes=[90, 7, 151]), ["many.tables.2.weight", "(150, 8)", "(151, 8)"]),
        (lambda: Model(seed=1, sizes=[90, 7]), ["many.tables.2.weight", "not in the model"]),
        (lambda: Model(seed=1, sizes=[*SIZES, 3]), ["many.tables.3.weight", "not in it"]),
        (lambda: Wider(1), ["first.weight", "[16, 16]", "[5, 16]"]),
        (lambda: Extra(1), ["extra.weight", "not in it"]),
    ],
)
def test_another_model_is_named(build, words, saved):
    path, *_ = saved
    model = build()
    optimizer = optim.Adagrad(model.parameters(), lr=0.1)
    for chosen in (optimizer, None):
        call = lambda chosen=chosen: checkpoint.load(path, model, chosen)  # noqa: E731
        assert_unchanged(model, optimizer, call, str(path), *words)


def test_another_optimizer_is_named(saved):
    path, model, _ = saved
    for bag in model.bags():
        bag.drop_optimizer_state()
    params = list(model.parameters())
    for wrong, words in [
        (torch.optim.SGD(params, lr=0.1), ["Adagrad", "'adagrad'", "SGD", "'sgd'"]),
        (torch.optim.Adam(params, lr=0.1), ["'adagrad'", "Adam", "None"]),
        (torch.optim.Adagrad(params[:-1], lr=0.1), ["[8]", "[7]"] if len(params) == 8 else ["param_groups"]),
        (torch.optim.Adagrad(params[::-1], lr=0.1), ["same order"]),
        (torch.optim.Adagrad([dict(params=params[:2]), dict(params=params[2:])], lr=0.1), ["param_groups"]),
    ]:
        before = everything(model)
        with pytest.raises(CheckpointError) as raised:
            checkpoint.load(path, model, wrong)
        assert all(word in str(raised.value) for word in [str(path), *words]), raised.value
        assert_same_bits(before, everything(model))
    other = Model(seed=1, optimizer="adam")
    foreign = torch.optim.Adagrad(other.parameters(), lr=0.1)
    assert_unchanged(other, None, lambda: checkpoint.load(path, other, foreign), "'adam'", "'adagrad'")


# ---- what is refused when saving ------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 0, 2)
    wrapped = nn.Sequential(model, WithExtraState(2, 2))
    odd = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    odd.param_groups[0]["hook"] = print
    elsewhere = optim.SGD(make_bag().parameters(), lr=0.1)
    copied = copy.deepcopy((model, optimizer))
    adamw = torch.optim.AdamW(make("SGD")[0].parameters())
    for call, words in [
        (lambda: checkpoint.save(tmp_path, wrapped), ["'1'", "WithExtraState", "extra state"]),
        (lambda: checkpoint.save(tmp_path, model, odd), ["hook", "function"]),
        (lambda: checkpoint.save(tmp_path, model, elsewhere), ["does not have"]),
        (lambda: checkpoint.save(tmp_path, *copied), ["2 steps", "many"]),
        (lambda: checkpoint.save(tmp_path, model, adamw), ["does not have"]),
        (lambda: checkpoint.save(tmp_path, model, step=-1), ["step=-1"]),
        (lambda: checkpoint.save(tmp_path, model, step=1.5), ["step=1.5"]),
        (lambda: checkpoint.save(tmp_path, model, shard_bytes=0), ["shard_bytes=0"]),
        (lambda: checkpoint.save(tmp_path, nn.ParameterList([torch.zeros(2, 2).to_sparse()])), ["sparse"]),
    ]:
        with pytest.raises(ValueError) as raised:
            call()
        assert any(word in str(raised.value) for word in words), raised.value
        assert not list(tmp_path.iterdir()), list(tmp_path.iterdir())
    held = make("SGD")[0]
    with pytest.raises(ValueError, match="AdamW holds 'bag.weight'"):
        checkpoint.save(tmp_path, held, torch.optim.AdamW(held.parameters()))


# ---- directories ----------------------------------------------------------------------------------------------------


def versioned(number: int):
    """A model whose every value follows from `number`."""
    model, optimizer = make()
    fill(model, number)
    return model, optimizer


def fill(model, number: int) -> None:
    with torch.no_grad():
        for bag in model.bags():
            bag.init_(lambda values: values.fill_(float(number)))
        model.offset.fill_(float(number))


def number_in(path, load=checkpoint.load_latest) -> float:
    """The number that a checkpoint's model was made from; it is the same in all of it."""
    model, optimizer = make(seed=7)
    assert load(path, model, optimizer) is not None
    tables = [value for name, value in model.state_dict().items() if "bag" in name or "many" in name]
    values = torch.cat([value.reshape(-1).double() for value in [*tables, model.offset]]).unique().tolist()
    assert len(values) == 1, values
    return values[0]


def test_the_newest_complete_one_is_loaded(tmp_path):
    model, optimizer = versioned(1)
    assert checkpoint.load_latest(tmp_path / "nowhere", model) is None
    assert checkpoint.load_latest(tmp_path, model) is None
    for step in (3, 20, 100):
        fill(model, step)
        path = checkpoint.save(tmp_path / "deep" / "er", model, optimizer, step)
    directory = path.parent
    assert path.name == "step-0000000100" and len(list(directory.iterdir())) == 3
    (directory / "step-0000000500").mkdir()  # no manifest: not complete
    (directory / ".step-0000000600.partial").mkdir()
    (directory / "step-7").mkdir()
    (directory / "notes.txt").write_text("kept")
    assert number_in(directory) == 100 and number_in(directory / "step-0000000003", checkpoint.load) == 3
    with pytest.raises(CheckpointError, match="step-0000000500.*missing"):
        checkpoint.load(directory / "step-0000000500", model)
    checkpoint.save(directory, model, optimizer, 12_345_678_901)
    assert not (directory / ".step-0000000600.partial").exists() and (directory / "notes.txt").exists()
    assert checkpoint.load_latest(directory, model, optimizer) == 12_345_678_901


@pytest.mark.parametrize("at", ["fsync", "rename", "write"])
def test_a_failing_disk_leaves_what_was_there(at, tmp_path, monkeypatch):
    """Every call in turn raises as a full disk would; the older checkpoint of the same step stays, whole.

    Or the new one, where only the last fsync of the directory has failed.
    """
    model, optimizer = versioned(1)
    checkpoint.save(tmp_path, model, optimizer, 5)
    fill(model, 2)
    real = {"fsync": os.fsync, "rename": os.rename, "write": checkpoint._File._write}[at]
    found = []
    for failing in range(100):
        calls = []

        def broken(*args, failing=failing, calls=calls):
            calls.append(args)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patched:
            if at == "write":
                patched.setattr(checkpoint._File, "_write", broken)
            else:
                patched.setattr(os, at, broken)
            try:
                checkpoint.save(tmp_path, model, optimizer, 5)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        found.append(number_in(tmp_path / "step-0000000005", checkpoint.load))
        assert [path.name for path in tmp_path.iterdir()] == ["step-0000000005"]
    assert len(found) >= (2 if at == "rename" else 5) and sorted(found) == found and found.count(2) == (at == "fsync")
    assert number_in(tmp_path) == 2


def test_a_replacement_that_was_killed_between_its_renames(tmp_path, monkeypatch):
    """The older one is set aside then. It is loaded from there, and put back by the next save."""
    model, optimizer = versioned(1)
    path = checkpoint.save(tmp_path, model, optimizer, 5)
    os.rename(path, tmp_path / ".step-0000000005.replaced")
    (tmp_path / ".step-0000000005.partial").mkdir()
    assert number_in(tmp_path) == 1
    fill(model, 2)
    checkpoint.save(tmp_path, model, optimizer, 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-0000000004", "step-0000000005"]
    assert number_in(tmp_path) == 1


SAVER = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_checkpoint as t
from colossal_freqcache import checkpoint

model, optimizer = t.versioned(0)
for line in sys.stdin:                                # "directory first-number": a child that saves until it is killed
    directory, number = line.split()
    child = os.fork()
    if child == 0:
        number = int(number)
        os.write(1, f"pid {{os.getpid()}}\\n".encode())
        while True:
            t.fill(model, number)
            os.write(1, f"begin {{number}}\\n".encode())
            checkpoint.save(directory, model, optimizer, number // 2, shard_bytes=2000)  # every step twice
            os.write(1, f"end {{number}}\\n".encode())
            number += 1
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path):
    """20 times SIGKILL inside save, at a random instant: the last complete checkpoint loads and is what was saved."""
    code = textwrap.dedent(SAVER).format(tests=os.path.dirname(__file__))
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    draw = random.Random(11)
    number = 1  # of the save that comes next
    inside = left_over = put_aside = 0
    try:
        for _ in range(60):
            print(tmp_path, number, file=server.stdin, flush=True)
            pid = int(server.stdout.readline().split()[1])
            for _ in range(draw.randint(1, 3)):  # whole saves before the one that is killed
                assert server.stdout.readline() == f"begin {number}\n"
                began = time.perf_counter()
                assert server.stdout.readline() == f"end {number}\n"
                duration = time.perf_counter() - began
                number += 1
            assert server.stdout.readline() == f"begin {number}\n"
            time.sleep(duration * draw.random())
            os.kill(pid, signal.SIGKILL)
            last = number - 1
            while (line := server.stdout.readline()) != "dead\n":
                last = max(last, int(line.split()[1]) - (line.split()[0] == "begin"))
            inside += last == number - 1  # else the machine was slow, and the save was over
            left_over += any(tmp_path.glob(".step-*.partial"))
            put_aside += any(tmp_path.glob(".step-*.replaced"))
            found = number_in(tmp_path)
            assert found in (last, last + 1), (found, last)  # last + 1: killed after the rename
            for path in tmp_path.glob("step-*"):
                checkpoint.verify(path)
            number = int(found) + 1
            if inside == 20:
                break
    finally:
        server.stdin.close()
        server.wait(30)
    print(f"{inside} kills inside save; {left_over} left a half-written one, {put_aside} one that was put aside")
    assert inside == 20 and left_over >= 10, (inside, left_over)


# ---- several ranks --------------------------------------------------------------------------------------------------

# (how the tables are held, number of ranks)
HOLDINGS = [("whole", 1), ("column", 2), ("row", 2), ("table", 2), ("column", 4), ("row", 4), ("table", 4)]


class ShardedModel(Model):
    """The same over the ranks of `group`, which all pass the same batch. A bag knows no "table": it gets "row"."""

    def __init__(self, kind: str, group, seed: int = 0) -> None:
        self.kind, self.group = kind, group
        super().__init__(60, seed)

    def make_tables(self, sizes, num_slots, **options) -> None:
        kind = self.kind
        if kind == "whole":
            return super().make_tables(sizes, num_slots, **options)
        options.update(num_slots=num_slots, process_group=self.group, output="gather")
        bag_kind = "row" if kind == "table" else kind
        self.bag = parallel.ShardedFreqAwareEmbeddingBag(NUM_ROWS, DIM, sharding=bag_kind, **options)
        self.many = parallel.ShardedFreqAwareEmbeddingBagCollection(sizes, DIM, sharding=kind, **options)


def on_four_ranks(rank: int, directory: str) -> None:
    """Everything that needs ranks, in one start of four processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=4)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    directory = Path(directory)

    def build(kind, size, seed, name):
        model = ShardedModel(kind, groups[size], seed)
        return model, OURS[name](model.parameters(), lr=0.05)

    for number, (kind, size) in enumerate(HOLDINGS):
        if rank < size:
            name = ("Adagrad", "RowWiseAdagrad", "Adam")[number % 3]
            model, optimizer = build(kind, size, number, name)
            train(model, optimizer, 0, 4)
            path = checkpoint.save(directory / f"{kind}-{size}", model, optimizer, 4, **SMALL_SHARDS)
            then = everything(model, optimizer)
            train(model, optimizer, 4, 6)
            if rank == 0:
                torch.save((name, path, then, everything(model, optimizer)), directory / f"{kind}-{size}.pt")
            else:
                everything(model, optimizer)  # which exchanges
    dist.barrier()
    for written in HOLDINGS:
        name, path, then, later = torch.load(directory / f"{written[0]}-{written[1]}.pt", weights_only=False)
        for read in HOLDINGS:
            kind, size = read
            if rank >= size:
                continue
            model, optimizer = build(kind, size, 99, name)
            assert checkpoint.load_latest(path.parent, model, optimizer) == 4
            assert_same_bits(then, everything(model, optimizer))
            if read in (written, ("whole", 1)):
                train(model, optimizer, 4, 6)
                found = everything(model, optimizer)
                if read == written:
                    assert_same_bits(later, found)
                for mine, theirs in zip(found, later, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    dist.barrier()
    check_files_of_all_ranks(rank, directory, build)
    check_failures_of_one_rank(rank, directory, build)
    dist.barrier()
    dist.destroy_process_group()


def check_files_of_all_ranks(rank, directory, build) -> None:
    """Four ranks that loaded a checkpoint write the very files that one process wrote; also through DDP."""
    model, optimizer = build("column", 4, 5, "Adagrad")
    checkpoint.load_latest(directory / "whole-1", model, optimizer)
    ignored = ["bag.weight", "many.weight"]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = nn.parallel.DistributedDataParallel(model)
    path = checkpoint.save(directory / "again", wrapped, optimizer, 4, **SMALL_SHARDS)
    first, again = (
        json.loads((where / "manifest.json").read_text()) for where in (directory / "whole-1/step-0000000004", path)
    )
    assert first == again and len(first["files"]) > 10
    assert checkpoint.load_latest(directory / "again", wrapped, optimizer) == 4


def check_failures_of_one_rank(rank, directory, build) -> None:
    """What fails on one rank raises on all, and nothing is loaded or replaced."""
    model, optimizer = build("row", 4, 6, "Adagrad")
    before = everything(model, optimizer)
    where = directory / "again"

    real = checkpoint._File._write

    def broken(self, data):
        if rank == 2:
            self._error = OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    checkpoint._File._write = broken
    with pytest.raises(OSError if rank == 2 else RuntimeError, match="No space left"):
        checkpoint.save(where, model, optimizer, 4, **SMALL_SHARDS)
    checkpoint._File._write = real
    dist.barrier()
    assert [path.name for path in where.iterdir()] == ["step-0000000004"]
    checkpoint.verify(where / "step-0000000004")

    with pytest.raises(ValueError, match="same step"):
        checkpoint.save(where, model, optimizer, 5 + rank)

    damaged = where / "step-0000000004" / "table-0000-00001.safetensors"
    if rank == 0:
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    dist.barrier()
    with pytest.raises(CheckpointError, match="table-0000-00001"):
        checkpoint.load_latest(where, model, optimizer)
    with pytest.raises(CheckpointError, match="step-0000000099"):
        checkpoint.load(where / ("step-0000000099" if rank == 3 else "step-0000000004"), model)
    assert_same_bits(before, everything(model, optimizer))
    assert checkpoint.load_latest(where / "none", model) is None


@pytest.mark.slow
def test_saved_on_some_ranks_and_loaded_on_others(tmp_path):
    """1, 2 and 4 ranks, each sharding, into each of the others: the same values, and training goes on alike."""
    mp.spawn(on_four_ranks, (str(tmp_path),), nprocs=4)
