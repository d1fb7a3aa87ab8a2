"""RowOrder: id <-> row is a bijection, the most frequent id first, ties by id.

python -m pytest tests/test_row_order.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from colossal_freqcache import FreqAwareEmbeddingBag
from colossal_freqcache.row_order import RowOrder

counts_strategy = st.one_of(
    hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 5)),
    hnp.arrays(np.int64, st.integers(1, 60), elements=st.sampled_from([0, 1, 2**16 - 1])),
    hnp.arrays(np.int64, st.integers(1, 60), elements=st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**62])),
    hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1e12)),
)


@given(counts_strategy)
def test_is_a_bijection_by_falling_count_and_rising_id(counts):
    num_rows = counts.size
    order = RowOrder.from_counts(counts, num_rows)
    ids = np.arange(num_rows, dtype=np.int64)
    rows = order.rows(ids)
    assert sorted(rows.tolist()) == list(range(num_rows))
    assert np.array_equal(order.ids(rows), ids) and np.array_equal(order.rows(order.ids(ids)), ids)
    expected = sorted(range(num_rows), key=lambda number: (-counts[number], number))
    assert order.ids(ids).tolist() == expected


def test_identity_without_counts_holds_no_array():
    order = RowOrder.from_counts(None, 10**12)
    ids = np.array([0, 5, 10**12 - 1])
    assert np.array_equal(order.rows(ids), ids) and np.array_equal(order.ids(ids), ids)
    assert order.row_of_id is None and order.num_bytes() == 0


def test_maps_take_four_bytes_each_and_give_int64():
    order = RowOrder.from_counts(np.arange(10), 10)
    assert order.num_bytes() == 2 * 4 * 10
    assert order.rows(np.array([0])).dtype == order.ids(np.array([0])).dtype == np.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8, np.float32])
def test_the_type_of_the_counts_does_not_matter(dtype):
    """Unsigned counts must not wrap when they are sorted downwards."""
    counts = np.array([0, 3, 1, 0, 2], dtype)
    assert RowOrder.from_counts(counts, 5).ids(np.arange(5)).tolist() == [1, 4, 2, 0, 3]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])
def test_counts_of_any_type_order_the_rows_of_a_bag(dtype):
    """The ids that are most frequent are resident from the start."""
    counts = torch.tensor([0, 3, 1, 0, 2], dtype=dtype)
    bag = FreqAwareEmbeddingBag(5, 2, num_slots=2, ids_freq_mapping=counts)
    assert sorted(bag._cache.slots.id_of_slot.tolist()) == [1, 4]


def test_sums_of_decayed_counts_order_too():
    order = RowOrder.from_counts(np.array([0.25, 0.5, 0.25, 0.0]), 4)
    assert order.ids(np.arange(4)).tolist() == [1, 0, 2, 3]
