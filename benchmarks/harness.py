"""What every benchmark shares: interleaved timing, time by phase, the machine and its versions, result files.

Knows nothing of embedding tables. Times are milliseconds of wall clock.
"""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

__all__ = [
    "REPOSITORY",
    "Stopwatch",
    "command_line",
    "describe_machine",
    "interleaved",
    "markdown_table",
    "peak_gib",
    "summary",
    "write_results",
]

REPOSITORY = Path(__file__).resolve().parents[1]


# ---- timing ---------------------------------------------------------------------------------------------------------


def interleaved(steps: Mapping[str, Callable[[Any], None]], batches: Sequence[Any]) -> dict[str, list[float]]:
    """ms of each contender at each batch: all of them do one batch before any does the next, the first one in turn.

    So a disturbance of the machine, and what one leaves in the CPU's caches, falls on all alike."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number, batch in enumerate(batches):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            began = time.perf_counter()
            steps[name](batch)
            times[name].append((time.perf_counter() - began) * 1e3)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """min, median and p80 of the times."""
    return {"min": min(times), "median": float(np.median(times)), "p80": float(np.percentile(times, 80))}


class Stopwatch:
    """Own time of nested phases: what passes inside of a phase's inner phases is theirs, so that all of them add up.

    A phase is booked as (group, name); a group lasts until another one starts within it."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._group = "rest"
        self._open: list[float] = []  # for each open phase, the seconds of its inner ones

    @contextmanager
    def phase(self, name: str, group: str | None = None) -> Iterator[None]:
        outer_group = self._group
        self._group = group or outer_group
        self._open.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.seconds[self._group, name] += seconds - self._open.pop()
            if self._open:
                self._open[-1] += seconds
            self._group = outer_group

    def patched(self, owner: object, attribute: str, name: str, group: str | None = None) -> Any:
        """A context in which calls of `owner.attribute` are a phase."""
        call = getattr(owner, attribute)

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name, group):
                return call(*args, **kwargs)

        return patch.object(owner, attribute, timed)

    def take(self) -> dict[tuple[str, str], float]:
        """ms by phase since the last call."""
        taken = {key: seconds * 1e3 for key, seconds in self.seconds.items()}
        self.seconds.clear()
        return taken


# ---- the machine ----------------------------------------------------------------------------------------------------


def describe_machine(packages: Sequence[ModuleType]) -> dict[str, Any]:
    """CPU, memory, huge pages, load, versions of `packages`, commit. "unknown" where the system does not say."""

    def found(path: str, key: str = "") -> str:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return "unknown"
        return next(
            (line.partition(":")[2].strip() if key else line for line in lines if line.startswith(key)), "unknown"
        )

    memory = found("/proc/meminfo", "MemTotal").split()[0]
    return {
        "cpu": found("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "l3_cache": found("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory_gib": round(int(memory) / 2**20, 1) if memory.isdigit() else memory,
        "transparent_huge_pages": found("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in packages},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that was measured, with "+changes" where the package's files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "colossal_freqcache")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_gib() -> float:
    """The most memory this process has had resident so far, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


# ---- results --------------------------------------------------------------------------------------------------------


def command_line(script: str, arguments: Sequence[str]) -> str:
    """How to run it again, from the repository's root."""
    return shlex.join([f"{Path(sys.prefix).name}/bin/python", script, *arguments])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Floats get one decimal place; give strings for another form."""
    cells = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(stem: Path, results: dict[str, Any], markdown: str) -> None:
    """`stem`.json and `stem`.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown.rstrip() + "\n")
