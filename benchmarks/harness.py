"""What every benchmark shares: arguments, interleaved timing, time by phase, budgets, the machine, result files.

Knows nothing of embedding tables. Times are milliseconds of wall clock.
"""

import argparse
import cProfile
import gc
import json
import os
import platform
import pstats
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
import torch

__all__ = [
    "HUGE_PAGES",
    "REPOSITORY",
    "Stopwatch",
    "argument_parser",
    "collect_down_to",
    "command_line",
    "conclude",
    "default_out",
    "describe_machine",
    "interleaved",
    "machine_line",
    "markdown_table",
    "peak_gib",
    "print_profile",
    "ratio_of",
    "resident_gib",
    "restart_with_huge_pages",
    "spread",
    "summary",
    "verdict",
    "write_results",
]

REPOSITORY = Path(__file__).resolve().parents[1]
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own switch: its allocator asks for huge pages, as numpy's does by itself


# ---- arguments and settings -----------------------------------------------------------------------------------------


def argument_parser(doc: str, scale: str) -> argparse.ArgumentParser:
    """A parser that explains itself by the script's docstring; it has what every suite takes.

    scale: what the suite's --scale is a share of."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help=f"share of {scale}, for a short trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results go to OUT.json and OUT.md; default: in benchmarks/results")
    return parser


def default_out(suite: str, parser: argparse.ArgumentParser, args: argparse.Namespace, *telling: str) -> Path:
    """The result files' path without suffix: suite, torch version, and those `telling` settings that are unusual."""
    stem = f"{suite}-{torch.__version__.partition('+')[0]}"
    for name in telling:
        value = getattr(args, name)
        if value != parser.get_default(name):
            stem += f"-{name.replace('_', '-')}"
            if value is not True:
                stem += "-" + "-".join(map(str, value if isinstance(value, list) else [value]))
    return REPOSITORY / "benchmarks" / "results" / stem


def restart_with_huge_pages(script: str, argv: Sequence[str] | None) -> None:
    """Starts the process again with torch's huge pages on, unless it was: torch reads that once, at its first use."""
    if os.environ.get(HUGE_PAGES) != "1":
        os.environ[HUGE_PAGES] = "1"
        os.execv(sys.executable, [sys.executable, script, *(sys.argv[1:] if argv is None else argv)])


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


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our time over theirs: of the medians, and of the minima."""
    return {"of_median": float(np.median(ours) / np.median(theirs)), "of_min": min(ours) / min(theirs)}


def verdict(ratio: float, budget: float | None) -> str:
    """Whether a ratio is at most its budget; "-" where there is none."""
    return "-" if budget is None else "met" if ratio <= budget else "**MISSED**"


def print_profile(call: Callable[[], Any]) -> None:
    """Runs `call` under cProfile and prints where its time went."""
    profile = cProfile.Profile()
    with profile:
        call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


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


def resident_gib() -> float:
    """The memory that this process has resident now, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def collect_down_to(most_gib: float, attempts: int = 30) -> None:
    """Collects garbage until no more than `most_gib` is resident; waits a second between attempts.

    Raises:
        RuntimeError: it stays above that; says which large tensors are alive.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(1)
        gc.collect()
        if resident_gib() <= most_gib:
            return
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.nbytes > 1 << 28]
    raise RuntimeError(
        f"{resident_gib():.1f} GiB are resident, {most_gib:.1f} were expected; large tensors alive: "
        f"{[(tuple(each.shape), each.dtype, [type(one) for one in gc.get_referrers(each)]) for each in tensors]}"
    )


# ---- results --------------------------------------------------------------------------------------------------------


def command_line(script: str, arguments: Sequence[str]) -> str:
    """How to run it again, from the repository's root."""
    return shlex.join([f"{Path(sys.prefix).name}/bin/python", script, *arguments])


def spread(times: Mapping[str, float], digits: int = 1) -> str:
    """A `summary` in one cell."""
    return " / ".join(f"{times[key]:.{digits}f}" for key in ("min", "median", "p80"))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Floats get one decimal place; give strings for another form."""
    cells = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_line(machine: Mapping[str, Any]) -> str:
    """`describe_machine` in one line, for the end of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, L3 {machine['l3_cache']}, {machine['memory_gib']} GiB, "
        f"transparent huge pages {machine['transparent_huge_pages']}, {machine['system']}; load at start "
        f"{machine['load_average_at_start']}; {versions}; commit {machine['commit']}. Every time is in the JSON file "
        "beside."
    )


def conclude(
    out: Path, script: str, argv: Sequence[str] | None, results: dict[str, Any], render: Callable[[dict], str]
) -> dict[str, Any]:
    """Adds the command, load and peak memory, writes both files, prints the Markdown; what stands in the JSON file."""
    results = {
        "command": command_line(f"benchmarks/{Path(script).name}", sys.argv[1:] if argv is None else argv),
        **results,
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "peak_gib": peak_gib(),
    }
    results = json.loads(json.dumps(results))
    markdown = render(results)
    write_results(out, results, markdown)
    print(markdown)
    return results


def write_results(stem: Path, results: dict[str, Any], markdown: str) -> None:
    """`stem`.json and `stem`.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown.rstrip() + "\n")
