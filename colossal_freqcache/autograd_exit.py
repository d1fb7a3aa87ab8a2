"""Lets a process exit after a backward has failed in it.

What was still to do when a backward raised stays in a queue of autograd's, with the tensors that it needs. The queue
goes when Python has ended, and with torch 2.5.1 a tensor over a numpy array (ours are) then waits for Python's global
lock, which nobody can give any more: the process prints its error and hangs. Source: docs/measured_facts.md.
"""

import atexit
import functools
import os

import torch

__all__ = ["clear_queue_at_exit"]

# Made as the package is imported, for its age: autograd takes the youngest node first and drops what is of a failed
# backward on its way, so a backward of this graph empties the queue of all that came after it.
with torch.inference_mode(False), torch.enable_grad():
    _leaf = torch.zeros((), device="cpu", requires_grad=True)
    _oldest = _leaf * 1


@functools.cache
def clear_queue_at_exit() -> None:
    """Empties autograd's queue once Python starts to exit; for whoever records a graph, as often as it does."""
    atexit.register(_clear_queue, os.getpid())


def _clear_queue(process: int) -> None:
    if os.getpid() == process:  # a fork may not use autograd
        torch.autograd.grad(_oldest, _leaf)
