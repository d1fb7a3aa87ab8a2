"""The promise: as if uncached. `pytest tests/test_equivalence.py`

Proves, over 200 training steps with evictions on most of them, that a cache just above one batch's need gives
(1) bit for bit what the same bag gives with every row resident, for every policy, optimizer and kernel set, and
(2) results as right as torch's: error against a float64 run at most 4 times that of torch in float32, plus 1e-7;
both also for accumulation over micro-batches, two forwards before a backward, and evaluation in between.
"""

import functools

import pytest
import torch
from torch import nn
from worlds import (
    BATCH_SHAPE,
    DIM,
    FEW_SLOTS,
    NUM_ROWS,
    assert_same_bits,
    counts,
    everything,
    make_bag,
    make_optimizer,
    skewed_ids,
)

STEPS = 200


def plain(step, forward, ids, target):
    """One forward, one backward."""
    out = forward(ids())
    ((out - target(out)) ** 2).sum().backward()
    return [out]


def accumulation(step, forward, ids, target):
    """Four micro-batches, each with its backward, before the step."""
    outs = []
    for _ in range(4):
        outs += plain(step, forward, ids, target)
    return outs


def two_forwards(step, forward, ids, target):
    """Two forwards (two towers), then one backward over both."""
    first, second = forward(ids()), forward(ids())
    ((first - target(first)) * second).sum().backward()
    return [first, second]


def evaluation_between(step, forward, ids, target):
    """A no_grad pass over other rows between the forward and its backward."""
    out = forward(ids())
    with torch.no_grad():
        evaluated = forward(ids())
    ((out - target(out)) ** 2).sum().backward()
    return [out, evaluated]


# How many batches' rows a scenario holds at once: that, and one slot more, is what the cache gets.
SCENARIOS = {plain: 1, accumulation: 4, two_forwards: 2, evaluation_between: 2}


def train(forward, step_optimizer, scenario, steps, dtype):
    """Runs `scenario` for `steps` steps on a fixed stream; returns all outputs."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(64, DIM, generator=generator).to(dtype)
    outs = []
    for step in range(steps):
        made = scenario(
            step,
            forward,
            lambda: skewed_ids(generator),
            lambda out, step=step: table[step % 32 : step % 32 + out.shape[0]],
        )
        outs += [out.detach().clone() for out in made]
        step_optimizer()
    return torch.stack(outs)


def run_ours(num_slots, policy, optimizer, kernels, scenario, steps=STEPS):
    """Trains a bag of ours; returns (outputs, table and state, stats, steps on which rows were evicted)."""
    bag = make_bag(
        num_slots,
        evict_strategy=policy,
        kernels=kernels,
        ids_freq_mapping=counts(),
        warmup_ratio=0.5,
        max_cache_bytes=None if num_slots == NUM_ROWS else limit(num_slots, optimizer),
        optimizer=NAMES[optimizer],
    )
    trained = make_optimizer(optimizer, bag.parameters())
    evicting_steps = 0
    evictions = 0

    def step_optimizer():
        nonlocal evicting_steps, evictions
        trained.step()
        trained.zero_grad()
        evicting_steps += bag.stats.evictions > evictions
        evictions = bag.stats.evictions

    outs = train(bag, step_optimizer, scenario, steps, torch.float32)
    bag._cache.check()
    assert bag.num_slots == num_slots
    return outs, everything(bag, trained), evicting_steps


NAMES = {"SGD": "sgd", "Adagrad": "adagrad", "RowWiseAdagrad": "rowwise_adagrad", "Adam": "adam"}
STATE_WIDTH = {"SGD": 0, "Adagrad": DIM, "RowWiseAdagrad": 1, "Adam": 2 * DIM}


def limit(num_slots, optimizer):
    """max_cache_bytes under which the cache cannot grow beyond `num_slots`."""
    return num_slots * (DIM + STATE_WIDTH[optimizer]) * 4


@functools.cache
def resident(optimizer, kernels, scenario):
    """The same bag with a slot for every row: what a cached run must equal."""
    outs, tensors, evicting_steps = run_ours(NUM_ROWS, "lru", optimizer, kernels, scenario)
    assert evicting_steps == 0
    return outs, tensors


def slots_for(scenario):
    """One slot more than the distinct ids that the scenario may hold at once."""
    return SCENARIOS[scenario] * (FEW_SLOTS - 1) + 1


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cached_bits_are_resident_bits(policy, kernels, scenario):
    """Outputs, weights and Adagrad sums equal those of the resident table, whatever is evicted when."""
    outs, tensors, evicting_steps = run_ours(slots_for(scenario), policy, "Adagrad", kernels, scenario)
    assert evicting_steps > 0.8 * STEPS
    assert_same_bits(
        [outs, *tensors], [resident("Adagrad", kernels, scenario)[0], *resident("Adagrad", kernels, scenario)[1]]
    )


def test_cached_bits_for_every_optimizer(policy, kernels, optimizer):
    """The optimizer's state travels with its row: weights and state equal the resident ones for each optimizer."""
    outs, tensors, evicting_steps = run_ours(FEW_SLOTS, policy, optimizer, kernels, plain)
    assert evicting_steps > 0.9 * STEPS
    expected = resident(optimizer, kernels, plain)
    assert_same_bits([outs, *tensors], [expected[0], *expected[1]])


class RowWiseAdagradByDefinition:
    """s += mean(g^2) per row with a gradient; w -= lr / (sqrt(s) + eps) * g. On a dense table, any dtype."""

    def __init__(self, weight, lr, eps=1e-10):
        self.weight, self.lr, self.eps = weight, lr, eps
        self.sum = torch.zeros(weight.shape[0], dtype=weight.dtype)

    def step(self):
        grad = self.weight.grad.coalesce()
        rows, g = grad.indices()[0], grad.values()
        self.sum[rows] += (g * g).mean(1)
        with torch.no_grad():
            self.weight[rows] -= self.lr / (self.sum[rows].sqrt() + self.eps).unsqueeze(1) * g

    def tensors(self):
        return [self.sum]


class TorchOptimizer:
    """A torch optimizer, and its state in the order of `worlds.everything`."""

    def __init__(self, cls, weight, lr):
        self.optimizer = cls([weight], lr=lr)

    def step(self):
        self.optimizer.step()

    def tensors(self):
        states = self.optimizer.state_dict()["state"].values()
        return [torch.as_tensor(state[name]) for state in states for name in sorted(state) if name != "step"]


REFERENCES = {
    "SGD": functools.partial(TorchOptimizer, torch.optim.SGD),
    "Adagrad": functools.partial(TorchOptimizer, torch.optim.Adagrad),
    "Adam": functools.partial(TorchOptimizer, torch.optim.SparseAdam),
    "RowWiseAdagrad": RowWiseAdagradByDefinition,
}


@functools.cache
def run_torch(optimizer, scenario, dtype):
    """nn.EmbeddingBag over the whole table with the torch optimizer of the same name: (outputs, [weight, *state])."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True)  # drawn in float32, whatever the run's dtype
    bag = bag.to(dtype)
    trained = REFERENCES[optimizer](bag.weight, lr=0.05)

    def step_optimizer():
        trained.step()
        bag.weight.grad = None

    outs = train(bag, step_optimizer, scenario, STEPS, dtype)
    return outs, [bag.weight.detach(), *trained.tensors()]


def error(tensors, exact):
    """Largest absolute difference over all tensors."""
    return max(
        (a.double() - b.double().reshape(a.shape)).abs().max().item() for a, b in zip(tensors, exact, strict=True)
    )


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_as_right_as_torch(optimizer, kernels, scenario):
    """Against a float64 run of torch, our error is at most 4 times torch's own in float32, plus 1e-7."""
    outs, tensors, evicting_steps = run_ours(slots_for(scenario), "dataset", optimizer, kernels, scenario)
    assert evicting_steps > 0.8 * STEPS
    state = [tensor for tensor in tensors[1:] if tensor.dim()]  # without the step count
    exact_outs, exact = run_torch(optimizer, scenario, torch.float64)
    torch_outs, torch_tensors = run_torch(optimizer, scenario, torch.float32)
    ours = error([outs, tensors[0], *state], [exact_outs, *exact])
    theirs = error([torch_outs, *torch_tensors], [exact_outs, *exact])
    assert ours <= 4 * theirs + 1e-7, f"our error {ours}, torch's {theirs}"


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_threads_do_not_change_bits(kernels, mode):
    """One thread and two give the same bits; batches large enough for torch to use both."""

    def run():
        bag = make_bag(300, num_rows=2000, dim=32, mode=mode, kernels=kernels)
        optimizer = make_optimizer("Adagrad", bag.parameters())
        generator = torch.Generator().manual_seed(3)
        for _ in range(10):
            ids = (torch.rand(3000, 3, generator=generator) ** 6 * 250).long() + 250 * int(
                torch.randint(8, (), generator=generator)
            )
            out = bag(ids)
            (out * torch.randn(out.shape, generator=generator)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bag.stats.evictions > 0
        return everything(bag, optimizer)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        torch.set_num_threads(2)
        double = [run() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for tensors in double:
        assert_same_bits(single, tensors)


def test_world_is_not_trivial():
    """The stream does what the tests above rely on: repeats in a batch, rows never seen, rows that come back."""
    generator = torch.Generator().manual_seed(3)
    torch.randn(64, DIM, generator=generator)
    batches = [skewed_ids(generator).reshape(-1) for _ in range(STEPS)]
    assert any(batch.unique().numel() < batch.numel() for batch in batches)
    assert max(batch.unique().numel() for batch in batches) <= BATCH_SHAPE[0] * BATCH_SHAPE[1] < FEW_SLOTS
    assert 2 * FEW_SLOTS < torch.cat(batches).unique().numel()
