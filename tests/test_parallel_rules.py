"""What ranks that share tables must not do, and what they may. `python -m pytest tests/test_parallel_rules.py`

Proves: what one rank does wrong raises on all of them, in a lookup and in a constructor, with the numbers; nothing was
modified then, no row stays pinned, and training goes on as if it had not happened; all ranks use the smallest sizes
that any of them gave; ranks that outnumber rows or tables, and batches without ids, are right; the ranks that are left
raise when one is killed. Checks run in ranks as in tests/test_parallel.py.
"""

import datetime
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_parallel import (
    DIM,
    RankPool,
    assert_close,
    assert_same_bits,
    every_sharding,
    everyone,
    local_loss,
    logical,
    make_share,
    mean_loss,
)
from torch import nn

from colossal_freqcache import CacheTooSmallError, optim
from colossal_freqcache.parallel import ShardedFreqAwareEmbeddingBag, ShardedFreqAwareEmbeddingBagCollection


@pytest.fixture(scope="module")
def ranks():
    """The 2 ranks that all tests of this file share."""
    pool = RankPool(2)
    yield pool
    pool.stop()


SIZES = [40, 3, 37, 1]
PLAN = [0, 0, 1, 1]
NUM_SLOTS = 24


def make_collection(sharding, **options):
    torch.manual_seed(0)
    options = {"mode": "sum", "num_slots": NUM_SLOTS, "plan": PLAN if sharding == "table" else None, **options}
    return ShardedFreqAwareEmbeddingBagCollection(SIZES, DIM, sharding=sharding, **options)


# ---- a lookup that one rank gets wrong -------------------------------------------------------------------------------


def train(bag, optimizer, rank, step):
    """One good step, on each rank's share or, with output="gather", on rank 0's."""
    share = make_share(SIZES, step, 0 if bag.output == "gather" else rank)
    local_loss(step, rank, bag(share.values, share.offsets)).backward()
    optimizer.step()
    optimizer.zero_grad()


GOOD = torch.tensor([5, 2, 2, 0, 36, 0]), torch.tensor([0, 2, 3, 4, 4, 5, 5, 6])  # 2 bags of each of 4 tables
WEIGHTS = torch.ones(GOOD[0].numel())


def changed(tensor, place, value):
    """A copy with another entry."""
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def without_grad(bag):
    with torch.no_grad():
        bag(*GOOD)


def in_inference_mode(bag):
    with torch.inference_mode():
        bag(changed(GOOD[0], 4, 38), GOOD[1])


def with_another_parameter(bag):
    block = bag.weight
    bag.weight = nn.Parameter(torch.zeros(SIZES[0], DIM))
    try:
        bag(*GOOD)
    finally:
        bag.weight = block


# What rank 1 does while rank 0 does `rank_0` (GOOD, by default), what that raises on both, and what the message says.
BAD = {
    "id past its table": (
        lambda bag: bag(changed(GOOD[0], 4, 37), GOOD[1]),
        ValueError,
        "id 37 at position 4 .* of table 2: 0..36",
    ),
    "negative id": (lambda bag: bag(changed(GOOD[0], 0, -1), GOOD[1]), ValueError, "id -1 at position 0 .* of table 0"),
    "id past its table, in inference mode": (in_inference_mode, ValueError, "id 38 at position 4"),
    "offsets that decrease": (lambda bag: bag(GOOD[0], changed(GOOD[1], 2, 5)), ValueError, "must not decrease"),
    "offsets past the end": (lambda bag: bag(GOOD[0], changed(GOOD[1], -1, 9)), ValueError, "past the end of 6"),
    "bags for some tables only": (lambda bag: bag(GOOD[0], GOOD[1][:-1]), ValueError, "7 bags for 4 tables"),
    "ids that are floats": (lambda bag: bag(GOOD[0].double(), GOOD[1]), TypeError, "torch.float64"),
    "weights": (lambda bag: bag(*GOOD, WEIGHTS), ValueError, r"ranks \[1\] of 2 pass per_sample_weights"),
    "weights of another shape": (lambda bag: bag(*GOOD, WEIGHTS[1:]), ValueError, "they must agree"),
    "no gradient mode": (without_grad, ValueError, r"ranks \[0\] of 2 record a graph"),
    "another parameter": (with_another_parameter, RuntimeError, "bag.weight was replaced"),
    "prefetch of a bad id": (lambda bag: bag.prefetch(changed(GOOD[0], 5, 1), GOOD[1]), ValueError, "of table 3: 0..0"),
}


def refuses(bag, optimizer, action, kind, match, what):
    """action() raises on this rank, and changes nothing here."""
    before = logical(bag, optimizer)
    with pytest.raises(kind, match=match):
        action()
    pinned = bag._cache.slots.num_pinned
    assert pinned == 0, f"{what}: {pinned} rows stay pinned"
    bag._cache.check()
    assert_same_bits(logical(bag, optimizer), before, f"{what}: the tables before and after")


def check_bad_lookups(rank, world_size, sharding, options):
    bag, twin = make_collection(sharding, **options), make_collection(sharding, **options)
    trained, trained_twin = (optim.Adagrad(module.parameters(), lr=0.05) for module in (bag, twin))
    for number, (what, (wrong, kind, match)) in enumerate(BAD.items()):
        right = (lambda: bag.prefetch(*GOOD)) if what.startswith("prefetch") else lambda: bag(*GOOD)
        refuses(bag, trained, (lambda: wrong(bag)) if rank == 1 else right, kind, match, what)  # noqa: B023
        for module, optimizer in ((bag, trained), (twin, trained_twin)):
            train(module, optimizer, rank, number)
    assert_same_bits(logical(bag, trained), logical(twin, trained_twin), "good steps with and without bad ones between")


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "padding_idx": 0}], ids=["plain", "norm"])
@every_sharding
def test_what_one_rank_does_wrong_raises_on_all(ranks, sharding, options):
    """Nothing was modified, nothing is left pinned, and the next step is what it would have been."""
    ranks.run(check_bad_lookups, sharding, options)


def check_weights_gradient(rank, world_size, sharding):
    bag = make_collection(sharding)
    trained = optim.SGD(bag.parameters(), lr=0.05)
    weights = WEIGHTS.clone().requires_grad_(rank == 1)
    refuses(bag, trained, lambda: bag(*GOOD, weights), ValueError, r"\[1\] of 2 want the gradient", "weights' gradient")
    bag.weight.requires_grad_(rank == 0)
    refuses(bag, trained, lambda: bag(*GOOD), ValueError, r"\[0\] of 2 record a graph", "a frozen table")
    bag.weight.requires_grad_()
    train(bag, trained, rank, 1)


@every_sharding
def test_gradients_are_wanted_by_all_or_by_none(ranks, sharding):
    """A frozen table, and weights that want a gradient, on one rank only."""
    ranks.run(check_weights_gradient, sharding)


def overfull(sharding):
    """A batch of which one rank's part does not fit into 10 slots: even ids only, or those of one table."""
    if sharding == "table":
        return torch.arange(12), torch.tensor([0, 12, 12, 12])
    return torch.arange(0, 40, 2), torch.tensor([0, 20, 20, 20])


def check_too_small(rank, world_size, sharding, options):
    width = -(-DIM // 2) if sharding == "column" else DIM
    options = {"num_slots": 10, "max_cache_bytes": 10 * 4 * 2 * width, "optimizer": "adagrad", **options}
    bag, twin = make_collection(sharding, **options), make_collection(sharding, **options)
    trained, trained_twin = (optim.Adagrad(module.parameters(), lr=0.05) for module in (bag, twin))
    none = torch.empty(0, dtype=torch.int64), torch.zeros(len(SIZES), dtype=torch.int64)
    few = torch.arange(3), torch.tensor([0, 3, 3, 3])
    for number in range(3):
        batch = overfull(sharding) if rank == 1 else none if number else few
        refuses(bag, trained, lambda: bag(*batch), CacheTooSmallError, "have to be resident at once", "forward")  # noqa: B023
        with torch.inference_mode() if number else torch.no_grad():
            refuses(bag, trained, lambda: bag(*batch), CacheTooSmallError, "resident at once", "no_grad")  # noqa: B023
        for module, optimizer in ((bag, trained), (twin, trained_twin)):
            local_loss(number, rank, module(*few)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(logical(bag, trained), logical(twin, trained_twin), "good steps with and without refused ones")
    out = bag(*few)
    held = torch.arange(2 * rank + 4, 2 * rank + 8), torch.tensor([0, 4, 4, 4])
    with pytest.raises(CacheTooSmallError):  # beside the graph that waits
        bag(*(overfull(sharding) if rank == 1 else held))
    local_loss(0, rank, out).backward()
    trained.step()
    trained.zero_grad()
    bag._cache.check()
    bag.prefetch(*few)
    with pytest.raises(CacheTooSmallError):
        bag.prefetch(*(overfull(sharding) if rank == 1 else few))
    expected = logical(bag)[0][:3].sum(0)
    assert (bag(*few)[0, 0] - expected).abs().max() < 1e-6, "the output after a refused prefetch"
    bag._cache.check()


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "padding_idx": 0}], ids=["plain", "norm"])
@every_sharding
def test_a_cache_too_small_on_one_rank_raises_on_all(ranks, sharding, options):
    """CacheTooSmallError everywhere; the ranks whose part fits let their rows go again."""
    ranks.run(check_too_small, sharding, options)


def check_gather(rank, world_size, sharding):
    bag, twin = make_collection(sharding, output="gather"), make_collection(sharding, output="gather")
    trained, trained_twin = (optim.Adagrad(module.parameters(), lr=0.05) for module in (bag, twin))
    other_ids = changed(GOOD[0], 0, 5 + rank)
    other_offsets = changed(GOOD[1], 1, 1 + rank)
    other_weights = changed(WEIGHTS, 2, rank)
    more = (torch.tensor([], dtype=torch.int64), torch.zeros(4 * (1 + rank), dtype=torch.int64))
    for number, batch in enumerate([(other_ids, GOOD[1]), (GOOD[0], other_offsets), (*GOOD, other_weights), more]):
        message = r"all pass the same batch, and these differ \(\[\d, \d\] bags\)"
        refuses(bag, trained, lambda: bag(*batch), ValueError, message, f"batch {number}")  # noqa: B023
        if len(batch) == 2:
            refuses(bag, trained, lambda: bag.prefetch(*batch), ValueError, message, f"prefetch {number}")  # noqa: B023
        for module, optimizer in ((bag, trained), (twin, trained_twin)):
            train(module, optimizer, rank, number)
    assert_same_bits(logical(bag, trained), logical(twin, trained_twin), "good steps with and without bad ones between")


@every_sharding
def test_gather_refuses_different_batches(ranks, sharding):
    """Other ids, offsets, weights, or another number of bags, on one of the ranks."""
    ranks.run(check_gather, sharding)


# ---- a block or a gradient that one rank gets wrong ------------------------------------------------------------------


# What a rank may do after it has edited its block, and all must refuse.
AFTER_AN_EDIT = {
    "forward": lambda bag, optimizer: bag(*GOOD),
    "forward without grad": lambda bag, optimizer: without_grad(bag),
    "prefetch": lambda bag, optimizer: bag.prefetch(*GOOD),
    "state_dict": lambda bag, optimizer: bag.state_dict(),
    "state of the optimizer": lambda bag, optimizer: optimizer.state_dict(),
    "init_": lambda bag, optimizer: bag.init_(torch.Tensor.zero_),
}


def check_edited_block(rank, world_size, sharding):
    bag, twin = make_collection(sharding), make_collection(sharding)
    trained, trained_twin = (optim.Adagrad(module.parameters(), lr=0.05) for module in (bag, twin))
    for number, (what, action) in enumerate(AFTER_AN_EDIT.items()):
        for module, optimizer in ((bag, trained), (twin, trained_twin)):
            train(module, optimizer, rank, 2 * number)
            train(module, optimizer, rank, 2 * number + 1)
        for editors in ([1], [0], [0, 1]):
            if rank in editors:
                with torch.no_grad():
                    bag.weight.mul_(1)
            with pytest.raises(RuntimeError, match="the block of a cached table was changed in place"):
                action(bag, trained)
            assert everyone("raised") == ["raised"] * 2, what
    assert bag.stats.evictions > 0, "nothing was evicted"
    assert_same_bits(logical(bag, trained), logical(twin, trained_twin), "good steps with and without edits between")


@every_sharding
def test_an_edited_block_is_refused_on_all(ranks, sharding):
    """bag.weight changed in place, by both ranks or by one: what comes next raises on both, and no rank waits."""
    ranks.run(check_edited_block, sharding)


def check_one_ranks_rows(rank, world_size, sharding):
    bag = make_collection(sharding)
    trained = optim.SGD(bag.parameters(), lr=0.05)
    one_ranks = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 3, 3])  # rank 1 has none of these rows
    train(bag, trained, rank, 0)
    bag(*one_ranks).sum().backward()
    trained.step()
    out = bag(*GOOD)
    with pytest.raises(RuntimeError, match=r"already stepped: call zero_grad\(\)"):
        out.sum().backward()
    trained.zero_grad()
    assert everyone("raised") == ["raised"] * 2
    weights = WEIGHTS.clone().requires_grad_()
    out = bag(*GOOD, weights)
    bag(*one_ranks).sum().backward()
    trained.step()
    trained.zero_grad()
    if sharding == "row":  # it has the rows as they were
        out.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="needs the rows as they were in the forward"):
            out.sum().backward()
    trained.zero_grad()
    assert everyone("raised") == ["raised"] * 2
    train(bag, trained, rank, 1)


@every_sharding
def test_backwards_that_only_one_ranks_rows_forbid(ranks, sharding):
    """A gradient stepped and not cleared, rows updated since: the rank without such rows raises, too."""
    ranks.run(check_one_ranks_rows, sharding)


# ---- constructors ----------------------------------------------------------------------------------------------------


class FullStore:
    """A store without room."""

    def allocate(self, num_rows, layout):
        raise MemoryError("no room for the table")

    read = write = spawn = num_bytes = allocate


ZEROS = [torch.zeros(rows, DIM) for rows in SIZES]


def construct(sharding="column", sizes=SIZES, dim=DIM, **options):
    options = {"mode": "sum", "num_slots": 9, **options}
    return ShardedFreqAwareEmbeddingBagCollection(sizes, dim, sharding=sharding, **options)


# Keywords of rank 0 and of rank 1, what both raise, and what the message says on rank 0.
UNLIKE = {
    "sizes": ({}, {"sizes": [40, 3, 37, 2]}, r"tables is \[40, 3, 37, 1\] on rank 0 and \[40, 3, 37, 2\] on rank 1"),
    "width": ({}, {"dim": 6}, "embedding_dim is 7 on rank 0 and 6 on rank 1"),
    "sharding": ({}, {"sharding": "row"}, "sharding is 'column' on rank 0 and 'row' on rank 1"),
    "table sharding": ({"sharding": "table"}, {}, "sharding is 'table' on rank 0"),
    "plan": ({"sharding": "table", "plan": [0, 1, 1, 1]}, {"sharding": "table", "plan": PLAN}, "plan is"),
    "plan from counts": (
        {"sharding": "table", "ids_freq_mapping": [[1] * 40, [9] * 3, [1] * 37, [0]]},
        {"sharding": "table", "ids_freq_mapping": [[1] * 40, [1] * 3, [9] * 37, [0]]},
        "plan is",
    ),
    "output": ({}, {"output": "gather"}, "output is"),
    "mode": ({}, {"mode": "max"}, "mode is 'sum' on rank 0 and 'max' on rank 1"),
    "max_norm": ({}, {"max_norm": 1.0}, "max_norm is None on rank 0 and 1.0 on rank 1"),
    "norm_type": ({"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": 1}, "norm_type is 2.0 on rank 0 and 1.0 on rank 1"),
    "scale": ({"scale_grad_by_freq": True}, {}, "scale_grad_by_freq is True on rank 0 and False on rank 1"),
    "padding": ({}, {"padding_idx": 0}, "padding_idx is"),
    "dtype": ({}, {"dtype": torch.float64}, "dtype is"),
    "weights": ({"_weight": ZEROS}, {}, "_weight is 'given' on rank 0 and None"),
    "optimizer": ({"optimizer": "adam"}, {"optimizer": "sgd"}, "optimizer is 'adam' on rank 0 and 'sgd' on rank 1"),
    "policy": ({"evict_strategy": "lru"}, {}, "evict_strategy is"),
    "kernels": ({"kernels": "torch"}, {"kernels": "cpu"}, "kernels is"),
    "ratio and slots": ({"num_slots": None, "cache_ratio": 0.5}, {}, "both give the size"),
}


def check_unlike(rank, world_size, names):
    for name in names:
        *keywords, match = UNLIKE[name]
        with pytest.raises(ValueError, match=match):
            construct(**keywords[rank])
        assert everyone("raised") == ["raised"] * 2, name
    construct()(*GOOD)


def test_settings_must_be_the_same(ranks):
    """Each setting that would make the ranks' exchanges or tables differ: named with its values, on all ranks."""
    ranks.run(check_unlike, list(UNLIKE))


# What one rank alone gets wrong: its keywords, its error, and the words.
WRONG = {
    "mode": ({"mode": "median"}, ValueError, "mode='median' is unknown"),
    "sharding": ({"sharding": "diagonal"}, ValueError, "sharding='diagonal' is not allowed: choose .* 'row', 'table'"),
    "output": ({"output": "all"}, ValueError, "output='all' is unknown: choose one of 'share', 'gather'"),
    "plan": ({"plan": PLAN}, ValueError, "plan is given with sharding='column'"),
    "num_slots": ({"num_slots": 0}, ValueError, "num_slots=0 is not allowed"),
    "sizes": ({"sizes": []}, ValueError, "table_sizes is empty"),
    "rows": ({"sizes": [3, 0, 1, 1]}, ValueError, "table 1 has 0 rows"),
    "counts": ({"ids_freq_mapping": [1, 2, 3]}, ValueError, ""),
    "weights": ({"_weight": [torch.zeros(2, 2)]}, ValueError, "_weight has shapes"),
    "no weights": ({"_weight": []}, ValueError, "_weight has shapes"),
    "keyword": ({"colour": "red"}, TypeError, "colour"),
    "store": ({"store": FullStore()}, MemoryError, "no room for the table"),
    "store, weights": ({"store": FullStore(), "_weight": ZEROS}, MemoryError, "no room for the table"),
}


def check_wrong(rank, world_size, wrong_rank):
    for name, (keywords, kind, match) in WRONG.items():
        if rank != wrong_rank:
            kind = RuntimeError if kind is MemoryError else kind
            match = f"rank {wrong_rank}: .*{match}"
        with pytest.raises(kind, match=match):
            construct(**(keywords if rank == wrong_rank else {"_weight": ZEROS} if name == "store, weights" else {}))
        assert everyone("raised") == ["raised"] * 2, name
    construct()(*GOOD)


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_a_constructor_that_fails_on_one_rank_fails_on_all(ranks, wrong_rank):
    """Before or after the ranks have agreed: nobody waits for a rank that has given up."""
    ranks.run(check_wrong, wrong_rank)


def check_wrong_everywhere(rank, world_size):
    with pytest.raises(ValueError, match='2 ranks for 1 columns: .* Use at most 1 ranks, or sharding="row"'):
        construct(dim=1)
    construct("row", dim=1)(*GOOD)
    with pytest.raises(ValueError, match="sharding='table' is not allowed for one table"):
        ShardedFreqAwareEmbeddingBag(10, 4, sharding="table")
    for plan in ([0, 1], [0, 1, 2, 0], [0, 1, -1, 0]):
        with pytest.raises(ValueError, match=r"must name a rank in 0..1 for each of the 4 tables"):
            construct("table", plan=plan)
    # Only rank 1's tables have more rows than the bytes hold: it is refused after the ranks have agreed.
    with pytest.raises(ValueError, match="num_slots=30 rows of 28 bytes pass max_cache_bytes=280, which holds 10"):
        construct("table", sizes=[8, 40], plan=[0, 1], num_slots=30, max_cache_bytes=280)
    group = dist.new_group([0])
    if rank == 0:
        bag = construct(process_group=group)
        assert bag._ranks.size == 1 and bag(*GOOD).shape == (2, 4, DIM)
    else:
        with pytest.raises(ValueError, match="this process, rank 1 of 2, is not in the process group"):
            construct(process_group=group)
    dist.barrier()


def test_what_no_rank_may_build(ranks):
    """More ranks than columns, whole tables for one table, bad plans, bytes too few, a group without this rank."""
    ranks.run(check_wrong_everywhere)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def check_sizes(rank, world_size):
    row = 4 * 4  # bytes of the widest part of a row of 7 columns
    for sharding, row in (("column", 4 * 4), ("row", 7 * 4)):
        cases = {
            "slots": ({"num_slots": 20 - 5 * rank}, 15),
            "slots of one rank": ({"num_slots": 12 if rank else None}, 12),
            "ratio": ({"num_slots": None, "cache_ratio": 0.5 + 0.25 * rank}, 40 if sharding == "column" else 20),
            "bytes": ({"num_slots": None, "max_cache_bytes": row * (9 + rank) + 3}, 9),
            "bytes of one rank": (
                {"num_slots": None, "cache_ratio": 0.2, "max_cache_bytes": row * 6 if rank else None},
                6,
            ),
            "slots and bytes": ({"num_slots": 8 + rank, "max_cache_bytes": row * 10}, 8),
        }
        for what, (options, expected) in cases.items():
            bag = construct(sharding, **options)
            assert bag.num_slots == expected, f"{sharding}, {what}: {bag.num_slots} slots instead of {expected}"
            assert len(set(everyone((bag.num_slots, bag.weight.shape[0])))) == 1, f"{sharding}, {what}: ranks differ"
        # Bound late, the optimizer's state shares the bytes.
        for name, columns in (("Adagrad", 2), ("RowWiseAdagrad", None), ("Adam", 3)):
            record = row + 4 if columns is None else row * columns
            bag = construct(sharding, num_slots=None, max_cache_bytes=row * 30)
            getattr(optim, name)(bag.parameters(), lr=0.1)
            expected = row * 30 // record
            assert bag.num_slots == expected, f"{sharding}, {name}: {bag.num_slots} slots instead of {expected}"
            reserved = construct(
                sharding, num_slots=None, max_cache_bytes=row * 30, optimizer=bag._cached_weight.rule.name
            )
            assert len(set(everyone((bag.num_slots, reserved.num_slots)))) == 1, f"{sharding}, {name}: ranks differ"
            assert bag.num_slots == reserved.num_slots, f"{sharding}, {name}: reserved and bound late differ"
            bag.drop_optimizer_state()
            assert bag.num_slots == 30, f"{sharding}, {name}: {bag.num_slots} slots without the state"
            trained = optim.SGD(bag.parameters(), lr=0.1)
            train(bag, trained, rank, 1)


def test_the_smallest_size_is_used_by_all(ranks):
    """Slots, ratio and bytes, given on one rank or on both, whatever the width of a rank's part; also bound late."""
    ranks.run(check_sizes)


def check_growth(rank, world_size):
    bag = construct(num_slots=3, max_cache_bytes=16 * 20)
    for count in (1, 4, 9, 15):
        batch = torch.arange(count) + 2 * rank, torch.tensor([0, count, count, count])
        if count == 4:
            with pytest.warns(UserWarning, match="it grows to"):
                bag(*batch)
        else:
            bag(*batch)
        slots = everyone(bag.num_slots)
        assert slots[0] == slots[1], f"caches of {slots} slots after {count} ids a rank"
    assert bag.num_slots >= 17, "the cache did not grow"


def test_column_caches_grow_alike(ranks):
    """Ranks that hold the same rows have as many slots, also after growth."""
    ranks.run(check_growth)


# ---- edges -----------------------------------------------------------------------------------------------------------


def check_few_rows(rank, world_size, sharding, sizes):
    torch.manual_seed(0)
    weights = [torch.randn(rows, DIM, dtype=torch.float64) for rows in sizes]
    bag = ShardedFreqAwareEmbeddingBagCollection(
        sizes, DIM, mode="sum", sharding=sharding, _weight=weights, num_slots=15
    )
    exact = nn.EmbeddingBag.from_pretrained(torch.cat(weights), freeze=False, mode="sum", sparse=True)
    ours, torchs = optim.Adam(bag.parameters(), lr=0.05), torch.optim.SparseAdam(exact.parameters(), lr=0.05)
    starts = np.cumsum([0, *sizes]).tolist()
    for step in range(12):
        shares = [make_share(sizes, step, source) for source in range(2)]
        if step % 4 == 3:  # bags without ids; in step 7 no bags at all
            num_bags = 0 if step == 7 else 2
            shares = [s._replace(values=s.values[:0], lengths=torch.zeros(len(sizes), num_bags).long()) for s in shares]
        out = bag(shares[rank].values, shares[rank].offsets)
        local_loss(step, rank, out).backward()
        ours.step()
        ours.zero_grad()
        bag._cache.check()
        ids = torch.cat([s.of_table(t).values + start for s in shares for t, start in enumerate(starts[:-1])])
        lengths = torch.cat([s.lengths.reshape(-1) for s in shares])
        expected = torch.zeros(lengths.numel(), DIM).double()
        if ids.numel():
            expected = exact(ids, lengths.cumsum(0) - lengths)
        expected = expected.split([s.lengths.numel() for s in shares])
        expected = {r: o.view(len(sizes), -1, DIM).transpose(0, 1) for r, o in enumerate(expected)}
        assert_close(out, expected[rank], f"output of step {step}")
        if ids.numel():
            mean_loss(step, expected).backward()
        else:
            exact.weight.grad = torch.sparse_coo_tensor(
                torch.empty(1, 0), torch.empty(0, DIM).double(), exact.weight.shape
            )
        torchs.step()
        torchs.zero_grad()
    assert_close(logical(bag, ours)[0], exact.weight, "the tables")


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1], [3, 1, 2, 9]], ids=str)
@every_sharding
def test_few_rows_and_empty_batches(ranks, sharding, sizes):
    """Fewer rows or tables than ranks; bags without ids, and a step without bags on any rank, which Adam counts."""
    ranks.run(check_few_rows, sharding, sizes)


def check_padding_only(rank, world_size, sharding):
    bag = make_collection(sharding, padding_idx=[0, None, 0, None], mode="mean", max_norm=1.0)
    before = logical(bag)[0]
    trained = optim.Adam(bag.parameters(), lr=0.05)
    out = bag(torch.tensor([0, 0, 0]), torch.tensor([0, 2, 2, 3]))
    assert not out.detach().any(), "bags of padding alone are zero"
    out.sum().backward()
    trained.step()
    assert_same_bits([logical(bag)[0]], [before], "the tables after a step on padding alone")


@every_sharding
def test_padding_alone(ranks, sharding):
    """A batch of nothing but padding gives zeros and trains nothing, under max_norm, too."""
    ranks.run(check_padding_only, sharding)


def test_plan_is_balanced(ranks):
    """A collection without a plan puts tables where the fewest rows and lookups are; the plan is told."""
    ranks.run(check_plan)


def check_plan(rank, world_size):
    bag = construct("table", sizes=[100, 90, 10, 5])
    assert bag._placement.plan == [0, 1, 1, 0], f"plan {bag._placement.plan}"
    counts = [[1] * 100, [1] * 90, [50] * 10, [1] * 5]
    bag = construct("table", sizes=[100, 90, 10, 5], ids_freq_mapping=counts)
    assert bag._placement.plan == [1, 1, 0, 0], f"plan {bag._placement.plan} with the most lookups in table 2"


# ---- a rank that dies ------------------------------------------------------------------------------------------------

TIMEOUT_S = 20


def live_until_killed(rank, world_size, rendezvous, told):
    """Trains; rank 1 is killed in step 3, after its forward. The other puts into `told` what was raised."""
    import torch._dynamo  # as in ranks.py

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timeout
    )
    bag = make_collection("row")
    optimizer = optim.SGD(bag.parameters(), lr=0.05)
    errors = []
    for step in range(5):
        share = make_share(SIZES, step, rank)
        doing = "forward"
        try:
            out = bag(share.values, share.offsets)
            doing = "backward"
            if step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            local_loss(step, rank, out).backward()
            optimizer.step()
        except RuntimeError as error:
            errors.append((step, doing, str(error)))
        optimizer.zero_grad()
    told.put(errors)
    told.close()
    told.join_thread()
    os._exit(0)  # not through destroy_process_group: the group is broken


def test_a_rank_raises_when_another_is_killed():
    """In the backward that misses it, and in the next forward: with a reason, and before the group's timeout."""
    context = torch.multiprocessing.get_context("spawn")
    told = context.Queue()
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([path] if path else [])])
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [(rank, 2, str(Path(folder) / "rendezvous"), told) for rank in range(2)]
            processes = [context.Process(target=live_until_killed, args=of_rank) for of_rank in arguments]
            for process in processes:
                process.start()
            try:
                errors = told.get(timeout=60 + 2 * TIMEOUT_S)
            finally:
                for process in processes:
                    process.join(timeout=10)
                    process.kill()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    assert processes[1].exitcode == -signal.SIGKILL
    assert [where for *where, _ in errors] == [[3, "backward"], [4, "forward"]]
    for *_, message in errors:
        assert "rank 0 of 2 could not exchange with the others that share its cached tables" in message
