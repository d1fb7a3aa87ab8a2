"""The time of a lookup whose rows are all resident, against nn.EmbeddingBag's forward over the whole table.

    python benchmarks/prepare.py [--threads 1 2] [--huge-pages] [--scale 0.05]

The load is that of `step` (`load`), but the cache is ordered by the counts of the very batches that are looked up, so
that all their rows are in its slots from the start: the run asserts that not one id was missed. Three parts of ours
take turns with torch's forward (its ids joined beforehand, its graph recorded), batch by batch:

- prepare: the module's own call of RowCache.prepare, and the release of its pins: look up, number the distinct rows,
  count, pin.
- check + prepare: with the check of the input before it, as every forward has it.
- forward: all of it, to an output of its own, its graph recorded and dropped.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from contenders import Cached, Contender, Torch, initial_weights
from harness import (
    HUGE_PAGES,
    argument_parser,
    conclude,
    default_out,
    describe_machine,
    interleaved,
    machine_line,
    markdown_table,
    print_profile,
    ratio_of,
    restart_with_huge_pages,
    spread,
    summary,
    verdict,
)
from load import StepBatch, World, make_world

import colossal_freqcache
from colossal_freqcache.block import plain_mode

BUDGET = 0.20  # our median over torch's


class Prepare(Cached):
    """Parts of a forward that hits, on their own."""

    def check(self, batch: StepBatch) -> Any:
        """The batch as the module's own forward hands it to `prepare`."""
        return self.module._batch(batch.values, batch.offsets, None)

    def prepare(self, checked: Any) -> None:
        with plain_mode():
            self.module._cache.unpin(self.module._prepare(checked).slot_of_unique)


def in_hindsight(world: World) -> World:
    """The same batches, counted beforehand."""
    joined = torch.cat([batch.joined for batch in world.batches])
    return world._replace(counts=torch.bincount(joined, minlength=world.num_rows).numpy())


def measure(contenders: tuple[Prepare, Contender], world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each number of threads.

    Raises:
        RuntimeError: an id was missed.
    """
    ours, theirs = contenders
    once = [(batch, ours.check(batch)) for batch in world.batches]
    steps = {
        "prepare": lambda pair: ours.prepare(pair[1]),
        "check + prepare": lambda pair: ours.prepare(ours.check(pair[0])),
        "forward": lambda pair: ours.forward(pair[0]),
        "torch": lambda pair: theirs.forward(pair[0]),
    }
    batches = once * args.rounds
    stats = ours.module.stats
    runs = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        interleaved(steps, once)  # not counted
        stats.reset()
        times = interleaved(steps, batches)
        looked_up = 3 * sum(batch.num_ids for batch, _ in batches)
        if (stats.hits, stats.misses) != (looked_up, 0):
            raise RuntimeError(f"{looked_up} ids were to be hits; counted {stats.hits} hits, {stats.misses} misses")
        ratios = {name: ratio_of(times[name], times["torch"]) for name in steps if name != "torch"}
        runs.append(
            {
                "threads": threads,
                "ms": {name: summary(of_one) for name, of_one in times.items()},
                "ratio": ratios,
                "verdict": {
                    name: verdict(ratio["of_median"], None if name == "forward" else BUDGET)
                    for name, ratio in ratios.items()
                },
                "hits": stats.hits,
                "misses": stats.misses,
                "all_ms": {name: [round(ms, 3) for ms in of_one] for name, of_one in times.items()},
            }
        )
        if args.profile:
            print_profile(lambda: [ours.prepare(ours.check(batch)) for batch, _ in batches])
    return runs


def as_markdown(results: dict[str, Any]) -> str:
    settings, world = results["settings"], results["world"]
    rows = [
        [
            name,
            run["threads"],
            spread(run["ms"][name], 2),
            spread(run["ms"]["torch"], 2),
            f"{ratio['of_median']:.3f}",
            f"{ratio['of_min']:.3f}",
            "-" if name == "forward" else f"{BUDGET:.2f}",
            run["verdict"][name],
        ]
        for run in results["runs"]
        for name, ratio in run["ratio"].items()
    ]
    header = ["ours, all hits", "threads", "ours, ms", "torch's forward, ms", "ratio of medians", "of minima", "budget"]
    pages = "huge pages" if settings["huge_pages"] else "4-KiB pages (`--huge-pages`: by huge ones)"
    return "\n\n".join(
        [
            "# A lookup that hits, against a forward over the whole table",
            f"`{results['command']}`",
            f"{world['num_tables']} tables, {world['num_rows']:,} rows x {settings['dim']} float32, batches of "
            f"{settings['batch_size']:,} x {world['num_tables']} ids, {world['num_slots']:,} slots; "
            f"{settings['batches']} batches, {settings['rounds']} times; min / median / p80. "
            f"{results['runs'][0]['hits']:,} hits and {results['runs'][0]['misses']} misses were counted. Torch's "
            f"output is faulted in by {pages}.",
            markdown_table([*header, ""], rows),
            machine_line(results["machine"]),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "the rows of tables above 10,000")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--cache-ratio", type=float, default=0.015)
    parser.add_argument("--batches", type=int, default=12, help="different ones, whose rows all fit into the slots")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is looked up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--huge-pages", action="store_true", help="torch's allocator asks for huge pages, too")
    parser.add_argument("--profile", action="store_true", help="print cProfile's view of further lookups of ours")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = default_out("prepare", parser, args, "scale", "threads", "huge_pages")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    if args.huge_pages:
        restart_with_huge_pages(__file__, argv)
    args.huge_pages = os.environ.get(HUGE_PAGES) == "1"
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    world = in_hindsight(make_world(args.scale, args.batch_size, 0, args.batches, args.seed))
    num_slots = max(int(args.cache_ratio * world.num_rows), int(np.count_nonzero(world.counts)))
    initial = initial_weights(world, args.dim, args.seed)
    common = ("sgd", world, initial, num_slots, torch.empty(world.batch_size, world.num_tables, args.dim))
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine,
        "world": {"num_tables": world.num_tables, "num_rows": world.num_rows, "num_slots": num_slots},
        "runs": measure((Prepare(*common), Torch(*common)), world, args),
    }
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
