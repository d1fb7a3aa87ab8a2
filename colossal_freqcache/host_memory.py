"""PinnedPages: host memory that a CUDA device reads and writes directly, pinned where it lies.

torch's pinned allocator rounds up to a power of two, up to twice the bytes; registering pages costs none and copies
nothing. Knows nothing of rows.
Source: CUDA runtime API, cudaHostRegister.
"""

import warnings

import torch

from .memory import whole_pages_of

__all__ = ["PinnedPages"]

PORTABLE_AND_MAPPED = 1 | 2


class PinnedPages:
    """Registers the memory of contiguous host tensors with CUDA; lets go of it when it is closed or collected.

    Each tensor has pages of its own (`memory.aligned_empty(whole_pages=True)`): a page is registered once only.

    Attributes:
        is_pinned: whether all of it could be registered; if not, a warning was given and none of it is.
    """

    def __init__(self, tensors: list[torch.Tensor], device: torch.device) -> None:
        self._registered: list[torch.Tensor] = []
        self.is_pinned = True
        if device.type != "cuda":
            return
        torch.cuda.init()
        runtime = torch.cuda.cudart()
        for tensor in tensors:
            if not tensor.numel():
                continue
            with torch.cuda.device(device):
                error = int(
                    runtime.cudaHostRegister(tensor.data_ptr(), whole_pages_of(tensor.nbytes), PORTABLE_AND_MAPPED)
                )
            if error:
                self.close()
                self.is_pinned = False
                warnings.warn(
                    f"{tensor.nbytes} bytes of host memory could not be pinned (CUDA error {error}; a limit on locked "
                    f"memory?): rows are copied through buffers instead, which takes longer and waits for the device",
                    stacklevel=2,
                )
                return
            self._registered.append(tensor)

    def close(self) -> None:
        """Unregisters the memory. No kernel may use it any more."""
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop().data_ptr())

    def __del__(self) -> None:
        if self._registered:
            torch.cuda.synchronize()  # kernels that were launched may still write rows back
            self.close()
