"""FreqAwareEmbeddingBagCollection: T tables behind one cache are T tables of torch.nn.EmbeddingBag.

    python -m pytest tests/test_collection.py

Proves: outputs and trained tables err at most 4 times as much as T nn.EmbeddingBag in float32 + 1e-7 (both against
float64), with evictions, for every mode, padding per table, both forms of offsets, empty batches and tables without
ids; state_dict is that of an nn.ModuleList; initial values are those of T nn.EmbeddingBag one after another; one cache
and one byte budget serve all tables, and the statistics are kept per table.
"""

import numpy as np
import pytest
import torch
from torch import nn
from worlds import assert_same_bits, chunks_of, loss_of, make_optimizer

from colossal_freqcache import FreqAwareEmbeddingBagCollection, IdFrequency

SIZES = [60, 7, 100]
DIM = 5
BAGS = 6
SLOTS = 40
STEPS = 8
LR = 0.05


def make_collection(seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("mode", "sum")
    options.setdefault("num_slots", SLOTS)
    return FreqAwareEmbeddingBagCollection(SIZES, DIM, **options)


def table_counts():
    generator = np.random.default_rng(5)
    return [generator.permutation(rows) + 1 for rows in SIZES]


def batch(generator, num_bags=BAGS, without=None):
    """(values, offsets (T*B,)) with empty bags; table `without` gets no id at all."""
    lengths = torch.randint(0, 4, (len(SIZES), num_bags), generator=generator)
    if without is not None:
        lengths[without] = 0
    values = [
        (torch.rand(int(lengths[table].sum()), generator=generator) ** 2 * rows).long()
        for table, rows in enumerate(SIZES)
    ]
    lengths = lengths.reshape(-1)
    return torch.cat(values), lengths.cumsum(0) - lengths


class Tables(nn.Module):
    """T nn.EmbeddingBag, called with the collection's input: what the collection has to equal."""

    def __init__(self, weights, padding_idx=None, **options):
        super().__init__()
        padding_idx = [padding_idx] * len(SIZES) if padding_idx is None or isinstance(padding_idx, int) else padding_idx
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(*weight.shape, _weight=weight, padding_idx=padding, **options)
            for weight, padding in zip(weights, padding_idx, strict=True)
        )

    def forward(self, values, offsets, per_sample_weights=None):
        num_bags = offsets.numel() // len(SIZES)
        ends = torch.cat([offsets, torch.tensor([values.numel()])])
        outs = []
        for number, table in enumerate(self.tables):
            first = int(ends[number * num_bags])
            stop = int(ends[(number + 1) * num_bags])
            starts = offsets[number * num_bags : (number + 1) * num_bags] - first
            weights = None if per_sample_weights is None else per_sample_weights[first:stop]
            outs.append(table(values[first:stop], starts, weights))
        return torch.stack(outs, 1)


def train(module, batches, weights=None):
    """[outputs, weights' gradients, ..., tables] of SGD over the batches."""
    ours = isinstance(module, FreqAwareEmbeddingBagCollection)
    optimizer = (make_optimizer if ours else lambda _, p, lr: torch.optim.SGD(p, lr=lr))(
        "SGD", module.parameters(), lr=LR
    )
    dtype = next(module.parameters()).dtype
    results = []
    for number, (values, offsets) in enumerate(batches):
        per_sample = None if weights is None else weights[number].clone().to(dtype).requires_grad_()
        out = module(values, offsets, per_sample)
        results.append(out.detach().clone())
        optimizer.zero_grad()
        loss_of(out).backward()
        optimizer.step()
        if per_sample is not None:
            results.append(per_sample.grad)
        if ours:
            module._cache.check()
    optimizer.zero_grad()
    tables = [module.logical_weight(t) for t in range(len(SIZES))] if ours else [t.weight for t in module.tables]
    return results + tables


def compare(options, kernels, batches=None, weighted=False, **cache_options):
    """Trains ours, torch in float32 and in float64 on the same batches."""
    generator = torch.Generator().manual_seed(1)
    batches = batches or [batch(generator) for _ in range(STEPS)]
    weights = [torch.rand(values.shape, generator=generator) + 0.5 for values, _ in batches] if weighted else None
    tables = [torch.randn(rows, DIM, generator=generator) for rows in SIZES]
    ours = make_collection(_weight=tables, kernels=kernels, **options, **cache_options)
    torch32 = Tables([table.clone() for table in tables], **options)
    exact = Tables([table.double() for table in tables], **options)
    results = [train(module, batches, weights) for module in (ours, torch32, exact)]
    for number, (a, b, c) in enumerate(zip(*results, strict=True)):
        assert a.shape == b.shape
        if a.numel():
            error, torch_error = ((x.detach().double() - c.detach()).abs().max() for x in (a, b))
            assert error <= 4 * torch_error + 1e-7, f"result {number}: error {error}, torch's own {torch_error}"
    assert ours.stats.evictions > 0 and ours.stats.rows_written_back > 0 and ours.num_slots == SLOTS
    assert not torch.equal(results[0][-1], tables[-1]), "nothing was trained"
    return ours


PADDINGS = {"none": None, "one id": 3, "per table": [3, None, -1]}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_equals_as_many_tables_of_torch(mode, padding, kernels, policy):
    """With the rows of all tables reordered by counts; padding ids are local to their table."""
    options = {"mode": mode, "padding_idx": PADDINGS[padding]}
    compare(options, kernels, evict_strategy=policy, ids_freq_mapping=table_counts())


def test_max_norm_in_every_table(kernels):
    compare({"mode": "mean", "max_norm": 1.0, "padding_idx": [3, None, 0]}, kernels, ids_freq_mapping=table_counts())


def test_per_sample_weights_with_gradient(kernels):
    compare({"mode": "sum", "padding_idx": [None, 2, 0]}, kernels, weighted=True)


def test_scale_grad_by_freq_counts_within_a_table(kernels):
    """Id 1 twice in table 0 and once in table 2 is two rows: their gradients are divided by 2 and 1."""
    collection = make_collection(scale_grad_by_freq=True, kernels=kernels)
    before = [collection.logical_weight(table) for table in range(3)]
    collection(torch.tensor([1, 1, 1]), torch.tensor([0, 2, 2])).sum().backward()
    optimizer = make_optimizer("SGD", collection.parameters(), lr=1.0)
    optimizer.step()
    optimizer.zero_grad()
    for table in (0, 2):
        moved = before[table] - collection.logical_weight(table)
        torch.testing.assert_close(moved[1], torch.ones(DIM))
        assert moved.count_nonzero() == DIM


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_table_without_ids_in_a_batch(without, kernels):
    """In front, in the middle and at the end; every other batch."""
    generator = torch.Generator().manual_seed(1)
    batches = [batch(generator, without=without if step % 2 else None) for step in range(STEPS)]
    compare({"mode": "mean"}, kernels, batches)


def test_batches_of_different_sizes_and_empty_ones(kernels):
    """B = 6, 1, 0, 6: the empty batch gives (0, T, D) and an empty gradient."""
    generator = torch.Generator().manual_seed(1)
    batches = [batch(generator, num_bags) for num_bags in (6, 1, 6, 6, 6)]
    compare({"mode": "sum"}, kernels, batches)
    collection = make_collection(kernels=kernels)
    nothing = torch.empty(0, dtype=torch.int64)
    out = collection(nothing, nothing)
    assert out.shape == (0, len(SIZES), DIM)
    out.sum().backward()
    assert collection.weight.grad._nnz() == 0
    assert make_collection(include_last_offset=True, kernels=kernels)(nothing, torch.tensor([0])).shape == (0, 3, DIM)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_offsets_with_and_without_the_last(mode, kernels):
    """The form of a KeyedJaggedTensor: one more offset, the end; int32 too."""
    plain, with_end = (make_collection(include_last_offset=last, mode=mode, kernels=kernels) for last in (False, True))
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        values, offsets = batch(generator)
        ends = torch.cat([offsets, torch.tensor([values.numel()])])
        with torch.no_grad():
            out = plain(values, offsets)
            assert torch.equal(out, with_end(values, ends))
            assert torch.equal(out, with_end(values.int(), ends.int()))
    assert plain.stats.evictions > 0


def test_one_table_is_a_bag(kernels):
    """T = 1 gives the bits of FreqAwareEmbeddingBag."""
    torch.manual_seed(0)
    collection = FreqAwareEmbeddingBagCollection([50], DIM, num_slots=20, mode="sum", kernels=kernels)
    torch.manual_seed(0)
    expected = nn.EmbeddingBag(50, DIM)
    assert torch.equal(collection.logical_weight(0), expected.weight.detach())
    out = collection(torch.tensor([4, 4, 9]), torch.tensor([0, 2]))
    assert torch.equal(out[:, 0], torch.stack([expected.weight[4] * 2, expected.weight[9]]).detach())


# ---- state and initial values ------------------------------------------------------------------------------------


def test_state_dict_is_that_of_a_module_list(kernels):
    """Keys tables.{i}.weight; strictly into T nn.EmbeddingBag and back, after training; under a prefix too."""
    collection = make_collection(ids_freq_mapping=table_counts(), kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    train(collection, [batch(generator) for _ in range(STEPS)])
    assert collection.stats.rows_written_back > 0
    state = collection.state_dict()
    assert list(state) == [f"tables.{table}.weight" for table in range(3)]
    theirs = Tables([torch.zeros(rows, DIM) for rows in SIZES], mode="sum")
    theirs.load_state_dict(state, strict=True)
    values, offsets = batch(generator)
    torch.testing.assert_close(collection(values, offsets), theirs(values, offsets))
    again = make_collection(seed=9, kernels=kernels)
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_bits(*([c.logical_weight(table) for table in range(3)] for c in (collection, again)))
    model = nn.ModuleDict({"sparse": collection})
    assert sorted(model.state_dict()) == [f"sparse.tables.{table}.weight" for table in range(3)]
    assert [name for name, _ in model.named_parameters()] == ["sparse.weight"]
    model.load_state_dict(model.state_dict(), strict=True)


def test_loading_reports_missing_unexpected_and_wrong_tables():
    """And a table of the wrong shape changes no table of the collection."""
    collection = make_collection()
    state = collection.state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*tables\.1\.weight"):
        collection.load_state_dict({key: state[key] for key in state if "1" not in key})
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*tables\.3\.weight"):
        collection.load_state_dict({**state, "tables.3.weight": torch.zeros(2, DIM)})
    bad = {key: value + 1 for key, value in state.items()}
    bad["tables.1.weight"] = torch.zeros(8, DIM)
    with pytest.raises(RuntimeError, match=r"tables\.1\.weight.*\(8, 5\).*\(7, 5\)"):
        collection.load_state_dict(bad)
    assert_same_bits(list(state.values()), list(collection.state_dict().values()))


@pytest.mark.parametrize("padding", PADDINGS)
@chunks_of(1)
def test_the_seed_draws_the_tables_one_after_another(padding):
    """As T nn.EmbeddingBag built in order do; also where a table takes several pieces of 16 rows."""
    paddings = PADDINGS[padding] if isinstance(PADDINGS[padding], list) else [PADDINGS[padding]] * 3
    torch.manual_seed(4)
    expected = [nn.EmbeddingBag(rows, DIM, padding_idx=p).weight for rows, p in zip(SIZES, paddings, strict=True)]
    for given in (None, table_counts()):
        collection = make_collection(seed=4, padding_idx=PADDINGS[padding], ids_freq_mapping=given)
        for table, weight in enumerate(expected):
            assert torch.equal(collection.logical_weight(table), weight.detach())


def test_init_is_called_table_after_table():
    """So DLRM's uniform(-1/sqrt(rows), 1/sqrt(rows)) can be drawn by the table's size, as for single tables."""
    collection = make_collection(ids_freq_mapping=table_counts())
    shapes = []

    def fill(values):
        shapes.append(tuple(values.shape))
        bound = values.shape[0] ** -0.5
        nn.init.uniform_(values, -bound, bound)

    torch.manual_seed(6)
    collection.init_(fill)
    assert shapes == [(rows, DIM) for rows in SIZES]
    torch.manual_seed(6)
    for table, rows in enumerate(SIZES):
        expected = torch.empty(rows, DIM).uniform_(-(rows**-0.5), rows**-0.5)
        assert torch.equal(collection.logical_weight(table), expected)


def test_counts_per_table_or_concatenated_or_as_id_frequencies():
    """All forms give the same order of rows: that of the counts over all tables, ties by table and id."""
    counts = table_counts()
    forms = [
        counts,
        tuple(torch.from_numpy(part) for part in counts),
        [part.tolist() for part in counts],
        [IdFrequency(part) for part in counts],
        np.concatenate(counts),
        torch.from_numpy(np.concatenate(counts)),
        np.concatenate(counts).tolist(),
        IdFrequency(np.concatenate(counts)),
    ]
    expected = np.argsort(-np.concatenate(counts), kind="stable")
    for form in forms:
        collection = make_collection(ids_freq_mapping=form)
        assert np.array_equal(collection._cache.order.id_of_row, expected)
        assert collection._cache.policy.name == "dataset"


# ---- one cache for all -------------------------------------------------------------------------------------------


def resident_per_table(collection):
    starts = collection._cache.table_starts.numpy()
    ids = collection._cache.slots.id_of_slot.numpy()
    tables = np.searchsorted(starts, ids[ids >= 0], side="right") - 1
    return np.bincount(tables, minlength=len(SIZES)).tolist()


def test_the_table_with_frequent_ids_takes_the_slots():
    """One cache: with counts the hottest ids of all tables are resident from the start, whoever they belong to."""
    cold, hot = np.ones(SIZES[0], np.int64), np.full(SIZES[2], 100)
    collection = make_collection(ids_freq_mapping=[cold, np.full(SIZES[1], 1000), hot])
    assert resident_per_table(collection) == [0, SIZES[1], SLOTS - SIZES[1]]


def test_the_table_in_use_takes_the_slots(policy):
    """Without counts too: a table that asks for more rows gets more slots, none has a share of its own."""
    collection = make_collection(evict_strategy=policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(30):
            values = torch.cat(
                [torch.tensor([1]), torch.tensor([2]), torch.randint(0, 100, (20,), generator=generator)]
            )
            collection(values, torch.tensor([0, 1, 2]))
    assert collection.stats.evictions > 0
    taken = resident_per_table(collection)
    assert sum(taken) == SLOTS and taken[2] >= SLOTS - 2


def test_one_byte_budget_for_all_tables():
    """max_cache_bytes is the initial size and the ceiling of the cache, not of each table."""
    collection = make_collection(num_slots=None, max_cache_bytes=30 * DIM * 4)
    assert collection.num_slots == collection.weight.shape[0] == 30
    bytes_of = collection.device_bytes()
    assert bytes_of["cache"] == 30 * DIM * 4 and bytes_of["reserved"] == 0
    assert make_collection(num_slots=None, cache_ratio=0.1).num_slots == int(0.1 * sum(SIZES))


def test_statistics_per_table():
    """Hits, misses and unique misses are those of the table; the totals are their sums."""
    collection = make_collection()
    offsets = torch.tensor([0, 3, 3])  # 3 ids, none, 2 ids
    with torch.no_grad():
        collection(torch.tensor([5, 5, 6, 0, 0]), offsets)
        collection(torch.tensor([5, 7, 7, 0, 1]), offsets)
    stats = collection.stats
    assert stats.misses_per_table.tolist() == [3 + 2, 0, 2 + 1]
    assert stats.misses_unique_per_table.tolist() == [2 + 1, 0, 1 + 1]
    assert stats.hits_per_table.tolist() == [1, 0, 1]
    assert (stats.hits, stats.misses, stats.misses_unique) == (2, 8, 5)


def test_prefetch_for_a_collection(kernels):
    collection = make_collection(kernels=kernels)
    values, offsets = batch(torch.Generator().manual_seed(1))
    collection.prefetch(values, offsets)
    fetched = collection.stats.rows_fetched
    collection(values, offsets)
    assert collection.stats.rows_fetched == fetched > 0
    assert collection.stats.misses == values.numel() and collection.stats.hits == 0
    collection._cache.check()


def test_repr_names_the_sizes():
    text = repr(make_collection())
    for part in ("FreqAwareEmbeddingBagCollection", "3 tables", str(sum(SIZES)), str(SLOTS)):
        assert part in text
