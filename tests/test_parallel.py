"""Tables divided over ranks are one table in one process. `python -m pytest tests/test_parallel.py`

Proves, on 2 and 4 gloo ranks and with rows leaving the caches on most steps, for column, row and table sharding:
(1) outputs, tables and optimizer states of 100 steps are as right as torch's: error against a float64 run of
nn.EmbeddingBag over the whole batch at most 4 times that of torch in float32 + 1e-7, with shares of unequal size, empty
ones among them; (2) they are bit for bit those of the same sharding with every row resident, and of a second run;
(3) every argument of nn.EmbeddingBag means what it means there; (4) state, of tables and optimizers, travels between
shardings, one process and torch; (5) clipped norms are those of one process; (6) random traces equal a plain table.

A test names the property; its check is what each rank does. pytest does not explain an assert that fails in a rank, so
the messages do. Shapes: W ranks, B bags of a rank (each table), T tables, R rows of all, D width, N ids.
"""

import contextlib
import copy
import functools
import itertools
import random
import threading
import time
import traceback
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ranks import run_on_ranks
from test_embedding_bag_parity import ARGUMENTS, PADDING, reference
from test_equivalence import NAMES, REFERENCES, error
from torch import nn

from colossal_freqcache import CacheTooSmallError, FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, optim
from colossal_freqcache.parallel import (
    SHARDINGS,
    ShardedFreqAwareEmbeddingBag,
    ShardedFreqAwareEmbeddingBagCollection,
)

# ---- ranks that live for many tests ---------------------------------------------------------------------------------


def serve(rank, world_size, connections):
    """Runs the checks that come through this rank's connection, until None comes."""
    warnings.filterwarnings("error", message=".*it grows to.*")  # such a cache evicts less than the test believes
    connection = connections[rank]
    while (task := connection.recv()) is not None:
        check, arguments = task
        check(rank, world_size, *arguments)
        connection.send("done")


class RankPool:
    """`world_size` ranks, started at the first check and kept: starting takes seconds, a check a fraction of one."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.thread = None

    def run(self, check, *arguments):
        """check(rank, world_size, *arguments) on every rank. After a failure the next check gets new ranks."""
        if self.thread is None:
            self._start()
        for connection in self.connections:
            connection.send((check, arguments))
        try:
            for connection in self.connections:
                connection.recv()
        except (EOFError, ConnectionResetError):  # a rank has died, and the others were ended
            self.thread.join()
            self.thread = None
            raise AssertionError(f"the check failed on a rank:\n{self.failure}") from None

    def _start(self):
        pipes = [torch.multiprocessing.get_context("spawn").Pipe() for _ in range(self.world_size)]
        self.connections = [ours for ours, _ in pipes]

        def keep_ranks():
            try:
                run_on_ranks(serve, self.world_size, [theirs for _, theirs in pipes])
            except Exception:
                self.failure = traceback.format_exc()

        self.thread = threading.Thread(target=keep_ranks)
        self.thread.start()

    def stop(self):
        """Lets the ranks end."""
        if self.thread is not None:
            for connection in self.connections:
                connection.send(None)
            self.thread.join()


@pytest.fixture(scope="module", params=[2, 4], ids=["2ranks", "4ranks"])
def ranks(request):
    """The ranks that all tests of this file share."""
    pool = RankPool(request.param)
    yield pool
    pool.stop()


on_2_ranks = pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2ranks"])
on_4_ranks = pytest.mark.parametrize("ranks", [4], indirect=True, ids=["4ranks"])
every_sharding = pytest.mark.parametrize("sharding", SHARDINGS)
every_optimizer = pytest.mark.parametrize("optimizer", NAMES)

# ---- a world that no number of ranks divides -------------------------------------------------------------------------

SIZES = [61, 3, 1, 56, 2, 48]
STARTS = np.cumsum([0, *SIZES]).tolist()
NUM_ROWS = STARTS[-1]  # 171
DIM = 7
PLANS = {1: [0] * 6, 2: [0, 0, 1, 1, 1, 0], 4: [0, 0, 2, 1, 1, 2]}  # rank 3 has no table
STEPS, FEW_STEPS = 100, 15
LR = 0.05


class Share(NamedTuple):
    """A rank's bags: ids int64[N] local to their table, table-major; lengths int64[T, B]; weights float64[N]."""

    values: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor

    @property
    def offsets(self):
        lengths = self.lengths.reshape(-1)
        return lengths.cumsum(0) - lengths

    def of_table(self, table):
        """The share of one table, as one of a single table."""
        parts = self.lengths.sum(1).tolist()
        own = slice(sum(parts[:table]), sum(parts[: table + 1]))
        return Share(self.values[own], self.lengths[table : table + 1], self.weights[own])


def make_share(sizes, step, rank, part=0):
    """0 to 3 bags a table of 0 to 3 ids; ids repeat, within bags too. `part`: of a step with several batches."""
    generator = torch.Generator().manual_seed(1 + 1000 * step + 10 * rank + part)
    num_bags = 0 if step % 5 == rank else 1 + (step + rank) % 3
    lengths = torch.randint(0, 4, (len(sizes), num_bags), generator=generator)
    values = [(torch.rand(int(n), generator=generator) ** 1.3 * rows).long() for n, rows in zip(lengths.sum(1), sizes)]
    values = torch.cat(values)
    return Share(values, lengths, torch.rand(values.numel(), generator=generator, dtype=torch.float64) + 0.5)


def needed_slots(sharding, world_size, sizes, plan, steps):
    """The most rows that one rank must hold at once. steps: the shares whose rows are held together, step by step."""
    starts, most = np.cumsum([0, *sizes]), 1
    for shares in steps:
        of_tables = [
            [share.of_table(table).values + start for share in shares] for table, start in enumerate(starts[:-1])
        ]
        rows = [torch.cat(parts).unique() for parts in of_tables]
        if sharding == "column":
            most = max(most, sum(part.numel() for part in rows))
        for rank in range(world_size):
            if sharding == "row":
                most = max(most, int((torch.cat(rows) % world_size == rank).sum()))
            elif sharding == "table":
                most = max(most, sum(part.numel() for part, owner in zip(rows, plan) if owner == rank))
    return most


def counts_of(sizes):
    """Counts that order the rows unlike their ids."""
    return np.random.default_rng(7).permutation(sum(sizes)) + 1


def make_collection(world_size, sharding, num_slots, sizes=SIZES, dim=DIM, **options):
    """A sharded collection of the values that seed 0 draws."""
    torch.manual_seed(0)
    options = {"mode": "sum", "plan": PLANS.get(world_size) if sharding == "table" else None, **options}
    return ShardedFreqAwareEmbeddingBagCollection(sizes, dim, sharding=sharding, num_slots=num_slots, **options)


def logical(bag, optimizer=None):
    """[(R, D) of all tables, logical states]; every rank must call it."""
    one = isinstance(bag, FreqAwareEmbeddingBag)
    tensors = [bag.logical_weight() if one else torch.cat([bag.logical_weight(t) for t in range(bag.num_tables)])]
    for state in {} if optimizer is None else optimizer.state_dict()["state"].values():
        tensors += [torch.as_tensor(state[name]) for name in sorted(state) if name != "step"]
    return tensors


def everyone(item):
    """`item` of every rank, in rank order."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def assert_same_bits(first, second, what):
    assert len(first) == len(second), what
    for number, (a, b) in enumerate(zip(first, second)):
        assert a.shape == b.shape and torch.equal(a, b), f"{what}: tensor {number} differs by {(a - b).abs().max()}"


def assert_same_everywhere(tensors, what):
    for rank, theirs in enumerate(everyone([tensor.numpy() for tensor in tensors])):
        assert_same_bits(tensors, [torch.from_numpy(array) for array in theirs], f"{what} on rank {rank} and here")


# ---- scenarios: what happens in one step, for ours and for torch -----------------------------------------------------
# forward(part) gives {rank: out}: this rank's, or in the reference all of them; the loss is the mean over the ranks.


def local_loss(step, rank, out, factor=None):
    """A loss under which every output matters, each its own way."""
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(7 + 10 * step + rank)).to(out.dtype)
    return 0.1 * ((out - target) ** 2 if factor is None else (out - target) * factor).sum()


def mean_loss(step, outs, factors=None):
    return sum(local_loss(step, rank, outs[rank], None if factors is None else factors[rank]) for rank in outs) / len(
        outs
    )


def plain(step, forward, prefetch, finish):
    outs = forward(0)
    mean_loss(step, outs).backward()
    return [outs]


def accumulation(step, forward, prefetch, finish):
    """Three micro-batches, each with its backward, before the step."""
    outs = [forward(part) for part in (0,)]
    mean_loss(step, outs[0]).backward()
    for part in (1, 2):
        outs.append(forward(part))
        mean_loss(step, outs[-1]).backward()
    return outs


def two_forwards(step, forward, prefetch, finish):
    """Two forwards (two towers), one backward through both."""
    first, second = forward(0), forward(1)
    mean_loss(step, first, second).backward()
    return [first, second]


def two_graphs(step, forward, prefetch, finish):
    """The second graph waits while the first is stepped."""
    first, second = forward(0), forward(1)
    mean_loss(step, first).backward()
    finish()
    mean_loss(step, second).backward()
    return [first, second]


def evaluation_between(step, forward, prefetch, finish):
    """A pass without gradients, and one whose graph is dropped, between a forward and its backward."""
    outs = forward(0)
    with torch.no_grad():
        evaluated = forward(1)
    dropped = {rank: out.detach() for rank, out in forward(2).items()}
    mean_loss(step, outs).backward()
    return [outs, evaluated, dropped]


def prefetching(step, forward, prefetch, finish):
    """The rows of both forwards come beforehand, those of the second while the first waits for its backward."""
    prefetch(0)
    first = forward(0)
    prefetch(1)
    mean_loss(step, first).backward()
    finish()
    second = forward(1)
    mean_loss(step, second).backward()
    return [first, second]


SCENARIOS = {plain: 1, accumulation: 3, two_forwards: 2, two_graphs: 2, evaluation_between: 3, prefetching: 2}


def train(forward, prefetch, finish, scenario, steps):
    """The outputs of `steps` steps, {rank: [outputs]}."""
    outs = {}
    for step in range(steps):
        made = scenario(step, lambda part: forward(step, part), lambda part: prefetch(step, part), finish)  # noqa: B023
        for part in made:
            for rank, out in part.items():
                outs.setdefault(rank, []).append(out.detach().clone().reshape(-1))
        finish()
    return {rank: torch.cat(parts) for rank, parts in outs.items()}


class Run(NamedTuple):
    """What a rank has at the end: outputs, logical table and states, steps on which it evicted, and its statistics."""

    outs: torch.Tensor
    tensors: list
    evicting_steps: int
    stats: dict


def train_ours(
    rank, world_size, sharding, optimizer, scenario=plain, steps=STEPS, resident=False, torchs=False, pause=None
):
    """Trains a sharded collection on this rank's shares; with `torchs` by torch's optimizer of that name."""
    parts = range(SCENARIOS[scenario])
    held = [
        [make_share(SIZES, step, source, part) for source in range(world_size) for part in parts]
        for step in range(steps)
    ]
    num_slots = NUM_ROWS if resident else needed_slots(sharding, world_size, SIZES, PLANS[world_size], held)
    with_counts = optimizer in ("SGD", "RowWiseAdagrad")  # the others: rows are ids, and the state is reserved
    bag = make_collection(
        world_size,
        sharding,
        num_slots,
        ids_freq_mapping=counts_of(SIZES) if with_counts else None,
        optimizer=None if with_counts or torchs else NAMES[optimizer],
    )
    if torchs:
        trained = getattr(torch.optim, "SparseAdam" if optimizer == "Adam" else optimizer)(bag.parameters(), lr=LR)
    else:
        trained = getattr(optim, optimizer)(bag.parameters(), lr=LR)
    evictions = []

    def share(step, part):
        if pause is not None:
            time.sleep(pause.random() * 0.01)
        share = make_share(SIZES, step, rank, part)
        return share.values, share.offsets

    def finish():
        trained.step()
        trained.zero_grad()
        evictions.append(bag.stats.evictions)

    outs = train(
        lambda *place: {rank: bag(*share(*place))}, lambda *place: bag.prefetch(*share(*place)), finish, scenario, steps
    )
    bag._cache.check()
    assert bag.num_slots == min(num_slots, bag._cache.num_rows), f"{bag.num_slots} slots instead of {num_slots}"
    evicting_steps = sum(later > earlier for earlier, later in itertools.pairwise([0, *evictions]))
    if resident:
        assert evicting_steps == 0, "the resident run evicted rows"
    elif sharding != "table" or rank in PLANS[world_size]:
        assert evicting_steps > 0.5 * steps, f"rank {rank} evicted on {evicting_steps} of {steps} steps only"
    tensors = logical(bag, trained)
    assert_same_everywhere(tensors, "the logical table and state")
    return Run(outs[rank], tensors, evicting_steps, {"hits": bag.stats.hits, "evictions": bag.stats.evictions})


cached_run = functools.cache(train_ours)  # in each rank; all ranks ask for the same


@functools.cache
def train_torch(num_shares, optimizer, scenario, steps, dtype):
    """nn.EmbeddingBag over all tables as one, the shares of all ranks in one batch: ({rank: outs}, [table, *states])."""
    torch.manual_seed(0)
    drawn = [nn.EmbeddingBag(rows, DIM).weight.detach() for rows in SIZES]  # in float32, whatever the run's dtype
    bag = nn.EmbeddingBag.from_pretrained(torch.cat(drawn).to(dtype), freeze=False, mode="sum", sparse=True)
    trained = REFERENCES[optimizer](bag.weight, lr=LR)

    def forward(step, part):
        shares = [make_share(SIZES, step, rank, part) for rank in range(num_shares)]
        ids = [share.of_table(table).values + start for share in shares for table, start in enumerate(STARTS[:-1])]
        lengths = torch.cat([share.lengths.reshape(-1) for share in shares])
        out = bag(torch.cat(ids), lengths.cumsum(0) - lengths)
        outs = out.split([share.lengths.numel() for share in shares])
        return {rank: outs[rank].view(len(SIZES), -1, DIM).transpose(0, 1) for rank in range(num_shares)}

    def finish():
        trained.step()
        bag.weight.grad = None

    outs = train(forward, lambda *place: None, finish, scenario, steps)
    return outs, [bag.weight.detach(), *trained.tensors()]


def check_as_right_as_torch(rank, world_size, sharding, optimizer, scenario, steps):
    """Rank 0 compares what all ranks got with torch."""
    run = cached_run(rank, world_size, sharding, optimizer, scenario, steps)
    outs = everyone(run.outs.numpy())
    if rank == 0:
        exact_outs, exact = train_torch(world_size, optimizer, scenario, steps, torch.float64)
        torch_outs, torchs = train_torch(world_size, optimizer, scenario, steps, torch.float32)
        ours = error([*map(torch.from_numpy, outs), *run.tensors], [*exact_outs.values(), *exact])
        theirs = error([*torch_outs.values(), *torchs], [*exact_outs.values(), *exact])
        assert ours <= 4 * theirs + 1e-7, f"our error {ours}, torch's {theirs}"


@every_optimizer
@every_sharding
def test_as_right_as_torch(ranks, sharding, optimizer):
    """Outputs, tables and states of 100 steps, on every rank, against torch in float64."""
    ranks.run(check_as_right_as_torch, sharding, optimizer, plain, STEPS)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s is not plain], ids=lambda scenario: scenario.__name__)
@every_sharding
@on_2_ranks
def test_scenarios_are_as_right_as_torch(ranks, sharding, scenario):
    """Accumulation, two forwards in a backward, graphs that wait, evaluation in between, prefetches."""
    ranks.run(check_as_right_as_torch, sharding, "Adagrad", scenario, FEW_STEPS)


def check_bits(rank, world_size, sharding, optimizer, scenario, steps):
    cached = cached_run(rank, world_size, sharding, optimizer, scenario, steps)
    resident = train_ours(rank, world_size, sharding, optimizer, scenario, steps, resident=True)
    assert_same_bits([cached.outs, *cached.tensors], [resident.outs, *resident.tensors], "cached and resident")


@every_optimizer
@every_sharding
@on_2_ranks
def test_cached_bits_are_resident_bits(ranks, sharding, optimizer):
    """Outputs, tables and states equal those of the same sharding with a slot for every row."""
    ranks.run(check_bits, sharding, optimizer, plain, STEPS)


@every_sharding
@on_4_ranks
def test_cached_bits_are_resident_bits_on_4_ranks(ranks, sharding):
    """As on 2, one of them without a table."""
    ranks.run(check_bits, sharding, "RowWiseAdagrad", plain, STEPS)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s is not plain], ids=lambda scenario: scenario.__name__)
@every_sharding
@on_2_ranks
def test_cached_bits_of_scenarios(ranks, sharding, scenario):
    """The order of sums does not depend on what is resident when."""
    ranks.run(check_bits, sharding, "Adagrad", scenario, FEW_STEPS)


def check_adapted(rank, world_size, sharding, optimizer):
    ours = cached_run(rank, world_size, sharding, optimizer)
    adapted = train_ours(rank, world_size, sharding, optimizer, torchs=True)
    assert_same_bits([ours.outs, *ours.tensors], [adapted.outs, *adapted.tensors], "our optimizer and torch's, adapted")


@pytest.mark.parametrize("sharding, optimizer", [("column", "Adagrad"), ("row", "Adam"), ("table", "SGD")])
@on_2_ranks
def test_torchs_optimizers_are_adapted(ranks, sharding, optimizer):
    """torch.optim.SGD, Adagrad and SparseAdam, by hooks, give the bits of ours."""
    ranks.run(check_adapted, sharding, optimizer)


def check_second_run(rank, world_size, sharding):
    first = train_ours(rank, world_size, sharding, "Adagrad", steps=FEW_STEPS)
    second = train_ours(rank, world_size, sharding, "Adagrad", steps=FEW_STEPS, pause=random.Random(rank))
    assert_same_bits([first.outs, *first.tensors], [second.outs, *second.tensors], "two runs")
    assert first.stats == second.stats, f"two runs: {first.stats} and {second.stats}"


@every_sharding
@on_2_ranks
def test_timing_decides_nothing(ranks, sharding):
    """Ranks that wait at random, each for its own time, give the same bits, hits and evictions."""
    ranks.run(check_second_run, sharding)


# ---- arguments of nn.EmbeddingBag ------------------------------------------------------------------------------------
# In float64 on both sides, so that what is not rounding shows: 1e-11.


def two_dim(sizes, step, rank):
    """0 to 4 bags of 3 ids, the padding id among them: a 2-D input."""
    generator = torch.Generator().manual_seed(1 + 1000 * step + 10 * rank)
    shape = ((step + 2 * rank) % 5, 3)
    ids = (torch.rand(shape, generator=generator) ** 1.3 * sizes[0]).long()
    ids = torch.where(torch.rand(shape, generator=generator) < 0.2, PADDING, ids)
    weights = torch.rand(ids.numel(), generator=generator, dtype=torch.float64) + 0.5
    return Share(ids.reshape(-1), torch.full((1, shape[0]), 3), weights)


def ragged(sizes, step, rank):
    """make_share with padding ids among the ids of every table that has such a row."""
    share = make_share(sizes, step, rank)
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank)
    rows = torch.repeat_interleave(torch.tensor(sizes), share.lengths.sum(1))
    padded = (torch.rand(share.values.shape, generator=generator) < 0.15) & (rows > PADDING)
    return share._replace(values=torch.where(padded, PADDING, share.values))


def inputs(share, form, include_last_offset, one_table):
    """(input, offsets) as a bag or collection takes them."""
    if form is two_dim:
        return share.values.view(-1, 3), None
    offsets = share.offsets
    return share.values, torch.cat([offsets, torch.tensor([share.values.numel()])]) if include_last_offset else offsets


def check_arguments(
    rank,
    world_size,
    sharding,
    options,
    form=ragged,
    sizes=None,
    output="share",
    weighted=False,
    kernels="cpu",
    frozen=False,
    steps=8,
):
    """Trains ours and torch by SGD: outputs, gradients of per_sample_weights and tables must agree."""
    one_table = sizes is None
    sizes = [101] if one_table else sizes
    sources = range(world_size) if output == "share" else [0]
    shares = [[form(sizes, step, source) for source in sources] for step in range(steps)]
    plan = PLANS[world_size]
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(rows, DIM, generator=generator, dtype=torch.float64) for rows in sizes]
    common = dict(
        sharding=sharding,
        output=output,
        num_slots=needed_slots(sharding, world_size, sizes, plan, shares),
        kernels=kernels,
        ids_freq_mapping=counts_of(sizes) if len(options) % 2 else None,
        **options,
    )
    if one_table:
        ours = ShardedFreqAwareEmbeddingBag(*tables[0].shape, _weight=tables[0], **common)
    else:
        plan = plan if sharding == "table" else None
        ours = ShardedFreqAwareEmbeddingBagCollection(sizes, DIM, _weight=tables, plan=plan, **common)
    ours.weight.requires_grad_(not frozen)
    of_torch = {name: value for name, value in options.items() if name != "include_last_offset"}
    padding = of_torch.pop("padding_idx", None)
    paddings = padding if isinstance(padding, list) else [padding] * len(sizes)
    exact = [
        reference(table.clone(), of_torch if padding is None else {**of_torch, "padding_idx": padding})
        for table, padding in zip(tables, paddings)
    ]
    exact_tables = [bag.weight for bag in exact]
    trained, trained_exact = optim.SGD(ours.parameters(), lr=0.5), torch.optim.SGD(exact_tables, lr=0.5)
    me = rank if output == "share" else 0
    for step in range(steps):
        mine = shares[step][me]
        weights = mine.weights.clone().requires_grad_() if weighted else None
        ids, offsets = inputs(mine, form, options.get("include_last_offset"), one_table)
        if weighted and offsets is None:
            out = ours(ids, None, weights.view(ids.shape))
        else:
            out = ours(ids, offsets, weights)
        if one_table:
            out = out.unsqueeze(1)
        every_weight = [share.weights.clone().requires_grad_() for share in shares[step]]
        pooled = []
        for table in range(len(sizes)):
            parts = [share._replace(weights=w).of_table(table) for share, w in zip(shares[step], every_weight)]
            lengths = torch.cat([part.lengths[0] for part in parts])
            arguments = (torch.cat([part.values for part in parts]), lengths.cumsum(0) - lengths)
            part_weights = torch.cat([part.weights for part in parts])
            if arguments[0].numel():
                bags = exact[table](*arguments, part_weights if weighted else None)
            else:  # torch 2.5.1 fails to differentiate what pools nothing
                bags = torch.zeros(lengths.numel(), DIM, dtype=torch.float64) + 0 * part_weights.sum()
            pooled.append(bags.split([part.lengths.numel() for part in parts]))
        expected = [torch.stack(bags, 1) for bags in zip(*pooled)]
        assert_close(out, expected[me], f"output of step {step}")
        if out.requires_grad:
            local_loss(step, me, out).backward()
            exact_loss = mean_loss(step, dict(enumerate(expected)))
            if exact_loss.requires_grad:
                exact_loss.backward()
            if weighted:  # of the rank's own loss: what it comes from is averaged like everything dense
                assert_close(weights.grad, every_weight[me].grad * len(expected), f"weights' gradient of step {step}")
            if not frozen:  # torch has to keep its table trainable: it fails where only the weights want a gradient
                trained.step()
                trained_exact.step()
            trained.zero_grad()
            trained_exact.zero_grad()
        ours._cache.check()
    found, expected = logical(ours)[0], torch.cat([table.detach() for table in exact_tables])
    assert_close(found, expected, "the trained tables")
    assert frozen or not torch.equal(found, torch.cat(tables)), "nothing was trained"
    if sharding != "table" or rank in PLANS[world_size]:
        assert ours.stats.evictions > 0, f"nothing was evicted on rank {rank}"


def assert_close(found, expected, what):
    assert found.shape == expected.shape, f"{what}: shape {found.shape} instead of {expected.shape}"
    if found.numel():
        worst = (found.detach() - expected.detach()).abs().max().item()
        assert worst < 1e-11, f"{what} differs by {worst}"


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("sharding", ["column", "row"])
@on_2_ranks
def test_arguments(ranks, sharding, name):
    """Modes, padding, norms and scale_grad_by_freq, for ragged bags and for 2-D input, by both kernel sets."""
    ranks.run(check_arguments, sharding, ARGUMENTS[name])
    ranks.run(
        check_arguments,
        sharding,
        {**ARGUMENTS[name], "include_last_offset": True},
        ragged,
        None,
        "share",
        False,
        "torch",
    )
    ranks.run(check_arguments, sharding, ARGUMENTS[name], two_dim)


WEIGHTED = [{}, {"padding_idx": PADDING}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}]


@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("sharding", ["column", "row"])
@on_2_ranks
def test_per_sample_weights(ranks, sharding, options):
    """Outputs, the gradient of the weights, and the trained table; the table frozen, too."""
    options = {"mode": "sum", **options}
    ranks.run(check_arguments, sharding, options, ragged, None, "share", True)
    ranks.run(check_arguments, sharding, options, two_dim, None, "share", True, "torch")
    ranks.run(check_arguments, sharding, options, ragged, None, "share", True, "cpu", True)


PADDINGS = [PADDING, None, 0, -1, None, PADDING]
OF_TABLES = {
    "sum": {"mode": "sum"},
    "mean-padding": {"mode": "mean", "padding_idx": PADDINGS},
    "max-padding": {"mode": "max", "padding_idx": PADDINGS},
    "norm-padding": {"mode": "sum", "max_norm": 1.5, "padding_idx": PADDINGS},
    "norm-padding-of-one-table": {"mode": "mean", "max_norm": 1.5, "padding_idx": [PADDING, *[None] * 5]},
    "scale": {"mode": "sum", "scale_grad_by_freq": True},
}


@pytest.mark.parametrize("name", OF_TABLES)
@every_sharding
def test_arguments_of_collections(ranks, sharding, name):
    """Many tables, some of 1 to 3 rows, padding in some; a rank without a table where there are 4."""
    ranks.run(check_arguments, sharding, OF_TABLES[name], ragged, SIZES)


@pytest.mark.parametrize("options", WEIGHTED[::2], ids=lambda options: next(iter(options), "plain"))
@every_sharding
def test_per_sample_weights_of_collections(ranks, sharding, options):
    """As for one table."""
    ranks.run(check_arguments, sharding, {"mode": "sum", **options}, ragged, SIZES, "share", True)


GATHERED = {
    **{name: OF_TABLES[name] for name in ("mean-padding", "max-padding", "norm-padding", "scale")},
    "weighted": {"mode": "sum"},
}


@pytest.mark.parametrize("name", GATHERED)
@every_sharding
def test_gathered_output(ranks, sharding, name):
    """All ranks pass the same batch and get the same output; no gradient is averaged, the weights' is whole."""
    ranks.run(check_arguments, sharding, GATHERED[name], ragged, SIZES, "gather", name == "weighted", "cpu", False, 20)
