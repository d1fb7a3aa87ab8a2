"""Worlds for the tests of a cache whose maps are on a device: which device, which kernel set, and loops over them.

`tests/test_device_cache.py` and `tests/test_cuda_kernels.py` run them on a CPU, where Triton's interpreter takes the
kernels' place; `tests/gpu` on a GPU. The cases themselves are in `device_cases` and `device_kernel_cases`.
"""

import functools
import importlib.metadata
import os
import sys
from typing import NamedTuple

import pytest
import torch
import worlds

import colossal_freqcache.device_cache
from colossal_freqcache.kernels.device import DeviceTorchKernels

INTERPRET = "TRITON_INTERPRET"


@functools.cache
def problem_with_interpreter() -> str | None:
    """Imports the Triton kernel set so that it runs on CPU tensors; says why it cannot, if so.

    Triton looks at the variable when it is imported; other tests must not see it, so it is set only meanwhile, and
    again by `interpreting` while a test runs.
    """
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 2):
        return f"the interpreter of Triton {version} gathers wrongly: 3.2 or newer is needed"
    before = os.environ.get(INTERPRET)
    if torch.cuda.is_available() and before != "1":
        return "there is a GPU: tests/gpu runs the same on it (TRITON_INTERPRET=1 runs these)"
    if "triton" not in sys.modules:
        os.environ[INTERPRET] = "1"
        try:
            import triton  # noqa: F401
        finally:
            _restore(before)
    import triton.language as tl

    if type(tl.cdiv).__name__ != "InterpretedFunction":
        return "Triton was imported without TRITON_INTERPRET=1 before"
    os.environ[INTERPRET] = "1"
    try:
        import colossal_freqcache.kernels.cuda  # noqa: F401
    finally:
        _restore(before)
    return None


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ[INTERPRET]
    else:
        os.environ[INTERPRET] = before


class World(NamedTuple):
    """A device, and the kernel set of a cache on it. `triton`: whether that is the Triton set."""

    device: torch.device
    kernels: str
    triton: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def make_bag(self, num_slots: int = worlds.FEW_SLOTS, **options):
        """`worlds.make_bag` with a DeviceCache; its outputs are on the device."""
        return worlds.make_bag(num_slots, **{"device": self.device, "kernels": self.kernels, **options})

    def put(self, *numbers: int) -> torch.Tensor:
        """Those ids on the device."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def cpu_world(name: str, monkeypatch: pytest.MonkeyPatch) -> World:
    """ "twin" (plain torch) or "triton" (interpreted), for the length of a test."""
    if name == "twin":
        monkeypatch.setattr(
            colossal_freqcache.device_cache, "make_device_kernels", lambda name, device: DeviceTorchKernels()
        )
    else:
        if problem_with_interpreter():
            pytest.skip(problem_with_interpreter())
        monkeypatch.setenv(INTERPRET, "1")
    return World(torch.device("cpu"), "cuda", name == "triton")


def id_batches(steps: int, seed: int = 1, shape: tuple[int, int] = worlds.BATCH_SHAPE) -> list[torch.Tensor]:
    """Skewed batches on the host."""
    generator = torch.Generator().manual_seed(seed)
    return [worlds.skewed_ids(generator, shape) for _ in range(steps)]


def train(bag, optimizer, batches, device: torch.device) -> list[torch.Tensor]:
    """One step for each batch (ids, wherever they are); the outputs, on the host."""
    outs = []
    for ids in batches:
        out = bag(ids.to(device))
        worlds.loss_of(out).backward()
        optimizer.step()
        optimizer.zero_grad()
        outs.append(out.detach().cpu())
    return outs


def trained(world: World, batches, num_slots=worlds.FEW_SLOTS, optimizer="Adagrad", fused=False, **options):
    """(outputs, table and state) after a step for each batch; asserts that all but few steps evicted, or none."""
    bag = world.make_bag(num_slots, **options)
    settings = {"fused": True} if fused else {}
    made = worlds.make_optimizer(optimizer, bag.parameters(), **settings)
    outs = train(bag, made, batches, world.device)
    evictions = bag.stats.evictions
    assert evictions > len(batches) if num_slots < worlds.NUM_ROWS else evictions == 0
    bag._cache.check()
    return outs + worlds.everything(bag, made)
