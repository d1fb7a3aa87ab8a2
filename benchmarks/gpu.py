"""The cached step on a CUDA device, against tables that lie in its memory and against rows gathered from the host.

    python benchmarks/gpu.py --out results_folder          # all suites
    python benchmarks/gpu.py --out /tmp/trial --quick      # a tenth of the rows and few steps: does it run?

Self-contained: torch, triton, numba and numpy, from a bare checkout. Suites:

power     10 tables x 128 float32, one id a bag, 104,857 samples: 1,048,570 ids a step, drawn by a power law of 1.05
          over 26.84 million ranks a table (as in dynamicemb's published benchmark), which are folded onto the tables'
          rows, since a host has not the memory for all. Train steps (forward, backward, update) with SGD and Adam; the
          cache holds all rows that the steps touch (1.0), or 0.8 of them. The output's gradient is fixed.
dlrm      A DLRM over the shape of Criteo's Kaggle set (26 tables, 33.76 million rows) with 128 columns, batch 16,384,
          cache 1.5 % of the rows, with and without looking 4 batches ahead; synthetic, calibrated ids.
peers     The steps of `power` by FBGEMM (all rows in HBM, and its UVM caching) and by Colossal-AI's CachedEmbeddingBag
          (SGD), where they are installed.
graph     The SGD step of `power` with all rows resident, captured as one CUDA graph and replayed.

Rows start at zero: a store of tens of GiB that nobody has to fill; no time depends on the values.
Times are of CUDA events or of the wall clock around many steps, medians. Shapes: B samples, T tables, N ids, D columns.
"""

import argparse
import gc
import importlib.metadata
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "examples" / "dlrm")]

import contenders  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from harness import describe_machine, markdown_table  # noqa: E402
from load import make_world  # noqa: E402
from model import DLRM, PlainTables  # noqa: E402
from torch import nn  # noqa: E402

from colossal_freqcache import FreqAwareEmbeddingBagCollection, Lookahead, optim  # noqa: E402

DIM = 128
POWER_TABLES, POWER_SAMPLES, POWER_LAW, POWER_RANKS = 10, 104_857, 1.05, 26_840_000
BUDGETS_MS = {("1.0", "sgd"): 1.5, ("1.0", "adam"): 2.5, ("0.8", "sgd"): 2.4, ("0.8", "adam"): 5.0}
# Published for one H100-80GB (dynamicemb's benchmark_results.json): FBGEMM in HBM, FBGEMM UVM caching, dynamicemb.
PUBLISHED_MS = {
    ("1.0", "sgd"): (0.96, 4.15, 10.87),
    ("1.0", "adam"): (1.35, 14.37, 12.28),
    ("0.8", "sgd"): (None, 4.77, 20.8),
    ("0.8", "adam"): (None, 15.0, 24.3),
}
LEAST_SAMPLES_RATIO = 0.95


class ZeroTables(FreqAwareEmbeddingBagCollection):
    """A collection whose rows start at zero, as the store's untouched pages are."""

    def _initialize(self, weights: Any) -> None:
        pass


class ZeroStore:
    """A RowStore of zeros that forgets what is written: for a cache that holds every row, and reads none again."""

    def allocate(self, num_rows: int, layout: Any) -> None:
        pass

    def read(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        records[places.long()] = 0

    def write(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        pass

    def spawn(self) -> "ZeroStore":
        return ZeroStore()

    def num_bytes(self) -> int:
        return 0


class Batch(NamedTuple):
    """values (N,) local ids, offsets (N,), table-major; joined (N,) ids of the whole, sample-major; dense (B, F)."""

    values: torch.Tensor
    offsets: torch.Tensor
    joined: torch.Tensor
    dense: torch.Tensor | None = None
    labels: torch.Tensor | None = None


# ---- timing ----------------------------------------------------------------------------------------------------------


def event_ms(calls: list[Callable[[], Any]]) -> list[float]:
    """ms between the starts of consecutive calls on the device's clock; the last ends with its own work."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    for call, event in zip(calls, events, strict=False):
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


class Phases:
    """Device time inside of methods, by name, from events around their calls."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    @contextmanager
    def watching(self, owner: Any, *names: str) -> Iterator[None]:
        originals = {name: getattr(owner, name) for name in names}
        for name, original in originals.items():
            setattr(owner, name, self._timed(name, original))
        try:
            yield
        finally:
            for name in names:
                delattr(owner, name)

    def _timed(self, name: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call(*args, **kwargs)
            end.record()
            self._events.setdefault(name, []).append((start, end))
            return result

        return timed

    def ms(self) -> dict[str, float]:
        torch.cuda.synchronize()
        return {
            name: round(statistics.median(start.elapsed_time(end) for start, end in pairs), 4)
            for name, pairs in self._events.items()
        }


def ceilings(num_bytes: int) -> dict[str, float]:
    """GB/s: a copy within device memory (read and written bytes), and over the link, each way and both at once."""
    a, b = (torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    h, k = (torch.empty(num_bytes // 4, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    part_a, part_b = a[: h.numel()], b[: h.numel()]
    other = torch.cuda.Stream()

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            k.copy_(part_b, non_blocking=True)
        part_a.copy_(h, non_blocking=True)
        torch.cuda.current_stream().wait_stream(other)

    found = {}
    for name, call, moved in (
        ("hbm_copy", lambda: b.copy_(a), 2 * num_bytes),
        ("host_to_device", lambda: part_a.copy_(h, non_blocking=True), h.numel()),
        ("device_to_host", lambda: k.copy_(part_b, non_blocking=True), h.numel()),
        ("both_ways", both, 2 * h.numel()),
    ):
        call()
        found[name] = round(moved / min(event_ms([call] * 8)) / 1e6, 1)
    return found


# ---- power law -------------------------------------------------------------------------------------------------------


def power_batches(num_batches: int, rows: int, samples: int, seed: int) -> list[Batch]:
    generator = np.random.default_rng(seed)
    exponent = 1 - POWER_LAW
    first = np.arange(POWER_TABLES)[:, None] * rows
    offsets = torch.arange(POWER_TABLES * samples, device="cuda")
    batches = []
    for _ in range(num_batches):
        u = generator.random((POWER_TABLES, samples))
        rank = (((POWER_RANKS**exponent - 1) * u + 1) ** (1 / exponent)).astype(np.int64)
        values = np.minimum(rank, POWER_RANKS) % rows
        joined = np.ascontiguousarray((values + first).T).reshape(-1)
        values = torch.from_numpy(values.reshape(-1)).cuda()
        batches.append(Batch(values, offsets, torch.from_numpy(joined).cuda()))
    return batches


def cached_tables(rows: int, num_slots: int, name: str, counts: np.ndarray | None, **options: Any) -> tuple:
    tables = ZeroTables(
        [rows] * POWER_TABLES, DIM, mode="sum", num_slots=num_slots, ids_freq_mapping=counts, optimizer=name,
        device="cuda", **options,
    )  # fmt: skip
    return tables, {"sgd": optim.SGD, "adam": optim.Adam}[name]


def cached_step(tables: Any, optimizer: Any, grad: torch.Tensor) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        tables(batch.values, batch.offsets).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_step(rows: int, name: str, grad: torch.Tensor, offsets: torch.Tensor) -> Callable[[Batch], None]:
    table = nn.EmbeddingBag(
        rows * POWER_TABLES, DIM, mode="sum", sparse=True, device="cuda",
        _weight=torch.zeros(rows * POWER_TABLES, DIM, device="cuda"),
    )  # fmt: skip
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.SparseAdam}[name](table.parameters(), lr=0.01)
    flat = grad.reshape(-1, DIM)

    def step(batch: Batch) -> None:
        table(batch.joined, offsets).backward(flat)
        optimizer.step()
        optimizer.zero_grad()

    return step


def counted(tables: Any, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `run` gives, and what the cache did meanwhile."""
    before, syncs = tables.stats.as_dict(), tables._cache.num_syncs
    result = run()
    after = tables.stats.as_dict()
    change = {key: after[key] - before[key] for key in after if key != "hit_ratio"}
    looked_up = change["hits"] + change["misses"]
    return result, change | {"hit_ratio": change["hits"] / looked_up, "syncs": tables._cache.num_syncs - syncs}


class PowerWorld(NamedTuple):
    """What all suites of the power law train on.

    rows: of a table; turns: a batch for each timed step; touched: rows that they look up; grad (B, T, D): the output's.
    """

    rows: int
    batches: list[Batch]
    turns: list[Batch]
    touched: int
    grad: torch.Tensor

    @classmethod
    def make(cls, rows: int, samples: int, iterations: int) -> "PowerWorld":
        batches = power_batches(16, rows, samples, seed=0)
        turns = [batches[number % len(batches)] for number in range(iterations)]
        touched = torch.cat([batch.joined for batch in batches]).unique().numel()
        return cls(rows, batches, turns, touched, torch.randn(samples, POWER_TABLES, DIM, device="cuda"))

    def counts(self) -> torch.Tensor:
        """int64[rows of all tables], on the host: how often each was looked up."""
        joined = torch.cat([batch.joined for batch in self.batches])
        return torch.bincount(joined, minlength=self.rows * POWER_TABLES).cpu()

    def measure(
        self, what: str, size: str, name: str, step: Callable[[Batch], None], tables: Any = None
    ) -> dict[str, Any]:
        """A row of the results; `tables`: ours, whose counters are in it, a step."""
        calls = [lambda batch=batch: step(batch) for batch in self.turns]
        for call in calls[:16]:
            call()
        row: dict[str, Any] = {"suite": "power"}
        if tables is None:
            times = event_ms(calls)
        else:
            times, change = counted(tables, lambda: event_ms(calls))
            row["hit_ratio"] = change["hit_ratio"]
            row |= {key: change[key] / len(calls) for key in ("misses_unique", "rows_written_back", "syncs")}
            row["device_bytes"] = tables.device_bytes()
        row |= {"what": what, "cache": size, "optimizer": name, "min_ms": min(times), "ms": statistics.median(times)}
        row["p80_ms"] = float(np.percentile(times, 80))
        print(f"power {what} {size} {name}: {row['ms']:.3f} ms", {k: v for k, v in row.items() if k != "device_bytes"})
        return row


def power_suite(world: PowerWorld, names: list[str], results: list[dict]) -> dict[str, Any]:
    rows, _, turns, touched, grad = world
    ids, counts = world.batches[0].values.numel(), world.counts().numpy()
    facts: dict[str, Any] = {"rows": rows * POWER_TABLES, "ids": ids, "touched": touched}
    facts["unique"] = statistics.median(batch.joined.unique().numel() for batch in world.batches)

    def measure(*arguments: Any) -> None:
        results.append(world.measure(*arguments))

    def phases_of(tables: Any, step: Callable[[Batch], None], row: dict[str, Any]) -> None:
        phases = Phases()
        watched = ("plan", "choose_victims", "exchange", "swap_rows", "bags", "train_rows")
        with phases.watching(tables._cache.kernels, *watched):
            for batch in turns[:16]:
                step(batch)
        row["phases_ms"] = ms = phases.ms()
        moved = row["misses_unique"] + row["rows_written_back"]
        if moved > 1000:
            row["link_gb_per_s"] = round(moved * tables._cache.layout.row_bytes / ms["swap_rows"] / 1e6, 1)
        row_bytes = facts["unique"] * DIM * 4
        trained = row_bytes * (2 if row["optimizer"] == "sgd" else 6) + grad.nbytes
        row["update_gb_per_s"] = round(trained / ms["train_rows"] / 1e6, 1)
        row["pool_gb_per_s"] = round((row_bytes + grad.nbytes) / ms["bags"] / 1e6, 1)
        print("  phases", ms, "link GB/s", row.get("link_gb_per_s"))

    def measure_ours(size: str, name: str) -> None:
        tables, make = cached_tables(rows, int(touched * float(size)), name, counts)
        fused = cached_step(tables, make(tables.parameters(), lr=0.01, fused=True), grad)
        measure("ours, fused", size, name, fused, tables)
        phases_of(tables, fused, results[-1])
        loader = Lookahead([*turns, *turns], tables, ids=lambda batch: batch[:2], window=4, depth=1)
        ahead = iter(loader)
        measure("ours, fused, looking ahead", size, name, lambda _batch: fused(next(ahead)), tables)
        ahead.close()
        if size == "1.0":
            separate = cached_step(tables, make(tables.parameters(), lr=0.01), grad)
            measure("ours, separate step", size, name, separate, tables)

    for name in names:
        step = torch_step(rows, name, grad, torch.arange(ids, device="cuda"))
        measure("nn.EmbeddingBag in HBM", "all", name, step)
        del step
        torch.cuda.empty_cache()
        for size in ("1.0", "0.8"):
            measure_ours(size, name)
            torch.cuda.empty_cache()
    results.append({"suite": "power", **host_gather(world.batches, rows)})
    return facts


def peers_suite(world: PowerWorld, names: list[str], results: list[dict]) -> dict[str, Any]:
    """{peer: whether it is installed}"""
    facts = {name: _is_installed(name) for name in ("fbgemm-gpu", "colossalai")}
    sizes = [world.rows] * POWER_TABLES
    ends = torch.arange(world.batches[0].values.numel() + 1, device="cuda")
    if facts["fbgemm-gpu"]:
        for name in names:
            for size in ("all", "1.0", "0.8"):
                options = {} if size == "all" else {"cache_load_factor": float(size) * world.touched / sum(sizes)}
                location = "DEVICE" if size == "all" else "MANAGED_CACHING"
                tables = contenders.fbgemm_tables(sizes, DIM, name, location, "CUDA", **options)

                def step(batch: Batch, tables: Any = tables) -> None:
                    tables(batch.values, ends).view(world.grad.shape).backward(world.grad)

                results.append(world.measure(f"FBGEMM, {location}", size, name, step))
                del tables, step
                torch.cuda.empty_cache()
    if facts["colossalai"] and "sgd" in names:
        counts = world.counts()
        for size in ("1.0", "0.8"):
            bag = contenders.colossal_bag(torch.zeros(sum(sizes), DIM), int(world.touched * float(size)), counts)
            optimizer = torch.optim.SGD(bag.parameters(), lr=0.01)
            flat = world.grad.reshape(-1, DIM)

            def step(batch: Batch, bag: Any = bag, optimizer: Any = optimizer, flat: torch.Tensor = flat) -> None:
                bag(batch.joined, ends[:-1]).backward(flat)
                optimizer.step()
                optimizer.zero_grad()

            results.append(world.measure("Colossal-AI's CachedEmbeddingBag", size, "sgd", step))
    return facts


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def graph_suite(world: PowerWorld, results: list[dict]) -> None:
    tables, make = cached_tables(world.rows, world.touched, "sgd", None)
    optimizer = make(tables.parameters(), lr=0.01, fused=True)
    train = cached_step(tables, optimizer, world.grad)
    for batch in world.batches:  # makes every row resident, and compiles the kernels
        train(batch)
    values = world.batches[0].values.clone()
    static = world.batches[0]._replace(values=values)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # the caches of the suites before: not while a graph is captured
    with torch.cuda.graph(graph):
        train(static)

    def step(batch: Batch) -> None:
        values.copy_(batch.values)
        graph.replay()

    results.append(world.measure("ours, fused, replayed from a CUDA graph", "1.0", "sgd", step, tables))


def host_gather(batches: list[Batch], rows: int) -> dict[str, Any]:
    """No cache: each step's rows come from pinned host memory and go back; the moves alone."""
    tables, _ = cached_tables(rows, 1000, "sgd", None)
    cache = tables._cache
    store = cache._store_records
    ids = [batch.joined.unique() for batch in batches]
    buffer = torch.empty(max(i.numel() for i in ids), DIM, device="cuda")
    places = torch.arange(buffer.shape[0], device="cuda")

    def step(number: int) -> None:
        wanted = ids[number % len(ids)]
        cache.kernels.copy_rows(store, wanted, buffer, places[: wanted.numel()])
        cache.kernels.copy_rows(buffer, places[: wanted.numel()], store, wanted)

    times = event_ms([lambda number=number: step(number) for number in range(12)])[2:]
    moved = 2 * statistics.median(i.numel() for i in ids) * DIM * 4
    result = {"what": "rows gathered from the host, no cache", "cache": "none", "optimizer": "moves only"}
    result |= {"ms": statistics.median(times), "min_ms": min(times), "p80_ms": float(np.percentile(times, 80))}
    print("power", result)
    return result | {"link_gb_per_s": round(moved / result["ms"] / 1e6, 1)}


# ---- DLRM ------------------------------------------------------------------------------------------------------------


def dlrm_suite(scale: float, steps: int, rounds: int, results: list[dict]) -> dict[str, Any]:
    num_batches = steps * 2
    world = make_world(scale, 16_384, num_counted=16, num_batches=num_batches, seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            batch.values.cuda(),
            batch.offsets.cuda(),
            batch.joined.cuda(),
            torch.randn(world.batch_size, 13, generator=generator).cuda(),
            (torch.rand(world.batch_size, generator=generator) < 0.25).float().cuda(),
        )
        for batch in world.batches
    ]
    sizes, num_slots = world.table_sizes, world.num_slots(0.015)
    facts = {"rows": world.num_rows, "num_slots": num_slots, "batch": world.batch_size, "scale": scale}

    def trainer(embedding: nn.Module, optimizer_class: Any, **options: Any) -> Callable[[Batch], None]:
        model = DLRM(embedding, len(sizes), DIM, 13, bottom=(512, 256), top=(1024, 1024, 512, 256)).cuda()
        optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
        criterion = nn.BCEWithLogitsLoss()

        def step(batch: Batch) -> None:
            loss = criterion(model(batch.dense, batch.values, batch.offsets), batch.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(num_slots: int, **options: Any) -> Any:
        began = time.perf_counter()
        tables = ZeroTables(
            sizes, DIM, mode="sum", num_slots=num_slots, optimizer="sgd", device="cuda", **options
        )  # fmt: skip
        print(f"built {num_slots} slots in {time.perf_counter() - began:.1f} s", tables.device_bytes())
        return tables

    contenders: dict[str, tuple[Callable[[Batch], None], Any, bool]] = {}
    cached = ours(num_slots, ids_freq_mapping=world.counts)
    fused = trainer(cached, optim.SGD, fused=True)
    contenders["cached 1.5 %, looking 4 ahead"] = (fused, cached, True)
    contenders["cached 1.5 %"] = (fused, cached, False)
    resident = ours(world.num_rows, store=ZeroStore())
    contenders["ours, every row in HBM"] = (trainer(resident, optim.SGD, fused=True), resident, False)
    with torch.device("meta"):
        plain = PlainTables(sizes, DIM, mode="sum")
    plain = plain.to_empty(device="cuda")
    plain.init_(lambda weight: weight.zero_())
    contenders["26 nn.EmbeddingBag in HBM, sparse, torch SGD"] = (trainer(plain, torch.optim.SGD), None, False)

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    rows: dict[str, dict] = {}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, (step, tables, looks_ahead) in contenders.items():
            part = batches[:steps] if turn % 2 == 0 else batches[steps:]

            def run(step=step, tables=tables, looks_ahead=looks_ahead, part=part) -> float:
                loader = part
                if looks_ahead:
                    loader = Lookahead(part, tables, ids=lambda b: (b.values, b.offsets), window=8, depth=4)
                began = 0.0
                for number, batch in enumerate(loader):
                    if number == 5:
                        torch.cuda.synchronize()
                        began = time.perf_counter()
                    step(batch)
                torch.cuda.synchronize()
                return (len(part) - 5) * world.batch_size / (time.perf_counter() - began)

            if tables is None:
                rate, change = run(), {}
            else:
                rate, change = counted(tables, run)
            if turn:
                rates[name].append(rate)
                rows[name] = change
    base = max(statistics.median(rates[name]) for name in rates if "HBM" in name)
    for name, rate in rates.items():
        row: dict[str, Any] = {"suite": "dlrm", "what": name, "samples_per_s": statistics.median(rate)}
        row |= {"all": rate, "of_best_in_hbm": row["samples_per_s"] / base}
        for key in ("misses_unique", "rows_written_back", "syncs"):
            if key in rows[name]:
                row[key] = rows[name][key] / steps
        row |= {"hit_ratio": rows[name]["hit_ratio"]} if rows[name] else {}
        tables = contenders[name][1]
        row |= {"device_bytes": tables.device_bytes()} if tables is not None else {}
        results.append(row)
        print("dlrm", {key: value for key, value in row.items() if key not in ("all", "device_bytes")})
    return facts


# ---- report ----------------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    def number(value: Any, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = []
    for row in found["results"]:
        if row["suite"] == "power":
            key = (row["cache"], row["optimizer"])
            budget = BUDGETS_MS.get(key) if row["what"].startswith("ours, fused") else None
            published = " / ".join(number(value) for value in PUBLISHED_MS.get(key, ())) or "-"
            what = f"{row['what']}, {row['optimizer']}, cache {row['cache']}"
            result = f"{row['ms']:.3f} ms (min {row['min_ms']:.3f}, p80 {row['p80_ms']:.3f})"
            limit = "-" if budget is None else f"<= {budget} ms: {'met' if row['ms'] <= budget else '**missed**'}"
        else:
            what, published = f"DLRM, {row['what']}", "-"
            result = f"{row['samples_per_s'] / 1e6:.3f} M samples/s ({row['of_best_in_hbm']:.3f} of the best in HBM)"
            limit = "-"
            if row["what"].startswith("cached") and "ahead" in row["what"]:
                met = row["of_best_in_hbm"] >= LEAST_SAMPLES_RATIO
                limit = f">= {LEAST_SAMPLES_RATIO}: {'met' if met else '**missed**'}"
        shares = "-"
        if "device_bytes" in row:
            shares = number(row["device_bytes"]["index"] / row["device_bytes"]["cache"], 3)
        lines.append(
            [
                what,
                result,
                limit,
                published,
                number(row.get("hit_ratio"), 4),
                number(row.get("misses_unique"), 0),
                number(row.get("syncs"), 2),
                shares,
            ]
        )
    header = ["what", "measured", "budget", "published: HBM / UVM / dynamicemb, ms", "hit ratio", "rows missed a step",
              "syncs a step", "index / cache bytes"]  # fmt: skip
    ceiling = ", ".join(f"{name} {value}" for name, value in found["ceilings_gb_per_s"].items())
    return (
        f"# The cached step on a GPU\n\n`{found['command']}`\n\n{markdown_table(header, lines)}\n\n"
        f"{found['gpu']['name']}, {found['gpu']['memory_gib']} GiB; ceilings, GB/s: {ceiling}. "
        f"power: {found['power']}. dlrm: {found['dlrm']}. "
        f"Peers that are installed: {found['peers']}. {found['machine']['cpu']}, "
        f"{found['machine']['cores']} cores, {found['machine']['versions']}, "
        f"commit {found['machine']['commit']}. Published: one H100-80GB, dynamicemb's "
        "benchmark_results.json, 26.84 M rows a table. Phases, bytes and bandwidths are in the JSON file beside.\n"
    )


def _settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The arguments that differ from their defaults, but for the folder."""
    changed = [name for name in ("quick", "suites", "optimizers") if getattr(args, name) != parser.get_default(name)]
    return [part for name in changed for part in (f"--{name}", getattr(args, name)) if part is not True]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, few steps")
    parser.add_argument("--suites", default="power,dlrm,peers,graph")
    parser.add_argument("--optimizers", default="sgd,adam")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return 1
    import triton

    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gpu.py", "--out", "OUT", *_settings(args, parser)]),
        "gpu": {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)},
        "machine": describe_machine([torch, triton, np]),
        "ceilings_gb_per_s": ceilings(1 << (28 if args.quick else 31)),
        "power": None,
        "dlrm": None,
        "peers": None,
        "results": [],
    }
    print(found["gpu"], found["ceilings_gb_per_s"])
    rows, samples, iterations = (100_000, 10_485, 16) if args.quick else (1_000_000, POWER_SAMPLES, 48)
    names = args.optimizers.split(",")
    world = PowerWorld.make(rows, samples, iterations)
    if "power" in args.suites:
        found["power"] = power_suite(world, names, found["results"])
        torch.cuda.empty_cache()
        _write(args.out, found)
    if "dlrm" in args.suites:
        scale, steps, rounds = (0.05, 10, 1) if args.quick else (1.0, 40, 3)
        found["dlrm"] = dlrm_suite(scale, steps, rounds, found["results"])
        torch.cuda.empty_cache()
        _write(args.out, found)
    if "graph" in args.suites:
        graph_suite(world, found["results"])
        _write(args.out, found)
    if "peers" in args.suites:
        found["peers"] = peers_suite(world, names, found["results"])
        _write(args.out, found)
    print((args.out / "gpu.md").read_text())
    return 0


def _write(out: Path, found: dict[str, Any]) -> None:
    """After every suite: what one has measured is kept if a later one fails."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text(render(found))


if __name__ == "__main__":
    sys.exit(main())
