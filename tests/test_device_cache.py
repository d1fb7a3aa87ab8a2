"""A cache whose maps are on the training device, run on a CPU: with the plain twin, and interpreted Triton kernels.

    python -m pytest tests/test_device_cache.py

Proves: over random operations every output and the whole table are a plain table's; cached bits are resident bits for
optimizers, modes and policies, with and without a Lookahead; results are as right as torch's; table and state move
between devices; what is refused, or fails in a store, changes nothing; nothing on the device grows with the rows; every
argument means what it means on a CPU.
Not covered: streams, pinned memory and what a compiler does with the kernels: `tests/gpu`.
"""

import os
import subprocess
import sys

import device_worlds
import pytest

pytest.register_assert_rewrite("device_cases")
device_worlds.problem_with_interpreter()  # before torch imports Triton, for its own compiler

from device_cases import *  # noqa: E402, F403  (the tests)
from device_cases import Walk, cached_equals_resident  # noqa: E402

# What goes through the kernels in ways of its own; the others are about the host's part, and take the twin alone.
INTERPRETED = (
    "test_a_collection",
    "test_a_row_of_many_positions",
    "test_arguments_of_embedding_bag",
    "test_as_right_as_torch",
    "test_batches_without_ids",
    "test_cached_bits_are_resident_bits",
    "test_lookahead_gives_the_same_bits",
    "test_rows_moved_by_way_of_the_host",
    "test_several_graphs_and_micro_batches",
)


def pytest_generate_tests(metafunc):
    """The kernel sets of a device cache on the CPU."""
    if "world" in metafunc.fixturenames:
        sets = ["twin", "triton"] if metafunc.function.__name__ in INTERPRETED else ["twin"]
        metafunc.parametrize("world", sets, indirect=True)


@pytest.fixture
def world(request, monkeypatch):
    """One of them."""
    return device_worlds.cpu_world(request.param, monkeypatch)


@pytest.fixture
def twin(monkeypatch):
    """The plain one."""
    return device_worlds.cpu_world("twin", monkeypatch)


@pytest.mark.parametrize("policy", ["dataset", "lru", "lfu"])
@pytest.mark.parametrize("with_counts", [False, True])
def test_a_long_random_walk(policy, with_counts, twin):
    """2,000 random operations each."""
    mapping = list(range(40)) if with_counts else None
    walk = Walk(twin, 1, evict_strategy=policy, ids_freq_mapping=mapping).go(2000)
    assert walk.bag.stats.evictions > 1000 and walk.refused > 0


@pytest.mark.parametrize("policy", ["dataset", "lru", "lfu"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_cached_bits_of_every_combination(mode, fused, policy, optimizer, twin):
    """Four optimizers, three modes, three policies, trained in the backward or after it."""
    cached_equals_resident(twin, optimizer, mode, fused, policy, True, steps=40)


def test_kernels_that_a_device_does_not_have():
    """The CPU's set is none of a device's; the message lists them."""
    import torch

    from colossal_freqcache.kernels import make_device_kernels

    for name in ("cpu", "tpu"):
        with pytest.raises(ValueError, match=f"{name}.*'auto', 'cuda' or 'torch'"):
            make_device_kernels(name, torch.device("cuda"))


def test_cuda_kernels_on_a_cpu_say_why_they_do_not_run():
    """Without Triton's interpreter."""
    code = "from colossal_freqcache import FreqAwareEmbeddingBag as B; B(50, 4, num_slots=9, kernels='cuda')"
    environment = {name: value for name, value in os.environ.items() if name != device_worlds.INTERPRET}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError") and "kernels='cuda' on cpu" in last and "Triton" in last
    assert "torch" in last
