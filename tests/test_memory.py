"""python -m pytest tests/test_memory.py

Proves that memory is handed out again only when nothing refers to it: no array, no view, no tensor, no graph; and that
that large arrays start on a cache line.
"""

import gc

import numpy as np
import pytest
import torch

from colossal_freqcache.memory import MOST_KEPT, SMALLEST, RecycledArrays, aligned_empty

SIZE = SMALLEST  # float32 elements: four times the bytes from which on arrays are kept


@pytest.fixture
def arrays():
    return RecycledArrays()


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 33)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_arrays_start_on_a_cache_line(arrays, shape, dtype):
    for array in (aligned_empty(shape, dtype), arrays.take((SMALLEST, *shape), dtype)[0]):
        assert array.shape == shape and array.dtype == dtype and address(array) % 64 == 0
        assert array.flags.c_contiguous and array.flags.writeable


def test_the_memory_of_an_array_that_is_gone_is_used_again(arrays):
    array = arrays.take((SIZE,), np.float32)
    first = address(array)
    del array
    again = arrays.take((SIZE // 8, 8), np.float32)
    assert address(again) == first
    assert address(arrays.take((SIZE,), np.float32)) != first


def keep_tensor(array):
    return torch.from_numpy(array)


def keep_view_of_tensor(array):
    return torch.from_numpy(array)[3:5]


def keep_array_of_tensor(array):
    return torch.from_numpy(array).numpy()[:2]


def keep_slice(array):
    return array[1:3].reshape(2)


def keep_storage(array):
    return torch.from_numpy(array).untyped_storage()


def keep_graph(array):
    """The backward of a product keeps its factors."""
    leaf = torch.ones(SIZE, requires_grad=True)
    return (leaf * torch.from_numpy(array)).sum()


def keep_dlpack(array):
    return torch.from_dlpack(torch.from_numpy(array))


KEEPERS = [keep_tensor, keep_view_of_tensor, keep_array_of_tensor, keep_slice, keep_storage, keep_graph, keep_dlpack]


@pytest.mark.parametrize("keep", KEEPERS)
def test_whoever_keeps_a_part_keeps_it_all(arrays, keep):
    first = arrays.take((SIZE,), np.float32)
    where = address(first)
    first[:] = 1
    kept = keep(first)
    del first
    gc.collect()
    for _ in range(2 * MOST_KEPT):
        other = arrays.take((SIZE,), np.float32)
        assert address(other) != where
        other[:] = 2
    if not isinstance(kept, torch.UntypedStorage):
        assert float(kept.sum()) == (SIZE if kept.shape in ((), (SIZE,)) else kept.shape[0])
    del kept
    gc.collect()
    taken = [arrays.take((SIZE,), np.float32) for _ in range(2)]
    assert where in map(address, taken) or arrays.num_bytes()  # it may have been dropped as the oldest


def test_what_is_kept_is_bounded(arrays):
    """Whatever the sizes asked for: 8 arrays, and none of more than 9/8 of what was asked."""
    for size in (SIZE, 10 * SIZE, 3 * SIZE, *range(SIZE, 20 * SIZE, SIZE)):
        arrays.take((size,), np.float32)
        assert arrays.num_bytes() <= MOST_KEPT * (4 * 20 * SIZE * 9 // 8 + 64)
    alive = [arrays.take((SIZE,), np.float32) for _ in range(3 * MOST_KEPT)]
    assert len({address(array) for array in alive}) == len(alive)
    assert arrays.num_bytes() <= MOST_KEPT * (4 * SIZE * 9 // 8 + 64)


def test_small_arrays_are_not_kept(arrays):
    for _ in range(3):
        arrays.take((SMALLEST // 4 - 1,), np.float32)
    assert arrays.num_bytes() == 0
