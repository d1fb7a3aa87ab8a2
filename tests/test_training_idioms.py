"""What real training loops do to parameters, gradients and optimizers. `pytest tests/test_training_idioms.py`

Proves: an idiom gives what it gives without a cache, or raises and says what to use; none trains wrong rows silently.
"""

import copy
import threading
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from worlds import NUM_ROWS, assert_same_bits, everything, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import optim

OURS_AND_TORCHS = [optim.SGD, torch.optim.SGD]


def ids(seed=1):
    """One batch."""
    return skewed_ids(torch.Generator().manual_seed(seed))


def train(bag, optimizer, steps=6, first=0):
    """A few steps."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        bag(ids(step)).sin().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def plain_twin(bag):
    """nn.EmbeddingBag over the same table."""
    return nn.EmbeddingBag(NUM_ROWS, 8, mode="sum", sparse=True, _weight=bag.logical_weight())


# ---- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [False, True])
def test_fused_optimizer_under_a_grad_scaler(overflow):
    """For torch's fused optimizers the scaler leaves unscaling and skipping to the step: as without a cache.

    Ours with fused=True train rows in the backward, where the scale is not known: see test_fused.
    """
    tables = []
    for model in (make_bag(), plain_twin(make_bag())):
        fused = {"fused": True} if isinstance(model, type(make_bag())) else {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        loss = model(ids()).sin().sum()
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        tables.append(model.logical_weight() if fused else model.weight.detach())
    torch.testing.assert_close(*tables)
    assert overflow == torch.equal(tables[0], make_bag().logical_weight())


@pytest.mark.parametrize("make", OURS_AND_TORCHS)
def test_step_pre_hooks_come_before_the_rows(make):
    """A pre-hook that clips, zeroes or vetoes gradients acts on rows, too."""
    bag = make_bag()
    before = bag.logical_weight()
    optimizer = make(bag.parameters(), lr=0.1)

    def zero(*_):
        bag.weight.grad.mul_(0)

    optimizer.register_step_pre_hook(zero)
    bag(ids()).sum().backward()
    optimizer.step()
    assert torch.equal(bag.logical_weight(), before)


def test_step_post_hooks_see_the_gradient_and_may_clear_it():
    """An adapted optimizer's gradient is back before the user's post-hook, and stays cleared after it."""
    bag = make_bag()
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.1)
    seen = []

    def clear(*_):
        seen.append(bag.weight.grad)
        optimizer.zero_grad()

    optimizer.register_step_post_hook(clear)
    for step in range(3):
        bag(ids(step)).sum().backward()
        optimizer.step()
        assert bag.weight.grad is None
    assert len(seen) == 3 and seen[2] is not None and bag.stats.evictions > 0


def test_gradient_of_a_failed_step_does_not_come_back_into_sums():
    """A torch step that raised after the rows were trained: the next backward starts from nothing."""
    bag = make_bag()
    dense = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SparseAdam([bag.weight, dense], lr=0.1)
    bag(ids(1)).sum().backward()
    dense.grad = torch.ones(3)  # SparseAdam raises on dense gradients
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.zero_grad()
    bag(ids(2)).sum().backward()
    rows = bag._cache.slots.id_of_slot[bag.weight.grad._indices()[0]]
    assert sorted(rows.tolist()) == ids(2).unique().tolist()


@pytest.mark.parametrize("make", [optim.Adam, torch.optim.SparseAdam, optim.Adagrad])
def test_cleared_optimizer_state_starts_the_rows_afresh(make):
    """optimizer.state = defaultdict(dict) forgets the rows' state with the rest."""
    bag, fresh = make_bag(), make_bag()
    optimizer = make(bag.parameters(), lr=0.1)
    train(bag, optimizer)
    fresh.load_state_dict(bag.state_dict())
    optimizer.state = defaultdict(dict)
    train(bag, optimizer, first=6)
    train(fresh, make(fresh.parameters(), lr=0.1), first=6)
    assert bag.stats.evictions > 0
    assert torch.equal(bag.logical_weight(), fresh.logical_weight())


@pytest.mark.parametrize("make", [optim.Adam, torch.optim.SparseAdam, optim.Adagrad, torch.optim.Adagrad])
def test_rollback_to_before_the_first_step(make):
    """Loading the state of a new optimizer (as learning-rate finders do) takes the rows' state back as well."""
    bag = make_bag()
    optimizer = make(bag.parameters(), lr=0.1)
    start = copy.deepcopy((bag.state_dict(), optimizer.state_dict()))
    train(bag, optimizer)
    first = bag.logical_weight()
    bag.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    train(bag, optimizer)
    assert bag.stats.evictions > 0
    assert torch.equal(bag.logical_weight(), first)


def test_sparse_adam_state_loads_into_ours_and_steps():
    """SparseAdam's groups lack keys that dense parameters need."""
    bag, twin = make_bag(), make_bag()
    theirs = torch.optim.SparseAdam(bag.parameters(), lr=0.1)
    train(bag, theirs)
    ours = optim.Adam(twin.parameters(), lr=0.1)
    twin.load_state_dict(bag.state_dict())
    ours.load_state_dict(theirs.state_dict())
    train(bag, theirs, first=6)
    train(twin, ours, first=6)
    assert_same_bits(everything(bag)[:1], everything(twin)[:1])


def test_refused_group_is_not_left_in_the_optimizer():
    """add_param_group that raises leaves the optimizer as it was."""
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group({"params": make_bag().parameters(), "momentum": 0.9})
    assert len(optimizer.param_groups) == 1


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradient_put_back_after_a_later_forward_is_refused():
    """A gradient that was moved out of .grad is good until the next forward only: later it raises."""
    bag = make_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    bag(ids(1)).sum().backward()
    kept, bag.weight.grad = bag.weight.grad, None
    with torch.no_grad():
        bag(ids(2))
    bag.weight.grad = kept
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()


def test_scaled_copy_of_a_stepped_gradient_is_still_stepped():
    """p.grad = p.grad * c after the step does not hide that it was used."""
    bag = make_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    bag(ids(1)).sum().backward()
    optimizer.step()
    bag.weight.grad = bag.weight.grad * 0.5
    out = bag(ids(2)).sum()
    with pytest.raises(RuntimeError, match="zero_grad"):
        out.backward()


@pytest.mark.parametrize("make", [optim.Adam, torch.optim.SparseAdam])
def test_refused_step_changes_no_table_and_counts_no_step(make):
    """Two tables, the second with a gradient that is refused: the first is not stepped, and no step is counted."""
    bags = [make_bag(), make_bag()]
    optimizer = make([bag.weight for bag in bags], lr=0.1)
    for bag in bags:
        bag(ids()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [bag.logical_weight() for bag in bags]
    for bag in bags:
        bag(ids(2)).sum().backward()
    bags[1].weight.grad = torch.zeros_like(bags[1].weight)  # dense
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert [int(optimizer.state[bag.weight]["step"]) for bag in bags] == [1, 1]
    assert_same_bits([bag.logical_weight() for bag in bags], before)


def test_undefined_gradient_leaves_no_gradient():
    """A function downstream that returns None gives no gradient, not one of zeros (Adam would move rows by it)."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    bag = make_bag()
    Cut.apply(bag(ids())).backward()
    assert bag.weight.grad is None
    bag.flush()
    assert bag._cache.slots.num_pinned == 0


def test_hook_that_breaks_the_order_is_noticed():
    """A gradient hook that returns duplicate slots is refused at the step, not taken for sorted."""
    bag = make_bag()
    optimizer = make_optimizer("Adagrad", bag.parameters())
    bag.weight.register_hook(
        lambda g: torch.sparse_coo_tensor(g._indices().repeat(1, 2), g._values().repeat(2, 1), g.shape)
    )
    bag(ids()).sum().backward()
    with pytest.raises(RuntimeError, match="coalesced"):
        optimizer.step()


def test_frozen_between_forward_and_backward():
    """requires_grad_(False) after the forward: the backward runs as in torch."""
    bag, plain = make_bag(), plain_twin(make_bag())
    for model in (bag, plain):
        out = model(ids()).sum()
        model.requires_grad_(False)
        out.backward()
    assert (bag.weight.grad is None) == (plain.weight.grad is None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_with_weights_gradient(use_reentrant):
    """per_sample_weights that need a gradient inside a checkpointed segment."""
    grads = []
    for model in (make_bag(), plain_twin(make_bag())):
        weights = torch.linspace(0, 1, 24).reshape(8, 3).requires_grad_()
        out = checkpoint(
            lambda w, model=model: model(ids(), per_sample_weights=w), weights, use_reentrant=use_reentrant
        )
        out.sin().sum().backward()
        grads.append(weights.grad)
    torch.testing.assert_close(*grads)


def test_weights_gradient_after_an_edit_by_hand_is_refused():
    """The rows that the weights' gradient needs were edited since the forward: as in torch, it raises."""
    bag = make_bag()
    bag(ids()).sum().backward()
    weights = torch.ones(8, 3, requires_grad=True)
    out = bag(ids(), per_sample_weights=weights).sum()
    with torch.no_grad():
        bag.weight.mul_(2)
    with pytest.raises(RuntimeError, match="updated"):
        out.backward()


# ---- the block is not the table --------------------------------------------------------------------------------------


def replace_parameter(bag):
    bag.weight = nn.Parameter(torch.zeros(NUM_ROWS, 8))
    bag(ids())


def replace_data(bag):
    bag.weight.data = torch.zeros_like(bag.weight)
    bag(ids())


def call_functionally(bag):
    torch.func.functional_call(bag, {"weight": torch.zeros_like(bag.weight)}, (ids(),))


def initialise_block(bag):
    nn.init.zeros_(bag.weight)
    bag(ids())


def average_blocks(bag):
    average = torch.optim.swa_utils.AveragedModel(bag)
    optimizer = make_optimizer("SGD", bag.parameters())
    for step in range(3):
        train(bag, optimizer, 1, first=step)
        average.update_parameters(bag)
    average.module.logical_weight()


def trace(bag):
    torch.jit.trace(bag, (ids(),), check_trace=False)


@pytest.mark.parametrize(
    "edit", [replace_parameter, replace_data, call_functionally, initialise_block, average_blocks, trace]
)
def test_edits_that_would_not_reach_the_table_are_refused(edit):
    """Whatever takes the block for the table raises at the latest when the bag is used or read next."""
    with pytest.raises(RuntimeError, match=r"cached table|cache's own block"):
        edit(make_bag())


def test_deepcopy_shares_nothing():
    """Hooks registered on the copy do not fire for the original; submodules of a subclass are copied."""
    bag = make_bag()
    bag.extra = nn.Linear(2, 2)
    twin = copy.deepcopy(bag)
    fired = []
    twin.register_forward_hook(lambda *_: fired.append(1))
    bag(ids())
    assert not fired and twin.extra is not bag.extra
    twin(ids())
    assert fired


def test_evaluation_in_several_threads():
    """no_grad forwards of one bag from four threads: every output is right, and the maps stay sound."""
    bag = make_bag(60)
    table = bag.logical_weight()
    wrong = []

    def evaluate(seed):
        for step in range(60):
            batch = ids(100 * seed + step)
            with torch.no_grad():
                if not torch.allclose(bag(batch), table[batch].sum(1), atol=1e-5):
                    wrong.append(batch)

    threads = [threading.Thread(target=evaluate, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and bag.stats.evictions > 0
    bag._cache.check()
