"""A long random walk of a device cache with interpreted Triton kernels: a file of its own, since it takes a while.

    python -m pytest tests/test_device_walk.py

Proves: over 1,000 random operations (training in parts, two graphs alive, evaluations, prefetches, flushes, batches
that are refused) every output is the plain table's, what is refused changes nothing, and all invariants hold.
"""

import device_worlds
import pytest
import torch

pytest.register_assert_rewrite("device_cases")
device_worlds.problem_with_interpreter()  # before torch imports Triton, for its own compiler

from device_cases import ROWS, Walk  # noqa: E402


def test_a_thousand_random_operations(monkeypatch):
    """Most of the slots are in use at any time, so that rows leave at nearly every step."""
    world = device_worlds.cpu_world("triton", monkeypatch)
    mapping = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    walk = Walk(world, 5, ids_freq_mapping=mapping).go(1000)
    assert walk.bag.stats.evictions > 500 and walk.refused > 0
