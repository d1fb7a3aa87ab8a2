"""Optimizers with fused=True train cached rows inside the backward. `pytest tests/test_fused.py`

Proves: the bits of the step without it, for every rule, mode and kernel set, while rows are evicted; and that whatever
it cannot do exactly (a sum of several backwards or lookups, clipping, scaled losses) is refused before it does harm.
"""

import copy

import pytest
import torch
from torch import nn
from worlds import NUM_ROWS, assert_same_bits, everything, loss_of, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import FreqAwareEmbeddingBagCollection, Lookahead, optim

OPTIMIZERS = ("SGD", "Adagrad", "RowWiseAdagrad", "Adam")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def ids(seed=1):
    """One batch."""
    return skewed_ids(torch.Generator().manual_seed(seed))


def run(name, fused, steps=60, options=None, prepare=lambda bag: None, **bag_options):
    """Trains with a schedule and, where the mode has them, weights; (bag, optimizer, outputs and their gradients)."""
    bag = make_bag(**bag_options)
    prepare(bag)
    optimizer = make_optimizer(name, bag.parameters(), fused=fused, **(options or {}))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    generator = torch.Generator().manual_seed(0)
    seen, evicting = [], 0
    for step in range(steps):
        before = bag.stats.evictions
        weights = torch.rand(8, 3, generator=generator) if bag.mode == "sum" else None
        if weights is not None:
            weights.requires_grad_(True)
        out = bag(skewed_ids(generator), per_sample_weights=weights)
        loss_of(out).backward()
        assert (bag.weight.grad._nnz() == 0) == fused
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
        schedule.step()
        evicting += bag.stats.evictions > before
        seen += [out.detach()] + ([] if weights is None else [weights.grad])
    assert evicting > 0.8 * steps
    bag._cache.check()
    return bag, optimizer, seen


@every_optimizer
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_the_bits_are_those_of_the_step_without_it(name, mode, kernels):
    """Outputs, gradients of the weights, table, state and step counts."""
    results = []
    for fused in (False, True):
        bag, optimizer, seen = run(name, fused, mode=mode, kernels=kernels)
        results.append(seen + everything(bag, optimizer))
    assert_same_bits(*results)


@every_optimizer
def test_maximize_and_other_settings_act(name):
    options = {"SGD": {"maximize": True}, "Adam": {"betas": (0.8, 0.9), "eps": 1e-5}}.get(name, {"lr_decay": 0.1})
    results = [everything(*run(name, fused, steps=20, options=options)[:2]) for fused in (False, True)]
    assert_same_bits(*results)
    assert not torch.equal(results[0][0], everything(*run(name, True, steps=20)[:2])[0])


@every_optimizer
def test_state_goes_on_in_another_process(name):
    """State of either kind loads into the other and goes on as if nothing had happened."""
    results = []
    for first, second in ((True, False), (False, True), (False, False)):
        bag, optimizer, _ = run(name, first, steps=10)
        saved = copy.deepcopy((bag.state_dict(), optimizer.state_dict()))
        saved[1]["param_groups"][0]["fused"] = second
        other = make_bag(seed=5)
        trained = make_optimizer(name, other.parameters(), fused=second)
        other.load_state_dict(saved[0])
        trained.load_state_dict(saved[1])
        for step in range(5):
            loss_of(other(ids(step))).backward()
            trained.step()
            trained.zero_grad()
        results.append(everything(other, trained))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


@every_optimizer
def test_under_lookahead_with_dense_layers(name):
    """A collection under a linear layer, batches announced and admitted ahead; dense parameters beside the block."""
    results = []
    offsets = torch.arange(16) * 3
    for fused in (False, True):
        torch.manual_seed(0)
        bags = FreqAwareEmbeddingBagCollection([NUM_ROWS, 50], 8, mode="sum", num_slots=80)
        head = nn.Linear(16, 1).requires_grad_(False)  # torch's own fused step of it has other bits
        optimizer = make_optimizer(name, [*bags.parameters(), *head.parameters()], fused=fused)
        generator = torch.Generator().manual_seed(0)
        batches = [
            torch.cat([skewed_ids(generator).view(-1), skewed_ids(generator, num_rows=50).view(-1)]) for _ in range(40)
        ]
        for values in Lookahead(batches, bags, ids=lambda values: (values, offsets), window=4, depth=2):
            loss_of(head(bags(values, offsets).flatten(1))).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bags.stats.evictions > 40
        results.append(
            [bags.logical_weight(0), bags.logical_weight(1)]
            + [torch.as_tensor(value) for value in optimizer.state_dict()["state"].get(0, {}).values()]
        )
    assert_same_bits(*results)


def test_dense_parameters_follow_torchs_fused_step():
    torch.manual_seed(0)
    bag, head = make_bag(), nn.Linear(8, 1)
    twin = copy.deepcopy(head)
    ours = optim.Adam([*bag.parameters(), *head.parameters()], lr=0.1, fused=True)
    theirs = torch.optim.Adam(twin.parameters(), lr=0.1, fused=True)
    for step in range(5):
        out = bag(ids(step))
        for model, optimizer in ((head, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(out if model is head else out.detach()).square().sum().backward()
            optimizer.step()
    assert_same_bits([*head.parameters()], [*twin.parameters()])


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(params=OPTIMIZERS)
def trained(request):
    """(bag, fused optimizer) after one step, so that refusals have state to damage."""
    bag = make_bag(60)
    optimizer = make_optimizer(request.param, bag.parameters(), fused=True)
    step(bag, optimizer)
    return bag, optimizer


def step(bag, optimizer, seed=0):
    loss_of(bag(ids(seed))).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_second_backward_before_the_step(trained):
    """The gradients of two backwards would have to be added up before the rule sees them; torch adds, we cannot."""
    bag, optimizer = trained
    loss_of(bag(ids(2))).backward()
    before = everything(bag, optimizer)
    with pytest.raises(RuntimeError, match=r"fused=True .* one backward per step.*without fused"):
        loss_of(bag(ids(3))).backward()
    assert_same_bits(everything(bag, optimizer), before)
    optimizer.step()
    optimizer.zero_grad()
    step(bag, optimizer, 4)


def test_two_lookups_under_one_loss(trained):
    """Refused before either of them has trained anything."""
    bag, optimizer = trained
    before = everything(bag, optimizer)
    first, second = bag(ids(2)), bag(ids(3))
    with pytest.raises(RuntimeError, match=r"1 more forward\(s\) of it wait"):
        (first * second).sum().backward()
    assert_same_bits(everything(bag, optimizer), before)
    del first, second
    step(bag, optimizer, 4)


def test_a_graph_that_is_run_twice(trained):
    bag, optimizer = trained
    loss = loss_of(bag(ids(2)))
    loss.backward(retain_graph=True)
    before = everything(bag, optimizer)
    with pytest.raises(RuntimeError, match="fused=True"):
        loss.backward()
    assert_same_bits(everything(bag, optimizer), before)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_left_out(trained, set_to_none):
    """zero_grad() cannot take back what the backward has trained: the next backward says so."""
    bag, optimizer = trained
    loss_of(bag(ids(2))).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = everything(bag, optimizer)
    with pytest.raises(RuntimeError, match="a step that is left out"):
        loss_of(bag(ids(3))).backward()
    assert_same_bits(everything(bag, optimizer), before)


def test_a_hook_of_the_parameter(trained):
    """It could only see an empty gradient."""
    bag, optimizer = trained
    before = everything(bag, optimizer)
    handle = bag.weight.register_hook(lambda grad: grad * 0.5)
    with pytest.raises(RuntimeError, match="hook"):
        loss_of(bag(ids(2))).backward()
    assert_same_bits(everything(bag, optimizer), before)
    handle.remove()
    step(bag, optimizer, 3)


def test_an_optimizer_that_has_let_go_of_the_table_does_not_train_it(trained):
    bag, optimizer = trained
    before = bag.logical_weight()
    optimizer.param_groups.clear()
    loss_of(bag(ids(2))).backward()
    assert torch.equal(bag.logical_weight(), before) and bag.weight.grad._nnz()


def test_evaluations_between(trained):
    bag, optimizer = trained
    out = bag(ids(2))
    with torch.no_grad():
        bag(ids(3))
    loss_of(out).backward()
    with torch.no_grad():
        bag(ids(4))
    dead = bag(ids(5))
    del dead
    optimizer.step()
    optimizer.zero_grad()
    step(bag, optimizer, 6)


def test_a_forgotten_graph_that_has_died_does_not_count(trained):
    bag, optimizer = trained
    forgotten = bag(ids(2))
    out = bag(ids(3))
    del forgotten
    loss_of(out).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "clip",
    [
        lambda parameters: optim.clip_grad_norm_(parameters, 1.0),
        lambda parameters: optim.clip_grad_value_(parameters, 1.0),
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0),
        lambda parameters: nn.utils.clip_grad_value_(parameters, 1.0),
    ],
)
def test_clipping(clip):
    """Ours by name; torch's refuse the sparse gradient, which is there for them to see."""
    bag, head = make_bag(), nn.Linear(8, 1)
    optimizer = optim.SGD([*bag.parameters(), *head.parameters()], lr=0.1, fused=True)
    head(bag(ids())).sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"fused=True|[Ss]parse"):
        clip([*bag.parameters(), *head.parameters()])
    optimizer.step()


@every_optimizer
def test_a_grad_scaler(name):
    """Its scale is only seen at the step: that one says that the rows are spoilt."""
    bag = make_bag()
    optimizer = make_optimizer(name, bag.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(loss_of(bag(ids()))).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*scaled gradients.*without fused=True"):
        scaler.step(optimizer)


def test_settings_that_are_no_row_rules_are_refused_in_the_backward():
    bag = make_bag()
    optimizer = optim.SGD(bag.parameters(), lr=0.1, fused=True)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = bag.logical_weight()
    with pytest.raises(ValueError, match=r"momentum=0\.9"):
        loss_of(bag(ids())).backward()
    assert torch.equal(bag.logical_weight(), before)


def test_torchs_fused_optimizers_step_as_ever():
    """They are adapted, not ours: accumulation works, and the gradient is there to see."""
    results = []
    for fused in (False, True):
        bag = make_bag(60)
        optimizer = torch.optim.SGD(bag.parameters(), lr=0.1, fused=fused)
        for _ in range(3):
            loss_of(bag(ids(1))).backward()
            loss_of(bag(ids(2))).backward()
            assert bag.weight.grad._nnz()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(bag))
    assert_same_bits(*results)
