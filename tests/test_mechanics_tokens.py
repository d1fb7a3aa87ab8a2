"""Who still needs which rows. `pytest tests/test_mechanics_tokens.py`

Proves: a forward that autograd records holds its rows until its graph is dead or its gradient used; nothing else does;
and every order of forwards, backwards and steps that torch allows trains the rows that were looked up.
Each world has fewer slots than rows, so a row that is let go too early is evicted and the wrong row trained.
"""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from worlds import NUM_ROWS, make_bag, make_optimizer

from colossal_freqcache import CacheTooSmallError

A, B, C, D = (torch.tensor([[first, first + 1]]) for first in (0, 10, 20, 30))


def tight_bag(num_slots=4, **options):
    """A bag of LRU order that cannot grow: `num_slots` slots, two rows a batch."""
    return make_bag(num_slots, evict_strategy="lru", max_cache_bytes=num_slots * 8 * 4, **options)


def plain_twin(bag):
    """nn.EmbeddingBag over the same table."""
    return nn.EmbeddingBag(NUM_ROWS, 8, mode="sum", sparse=True, _weight=bag.logical_weight())


def in_use(bag):
    """Slots with a pin."""
    return bag._cache.slots.num_pinned


def assert_same_table(bag, plain):
    """SGD trained the same rows in both."""
    torch.testing.assert_close(bag.logical_weight(), plain.weight.detach(), rtol=1e-6, atol=1e-7)


def run_both(story, num_slots=4):
    """Tells `story(bag, optimizer)` to ours and to torch's; the tables must agree, and ours must have evicted."""
    bag = tight_bag(num_slots)
    plain = plain_twin(bag)
    story(bag, make_optimizer("SGD", bag.parameters()))
    story(plain, torch.optim.SGD(plain.parameters(), lr=0.05))
    assert bag.stats.evictions > 0
    bag._cache.check()
    assert_same_table(bag, plain)


def train_once(bag, optimizer, ids):
    """forward, backward, step, zero_grad"""
    (bag(ids) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_no_token_without_grad():
    """no_grad, inference mode and a frozen table hold nothing once the forward has returned."""
    bag = tight_bag()
    with torch.no_grad():
        kept = [bag(A), bag(B), bag(C)]
    with torch.inference_mode():
        kept.append(bag(D))
    bag.weight.requires_grad_(False)
    kept.append(bag(A))
    assert bag._cached_weight.num_tokens == 0 and in_use(bag) == 0
    assert bag.stats.evictions > 0 and len(kept) == 5


def test_rows_are_held_while_the_graph_lives():
    """Two graphs fill the cache: a third batch is refused until one of them is dropped."""
    bag = tight_bag()
    first, second = bag(A), bag(B)
    with pytest.raises(CacheTooSmallError):
        bag(C)
    del first
    bag(C)
    assert second is not None and bag.stats.evictions > 0


def test_weights_gradient_alone_holds_rows():
    """A frozen table still needs its rows where per_sample_weights want a gradient."""
    bag = tight_bag()
    bag.weight.requires_grad_(False)
    table = bag.logical_weight()
    weights = torch.ones(1, 2, requires_grad=True)
    out = bag(A, per_sample_weights=weights)
    with torch.no_grad():
        bag(B), bag(C), bag(D)
    out.sum().backward()
    torch.testing.assert_close(weights.grad[0], table[A[0]].sum(1))
    assert bag.stats.evictions > 0


def test_evaluation_in_grad_mode_whose_output_is_dropped():
    """Forwards outside no_grad whose outputs are thrown away do not use the cache up."""
    bag = tight_bag()
    for ids in (A, B, C, D) * 5:
        bag(ids)
    bag.flush()
    assert in_use(bag) == 0 and bag.stats.evictions >= 30


def test_graph_that_dies_in_another_thread_is_released_by_the_training_thread():
    """The finalizer only notes the token: pins change in the training thread's next call, not where it is collected."""
    bag = tight_bag()
    graphs = [bag(A)]
    pins = in_use(bag)

    def collect():
        graphs.clear()
        gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join()
    assert in_use(bag) == pins == 2
    bag.flush()
    assert in_use(bag) == 0


def test_exception_between_forward_and_step():
    """A training loop that catches an error and goes on loses no slot and trains the right rows."""

    def story(bag, optimizer):
        for ids in (A, B, C, D):
            try:
                out = bag(ids)
                if ids is B:
                    raise KeyError("data")
                (out**2).sum().backward()
                if ids is C:
                    raise KeyError("data")
                optimizer.step()
            except KeyError:
                pass
            optimizer.zero_grad()
        train_once(bag, optimizer, A)

    run_both(story)


def test_step_that_a_grad_scaler_skips():
    """GradScaler leaves out the step where a gradient is inf; the rows go free once the gradient is cleared."""

    def story(bag, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step, ids in enumerate((A, B, C, D) * 2):
            loss = (bag(ids) ** 2).sum()
            scaler.scale(loss * (float("inf") if step % 3 == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    run_both(story)


def test_several_forwards_in_one_backward():
    """Three towers, one backward."""

    def story(bag, optimizer):
        for ids in ((A, B, C), (B, C, D), (D, A, B)):
            outs = [bag(one) for one in ids]
            (outs[0] * outs[1] * outs[2]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    run_both(story, num_slots=6)


def test_several_backwards_before_one_step():
    """Micro-batches: a backward's rows stay until the step has used the gradient."""

    def story(bag, optimizer):
        for ids in ((A, B, C), (B, C, D), (D, A, B)):
            for one in ids:
                (bag(one) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    run_both(story, num_slots=6)


def test_two_graphs_stepped_one_after_the_other():
    """forward A, forward B, backward A, step, zero_grad, backward B, step: B's rows outlive A's step."""

    def story(bag, optimizer):
        a, b = bag(A), bag(B)
        a.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            bag(C)  # takes A's slots, not B's
        (2 * b).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run_both(story)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_forward(use_reentrant):
    """A forward that is run again inside the backward prepares its rows again."""

    def story(bag, optimizer):
        for ids in (A, B, C, D):
            gate = torch.ones(1, requires_grad=True)

            def run(gate, ids=ids):
                return bag(ids) * gate

            out = checkpoint(run, gate, use_reentrant=use_reentrant)
            with torch.no_grad():
                bag(A), bag(B), bag(C)
            (out**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    run_both(story)


def test_forward_inside_a_backward_releases_nothing():
    """The interleaving that breaks a release inside a backward:

    1. B's backward returns a gradient, but torch accumulates it only with D's, which comes last: `.grad` is still None.
    2. The checkpointed A is run again and needs two slots. B's rows are the least recently used but for D's.
    3. If `.grad is None` were read as "cleared" now, B's slots would go to A, and B's gradient would train A's rows.
    """

    def story(bag, optimizer):
        gate = torch.ones(1, requires_grad=True)
        d = bag(D)
        a = checkpoint(lambda gate: bag(A) * gate, gate, use_reentrant=True)
        b = bag(B)
        with torch.no_grad():
            bag(C)  # A's rows leave; B's are older than C's
        ((2 * d).sum() + a.sum() + (3 * b).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    run_both(story, num_slots=6)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_cleared_gradient_releases_rows(set_to_none):
    """zero_grad in both forms ends the life of a backward's rows, without any step."""
    bag = tight_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    for ids in (A, B, C, D, A, B):
        (bag(ids) ** 2).sum().backward()
        bag.flush()
        assert in_use(bag) == 2
        optimizer.zero_grad(set_to_none=set_to_none)
    bag.flush()
    assert in_use(bag) == 0 and bag.stats.evictions > 0


def test_step_releases_rows():
    """After the step the rows may leave, although the gradient is not cleared yet."""
    bag = tight_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    (bag(A) ** 2).sum().backward()
    assert in_use(bag) == 2
    optimizer.step()
    assert in_use(bag) == 0


def test_backward_through_released_rows_is_refused():
    """retain_graph across a step: the rows may be gone, so the second backward raises."""
    bag = tight_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    out = bag(A).sum()
    out.backward(retain_graph=True)
    out.backward(retain_graph=True)  # before the step: fine
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="released"):
        out.backward()


def test_adding_to_a_stepped_gradient_is_refused():
    """A forgotten zero_grad() would mix slots of two times: it raises, and says what to do."""
    bag = tight_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    bag(A).sum().backward()
    optimizer.step()
    out = bag(B).sum()
    with pytest.raises(RuntimeError, match="zero_grad"):
        out.backward()
    optimizer.zero_grad()
    bag(B).sum().backward()


def test_stepping_a_gradient_whose_rows_moved_is_refused():
    """Stepping the same gradient twice is fine while nothing moved, and refused after another batch came in."""
    bag = tight_bag()
    optimizer = make_optimizer("SGD", bag.parameters())
    plain = plain_twin(bag)
    for model, stepped in ((bag, optimizer), (plain, torch.optim.SGD(plain.parameters(), lr=0.05))):
        model(A).sum().backward()
        stepped.step()
        stepped.step()
    assert_same_table(bag, plain)
    with torch.no_grad():
        bag(B), bag(C)
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()


def test_double_backward_is_refused():
    """The adjoint is not recorded: a second derivative through it raises instead of being silently left out."""
    bag = tight_bag()
    weights = torch.ones(1, 2, requires_grad=True)
    out = bag(A, per_sample_weights=weights)
    (grad,) = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.square().sum() + weights.sum()).backward()


def test_gradient_taken_out_is_valid_until_the_next_forward():
    """torch.autograd.grad leaves `.grad` alone: the rows stay for the caller, and go with the next forward."""
    bag = tight_bag()
    (grad,) = torch.autograd.grad(bag(A).sum(), bag.weight)
    assert in_use(bag) == 2
    rows = bag._cache.slots.id_of_slot[grad._indices()[0]]
    assert sorted(rows.tolist()) == A[0].tolist()
    with torch.no_grad():
        bag(B)
    assert in_use(bag) == 0


def test_nothing_leaks_over_many_evaluations():
    """A thousand forwards of each kind leave no token and no pin."""
    bag = tight_bag()
    for step in range(1000):
        ids = (A, B, C, D)[step % 4]
        if step % 2:
            with torch.no_grad():
                bag(ids)
        else:
            bag(ids)
    bag.flush()
    assert bag._cached_weight.num_tokens == 0 and in_use(bag) == 0
    assert not bag._cached_weight._dead and not bag._cached_weight._spent
