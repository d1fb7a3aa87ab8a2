"""The time of one training step: a cached table collection against torch with the whole table in RAM.

    python benchmarks/step.py [--scale 1.0] [--threads 2] [--optimizers sgd] [--huge-pages] [--profile]

A step is prepare + forward + backward + optimizer + zero_grad through autograd, with an output of its own that the
caller might keep. The load has the shape of Criteo's Kaggle set: 26 tables, one id a bag, ids as skewed as there (the
calibrated generator of examples/dlrm), a cache of 1.5 % of the rows ordered by the counts of 20 earlier batches, real
misses.

Ours is FreqAwareEmbeddingBagCollection with a row optimizer. Torch is ONE nn.EmbeddingBag(sparse=True) over the tables
laid end to end, with joined ids made beforehand: its fastest form, 26 modules and a torch.stack are slower. Its ids are
sample-major, so that its output, too, is (B, T, D). Row-wise Adagrad has no form in torch: it is held against Adagrad.

What the run checks of itself: hits and misses of each table are those of a plain simulation of the policy, and the
trained tables agree. Belady's optimum for the same slots, which knows every batch to come, is the floor of the misses.

Shapes: B samples, T tables, N = B * T ids in a batch, D embedding width, R rows of all tables, C slots.
"""

import argparse
import contextlib
import cProfile
import gc
import json
import os
import pstats
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from harness import (
    REPOSITORY,
    Stopwatch,
    command_line,
    describe_machine,
    interleaved,
    markdown_table,
    peak_gib,
    summary,
    write_results,
)
from torch import nn

import colossal_freqcache
from colossal_freqcache import FreqAwareEmbeddingBagCollection, optim

sys.path.insert(0, str(REPOSITORY / "examples" / "dlrm"))

from data_synthetic import SyntheticData

LEARNING_RATE = 0.05
OPTIMIZERS = {  # name: (ours, torch's)
    "sgd": (optim.SGD, torch.optim.SGD),
    "adagrad": (optim.Adagrad, torch.optim.Adagrad),
    "rowwise_adagrad": (optim.RowWiseAdagrad, torch.optim.Adagrad),
}
# Per sqrt(1 + look-ups of the row): torch's SGD adds a row's gradients to it one by one, we add them up first.
# One update of a row that was looked up once is about 250 times that.
TOLERANCE = 2e-6
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own switch: its allocator asks for huge pages, as numpy's does by itself


# ---- the load -------------------------------------------------------------------------------------------------------


class StepBatch(NamedTuple):
    """One batch in the form of each side.

    values: (N,) ids local to their table, table-major. joined: (N,) ids of the whole, sample-major. offsets: (N,)."""

    values: torch.Tensor
    joined: torch.Tensor
    offsets: torch.Tensor


class World(NamedTuple):
    """table_sizes: T ints. big_tables: those whose skew was fitted. counts: (R,). batches: after the counted ones."""

    table_sizes: list[int]
    big_tables: list[int]
    counts: np.ndarray
    batches: list[StepBatch]

    @property
    def num_rows(self) -> int:
        return sum(self.table_sizes)


def make_world(scale: float, batch_size: int, num_counted: int, num_batches: int, seed: int) -> World:
    data = SyntheticData("kaggle", scale=scale, num_train=(num_counted + num_batches) * batch_size, seed=seed)
    num_tables = len(data.table_sizes)
    first_id = np.cumsum([0, *data.table_sizes[:-1]])[:, None]
    counts = np.zeros(sum(data.table_sizes), np.int64)
    offsets = torch.arange(num_tables * batch_size)
    batches = []
    for number, batch in enumerate(data.train_batches(batch_size)):
        joined = batch.values.reshape(num_tables, batch_size) + first_id
        if number < num_counted:
            counts += np.bincount(joined.reshape(-1), minlength=counts.size)
        else:
            sample_major = torch.from_numpy(np.ascontiguousarray(joined.T).reshape(-1))
            batches.append(StepBatch(torch.from_numpy(batch.values), sample_major, offsets))
    return World(data.table_sizes, sorted(data.preset.fits), counts, batches)


# ---- what the misses must be, and could be --------------------------------------------------------------------------


def frequency_rows(counts: np.ndarray) -> np.ndarray:
    """row_of_id (R,): 0 for the most counted id, equal ones by id."""
    row_of_id = np.empty(counts.size, np.int64)
    row_of_id[np.argsort(-counts, kind="stable")] = np.arange(counts.size)
    return row_of_id


def simulate(world: World, num_warm: int, num_slots: int, belady: bool) -> tuple[np.ndarray, np.ndarray]:
    """(occurrences missed by step and table (S, T), rows missed by step (S,)).

    The cache has `num_slots` and starts with the `num_warm` most counted rows.

    A step's rows must all be resident; for those that are not, the resident rows of the highest priority to leave go:
    the least counted ones, or with `belady` those whose next use is farthest."""
    row_of_id = frequency_rows(world.counts)
    num_tables = len(world.table_sizes)
    unique_rows = [np.unique(row_of_id[batch.joined.numpy()]) for batch in world.batches]
    resident = np.zeros(world.num_rows, np.bool_)
    resident[:num_warm] = True
    num_resident = num_warm
    never = len(unique_rows)
    next_use = np.full(world.num_rows, never, np.int32)  # after the step at hand
    following = [np.empty(0, np.int32)] * len(unique_rows)  # by step, the use after that of its rows
    for number in range(never - 1, -1, -1):
        following[number] = next_use[unique_rows[number]]
        next_use[unique_rows[number]] = number
    missed = np.zeros((never, num_tables), np.int64)
    missed_rows = np.zeros(never, np.int64)
    for number, (batch, unique) in enumerate(zip(world.batches, unique_rows, strict=True)):
        missed[number] = (~resident[row_of_id[batch.joined.numpy()]]).reshape(-1, num_tables).sum(axis=0)
        absent = unique[~resident[unique]]
        missed_rows[number] = absent.size
        num_victims = max(0, num_resident + absent.size - num_slots)
        resident[unique] = False  # they stay: not candidates
        candidates = np.flatnonzero(resident)
        if num_victims and belady:
            victims = candidates[np.argpartition(-next_use[candidates], num_victims - 1)[:num_victims]]
        else:
            victims = candidates[candidates.size - num_victims :]
        resident[victims] = False
        resident[unique] = True
        num_resident += absent.size - num_victims
        next_use[unique] = following[number]
    return missed, missed_rows


# ---- the contenders -------------------------------------------------------------------------------------------------


class Contender:
    """One step, in parts that can be timed apart. `grad` (B, T, D) is what a model above would send back."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, grad: torch.Tensor) -> None:
        self.module = module
        self.optimizer = optimizer
        self.grad = grad

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """(B, T, D)"""
        raise NotImplementedError

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: StepBatch) -> None:
        out = self.forward(batch)
        out.backward(self.grad)
        self.update()


class Uncached(Contender):
    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.joined, batch.offsets).view(self.grad.shape)


class Cached(Contender):
    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self.module(batch.values, batch.offsets)


def make_pair(name: str, world: World, dim: int, cache_ratio: float, seed: int) -> tuple[Cached, Uncached]:
    """Ours and torch's, with the same initial weights."""
    ours, theirs = OPTIMIZERS[name]
    batch_size = world.batches[0].values.numel() // len(world.table_sizes)
    torch.manual_seed(seed)
    whole = nn.EmbeddingBag(world.num_rows, dim, mode="sum", sparse=True)
    grad = torch.randn(batch_size, len(world.table_sizes), dim) * 0.01
    bags = FreqAwareEmbeddingBagCollection(
        world.table_sizes,
        dim,
        mode="sum",
        cache_ratio=cache_ratio,
        ids_freq_mapping=world.counts,
        optimizer=name,
        _weight=whole.weight.detach().split(world.table_sizes),
    )
    return (
        Cached(bags, ours(bags.parameters(), lr=LEARNING_RATE), grad),
        Uncached(whole, theirs(whole.parameters(), lr=LEARNING_RATE), grad),
    )


def largest_difference(cached: Cached, uncached: Uncached, world: World, num_steps: int) -> tuple[float, float]:
    """(largest absolute difference of a weight to torch's after `num_steps`, the largest in units of its tolerance)."""
    joined = torch.cat([batch.joined for batch in world.batches[:num_steps]])
    unit = TOLERANCE * (1 + torch.bincount(joined, minlength=world.num_rows)).double().sqrt()
    differences = [
        (cached.module.logical_weight(number) - table).abs().amax(dim=1)
        for number, table in enumerate(uncached.module.weight.detach().split(world.table_sizes))
    ]
    of_row = torch.cat(differences)
    return float(of_row.max()), float((of_row / unit).max())


# ---- where our time goes --------------------------------------------------------------------------------------------

# (object below the collection, method, phase, the group that starts there)
PHASES = (
    ("", "_batch", "check the input", "prepare"),
    ("_cache", "prepare", "glue", "prepare"),
    ("_cache.kernels", "plan", "look up, number the rows, count", None),
    ("_cache.kernels", "add_pins", "pins", None),
    ("_cache.policy", "evict", "choose victims", None),
    ("_cache.store", "write", "write back", None),
    ("_cache.slots", "evict", "maps", None),
    ("_cache.slots", "take_free", "maps", None),
    ("_cache.store", "read", "fetch", None),
    ("_cache.slots", "admit", "maps", None),
    ("_cache.policy", "admit", "maps", None),
    ("_cache.slots", "marked", "dirty bits", None),
    ("_cache.slots", "mark", "dirty bits", None),
    ("_cache.slots", "unmark", "dirty bits", None),
    ("_cache.kernels", "pool", "kernel, with the pages of its output", None),
    ("_cache.kernels", "pool_backward", "kernel", None),
    ("_cache.kernels", "update_sgd", "kernel", None),
    ("_cache.kernels", "update_adagrad", "kernel", None),
    ("_cache.kernels", "update_rowwise_adagrad", "kernel", None),
)
GROUPS = ("prepare", "forward", "backward", "optimizer", "release")


@contextlib.contextmanager
def instrumented(bags: FreqAwareEmbeddingBagCollection, watch: Stopwatch) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for path, method, name, group in PHASES:
            owner = bags
            for attribute in filter(None, path.split(".")):
                owner = getattr(owner, attribute)
            patches.enter_context(watch.patched(owner, method, name, group))
        yield


def phase_times(cached: Cached, batches: Sequence[StepBatch]) -> dict[str, dict[str, Any]]:
    """Median ms by group and phase, own time, and of each group as a whole."""
    watch = Stopwatch()
    by_step = []
    with instrumented(cached.module, watch):
        for batch in batches:
            with watch.phase("glue and autograd", "forward"):
                out = cached.forward(batch)
            with watch.phase("glue, sort by slot, autograd", "backward"):
                out.backward(cached.grad)
            with watch.phase("glue, release of the slots", "optimizer"):
                cached.update()
            with watch.phase("free the output", "release"):
                del out
            by_step.append(watch.take())
    keys = list(dict.fromkeys(key for phases in by_step for key in phases))
    groups: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        own = {
            name: float(np.median([phases.get((group, name), 0.0) for phases in by_step]))
            for of_group, name in keys
            if of_group == group
        }
        totals = [sum(ms for key, ms in phases.items() if key[0] == group) for phases in by_step]
        groups[group] = {"total": summary(totals), "median_by_phase": own}
    return groups


def print_profile(cached: Cached, batches: Sequence[StepBatch]) -> None:
    profile = cProfile.Profile()
    with profile:
        for batch in batches:
            cached.step(batch)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


# ---- a run ----------------------------------------------------------------------------------------------------------


def run_pair(name: str, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """Times ours and torch's `name` in turn over the world's batches; the last ones go to the phases of ours.

    Raises:
        RuntimeError: hits or misses are not those of the simulation, or the trained tables differ.
    """
    gc.collect()  # the tables of the pair before sit in reference cycles
    cached, uncached = make_pair(name, world, args.dim, args.cache_ratio, args.seed)
    bags = cached.module
    num_warm = bags.num_slots
    steps = {"ours": cached.step, "torch": uncached.step}
    first_timed, first_apart = args.dropped, args.dropped + args.steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it grows to.*")  # the slots are reported
        interleaved(steps, world.batches[:1])
        num_slots = bags.num_slots
        interleaved(steps, world.batches[1:first_timed])
    bags.stats.reset()
    times = interleaved(steps, world.batches[first_timed:first_apart])
    stats = bags.stats.as_dict()
    missed, missed_rows = (found[first_timed:first_apart] for found in simulate(world, num_warm, num_slots, False))
    _, belady = simulate(world, num_warm, num_slots, True)
    if bags.num_slots != num_slots:
        raise RuntimeError(f"the cache grew from {num_slots} to {bags.num_slots} slots while timed: give it more")
    num_ids = world.batches[0].values.numel()
    expected = {
        "hits": args.steps * num_ids - int(missed.sum()),
        "misses": int(missed.sum()),
        "misses_unique": int(missed_rows.sum()),
    }
    measured = {key: stats[key] for key in expected}
    if measured != expected or (bags.stats.misses_per_table != missed.sum(axis=0)).any():
        raise RuntimeError(f"{name}: the cache counted {measured}, a simulation of its policy {expected}")
    difference = None
    if name != "rowwise_adagrad":
        difference, in_tolerances = largest_difference(cached, uncached, world, first_apart)
        if in_tolerances > 1:
            raise RuntimeError(
                f"{name}: a row differs from torch's by {in_tolerances:.1f} times what rounding explains"
            )
    ours, torchs = np.array(times["ours"]), np.array(times["torch"])
    big = world.big_tables
    result = {
        "ms": {side: summary(of_side) for side, of_side in times.items()},
        "ratio": {
            "of_min": ours.min() / torchs.min(),
            "of_median": float(np.median(ours) / np.median(torchs)),
            "median_of_steps": float(np.median(ours / torchs)),
        },
        "torch_optimizer": type(uncached.optimizer).__name__,
        "num_slots_at_start": num_warm,
        "num_slots": num_slots,
        "row_bytes": bags._cache.layout.row_bytes,
        "hit_ratio": stats["hit_ratio"],
        "hit_ratio_big_tables": 1 - float(missed[:, big].sum()) / (args.steps * num_ids / missed.shape[1] * len(big)),
        "per_step": {
            key: stats[key] / args.steps
            for key in ("misses", "misses_unique", "rows_fetched", "rows_written_back", "bytes_fetched")
        }
        | {"belady_misses_unique": float(belady[first_timed:first_apart].mean())},
        "largest_difference_to_torch": difference,
        "device_bytes": bags.device_bytes(),
        "all_ms": {side: [round(ms, 3) for ms in of_side] for side, of_side in times.items()},
    }
    del uncached, steps
    result["phases"] = phase_times(cached, world.batches[first_apart:])
    if args.profile:
        print_profile(cached, world.batches[first_timed:first_apart])
    return result


def as_markdown(results: dict[str, Any]) -> str:
    settings, machine, world = results["settings"], results["machine"], results["world"]
    pairs = results["optimizers"]

    def spread(ms: dict[str, float]) -> str:
        return " / ".join(f"{ms[key]:.1f}" for key in ("min", "median", "p80"))

    times = markdown_table(
        ["min / median / p80, ms", "ours", "torch", "ratio of medians", "ratio of minima", "median ratio of a step"],
        [
            [f"{name} (torch: {pair['torch_optimizer']})", spread(pair["ms"]["ours"]), spread(pair["ms"]["torch"])]
            + [f"{pair['ratio'][key]:.3f}" for key in ("of_median", "of_min", "median_of_steps")]
            for name, pair in pairs.items()
        ],
    )
    moved = markdown_table(
        ["a step", "slots (at start)", "hit ratio", "big tables", "rows missed", "Belady", "fetched", "written back"],
        [
            [name, f"{pair['num_slots']} ({pair['num_slots_at_start']})", f"{pair['hit_ratio']:.4f}"]
            + [f"{pair['hit_ratio_big_tables']:.4f}"]
            + [
                f"{pair['per_step'][key]:.0f}"
                for key in ("misses_unique", "belady_misses_unique", "rows_fetched", "rows_written_back")
            ]
            for name, pair in pairs.items()
        ],
    )
    names = list(pairs)
    rows = []
    for group in GROUPS:
        of_group = [pairs[name]["phases"][group] for name in names]
        rows.append([f"**{group}**"] + [f"**{found['total']['median']:.2f}**" for found in of_group])
        for phase in dict.fromkeys(phase for found in of_group for phase in found["median_by_phase"]):
            rows.append([phase] + [f"{found['median_by_phase'].get(phase, 0.0):.2f}" for found in of_group])
    grown = world["rows_per_step"] > min(pair["num_slots_at_start"] for pair in pairs.values())
    notes = [
        f"{world['num_tables']} tables, {world['num_rows']} rows x {settings['dim']} float32, batch "
        f"{settings['batch_size']}, one id a bag; a step has {world['rows_per_step']:.0f} distinct rows. Cache "
        f"{settings['cache_ratio']:.1%} of the rows, ordered by the counts of {settings['counted']} earlier batches. "
        f"{settings['steps']} steps timed in turn, ours and torch's, after {settings['dropped']} dropped ones; "
        f"{settings['threads']} thread(s).",
        "Torch is one `nn.EmbeddingBag(sparse=True)` over the tables laid end to end, ids joined beforehand: its "
        "fastest form. Row-wise Adagrad is held against torch's Adagrad.",
        "Torch's outputs are faulted in by "
        + ("huge pages, as ours are." if settings["huge_pages"] else "4-KiB pages, ours by huge ones; `--huge-pages` "
           "gives torch the same."),
    ]  # fmt: skip
    if grown:
        notes.append(
            "A step has more distinct rows than the slots at the start, so the cache grew at the first, dropped step: "
            "every batch takes most of the slots. At larger scales it does not."
        )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n\n".join(
        [
            "# One training step, cached against uncached",
            f"`{results['command']}`",
            "\n".join(f"- {note}" for note in notes),
            times,
            moved,
            f"Ours apart, median ms over {settings['apart']} further steps with a clock around each call (own time; "
            "the timed steps above have none):",
            markdown_table(["phase", *names], rows),
            f"{machine['cpu']}, {machine['cores']} cores, L3 {machine['l3_cache']}, {machine['memory_gib']} GiB, "
            f"transparent huge pages {machine['transparent_huge_pages']}, {machine['system']}; load at start "
            f"{machine['load_average_at_start']}, at the end {machine['load_average_at_end']}; {versions}; commit "
            f"{machine['commit']}; peak {results['peak_gib']} GiB. Every step's time is in the JSON file beside.",
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scale", type=float, default=0.1, help="share of the rows of tables above 10,000 (1.0: 33.76 M)"
    )
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--cache-ratio", type=float, default=0.015)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--dropped", type=int, default=4, help="steps before those, at least 1")
    parser.add_argument("--apart", type=int, default=10, help="steps after those, timed by phase")
    parser.add_argument("--counted", type=int, default=20, help="batches before all, for the counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--huge-pages", action="store_true", help="torch's allocator asks for huge pages, too")
    parser.add_argument("--profile", action="store_true", help="print cProfile's view of further steps of ours")
    parser.add_argument("--out", type=Path, help="results go to OUT.json and OUT.md; default: in benchmarks/results")
    args = parser.parse_args(argv)
    if min(args.steps, args.dropped, args.apart, args.counted) < 1:
        parser.error("--steps, --dropped, --apart and --counted must be at least 1")
    if args.out is None:
        stem = f"step-{torch.__version__.partition('+')[0]}"
        for name, usual in (("scale", 0.1), ("threads", 1), ("huge_pages", False)):
            if getattr(args, name) != usual:
                stem += f"-{name.replace('_', '-')}" + ("" if usual is False else f"-{getattr(args, name)}")
        args.out = REPOSITORY / "benchmarks" / "results" / stem
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    if args.huge_pages and os.environ.get(HUGE_PAGES) != "1":  # read once, at torch's first allocation: start again
        os.environ[HUGE_PAGES] = "1"
        os.execv(sys.executable, [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)])
    args.huge_pages = os.environ.get(HUGE_PAGES) == "1"
    torch.set_num_threads(args.threads)
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    world = make_world(args.scale, args.batch_size, args.counted, args.dropped + args.steps + args.apart, args.seed)
    results = {
        "command": command_line("benchmarks/step.py", sys.argv[1:] if argv is None else argv),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine,
        "world": {
            "num_tables": len(world.table_sizes),
            "num_rows": world.num_rows,
            "big_tables": world.big_tables,
            "table_sizes": world.table_sizes,
            "rows_per_step": float(np.mean([batch.joined.unique().numel() for batch in world.batches[:5]])),
        },
        "optimizers": {name: run_pair(name, world, args) for name in args.optimizers},
    }
    machine["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    results["peak_gib"] = peak_gib()
    results = json.loads(json.dumps(results))
    markdown = as_markdown(results)
    write_results(args.out, results, markdown)
    print(markdown)
    return results


if __name__ == "__main__":
    main()
