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
_left_over: list[list[torch.Tensor]] = []  # registered memory whose PinnedPages was collected during a capture


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
        _close_left_over()
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
        _close(self._registered)

    def __del__(self) -> None:
        if not self._registered or sys.is_finalizing():
            return
        if torch.cuda.is_current_stream_capturing():  # waiting would end the capture of whoever is collected beside
            _left_over.append(self._registered)
            return
        torch.cuda.synchronize()  # kernels that were launched may still write rows back
        self.close()


def _close(registered: list[torch.Tensor]) -> None:
    while registered:
        address = registered.pop().data_ptr()
        _holders[address] -= 1
        if not _holders[address]:
            del _holders[address]
            torch.cuda.cudart().cudaHostUnregister(address)


def _close_left_over() -> None:
    """Lets go of what was collected while a CUDA graph was captured."""
    if _left_over:
        torch.cuda.synchronize()
    while _left_over:
        _close(_left_over.pop())


def _forget_error(device: torch.device) -> None:
    """CUDA keeps a call's error for whoever looks next, which would be an operation that has nothing to do with it."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        if "Registered" not in str(error) and "mapped" not in str(error) and "memory" not in str(error):
            raise
