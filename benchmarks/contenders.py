"""Who trains in the `step` suite: ours, ours with Lookahead, and its peers. One step each, on the same initial weights.

A step is lookup + forward + backward + optimizer + zero_grad through autograd, to an output (B, T, D) of its own that
the caller may keep. `grad` (B, T, D) is what a model above would send back.

- ours: FreqAwareEmbeddingBagCollection with a row optimizer.
- ours+lookahead: the same under Lookahead. Its step begins with asking for the batch, and ends when nothing is left to
  do in the background: what a loop without others in between would wait for at the next batch is in its own time.
- torch: ONE nn.EmbeddingBag(sparse=True) over the tables laid end to end, ids joined beforehand: its fastest form, 26
  modules and a torch.stack are slower. The whole table in RAM.
- fbgemm: FBGEMM's CPU table-batched embedding, the optimizer fused into the backward. The whole table in RAM.
- colossal: Colossal-AI's earlier CachedEmbeddingBag over the tables laid end to end, the same slots and counts. It has
  no CPU path: see `cuda_calls_redirected`. SGD only: its other optimizers' state stays with slots.

Shapes: B samples, T tables, R rows of all tables, D embedding width.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from load import StepBatch, World
from torch import nn

from colossal_freqcache import FreqAwareEmbeddingBagCollection, Lookahead, optim

__all__ = [
    "Cached",
    "Colossal",
    "Contender",
    "Fbgemm",
    "LookingAhead",
    "OPTIMIZERS",
    "PEERS",
    "Torch",
    "colossal_bag",
    "cuda_calls_redirected",
    "fbgemm_tables",
    "initial_weights",
    "installed_versions",
]

LEARNING_RATE = 0.05
EPSILON = 1e-10  # torch.optim.Adagrad's
OPTIMIZERS = {"sgd": optim.SGD, "adagrad": optim.Adagrad, "rowwise_adagrad": optim.RowWiseAdagrad}  # ours
CHUNK = 1 << 18  # rows at a time, where a whole table is walked


def initial_weights(world: World, dim: int, seed: int) -> torch.Tensor:
    """(R, D), what one nn.EmbeddingBag of all rows would draw."""
    torch.manual_seed(seed)
    return torch.empty(world.num_rows, dim).normal_()


class Contender:
    """One step, in parts that can be timed apart."""

    optimizers: tuple[str, ...]  # that it is held against ours with
    distribution: str | None = None  # what pip calls the package that it needs beyond torch
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """(B, T, D)"""
        raise NotImplementedError

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: StepBatch) -> None:
        out = self.forward(batch)
        out.backward(self.grad)
        self.update()

    def rows(self, first: int, last: int) -> torch.Tensor:
        """(n, D) the newest weights of ids first..last-1 of the whole."""
        raise NotImplementedError

    def close(self) -> None:
        """Training has ended; `rows` still works."""


# ---- ours -----------------------------------------------------------------------------------------------------------


class Cached(Contender):
    def __init__(
        self,
        name: str,
        world: World,
        initial: torch.Tensor,
        num_slots: int,
        grad: torch.Tensor,
        fused: bool = False,
    ) -> None:
        super().__init__(grad)
        self.module = FreqAwareEmbeddingBagCollection(
            world.table_sizes,
            initial.shape[1],
            mode="sum",
            num_slots=num_slots,
            ids_freq_mapping=world.counts,
            optimizer=name,
            _weight=initial.split(world.table_sizes),
        )
        self.optimizer = OPTIMIZERS[name](self.module.parameters(), lr=LEARNING_RATE, fused=fused)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.values, batch.offsets)

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.module._cached_weight.logical_chunk("weight", first, last)


class _ObservedLookahead(Lookahead):
    """Lookahead that tells which ids are still being sorted out."""

    def _wanted(self, *args):
        self.newest = super()._wanted(*args)
        return self.newest


class LookingAhead(Cached):
    def __init__(self, *args, batches: list[StepBatch], window: int, fused: bool = False) -> None:
        super().__init__(*args, fused=fused)
        self.lookahead = _ObservedLookahead(
            batches, self.module, ids=lambda batch: (batch.values, batch.offsets), window=window, depth=1
        )
        self.coming = iter(self.lookahead)
        self.parts: list[tuple[float, float, float]] = []  # by step, ms to ask for the batch, to train, to wait

    def step(self, batch: StepBatch) -> None:
        began = time.perf_counter()
        coming = next(self.coming)
        assert coming is batch, "the loader and the timed batches went apart"
        asked = time.perf_counter()
        super().step(coming)
        trained = time.perf_counter()
        concurrent.futures.wait(self.lookahead.newest.values())
        self.module._cache.ahead.finish()
        seconds = (asked - began, trained - asked, time.perf_counter() - trained)
        self.parts.append(tuple(part * 1e3 for part in seconds))

    def close(self) -> None:
        self.coming.close()


# ---- peers ----------------------------------------------------------------------------------------------------------


class Torch(Contender):
    optimizers = ("sgd", "adagrad")

    def __init__(self, name: str, world: World, initial: torch.Tensor, num_slots: int, grad: torch.Tensor) -> None:
        """Trains `initial` itself: build it last."""
        super().__init__(grad)
        self.module = nn.EmbeddingBag(*initial.shape, mode="sum", sparse=True, _weight=initial)
        optimizer = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[name]
        self.optimizer = optimizer(self.module.parameters(), lr=LEARNING_RATE)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.joined, batch.offsets).view(self.grad.shape)

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.module.weight.detach()[first:last]


def fbgemm_tables(
    table_sizes: Sequence[int], dim: int, name: str, location: str = "HOST", device: str = "CPU", **options: Any
) -> nn.Module:
    """FBGEMM's table-batched embedding: its EmbeddingLocation and ComputeDevice by name, the optimizer by ours."""
    logging.disable(logging.WARNING)  # it looks for parts that its CPU build leaves out
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    logging.disable(logging.NOTSET)
    optimizers = {"sgd": "EXACT_SGD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD", "adam": "ADAM"}
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation[location], ComputeDevice[device]) for rows in table_sizes],
        optimizer=EmbOptimType[optimizers[name]],
        learning_rate=LEARNING_RATE,
        eps=EPSILON,
        weights_precision=SparseType.FP32,
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        **options,
    )


class Fbgemm(Contender):
    optimizers = ("sgd", "rowwise_adagrad")
    distribution = "fbgemm-gpu-cpu"

    def __init__(self, name: str, world: World, initial: torch.Tensor, num_slots: int, grad: torch.Tensor) -> None:
        super().__init__(grad)
        self.module = fbgemm_tables(world.table_sizes, initial.shape[1], name)
        self.weight = self.module.weights_host.detach().view(initial.shape)  # the tables laid end to end
        self.weight.copy_(initial)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.values, batch.ends).view(self.grad.shape)

    def update(self) -> None:
        """The backward did it."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.weight[first:last]


def colossal_bag(weight: torch.Tensor, num_slots: int, counts: torch.Tensor) -> nn.Module:
    """Colossal-AI's CachedEmbeddingBag, with the slots and counts of ours; `weight` is its host copy."""
    with warnings.catch_warnings():  # of its optional packages and deprecated decorators
        warnings.simplefilter("ignore")
        from colossalai.legacy.nn.parallel.layers.cache_embedding import CachedEmbeddingBag, EvictionStrategy

    with contextlib.redirect_stdout(io.StringIO()):
        return CachedEmbeddingBag(
            *weight.shape,
            mode="sum",
            sparse=True,
            _weight=weight,
            cache_ratio=(num_slots + 0.5) / weight.shape[0],  # it takes the whole part of ratio * rows
            ids_freq_mapping=counts,
            warmup_ratio=1.0,
            evict_strategy=EvictionStrategy.DATASET,
        )


class Colossal(Contender):
    optimizers = ("sgd",)
    distribution = "colossalai"

    def __init__(self, name: str, world: World, initial: torch.Tensor, num_slots: int, grad: torch.Tensor) -> None:
        super().__init__(grad)
        # Its rows are in the order of the counts, which it does not bring a given weight into: the caller has to.
        counts = torch.from_numpy(world.counts)
        id_of_row = torch.argsort(counts, descending=True)
        self.module = colossal_bag(initial[id_of_row], num_slots, counts)
        manager = self.module.cache_weight_mgr
        assert manager.cuda_row_num == num_slots and torch.equal(manager.idx_map[id_of_row], torch.arange(len(counts)))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=LEARNING_RATE)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.joined, batch.offsets).view(self.grad.shape)

    @property
    def row_of_id(self) -> np.ndarray:
        """(R,) its order: equal counts as they come from a sort that is not stable."""
        return self.module.cache_weight_mgr.idx_map.numpy()

    @property
    def rows_missed(self) -> list[int]:
        """By step, from the first on."""
        return self.module.num_miss_history

    def close(self) -> None:
        self.module.cache_weight_mgr.flush()

    def rows(self, first: int, last: int) -> torch.Tensor:
        manager = self.module.cache_weight_mgr
        return manager.weight[manager.idx_map[first:last]]


@contextlib.contextmanager
def cuda_calls_redirected() -> Iterator[None]:
    """Makes Colossal-AI's class run on a CPU: the current device is the CPU, synchronising and pinning do nothing, and
    a copy to the device is the tensor itself (so that on a CPU it is spared those copies)."""
    with contextlib.ExitStack() as patches:
        for owner, name, stand_in in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.cuda, "synchronize", lambda: None),
            (torch.Tensor, "cuda", lambda tensor: tensor),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
        ):
            patches.enter_context(patch.object(owner, name, stand_in))
        yield


PEERS: dict[str, type[Contender]] = {"torch": Torch, "fbgemm": Fbgemm, "colossal": Colossal}


def installed_versions(peers: Sequence[str]) -> dict[str, str]:
    """Of the packages that `peers` need beyond torch.

    Raises:
        ValueError: one is missing.
    """
    found = {}
    for peer in peers:
        if distribution := PEERS[peer].distribution:
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                raise ValueError(
                    f"{peer} needs {distribution}, which is not installed: see requirements-bench.txt, or give --peers"
                ) from None
    return found
