"""PinnedPages: host memory that a CUDA device reads and writes directly, pinned where it lies.

torch's pinned allocator rounds up to a power of two, up to twice the bytes; registering pages costs none and copies
nothing. Knows nothing of rows.
Source: CUDA runtime API, cudaHostRegister.
"""

import sys
import warnings

import torch

from .memory import whole_pages_of

__all__ = ["PinnedPages"]

PORTABLE_AND_MAPPED = 1 | 2

_holders: dict[int, int] = {}  # address of registered memory -> how many PinnedPages have it (copies share an order)


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
            address, error = tensor.data_ptr(), 0
            if address not in _holders:
                with torch.cuda.device(device):
                    error = int(runtime.cudaHostRegister(address, whole_pages_of(tensor.nbytes), PORTABLE_AND_MAPPED))
            if error:
                _forget_error(device)
                self.close()
                self.is_pinned = False
                warnings.warn(
                    f"{tensor.nbytes} bytes of host memory could not be pinned (CUDA error {error}; a limit on locked "
                    f"memory?): rows are copied through buffers instead, which takes longer and waits for the device",
                    stacklevel=2,
                )
                return
            _holders[address] = _holders.get(address, 0) + 1
            self._registered.append(tensor)

    def close(self) -> None:
        """Unregisters the memory. No kernel may use it any more."""
        while self._registered:
            address = self._registered.pop().data_ptr()
            _holders[address] -= 1
            if not _holders[address]:
                del _holders[address]
                torch.cuda.cudart().cudaHostUnregister(address)

    def __del__(self) -> None:
        if self._registered and not sys.is_finalizing():
            torch.cuda.synchronize()  # kernels that were launched may still write rows back
            self.close()


def _forget_error(device: torch.device) -> None:
    """CUDA keeps a call's error for whoever looks next, which would be an operation that has nothing to do with it."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        if "Registered" not in str(error) and "mapped" not in str(error) and "memory" not in str(error):
            raise
