"""`.grad` of the block: sparse over slots, sorted, unique, coalesced. `pytest tests/test_mechanics_gradient.py`

Proves: torch only ever merges sorted gradients, so sums do not depend on where rows sit; and clipping works on them.
"""

import pytest
import torch
from torch import nn
from worlds import DIM, NUM_ROWS, assert_same_bits, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import optim
from colossal_freqcache.block import _merged


def gradient_by_id(bag):
    """The block's gradient as (ids ascending, values)."""
    grad = bag.weight.grad
    ids = bag._cache.slots.id_of_slot[grad._indices()[0]]
    order = ids.argsort()
    return [ids[order], grad._values()[order].clone()]


def assert_contract(grad, bag):
    """Sparse, of the block's shape, flagged coalesced, and truly sorted and unique."""
    slots = grad._indices()[0]
    assert grad.is_sparse and grad.shape == bag.weight.shape
    assert grad.is_coalesced() and bool((slots[1:] > slots[:-1]).all())


def scattered(bag, seed):
    """Looks rows up in a random order, so that they sit in slots of their own."""
    for one in torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(seed)).tolist():
        bag(torch.tensor([[one]]))
    return bag


def test_accumulated_gradients_stay_sorted_and_coalesced(kernels):
    """Over micro-batches that share rows, and after clearing in both forms."""
    bag = make_bag(120, kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    for set_to_none in (True, False, True):
        for _ in range(4):
            bag(skewed_ids(generator)).square().sum().backward()
            assert_contract(bag.weight.grad, bag)
        bag.zero_grad(set_to_none=set_to_none)


def test_sums_do_not_depend_on_slots(kernels):
    """Four micro-batches, and three forwards in one backward, give equal bits with the rows in other slots."""
    grads = []
    for seed in (1, 2):
        bag = scattered(make_bag(100, kernels=kernels, evict_strategy="lru"), seed)
        assert bag.stats.evictions > 0
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            bag(skewed_ids(generator, (6, 3))).square().sum().backward()
        accumulated = gradient_by_id(bag)
        slots = bag.weight.grad._indices()[0]
        bag.zero_grad()
        outs = [bag(skewed_ids(generator, (6, 3))) for _ in range(3)]
        (outs[0] * outs[1] * outs[2]).sum().backward()
        grads.append((accumulated, gradient_by_id(bag), slots))
    assert not torch.equal(grads[0][2], grads[1][2]), "the rows were to sit in other slots"
    assert_same_bits(grads[0][0] + grads[0][1], grads[1][0] + grads[1][1])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_batch_has_an_empty_gradient(kernels, shape):
    """No ids: nnz 0, and accumulating onto it works."""
    bag = make_bag(kernels=kernels)
    empty = torch.empty(shape, dtype=torch.int64)
    bag(empty).sum().backward()
    assert_contract(bag.weight.grad, bag)
    assert bag.weight.grad._nnz() == 0
    bag(torch.tensor([[3, 3, 4]])).sum().backward()
    assert_contract(bag.weight.grad, bag)
    assert gradient_by_id(bag)[0].tolist() == [3, 4]
    bag(empty).sum().backward()
    assert gradient_by_id(bag)[0].tolist() == [3, 4]


def test_empty_gradient_is_stepped_and_added_to(optimizer):
    """A step on nnz 0 changes nothing, and the gradient can be accumulated into after it was cleared in place."""
    bag = make_bag()
    trained = make_optimizer(optimizer, bag.parameters())
    before = bag.logical_weight()
    bag(torch.empty(2, 0, dtype=torch.int64)).sum().backward()
    trained.step()
    assert torch.equal(bag.logical_weight(), before)
    trained.zero_grad(set_to_none=False)
    bag(torch.tensor([[1]])).sum().backward()
    trained.step()
    assert not torch.equal(bag.logical_weight(), before)


def test_gradient_that_lost_its_order_is_refused():
    """A gradient that the user made unsorted would be summed by slot: stepping it raises."""
    bag = make_bag()
    trained = make_optimizer("SGD", bag.parameters())
    bag(torch.tensor([[1, 2]])).sum().backward()
    grad = bag.weight.grad
    bag.weight.grad = torch.sparse_coo_tensor(grad._indices().flip(1), grad._values(), grad.shape)
    with pytest.raises(RuntimeError, match="coalesced"):
        trained.step()


def test_dense_gradient_is_refused():
    """A dense gradient over slots can only be a mistake."""
    bag = make_bag()
    trained = make_optimizer("SGD", bag.parameters())
    bag.weight.grad = torch.zeros_like(bag.weight)
    with pytest.raises(RuntimeError, match="sparse"):
        trained.step()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clip_grad_norm_equals_torch_on_the_dense_twin(norm_type):
    """A list that mixes dense parameters and a table is clipped as torch clips the dense one."""
    bag = make_bag()
    plain = nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", _weight=bag.logical_weight())
    dense = nn.Linear(DIM, 4)
    twin = nn.Linear(DIM, 4)
    twin.load_state_dict(dense.state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            bag(skewed_ids(generator))
    assert bag.stats.evictions > 0
    ids = skewed_ids(generator)
    dense(bag(ids)).square().sum().backward()
    twin(plain(ids)).square().sum().backward()
    total = optim.clip_grad_norm_([*bag.parameters(), *dense.parameters()], 0.5, norm_type)
    expected = nn.utils.clip_grad_norm_([*plain.parameters(), *twin.parameters()], 0.5, norm_type)
    torch.testing.assert_close(total, expected)
    rows, values = gradient_by_id(bag)
    torch.testing.assert_close(values, plain.weight.grad[rows.long()])
    torch.testing.assert_close(dense.weight.grad, twin.weight.grad)


def test_clip_grad_norm_sums_in_row_order():
    """The norm's bits do not depend on where the rows sit."""
    norms = []
    for seed in (1, 2, 3, 4):
        bag = scattered(make_bag(100, evict_strategy="lru"), seed)
        bag(skewed_ids(torch.Generator().manual_seed(5), (16, 4))).square().sum().backward()
        norms.append(optim.clip_grad_norm_(bag.parameters(), 1e9))
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def test_clip_grad_norm_refuses_nonfinite():
    """error_if_nonfinite names the norm and leaves the gradient alone."""
    bag = make_bag()
    (bag(torch.tensor([[1]])) * float("inf")).sum().backward()
    with pytest.raises(RuntimeError, match="inf"):
        optim.clip_grad_norm_(bag.parameters(), 1.0, error_if_nonfinite=True)


def test_gradients_laid_end_to_end_are_merged():
    """What torch makes of a sum of sparse gradients on CUDA: sorted, unique, added from left to right, coalesced."""
    generator = torch.Generator().manual_seed(0)
    expected, seen, parts = torch.zeros(50, 4), torch.zeros(50, dtype=torch.bool), []
    for count in (20, 0, 31, 50):
        slots = torch.randperm(50, generator=generator)[:count].sort().values
        values = torch.randn(count, 4, generator=generator)
        expected[slots] = torch.where(seen[slots].unsqueeze(1), expected[slots] + values, values)
        seen[slots] = True
        parts.append((slots, values))
    slots, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    merged = _merged(torch.sparse_coo_tensor(slots.unsqueeze(0), values, (50, 4), check_invariants=True))
    assert merged.is_coalesced() and torch.equal(merged._indices()[0], torch.arange(50))
    assert torch.equal(merged._values(), expected)
    empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4), (50, 4))
    assert _merged(empty)._nnz() == 0
