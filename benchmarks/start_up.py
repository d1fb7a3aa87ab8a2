"""How long a count-ordered table takes until it is ready to train, beyond the filling of its weights.

    python benchmarks/start_up.py [--repeats 3] [--scale 0.05]

Ours builds a FreqAwareEmbeddingBagCollection of Criteo's Kaggle tables with counts, and binds its optimizer: rows in
the order of their counts, weights drawn as nn.EmbeddingBag draws them, written into the store by a second thread, the
cache filled with the most frequent rows. What any table has to do is one nn.EmbeddingBag of as many rows, which draws
the same numbers. The two are built in turn, each freed before the next. The budget is on the difference of their
medians.

The run checks that both drew the same weights, and that the cache is full: the first batch of the stream that was
counted then hits what a cache of the most counted rows must hit.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from contenders import LEARNING_RATE, OPTIMIZERS
from harness import (
    Stopwatch,
    argument_parser,
    conclude,
    default_out,
    describe_machine,
    machine_line,
    markdown_table,
    print_profile,
    spread,
    summary,
    verdict,
)
from load import World, frequency_rows, make_world, simulate
from torch import nn

import colossal_freqcache
from colossal_freqcache import FreqAwareEmbeddingBagCollection
from colossal_freqcache.cache import RowCache
from colossal_freqcache.row_order import RowOrder
from colossal_freqcache.stores import RamStore

BUDGET_S = 3.0  # beyond filling the weights, at full scale
PHASES = (
    (RowOrder, "from_counts", "order the rows by their counts"),
    (torch.Tensor, "normal_", "draw the weights"),
    (RowCache, "warm_up", "fill the cache"),
)
THE_REST = "the rest, waits for the second thread included"
PHASE_BESIDE = (RamStore, "write", "write the rows into the store: a second thread, beside the others")


def build_ours(world: World, args: argparse.Namespace) -> FreqAwareEmbeddingBagCollection:
    torch.manual_seed(args.seed)
    bags = FreqAwareEmbeddingBagCollection(
        world.table_sizes,
        args.dim,
        mode="sum",
        num_slots=world.num_slots(args.cache_ratio),
        ids_freq_mapping=world.counts,
        optimizer=args.optimizer,
    )
    OPTIMIZERS[args.optimizer](bags.parameters(), lr=LEARNING_RATE)
    return bags


def build_torch(world: World, args: argparse.Namespace) -> nn.EmbeddingBag:
    torch.manual_seed(args.seed)
    return nn.EmbeddingBag(world.num_rows, args.dim, mode="sum", sparse=True)


def check(world: World, args: argparse.Namespace) -> dict[str, int]:
    """What the first batch missed.

    Raises:
        RuntimeError: the tables differ from torch's, or the first batch misses other than the most counted rows.
    """
    bags, whole = build_ours(world, args), build_torch(world, args)
    for number, table in enumerate(whole.weight.detach().split(world.table_sizes)):
        rows = table[: 1 << 18]
        if not torch.equal(bags._cached_weight.logical_chunk("weight", *first_ids(world, number, rows)), rows):
            raise RuntimeError(f"table {number} was not filled with what nn.EmbeddingBag draws")
    batch = world.batches[0]
    with torch.no_grad():
        bags(batch.values, batch.offsets)
    missed, _ = simulate(world, frequency_rows(world.counts), world.num_slots(args.cache_ratio), 1, belady=False)
    if (bags.stats.misses_per_table != missed[0]).any():
        raise RuntimeError(f"the first batch missed {bags.stats.misses} ids; the most counted rows miss {missed.sum()}")
    return {"misses": bags.stats.misses, "looked_up": batch.num_ids, "num_slots": bags.num_slots}


def first_ids(world: World, number: int, rows: torch.Tensor) -> tuple[int, int]:
    """first, last of `rows`, the first ones of table `number`, as ids of the whole."""
    first = sum(world.table_sizes[:number])
    return first, first + rows.shape[0]


def timed(build: Any, world: World, args: argparse.Namespace) -> float:
    """Seconds."""
    gc.collect()
    began = time.perf_counter()
    built = build(world, args)
    seconds = time.perf_counter() - began
    del built
    return seconds


def phases(world: World, args: argparse.Namespace) -> dict[str, float]:
    """Seconds by phase of one more start of ours, own time."""
    gc.collect()
    watch, beside = Stopwatch(), Stopwatch()
    with watch.patched(*PHASES[0]), watch.patched(*PHASES[1]), watch.patched(*PHASES[2]):
        with beside.patched(*PHASE_BESIDE), watch.phase(THE_REST):
            build_ours(world, args)
    return {name: ms / 1e3 for (_, name), ms in (watch.take() | beside.take()).items()}


def as_markdown(results: dict[str, Any]) -> str:
    settings, seconds, first = results["settings"], results["seconds"], results["first_batch"]
    rows = [
        [
            spread(seconds["ours"], 2),
            spread(seconds["torch"], 2),
            f"{results['ratio']:.2f}",
            f"{results['beyond_s']:.2f}",
            f"{BUDGET_S:.1f}",
            results["verdict"],
        ]
    ]
    header = ["ours, s", "nn.EmbeddingBag, s", "ratio of medians", "beyond, s", "budget, s", ""]
    return "\n\n".join(
        [
            "# Start-up of a count-ordered table",
            f"`{results['command']}`",
            f"{results['num_rows']:,} rows x {settings['dim']} float32 in {results['num_tables']} tables, "
            f"{settings['optimizer']}, {first['num_slots']:,} slots, {settings['repeats']} starts of each in turn, "
            f"{settings['threads']} thread(s) of torch and one that writes; min / median / p80. Counted right: the "
            f"first batch missed {first['misses']:,} of {first['looked_up']:,} ids.",
            markdown_table(header, rows),
            "One more start of ours, seconds by phase:",
            markdown_table(["phase", "s"], [[name, f"{s:.2f}"] for name, s in results["phases"].items()]),
            machine_line(results["machine"]),
            f"Peak {results['peak_gib']} GiB (both tables at once, to compare them).",
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "the rows of tables above 10,000")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--cache-ratio", type=float, default=0.015)
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--counted", type=int, default=20, help="batches that the counts are of")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print cProfile's view of one more start of ours")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = default_out("start-up", parser, args, "scale", "optimizer", "threads")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    world = make_world(args.scale, args.batch_size, args.counted, 1, args.seed)
    first_batch = check(world, args)  # compiles what has to be, too
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(args.repeats):
        seconds["ours"].append(timed(build_ours, world, args))
        seconds["torch"].append(timed(build_torch, world, args))
    median = {name: float(np.median(of_one)) for name, of_one in seconds.items()}
    beyond = median["ours"] - median["torch"]
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine,
        "num_rows": world.num_rows,
        "num_tables": world.num_tables,
        "first_batch": first_batch,
        "seconds": {name: summary(of_one) for name, of_one in seconds.items()},
        "ratio": median["ours"] / median["torch"],
        "beyond_s": beyond,
        "verdict": verdict(beyond, BUDGET_S),
        "all_s": seconds,
        "phases": phases(world, args),
    }
    if args.profile:
        print_profile(lambda: build_ours(world, args))
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
