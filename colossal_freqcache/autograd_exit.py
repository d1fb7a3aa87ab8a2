"""Lets a process exit after a backward has failed in it.

What was still to do when a backward raised stays in a queue of autograd's, with the tensors that it needs. The queue
goes when Python has ended, and with torch 2.5.1 a tensor over a numpy array (ours are) then waits for Python's global
lock, which nobody can give any more: the process prints its error and hangs. Source: docs/measured_facts.md.
"""

import atexit
import os

import torch

__all__ = ["clear_queue_at_exit"]

# Made as the package is imported, for its age: autograd takes the youngest node first and drops what is of a failed
# backward on its way, so a backward of this graph empties the queue of all that came after it.
with torch.inference_mode(False), torch.enable_grad():
    _leaf = torch.zeros((), device="cpu", requires_grad=True)
    _oldest = _leaf * 1


_process: int | None = None  # that clears its queue; a fork inherits the handler and the queue


def clear_queue_at_exit() -> None:
    """Empties autograd's queue once Python starts to exit; for whoever records a graph, as often as it does."""
    global _process
    if _process != os.getpid():
        if _process is None:
            atexit.register(_clear_queue)
        _process = os.getpid()


def _clear_queue() -> None:
    if _process == os.getpid():  # a fork that recorded no graph may not be able to use autograd
        torch.autograd.grad(_oldest, _leaf)
