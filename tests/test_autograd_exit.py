"""python -m pytest tests/test_autograd_exit.py

Proves that a process in which a backward failed ends by itself, with its error, however that backward ended.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The lookup's output is needed by a branch that is still in autograd's queue when the other one fails.
SCRIPT = """
import sys
import torch
from colossal_freqcache import FreqAwareEmbeddingBag


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise {error}("the backward fails")


def fail(batch):
    ids = torch.arange(batch * 500, batch * 500 + 500)
    first = left(bag(ids, torch.arange(500)))
    second = Fails.apply(right(torch.ones(500, 8)))
    (first + second).sum().backward()


bag = FreqAwareEmbeddingBag(20_000, 8, cache_ratio=0.5)
left, right = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
for batch in range({caught}):
    try:
        fail(batch)
    except {error}:
        pass
{last}
"""


FORKED = """
import os
bag(torch.arange(5), torch.arange(5))
child = os.fork()
if child == 0:
    fail(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 4)
"""


@pytest.mark.parametrize(
    "error, caught, last, code",
    [
        ("RuntimeError", 0, "fail(0)", 1),
        ("RuntimeError", 10, "sys.exit(3)", 3),
        ("RuntimeError", 10, "bag(torch.arange(5), torch.arange(5)).sum().backward()", 0),
        ("RuntimeError", 0, FORKED, 5),
        ("KeyboardInterrupt", 0, "fail(0)", -signal.SIGINT),
    ],
)
def test_a_process_whose_backward_failed_ends(error, caught, last, code, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT.format(error=error, caught=caught, last=last))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr[-2000:]
    assert not last.startswith("fail") or f"{error}: the backward fails" in done.stderr
