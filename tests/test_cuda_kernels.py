"""The Triton kernels against their plain twin, run by Triton's interpreter on a CPU.

    python -m pytest tests/test_cuda_kernels.py

Proves: every kernel gives the twin's integers exactly and its floats as far as one order of operations is possible, for
empty batches, one id, all ids equal (a row summed in chunks), batches that fill the cache, padding, several tables,
widths from 1 to 257, both types, offsets beyond 2**31 elements; training in the backward leaves the bits of training
after it; the hash table holds what a dictionary holds, at full load.
Not covered: what a compiler does with them, and races: `tests/gpu`.
"""

import device_worlds
import pytest
import torch

pytest.register_assert_rewrite("device_kernel_cases")

from device_kernel_cases import *  # noqa: E402, F403  (the tests)

pytestmark = pytest.mark.skipif(
    device_worlds.problem_with_interpreter() is not None, reason=str(device_worlds.problem_with_interpreter())
)


@pytest.fixture(autouse=True)
def interpreting(monkeypatch):
    """Triton's variable is set while these tests run, and not for others."""
    monkeypatch.setenv(device_worlds.INTERPRET, "1")


@pytest.fixture
def device() -> torch.device:
    """Where the tensors are."""
    return torch.device("cpu")
