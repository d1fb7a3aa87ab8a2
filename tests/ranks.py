"""Runs a function on several ranks of a gloo group, each a process of its own; for tests without colossalai.

    run_on_ranks(check, 2, arguments...)     # check(rank, world_size, arguments...) on ranks 0 and 1

A failure on any rank fails the test with that rank's traceback. Ranks meet by a file, not by a port: nothing collides.
"""

import datetime
import faulthandler
import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing

TIMEOUT_S = 120  # a rank that waits longer than this for another raises


def _enter(rank, world_size, check, rendezvous, arguments):
    import torch._dynamo  # imported after the process group, it makes gloo ranks abort at exit now and then
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        check(rank, world_size, *arguments)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def run_on_ranks(check, world_size, *arguments):
    """check(rank, world_size, *arguments) in `world_size` processes of one gloo group; all must return."""
    tests = str(Path(__file__).parent)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = tests if path is None else f"{tests}{os.pathsep}{path}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                _enter, (world_size, check, str(Path(folder) / "rendezvous"), arguments), nprocs=world_size
            )
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
