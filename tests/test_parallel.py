"""Tables divided over ranks are one table in one process. `python -m pytest tests/test_parallel.py`

Proves, on 2 and 4 gloo ranks and with rows leaving the caches on most steps, for column, row and table sharding:
(1) outputs, tables and optimizer states of 100 steps are as right as torch's: error against a float64 run of
nn.EmbeddingBag over the whole batch at most 4 times that of torch in float32 + 1e-7, with shares of unequal size, empty
ones among them; (2) they are bit for bit those of the same sharding with every row resident, and of a second run;
(3) every argument of nn.EmbeddingBag means what it means there; (4) state, of tables and optimizers, travels between
shardings, one process and torch; (5) clipped norms are those of one process; (6) random traces equal a plain table;
(7) idioms of training loops (checkpointing, retained graphs, inference mode, changes in place, DDP) change no value.

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
import torch.utils.checkpoint
from ranks import run_on_ranks
from test_embedding_bag_parity import ARGUMENTS, PADDING, reference
from test_equivalence import NAMES, REFERENCES, error
from torch import nn
from worlds import chunks_of

from colossal_freqcache import (
    CacheTooSmallError,
    FreqAwareEmbeddingBag,
    FreqAwareEmbeddingBagCollection,
    Lookahead,
    optim,
)
from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.kernels.cpu import GRAIN
from colossal_freqcache.kernels.parts import num_parts
from colossal_freqcache.parallel import (
    SHARDINGS,
    ShardedFreqAwareEmbeddingBag,
    ShardedFreqAwareEmbeddingBagCollection,
)
from colossal_freqcache.stores import RamStore

# ---- ranks that live for many tests ---------------------------------------------------------------------------------


def serve(rank, world_size, connections):
    """Runs the checks that come through this rank's connection, until None comes."""
    warnings.filterwarnings("error", message=".*it grows to.*")  # such a cache evicts less than the test believes
    connection = connections[rank]
    while (task := connection.recv()) is not None:
        check, arguments, options = task
        check(rank, world_size, *arguments, **options)
        connection.send("done")


class RankPool:
    """`world_size` ranks, started at the first check and kept: starting takes seconds, a check a fraction of one."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.thread = None

    def run(self, check, *arguments, **options):
        """check(rank, world_size, *arguments, **options) on all ranks. After a failure the next check gets new ones."""
        if self.thread is None:
            self._start()
        for connection in self.connections:
            connection.send((check, arguments, options))
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

        self.thread = threading.Thread(target=keep_ranks, daemon=True)
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
PLANS = {2: [0, 0, 1, 1, 1, 0], 4: [0, 0, 2, 1, 1, 2]}  # rank 3 has no table
STEPS, FEW_STEPS = 100, 12
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
    return _drawn_share(tuple(sizes), step, rank, part)


@functools.cache
def _drawn_share(sizes, step, rank, part):
    generator = torch.Generator().manual_seed(1 + 1000 * step + 10 * rank + part)
    num_bags = 0 if step % 5 == rank else 1 + (step + rank) % 3
    lengths = torch.randint(0, 4, (len(sizes), num_bags), generator=generator)
    values = [(torch.rand(int(n), generator=generator) ** 1.3 * rows).long() for n, rows in zip(lengths.sum(1), sizes)]
    values = torch.cat(values)
    return Share(values, lengths, torch.rand(values.numel(), generator=generator, dtype=torch.float64) + 0.5)


def needed_slots(sharding, world_size, sizes, plan, steps):
    """The most rows that one rank must hold at once. steps: the shares whose rows are held together, step by step."""
    starts, most = torch.tensor([0, *sizes]).cumsum(0), 1
    for shares in steps:
        ids = [share.of_table(table).values + starts[table] for share in shares for table in range(len(sizes))]
        rows = torch.cat(ids).unique()
        if sharding == "table":
            owner = torch.tensor(plan)[torch.searchsorted(starts, rows, right=True) - 1]
        else:
            owner = rows % world_size if sharding == "row" else torch.zeros_like(rows)
        most = max(most, int(torch.bincount(owner, minlength=1).max()))
    return most


@functools.cache
def slots_of_steps(sharding, steps, world_size=2, parts=1):
    """needed_slots of the shares of SIZES in steps 0.., all parts of a step held together."""
    places = [[(step, rank, part) for rank in range(world_size) for part in range(parts)] for step in range(steps)]
    shares = [[make_share(SIZES, *place) for place in of_step] for of_step in places]
    return needed_slots(sharding, world_size, SIZES, PLANS[world_size], shares)


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
    with torch.inference_mode() if step % 2 else torch.no_grad():
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


def backward_twice(step, forward, prefetch, finish):
    """One graph, gone through twice; the gradients add up."""
    outs = forward(0)
    loss = mean_loss(step, outs)
    loss.backward(retain_graph=True)
    loss.backward()
    return [outs]


def checkpointed(step, forward, prefetch, finish):
    """The forward runs again inside the backward, with its exchanges, beside another graph."""
    outs = forward(0)
    anchor = torch.ones((), requires_grad=True)

    def run(_):
        recomputed = forward(1)
        return tuple(recomputed[rank] for rank in sorted(recomputed))

    again = torch.utils.checkpoint.checkpoint(run, anchor, use_reentrant=bool(step % 2))
    again = dict(zip(sorted(outs), again))
    (mean_loss(step, outs) + mean_loss(step + 1, again)).backward()
    return [outs, again]


# How many batches' rows a scenario holds at once, at most.
SCENARIOS = {
    plain: 1,
    accumulation: 3,
    two_forwards: 2,
    two_graphs: 2,
    evaluation_between: 3,
    prefetching: 2,
    backward_twice: 1,
    checkpointed: 2,
}


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
    rank,
    world_size,
    sharding,
    optimizer,
    scenario=plain,
    steps=STEPS,
    *,
    resident=False,
    torchs=False,
    pause=None,
    own_counts=False,
):
    """Trains a sharded collection on this rank's shares; with `torchs` by torch's optimizer of that name."""
    num_slots = NUM_ROWS if resident else slots_of_steps(sharding, steps, world_size, SCENARIOS[scenario])
    with_counts = optimizer in ("SGD", "RowWiseAdagrad")  # the others: rows are ids, and the state is reserved
    bag = make_collection(
        world_size,
        sharding,
        num_slots,
        ids_freq_mapping=np.roll(counts_of(SIZES), rank if own_counts else 0) if with_counts else None,
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
    """nn.EmbeddingBag over all tables as one, all ranks' shares in one batch: ({rank: outs}, [table, *states])."""
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
    if rank == 0:  # the reference, once for all shardings
        exact_outs, exact = train_torch(world_size, optimizer, scenario, steps, torch.float64)
        torch_outs, torchs = train_torch(world_size, optimizer, scenario, steps, torch.float32)
        ours = error([*map(torch.from_numpy, outs), *run.tensors], [*exact_outs.values(), *exact])
        theirs = error([*torch_outs.values(), *torchs], [*exact_outs.values(), *exact])
        assert ours <= 4 * theirs + 1e-7, f"our error {ours}, torch's {theirs}"


@pytest.mark.slow
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
    ranks.run(check_as_right_as_torch, sharding, "RowWiseAdagrad", scenario, FEW_STEPS)


def check_bits(rank, world_size, sharding, optimizer, scenario, steps):
    cached = cached_run(rank, world_size, sharding, optimizer, scenario, steps)
    resident = train_ours(rank, world_size, sharding, optimizer, scenario, steps, resident=True)
    assert_same_bits([cached.outs, *cached.tensors], [resident.outs, *resident.tensors], "cached and resident")


@every_sharding
@on_2_ranks
def test_cached_bits_are_resident_bits(ranks, sharding):
    """Outputs, tables and states equal those of the same sharding with a slot for every row."""
    ranks.run(check_bits, sharding, "Adam", plain, STEPS)


@on_4_ranks
def test_cached_bits_are_resident_bits_on_4_ranks(ranks):
    """As on 2; one of them has no table."""
    ranks.run(check_bits, "table", "RowWiseAdagrad", plain, STEPS)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s is not plain], ids=lambda scenario: scenario.__name__)
@every_sharding
@on_2_ranks
def test_cached_bits_of_scenarios(ranks, sharding, scenario):
    """The order of sums does not depend on what is resident when."""
    ranks.run(check_bits, sharding, "RowWiseAdagrad", scenario, FEW_STEPS)


def check_adapted(rank, world_size, sharding, optimizer):
    ours = cached_run(rank, world_size, sharding, optimizer, plain, STEPS)
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


def check_own_counts(rank, world_size, sharding):
    same = cached_run(rank, world_size, sharding, "RowWiseAdagrad", plain, 2 * FEW_STEPS)
    own = train_ours(rank, world_size, sharding, "RowWiseAdagrad", plain, 2 * FEW_STEPS, own_counts=True)
    assert_same_bits([same.outs, *same.tensors], [own.outs, *own.tensors], "counts alike and counts of each rank's own")


@every_sharding
@on_2_ranks
def test_ranks_may_count_ids_for_themselves(ranks, sharding):
    """Counts order a rank's rows and slots, and no value: ranks meet by id, also in the sums of row-wise Adagrad."""
    ranks.run(check_own_counts, sharding)


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


def inputs(share, form, include_last_offset):
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
    steps=6,
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
        ids, offsets = inputs(mine, form, options.get("include_last_offset"))
        ids = ids.int() if (step + rank) % 2 else ids
        if weighted and offsets is None:
            out = ours(ids, None, weights.view(ids.shape))
        else:
            out = ours(ids, offsets, weights)
        out = out.mul_(1.0) if kernels == "cpu" else out  # in place, as relu_ would; the plain twin's is a view
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
    ranks.run(check_arguments, sharding, {**ARGUMENTS[name], "include_last_offset": True}, kernels="torch")
    ranks.run(check_arguments, sharding, ARGUMENTS[name], form=two_dim)


WEIGHTED = [{}, {"padding_idx": PADDING}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}]


@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("sharding", ["column", "row"])
@on_2_ranks
def test_per_sample_weights(ranks, sharding, options):
    """Outputs, the gradient of the weights, and the trained table; the table frozen, too."""
    options = {"mode": "sum", **options}
    ranks.run(check_arguments, sharding, options, weighted=True)
    ranks.run(check_arguments, sharding, options, weighted=True, form=two_dim, kernels="torch")
    ranks.run(check_arguments, sharding, options, weighted=True, frozen=True)


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
@on_2_ranks
def test_arguments_of_collections(ranks, sharding, name):
    """Many tables, some of 1 to 3 rows, padding in some."""
    ranks.run(check_arguments, sharding, OF_TABLES[name], sizes=SIZES, steps=8)


@pytest.mark.parametrize("options", WEIGHTED[::2], ids=lambda options: next(iter(options), "plain"))
@every_sharding
@on_2_ranks
def test_per_sample_weights_of_collections(ranks, sharding, options):
    """As for one table."""
    ranks.run(check_arguments, sharding, {"mode": "sum", **options}, sizes=SIZES, weighted=True, steps=8)


GATHERED = {
    **{name: OF_TABLES[name] for name in ("mean-padding", "max-padding", "norm-padding", "scale")},
    "weighted": {"mode": "sum"},
}


@pytest.mark.parametrize("name", GATHERED)
@every_sharding
@on_2_ranks
def test_gathered_output(ranks, sharding, name):
    """All ranks pass the same batch and get the same output; no gradient is averaged, the weights' is whole."""
    weighted = name == "weighted"
    ranks.run(check_arguments, sharding, GATHERED[name], sizes=SIZES, output="gather", weighted=weighted, steps=14)


@pytest.mark.parametrize("name", ["norm-padding-of-one-table", "max-padding", "gathered"])
@every_sharding
@on_4_ranks
def test_arguments_on_4_ranks(ranks, sharding, name):
    """What the ranks exchange, one of them without a table under table sharding."""
    gathered = name == "gathered"
    options = {"mode": "sum", "scale_grad_by_freq": True} if gathered else OF_TABLES[name]
    output = "gather" if gathered else "share"
    ranks.run(check_arguments, sharding, options, sizes=SIZES, output=output, weighted=gathered, steps=14)


def check_pretrained(rank, world_size, sharding):
    table = torch.randn(101, DIM, generator=torch.Generator().manual_seed(2))
    options = dict(mode="mean", padding_idx=PADDING, include_last_offset=True, max_norm=2.0, norm_type=1.0)
    frozen = ShardedFreqAwareEmbeddingBag.from_pretrained(table, sharding=sharding, num_slots=12, **options)
    assert not frozen.weight.requires_grad and frozen.sharding == sharding and frozen.padding_idx == PADDING
    assert_same_bits(logical(frozen), [table], "the table given")
    trained = ShardedFreqAwareEmbeddingBag.from_pretrained(table, freeze=False, sharding=sharding, num_slots=12)
    ids = torch.randperm(101, generator=torch.Generator().manual_seed(rank))[:3].view(1, 3)
    exact = nn.EmbeddingBag.from_pretrained(table.double(), **options)
    out = frozen(ids[0], torch.tensor([0, 3]))
    assert not out.requires_grad, "a frozen table has no graph"
    assert (out - exact(ids[0], torch.tensor([0, 3]))).abs().max() < 1e-6, "the output of a pretrained table"
    assert trained(ids).requires_grad, "freeze=False is trained"


@pytest.mark.parametrize("sharding", ["column", "row"])
@on_2_ranks
def test_from_pretrained(ranks, sharding):
    """The table given is the one that is looked up; frozen unless told otherwise; its options arrive."""
    ranks.run(check_pretrained, sharding)


# ---- idioms of training loops ----------------------------------------------------------------------------------------


def one_ranks_batch():
    """Ids of rank 0 alone, under row and table sharding: even ones of table 0."""
    return torch.tensor([0, 2, 4, 2]), torch.tensor([0, *[4] * (len(SIZES) - 1)])


def check_checkpointing(rank, world_size, sharding, use_reentrant):
    recomputing = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)

    def run(wrap):
        bag = make_collection(world_size, sharding, slots_of_steps(sharding, FEW_STEPS, parts=2), dtype=torch.float64)
        dense = nn.Linear(DIM, 3, dtype=torch.float64)
        trained = optim.Adagrad([*bag.parameters(), *dense.parameters()], lr=LR)
        calls, found = 0, []

        def alone(*batch):
            nonlocal calls
            calls += 1
            return bag(*batch)

        for step in range(FEW_STEPS):
            losses, weights = [], []
            for part, function in enumerate([alone, lambda *batch: dense(alone(*batch)).tanh()]):
                share = make_share(SIZES, step, rank, part)
                weights.append(share.weights.clone().requires_grad_())
                out = wrap(function, share.values, share.offsets, weights[-1])
                losses.append(local_loss(step + part, rank, out))
                found.append(out.detach())
            sum(losses).backward()
            found += [weight.grad for weight in weights]
            trained.step()
            trained.zero_grad()
        bag._cache.check()
        assert bag.stats.evictions > 0, "nothing was evicted"
        return calls, [*found, dense.weight.detach(), *logical(bag, trained)]

    calls, expected = run(lambda function, *batch: function(*batch))
    calls_again, found = run(recomputing)
    assert calls_again == 2 * calls, f"{calls_again} lookups instead of twice {calls}"
    assert_same_bits(found, expected, "with and without checkpointing")


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved tensors"])
@every_sharding
@on_2_ranks
def test_gradient_checkpointing(ranks, sharding, use_reentrant):
    """A bag alone, and one with a dense layer, run again in the backward, with their exchanges: the same bits."""
    ranks.run(check_checkpointing, sharding, use_reentrant)


def check_retained(rank, world_size, sharding):
    bag, twin = (make_collection(world_size, sharding, slots_of_steps(sharding, 9, parts=2)) for _ in range(2))
    trained, trained_twin = (optim.Adagrad(module.parameters(), lr=LR) for module in (bag, twin))
    for step in range(9):
        share, other = make_share(SIZES, step, rank), make_share(SIZES, step, rank, 1)
        batch = one_ranks_batch() if step % 3 == 0 else (share.values, share.offsets)
        out = bag(*batch)
        local_loss(step, rank, twin(*batch)).backward()
        local_loss(step, rank, out).backward(retain_graph=True)
        for module in (bag, twin):
            with torch.no_grad():
                module(other.values, other.offsets)
        local_loss(step, rank, out).backward(retain_graph=True)
        twin.weight.grad.mul_(2)
        assert_same_bits([bag.weight.grad.to_dense()], [twin.weight.grad.to_dense()], f"the gradient of step {step}")
        for optimizer in (trained, trained_twin):
            optimizer.step()
            optimizer.zero_grad()
        if step % 2 == 0:
            with pytest.raises(RuntimeError, match="rows were released: an optimizer stepped"):
                local_loss(step, rank, out).backward()
            assert bag.weight.grad is None and everyone("raised") == ["raised"] * world_size
    assert bag.stats.evictions > 0, "nothing was evicted"
    assert_same_bits(logical(bag, trained), logical(twin, trained_twin), "a doubled backward and a doubled gradient")


@every_sharding
@on_2_ranks
def test_retained_graphs(ranks, sharding):
    """Two backwards before a step double the gradient; one across a step raises on all ranks, with rows or without."""
    ranks.run(check_retained, sharding)


def check_inference_first(rank, world_size, sharding):
    ceiling = slots_of_steps(sharding, FEW_STEPS, parts=2)
    width = -(-DIM // world_size) if sharding == "column" else DIM

    def run(num_slots, infers):
        limit = {"max_cache_bytes": ceiling * 2 * width * 4, "optimizer": "adagrad"}
        bag = make_collection(world_size, sharding, num_slots, **limit)
        found = []

        def infer(step):
            share = make_share(SIZES, step, rank, 1)
            with torch.inference_mode() if infers else contextlib.nullcontext():
                out = bag(share.values.clone(), share.offsets.clone())
                assert out.is_inference() == infers
            found.append(out.detach().clone())

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*it grows to.*")
            for step in range(FEW_STEPS):
                infer(step)
        if infers:
            assert bag.stats.growths > 0 and bag.stats.evictions > 0, "the cache neither grew nor evicted"
        trained = optim.Adagrad(bag.parameters(), lr=LR)
        for step in range(FEW_STEPS):
            train_a_little(rank, bag, trained, step, 1)
            infer(step)
        bag._cache.check()
        return [*found, *logical(bag, trained)]

    assert_same_bits(run(2, True), run(ceiling, False), "in inference mode first, and never")


@every_sharding
@on_2_ranks
def test_inference_mode_first_then_training(ranks, sharding):
    """First forward, growth and eviction in inference mode leave nothing behind that training cannot use."""
    ranks.run(check_inference_first, sharding)


def check_in_place(rank, world_size, sharding, mode):
    def run(change):
        bag = make_collection(world_size, sharding, slots_of_steps(sharding, FEW_STEPS), mode=mode)
        trained = optim.Adagrad(bag.parameters(), lr=LR)
        for step in range(FEW_STEPS):
            share = make_share(SIZES, step, rank)
            local_loss(step, rank, change(bag(share.values, share.offsets))).backward()
            trained.step()
            trained.zero_grad()
        assert bag.stats.evictions > 0, "nothing was evicted"
        return logical(bag, trained)

    in_place = run(lambda out: out.mul_(2).relu_())
    assert_same_bits(in_place, run(lambda out: (out * 2).relu()), "in place and out of place")
    one = ShardedFreqAwareEmbeddingBag(40, DIM, sharding="column" if sharding == "column" else "row", num_slots=9)
    out = one(torch.arange(3).view(1, 3) + rank)
    out.add_(1).relu_().sum().backward()
    assert one.weight.grad._nnz() > 0


@pytest.mark.parametrize("mode", ["sum", "max"])
@every_sharding
@on_2_ranks
def test_outputs_change_in_place(ranks, sharding, mode):
    """mul_ and relu_ on what a bag returns, as on what nn.EmbeddingBag returns."""
    ranks.run(check_in_place, sharding, mode)


class WithDense(nn.Module):
    """A sharded bag and layers of which every rank has all."""

    def __init__(self, bag):
        super().__init__()
        self.bag = bag
        self.dense = nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, values, offsets):
        return self.dense(self.bag(values, offsets))


def check_beside_ddp(rank, world_size, sharding):
    weights = [torch.randn(rows, DIM, generator=torch.Generator().manual_seed(rows)).double() for rows in SIZES]
    num_slots = slots_of_steps(sharding, FEW_STEPS, parts=2)
    bag = make_collection(world_size, sharding, num_slots, _weight=weights)
    torch.manual_seed(rank)
    model = WithDense(bag)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bag.weight"])
    wrapped = nn.parallel.DistributedDataParallel(model)  # gives all ranks the dense layers of the first
    exact = nn.EmbeddingBag.from_pretrained(torch.cat(weights), freeze=False, mode="sum")
    dense = copy.deepcopy(model.dense)
    ours = optim.Adagrad(wrapped.parameters(), lr=LR)
    torchs = torch.optim.Adagrad([*exact.parameters(), *dense.parameters()], lr=LR)
    for step in range(FEW_STEPS):
        for part in range(2):
            share = make_share(SIZES, step, rank, part)
            with wrapped.no_sync() if part == 0 else contextlib.nullcontext():  # the first of two micro-batches
                local_loss(step, rank, wrapped(share.values, share.offsets)).backward()
            shares = [make_share(SIZES, step, source, part) for source in range(world_size)]
            ids = [share.of_table(table).values + start for share in shares for table, start in enumerate(STARTS[:-1])]
            lengths = torch.cat([share.lengths.reshape(-1) for share in shares])
            outs = exact(torch.cat(ids), lengths.cumsum(0) - lengths).split([s.lengths.numel() for s in shares])
            outs = [dense(out.view(len(SIZES), -1, DIM).transpose(0, 1)) for out in outs]
            mean_loss(step, dict(enumerate(outs))).backward()
        for optimizer in (ours, torchs):
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(model.dense.parameters(), dense.parameters()):
        assert_close(found, expected, "the dense layers")
    assert_close(logical(bag)[0], exact.weight, "the tables")
    assert bag.stats.evictions > 0, "nothing was evicted"


@every_sharding
@on_2_ranks
def test_beside_distributed_data_parallel(ranks, sharding):
    """DDP around the whole model, but for the block, with no_sync micro-batches: one process on the whole batch."""
    ranks.run(check_beside_ddp, sharding)


def check_integers(rank, world_size, sharding):
    def run(dtype):
        bag = make_collection(
            world_size, sharding, slots_of_steps(sharding, FEW_STEPS), mode="mean", include_last_offset=True
        )
        trained, outs = optim.Adagrad(bag.parameters(), lr=LR), []
        for step in range(FEW_STEPS):
            share = make_share(SIZES, step, rank)
            batch = [tensor.to(dtype) for tensor in inputs(share, ragged, True)]
            bag.prefetch(*batch)
            outs.append(bag(*batch))
            local_loss(step, rank, outs[-1]).backward()
            trained.step()
            trained.zero_grad()
        assert bag.stats.evictions > 0, "nothing was evicted"
        one = ShardedFreqAwareEmbeddingBag(40, DIM, sharding="column" if sharding == "column" else "row", num_slots=9)
        outs.append(one(torch.tensor([[1, 5], [7, 5]], dtype=dtype) + rank))
        return [*(out.detach() for out in outs), *logical(bag, trained)]

    assert_same_bits(run(torch.int32), run(torch.int64), "int32 and int64")


@every_sharding
@on_2_ranks
def test_ids_and_offsets_of_32_bits(ranks, sharding):
    """int32 ids and offsets, in lookups and prefetches, give the bits of int64."""
    ranks.run(check_integers, sharding)


# ---- state -----------------------------------------------------------------------------------------------------------


def train_a_little(rank, bag, optimizer, first, steps):
    """Steps first.. on the shares of `rank`, or on those of ranks 0 and 1 together if rank is None."""
    for step in range(first, first + steps):
        shares = [make_share(SIZES, step, source) for source in ((0, 1) if rank is None else (rank,))]
        together = [[share.of_table(table) for share in shares] for table in range(len(SIZES))]
        values = torch.cat([part.values for parts in together for part in parts])
        lengths = torch.cat([part.lengths[0] for parts in together for part in parts])
        outs = bag(values, lengths.cumsum(0) - lengths).split([share.lengths.shape[1] for share in shares])
        mean_loss(step, dict(zip((0, 1) if rank is None else (rank,), outs))).backward()
        optimizer.step()
        optimizer.zero_grad()


class Tables(nn.Module):
    """T nn.EmbeddingBag under the names of a collection's state_dict."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in SIZES)


def check_state_dict_in_chunks(rank, world_size, sharding, chunk_bytes):
    with chunks_of(chunk_bytes):
        check_state_dict(rank, world_size, sharding)


def check_state_dict(rank, world_size, sharding):
    torch.manual_seed(3)
    plain_tables = Tables()
    torch.manual_seed(3)
    bag = ShardedFreqAwareEmbeddingBagCollection(
        SIZES, DIM, mode="sum", sharding=sharding, num_slots=50, ids_freq_mapping=counts_of(SIZES)
    )
    state = bag.state_dict()
    assert_same_bits(list(state.values()), list(plain_tables.state_dict().values()), "the values drawn from one seed")
    train_a_little(rank, bag, optim.Adagrad(bag.parameters(), lr=LR), 0, 10)
    state = bag.state_dict()
    assert_same_everywhere(list(state.values()), "state_dict")
    assert_same_everywhere(logical(bag), "logical_weight")
    logical_rows = logical(bag)[0]
    assert_same_bits([torch.cat(list(state.values()))], [logical_rows], "state_dict and logical_weight")
    plain_tables.load_state_dict(state)
    assert_same_bits(list(plain_tables.state_dict().values()), list(state.values()), "nn.ModuleList after loading")
    other = ShardedFreqAwareEmbeddingBagCollection(SIZES, DIM, mode="sum", sharding="row", num_slots=9)
    other(torch.tensor([0] * len(SIZES)), torch.arange(len(SIZES)))  # rows that are resident are replaced, too
    other.load_state_dict(plain_tables.state_dict())
    assert_same_bits(logical(other), logical(bag), "another sharding after loading")
    single = FreqAwareEmbeddingBagCollection(SIZES, DIM, mode="sum", num_slots=9)
    single.load_state_dict(state)
    assert_same_bits(logical(single), logical(bag), "one process after loading")
    bag._cache.check()
    other._cache.check()
    for start, rows in bag._placement.table_ranges():  # what checkpoints read: one rank gets it
        part = bag._cached_weight.logical_chunk("weight", start + rows // 3, start + rows, to=1)
        assert (part is None) == (rank != 1), f"rank {rank} got {part}"
        if rank == 1:
            assert_same_bits([part], [logical_rows[start + rows // 3 : start + rows]], "rows read by one rank")
    one = ShardedFreqAwareEmbeddingBag(101, DIM, sharding="row" if sharding == "row" else "column", num_slots=9)
    nn.EmbeddingBag(101, DIM).load_state_dict(one.state_dict())
    one.load_state_dict(nn.EmbeddingBag(101, DIM).state_dict())


@pytest.mark.parametrize("chunk_bytes", [1, 16 << 20], ids=["16ids", "16MiB"])
@every_sharding
@on_2_ranks
def test_state_dict(ranks, sharding, chunk_bytes):
    """First values are nn.EmbeddingBag's; state_dict, equal on all ranks, loads into torch, other shardings, back."""
    ranks.run(check_state_dict_in_chunks, sharding, chunk_bytes)


def check_chunks(rank, world_size, sharding, optimizer):
    def run(chunk_bytes):
        with chunks_of(chunk_bytes):
            num_slots = slots_of_steps(sharding, 6)
            bag = make_collection(world_size, sharding, num_slots, ids_freq_mapping=counts_of(SIZES))
            trained = getattr(optim, optimizer)(bag.parameters(), lr=LR)  # re-lays the records out
            train_a_little(rank, bag, trained, 0, 6)
            assert bag.stats.evictions > 0, "nothing was evicted"
            weights, state = list(bag.state_dict().values()), copy.deepcopy(trained.state_dict())
            other = make_collection(world_size, sharding, num_slots, _weight=weights)
            resumed = getattr(optim, optimizer)(other.parameters(), lr=LR)
            resumed.load_state_dict(state)
            assert_same_bits(logical(other, resumed), logical(bag, trained), "given and loaded")
            train_a_little(rank, other, resumed, 3, 3)
            torch.manual_seed(5)
            bag.init_(lambda values: values.uniform_(-1, 1))
            pieces = list(bag._placement.chunks(0, NUM_ROWS))
            bag._cache.check()
            return pieces, [*weights, *logical(bag, trained), *logical(other, resumed), *logical(copy.deepcopy(bag))]

    (few, expected), (many, found) = run(16 << 20), run(1)
    assert len(few) == len(SIZES) and len(many) > len(SIZES), f"{len(few)} pieces, and {len(many)} small ones"
    assert_same_bits(found, expected, "in pieces of 16 ids and in whole tables")


@pytest.mark.parametrize("sharding, optimizer", [("column", "RowWiseAdagrad"), ("row", "Adam"), ("table", "Adam")])
@on_2_ranks
def test_pieces_of_tables(ranks, sharding, optimizer):
    """Draws, given weights, a bound optimizer, loads, init_ and copies give the same values in pieces of 16 ids."""
    ranks.run(check_chunks, sharding, optimizer)


def check_threads(rank, world_size, sharding, ragged):
    bags_per_table, dim, rows = 1024, 64, 2000
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(0, 4, (4 * bags_per_table,), generator=generator) if ragged else torch.ones(4096).long()
    offsets = lengths.cumsum(0) - lengths
    ids = torch.randint(rows, (int(lengths.sum()),), generator=generator)
    grad = torch.randn(bags_per_table, 4, dim, generator=generator)
    assert num_parts(ids.numel() * dim, GRAIN) <= 1 < ids.numel() * dim // GRAIN, "shared out among several threads"
    trained = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            bag = ShardedFreqAwareEmbeddingBagCollection(
                [rows] * 4, dim, mode="sum", cache_ratio=1.0, sharding=sharding
            )
            optimizer = optim.SGD(bag.parameters(), lr=1.0)
            bag(ids, offsets).backward(grad)
            optimizer.step()
            trained.append(list(bag.state_dict().values()))
    finally:
        torch.set_num_threads(1)
    assert_same_bits(*trained, "with one thread and with two")


@pytest.mark.parametrize("ragged", [False, True])
@every_sharding
@on_2_ranks
def test_the_bits_do_not_depend_on_the_number_of_threads(ranks, sharding, ragged):
    """Of a batch large enough to be shared out; ranks that exchange rows number them in an order of their own."""
    ranks.run(check_threads, sharding, ragged)


def check_read_by_one_rank(rank, world_size, sharding, optimizer):
    bag = make_collection(world_size, sharding, slots_of_steps(sharding, 6), ids_freq_mapping=counts_of(SIZES))
    trained = getattr(optim, optimizer)(bag.parameters(), lr=LR)
    train_a_little(rank, bag, trained, 0, 6)
    assert bag.stats.evictions > 0, "nothing was evicted"
    weight = bag._cached_weight
    for column in weight.column_widths():
        whole = weight.logical(column)
        for to, (start, rows) in itertools.product(range(world_size), bag._placement.table_ranges()):
            first, last = start + rows // 3, start + rows
            part = weight.logical_chunk(column, first, last, to=to)
            assert (part is None) == (rank != to), f"rank {rank} got {part} of what rank {to} reads"
            if rank == to:
                assert_same_bits([part], [whole[first:last]], f"{column} read by one rank")


@pytest.mark.parametrize("optimizer", ["RowWiseAdagrad", "Adam"])
@every_sharding
@on_2_ranks
def test_one_rank_reads(ranks, sharding, optimizer):
    """logical_chunk(to=rank), of weights and of state by column and by row: that rank has the values, others None."""
    ranks.run(check_read_by_one_rank, sharding, optimizer)


def check_init(rank, world_size, sharding):
    bag = make_collection(world_size, sharding, slots_of_steps(sharding, 3), ids_freq_mapping=counts_of(SIZES))
    single = FreqAwareEmbeddingBagCollection(SIZES, DIM, num_slots=20)
    trained = optim.Adagrad(bag.parameters(), lr=LR)
    train_a_little(rank, bag, trained, 0, 3)
    state = logical(bag, trained)[1]
    for module in (bag, single):
        torch.manual_seed(5)
        module.init_(lambda values: values.uniform_(-1, 1))
    assert_same_bits(logical(bag), logical(single), "init_ on ranks and in one process")
    assert_same_bits([state], logical(bag, trained)[1:], "the optimizer's state around init_")
    bag._cache.check()


@every_sharding
@on_2_ranks
def test_init(ranks, sharding):
    """init_ gives the values of one process from the same seed."""
    ranks.run(check_init, sharding)


def check_deepcopy(rank, world_size, sharding):
    bag = make_collection(world_size, sharding, slots_of_steps(sharding, 15))
    trained = optim.Adam(bag.parameters(), lr=LR)
    train_a_little(rank, bag, trained, 0, 5)
    before = logical(bag)
    other = copy.deepcopy(nn.ModuleDict({"bag": bag}))["bag"]
    assert_same_bits(logical(other), before, "the copy")
    train_a_little(rank, other, optim.Adam(other.parameters(), lr=LR), 5, 10)
    assert_same_bits(logical(bag), before, "the original after its copy was trained")
    assert not torch.equal(logical(other)[0], before[0]), "the copy was not trained"
    train_a_little(rank, bag, trained, 5, 10)
    for module in (bag, other):
        module._cache.check()
        assert module.stats.evictions > 0, "nothing was evicted"


@every_sharding
@on_2_ranks
def test_deepcopy(ranks, sharding):
    """A copy is a table of its own over the same ranks."""
    ranks.run(check_deepcopy, sharding)


def check_optimizer_state(rank, world_size, sharding, optimizer):
    def make(collection, **options):
        num_slots = slots_of_steps(options.get("sharding", "column"), 15)
        bag = collection(SIZES, DIM, mode="sum", num_slots=num_slots, dtype=torch.float64, **options)
        return bag, getattr(optim, optimizer)(bag.parameters(), lr=LR)

    torch.manual_seed(0)
    bag, trained = make(ShardedFreqAwareEmbeddingBagCollection, sharding=sharding)
    train_a_little(rank, bag, trained, 0, 5)
    tables, states = bag.state_dict(), copy.deepcopy(trained.state_dict())  # torch's has the live step count
    assert_same_everywhere(logical(bag, trained), "the optimizer's state")
    resumed = [make(ShardedFreqAwareEmbeddingBagCollection, sharding="row", ids_freq_mapping=counts_of(SIZES))]
    resumed.append(make(FreqAwareEmbeddingBagCollection))
    train_a_little(rank, bag, trained, 5, 9)
    for number, (other, others) in enumerate(resumed):
        other.load_state_dict(tables)
        others.load_state_dict(copy.deepcopy(states))
        train_a_little(rank if number == 0 else None, other, others, 5, 9)
        for found, expected in zip(logical(other, others), logical(bag, trained)):
            assert_close(found, expected, f"after resuming on {'ranks' if number == 0 else 'one process'}")
        assert other.stats.evictions > 0, "nothing was evicted"
    # torch's: the same state, one step more, over the whole batch.
    plain_tables = nn.EmbeddingBag(
        NUM_ROWS, DIM, _weight=torch.cat(list(bag.state_dict().values())), mode="sum", sparse=True
    )
    torchs = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}[optimizer]
    torchs = torchs(plain_tables.parameters(), lr=LR)
    states = trained.state_dict()
    torchs.load_state_dict(optim.to_sparse_adam(states) if optimizer == "Adam" else states)
    shares = [make_share(SIZES, 14, source) for source in range(2)]
    ids = [share.of_table(table).values + start for share in shares for table, start in enumerate(STARTS[:-1])]
    lengths = torch.cat([share.lengths.reshape(-1) for share in shares])
    outs = plain_tables(torch.cat(ids), lengths.cumsum(0) - lengths).split([share.lengths.numel() for share in shares])
    mean_loss(14, {r: out.view(len(SIZES), -1, DIM).transpose(0, 1) for r, out in enumerate(outs)}).backward()
    torchs.step()
    train_a_little(rank, bag, trained, 14, 1)
    assert_close(logical(bag)[0], plain_tables.weight, "torch's optimizer after loading the state of ours")


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "Adam"])
@every_sharding
@on_2_ranks
def test_optimizer_state(ranks, sharding, optimizer):
    """The optimizer's state_dict resumes on another sharding, in one process, and in torch's optimizer."""
    ranks.run(check_optimizer_state, sharding, optimizer)


# ---- clipping --------------------------------------------------------------------------------------------------------


def check_clipping(rank, world_size, sharding, norm_type):
    """Embeddings and a dense layer in DistributedDataParallel, which averages over the same group."""
    torch.manual_seed(0)
    weights = [torch.randn(rows, DIM, dtype=torch.float64) for rows in SIZES]
    dense = [nn.Linear(DIM, 1, dtype=torch.float64) for _ in range(2)]
    dense[1].load_state_dict(dense[0].state_dict())
    steps = range(12)
    held = [[make_share(SIZES, step, source) for source in range(world_size)] for step in steps]
    num_slots = slots_of_steps(sharding, len(steps), world_size)
    bag = make_collection(world_size, sharding, num_slots, _weight=weights)
    exact = nn.EmbeddingBag.from_pretrained(torch.cat(weights), freeze=False, mode="sum")
    averaged = nn.parallel.DistributedDataParallel(dense[0])
    ours = optim.Adagrad([*bag.parameters(), *dense[0].parameters()], lr=LR)
    torchs = torch.optim.Adagrad([*exact.parameters(), *dense[1].parameters()], lr=LR)
    clipped = 0
    for step in steps:
        share = held[step][rank]
        local_loss(step, rank, averaged(bag(share.values, share.offsets))).backward()
        ids = [s.of_table(t).values + start for s in held[step] for t, start in enumerate(STARTS[:-1])]
        lengths = torch.cat([s.lengths.reshape(-1) for s in held[step]])
        outs = exact(torch.cat(ids), lengths.cumsum(0) - lengths).split([s.lengths.numel() for s in held[step]])
        mean_loss(
            step, {r: dense[1](o.view(len(SIZES), -1, DIM).transpose(0, 1)) for r, o in enumerate(outs)}
        ).backward()
        norm = optim.clip_grad_norm_([*bag.parameters(), *dense[0].parameters()], 1.5, norm_type)
        expected = nn.utils.clip_grad_norm_([*exact.parameters(), *dense[1].parameters()], 1.5, norm_type)
        assert_close(norm, expected, f"the norm of step {step}")
        assert len(set(everyone(float(norm)))) == 1, "the norm differs among ranks"
        clipped += norm > 1.5
        for optimizer in (ours, torchs):
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < clipped, "nothing was clipped"
    assert_close(logical(bag)[0], exact.weight, "the tables after clipped steps")
    assert_close(dense[0].weight, dense[1].weight, "the dense layer after clipped steps")
    assert bag.stats.evictions > 0 or (sharding == "table" and rank not in PLANS[world_size]), "nothing was evicted"


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@every_sharding
@on_2_ranks
def test_clip_grad_norm(ranks, sharding, norm_type):
    """The total norm over tables and dense parameters is that of one process, and training goes on as there."""
    ranks.run(check_clipping, sharding, norm_type)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@on_4_ranks
def test_clip_grad_norm_of_a_rank_without_a_table(ranks, norm_type):
    """The norm of no rows is 0, also where torch has none for an empty tensor."""
    ranks.run(check_clipping, "table", norm_type)


# ---- groups ----------------------------------------------------------------------------------------------------------


def check_groups(rank, world_size):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group, number = groups[rank % 2], rank // 2
    for sharding in SHARDINGS:
        shares = [[make_share(SIZES, 7 * step + rank % 2, source) for source in range(2)] for step in range(8)]
        torch.manual_seed(rank % 2)
        weights = [torch.randn(rows, DIM, dtype=torch.float64) for rows in SIZES]
        bag = ShardedFreqAwareEmbeddingBagCollection(
            SIZES,
            DIM,
            mode="sum",
            _weight=weights,
            sharding=sharding,
            plan=PLANS[2] if sharding == "table" else None,
            process_group=group,
            num_slots=needed_slots(sharding, 2, SIZES, PLANS[2], shares),
        )
        assert bag.process_group is group and bag._ranks.rank == number and bag._ranks.size == 2
        exact = nn.EmbeddingBag.from_pretrained(torch.cat(weights), freeze=False, mode="sum")
        ours, torchs = optim.SGD(bag.parameters(), lr=LR), torch.optim.SGD(exact.parameters(), lr=LR)
        for step, of_step in enumerate(shares):
            local_loss(step, number, bag(of_step[number].values, of_step[number].offsets)).backward()
            ids = [s.of_table(t).values + start for s in of_step for t, start in enumerate(STARTS[:-1])]
            lengths = torch.cat([s.lengths.reshape(-1) for s in of_step])
            outs = exact(torch.cat(ids), lengths.cumsum(0) - lengths).split([s.lengths.numel() for s in of_step])
            mean_loss(step, {r: o.view(len(SIZES), -1, DIM).transpose(0, 1) for r, o in enumerate(outs)}).backward()
            for optimizer in (ours, torchs):
                optimizer.step()
                optimizer.zero_grad()
        assert_close(logical(bag)[0], exact.weight, f"the tables of group {rank % 2}, by {sharding}")
        assert bag.stats.evictions > 0, "nothing was evicted"


@on_4_ranks
def test_two_groups(ranks):
    """Ranks 0 and 2 share one model, 1 and 3 another: each is what its own data makes it."""
    ranks.run(check_groups)


# ---- random traces ---------------------------------------------------------------------------------------------------


TRACE_SIZES, TRACE_DIM = [17, 9, 1], 3


class Oracle:
    """A plain table: sum pooling, summed gradients, w -= g."""

    def __init__(self, tables):
        self.tables = [table.clone() for table in tables]
        self.grads = [torch.zeros_like(table) for table in tables]

    def forward(self, bags):
        """(B, T, D) from lists of ids, bags[t][b]."""
        return torch.stack([torch.stack([t[ids].sum(0) for ids in b]) for t, b in zip(self.tables, bags)], 1)

    def backward(self, bags, grad):
        for number, of_table in enumerate(bags):
            for ids, row in zip(of_table, grad[:, number]):
                for one in ids:
                    self.grads[number][one] += row

    def step(self):
        for table, grad in zip(self.tables, self.grads):
            table -= grad
            grad.zero_()


def check_trace(rank, world_size, sharding, seed, operations):
    """Small integers in float64, lr 1 and a power of two of ranks: all sums are exact, and equality is the test."""
    warnings.filterwarnings("ignore", message=".*it grows to.*")
    chance = random.Random(seed)  # the same on all ranks, which draw what all of them do
    tables = [
        torch.arange(rows * TRACE_DIM, dtype=torch.float64).view(rows, -1) + 100 * n
        for n, rows in enumerate(TRACE_SIZES)
    ]
    width = -(-TRACE_DIM // world_size) if sharding == "column" else TRACE_DIM
    bag = ShardedFreqAwareEmbeddingBagCollection(
        TRACE_SIZES,
        TRACE_DIM,
        mode="sum",
        _weight=tables,
        sharding=sharding,
        num_slots=4,
        max_cache_bytes=(10 if sharding == "column" else 8) * width * 8,
        ids_freq_mapping=chance.choice([None, counts_of(TRACE_SIZES)]),
        evict_strategy=chance.choice(["dataset", "lfu", "lru", "s3fifo"]),
        kernels=chance.choice(["cpu", "torch"]),
    )
    trained = optim.SGD(bag.parameters(), lr=1.0)
    oracle, held, refused, done = Oracle(tables), [], 0, dict.fromkeys(("forward", "evaluate", "backward", "step"), 0)

    def draw():
        """Bags of every rank, [rank][t][b]."""
        bags = [chance.randrange(3) for _ in range(world_size)]
        return [
            [[[chance.randrange(rows) for _ in range(chance.randrange(3))] for _ in range(n)] for rows in TRACE_SIZES]
            for n in bags
        ]

    def as_input(bags):
        lengths = torch.tensor([len(ids) for of_table in bags[rank] for ids in of_table], dtype=torch.int64)
        values = [one for of_table in bags[rank] for ids in of_table for one in ids]
        return torch.tensor(values, dtype=torch.int64), lengths.cumsum(0) - lengths

    def lookup(bags):
        nonlocal refused
        try:
            out = bag(*as_input(bags))
        except CacheTooSmallError:
            refused += 1
            return None
        expected = oracle.forward(bags[rank]) if bags[rank][0] else torch.zeros(0, len(TRACE_SIZES), TRACE_DIM)
        assert torch.equal(out.detach(), expected.double()), f"operation {number}: the output differs"
        return out

    for number in range(operations):
        operation = chance.choice(
            ["forward", "forward", "drop", "evaluate", "prefetch", "backward", "backward", "step", "flush", "load"]
        )
        if operation == "load" and chance.random() < 0.7:
            operation = "forward"
        if operation == "forward":
            bags = draw()
            if (out := lookup(bags)) is not None:
                held.append((bags, out))
        elif operation == "drop":
            lookup(draw())
        elif operation == "evaluate":
            with torch.no_grad():
                lookup(draw())
        elif operation == "prefetch":
            with contextlib.suppress(CacheTooSmallError):
                bag.prefetch(*as_input(draw()))
        elif operation == "backward" and held:
            bags, out = held.pop(chance.randrange(len(held)))
            scales = [float(chance.randrange(-2, 3)) for _ in range(world_size)]
            out.backward(torch.full_like(out, scales[rank]))
            for source, scale in enumerate(scales):
                shape = (len(bags[source][0]), len(TRACE_SIZES), TRACE_DIM)
                oracle.backward(bags[source], torch.full(shape, scale / world_size, dtype=torch.float64))
        elif operation == "step":
            trained.step()
            trained.zero_grad()
            oracle.step()
        elif operation == "flush":
            bag.flush()
        elif operation == "load" and not any(grad.any() for grad in oracle.grads):
            oracle.tables = [table.flip(0) for table in oracle.tables]
            bag.load_state_dict({f"tables.{n}.weight": table for n, table in enumerate(oracle.tables)})
        done[operation] = done.get(operation, 0) + 1
        out = None
        bag._cache.check()
        if number % 10 == 9:
            assert torch.equal(logical(bag)[0], torch.cat(oracle.tables)), f"operation {number}: the table differs"
    assert min(done.values()) > 0 and refused < 0.5 * operations, (
        f"the trace is too one-sided: {done}, {refused} refused"
    )
    assert bag.stats.evictions > 0, "nothing was evicted"
    return refused


@pytest.mark.parametrize("seed", range(3))
@every_sharding
@on_2_ranks
def test_random_traces(ranks, sharding, seed):
    """Forwards, held and dropped graphs, backwards, steps, evaluations, prefetches, flushes, loads: a plain table's."""
    ranks.run(check_trace, sharding, seed, 100)


# ---- the batches to come ---------------------------------------------------------------------------------------------


class FailingStore(RamStore):
    """A RamStore whose reads beside training raise once `left` have been done."""

    def __init__(self, left):
        super().__init__(make_kernels("cpu"))
        self.left = left

    def read(self, rows, records, places):
        if threading.current_thread() is not threading.main_thread():
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
        super().read(rows, records, places)

    def spawn(self):
        return FailingStore(self.left)


def check_lookahead(rank, world_size, sharding, window, depth):
    """Outputs, tables, states: with Lookahead those without; a move that fails on one rank raises on all."""
    steps = 12
    roomy = sharding != "table"  # there a rank's own tables would have a slot for every row
    num_slots = slots_of_steps(sharding, steps, world_size, 1 + depth if roomy else 1)
    batches = [make_share(SIZES, step, rank, 0) for step in range(steps)]
    results = []
    for ahead in (True, False):
        bag = make_collection(world_size, sharding, num_slots, evict_strategy="lookahead", optimizer="adagrad")
        trained, outs = optim.Adagrad(bag.parameters(), lr=LR), []
        ids = lambda share: (share.values, share.offsets)  # noqa: E731
        misses, counted = [], bag.stats
        for step, share in enumerate(Lookahead(batches, bag, ids, window, depth) if ahead else batches):
            before = counted.misses_unique
            out = bag(*ids(share))
            misses.append(counted.misses_unique - before)
            local_loss(step, rank, out).backward()
            trained.step()
            trained.zero_grad()
            outs.append(out.detach().clone())
        if ahead and depth and roomy:
            assert not any(misses), "a row was missing in a forward"
        assert max(everyone(bag.stats.evictions)) > steps
        bag._cache.check()
        assert bag._cache.slots.num_pinned == 0
        results.append([*outs, *logical(bag, trained)])
    assert_same_bits(*results, "with and without Lookahead")

    store = FailingStore(2 if rank == 1 else 1000)
    bag = make_collection(world_size, sharding, num_slots, evict_strategy="lookahead", store=store)
    expected = logical(bag)
    if depth:
        with pytest.raises(OSError if rank == 1 else RuntimeError, match="the disk is gone"), torch.no_grad():
            for share in Lookahead(batches, bag, ids, window, depth):
                bag(*ids(share))
        bag._cache.check()
        assert_same_bits(logical(bag), expected, "after a failed move")


@pytest.mark.parametrize(("window", "depth"), [(1, 1), (5, 2), (20, 0)])
@pytest.mark.filterwarnings("ignore:the rows of the next batch do not fit")
@every_sharding
@on_2_ranks
def test_lookahead(ranks, sharding, window, depth):
    """Unequal and empty shares among the batches."""
    ranks.run(check_lookahead, sharding, window, depth)


def check_fused(rank, world_size, sharding, optimizer):
    """Training inside the backward has the bits of the step; what it cannot do is refused on all ranks."""
    steps = 12
    num_slots = slots_of_steps(sharding, steps, world_size)
    results = []
    for fused in (False, True):
        bag = make_collection(world_size, sharding, num_slots)
        trained = getattr(optim, optimizer)(bag.parameters(), lr=LR, fused=fused)
        outs = []
        for step in range(steps):
            share = make_share(SIZES, step, rank, 0)
            out = bag(share.values, share.offsets)
            local_loss(step, rank, out).backward()
            trained.step()
            trained.zero_grad()
            outs.append(out.detach().clone())
        assert max(everyone(bag.stats.evictions)) > steps
        results.append([*outs, *logical(bag, trained)])
    assert_same_bits(*results, "with and without fused=True")
    local_loss(0, rank, bag(share.values, share.offsets)).backward()
    with pytest.raises(RuntimeError, match="fused=True"):
        local_loss(0, rank, bag(share.values, share.offsets)).backward()
    trained.step()


@pytest.mark.parametrize("optimizer", ["RowWiseAdagrad", "Adam"])
@every_sharding
@on_2_ranks
def test_fused(ranks, sharding, optimizer):
    """Unequal and empty shares among the batches."""
    ranks.run(check_fused, sharding, optimizer)


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["share", "gather"])
@every_sharding
def test_one_process_without_a_group(sharding, output):
    """Without torch.distributed there is one rank: the bits are those of the plain collection."""

    def run(make, **options):
        torch.manual_seed(0)
        bag = make(SIZES, DIM, mode="mean", num_slots=45, padding_idx=0, ids_freq_mapping=counts_of(SIZES), **options)
        optimizer = optim.Adagrad(bag.parameters(), lr=LR)
        train_a_little(None, bag, optimizer, 0, 20)
        assert bag.stats.evictions > 0
        bag._cache.check()
        return logical(bag, optimizer)

    ours = run(ShardedFreqAwareEmbeddingBagCollection, sharding=sharding, output=output)
    assert_same_bits(ours, run(FreqAwareEmbeddingBagCollection), "sharded over one rank and not sharded")
