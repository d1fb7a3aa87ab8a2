"""Small worlds for the tests: bags that must evict, batches, and training loops that record everything they produce.

Shapes: R rows, D width, C slots, N ids.
"""

import contextlib
from unittest import mock

import numpy as np
import torch

from colossal_freqcache import FreqAwareEmbeddingBag, cache, embedding, optim, placement

NUM_ROWS = 200
DIM = 8
BATCH_SHAPE = (8, 3)
FEW_SLOTS = 25  # one more than a batch of 8 x 3 distinct ids needs


def counts(num_rows: int = NUM_ROWS) -> np.ndarray:
    """Counts that order the rows unlike their ids."""
    return np.random.default_rng(7).permutation(num_rows) + 1


@contextlib.contextmanager
def chunks_of(chunk_bytes: int):
    """What walks whole tables does so in pieces of about `chunk_bytes`; also a decorator."""
    with contextlib.ExitStack() as stack:
        for module in (cache, embedding, placement):
            stack.enter_context(mock.patch.object(module, "CHUNK_BYTES", chunk_bytes))
        yield


def make_bag(num_slots: int = FEW_SLOTS, num_rows: int = NUM_ROWS, dim: int = DIM, seed: int = 0, **options):
    """A bag that never grows beyond `num_slots`, initialised from `seed`."""
    torch.manual_seed(seed)
    options.setdefault("mode", "sum")
    bag = FreqAwareEmbeddingBag(num_rows, dim, num_slots=num_slots, **options)
    return bag


def skewed_ids(generator: torch.Generator, shape=BATCH_SHAPE, num_rows: int = NUM_ROWS) -> torch.Tensor:
    """int64 ids of `shape`; small ones are more frequent, any may come."""
    return (torch.rand(shape, generator=generator) ** 2 * num_rows).long()


def make_optimizer(name: str, parameters, **options):
    """Our optimizer of that name with a learning rate under which the numbers stay tame."""
    return getattr(optim, name)(parameters, **{"lr": 0.05, **options})


def everything(bag, optimizer=None) -> list[torch.Tensor]:
    """The logical table and every logical state tensor."""
    tensors = [bag.logical_weight()]
    if optimizer is not None:
        for state in optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(state[name]) for name in sorted(state)]
    return tensors


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """Both lists hold the same tensors, bit for bit."""
    assert len(first) == len(second)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.shape == b.shape and torch.equal(a, b), f"tensor {number} differs by {(a - b).abs().max()}"


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient depends on the output, so that a wrong row shows in what is trained."""
    return (out * out.detach().cos()).sum() + 0.5 * (out**2).mean()
