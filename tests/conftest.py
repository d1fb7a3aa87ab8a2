"""Shared by all tests: hypothesis profile, the axes that equivalence tests run over, small worlds that must evict."""

import os
import warnings

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Small tensors: a second thread only waits here (much longer where the machine is shared). One test compares threads.
torch.set_num_threads(1)

LONGEST_FILES = (
    "test_launch.py",
    "test_integration.py",
    "test_device_cache.py",
    "test_cuda_kernels.py",
    "test_device_walk.py",
)
KERNEL_SETS = ("cpu", "torch")
POLICIES = ("dataset", "lfu", "lru", "s3fifo", "lookahead")
OPTIMIZERS = ("SGD", "Adagrad", "RowWiseAdagrad", "Adam")


def pytest_collection_modifyitems(items):
    """Tests of four ranks have a marker, by which the second environment leaves them out. The longest files come first.

    (Where two workers share the files, one of them would else be left with the launches at the end.)
    """
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)
    for item in items:
        if "4ranks" in item.nodeid:
            item.add_marker("four_ranks")


@pytest.fixture(params=KERNEL_SETS)
def kernels(request) -> str:
    """Each kernel set in turn."""
    return request.param


@pytest.fixture(params=POLICIES)
def policy(request) -> str:
    """Each eviction policy in turn."""
    return request.param


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request) -> str:
    """The name of each of our optimizers in turn."""
    return request.param


@pytest.fixture(autouse=True)
def growth_is_an_error():
    """A cache that grows in a test that did not mean it evicts less than the test believes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*it grows to.*")
        yield
