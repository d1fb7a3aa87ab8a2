"""How the time of a training step depends on the rows, the slots, the batch, the width and the pooling.

    python benchmarks/scale.py [--sweeps rows slots batch dim pooling] [--scale 0.01]

rows, slots: only that number differs. Each batch has every row of a hot set and a number of rows that have never come
before; the cache holds the hot set and, to the last slot, trained rows that come no more. So every step misses,
fetches and writes back exactly the new rows, however many rows or slots there are: asserted. All sizes take turns at
each batch, and the ratio is to the smallest. A step's work should be O(ids + misses): what is left is where the memory
lies.

batch, dim, pooling: ours with slots for an eighth of the rows, against nn.EmbeddingBag(sparse=True) with torch's SGD
over the whole table, ids as skewed as a table of Criteo's Kaggle set (synthetic, calibrated).

Shapes: R rows, C slots, D width, N ids in a batch, B bags.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch
from contenders import LEARNING_RATE
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
    verdict,
)
from load import PRESET
from torch import nn

import colossal_freqcache
from colossal_freqcache import FreqAwareEmbeddingBag, optim
from colossal_freqcache.synthetic import TableStream

ROWS_BUDGET = 1.15  # the step at 100 times the rows over the step at the fewest
DROPPED = 4
MULTIPLIER = 0x9E3779B1  # prime, and larger than any table: (k * MULTIPLIER) % R is a bijection
WIDTH_OF_STEADY = 8
LAW_OF_TABLE = 3  # of the Kaggle set


class Bag:
    """One cached table, a step at a time."""

    def __init__(self, num_rows: int, dim: int, num_slots: int, policy: str | None, counts: Any = None) -> None:
        torch.manual_seed(0)
        self.module = FreqAwareEmbeddingBag(
            num_rows,
            dim,
            mode="sum",
            num_slots=num_slots,
            evict_strategy=policy,
            ids_freq_mapping=counts,
            optimizer="sgd",
        )
        self.optimizer: torch.optim.Optimizer = optim.SGD(self.module.parameters(), lr=LEARNING_RATE)

    def step(self, ids: torch.Tensor) -> None:
        """ids: (B, n)"""
        self.module(ids).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Plain(Bag):
    """The same over nn.EmbeddingBag."""

    def __init__(self, num_rows: int, dim: int) -> None:
        torch.manual_seed(0)
        self.module = nn.EmbeddingBag(num_rows, dim, mode="sum", sparse=True)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=LEARNING_RATE)


# ---- rows and slots: the same hits and misses at every size ----------------------------------------------------------


class Steady(Bag):
    """A cache that misses `num_new` rows a step, all new ones, and writes as many back.

    The k-th id of the table is k * MULTIPLIER mod R: the hot ones come first, the new ones after them, and those that
    fill the cache at the start last."""

    def __init__(self, num_rows: int, num_slots: int, policy: str, num_hot: int, num_new: int, num_steps: int) -> None:
        assert num_hot + 2 * num_new <= num_slots and num_slots + num_new * num_steps <= num_rows
        self.num_rows, self.num_hot, self.num_new = num_rows, num_hot, num_new
        filling = self.ids(np.arange(num_rows - num_slots + num_hot, num_rows))
        hot = self.ids(np.arange(num_hot))
        counts = None
        if policy == "dataset":  # then new rows are the first to leave
            counts = np.zeros(num_rows, np.int64)
            counts[filling], counts[hot] = 1, 2
        super().__init__(num_rows, WIDTH_OF_STEADY, num_slots, policy, counts)
        for piece in np.array_split(np.concatenate([filling, hot]), 4):
            self.step(torch.from_numpy(piece)[:, None])
        self.num_slots = num_slots

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        return numbers * MULTIPLIER % self.num_rows

    def step_of(self, numbers: np.ndarray) -> None:
        """numbers: (N,) which ids."""
        self.step(torch.from_numpy(self.ids(numbers))[:, None])

    def check(self, num_ids: int, num_steps: int) -> None:
        """Raises RuntimeError if the last steps' hits and misses are not those intended."""
        stats = self.module.stats
        found = (stats.hits, stats.misses_unique, stats.rows_fetched, stats.rows_written_back)
        moved = self.num_new * num_steps
        intended = (num_ids * num_steps - moved, moved, moved, moved)
        if found != intended or self.module.num_slots != self.num_slots:
            raise RuntimeError(
                f"{self.num_rows} rows, {self.num_slots} slots: hits, misses, rows fetched and written back were "
                f"{found}, and should be {intended}"
            )


def steady_batches(num_hot: int, num_new: int, num_ids: int, num_steps: int, seed: int) -> Iterator[np.ndarray]:
    """(N,) numbers of ids: each hot one, hot ones again with a skew, `num_new` new ones; in random order."""
    generator = np.random.default_rng(seed)
    for step in range(num_steps):
        again = (num_hot * generator.random(num_ids - num_hot - num_new) ** 4).astype(np.int64)
        new = np.arange(num_new) + num_hot + step * num_new
        yield generator.permutation(np.concatenate([np.arange(num_hot), again, new]))


def steady_sweep(
    cases: Sequence[tuple[int, int]], policy: str, num_hot: int, num_new: int, num_ids: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One entry for each (rows, slots), the smallest first."""
    num_steps = DROPPED + args.steps
    batches = list(steady_batches(num_hot, num_new, num_ids, num_steps, args.seed))
    bags = {case: Steady(*case, policy, num_hot, num_new, num_steps) for case in cases}
    steps = {case: bag.step_of for case, bag in bags.items()}
    interleaved(steps, batches[:DROPPED])
    for bag in bags.values():
        bag.module.stats.reset()
    times = interleaved(steps, batches[DROPPED:])
    for bag in bags.values():
        bag.check(num_ids, args.steps)
    first = times[cases[0]]
    return [
        {
            "policy": policy,
            "num_rows": case[0],
            "num_slots": case[1],
            "num_ids": num_ids,
            "rows_missed": num_new,
            "hit_ratio": bags[case].module.stats.hit_ratio,
            "ms": summary(times[case]),
            "ratio": ratio_of(times[case], first),
            "all_ms": [round(ms, 4) for ms in times[case]],
        }
        for case in cases
    ]


def rows_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """10^6, 10^7, 10^8 rows, 100,000 slots, 131,072 ids of which 8,192 miss."""
    sizes = [int(rows * args.scale) for rows in (10**6, 10**7, 10**8)]
    slots, hot, new, ids = (int(number * args.scale) for number in (100_000, 30_000, 8_192, 131_072))
    found = steady_sweep([(rows, slots) for rows in sizes], "lru", hot, new, ids, args)
    found[-1]["verdict"] = verdict(found[-1]["ratio"]["of_median"], ROWS_BUDGET)
    return found


def slots_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """10^4 to 10^7 slots, 2 * 10^7 rows, 8,192 ids of which 1,000 miss."""
    rows = int(2 * 10**7 * args.scale)
    sizes = [int(slots * args.scale) for slots in (10**4, 10**5, 10**6, 10**7)]
    hot, new, ids = (int(number * args.scale) for number in (2_000, 1_000, 8_192))
    return [
        entry
        for policy in ("dataset", "lru")
        for entry in steady_sweep([(rows, slots) for slots in sizes], policy, hot, new, ids, args)
    ]


# ---- batch, width, pooling: against torch ----------------------------------------------------------------------------


def against_torch(num_rows: int, dim: int, num_bags: int, pooling: int, args: argparse.Namespace) -> dict[str, Any]:
    """Ours and torch's step in turn; small batches get more of them."""
    gc.collect()
    num_steps = DROPPED + int(np.clip(args.steps * 4096 // (num_bags * pooling), args.steps, 10 * args.steps))
    stream = TableStream(num_rows, PRESET.fit(LAW_OF_TABLE), seed=args.seed)
    batches = [torch.from_numpy(stream.draw(num_bags * pooling)).view(-1, pooling) for _ in range(num_steps)]
    num_slots = max(num_rows // 8, *(batch.unique().numel() for batch in batches))
    ours, plain = Bag(num_rows, dim, num_slots, None), Plain(num_rows, dim)
    steps = {"ours": ours.step, "torch": plain.step}
    interleaved(steps, batches[:DROPPED])
    stats = ours.module.stats
    stats.reset()
    times = interleaved(steps, batches[DROPPED:])
    looked_up = sum(batch.numel() for batch in batches[DROPPED:])
    if stats.hits + stats.misses != looked_up or not stats.misses:
        raise RuntimeError(f"{looked_up} ids were looked up; counted {stats.hits} hits and {stats.misses} misses")
    return {
        "num_rows": num_rows,
        "num_slots": num_slots,
        "dim": dim,
        "bags": num_bags,
        "pooling": pooling,
        "hit_ratio": stats.hit_ratio,
        "rows_missed": stats.misses_unique / (num_steps - DROPPED),
        "ms": {name: summary(of_one) for name, of_one in times.items()},
        "ratio": ratio_of(times["ours"], times["torch"]),
        "all_ms": {name: [round(ms, 4) for ms in of_one] for name, of_one in times.items()},
    }


def scaled(number: int, args: argparse.Namespace) -> int:
    return max(1, int(number * args.scale))


def batch_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """1 to 65,536 bags of one id, 10^6 rows of 32."""
    return [
        against_torch(scaled(10**6, args), 32, scaled(bags, args), 1, args)
        for bags in (1, 16, 256, 4096, 16_384, 65_536)
    ]


def dim_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """8 to 256 columns, 16,384 bags of one id, 10^6 rows."""
    return [against_torch(scaled(10**6, args), dim, scaled(16_384, args), 1, args) for dim in (8, 16, 32, 64, 128, 256)]


def pooling_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """1 to 100 ids a bag, 2,048 bags, 10^6 rows of 32."""
    return [
        against_torch(scaled(10**6, args), 32, scaled(2_048, args), pooling, args) for pooling in (1, 4, 10, 32, 100)
    ]


SWEEPS = {"rows": rows_sweep, "slots": slots_sweep, "batch": batch_sweep, "dim": dim_sweep, "pooling": pooling_sweep}


# ---- the report -----------------------------------------------------------------------------------------------------


def steady_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"{entry['num_rows']:,}", f"{entry['num_slots']:,}", entry["policy"], f"{entry['num_ids']:,}"]
        + [f"{entry['hit_ratio']:.4f}", f"{entry['rows_missed']:,}", spread(entry["ms"], 2)]
        + [f"{entry['ratio'][name]:.3f}" for name in ("of_median", "of_min")]
        + ([f"{ROWS_BUDGET:.2f}", entry["verdict"]] if "verdict" in entry else ["-", "-"])
        for entry in entries
    ]
    header = ["rows", "slots", "policy", "ids", "hit ratio", "rows missed", "ms", "to the smallest, medians", "minima"]
    return markdown_table([*header, "budget", ""], rows)


def against_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"{entry[name]:,}" for name in ("bags", "pooling", "dim", "num_rows", "num_slots")]
        + [f"{entry['hit_ratio']:.4f}", f"{entry['rows_missed']:,.0f}"]
        + [spread(entry["ms"][name], 3) for name in ("ours", "torch")]
        + [f"{entry['ratio'][name]:.3f}" for name in ("of_median", "of_min")]
        for entry in entries
    ]
    header = ["bags", "ids a bag", "dim", "rows", "slots", "hit ratio", "rows missed", "ours, ms", "torch, ms"]
    return markdown_table([*header, "ratio of medians", "of minima"], rows)


def as_markdown(results: dict[str, Any]) -> str:
    sections = [
        f"## {name}\n\n{SWEEPS[name].__doc__}\n\n{(steady_table if 'policy' in entries[0] else against_table)(entries)}"
        for name, entries in results["sweeps"].items()
    ]
    settings = results["settings"]
    return "\n\n".join(
        [
            "# The time of a step against rows, slots, batch, width and pooling",
            f"`{results['command']}`",
            f"SGD, float32, {settings['threads']} thread(s), {settings['steps']} timed steps or more after {DROPPED} "
            f"dropped ones; min / median / p80. Sizes are those named times {settings['scale']:g}. In rows and slots, "
            "every step missed, fetched and wrote back exactly the rows told.",
            *sections,
            machine_line(results["machine"]),
            f"Peak {results['peak_gib']} GiB.",
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "rows, slots and batches")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps; small batches get up to ten times as many")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = default_out("scale", parser, args, "scale", "sweeps", "threads")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    sweeps = {}
    for name in args.sweeps:
        gc.collect()
        sweeps[name] = SWEEPS[name](args)
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine,
        "sweeps": sweeps,
    }
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
