"""The DLRM of the examples from end to end: samples/s with its tables cached, against plain nn.EmbeddingBag tables.

    python benchmarks/end_to_end.py [--repeats 3] [--config examples/dlrm/configs/purchases.py] [--scale 0.1]

Runs examples/dlrm/train.py with the configuration of `make demo`, cached and with --uncached in turn, each in a process
of its own; the one that begins changes with every repeat. samples/s are the trainer's: reading the batches, the MLPs
and the optimizer included, loading the data and evaluating not. The rate of a repeat is over one whole training.

The run checks that both trained the same samples, and that the cached one did miss.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from harness import (
    REPOSITORY,
    argument_parser,
    conclude,
    default_out,
    describe_machine,
    machine_line,
    markdown_table,
    ratio_of,
    summary,
    verdict,
)

import colossal_freqcache

BUDGET = 1.0  # cached time over uncached: at least as fast
EXAMPLE = REPOSITORY / "examples" / "dlrm"
SIDES = {"cached": [], "uncached": ["--uncached"]}


def whole_training() -> int:
    """Steps of the demo, as its committed result says."""
    return json.loads((EXAMPLE / "results" / "purchases_cached.json").read_text())["steps"]


def train(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """What train.py writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(EXAMPLE / "train.py"), "--config", str(args.config), "--json", str(out)]
        if args.steps is not None:
            command += ["--steps", str(args.steps)]
        finished = subprocess.run([*command, *SIDES[side]], capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{side}: train.py ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
        return json.loads(out.read_text())


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{side: what each repeat gave}.

    Raises:
        RuntimeError: the two did not train the same samples, or the cache missed nothing.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in list(SIDES)[:: -1 if repeat % 2 else 1]:
            found[side].append(train(side, args))
    steps = {result["steps"] for results in found.values() for result in results}
    if len(steps) > 1:
        raise RuntimeError(f"the runs trained {steps} steps: they must be equal")
    if not all(result["cache"]["misses"] for result in found["cached"]):
        raise RuntimeError("the cache missed nothing: it is as large as the tables")
    return found


def as_markdown(results: dict[str, Any]) -> str:
    rates, first = results["samples_per_s"], results["first"]
    rows = [
        [side, *(f"{rates[side][name]:,.0f}" for name in ("max", "median", "min"))]
        + [f"{first[side][name]:.4f}" for name in ("hit_ratio", "auroc", "logloss")]
        for side in SIDES
    ]
    ratio, hit_ratios = results["ratio"], first["cached"]["cache"]["hit_ratio_per_table"]
    return "\n\n".join(
        [
            "# The example's DLRM from end to end, cached against uncached",
            f"`{results['command']}`",
            f"{first['cached']['config']}: {first['cached']['steps']} steps, {first['cached']['threads']} thread(s), "
            f"{first['cached']['cache']['num_slots']:,} slots for {first['cached']['cache']['num_rows']:,} rows; "
            f"{results['settings']['repeats']} trainings of each in turn.",
            markdown_table(["samples/s", "best", "median", "worst", "hit ratio", "AUROC", "log loss"], rows),
            f"Time of the cached one over that of the uncached: {ratio['of_median']:.3f} by the medians, "
            f"{ratio['of_min']:.3f} by the best; budget {BUDGET:.2f}: {results['verdict']}.",
            "Occurrences missed over looked up, by table:",
            markdown_table(["table", "miss ratio"], [[name, f"{1 - hit:.4f}"] for name, hit in hit_ratios.items()]),
            machine_line(results["machine"]),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "the training steps")
    parser.add_argument("--config", type=Path, default=(EXAMPLE / "configs" / "purchases.py").relative_to(REPOSITORY))
    parser.add_argument("--steps", type=int, help="stop each training after so many; default: --scale of all")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = default_out("end-to-end", parser, args, "scale", "steps")
    if args.steps is None and args.scale < 1:
        args.steps = max(1, round(args.scale * whole_training()))
    args.config = (REPOSITORY / args.config).resolve()
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    found = measure(args)
    seconds = {side: [1 / result["samples_per_s"] for result in results] for side, results in found.items()}
    ratio = ratio_of(seconds["cached"], seconds["uncached"])
    rates = {side: [result["samples_per_s"] for result in results] for side, results in found.items()}
    results = {
        "settings": {"steps": args.steps, "repeats": args.repeats, "config": args.config.name},
        "machine": machine,
        "samples_per_s": {
            side: {"max": max(of_one), "median": summary(of_one)["median"], "min": min(of_one)}
            for side, of_one in rates.items()
        },
        "ratio": ratio,
        "verdict": verdict(ratio["of_median"], BUDGET),
        "first": {side: results[0] for side, results in found.items()},
        "all_samples_per_s": rates,
    }
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
