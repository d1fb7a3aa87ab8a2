"""SlotTable: the maps between ids, rows and slots stay one bijection, whatever is admitted, evicted, pinned or grown.

    python -m pytest tests/test_slots.py

Proves, on random operations with `check()` after each: the maps are those of a plain dict, no slot is handed out
twice, slots given back are used again, growth keeps everything; and that `check()` notices each kind of damage.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colossal_freqcache.kernels import KERNEL_SETS, make_kernels
from colossal_freqcache.row_order import RowOrder
from colossal_freqcache.slots import FREE, SlotTable

NUM_ROWS = 40


def order_of(known):
    return RowOrder.from_counts(np.random.default_rng(3).permutation(NUM_ROWS) if known else None, NUM_ROWS)


def admit(table, order, ids):
    ids = np.array(ids, np.int64)
    taken = table.take_free(ids.size)
    table.admit(ids, order.rows(ids), taken)
    return taken


@given(
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["admit", "abort", "evict", "grow", "pin", "unpin", "dirty"]), st.integers(1, 12))
    ),
    st.randoms(use_true_random=False),
)
def test_random_operations_against_a_dict(known, operations, random):
    """slot_of is what a dict would hold; `check()` after every operation."""
    order = order_of(known)
    table = SlotTable(5, NUM_ROWS, not known)
    kernels = make_kernels("torch")
    slot_of, pins = {}, {}
    for name, amount in operations:
        free_before = table.num_free
        if name in ("admit", "abort"):
            absent = [number for number in range(NUM_ROWS) if number not in slot_of]
            ids = random.sample(absent, min(amount, table.num_free, len(absent)))
            taken = table.take_free(len(ids))
            assert taken.dtype == np.int32 and len(set(taken.tolist())) == taken.size
            assert not set(taken.tolist()) & set(slot_of.values()), "an occupied slot was handed out"
            if name == "abort":
                table.give_back(taken)
            else:
                table.admit(np.array(ids, np.int64), order.rows(np.array(ids, np.int64)), taken)
                slot_of |= dict(zip(ids, taken.tolist(), strict=True))
        elif name == "evict":
            loose = [number for number in slot_of if not pins.get(slot_of[number])]
            ids = random.sample(loose, min(amount, len(loose)))
            table.evict(np.array([slot_of.pop(number) for number in ids], np.int32))
        elif name == "grow":
            table.grow(table.num_slots + amount)
            assert table.num_free == free_before + amount
        elif name in ("pin", "unpin"):
            wanted = [s for s in slot_of.values() if name == "pin" or pins.get(s)]
            slots = random.sample(wanted, min(amount, len(wanted)))
            step = 1 if name == "pin" else -1
            table.num_pinned += kernels.add_pins(table.pins, torch.tensor(slots, dtype=torch.int32), step)
            for slot in slots:
                pins[slot] = pins.get(slot, 0) + step
        else:
            slots = random.sample(list(slot_of.values()), min(amount, len(slot_of)))
            table.mark(np.array(slots, np.int32), table.DIRTY)
        table.check(order.row_of_id)
        expected = np.zeros(NUM_ROWS, np.int64)
        for number, slot in slot_of.items():
            expected[number] = slot + 1
        assert np.array_equal(table.slot_of_id.numpy(), expected)
        assert table.num_used == len(slot_of) and table.num_free == table.num_slots - len(slot_of)
        assert table.num_pinned == sum(count > 0 for count in pins.values())
        for number, slot in slot_of.items():
            assert table.id_of_slot[slot] == number
            assert table.row_of_slot[slot] == order.rows(np.array([number]))[0]


def test_an_evicted_slot_is_clean_and_free():
    table = SlotTable(2, NUM_ROWS, True)
    slots = admit(table, order_of(False), [7, 8])
    table.mark(slots, table.DIRTY)
    table.evict(slots[:1])
    assert table.slot_of_id[7] == 0 and table.id_of_slot[slots[0]] == FREE and not table.marks[slots[0]]
    assert table.marks[slots[1]] == table.DIRTY and table.slot_of_id[8] == slots[1] + 1
    assert admit(table, order_of(False), [9]).tolist() == slots[:1].tolist()
    table.check()


def test_taking_more_than_is_free_and_evicting_a_pinned_slot_are_our_own_mistakes():
    table = SlotTable(3, NUM_ROWS, True)
    slots = admit(table, order_of(False), [1, 2])
    with pytest.raises(AssertionError):
        table.take_free(2)
    table.num_pinned += make_kernels("torch").add_pins(table.pins, torch.from_numpy(slots), 1)
    with pytest.raises(AssertionError):
        table.evict(slots[:1])
    table.check()


def test_growth_keeps_rows_marks_and_pins():
    order = order_of(True)
    table = SlotTable(3, NUM_ROWS, False)
    slots = admit(table, order, [4, 5, 6])
    table.mark(slots[:1], table.DIRTY)
    table.num_pinned += make_kernels("torch").add_pins(table.pins, torch.from_numpy(slots[1:]), 1)
    names = ("id_of_slot", "row_of_slot", "marks", "pins")
    before = {name: getattr(table, name).clone() for name in names}
    table.grow(8)
    for name, old in before.items():
        assert torch.equal(getattr(table, name)[:3], old), name
    assert table.num_free == 5
    assert set(admit(table, order, [10, 11, 12, 13, 14]).tolist()) == {3, 4, 5, 6, 7}
    table.check(order.row_of_id)


def test_one_array_serves_ids_and_rows_where_they_are_the_same():
    """Without counts no second map is held; bytes per slot are 9, with counts 13."""
    assert SlotTable(100, NUM_ROWS, True).num_bytes()["index"] == 9 * 100
    assert SlotTable(100, NUM_ROWS, False).num_bytes()["index"] == 13 * 100


def test_bytes_on_the_device_do_not_grow_with_the_table():
    small, large = SlotTable(10, 1000, False).num_bytes(), SlotTable(10, 100_000, False).num_bytes()
    assert {key: value for key, value in small.items() if "host" not in key} == {
        key: value for key, value in large.items() if "host" not in key
    }
    assert large["host_slot_of_id"] == 100 * small["host_slot_of_id"]


DAMAGE = {
    "a map that names the wrong slot": lambda t: t.slot_of_id.__setitem__(1, 3),
    "a row in two slots": lambda t: t.slot_of_id.__setitem__(30, 1),
    "a forgotten row": lambda t: t.slot_of_id.__setitem__(1, 0),
    "a free slot that is dirty": lambda t: t.marks.__setitem__(4, 1),
    "a free slot that is pinned": lambda t: t.pins.__setitem__(4, 1),
    "a negative pin": lambda t: t.pins.__setitem__(0, -1),
    "a pin that was not counted": lambda t: t.pins.__setitem__(0, 1),
    "prefetched without a pin": lambda t: t.marks.__setitem__(0, 2),
    "prepaid without being prefetched": lambda t: t.marks.__setitem__(0, 4),
    "a wrong count of slots": lambda t: setattr(t, "num_used", 2),
    "a wrong row": lambda t: t.row_of_slot.__setitem__(0, 39),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_notices(damage):
    order = order_of(True)
    table = SlotTable(5, NUM_ROWS, False)
    admit(table, order, [1, 2, 3])
    table.check(order.row_of_id)
    DAMAGE[damage](table)
    with pytest.raises(AssertionError):
        table.check(order.row_of_id)


@pytest.mark.parametrize("name", KERNEL_SETS)
def test_pins_count_holders(name):
    """A slot that two hold is in use until both let go; the count of pinned slots follows."""
    kernels = make_kernels(name)
    pins = torch.zeros(4, dtype=torch.int32)
    slots = torch.tensor([0, 2], dtype=torch.int32)
    assert kernels.add_pins(pins, slots, 1) == 2
    assert kernels.add_pins(pins, slots[:1], 1) == 0
    assert kernels.add_pins(pins, slots, -1) == -1
    assert kernels.add_pins(pins, slots[:1], -1) == -1
    assert kernels.add_pins(pins, slots[:0], 1) == 0
    assert not pins.any()
