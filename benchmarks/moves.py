"""Rows moved between the store in RAM and the cache block, in rows and bytes per second, against memcpy of the bytes.

    python benchmarks/moves.py [--threads 1 2] [--scale 0.05]

The store has as many rows as Criteo's Kaggle set. A move takes `--moved` distinct rows, about what a step of `step`
misses, drawn anew each time, to (fetch) or from (write back) distinct slots of a block of 1.5 % of the rows. memcpy
copies as many bytes from an array of up to 4 million records to the block, both at another position each time: all
three find their source outside the CPU's caches. Records are those of the optimizer: weight and state.

What the run checks: after a fetch the slots hold their rows' records, after a write-back the store does.

Shapes: R rows, C slots, W record width, n rows moved.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from harness import (
    argument_parser,
    conclude,
    default_out,
    describe_machine,
    interleaved,
    machine_line,
    markdown_table,
    ratio_of,
    spread,
    summary,
)
from load import PRESET

import colossal_freqcache
from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.row_layout import RowLayout
from colossal_freqcache.row_rules import make_rule
from colossal_freqcache.stores import RamStore

CACHE_RATIO = 0.015
CHUNK = 1 << 18  # rows at a time, to fill the store
MOST_BESIDE = 1 << 22  # records that memcpy reads from


class Move(NamedTuple):
    """rows: (n,) of the store. places: (n,) of the block. first_row, first_place: where memcpy's records start."""

    rows: torch.Tensor
    places: torch.Tensor
    first_row: int
    first_place: int


class Mover:
    """Store and block of one layout; the record of a row is its number, less thousands, until it is written back."""

    def __init__(self, num_rows: int, num_slots: int, layout: RowLayout) -> None:
        self.num_rows, self.layout = num_rows, layout
        self.store = RamStore(make_kernels("auto"))
        self.store.allocate(num_rows, layout)
        self.block = torch.zeros(num_slots, layout.width)
        self.beside = np.ones((min(num_rows, MOST_BESIDE), layout.width), np.float32)
        for first in range(0, num_rows, CHUNK):
            rows = torch.arange(first, min(first + CHUNK, num_rows))
            self.store.write(rows, self.first_records(rows), rows - first)

    def first_records(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, W)"""
        return (rows % 1000)[:, None].float().repeat(1, self.layout.width)

    def fetch(self, move: Move) -> None:
        self.store.read(move.rows, self.block, move.places)

    def write_back(self, move: Move) -> None:
        self.store.write(move.rows, self.block, move.places)

    def memcpy(self, move: Move) -> None:
        num_moved = move.rows.numel()
        source = self.beside[move.first_row : move.first_row + num_moved]
        np.copyto(self.block.numpy()[move.first_place : move.first_place + num_moved], source)

    def check(self, move: Move) -> None:
        """Raises RuntimeError if records did not arrive."""
        expected = self.first_records(move.rows)
        self.fetch(move)
        arrived = torch.equal(self.block[move.places], expected)
        self.block[move.places] += 1
        self.write_back(move)
        self.block[move.places] = 0
        self.fetch(move)
        if not arrived or not torch.equal(self.block[move.places], expected + 1):
            raise RuntimeError("records did not arrive where they were sent")


def draw_moves(number: int, num_rows: int, num_slots: int, num_moved: int, seed: int) -> list[Move]:
    generator = np.random.default_rng(seed)
    return [
        Move(
            torch.from_numpy(generator.choice(num_rows, num_moved, replace=False, shuffle=False)),
            torch.from_numpy(generator.choice(num_slots, num_moved, replace=False).astype(np.int32)),
            int(generator.integers(min(num_rows, MOST_BESIDE) - num_moved + 1)),
            int(generator.integers(num_slots - num_moved + 1)),
        )
        for _ in range(number)
    ]


def measure(optimizer: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each number of threads."""
    num_rows = int(args.scale * sum(PRESET.table_sizes))
    num_moved = max(1, min(args.moved, num_rows // 100))
    num_slots = max(int(CACHE_RATIO * num_rows), num_moved)
    layout = make_rule(optimizer).layout(args.dim, torch.float32, {})
    mover = Mover(num_rows, num_slots, layout)
    dropped, *moves = draw_moves(1 + args.repeats, num_rows, num_slots, num_moved, args.seed)
    contenders = {"fetch": mover.fetch, "write back": mover.write_back, "memcpy": mover.memcpy}
    runs = []
    mover.check(dropped)
    for threads in args.threads:
        torch.set_num_threads(threads)
        interleaved(contenders, [dropped])
        times = interleaved(contenders, moves)
        num_bytes = num_moved * layout.row_bytes
        runs.append(
            {
                "optimizer": optimizer,
                "threads": threads,
                "num_rows": num_rows,
                "num_slots": num_slots,
                "num_moved": num_moved,
                "row_bytes": layout.row_bytes,
                "ms": {name: summary(of_one) for name, of_one in times.items()},
                "rows_per_s": {name: num_moved / np.median(of_one) * 1e3 for name, of_one in times.items()},
                "bytes_per_s": {name: num_bytes / np.median(of_one) * 1e3 for name, of_one in times.items()},
                "ratio": {name: ratio_of(times[name], times["memcpy"]) for name in ("fetch", "write back")},
                "all_ms": {name: [round(ms, 4) for ms in of_one] for name, of_one in times.items()},
            }
        )
    return runs


def as_markdown(results: dict[str, Any]) -> str:
    runs = results["runs"]
    rows = [
        [run["optimizer"], run["threads"], run["row_bytes"], name, spread(run["ms"][name], 3)]
        + [spread(run["ms"]["memcpy"], 3), f"{run['rows_per_s'][name] / 1e6:.1f}"]
        + [f"{run['bytes_per_s'][kind] / 1e9:.2f}" for kind in (name, "memcpy")]
        + [f"{run['ratio'][name][key]:.2f}" for key in ("of_median", "of_min")]
        for run in runs
        for name in run["ratio"]
    ]
    header = ["record of", "threads", "bytes", "move", "ours, ms", "memcpy, ms", "10^6 rows/s", "GB/s", "memcpy, GB/s"]
    return "\n\n".join(
        [
            "# Rows moved, against memcpy of as many bytes",
            f"`{results['command']}`",
            f"{runs[0]['num_moved']:,} rows a move, {runs[0]['num_rows']:,} in the store, {runs[0]['num_slots']:,} "
            f"slots in the block; {results['settings']['repeats']} moves in turn; min / median / p80. memcpy has one "
            "thread. Rates are of medians, counted once for reading and writing.",
            markdown_table([*header, "time over memcpy's, medians", "minima"], rows),
            machine_line(results["machine"]),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "the rows")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--moved", type=int, default=25_000, help="rows a move, at most 1 %% of all")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "rowwise_adagrad", "adagrad"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = default_out("moves", parser, args, "scale", "optimizers", "threads")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": describe_machine([torch, np, numba, colossal_freqcache]),
        "runs": [run for optimizer in args.optimizers for run in measure(optimizer, args)],
    }
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
