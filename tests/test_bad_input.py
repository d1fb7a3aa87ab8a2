"""Bad input gets a clear error, before anything was changed.

    python -m pytest tests/test_bad_input.py

Proves, for both kernel sets: each kind of bad batch, setting and argument raises an error that holds the numbers (which
id, which position, which table, the valid range, what to give instead), and a cache that refused a batch is exactly as
it was: rows, maps, marks, statistics and the policy's order. Planned features say so by name, and an unknown choice
lists the choices that exist.
"""

import os
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from worlds import DIM, NUM_ROWS, assert_same_bits, counts, loss_of, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import (
    CacheTooSmallError,
    FreqAwareEmbeddingBag,
    FreqAwareEmbeddingBagCollection,
    IdFrequency,
)

SLOTS = 30


def snapshot(bag):
    """All that a refused call must leave alone, as bytes: stats, maps, marks, policy, resident records, the table."""
    cache = bag._cache
    cache.check()
    slots = cache.slots
    names = ("slot_of_id", "id_of_slot", "row_of_slot", "marks", "pins")
    per_table = [getattr(bag.stats, f"{name}_per_table") for name in ("hits", "misses", "misses_unique")]
    return {
        "stats": pickle.dumps([bag.stats.as_dict(), per_table]),
        "policy": pickle.dumps(cache.policy.__dict__),
        "sizes": (slots.num_slots, slots.num_used, slots.num_pinned, cache.moves, bag._cached_weight.num_tokens),
        "prefetched": cache._prefetched.tolist(),
        **{name: getattr(slots, name).numpy().tobytes() for name in names},
        "records": cache.records[: slots.num_slots][slots.id_of_slot >= 0].numpy().tobytes(),
        "table": cache.read_ids(0, cache.num_rows).numpy().tobytes(),
    }


def warm_bag(**options):
    """A bag in the middle of training: dirty rows in the cache, others evicted and written back."""
    bag = make_bag(60, ids_freq_mapping=counts(), max_cache_bytes=60 * DIM * 4, **options)
    generator = torch.Generator().manual_seed(1)
    optimizer = make_optimizer("SGD", bag.parameters())
    offsets = torch.arange(8 + bag.include_last_offset) * 3
    for _ in range(6):
        loss_of(bag(skewed_ids(generator).reshape(-1), offsets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bag.stats.evictions > 0 and bag._cache.slots.marked(bag._cache.slots.DIRTY).any()
    return bag


def assert_refused(bag, call, error, *parts):
    """`call` raises `error` (no subclass), the message holds all `parts`, and the bag is exactly as before."""
    before = snapshot(bag)
    with pytest.raises(error) as raised:
        call()
    for part in parts:
        assert str(part) in str(raised.value), f"{part!r} is not in {raised.value}"
    after = snapshot(bag)
    assert [name for name in before if before[name] != after[name]] == []


def ids_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


# name: (input, offsets, per_sample_weights), error, parts of its message
BATCHES = {
    "id past the end": ((ids_of(5, 6, 200, 300), ids_of(0, 1), None), ValueError, ["id 200", "position 2", "0..199"]),
    "id past the end, 2-D": ((ids_of(5, 6, 7, 201).reshape(2, 2),), ValueError, ["id 201", "position 3", "0..199"]),
    "negative id": ((ids_of(5, -1), ids_of(0), None), ValueError, ["id -1", "position 1", "0..199"]),
    "huge id": ((ids_of(2**40), ids_of(0), None), ValueError, [f"id {2**40}", "position 0", "0..199"]),
    "smallest id": ((ids_of(-(2**63)), ids_of(0), None), ValueError, [f"id {-(2**63)}", "position 0"]),
    "offsets not from 0": ((ids_of(1, 2, 3), ids_of(1, 2), None), ValueError, ["offsets[0]", "1", "0"]),
    "negative offset": ((ids_of(1, 2, 3), ids_of(-1, 2), None), ValueError, ["offsets[0]", "-1"]),
    "offsets decrease": ((ids_of(1, 2, 3), ids_of(0, 2, 1), None), ValueError, ["offsets[2]", "1 after 2", "decrease"]),
    "offsets past the end": (
        (ids_of(1, 2, 3), ids_of(0, 4), None),
        ValueError,
        ["offsets[1]", "4", "past the end", "3"],
    ),
    "a middle offset past the end": ((ids_of(1, 2, 3), ids_of(0, 9, 3), None), ValueError, ["offsets[2]", "3 after 9"]),
    "no offsets entries for ids": ((ids_of(1, 2, 3), ids_of(), None), ValueError, ["0 entries", "3 ids"]),
    "no offsets": ((ids_of(1, 2, 3),), ValueError, ["offsets", "1-D"]),
    "offsets with 2-D": ((ids_of(1, 2).reshape(1, 2), ids_of(0)), ValueError, ["offsets", "2-D"]),
    "2-D offsets": ((ids_of(1, 2), ids_of(0).reshape(1, 1)), ValueError, ["offsets", "2 dimensions"]),
    "3-D input": ((ids_of(1, 2).reshape(1, 1, 2),), ValueError, ["input", "3 dimensions"]),
    "0-D input": ((torch.tensor(3), ids_of(0)), ValueError, ["input", "0 dimensions"]),
    "float ids": ((torch.tensor([[1.0, 2.0]]),), TypeError, ["input", "torch.float32", "torch.int64"]),
    "bool ids": ((torch.tensor([[True]]),), TypeError, ["input", "torch.bool"]),
    "small integers": ((torch.tensor([[1]], dtype=torch.uint8),), TypeError, ["input", "torch.uint8", "torch.int32"]),
    "float offsets": ((ids_of(1, 2), torch.tensor([0.0])), TypeError, ["offsets", "torch.float32", "torch.int64"]),
    "a list of ids": (([1, 2],), TypeError, ["input", "list"]),
    "a list of offsets": ((ids_of(1, 2), [0]), TypeError, ["offsets", "list"]),
    "an array": ((np.array([[1, 2]]),), TypeError, ["input", "ndarray"]),
    "weights' shape": ((ids_of(1, 2), ids_of(0), torch.ones(3)), ValueError, ["per_sample_weights", "(3,)", "(2,)"]),
    "weights' type": (
        (ids_of(1, 2), ids_of(0), torch.ones(2, dtype=torch.float64)),
        TypeError,
        ["per_sample_weights", "torch.float64", "torch.float32"],
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batch(name, kernels):
    """Position counts over the flattened input; the first bad id is the one that is named."""
    arguments, error, parts = BATCHES[name]
    bag = warm_bag(kernels=kernels)
    assert_refused(bag, lambda: bag(*arguments), error, *parts)


@pytest.mark.parametrize("policy_name", ["dataset", "lfu", "lru", "s3fifo"])
def test_bad_batch_leaves_every_policy_alone(policy_name, kernels):
    """A bad id at the end of a batch full of hits and misses: no use was counted, no row was chosen."""
    bag = warm_bag(kernels=kernels, evict_strategy=policy_name)
    bad = torch.arange(30)
    bad[-1] = 200
    assert_refused(bag, lambda: bag(bad, ids_of(0)), ValueError, "id 200", "position 29")


@pytest.mark.parametrize("name", ["id past the end", "offsets decrease", "float ids", "a list of ids"])
def test_bad_prefetch(name, kernels):
    """A refused prefetch keeps the rows of the one before it."""
    arguments, error, parts = BATCHES[name]
    bag = warm_bag(kernels=kernels)
    bag.prefetch(ids_of(120, 121, 122))
    assert_refused(bag, lambda: bag.prefetch(*arguments[:2]), error, *parts)


def test_per_sample_weights_for_another_mode(kernels):
    bag = warm_bag(mode="mean", kernels=kernels)
    call = lambda: bag(ids_of(1, 2), ids_of(0), torch.ones(2))  # noqa: E731
    assert_refused(bag, call, NotImplementedError, "per_sample_weights", "'mean'", "'sum'")


def test_last_offset_that_is_not_the_end(kernels):
    """With include_last_offset the last entry is the end: past it and before it are both told with the numbers."""
    bag = warm_bag(include_last_offset=True, kernels=kernels)
    assert_refused(bag, lambda: bag(ids_of(1, 2, 3), ids_of(0, 4)), ValueError, "offsets[1]", "4", "past the end", "3")
    assert_refused(bag, lambda: bag(ids_of(1, 2, 3), ids_of(0, 2)), ValueError, "offsets[1]", "2", "not the end", "3")
    assert_refused(bag, lambda: bag(ids_of(), ids_of()), ValueError, "offsets", "0 entries")


def test_a_bad_id_with_max_norm_changes_no_row(kernels):
    """Rows are renormalised after all ids were checked."""
    bag = warm_bag(max_norm=0.1, kernels=kernels)
    assert_refused(bag, lambda: bag(ids_of(150, 151, 200), ids_of(0)), ValueError, "id 200", "position 2")


# ---- collections -------------------------------------------------------------------------------------------------


def make_collection(**options):
    torch.manual_seed(0)
    return FreqAwareEmbeddingBagCollection([50, 7, 100], DIM, num_slots=20, mode="sum", **options)


COLLECTION_BATCHES = {
    "id of the last table": ((ids_of(1, 2, 100), ids_of(0, 1, 2)), ["id 100", "position 2", "table 2", "0..99"]),
    "id of a small table": ((ids_of(1, 8, 7, 9), ids_of(0, 1, 3)), ["id 8", "position 1", "table 1", "0..6"]),
    "an empty table before": ((ids_of(3, 120), ids_of(0, 1, 1)), ["id 120", "position 1", "table 2", "0..99"]),
    "two bags each": ((ids_of(0, 0, 0, 0, 0, -3), ids_of(0, 1, 2, 3, 4, 5)), ["id -3", "position 5", "table 2"]),
    "first table": ((ids_of(50, 0, 0), ids_of(0, 1, 2)), ["id 50", "position 0", "table 0", "0..49"]),
    "bags that do not divide": ((ids_of(1, 2), ids_of(0, 1)), ["2 bags", "3 tables"]),
    "offsets decrease": ((ids_of(1, 2), ids_of(0, 2, 1)), ["offsets[2]", "1 after 2"]),
    "offsets past the end": ((ids_of(1, 2), ids_of(0, 1, 3)), ["offsets[2]", "3", "2 ids"]),
    "offsets not from 0": ((ids_of(1, 2), ids_of(1, 1, 2)), ["offsets[0]", "1"]),
    "2-D values": ((ids_of(1, 2, 3).reshape(1, 3), ids_of(0, 1, 2)), ["values", "2 dimensions"]),
    "2-D offsets": ((ids_of(1, 2, 3), ids_of(0, 1, 2).reshape(1, 3)), ["offsets", "1-D"]),
}


@pytest.mark.parametrize("name", COLLECTION_BATCHES)
def test_bad_batch_of_a_collection(name, kernels):
    """It names the table and the id's local range; the position counts over all values."""
    arguments, parts = COLLECTION_BATCHES[name]
    collection = make_collection(kernels=kernels)
    collection(ids_of(1, 2, 3), ids_of(0, 1, 2)).sum().backward()
    assert_refused(collection, lambda: collection(*arguments), ValueError, *parts)


def test_the_error_is_all_that_is_said():
    """No warning of torch's about how the message was put together."""
    collection = make_collection()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match="id 120"):
            warnings.simplefilter("error")
            collection(ids_of(0, 0, 0, 0, 120, 0), ids_of(0, 1, 2, 3, 4, 5))
    finally:
        torch.set_warn_always(always)


def test_types_for_a_collection(kernels):
    collection = make_collection(kernels=kernels)
    for arguments, name in (((ids_of(1).float(), ids_of(0, 1, 1)), "float32"), (([1], ids_of(0, 1, 1)), "list")):
        assert_refused(collection, lambda a=arguments: collection(*a), TypeError, name)


# ---- too many rows at once ---------------------------------------------------------------------------------------


def too_small_bag(policy_name, kernels, **options):
    row_bytes = DIM * 4
    bag = make_bag(SLOTS, max_cache_bytes=SLOTS * row_bytes, evict_strategy=policy_name, kernels=kernels, **options)
    return bag, row_bytes


def test_a_batch_larger_than_the_ceiling(policy, kernels):
    """31 rows into 30 slots: the numbers, what to do, nothing changed; training goes on as if resident."""
    results = []
    for small in (True, False):
        if small:
            bag, row_bytes = too_small_bag(policy, kernels)
        else:
            bag = make_bag(NUM_ROWS, kernels=kernels)
        optimizer = make_optimizer("SGD", bag.parameters())
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            ids = skewed_ids(generator)
            if small:
                parts = [
                    "31 rows",
                    str(SLOTS),
                    f"{row_bytes}",
                    f"max_cache_bytes to at least {31 * row_bytes}",
                    "smaller",
                ]
                too_many = torch.arange(100, 131).reshape(1, 31)
                assert_refused(bag, lambda bag=bag, ids=too_many: bag(ids), CacheTooSmallError, *parts)
            loss_of(bag(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not small or bag.stats.evictions > 0
        results.append([bag.logical_weight()])
    assert_same_bits(*results)


def test_rows_of_waiting_graphs_count(kernels):
    """20 rows wait for their backward: 11 more do not fit, 10 do; afterwards all of it trains as it would resident."""
    bag, _ = too_small_bag("lru", kernels)
    waiting = bag(torch.arange(20).reshape(1, 20))
    call = lambda: bag(torch.arange(50, 61).reshape(1, 11))  # noqa: E731
    assert_refused(bag, call, CacheTooSmallError, "31 rows", "11 to fetch", "20 in use", "backward", str(SLOTS))
    out = bag(torch.arange(50, 60).reshape(1, 10))
    before = bag.logical_weight()
    (waiting.sum() + out.sum()).backward()
    optimizer = make_optimizer("SGD", bag.parameters(), lr=1.0)
    optimizer.step()
    optimizer.zero_grad()
    moved = (bag.logical_weight() - before).ne(0).all(1).nonzero()[:, 0].tolist()
    assert moved == [*range(20), *range(50, 60)]
    bag(torch.arange(100, 130).reshape(1, 30))
    bag._cache.check()


def test_a_prefetch_larger_than_the_ceiling_changes_nothing(kernels):
    """Also not the rows that an earlier prefetch holds: they were promised to stay."""
    bag, _ = too_small_bag("lru", kernels)
    bag.prefetch(torch.arange(40, 50))
    assert_refused(bag, lambda: bag.prefetch(torch.arange(31)), CacheTooSmallError, "31 rows", str(SLOTS))


def test_a_padding_row_that_does_not_fit_changes_no_value(kernels):
    """max_norm renormalises the padding row as well; where it finds no slot, no row has been renormalised yet."""
    bag = FreqAwareEmbeddingBag(
        40, 2, max_norm=0.1, padding_idx=0, num_slots=3, max_cache_bytes=3 * 2 * 4, kernels=kernels
    )
    before = bag.logical_weight()
    with pytest.raises(CacheTooSmallError):
        bag(torch.tensor([[1, 2, 3, 0]]))
    assert torch.equal(bag.logical_weight(), before) and bag._cache.slots.num_pinned == 0
    bag._cache.check()


def test_too_small_is_a_value_error():
    assert issubclass(CacheTooSmallError, ValueError)


@pytest.mark.parametrize("what", ["max_cache_bytes", "cache_ratio", "num_slots"])
@pytest.mark.parametrize("num_rows", [NUM_ROWS, 800_000])
@pytest.mark.parametrize("limit", [None, 30], ids=["no limit", "limit"])
def test_the_advice_works(what, num_rows, limit):
    """A bag built as the message says takes the batch: with each setting it names, in a large table too."""
    options = {"num_slots": 5 if limit is None else 30, "max_cache_bytes": None if limit is None else 30 * 4}
    batch = torch.arange(37).reshape(1, 37)
    with pytest.raises(CacheTooSmallError) as raised:
        FreqAwareEmbeddingBag(num_rows, 1, **options)(batch)
    found = re.search(rf"{what} to (?:at least )?([0-9.e-]*[0-9])", str(raised.value))
    if found is None:
        assert what != "max_cache_bytes", "the one setting that always helps"
        return  # a setting that would not help alone need not be named
    value = float(found[1]) if what == "cache_ratio" else int(found[1])
    if what == "cache_ratio":
        options["num_slots"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say so when it grows
        FreqAwareEmbeddingBag(num_rows, 1, **{**options, what: value})(batch)


# ---- settings ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "ratio 0": ({"cache_ratio": 0}, ["cache_ratio=0", "(0, 1]"]),
    "ratio negative": ({"cache_ratio": -0.5}, ["cache_ratio=-0.5", "(0, 1]"]),
    "ratio above 1": ({"cache_ratio": 1.5}, ["cache_ratio=1.5", "(0, 1]"]),
    "ratio nan": ({"cache_ratio": float("nan")}, ["cache_ratio=nan", "(0, 1]"]),
    "ratio text": ({"cache_ratio": "0.5"}, ["cache_ratio='0.5'", "(0, 1]"]),
    "both sizes": ({"cache_ratio": 0.5, "num_slots": 10}, ["cache_ratio=0.5", "num_slots=10"]),
    "no slots": ({"num_slots": 0}, ["num_slots=0", "at least 1"]),
    "half a slot": ({"num_slots": 1.5}, ["num_slots=1.5", "int"]),
    "no bytes": ({"max_cache_bytes": 0}, ["max_cache_bytes=0"]),
    "less than a row": ({"max_cache_bytes": DIM * 4 - 1}, [f"max_cache_bytes={DIM * 4 - 1}", f"{DIM * 4} bytes"]),
    "warmup above 1": ({"warmup_ratio": 1.1}, ["warmup_ratio=1.1", "[0, 1]"]),
    "unknown policy": ({"evict_strategy": "mru"}, ["'mru'", '"dataset"', '"lfu"', '"lru"', '"s3fifo"', '"lookahead"']),
    "policy of no name": ({"evict_strategy": 3}, ["3", '"dataset"']),
    "unknown store": ({"store": "disk"}, ["store='disk'", '"ram"']),
    "a store that is none": ({"store": object()}, ["store=", '"ram"', "RowStore"]),
    "unknown kernels": ({"kernels": "mkl"}, ["kernels='mkl'", '"auto"', "'cpu'", "'torch'"]),
    "unknown optimizer": (
        {"optimizer": "lamb"},
        ["optimizer='lamb'", "'sgd'", "'adagrad'", "'rowwise_adagrad'", "'adam'"],
    ),
    "unknown mode": ({"mode": "min"}, ["mode='min'", "'sum'", "'mean'", "'max'"]),
    "padding past the end": ({"padding_idx": 200}, ["padding_idx=200", "-200..199"]),
    "padding before the start": ({"padding_idx": -201}, ["padding_idx=-201", "-200..199"]),
    "max_norm negative": ({"max_norm": -1.0}, ["max_norm=-1.0"]),
    "whole numbers": ({"dtype": torch.int32}, ["torch.int32", "torch.float32", "float64", "bfloat16", "float16"]),
    "rounding_seed negative": ({"rounding_seed": -1}, ["rounding_seed=-1", "at least 0"]),
    "weight's shape": ({"_weight": torch.zeros(3, DIM)}, [f"(3, {DIM})", f"({NUM_ROWS}, {DIM})"]),
    "few counts": ({"ids_freq_mapping": [1] * 199}, ["199", "200"]),
    "many counts": ({"ids_freq_mapping": np.ones(201)}, ["201", "200"]),
    "few counts, IdFrequency": ({"ids_freq_mapping": IdFrequency([1, 2])}, ["2 counts", "200"]),
    "negative count": ({"ids_freq_mapping": [1] * 150 + [-3] + [1] * 49}, ["-3", "150"]),
    "nan count": ({"ids_freq_mapping": [1.0] * 150 + [float("nan")] + [1.0] * 49}, ["nan", "150"]),
    "infinite count": ({"ids_freq_mapping": [1.0] * 150 + [float("inf")] + [1.0] * 49}, ["inf", "150"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_setting(name):
    """An error names the argument, its value and what is allowed."""
    options, parts = SETTINGS[name]
    with pytest.raises(ValueError) as raised:
        FreqAwareEmbeddingBag(NUM_ROWS, DIM, **options)
    for part in parts:
        assert part in str(raised.value), f"{part!r} is not in {raised.value}"


def test_choices_that_are_listed_exist_and_planned_ones_are_not_listed_as_choices():
    """Every quoted name after "choose" is accepted; "mmap:" is not offered."""
    for field, bad in (("evict_strategy", "?"), ("store", "?"), ("kernels", "?"), ("optimizer", "?")):
        with pytest.raises(ValueError) as raised:
            FreqAwareEmbeddingBag(NUM_ROWS, DIM, **{field: bad})
        offered = str(raised.value).split("choose")[1].split("(")[0].split(", or pass")[0]
        names = [name for pair in re.findall(r'"(\w+)"|\'(\w+)\'', offered) for name in pair if name]
        assert names, str(raised.value)
        for name in names:
            FreqAwareEmbeddingBag(NUM_ROWS, DIM, **{field: name})


@pytest.mark.parametrize("sizes", [(0, 4), (-1, 4), (4, 0), (4, -2), (2.5, 4), (4, "8")])
def test_bad_table_size(sizes):
    with pytest.raises(ValueError, match=re.escape(repr(next(s for s in sizes if s != 4)))):
        FreqAwareEmbeddingBag(*sizes)


BAD_COLLECTIONS = {
    "no tables": (([],), {}, ["table_sizes", "empty"]),
    "an empty table": (([5, 0],), {}, ["table 1", "0 rows"]),
    "paddings": (([5, 6],), {"padding_idx": [1]}, ["1 entries", "2 tables"]),
    "padding range": (([5, 6],), {"padding_idx": 5}, ["padding_idx[0]=5", "-5..4"]),
    "weights": (([5, 6],), {"_weight": [torch.zeros(5, 2), torch.zeros(5, 2)]}, ["[(5, 2), (5, 2)]", "[5, 6]"]),
    "counts of a table": (([5, 6],), {"ids_freq_mapping": [[1] * 5, [1] * 5]}, ["table 1", "5", "6"]),
    "too few vectors": (([5, 6],), {"ids_freq_mapping": [np.ones(5)]}, ["1 vectors", "2"]),
    "nan in a table": (([1, 2],), {"ids_freq_mapping": [[1.0], [1.0, float("nan")]]}, ["table 1", "nan", "index 1"]),
    "concatenated": (([5, 6],), {"ids_freq_mapping": np.ones(10)}, ["10", "11"]),
}


@pytest.mark.parametrize("name", BAD_COLLECTIONS)
def test_bad_collection(name):
    arguments, options, parts = BAD_COLLECTIONS[name]
    with pytest.raises(ValueError) as raised:
        FreqAwareEmbeddingBagCollection(*arguments, 2, **options)
    for part in parts:
        assert part in str(raised.value), f"{part!r} is not in {raised.value}"


def test_from_pretrained_wants_a_matrix():
    with pytest.raises(ValueError, match="1 dimensions"):
        FreqAwareEmbeddingBag.from_pretrained(torch.zeros(3))


def test_damaged_frequency_file(tmp_path):
    """It names the file; a missing one too."""
    path = tmp_path / "counts.npz"
    with pytest.raises(FileNotFoundError, match=r"counts\.npz"):
        IdFrequency.load(path)
    IdFrequency(np.arange(1000)).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"counts\.npz"):
        IdFrequency.load(path)


# ---- planned -----------------------------------------------------------------------------------------------------

PLANNED = {
    "a file on disk": ({"store": "mmap:/nowhere/table"}, "mmap:.*planned"),
}


def test_devices_that_are_none_here():
    """No CUDA device, kernels for one on a CPU, a device that nobody trains on: said before anything is allocated."""
    with pytest.raises(NotImplementedError, match="meta.*'cpu'"):
        FreqAwareEmbeddingBag(10, 2, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device='cuda'.*no CUDA device"):
            FreqAwareEmbeddingBag(10, 2, device="cuda")
        if os.environ.get("TRITON_INTERPRET") != "1":
            with pytest.raises(RuntimeError, match="kernels='cuda' on cpu.*[Tt]riton"):
                FreqAwareEmbeddingBag(10, 2, kernels="cuda")


@pytest.mark.parametrize("name", PLANNED)
def test_planned_features_say_so(name):
    options, message = PLANNED[name]
    with pytest.raises(NotImplementedError, match=message):
        FreqAwareEmbeddingBag(10, 2, **options)
    with pytest.raises(NotImplementedError, match=message):
        FreqAwareEmbeddingBagCollection([10], 2, **options)


def test_moves_and_casts_that_are_planned_or_impossible_leave_the_bag_alone():
    bag = warm_bag()
    assert_refused(bag, bag.double, TypeError, "torch.float64", "dtype=")
    assert_refused(bag, bag.half, TypeError, "torch.float16")
    assert_refused(bag, lambda: bag.to("meta"), NotImplementedError, "meta", "device=")
    assert_refused(bag, lambda: pickle.dumps(bag), TypeError, "state_dict")
    assert bag.to("cpu") is bag and bag.float() is bag
