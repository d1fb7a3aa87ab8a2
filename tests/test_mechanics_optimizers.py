"""Optimizers over cached rows: ours, torch's adapted ones, and those that are refused.
`pytest tests/test_mechanics_optimizers.py`

Proves: torch's arithmetic never reaches the block; torch SGD, Adagrad and SparseAdam train the same bits as ours, with
closures, skipped and failing steps; state dicts are logical and load into torch's classes and back; what has no exact
row rule raises and names the replacement. Every training loop here evicts.
"""

import copy

import pytest
import torch
from torch import nn
from worlds import DIM, FEW_SLOTS, NUM_ROWS, assert_same_bits, counts, everything, make_bag, make_optimizer, skewed_ids

from colossal_freqcache import optim

FOREIGN = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}
TORCH = {
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "RowWiseAdagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}


def train(model, optimizer, steps=30, seed=4, closure=False, start=0):
    """`steps` steps on a fixed stream; with `closure` through optimizer.step(closure)."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(start + steps):
        ids = skewed_ids(generator)
        if step < start:
            continue

        def loss_of(ids=ids, step=step):
            optimizer.zero_grad()
            loss = ((model(ids) - step % 3) ** 2).sum()
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(loss_of).requires_grad
        else:
            loss_of()
            optimizer.step()
    optimizer.zero_grad()
    return model


def trained_bag(make, steps=30, closure=False, **options):
    """(bag, optimizer) after training; rows were evicted on the way."""
    bag = make_bag(ids_freq_mapping=counts(), **options)
    optimizer = make(bag.parameters())
    train(bag, optimizer, steps, closure=closure)
    assert bag.stats.evictions > 5 * steps
    bag._cache.check()
    return bag, optimizer


def by_index(state_dict):
    """State tensors of parameter 0, by name."""
    return {name: torch.as_tensor(value) for name, value in state_dict["state"].get(0, {}).items()}


def plain_model(bag):
    """nn.EmbeddingBag over a copy of the logical table."""
    return nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True, _weight=bag.logical_weight())


# ---- torch's optimizers, adapted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_adapted_optimizers_train_the_bits_of_ours(name, closure):
    """torch SGD, Adagrad and SparseAdam, with and without closure: table and state as from our optimizer."""
    ours = trained_bag(lambda parameters: make_optimizer(name, parameters), closure=closure)
    theirs = trained_bag(lambda parameters: FOREIGN[name](parameters, lr=0.05), closure=closure)
    assert_same_bits([ours[0].logical_weight()], [theirs[0].logical_weight()])
    first, second = by_index(ours[1].state_dict()), by_index(theirs[1].state_dict())
    assert first.keys() == second.keys()
    assert_same_bits(list(first.values()), [second[name] for name in first])


def test_block_never_reaches_torch_arithmetic():
    """Over 100 unique rows a step through records of [weight | state]: torch's own SGD would raise on that view."""
    bag = make_bag(300, num_rows=2000, optimizer="sgd")
    bag.drop_optimizer_state()
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.05)
    plain = nn.EmbeddingBag(2000, DIM, mode="sum", sparse=True, _weight=bag.logical_weight())
    twin = torch.optim.SGD(plain.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = skewed_ids(generator, (64, 4), 2000)
        for model, stepped in ((bag, optimizer), (plain, twin)):
            model(ids).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    assert ids.unique().numel() > 100 and bag.stats.evictions > 0
    torch.testing.assert_close(bag.logical_weight(), plain.weight.detach())


def test_adapted_gradient_is_back_after_the_step():
    """`.grad` is hidden during torch's step only: code that logs it afterwards finds it."""
    bag = make_bag()
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.05)
    bag(torch.tensor([[1, 2]])).sum().backward()
    grad = bag.weight.grad
    optimizer.step()
    assert bag.weight.grad is grad


@pytest.mark.parametrize("ours", [False, True])
def test_gradient_comes_back_when_a_step_raises(ours):
    """The step raises on a dense parameter: the block's gradient is there again before the next forward or step."""
    bag = make_bag()
    dense = nn.Parameter(torch.ones(3))
    if ours:
        optimizer = optim.Adagrad([{"params": bag.parameters()}, {"params": [dense], "weight_decay": 0.1}], lr=0.05)
        dense.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,))  # torch: no weight_decay for sparse gradients
    else:
        optimizer = torch.optim.SparseAdam([bag.weight, dense], lr=0.05)
        dense.grad = torch.ones(3)  # SparseAdam refuses dense gradients
    bag(torch.tensor([[1, 2]])).sum().backward()
    grad = bag.weight.grad
    with pytest.raises(RuntimeError):
        optimizer.step()
    if not ours:
        bag.flush()  # no hook of torch's runs after a step that raised
    assert bag.weight.grad is grad
    optimizer.zero_grad()
    dense.grad = None
    train(bag, optimizer, 20)
    assert bag.stats.evictions > 0


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
def test_hyper_parameters_are_read_at_each_step(make):
    """Schedulers, tensor lr, maximize, foreach: what torch honours acts on rows, too."""
    bag = make_bag()
    optimizer = make(bag.parameters(), lr=torch.tensor(0.05), maximize=True, foreach=True)
    plain = plain_model(bag)
    twin = torch.optim.SGD(plain.parameters(), lr=0.05, maximize=True)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5) for one in (optimizer, twin)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        ids = skewed_ids(generator)
        for model, stepped, scheduler in ((bag, optimizer, schedulers[0]), (plain, twin, schedulers[1])):
            model(ids).sin().sum().backward()
            stepped.step()
            stepped.zero_grad()
            scheduler.step()
    assert bag.stats.evictions > 0
    torch.testing.assert_close(bag.logical_weight(), plain.weight.detach())


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
@pytest.mark.parametrize("setting", ["momentum", "weight_decay", "differentiable"])
def test_settings_that_move_rows_without_gradient_are_refused(make, setting):
    """momentum, weight_decay, differentiable: refused with the reason, before anything was trained."""
    bag = make_bag()
    before = bag.logical_weight()
    with pytest.raises(ValueError, match=setting):
        optimizer = make(bag.parameters(), lr=0.05, **{setting: True if setting == "differentiable" else 0.1})
        bag(torch.tensor([[1]])).sum().backward()
        optimizer.step()
    assert torch.equal(bag.logical_weight(), before)


@pytest.mark.parametrize("name", ["Adagrad", "RowWiseAdagrad", "Adam"])
def test_weight_decay_is_refused_for_every_rule(name):
    """Weight decay moves all rows at every step: no rule takes it; dense parameters may have it in their own group."""
    bag = make_bag()
    with pytest.raises(ValueError, match="weight_decay"):
        make_optimizer(name, bag.parameters(), weight_decay=0.1)
    dense = nn.Parameter(torch.ones(2))
    make_optimizer(name, [{"params": [dense], "weight_decay": 0.1}, {"params": bag.parameters()}])


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_other_optimizers_are_refused_by_name(cls):
    """An optimizer without a row rule would train slots: its step raises and names what to use."""
    bag = make_bag()
    optimizer = cls(bag.parameters(), lr=0.05)
    before = bag.logical_weight()
    bag(torch.tensor([[1]])).sum().backward()
    replacement = "Adam" if cls in (torch.optim.Adam, torch.optim.AdamW) else "RowWiseAdagrad"
    with pytest.raises(RuntimeError, match=rf"colossal_freqcache\.optim.*{replacement}"):
        optimizer.step(lambda: torch.zeros(()))
    assert torch.equal(bag.logical_weight(), before)


def test_subclass_of_an_adapted_optimizer_is_refused():
    """A subclass may do other arithmetic: it is not taken for its base."""

    class Signed(torch.optim.SGD):
        pass

    bag = make_bag()
    optimizer = Signed(bag.parameters(), lr=0.05)
    bag(torch.tensor([[1]])).sum().backward()
    with pytest.raises(RuntimeError, match="Signed"):
        optimizer.step()


def test_optimizers_without_a_table_are_left_alone():
    """The global hooks do nothing to optimizers that hold no block."""
    make_bag()
    dense, twin = nn.Parameter(torch.ones(3)), torch.ones(3)
    optimizer = torch.optim.Adam([dense], lr=0.1)
    dense.sum().backward()
    optimizer.step()
    assert not torch.equal(dense.detach(), twin)


def test_hand_written_update_survives_eviction():
    """A row is dirty from its backward on, so an update written by hand is kept, without any optimizer."""
    bag = make_bag(4, evict_strategy="lru")
    plain = plain_model(bag)
    for first in (0, 10, 20, 0):
        ids = torch.tensor([[first, first + 1, first]])
        for model in (bag, plain):
            model(ids).square().sum().backward()
            with torch.no_grad():
                grad = model.weight.grad.coalesce()
                model.weight[grad.indices()[0]] -= 0.1 * grad.values()
            model.weight.grad = None
    assert bag.stats.evictions > 0
    torch.testing.assert_close(bag.logical_weight(), plain.weight.detach())


def test_clean_rows_are_not_written_back():
    """Evaluation evicts and fetches, and writes nothing."""
    bag = make_bag()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            bag(skewed_ids(generator))
    assert bag.stats.evictions > 100 and bag.stats.rows_written_back == 0


# ---- state ----------------------------------------------------------------------------------------------------------


def test_state_dict_has_torchs_keys(optimizer):
    """param_groups and per-parameter keys are those of the torch class of the running torch, tables in id order."""
    bag, trained = trained_bag(lambda parameters: make_optimizer(optimizer, parameters))
    plain = plain_model(bag)
    twin = TORCH[optimizer](plain.parameters(), lr=0.05)
    if optimizer != "SGD":
        plain.weight.grad = torch.zeros_like(plain.weight)
        twin.step()
    ours, theirs = trained.state_dict(), twin.state_dict()
    assert [group.keys() for group in ours["param_groups"]] == [group.keys() for group in theirs["param_groups"]]
    state, expected = by_index(ours), by_index(theirs)
    assert state.keys() == expected.keys()
    for name in state:
        per_row = optimizer == "RowWiseAdagrad" and name == "sum"
        assert state[name].shape == ((NUM_ROWS,) if per_row else expected[name].shape), name


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_training_goes_on_in_torch_and_back(name):
    """Our state loads into torch's class over nn.EmbeddingBag, trains on there, and comes back: as never left."""
    stay, stay_optimizer = trained_bag(lambda parameters: make_optimizer(name, parameters))
    bag, trained = trained_bag(lambda parameters: make_optimizer(name, parameters))
    plain = plain_model(bag)
    saved = copy.deepcopy(trained.state_dict())
    twin = FOREIGN[name](plain.parameters(), lr=0.05)
    twin.load_state_dict(optim.to_sparse_adam(saved) if name == "Adam" else saved)
    train(plain, twin, 10, start=30)
    train(stay, stay_optimizer, 20, start=30)

    back = make_bag(seed=9)
    back.load_state_dict(plain.state_dict())
    optimizer = make_optimizer(name, back.parameters())
    saved = copy.deepcopy(twin.state_dict())
    if name == "Adam":
        saved["param_groups"] = trained.state_dict()["param_groups"]
    optimizer.load_state_dict(saved)
    train(back, optimizer, 10, start=40)
    assert back.stats.evictions > 0
    for ours, expected in zip(everything(back, optimizer), everything(stay, stay_optimizer), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_resume_is_bit_equal(optimizer, policy):
    """state_dict of bag and optimizer into fresh ones of other size and policy: the same bits as unbroken training."""
    stay, stay_optimizer = trained_bag(lambda parameters: make_optimizer(optimizer, parameters), evict_strategy=policy)
    saved = copy.deepcopy((stay.state_dict(), stay_optimizer.state_dict()))
    bag = make_bag(60, seed=9, evict_strategy="lru")
    trained = make_optimizer(optimizer, bag.parameters())
    bag.load_state_dict(saved[0])
    trained.load_state_dict(saved[1])
    for model, stepped in ((stay, stay_optimizer), (bag, trained)):
        train(model, stepped, 15, start=30)
    assert bag.stats.evictions > 0
    assert_same_bits(everything(bag, trained), everything(stay, stay_optimizer))


@pytest.mark.parametrize("name", ["Adagrad", "Adam"])
def test_adapted_optimizer_resumes(name):
    """torch's optimizer over a block: its state_dict is logical, and a loaded state is imported, not dropped."""
    stay, stay_optimizer = trained_bag(lambda parameters: FOREIGN[name](parameters, lr=0.05))
    saved = copy.deepcopy((stay.state_dict(), stay_optimizer.state_dict()))
    column = "sum" if name == "Adagrad" else "exp_avg"
    assert by_index(saved[1])[column].shape == (NUM_ROWS, DIM)
    bag = make_bag(60, seed=9)
    bag.load_state_dict(saved[0])
    optimizer = FOREIGN[name](bag.parameters(), lr=0.05)
    optimizer.load_state_dict(saved[1])
    for model, stepped in ((stay, stay_optimizer), (bag, optimizer)):
        train(model, stepped, 15, start=30)
    assert bag.stats.evictions > 0
    assert_same_bits(everything(bag, optimizer), everything(stay, stay_optimizer))


@pytest.mark.parametrize("make", [torch.optim.Adagrad, optim.Adagrad])
def test_initial_accumulator_value_initialises_the_column(make):
    """Adagrad's initial sum reaches rows that are fetched later, and torch's full-size tensor is let go."""
    bag = make_bag()
    optimizer = make(bag.parameters(), lr=0.05, initial_accumulator_value=0.5)
    plain = plain_model(bag)
    twin = torch.optim.Adagrad(plain.parameters(), lr=0.05, initial_accumulator_value=0.5)
    for model, stepped in ((bag, optimizer), (plain, twin)):
        train(model, stepped)
    assert bag.stats.evictions > 0
    torch.testing.assert_close(bag.logical_weight(), plain.weight.detach())
    torch.testing.assert_close(by_index(optimizer.state_dict())["sum"], by_index(twin.state_dict())["sum"])
    assert "sum" not in optimizer.state[bag.weight]


@pytest.mark.parametrize("optimizer", ["Adagrad", "RowWiseAdagrad", "Adam"])
def test_state_of_another_table_is_refused(optimizer):
    """Wrong shapes raise before anything was changed."""
    other = make_bag(num_rows=100)
    other_optimizer = make_optimizer(optimizer, other.parameters())
    other(torch.tensor([[1]])).sum().backward()
    other_optimizer.step()
    bag, trained = trained_bag(lambda parameters: make_optimizer(optimizer, parameters))
    before = everything(bag, trained)
    with pytest.raises(ValueError, match="100"):
        trained.load_state_dict(other_optimizer.state_dict())
    assert_same_bits(everything(bag, trained), before)


def test_loading_a_state_without_the_table_resets_it(optimizer):
    """A state saved before the first step brings the rows' state back to its start."""
    bag = make_bag()
    trained = make_optimizer(optimizer, bag.parameters())
    start = copy.deepcopy(trained.state_dict())
    table = bag.state_dict()
    train(bag, trained)
    first = everything(bag, trained)
    trained.load_state_dict(start)
    bag.load_state_dict(table)
    train(bag, trained)
    assert bag.stats.evictions > 0
    assert_same_bits(everything(bag, trained), first)


def test_new_optimizer_of_the_same_kind_starts_afresh(optimizer):
    """As in torch, a new optimizer knows nothing of the old one's state; the old one may not step any more."""
    bag, old = trained_bag(lambda parameters: make_optimizer(optimizer, parameters))
    fresh = make_bag(seed=9)
    fresh.load_state_dict(bag.state_dict())
    pairs = [(model, make_optimizer(optimizer, model.parameters())) for model in (bag, fresh)]
    for model, stepped in pairs:
        train(model, stepped, 10)
    assert_same_bits(everything(*pairs[0]), everything(*pairs[1]))
    bag(torch.tensor([[1]])).sum().backward()
    with pytest.raises(RuntimeError, match="replaced"):
        old.step()


@pytest.mark.parametrize("make", [optim.Adagrad, optim.Adam, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_optimizer_copied_with_its_model_does_not_step_without_its_state(make):
    """A copy of model and optimizer: the rows of the copy have no optimizer state, so its step raises, saying so."""
    bag, optimizer = trained_bag(lambda parameters: make(parameters, lr=0.05))
    twin, twin_optimizer = copy.deepcopy((bag, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is twin.weight
    twin(torch.tensor([[1]])).sum().backward()
    with pytest.raises(RuntimeError, match="deep copy"):
        twin_optimizer.step()
    twin.zero_grad()
    fresh = make(twin.parameters(), lr=0.05)
    restarted = make_bag(seed=9)
    restarted.load_state_dict(bag.state_dict())
    restarted_optimizer = make(restarted.parameters(), lr=0.05)
    train(twin, fresh, 10)
    train(restarted, restarted_optimizer, 10)
    assert_same_bits(everything(twin, fresh), everything(restarted, restarted_optimizer))


def test_another_kind_of_optimizer_is_refused_until_the_state_is_dropped():
    """The records hold one kind's state; drop_optimizer_state() makes room for another."""
    bag, _ = trained_bag(lambda parameters: make_optimizer("Adagrad", parameters))
    with pytest.raises(ValueError, match="drop_optimizer_state"):
        make_optimizer("Adam", bag.parameters())
    table = bag.logical_weight()
    bag.drop_optimizer_state()
    assert torch.equal(bag.logical_weight(), table)
    train(bag, make_optimizer("Adam", bag.parameters()), 10)
    reserved = make_bag(optimizer="adagrad")
    with pytest.raises(ValueError, match="adagrad"):
        make_optimizer("SGD", reserved.parameters())


def test_large_state_is_not_handed_out_as_one_tensor():
    """Above max_state_dict_bytes the optimizer's state_dict refuses and names the way out."""
    bag, trained = trained_bag(lambda parameters: make_optimizer("Adagrad", parameters))
    bag.max_state_dict_bytes = NUM_ROWS * DIM * 4 - 1
    for refused in (trained.state_dict, bag.state_dict, bag.logical_weight):
        with pytest.raises(ValueError, match="checkpoint"):
            refused()


def test_one_optimizer_serves_dense_and_tables(optimizer):
    """Dense parameters beside a table follow torch's own rule, bit for bit, also when torch's own class is in use."""
    torch.manual_seed(1)
    dense = nn.Linear(DIM, 2)
    twin = copy.deepcopy(dense)
    bag = make_bag()
    trained = make_optimizer(optimizer, [*bag.parameters(), *dense.parameters()])
    expected = TORCH[optimizer](twin.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        pooled = bag(skewed_ids(generator))
        dense(pooled).square().mean().backward()
        twin(pooled.detach()).square().mean().backward()
        for stepped in (trained, expected):
            stepped.step()
            stepped.zero_grad()
    assert bag.stats.evictions > 0
    assert_same_bits(list(dense.parameters()), list(twin.parameters()))


def test_user_hooks_fire_once_per_step():
    """Step hooks on our optimizer fire once, although torch's own step runs inside."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # makes torch wrap its SGD.step
    bag = make_bag()
    dense = nn.Parameter(torch.ones(2))
    trained = make_optimizer("SGD", [bag.weight, dense])
    fired = []
    trained.register_step_pre_hook(lambda *_: fired.append("pre"))
    trained.register_step_post_hook(lambda *_: fired.append("post"))
    (bag(torch.tensor([[1]])).sum() + dense.sum()).backward()
    trained.step()
    assert fired == ["pre", "post"]


def test_table_given_twice_is_refused():
    """The same table in two groups would be stepped twice."""
    bag = make_bag()
    with pytest.raises(ValueError, match="more than"):
        make_optimizer("SGD", [{"params": [bag.weight]}, {"params": [bag.weight]}])


def test_table_added_later():
    """add_param_group binds a table as the constructor does."""
    bag = make_bag(FEW_SLOTS)
    trained = make_optimizer("Adagrad", [nn.Parameter(torch.ones(1))])
    trained.add_param_group({"params": bag.parameters(), "lr": 0.05})
    train(bag, trained)
    other, other_optimizer = trained_bag(lambda parameters: make_optimizer("Adagrad", parameters))
    assert bag.stats.evictions > 0
    assert torch.equal(bag.logical_weight(), other.logical_weight()) and other_optimizer is not None
