"""FreqAwareEmbeddingBag against torch.nn.EmbeddingBag, argument by argument, with rows leaving the cache in between.

    python -m pytest tests/test_embedding_bag_parity.py

Proves: outputs, gradients of per_sample_weights and trained tables err at most 4 times as much as torch's own float32
run + 1e-7, both measured against torch in float64; the initial table is the one that torch draws from the same seed;
state_dict is that of nn.EmbeddingBag; both kernel sets.
"""

import numpy as np
import pytest
import torch
from torch import nn
from worlds import (
    DIM,
    FEW_SLOTS,
    NUM_ROWS,
    assert_same_bits,
    chunks_of,
    counts,
    loss_of,
    make_bag,
    make_optimizer,
    skewed_ids,
)

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection

PADDING = 3
STEPS = 6
LR = 0.05


def assert_as_right_as_torch(ours, torch32, exact, what=""):
    """max |ours - exact| <= 4 max |torch32 - exact| + 1e-7."""
    assert ours.shape == torch32.shape == exact.shape, f"{what}: {ours.shape}, torch {torch32.shape}"
    if exact.numel():
        error, torch_error = ((x.detach().double() - exact.detach()).abs().max().item() for x in (ours, torch32))
        assert error <= 4 * torch_error + 1e-7, f"{what}: error {error:.3g}, torch's own {torch_error:.3g}"


def two_dim(generator):
    """8 bags of 3 ids, the padding id among them."""
    ids = skewed_ids(generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, PADDING, ids), None


def ragged(generator):
    """Nine bags over 16 ids: empty ones in front, in the middle (two in a row) and at the end; one is all padding."""
    lengths = torch.tensor([0, 3, 0, 0, 5, 1, 4, 3, 0])
    ids = two_dim(generator)[0].reshape(-1)[: int(lengths.sum())]
    ids[-3:] = PADDING
    return ids, lengths.cumsum(0) - lengths


def ragged_with_end(generator):
    """`ragged` with the end of the last bag as one more offset."""
    ids, offsets = ragged(generator)
    return ids, torch.cat([offsets, torch.tensor([ids.numel()])])


class ByDefinition(nn.Module):
    """scale_grad_by_freq as documented, on nn.Embedding: nn.EmbeddingBag itself divides by the count of another id.

    https://github.com/pytorch/pytorch/issues/190063 (torch 2.5.1 and 2.13.0, dense gradients on a CPU).
    """

    def __init__(self, table, mode="mean", padding_idx=None, **options):
        super().__init__()
        self.mode, self.padding_idx = mode, padding_idx
        self.rows = nn.Embedding(*table.shape, padding_idx=padding_idx, _weight=table, **options)
        self.weight = self.rows.weight

    def forward(self, ids, offsets, per_sample_weights):
        if offsets is None:
            offsets = torch.arange(ids.shape[0]) * ids.shape[1]
            ids = ids.reshape(-1)
        bag = torch.searchsorted(offsets, torch.arange(ids.numel()), right=True) - 1
        rows = self.rows(ids)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.reshape(-1, 1)
        kept = ids != (-1 if self.padding_idx is None else self.padding_idx)
        out = rows.new_zeros(offsets.numel(), rows.shape[1]).index_add(0, bag[kept], rows[kept])
        if self.mode == "mean":
            out = out / torch.bincount(bag[kept], minlength=offsets.numel()).clamp(min=1).unsqueeze(1)
        return out


def reference(table, options):
    if options.get("scale_grad_by_freq"):
        return ByDefinition(table, **options)
    return nn.EmbeddingBag(*table.shape, _weight=table, sparse=options.get("mode") != "max", **options)


def train(bag, batches, weights=None):
    """[outputs, gradients of the weights, ..., final table] of SGD over the batches, in the bag's dtype."""
    if isinstance(bag, FreqAwareEmbeddingBag):
        optimizer = make_optimizer("SGD", bag.parameters(), lr=LR)
        table = None
    else:
        optimizer = torch.optim.SGD(bag.parameters(), lr=LR)
        table = bag.weight
    results = []
    for number, (ids, offsets) in enumerate(batches):
        per_sample = None
        if weights is not None:
            dtype = bag.weight.dtype
            per_sample = weights[number].to(dtype).clone().requires_grad_()
        out = bag(ids, offsets, per_sample)
        results.append(out.detach().clone())
        optimizer.zero_grad()
        loss_of(out).backward()
        optimizer.step()
        if per_sample is not None:
            results.append(per_sample.grad)
        if table is None:
            bag._cache.check()
    optimizer.zero_grad()
    results.append(table.detach().clone() if table is not None else bag.logical_weight())
    return results


def compare(options, form, kernels, weighted=False, num_slots=FEW_SLOTS, **cache_options):
    """Trains ours, torch in float32 and in float64 on the same batches; evictions and trained rows must happen."""
    generator = torch.Generator().manual_seed(1)
    batches = [form(generator) for _ in range(STEPS)]
    weights = [torch.rand(ids.shape, generator=generator) + 0.5 for ids, _ in batches] if weighted else None
    table = torch.randn(NUM_ROWS, DIM, generator=generator)
    ours = make_bag(num_slots, _weight=table, kernels=kernels, **options, **cache_options)
    torch32, exact = reference(table.clone(), options), reference(table.double(), options)
    results = [train(bag, batches, weights) for bag in (ours, torch32, exact)]
    for number, triple in enumerate(zip(*results, strict=True)):
        assert_as_right_as_torch(*triple, f"result {number}")
    assert not torch.equal(results[0][-1], table), "nothing was trained"
    assert ours.stats.evictions > 0 and ours.stats.rows_written_back > 0
    assert ours.num_slots == num_slots, "a cache that grew evicts less than the test believes"
    return ours


MODES = ("sum", "mean", "max")
NORMS = (2.0, 1.0, float("inf"), 3.0)
ARGUMENTS = {
    **{mode: {"mode": mode} for mode in MODES},
    **{f"padding-{mode}": {"mode": mode, "padding_idx": PADDING} for mode in MODES},
    **{f"norm{p}": {"mode": "sum", "max_norm": 1.5, "norm_type": p} for p in NORMS},
    **{f"norm-padding-{mode}": {"mode": mode, "max_norm": 1.0, "padding_idx": PADDING} for mode in MODES},
    **{f"scale-{mode}": {"mode": mode, "scale_grad_by_freq": True} for mode in ("sum", "mean")},
    "scale-padding": {"mode": "sum", "scale_grad_by_freq": True, "padding_idx": PADDING},
    "scale-norm": {"mode": "mean", "scale_grad_by_freq": True, "max_norm": 2.0},
}


@pytest.mark.parametrize("with_counts", [False, True], ids=["unordered", "reordered"])
@pytest.mark.parametrize("form", [two_dim, ragged])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_means_what_it_means_in_torch(name, form, with_counts, kernels):
    """Also where the counts put the rows in another order than the ids: padding_idx is an id."""
    compare(ARGUMENTS[name], form, kernels, ids_freq_mapping=counts() if with_counts else None)


@pytest.mark.parametrize("mode", MODES)
def test_negative_padding_idx_counts_from_the_end(mode, kernels):
    bag = compare({"mode": mode, "padding_idx": PADDING - NUM_ROWS}, ragged, kernels, ids_freq_mapping=counts())
    assert bag.padding_idx == nn.EmbeddingBag(NUM_ROWS, DIM, padding_idx=PADDING - NUM_ROWS).padding_idx == PADDING


@pytest.mark.parametrize("mode", MODES)
def test_include_last_offset(mode, kernels):
    compare({"mode": mode, "include_last_offset": True, "padding_idx": PADDING}, ragged_with_end, kernels)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": PADDING}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("form", [two_dim, ragged])
def test_per_sample_weights_and_their_gradient(options, form, kernels):
    compare({"mode": "sum", **options}, form, kernels, weighted=True, ids_freq_mapping=counts())


def test_per_sample_weights_train_while_the_table_is_frozen(kernels):
    """The weights' gradient alone is taken; the rows stay, and the cache evicts freely afterwards."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(NUM_ROWS, DIM, generator=generator)
    ours = FreqAwareEmbeddingBag.from_pretrained(table, mode="sum", num_slots=FEW_SLOTS, kernels=kernels)
    # Not frozen: torch 2.5.1 fails on a frozen table with weights that want a gradient. Theirs is the same either way.
    theirs = nn.EmbeddingBag.from_pretrained(table.double(), mode="sum", freeze=False)
    for _ in range(STEPS):
        ids, _ = two_dim(generator)
        weights = torch.rand(ids.shape, generator=generator)
        gradients = []
        for bag in (ours, theirs):
            per_sample = weights.clone().to(bag.weight.dtype).requires_grad_()
            loss_of(bag(ids, None, per_sample)).backward()
            gradients.append(per_sample.grad)
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.logical_weight(), table)
    assert ours.stats.evictions > 0 and ours.stats.rows_written_back == 0


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_per_sample_weights_are_refused_for_other_modes_as_in_torch(mode):
    ids, weights = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    with pytest.raises(NotImplementedError) as theirs:
        nn.EmbeddingBag(4, 2, mode=mode)(ids, None, weights)
    with pytest.raises(NotImplementedError, match=f"mode='{mode}'") as ours:
        make_bag(2, num_rows=4, dim=2, mode=mode)(ids, None, weights)
    assert "sum" in str(theirs.value) and "sum" in str(ours.value)


@pytest.mark.parametrize("mode", MODES)
def test_norms_of_padding_rows_in_the_input_are_limited_as_in_torch(mode, kernels):
    """nn.EmbeddingBag renormalises every row that the input names, the padding row too, in evaluation too."""
    table = torch.full((10, DIM), 2.0)
    options = {"mode": mode, "max_norm": 1.0, "padding_idx": PADDING}
    ours = make_bag(4, num_rows=10, _weight=table, kernels=kernels, **options)
    theirs = nn.EmbeddingBag(10, DIM, _weight=table.clone(), **options)
    with torch.no_grad():
        for ids in ([[PADDING, 1]], [[5, 6], [7, 8]], [[0, 9], [1, 2]]):
            ours(torch.tensor(ids))
            theirs(torch.tensor(ids))
    assert ours.stats.evictions > 0
    torch.testing.assert_close(ours.logical_weight(), theirs.weight.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, float("-inf"), 0.5])
def test_unusual_norms_mean_what_they_mean_in_torch_or_are_refused(norm_type, kernels):
    """Refused when the bag is built, not by a batch half way, which would leave rows pinned."""
    table = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.5, 0.5], [9.0, 9.0]])
    options = {"mode": "sum", "max_norm": 1.5, "norm_type": norm_type}
    try:
        ours = FreqAwareEmbeddingBag(4, 2, _weight=table, num_slots=2, kernels=kernels, **options)
    except ValueError as error:
        assert f"norm_type={norm_type}" in str(error)
        return
    theirs = nn.EmbeddingBag(4, 2, _weight=table.clone(), **options)
    with torch.no_grad():
        for ids in ([[0], [1]], [[2], [3]], [[1], [3]]):
            torch.testing.assert_close(ours(torch.tensor(ids)), theirs(torch.tensor(ids)))
    assert ours.stats.evictions > 0 and ours._cache.slots.num_pinned == 0


def test_padding_row_gets_no_gradient_and_is_zero_at_first(kernels):
    bag = make_bag(padding_idx=PADDING, ids_freq_mapping=counts(), kernels=kernels)
    optimizer = make_optimizer("SGD", bag.parameters())
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        bag(two_dim(generator)[0]).exp().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bag.stats.evictions > 0
    assert not bag.logical_weight()[PADDING].any()


# ---- shapes of the input -------------------------------------------------------------------------------------------


EMPTY = {
    "no bags": (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
    "no bags, 2-D": (torch.empty(0, 4, dtype=torch.int64), None),
    "one empty bag": (torch.empty(0, dtype=torch.int64), torch.tensor([0])),
    "only empty bags": (torch.empty(0, dtype=torch.int64), torch.tensor([0, 0, 0])),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EMPTY)
def test_batches_without_ids(name, mode, kernels):
    """As torch's in value and shape; the backward gives an empty sparse gradient; training goes on as before."""
    ids, offsets = EMPTY[name]
    bag = make_bag(mode=mode, kernels=kernels)
    before = bag.logical_weight()
    out = bag(ids, offsets)
    expected = nn.EmbeddingBag(NUM_ROWS, DIM, mode=mode)(ids, offsets)
    assert out.shape == expected.shape and not out.any() and not expected.any()
    out.sum().backward()
    assert bag.weight.grad._nnz() == 0
    optimizer = make_optimizer("SGD", bag.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(bag.logical_weight(), before)
    assert bag.stats.hits == bag.stats.misses == 0
    bag._cache.check()


def test_bags_of_no_ids_in_two_dimensions(kernels):
    """(3, 0): three empty bags. (nn.EmbeddingBag itself fails on this shape.)"""
    out = make_bag(kernels=kernels)(torch.empty(3, 0, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(3, DIM))


def test_no_bags_with_the_last_offset(kernels):
    bag = make_bag(include_last_offset=True, kernels=kernels)
    assert bag(torch.empty(0, dtype=torch.int64), torch.tensor([0])).shape == (0, DIM)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_integer_types_may_be_mixed(ids_dtype, offsets_dtype, kernels):
    ids, offsets = ragged(torch.Generator().manual_seed(0))
    bag = make_bag(kernels=kernels)
    out = bag(ids.to(ids_dtype), offsets.to(offsets_dtype))
    assert out.dtype == torch.float32 and torch.equal(out, bag(ids, offsets))
    assert torch.equal(bag(ids.reshape(4, 4).to(ids_dtype)), bag(ids.reshape(4, 4)))


def test_inputs_and_gradients_need_not_be_contiguous(kernels):
    """Transposed ids and weights, strided offsets, an expanded gradient."""
    bag = make_bag(kernels=kernels)
    ids = skewed_ids(torch.Generator().manual_seed(0), (3, 8))
    weights = torch.rand(3, 8, requires_grad=True)
    results = []
    for contiguous in (True, False):
        ids_of_bags, weights_of_bags = ids.T, weights.T
        if contiguous:
            ids_of_bags, weights_of_bags = ids_of_bags.contiguous(), weights_of_bags.contiguous()
        out = bag(ids_of_bags, None, weights_of_bags)
        out.sum().backward()
        results.append([out.detach().clone(), weights.grad.clone(), bag.weight.grad.to_dense()])
        weights.grad = bag.weight.grad = None
    assert_same_bits(*results)
    offsets = torch.tensor([0, 9, 3, 9, 5, 9])
    flat = ids.reshape(-1)
    assert torch.equal(bag(flat, offsets[::2]), bag(flat, torch.tensor([0, 3, 5])))


# ---- what happens to a caller's tensors between forward and backward -----------------------------------------------


def test_a_changed_offsets_buffer_does_not_change_the_gradient(kernels):
    """A loader refills its buffers while the graph waits: torch raises; here it raises, or the gradient is right."""
    bag = make_bag(include_last_offset=True, kernels=kernels)
    ids, offsets = torch.arange(6), torch.tensor([0, 2, 6])
    out = bag(ids, offsets)
    offsets.copy_(torch.tensor([0, 5, 6]))
    ids.fill_(0)
    try:
        out[0].sum().backward()
    except RuntimeError as error:
        assert "modified" in str(error)
        return
    trained = bag.weight.grad.coalesce()
    values = {
        int(bag._cache.slots.id_of_slot[slot]): row.sum() for slot, row in zip(*trained_rows(trained), strict=True)
    }
    assert {number: float(value) for number, value in values.items() if value} == {0: DIM, 1: DIM}


def trained_rows(gradient):
    return gradient._indices()[0].tolist(), gradient._values()


def test_per_sample_weights_changed_in_place_before_backward_raise_as_in_torch(kernels):
    """They are an operand of the gradient: with new values it would be silently another one."""
    ids = torch.arange(6).reshape(2, 3)
    for bag in (nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum"), make_bag(kernels=kernels)):
        weights = torch.rand(2, 3, requires_grad=True)
        scaled = weights * 1
        out = bag(ids, None, scaled)
        with torch.no_grad():
            scaled.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            out.sum().backward()


# ---- construction --------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_torch():
    ours, theirs = FreqAwareEmbeddingBag(10, 4), nn.EmbeddingBag(10, 4)
    names = ("num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode")
    for name in (*names, "include_last_offset", "padding_idx"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_sparse_false_trains_sparsely_all_the_same(kernels):
    results = []
    for sparse in (True, False):
        bag = make_bag(sparse=sparse, kernels=kernels)
        generator = torch.Generator().manual_seed(1)
        results.append(train(bag, [two_dim(generator) for _ in range(STEPS)]))
        assert bag.sparse is sparse and bag.stats.evictions > 0
        bag(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
        assert bag.weight.grad.is_sparse
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
def test_float64(mode, kernels):
    generator = torch.Generator().manual_seed(1)
    batches = [ragged(generator) for _ in range(STEPS)]
    torch.manual_seed(5)
    theirs = nn.EmbeddingBag(NUM_ROWS, DIM, mode=mode, dtype=torch.float64)
    ours = make_bag(seed=5, num_slots=FEW_SLOTS, mode=mode, dtype=torch.float64, kernels=kernels)
    assert torch.equal(ours.logical_weight(), theirs.weight.detach())
    for a, b in zip(train(ours, batches), train(theirs, batches), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert ours.stats.evictions > 0


def test_default_dtype_is_torchs():
    torch.set_default_dtype(torch.float64)
    try:
        bag = make_bag(num_rows=10, num_slots=3)
        assert bag.weight.dtype == bag(torch.zeros(1, 1, dtype=torch.int64)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_given_weights_are_copied_and_stay_with_their_ids(policy, kernels):
    """Counts move the rows; each id keeps its weight, resident or not."""
    table = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1))
    given = table.clone()
    bag = make_bag(_weight=given, ids_freq_mapping=counts(), evict_strategy=policy, kernels=kernels)
    given.zero_()
    for first in range(0, NUM_ROWS, 20):
        ids = torch.arange(first, first + 20)
        assert torch.equal(bag(ids.unsqueeze(1)), table[ids])
    assert bag.stats.evictions > 0
    assert torch.equal(bag.logical_weight(), table)


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained(freeze, kernels):
    table = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1))
    options = {"freeze": freeze, "mode": "mean", "padding_idx": PADDING}
    theirs = nn.EmbeddingBag.from_pretrained(table.clone(), **options)
    ours = FreqAwareEmbeddingBag.from_pretrained(
        table, **options, num_slots=FEW_SLOTS, ids_freq_mapping=counts(), kernels=kernels
    )
    assert ours.weight.requires_grad == theirs.weight.requires_grad == (not freeze)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        ids, _ = two_dim(generator)
        a, b = ours(ids), theirs(ids)
        assert a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b)
        del a, b  # a graph that lives keeps its rows in the cache
    assert ours.stats.evictions > 0
    assert torch.equal(ours.logical_weight(), table)


def test_from_pretrained_takes_torchs_arguments_in_torchs_order():
    """From max_norm to padding_idx, each positional argument is what it is in torch."""
    arguments = (torch.randn(5, 2), False, 1.0, 1.0, False, "sum", True, True, 2)
    ours, theirs = (cls.from_pretrained(*arguments) for cls in (FreqAwareEmbeddingBag, nn.EmbeddingBag))
    for name in ("max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "include_last_offset", "padding_idx"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_frozen_table_is_never_written_back(kernels):
    bag = make_bag(kernels=kernels)
    bag.weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        assert not bag(skewed_ids(generator)).requires_grad
    assert bag.stats.evictions > 0 and bag.stats.rows_written_back == 0
    bag._cache.check()


# ---- initial values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 7, 8])
@pytest.mark.parametrize("num_rows", [1, 5, 15, 16, 17, 31, 32, 33, 47, 203])
@chunks_of(1)
def test_the_seed_draws_torchs_table_in_pieces(num_rows, dim, dtype):
    """Pieces of 16 rows, and sizes around them: torch fills 16 elements at a time, and a short rest otherwise."""
    torch.manual_seed(11)
    theirs = nn.EmbeddingBag(num_rows, dim, dtype=dtype)
    after_theirs = torch.rand(3)
    torch.manual_seed(11)
    ours = FreqAwareEmbeddingBag(num_rows, dim, num_slots=2, dtype=dtype)
    assert torch.equal(ours.logical_weight(), theirs.weight.detach())
    assert torch.equal(torch.rand(3), after_theirs), "the generator was left in another state"


def test_the_seed_draws_torchs_table_beyond_one_piece():
    """70,001 x 61 floats, 17 MB: more than one piece of 16 MiB; with counts, optimizer columns and padding too."""
    rows, dim = 70_001, 61
    torch.manual_seed(12)
    theirs = nn.EmbeddingBag(rows, dim, padding_idx=69_000)
    torch.manual_seed(12)
    options = {"optimizer": "rowwise_adagrad", "ids_freq_mapping": counts(rows), "padding_idx": 69_000}
    ours = FreqAwareEmbeddingBag(rows, dim, num_slots=9, **options)
    assert torch.equal(ours.logical_weight(), theirs.weight.detach())


@pytest.mark.parametrize("padding_idx", [0, 16, -1])
@chunks_of(1)
def test_the_padding_row_is_zero_and_the_others_are_drawn_as_in_torch(padding_idx):
    torch.manual_seed(11)
    theirs = nn.EmbeddingBag(50, 3, padding_idx=padding_idx)
    torch.manual_seed(11)
    ours = FreqAwareEmbeddingBag(50, 3, num_slots=2, padding_idx=padding_idx)
    assert torch.equal(ours.logical_weight(), theirs.weight.detach())


@pytest.mark.parametrize("num_rows", [15, 16, 17, 203])
@pytest.mark.parametrize("dim", [1, 7])
@chunks_of(1)
def test_init_draws_as_one_call_over_the_whole_table(num_rows, dim):
    """bag.init_(uniform_), in pieces, in id order, over rows that counts have moved; resident rows see it at once."""
    bag = FreqAwareEmbeddingBag(num_rows, dim, num_slots=5, mode="sum", ids_freq_mapping=counts(num_rows))
    torch.manual_seed(13)
    bag.init_(lambda values: nn.init.uniform_(values, -0.25, 0.25))
    torch.manual_seed(13)
    expected = torch.empty(num_rows, dim).uniform_(-0.25, 0.25)
    assert torch.equal(bag.logical_weight(), expected)
    for number in range(num_rows):
        assert torch.equal(bag(torch.tensor([[number]]))[0], expected[number])
    bag._cache.check()


def test_init_keeps_optimizer_state_and_training_goes_on(kernels):
    """With dirty rows in the cache: their weights are the new ones, their sums the old ones."""
    results = []
    for num_slots in (FEW_SLOTS, NUM_ROWS):
        bag = make_bag(num_slots, kernels=kernels)
        optimizer = make_optimizer("Adagrad", bag.parameters())
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            loss_of(bag(skewed_ids(generator))).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                sums = bag._cached_weight.logical("sum")
                bag.init_(lambda values: values.fill_(0.5))
                assert torch.equal(bag._cached_weight.logical("sum"), sums) and sums.any()
                assert (bag.logical_weight() == 0.5).all()
        results.append([bag.logical_weight(), bag._cached_weight.logical("sum")])
    assert_same_bits(*results)


# ---- as a module ---------------------------------------------------------------------------------------------------


def test_state_dict_goes_into_torchs_bag_and_back(kernels):
    """Strictly, both ways, after training with evictions; the copy predicts the same."""
    bag = make_bag(ids_freq_mapping=counts(), kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    train(bag, [two_dim(generator) for _ in range(STEPS)])
    assert bag.stats.rows_written_back > 0
    state = bag.state_dict()
    assert list(state) == ["weight"] and state["weight"].shape == (NUM_ROWS, DIM)
    theirs = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum")
    theirs.load_state_dict(state, strict=True)
    ids, _ = two_dim(generator)
    torch.testing.assert_close(bag(ids), theirs(ids))
    again = make_bag(seed=9, evict_strategy="lru", kernels=kernels)
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(again.logical_weight(), bag.logical_weight())
    assert torch.equal(again(ids), bag(ids))


def test_the_state_dict_is_a_copy(kernels):
    bag = make_bag(kernels=kernels)
    state = bag.state_dict()
    before = state["weight"].clone()
    bag.init_(lambda values: values.zero_())
    assert torch.equal(state["weight"], before)
    state["weight"].fill_(7)
    assert not bag.logical_weight().any()


@pytest.mark.parametrize("moment", ["before backward", "before step", "after step"])
def test_load_in_the_middle_of_training(moment, policy, kernels):
    """Dirty resident rows take the loaded values; what is in flight goes on exactly as with every row resident."""
    results = []
    for num_slots in (2 * FEW_SLOTS, NUM_ROWS):
        bag = make_bag(num_slots, kernels=kernels, evict_strategy=policy, ids_freq_mapping=counts())
        optimizer = make_optimizer("SGD", bag.parameters())
        generator = torch.Generator().manual_seed(1)
        loaded = torch.randn(NUM_ROWS, DIM, generator=generator)
        outputs = []
        for step in range(8):
            out = bag(skewed_ids(generator))
            if step == 4 and moment == "before backward":
                bag.load_state_dict({"weight": loaded})
            loss_of(out).backward()
            if step == 4 and moment == "before step":
                bag.load_state_dict({"weight": loaded})
            optimizer.step()
            optimizer.zero_grad()
            if step == 4 and moment == "after step":
                assert bag._cache.slots.marked(bag._cache.slots.DIRTY).any()
                bag.load_state_dict({"weight": loaded})
                assert torch.equal(bag.logical_weight(), loaded)
            outputs.append(out.detach().clone())
            bag._cache.check()
        results.append([*outputs, bag.logical_weight()])
        assert num_slots == NUM_ROWS or bag.stats.evictions > 0
    assert_same_bits(*results)


@pytest.mark.parametrize("writer", ["flush", "load_state_dict", "init_"])
def test_an_update_by_hand_after_a_write_back_survives_eviction(writer, kernels):
    """A row is dirty from its backward on; a write in between must not forget that its gradient is still to be used."""
    bag = make_bag(4, num_rows=20, kernels=kernels)
    bag(torch.tensor([[1, 2]])).sum().backward()
    if writer == "flush":
        bag.flush()
    elif writer == "load_state_dict":
        bag.load_state_dict(bag.state_dict())
    else:
        bag.init_(lambda values: None)
    before = bag.logical_weight()
    with torch.no_grad():
        gradient = bag.weight.grad
        bag.weight[gradient._indices()[0]] -= gradient._values()
    bag.weight.grad = None
    with torch.no_grad():
        for first in range(4, 20, 4):
            bag(torch.arange(first, first + 4).unsqueeze(1))
    assert bag.stats.evictions >= 2
    expected = before.clone()
    expected[1:3] -= 1
    assert torch.equal(bag.logical_weight(), expected)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "Missing key"),
        ({"weight": torch.zeros(NUM_ROWS, DIM), "more": torch.zeros(1)}, "Unexpected key.*more"),
        (
            {"weight": torch.zeros(NUM_ROWS + 1, DIM)},
            rf"size mismatch.*\({NUM_ROWS + 1}, {DIM}\).*\({NUM_ROWS}, {DIM}\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_strict_loading_reports_as_torch_does(state, message):
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        make_bag().load_state_dict(state)


def test_in_a_sequential_model(kernels):
    """One Parameter called "weight", the logical table under the module's prefix, modes and repr as for any module."""
    bag = make_bag(kernels=kernels, padding_idx=PADDING)
    model = nn.Sequential(bag, nn.Linear(DIM, 1))
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert sorted(model.state_dict()) == ["0.weight", "1.bias", "1.weight"]
    assert model.state_dict()["0.weight"].shape == (NUM_ROWS, DIM)
    twin = nn.Sequential(nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", padding_idx=PADDING), nn.Linear(DIM, 1))
    twin.load_state_dict(model.state_dict())
    ids = skewed_ids(torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids), twin(ids))
    assert model.eval().training is False and bag.training is False
    text = repr(model)
    for part in ("FreqAwareEmbeddingBag", str(NUM_ROWS), str(DIM), "sum", f"padding_idx={PADDING}", str(FEW_SLOTS)):
        assert part in text
    model.requires_grad_(False)
    assert not bag(ids).requires_grad


def test_one_key_too_many_in_a_model_is_reported_with_its_name():
    model = nn.Sequential(make_bag(), nn.Linear(DIM, 1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.bias"):
        model.load_state_dict({**model.state_dict(), "0.bias": torch.zeros(1)})


def test_numpy_integers_are_integers():
    """Sizes that come from a data frame's max() are numpy integers; nn.EmbeddingBag takes them."""
    nn.EmbeddingBag(np.int64(10), np.int64(4), padding_idx=np.int64(2))(torch.zeros(1, 1, dtype=torch.int64))
    bag = FreqAwareEmbeddingBag(np.int64(10), np.int64(4), padding_idx=np.int64(2), num_slots=np.int64(3))
    assert (bag.num_embeddings, bag.embedding_dim, bag.padding_idx, bag.num_slots) == (10, 4, 2, 3)
    FreqAwareEmbeddingBagCollection(np.array([3, 4]), np.int64(2))
