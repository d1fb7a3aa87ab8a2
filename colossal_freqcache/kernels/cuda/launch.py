"""Launches of Triton kernels, with little work for the host once a kernel is compiled.

`kernel[grid](...)` looks at every argument each time, to find the variant that fits: about 80 microseconds of Python on
the machine of docs/measured_facts.md, which is longer than most kernels here run. The kernels of this package take
whatever decides about their code as a constant (a width, a stride, a flag), and no integer argument is specialised. So
a variant is known by its constants and by the arguments' types and alignment, and is launched directly.
"""

import os
from typing import Any

import torch
import triton

__all__ = ["IS_INTERPRETED", "launch"]

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Where a compiled kernel takes all arguments, constants included: seen in 3.6 and 3.9.
TAKES_ALL_ARGUMENTS = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (4, 0)
INT32_MAX = 2**31 - 1

_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: int, arguments: tuple, constants: dict[str, Any], **options: Any) -> None:
    """kernel[(grid,)](*arguments, **constants, **options).

    The kernel's constants come last in its signature, in the order of `constants`; `options` are the same for all
    launches of a kernel. All tensors are on one device, or in host memory that it can reach.
    """
    if IS_INTERPRETED or not TAKES_ALL_ARGUMENTS:
        kernel[(grid,)](*arguments, **constants, **options)
        return
    values = tuple(constants.values())
    key = [kernel, torch.cuda.current_device(), *values]
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            key += (argument.dtype, argument.data_ptr() & 15)
        elif isinstance(argument, int):
            key.append(-INT32_MAX <= argument <= INT32_MAX)
    key = tuple(key)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(grid,)](*arguments, **constants, **options)
    else:
        compiled[(grid, 1, 1)](*arguments, *values)
