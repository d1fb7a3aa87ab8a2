"""The time of one training step: a cached table collection against peers, those with the whole table in RAM included.

    python benchmarks/step.py [--peers torch fbgemm colossal] [--threads 1 2] [--optimizers sgd] [--huge-pages]
    python benchmarks/step.py --scale 0.05 --steps 5        # a trial

The load has the shape of Criteo's Kaggle set (`load`): 33,762,577 rows, ids as skewed as there, a cache of 1.5 % of the
rows ordered by the counts of 20 earlier batches, real misses. Who trains, and what a step is, stands in `contenders`.

For each optimizer there are two runs: ours among its peers, and ours under Lookahead among them. In a run all take
turns at every batch, first with one number of threads, then with the next. Tables are built anew for each run, and one
run's fit into 20 GiB at full scale.

What a run checks of itself: hits and misses of each table are those of a plain simulation of the policy (for Colossal-
AI's cache the missed rows; with Lookahead, that they are at least Belady's); the trained tables of all agree within
rounding, and those of ours with and without Lookahead bit for bit. Belady's optimum for the same slots, which knows
every batch to come, is the floor of the misses.

Shapes: B samples, T tables, N = B * T ids in a batch, D embedding width, R rows of all tables, C slots, S steps.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from contenders import (
    CHUNK,
    OPTIMIZERS,
    PEERS,
    Cached,
    Contender,
    LookingAhead,
    cuda_calls_redirected,
    initial_weights,
    installed_versions,
)
from harness import (
    HUGE_PAGES,
    Stopwatch,
    argument_parser,
    collect_down_to,
    conclude,
    default_out,
    describe_machine,
    interleaved,
    machine_line,
    markdown_table,
    print_profile,
    ratio_of,
    resident_gib,
    restart_with_huge_pages,
    spread,
    summary,
    verdict,
)
from load import PRESET, StepBatch, World, frequency_rows, make_world, simulate

import colossal_freqcache
from colossal_freqcache import FreqAwareEmbeddingBagCollection
from colossal_freqcache.metrics import CacheStats

BUDGETS = {  # (optimizer, peer): our median over the peer's, at full scale
    ("sgd", "torch"): 0.30,
    ("adagrad", "torch"): 0.20,
    ("sgd", "fbgemm"): 0.50,
    ("rowwise_adagrad", "fbgemm"): 0.60,
    ("sgd", "colossal"): 0.20,
}
VARIANTS = ("ours", "ours+lookahead")
LEFT_GIB = 1.0  # what a run may leave resident beside its tables: compiled code, buffers that are used again
# Per sqrt(1 + look-ups of the row): torch's SGD adds a row's gradients to it one by one, we add them up first.
# One update of a row that was looked up once is about 250 times that.
TOLERANCE = 2e-6


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
    ("_cache.kernels", "order_slots", "sort by slot", None),
    ("_cache.kernels", "pool_backward", "kernel", None),
    ("_cache.kernels", "update_sgd", "kernel of the update", None),
    ("_cache.kernels", "update_adagrad", "kernel of the update", None),
    ("_cache.kernels", "update_rowwise_adagrad", "kernel of the update", None),
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
            with watch.phase("glue and autograd", "backward"):
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


# ---- a run ----------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """Of a cache that evicts by counts: occurrences missed (S, T), rows missed (S,); and the rows Belady's misses."""

    missed: np.ndarray
    rows: np.ndarray
    belady_rows: np.ndarray


class Counted:
    """What a cache's counters rose by since this was made."""

    def __init__(self, stats: CacheStats) -> None:
        self.stats = stats
        self.before, self.before_per_table = stats.as_dict(), stats.misses_per_table.copy()

    def totals(self) -> dict[str, int]:
        now = self.stats.as_dict()
        return {name: now[name] - before for name, before in self.before.items() if name != "hit_ratio"}

    def misses_per_table(self) -> np.ndarray:
        return self.stats.misses_per_table - self.before_per_table


def build(
    optimizer: str, variant: str, peers: Sequence[str], world: World, num_slots: int, args: argparse.Namespace
) -> dict[str, Contender]:
    """By name, ours first; all with the same initial weights. Torch comes last, since it trains them themselves."""
    initial = initial_weights(world, args.dim, args.seed)
    grad = torch.randn(world.batch_size, world.num_tables, args.dim) * 0.01
    common = (optimizer, world, initial, num_slots, grad)
    if variant == "ours":
        ours = Cached(*common, fused=args.fused)
    else:
        ours = LookingAhead(*common, batches=world.batches, window=args.window, fused=args.fused)
    built = {peer: PEERS[peer](*common) for peer in sorted(peers, key=lambda peer: peer == "torch")}
    return {variant: ours, **{peer: built[peer] for peer in peers}}


def run_group(
    optimizer: str,
    variant: str,
    peers: Sequence[str],
    world: World,
    num_slots: int,
    expected: Expected,
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], str]:
    """(what was measured, by number of threads; a digest of our trained table): one interleaved run.

    Raises:
        RuntimeError: hits or misses are not the expected ones, or the trained tables differ.
    """
    per_block = args.dropped + args.steps
    num_trained = per_block * len(args.threads)
    with cuda_calls_redirected() if "colossal" in peers else contextlib.nullcontext():
        contenders = build(optimizer, variant, peers, world, num_slots, args)
        bags = contenders[variant].module
        steps = {name: contender.step for name, contender in contenders.items()}
        measured = []
        for number, threads in enumerate(args.threads):
            torch.set_num_threads(threads)
            timed = slice(number * per_block + args.dropped, (number + 1) * per_block)
            interleaved(steps, world.batches[number * per_block : timed.start])
            counted = Counted(bags.stats)
            times = interleaved(steps, world.batches[timed])
            check_counts(variant, counted, expected, timed)
            measured.append(
                {"optimizer": optimizer, "ours": variant, "threads": threads, "contenders": list(contenders)}
                | {"ms": {name: summary(of_one) for name, of_one in times.items()}}
                | what_was_missed(counted, expected, timed, world)
                | {"against": {peer: compare_times(optimizer, peer, times[variant], times[peer]) for peer in peers}}
                | {"all_ms": {name: [round(ms, 3) for ms in of_one] for name, of_one in times.items()}}
            )
        for contender in contenders.values():
            contender.close()
    if bags.num_slots != num_slots:
        raise RuntimeError(f"the cache grew from {num_slots} to {bags.num_slots} slots: give it more")
    if "colossal" in peers:
        check_colossal(contenders["colossal"], world, num_slots, num_trained)
    differences, digest = compare_tables(contenders, world, num_trained)
    for run in measured:
        run["row_bytes"], run["device_bytes"] = bags._cache.layout.row_bytes, bags.device_bytes()
        run["table_digest"] = digest
        for peer in peers:
            run["against"][peer]["largest_difference"] = differences[peer]
    ours = contenders.pop(variant)
    del contenders, steps
    if isinstance(ours, LookingAhead):
        add_parts(measured, ours, args)
    else:
        add_phases(measured, ours, world.batches[num_trained:], args)
    return measured, digest


def check_counts(variant: str, counted: Counted, expected: Expected, timed: slice) -> None:
    """Of ours: exactly what the simulation says; with Lookahead, at least what Belady's optimum misses up to there."""
    if variant != "ours":
        belady = int(expected.belady_rows[: timed.stop].sum())
        if counted.stats.misses_unique < belady:
            raise RuntimeError(f"{variant}: {counted.stats.misses_unique} rows missed, Belady's optimum {belady}")
        return
    missed = expected.missed[timed]
    simulated = {"misses": int(missed.sum()), "misses_unique": int(expected.rows[timed].sum())}
    found = {name: counted.totals()[name] for name in simulated}
    if found != simulated or (counted.misses_per_table() != missed.sum(axis=0)).any():
        raise RuntimeError(f"the cache counted {found}, a simulation of its policy {simulated}")


def check_colossal(colossal: Contender, world: World, num_slots: int, num_trained: int) -> None:
    _, missed_rows = simulate(world, colossal.row_of_id, num_slots, num_trained, belady=False)
    if colossal.rows_missed != missed_rows.tolist():
        found, simulated = sum(colossal.rows_missed), missed_rows.sum()
        raise RuntimeError(f"Colossal-AI's cache missed {found} rows, a simulation of its policy {simulated}")


def what_was_missed(counted: Counted, expected: Expected, timed: slice, world: World) -> dict[str, Any]:
    num_steps = timed.stop - timed.start
    totals, per_table = counted.totals(), counted.misses_per_table()
    per_step = {name: total / num_steps for name, total in totals.items()}
    miss_ratios = per_table / (num_steps * world.batch_size)
    return {
        "hit_ratio": totals["hits"] / (totals["hits"] + totals["misses"]),
        "hit_ratio_big_tables": 1 - float(miss_ratios[sorted(PRESET.fits)].mean()),
        "miss_ratio_per_table": miss_ratios.tolist(),
        "per_step": per_step | {"belady_misses_unique": float(expected.belady_rows[timed].mean())},
    }


def compare_times(optimizer: str, peer: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    ratio, budget = ratio_of(ours, theirs), BUDGETS.get((optimizer, peer))
    return {"ratio": ratio, "budget": budget, "verdict": verdict(ratio["of_median"], budget)}


def compare_tables(
    contenders: dict[str, Contender], world: World, num_trained: int
) -> tuple[dict[str, dict[str, float]], str]:
    """({peer: the largest difference of a weight to ours, and the largest in units of its tolerance}, digest of ours).

    Raises:
        RuntimeError: a row differs by more than rounding explains.
    """
    joined = torch.cat([batch.joined for batch in world.batches[:num_trained]])
    unit = TOLERANCE * (1 + torch.bincount(joined, minlength=world.num_rows)).float().sqrt()
    ours, *peers = contenders
    digest = hashlib.sha256()
    found = {peer: {"weight": 0.0, "tolerances": 0.0} for peer in peers}
    for first in range(0, world.num_rows, CHUNK):
        last = min(first + CHUNK, world.num_rows)
        rows = contenders[ours].rows(first, last)
        digest.update(rows.contiguous().numpy())
        for peer in peers:
            of_row = (rows - contenders[peer].rows(first, last)).abs().amax(dim=1)
            largest = {"weight": float(of_row.max()), "tolerances": float((of_row / unit[first:last]).max())}
            found[peer] = {name: max(found[peer][name], value) for name, value in largest.items()}
    for peer, largest in found.items():
        if not largest["tolerances"] <= 1:
            raise RuntimeError(f"a row of {peer}'s differs from ours by {largest['tolerances']:.1f} tolerances")
    return found, digest.hexdigest()


def add_phases(
    measured: list[dict[str, Any]], ours: Cached, batches: Sequence[StepBatch], args: argparse.Namespace
) -> None:
    for number, run in enumerate(measured):
        torch.set_num_threads(run["threads"])
        run["phases"] = phase_times(ours, batches[number * args.apart : (number + 1) * args.apart])
        if args.profile:
            print_profile(lambda: [ours.step(batch) for batch in batches[: args.apart]])


def add_parts(measured: list[dict[str, Any]], ours: LookingAhead, args: argparse.Namespace) -> None:
    """Of the timed steps of each block: what took how long."""
    by_block = np.array(ours.parts).reshape(len(measured), -1, 3)[:, args.dropped :]
    for run, parts in zip(measured, by_block, strict=True):
        names = ("ask for the batch", "train", "wait for what is left")
        run["parts"] = {name: summary(of_part) for name, of_part in zip(names, parts.T, strict=True)}


def pooled(builds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """By number of threads, the times of all builds of a run as one; hits are the same in all, phases the last's."""
    merged = []
    for of_threads in zip(*builds, strict=True):
        one = of_threads[-1]
        times = {name: [ms for run in of_threads for ms in run["all_ms"][name]] for name in one["all_ms"]}
        against = {
            peer: found | compare_times(one["optimizer"], peer, times[one["ours"]], times[peer])
            for peer, found in one["against"].items()
        }
        by_build = {name: [run["ms"][name]["median"] for run in of_threads] for name in times}
        ms = {name: summary(of_one) for name, of_one in times.items()}
        merged.append(one | {"ms": ms, "against": against, "all_ms": times, "medians_by_build": by_build})
    return merged


# ---- the report -----------------------------------------------------------------------------------------------------


def times_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [run["optimizer"], run["ours"], peer, run["threads"], spread(run["ms"][run["ours"]]), spread(run["ms"][peer])]
        + [f"{against['ratio'][key]:.3f}" for key in ("of_median", "of_min")]
        + ["-" if against["budget"] is None else f"{against['budget']:.2f}", against["verdict"]]
        for run in runs
        for peer, against in run["against"].items()
    ]
    header = ["optimizer", "ours", "peer", "threads", "ours, ms", "peer, ms", "ratio of medians", "of minima", "budget"]
    return markdown_table([*header, ""], rows)


def builds_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        medians = run["medians_by_build"]
        for peer in run["against"] if len(medians[run["ours"]]) > 1 else ():
            ratios = [ours / theirs for ours, theirs in zip(medians[run["ours"]], medians[peer], strict=True)]
            cells = [", ".join(f"{ms:.1f}" for ms in medians[name]) for name in (run["ours"], peer)]
            rows.append([run["optimizer"], peer, run["threads"], *cells, ", ".join(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(["optimizer", "peer", "threads", "ours, ms", "peer, ms", "ratios"], rows)


def misses_table(runs: Sequence[dict[str, Any]]) -> str:
    names = ("misses_unique", "belady_misses_unique", "rows_fetched", "rows_written_back")
    rows = [
        [run["optimizer"], run["ours"], run["threads"], f"{run['hit_ratio']:.4f}", f"{run['hit_ratio_big_tables']:.4f}"]
        + [f"{run['per_step'][name]:.0f}" for name in names]
        for run in runs
    ]
    header = ["a step", "ours", "threads", "hit ratio", "of the big tables"]
    return markdown_table([*header, "rows missed", "Belady", "fetched", "written back"], rows)


def tables_table(runs: Sequence[dict[str, Any]], table_sizes: Sequence[int]) -> str:
    """Miss ratio by table; the optimizers share a column, since their misses are the same."""
    columns = {(run["ours"], run["threads"]): run["miss_ratio_per_table"] for run in runs}
    rows = [
        [f"{number}", f"{size:,}", *(f"{miss_ratios[number]:.4f}" for miss_ratios in columns.values())]
        for number, size in enumerate(table_sizes)
    ]
    return markdown_table(["table", "rows", *(f"{ours}, {threads} thr." for ours, threads in columns)], rows)


def parts_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [run["optimizer"], run["threads"], *(spread(part, 2) for part in run["parts"].values())]
        for run in runs
        if "parts" in run
    ]
    return markdown_table(
        ["ours+lookahead, ms", "threads", "ask for the batch", "train", "wait for what is left"], rows
    )


def phases_table(runs: Sequence[dict[str, Any]]) -> str:
    with_phases = [run for run in runs if "phases" in run]
    rows = []
    for group in GROUPS:
        of_group = [run["phases"][group] for run in with_phases]
        rows.append([f"**{group}**"] + [f"**{found['total']['median']:.2f}**" for found in of_group])
        for phase in dict.fromkeys(phase for found in of_group for phase in found["median_by_phase"]):
            rows.append([phase] + [f"{found['median_by_phase'].get(phase, 0.0):.2f}" for found in of_group])
    return markdown_table(["phase", *(f"{run['optimizer']}, {run['threads']} thr." for run in with_phases)], rows)


def as_markdown(results: dict[str, Any]) -> str:
    settings, world, runs = results["settings"], results["world"], results["runs"]
    together = "; ".join(
        dict.fromkeys(
            f"{run['optimizer']}: {', '.join(run['contenders'])}" for run in runs if len(run["contenders"]) > 1
        )
    )
    worst = max(against["largest_difference"]["tolerances"] for run in runs for against in run["against"].values())
    notes = [
        f"{world['num_tables']} tables, {world['num_rows']:,} rows x {settings['dim']} float32, batch "
        f"{settings['batch_size']:,}, one id a bag; a step has up to {world['most_distinct_rows']:,} distinct rows. "
        f"{world['num_slots']:,} slots ({world['num_slots'] / world['num_rows']:.2%} of the rows; "
        f"{settings['cache_ratio']:.1%}, or twice a step's distinct rows where those are more), ordered by the counts "
        f"of {settings['counted']} earlier batches.",
        f"{settings['steps']} steps timed after {settings['dropped']} dropped ones, for each number of threads and "
        f"each build of the tables ({settings['builds']}; one with Lookahead); min / median / p80 of all. "
        f"In one interleaved run, all at each batch in turn: {together}.",
        "Outputs of ours lie in huge pages; those of torch and of the peers "
        + ("do so, too." if settings["huge_pages"] else "are faulted in by 4-KiB pages (see `--huge-pages`)."),
        "Ours trains its rows in " + ("the backward (fused=True)." if settings["fused"] else "step() (see `--fused`)."),
        f"Lookahead: window {settings['window']}, depth 1, with two threads of its own beside those of the column; "
        "what they have left to do at the end of a step is waited for within the step.",
        "torch: one `nn.EmbeddingBag(sparse=True)` over the tables laid end to end, ids joined beforehand. fbgemm: "
        "`SplitTableBatchedEmbeddingBagsCodegen`, the optimizer fused. Both have the whole table in RAM.",
        "colossal: Colossal-AI's `CachedEmbeddingBag`, its calls of CUDA redirected to the CPU (device, synchronise, "
        "pin; a copy to the device is none), with our slots and counts.",
        f"The trained tables agree: the largest difference of a row to ours is {worst:.2f} of the tolerance, "
        f"{TOLERANCE:g} * sqrt(1 + its look-ups).",
    ]  # fmt: skip
    by_build = []
    if settings["builds"] > 1:
        by_build = [
            "Medians by build (nobody chooses where in the machine's memory its tables lie):",
            builds_table(runs),
        ]
    if settings["scale"] != 1:
        notes.append("A trial: the budgets are for --scale 1.0.")
    return "\n\n".join(
        [
            "# One training step, ours against its peers",
            f"`{results['command']}`",
            "\n".join(f"- {note}" for note in notes),
            times_table(runs),
            *by_build,
            misses_table(runs),
            "Belady's optimum is the least from the first step on: in a window of it another may miss fewer, and the "
            "rows that Lookahead missed are those of a batch later. Occurrences missed over looked up, by table:",
            tables_table(runs, world["table_sizes"]),
            "A step under Lookahead: asking for the batch finds victims and starts the moves for the next one.",
            parts_table(runs),
            f"Ours apart, median ms over {settings['apart']} further steps with a clock around each call (own time; "
            "the timed steps above have none):",
            phases_table(runs),
            machine_line(results["machine"]),
            f"Load at the end {results['load_average_at_end']}, peak {results['peak_gib']} GiB.",
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "the rows of tables above 10,000")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--cache-ratio", type=float, default=0.015)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="one after the other in each run")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, for each number of threads")
    parser.add_argument("--dropped", type=int, default=4, help="steps before those")
    parser.add_argument(
        "--builds", type=int, default=3, help="times that all tables are built anew (with Lookahead: 1)"
    )
    parser.add_argument("--apart", type=int, default=10, help="steps of ours after those, timed by phase")
    parser.add_argument("--counted", type=int, default=20, help="batches before all, for the counts")
    parser.add_argument("--window", type=int, default=64, help="batches that Lookahead knows")
    parser.add_argument("--fused", action="store_true", help="ours trains the rows inside the backward, as FBGEMM does")
    parser.add_argument("--huge-pages", action="store_true", help="torch's allocator asks for huge pages, too")
    parser.add_argument("--profile", action="store_true", help="print cProfile's view of further steps of ours")
    args = parser.parse_args(argv)
    if min(args.steps, args.dropped, args.builds, args.apart, args.counted, args.window, *args.threads) < 1:
        parser.error("--steps, --dropped, --builds, --apart, --counted, --window and --threads must be at least 1")
    try:
        installed_versions(args.peers)
    except ValueError as error:
        parser.error(str(error))
    if args.out is None:
        args.out = default_out("step", parser, args, "scale", "optimizers", "peers", "threads", "fused", "huge_pages")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, writes the files, prints the Markdown; returns what stands in the JSON file."""
    args = parse(argv)
    if args.huge_pages:
        restart_with_huge_pages(__file__, argv)
    args.huge_pages = os.environ.get(HUGE_PAGES) == "1"
    machine = describe_machine([torch, np, numba, colossal_freqcache])
    machine["versions"] |= installed_versions(args.peers)
    num_trained = (args.dropped + args.steps) * len(args.threads)
    num_after = max(args.window + 2, args.apart * len(args.threads))  # what Lookahead pulls ahead, what phases take
    world = make_world(args.scale, args.batch_size, args.counted, num_trained + num_after, args.seed)
    num_slots = world.num_slots(args.cache_ratio)
    row_of_id = frequency_rows(world.counts)
    expected = Expected(
        *simulate(world, row_of_id, num_slots, num_trained, belady=False),
        simulate(world, row_of_id, num_slots, num_trained, belady=True)[1],
    )
    del row_of_id
    without_tables = resident_gib()
    runs: list[dict[str, Any]] = []
    for optimizer in args.optimizers:
        peers = [peer for peer in args.peers if optimizer in PEERS[peer].optimizers]
        digests = set()
        for variant in VARIANTS if peers else ():
            builds = []
            for _ in range(args.builds if variant == "ours" else 1):
                collect_down_to(without_tables + LEFT_GIB)  # the run before has left reference cycles
                measured, digest = run_group(optimizer, variant, peers, world, num_slots, expected, args)
                builds.append(measured)
                digests.add(digest)
            runs += pooled(builds)
        if len(digests) > 1:
            raise RuntimeError(f"{optimizer}: ours trained other tables with Lookahead, or in another build")
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine,
        "world": {
            "num_tables": world.num_tables,
            "num_rows": world.num_rows,
            "big_tables": sorted(PRESET.fits),
            "table_sizes": world.table_sizes,
            "most_distinct_rows": world.most_distinct_rows,
            "num_slots": num_slots,
        },
        "runs": runs,
    }
    return conclude(args.out, __file__, argv, results, as_markdown)


if __name__ == "__main__":
    main()
