"""The block's shape, copies, casts and modes. `pytest tests/test_mechanics_block.py`

Proves: the Parameter keeps its shape and identity except where a change is safe; limits count weight and state;
what is made in inference mode serves training; copies are copies of the logical table; casts and pickles are refused.
"""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from worlds import (
    DIM,
    FEW_SLOTS,
    NUM_ROWS,
    assert_same_bits,
    counts,
    everything,
    loss_of,
    make_bag,
    make_optimizer,
    skewed_ids,
)

from colossal_freqcache import CacheTooSmallError, optim

ROW = DIM * 4  # bytes of one row's weight


def train(bag, optimizer, steps=20, seed=4):
    """`steps` steps on a fixed stream."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss_of(bag(skewed_ids(generator))).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_ceiling_is_the_shape_and_growth_does_not_change_it():
    """weight.shape[0] is the ceiling from the start; growth with a graph in flight leaves Parameter and graph alone."""
    bag = make_bag(8, evict_strategy="lru")
    resident = make_bag(NUM_ROWS)
    parameter, shape = bag.weight, bag.weight.shape
    assert shape == (4 * 8, DIM) and bag.num_slots == 8
    optimizers = [make_optimizer("Adagrad", one.parameters()) for one in (bag, resident)]
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="it grows to") as warned:
        for step in range(20):
            ids, more = skewed_ids(generator, (2, 3)), skewed_ids(generator, (1 + step // 4, 4))
            for one, optimizer in zip((bag, resident), optimizers, strict=True):
                out = one(ids)
                loss_of(torch.cat([out, one(more)])).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert len([w for w in warned if "grows" in str(w.message)]) == 1
    assert bag.stats.growths > 1 and bag.stats.evictions > 0 and 8 < bag.num_slots <= 32
    assert bag.weight is parameter and bag.weight.shape == shape
    assert_same_bits(everything(bag, optimizers[0]), everything(resident, optimizers[1]))


def test_limit_counts_weight_alone_then_weight_and_state():
    """max_cache_bytes is a limit in bytes: binding Adagrad halves the slots; what is resident never passes it."""
    bag = make_bag(None, max_cache_bytes=60 * ROW)
    assert bag.num_slots == bag.weight.shape[0] == 60
    optimizer = make_optimizer("Adagrad", bag.parameters())
    assert bag.num_slots == bag.weight.shape[0] == 30
    train(bag, optimizer)
    assert bag.stats.evictions > 0
    assert bag.device_bytes()["cache"] == bag.num_slots * 2 * ROW <= 60 * ROW


def test_reserving_state_up_front_needs_no_relayout(optimizer):
    """optimizer= makes the records as wide as binding would: the block stays the same memory."""
    name = {"SGD": "sgd", "Adagrad": "adagrad", "RowWiseAdagrad": "rowwise_adagrad", "Adam": "adam"}[optimizer]
    bag = make_bag(optimizer=name)
    memory = bag.weight.data_ptr()
    trained = make_optimizer(optimizer, bag.parameters())
    assert bag.weight.data_ptr() == memory
    late = make_bag()
    late_trained = make_optimizer(optimizer, late.parameters())
    for one, stepped in ((bag, trained), (late, late_trained)):
        train(one, stepped)
    assert bag.stats.evictions > 0
    assert_same_bits(everything(bag, trained), everything(late, late_trained))


def test_binding_that_changes_the_shape_needs_quiet():
    """While a graph or a gradient is alive the number of slots cannot change: it raises, and works afterwards."""
    bag = make_bag(None, max_cache_bytes=60 * ROW)
    shape = bag.weight.shape
    out = bag(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="60 to 30"):
        make_optimizer("Adagrad", bag.parameters())
    out.sum().backward()
    del out
    with pytest.raises(RuntimeError, match="60 to 30"):
        make_optimizer("Adagrad", bag.parameters())
    assert bag.weight.shape == shape
    bag.zero_grad()
    train(bag, make_optimizer("Adagrad", bag.parameters()))
    assert bag.stats.evictions > 0


def test_foreign_optimizer_keeps_the_shape_and_respects_the_limit():
    """Bound at its first step, torch's Adagrad may not shrink the block: it raises and names optimizer=."""
    bag = make_bag(None, max_cache_bytes=60 * ROW)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=0.05)
    bag(torch.tensor([[1, 2]])).sum().backward()
    before, layout = bag.logical_weight(), bag._cache.layout
    with pytest.raises(ValueError, match="optimizer="):
        optimizer.step()
    assert torch.equal(bag.logical_weight(), before) and bag._cache.layout == layout
    reserved = make_bag(None, max_cache_bytes=60 * ROW, optimizer="adagrad")
    shape = reserved.weight.shape
    train(reserved, torch.optim.Adagrad(reserved.parameters(), lr=0.05))
    assert reserved.weight.shape == shape == (30, DIM) and reserved.stats.evictions > 0


def test_foreign_optimizer_is_bound_in_the_middle_of_a_step():
    """Its first step re-lays the records out while gradients hold slots: the rows stay where they are."""
    bag = make_bag(FEW_SLOTS)
    resident = make_bag(NUM_ROWS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            bag(skewed_ids(generator))
    assert bag.stats.evictions > 0
    optimizers = [torch.optim.Adagrad(one.parameters(), lr=0.05) for one in (bag, resident)]
    for one, optimizer in zip((bag, resident), optimizers, strict=True):
        train(one, optimizer)
    assert_same_bits(everything(bag, optimizers[0]), everything(resident, optimizers[1]))


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16"])
def test_casts_are_refused(cast):
    """A change of dtype would leave the store behind: it raises and says how to build the table instead."""
    bag = make_bag()
    with pytest.raises(TypeError, match="dtype"):
        getattr(bag, cast)()
    assert bag.to("cpu") is bag and bag.float() is bag and bag.to(torch.float32) is bag


def test_moves_are_refused_while_no_accelerator_is_supported():
    """Other devices and shared memory raise instead of leaving half of the table behind."""
    bag = make_bag()
    with pytest.raises(NotImplementedError, match="device="):
        bag.to("meta")
    with pytest.raises(NotImplementedError, match="shared"):
        bag.share_memory()
    assert torch.equal(bag(torch.tensor([[1]])), bag(torch.tensor([[1]])))


def test_model_around_a_bag_is_moved_and_put_to_eval():
    """nn.Module calls on a parent work: to(cpu), train, eval, apply, zero_grad."""
    model = torch.nn.Sequential(make_bag(), torch.nn.Linear(DIM, 1))
    model.to("cpu").eval().train().apply(lambda module: None)
    model(torch.tensor([[1, 2]])).sum().backward()
    model.zero_grad()
    assert model[0].weight.grad is None


def test_inference_mode_first_then_training(kernels):
    """First forward, growth and eviction in inference mode leave nothing behind that training cannot use."""
    bag = make_bag(4, evict_strategy="lru", kernels=kernels)
    resident = make_bag(NUM_ROWS, kernels=kernels)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), pytest.warns(UserWarning, match="it grows to"):
        for _ in range(6):
            out = bag(skewed_ids(generator, (5, 3)))
            assert out.is_inference()
        bag.prefetch(torch.tensor([1, 2]))
        bag.flush()
    assert bag.stats.growths > 0 and bag.stats.evictions > 0
    optimizers = [make_optimizer("Adagrad", one.parameters()) for one in (bag, resident)]
    for one, optimizer in zip((bag, resident), optimizers, strict=True):
        stream = torch.Generator().manual_seed(1)
        for _ in range(20):
            loss_of(one(skewed_ids(stream, (4, 3)))).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.inference_mode():
                one(skewed_ids(stream, (4, 3)))
    assert_same_bits(everything(bag, optimizers[0]), everything(resident, optimizers[1]))


def test_built_in_inference_mode(kernels):
    """A bag built in inference mode trains like any other."""
    with torch.inference_mode():
        bag = make_bag(kernels=kernels)
    optimizer = make_optimizer("Adagrad", bag.parameters())
    train(bag, optimizer)
    other = make_bag(kernels=kernels)
    other_optimizer = make_optimizer("Adagrad", other.parameters())
    train(other, other_optimizer)
    assert bag.stats.evictions > 0
    assert_same_bits(everything(bag, optimizer), everything(other, other_optimizer))


def test_deepcopy_copies_the_logical_table():
    """The copy has the newest values and trains apart; frozenness and rows' order are kept."""
    bag = make_bag(ids_freq_mapping=counts())
    train(bag, make_optimizer("Adagrad", bag.parameters()))
    assert bag.stats.evictions > 0 and bag._cache.slots.marked(bag._cache.slots.DIRTY).any()
    twin = copy.deepcopy(bag)
    assert twin.weight is not bag.weight
    table = bag.logical_weight()
    assert torch.equal(twin.logical_weight(), table)
    train(twin, make_optimizer("Adagrad", twin.parameters()))
    assert twin.stats.evictions > 0
    assert torch.equal(bag.logical_weight(), table) and not torch.equal(twin.logical_weight(), table)
    bag.weight.requires_grad_(False)
    assert not copy.deepcopy(bag).weight.requires_grad


def test_deepcopy_of_a_large_table_is_refused_with_its_bytes():
    """Above the limit a copy would silently double the table."""
    bag = make_bag()
    bag.max_state_dict_bytes = NUM_ROWS * ROW - 1
    with pytest.raises(ValueError, match=str(NUM_ROWS * ROW)):
        copy.deepcopy(bag)


def test_pickling_is_refused():
    """pickle and torch.save of the module raise and name state_dict()."""
    for save in (pickle.dumps, lambda bag: torch.save(bag, io.BytesIO()), copy.copy):
        with pytest.raises(TypeError, match="state_dict"):
            save(make_bag())


def test_init_reaches_every_row():
    """init_ fills resident and evicted rows alike; optimizer state stays."""
    bag = make_bag(ids_freq_mapping=counts())
    optimizer = make_optimizer("Adagrad", bag.parameters())
    train(bag, optimizer)
    sums = everything(bag, optimizer)[-1]
    bag.init_(lambda values: values.fill_(0.5))
    assert torch.equal(bag.logical_weight(), torch.full((NUM_ROWS, DIM), 0.5))
    assert torch.equal(everything(bag, optimizer)[-1], sums) and sums.abs().sum() > 0
    assert torch.equal(bag(torch.tensor([[0], [199]])), torch.full((2, DIM), 0.5))
    bag._cache.check()


def test_load_in_the_middle_of_a_gradient_is_what_the_next_forward_sees():
    """load_state_dict reaches dirty resident rows; the weights' gradient of an older graph then raises."""
    bag = make_bag()
    bag.weight.requires_grad_(False)
    weights = torch.ones(1, 2, requires_grad=True)
    out = bag(torch.tensor([[1, 2]]), per_sample_weights=weights)
    bag.load_state_dict({"weight": torch.ones(NUM_ROWS, DIM)})
    assert torch.equal(bag(torch.tensor([[1]])), torch.ones(1, DIM))
    with pytest.raises(RuntimeError, match="updated"):
        out.sum().backward()


def test_a_bag_is_let_go():
    """Nothing that torch or the hooks hold keeps a trained bag's table alive once the bag is gone."""
    bag = make_bag()
    optimizer = make_optimizer("Adagrad", bag.parameters())
    train(bag, optimizer)
    held = weakref.ref(bag._cache)
    del bag, optimizer
    gc.collect()
    assert held() is None


def test_too_large_a_batch_changes_nothing():
    """CacheTooSmallError comes before any change, with the numbers; training goes on."""
    bag = make_bag(6, max_cache_bytes=6 * ROW, evict_strategy="lru")
    optimizer = optim.SGD(bag.parameters(), lr=0.1)
    bag(torch.tensor([[0, 1, 2, 3]])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [bag._cache.slots.id_of_slot.clone(), bag._cache.slots.marks.clone(), bag.logical_weight()]
    with pytest.raises(CacheTooSmallError, match="7 rows"):
        bag(torch.arange(10, 17).unsqueeze(0))
    assert_same_bits([bag._cache.slots.id_of_slot, bag._cache.slots.marks, bag.logical_weight()], before)
    bag._cache.check()
    bag(torch.arange(6).unsqueeze(0)).sum().backward()
    optimizer.step()
    bag._cache.check()
