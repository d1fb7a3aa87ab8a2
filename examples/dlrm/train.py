"""Trains a DLRM with at most 1.5 % of its embedding rows in the cache, and measures it on later, held-out data.

    colossalai run --nproc_per_node 1 examples/dlrm/train.py --config examples/dlrm/configs/purchases.py
    colossalai run --nproc_per_node 2 examples/dlrm/train.py --config examples/dlrm/configs/purchases.py
    python examples/dlrm/train.py                      # one process, without a launcher
    python examples/dlrm/train.py --cache-ratio 1.0    # every row resident: the same numbers to the last digit
    python examples/dlrm/train.py --table-dtype bfloat16   # rows of half the bytes
    python examples/dlrm/train.py --uncached           # the same model on plain torch.nn.EmbeddingBag tables

On several processes the tables are sharded over them (`freq_cache = dict(sharding=...)` in the config), the MLPs are
data-parallel, and every process trains on its share of each batch: the result is that of one process, within rounding.
The last line of the output holds it; hit ratio and cache figures are those of the first process. The same seed gives
the same numbers.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Batch, ClickData, DataError, share_of, train_rows
from data import open_data
from metrics import LabelRates, auroc, log_loss
from model import DLRM, PlainTables, uniform_rows
from torch import Tensor, nn

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "purchases.py"
DEFAULTS = dict(
    DATA="purchases",
    DATA_OPTIONS={},
    SYNTHETIC=None,
    SYNTHETIC_OPTIONS={},
    EMBEDDING_DIM=16,
    TABLE_DTYPE="float32",
    BOTTOM_MLP=(64,),
    TOP_MLP=(64,),
    INIT_BOUND=0.02,
    BATCH_SIZE=2048,
    TEST_BATCHES=None,
    STEPS=None,
    EPOCHS=1,
    LEARNING_RATE=0.005,
    EMBEDDING_LEARNING_RATE=0.01,
    COUNT_BATCHES=None,
    SEED=1024,
    THREADS=1,
    freq_cache=dict(cache_ratio=0.015, evict_strategy="dataset", optimizer="adagrad"),
)
TABLE_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class SettingError(ValueError):
    """A setting is wrong; the message says which and what is allowed."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="a Colossal-AI config file")
    parser.add_argument("--uncached", action="store_true", help="plain torch.nn.EmbeddingBag tables")
    parser.add_argument("--cache-ratio", type=float, help="share of the rows in the cache, instead of the config's")
    parser.add_argument("--table-dtype", choices=TABLE_DTYPES, help="of the embedding rows and their optimizer state")
    parser.add_argument("--steps", type=int, help="stop after this many batches")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, help="threads of torch (the cache's kernels are serial)")
    parser.add_argument("--data", help="purchases, a Criteo TSV file, or a folder of day_N_{dense,sparse,labels}.npy")
    parser.add_argument("--synthetic", metavar="PRESET", help="kaggle, tb40m, avazu, meta or uniform")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    return parser.parse_args(arguments)


def read_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config file by Colossal-AI's reader, over DEFAULTS, under the command line."""
    try:
        from colossalai.context import Config
    except ImportError as error:
        raise SettingError(f"the config file is read with colossalai, which cannot be imported: {error}") from None
    if not arguments.config.is_file():
        raise SettingError(f"--config {arguments.config}: no such file")
    if arguments.config.suffix == ".py":  # without the plugins, whose import takes seconds
        loaded = Config.from_file(str(arguments.config))
    else:  # .json, .yaml, .toml
        from colossal_freqcache.integration import read_config_file

        try:
            loaded = read_config_file(arguments.config)
        except ValueError as error:
            raise SettingError(str(error)) from None
    unknown = sorted(name for name in loaded if name not in DEFAULTS)
    if unknown:
        raise SettingError(f"{arguments.config}: unknown {', '.join(unknown)}; known are {', '.join(DEFAULTS)}")
    settings = {**DEFAULTS, **loaded}
    for name in ("table_dtype", "steps", "epochs", "seed", "threads"):
        if getattr(arguments, name) is not None:
            settings[name.upper()] = getattr(arguments, name)
    if arguments.data is not None:
        if arguments.synthetic is not None:
            raise SettingError("--data and --synthetic both name the data; give one of them")
        if arguments.data != settings["DATA"]:
            settings["DATA_OPTIONS"] = {}
        settings.update(DATA=arguments.data, SYNTHETIC=None)
    if arguments.synthetic is not None:
        settings["SYNTHETIC"] = arguments.synthetic
    for name in ("BATCH_SIZE", "EPOCHS", "THREADS", "EMBEDDING_DIM"):
        if settings[name] < 1:
            raise SettingError(f"{name}: expected at least 1, got {settings[name]}")
    if settings["TABLE_DTYPE"] not in TABLE_DTYPES:
        raise SettingError(f"TABLE_DTYPE: expected one of {', '.join(TABLE_DTYPES)}, got {settings['TABLE_DTYPE']!r}")
    if arguments.uncached and settings["TABLE_DTYPE"] == "float16":
        raise SettingError("--uncached: torch's optimizers do not train sparse float16 tables on a CPU; use bfloat16")
    if settings["STEPS"] is not None and settings["STEPS"] < 1:
        raise SettingError(f"STEPS: expected at least 1, got {settings['STEPS']}")
    return settings


@dataclasses.dataclass(frozen=True)
class Launched:
    """This process among those that a launcher started; one without a launcher."""

    rank: int = 0
    world_size: int = 1
    by_launcher: bool = False

    def gather(self, item: Any) -> list:
        """`item` of every process, in rank order."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        torch.distributed.all_gather_object(items, item)
        return items


ALONE = Launched()


def launch(settings: dict[str, Any], uncached: bool) -> Launched:
    """Joins the process group if a launcher started this process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if uncached and world_size > 1:
        raise SettingError(f"--uncached is one process on plain tables, got {world_size}: launch one")
    if "RANK" not in os.environ or uncached:
        return ALONE
    from colossal_freqcache.integration import launch_from_torch

    launch_from_torch(dict(freq_cache=settings["freq_cache"]), seed=settings["SEED"], verbose=False)
    return Launched(torch.distributed.get_rank(), torch.distributed.get_world_size(), by_launcher=True)


def cached_tables(
    section: dict[str, Any],
    cache_ratio: float | None,
    table_sizes: list[int],
    embedding_dim: int,
    id_counts: np.ndarray,
    launched: Launched = ALONE,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The embedding collection of a `freq_cache` section, its ceiling set to its first size: it can never grow.

    id_counts: (rows of all tables,) int64, the tables laid end to end. Under a launcher: sharded over its ranks."""
    from colossal_freqcache import FreqAwareEmbeddingBagCollection, FreqCacheConfig

    section = dict(section)
    if cache_ratio is not None:
        section.pop("num_slots", None)
        section["cache_ratio"] = cache_ratio
    if section.setdefault("optimizer", "adagrad") != "adagrad":
        raise SettingError(f"freq_cache: this example trains with adagrad, got optimizer={section['optimizer']!r}")
    try:
        config = FreqCacheConfig.from_dict(section)
    except ValueError as error:
        raise SettingError(str(error)) from None
    options: dict[str, Any] = dict(mode="mean", ids_freq_mapping=id_counts, dtype=dtype)
    if config.max_cache_bytes is None:
        # A row carries its weight and Adagrad's sum; with a ceiling equal to the size, "1.5 %" holds at every moment.
        by_column = config.sharding in (None, "column")
        row_bytes = 2 * (-(-embedding_dim // launched.world_size) if by_column else embedding_dim) * dtype.itemsize
        num_rows = sum(table_sizes) if by_column else -(-sum(table_sizes) // launched.world_size)
        num_slots, _ = config.size_in_slots(num_rows, row_bytes)
        config = dataclasses.replace(config, max_cache_bytes=num_slots * row_bytes)
    if not launched.by_launcher:
        return FreqAwareEmbeddingBagCollection(table_sizes, embedding_dim, **options, **config.bag_keywords())
    from colossal_freqcache import ParallelFreqAwareEmbeddingBagCollection

    options["sharding"] = config.sharding or "column"
    return ParallelFreqAwareEmbeddingBagCollection(table_sizes, embedding_dim, **options, **config.bag_keywords())


def build_model(settings: dict[str, Any], embedding: nn.Module, data: ClickData) -> DLRM:
    """The same weights for the same seed, whichever embedding is handed in: it comes first, the MLPs have a seed of
    their own."""
    torch.manual_seed(settings["SEED"])
    embedding.init_(uniform_rows(settings["INIT_BOUND"]))
    return DLRM(
        embedding,
        len(data.table_sizes),
        settings["EMBEDDING_DIM"],
        data.num_dense,
        bottom=settings["BOTTOM_MLP"],
        top=settings["TOP_MLP"],
        dense_seed=settings["SEED"] + 1,
    )


def build_optimizer(settings: dict[str, Any], model: DLRM, uncached: bool) -> torch.optim.Optimizer:
    """One Adagrad over dense weights and tables: torch's where the tables are torch's, else the cache's, whose sums
    move with the rows."""
    if uncached:
        adagrad = torch.optim.Adagrad
    else:
        from colossal_freqcache import optim

        adagrad = optim.Adagrad
    table_weights = {id(parameter) for parameter in model.embedding.parameters()}
    groups = [
        dict(params=[p for p in model.parameters() if id(p) not in table_weights], lr=settings["LEARNING_RATE"]),
        dict(params=list(model.embedding.parameters()), lr=settings["EMBEDDING_LEARNING_RATE"]),
    ]
    return adagrad(groups, lr=settings["LEARNING_RATE"])


class TrainBatches:
    """The training batches in the order of time: (this process's share as tensors, the whole batch, its epoch)."""

    def __init__(self, data: ClickData, settings: dict[str, Any], launched: Launched):
        self.data, self.settings, self.launched = data, settings, launched

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Batch, int]]:
        batches = (
            (batch, epoch)
            for epoch in range(self.settings["EPOCHS"])
            for batch in self.data.train_batches(self.settings["BATCH_SIZE"], epoch)
        )
        for batch, epoch in itertools.islice(batches, self.settings["STEPS"]):
            yield tensors(share_of(batch, self.launched.rank, self.launched.world_size)), batch, epoch


def boost(
    model: DLRM, optimizer: torch.optim.Optimizer, batches: TrainBatches, settings: dict[str, Any], launched: Launched
) -> tuple[nn.Module, Any, Any, Callable[[Tensor], None]]:
    """Model, optimizer and batches as the config's plugin wraps them, and what runs a backward."""
    if not launched.by_launcher:
        return model, optimizer, batches, lambda loss: loss.backward()
    from colossalai.booster import Booster

    from colossal_freqcache.integration import build_plugin

    # `ids`: what a batch asks of the tables, values and offsets
    plugin = build_plugin(dict(freq_cache=settings["freq_cache"]), ids=lambda batch: batch[0][1:3])
    booster = Booster(plugin=plugin)
    model, optimizer, _, batches, _ = booster.boost(model, optimizer, dataloader=batches)
    return model, optimizer, batches, lambda loss: booster.backward(loss, optimizer)


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.from_numpy(array) for array in (batch.dense, batch.values, batch.offsets, batch.labels))


class Progress:
    """A bar on a terminal; elsewhere a line every tenth of the way (or every 200 steps where the end is unknown)."""

    def __init__(self, title: str, num_steps: int | None):
        self.title, self.num_steps, self.step, self.bar = title, num_steps, 0, None
        self.line_every = max(1, -(-num_steps // 10)) if num_steps else 200
        if sys.stdout.isatty():
            try:
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[note]}"))
            self.task = self.bar.add_task(title, total=num_steps, note="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    @property
    def wants_note(self) -> bool:
        """Whether the next `advance` shows its note: only then is it worth making."""
        return (self.step + 1) % (20 if self.bar else self.line_every) == 0 or self.step + 1 == self.num_steps

    def advance(self, note: str | None = None) -> None:
        self.step += 1
        if self.bar:
            self.bar.update(self.task, advance=1, **({} if note is None else dict(note=note)))
        elif note is not None:
            print(f"{self.title} {self.step}/{self.num_steps or '?'}  {note}", flush=True)


def count_ids(data: ClickData, settings: dict[str, Any]) -> np.ndarray:
    """(rows of all tables,) int64: how often each id occurs in the training data (or in its first COUNT_BATCHES)."""
    from colossal_freqcache import IdFrequency

    frequency = IdFrequency.count(
        train_rows(data, settings["BATCH_SIZE"], settings["COUNT_BATCHES"]), sum(data.table_sizes)
    )
    return np.asarray(frequency.counts)


def train(
    model: DLRM,
    optimizer: torch.optim.Optimizer,
    data: ClickData,
    settings: dict[str, Any],
    rates: LabelRates | None,
    launched: Launched = ALONE,
) -> dict[str, float]:
    """Trains in the order of time. `rates` (if given) counts every training label. Returns samples, steps, seconds."""
    # A share may be empty, and has no mean then.
    loss_of = nn.BCEWithLogitsLoss(reduction="mean" if launched.world_size == 1 else "sum")
    embedding = model.embedding
    batches = TrainBatches(data, settings, launched)
    model, optimizer, batches, backward = boost(model, optimizer, batches, settings, launched)
    per_epoch = data.num_train_batches(settings["BATCH_SIZE"])
    limits = [n for n in (settings["STEPS"], per_epoch and per_epoch * settings["EPOCHS"]) if n]
    num_samples, step, seconds, smoothed_loss = 0, 0, 0.0, None

    model.train()
    with Progress("train", min(limits, default=None)) as progress:
        began = time.perf_counter()
        for (dense, values, offsets, labels), batch, epoch in batches:
            if rates is not None and epoch == 0:
                counting = time.perf_counter()
                rates.update(batch)
                began += time.perf_counter() - counting  # the baseline is no part of the model's speed
            loss = loss_of(model(dense, values, offsets), labels)
            if launched.world_size > 1:  # gradients are averaged: make that the mean over the whole batch
                loss = loss * (launched.world_size / batch.num_samples)
            optimizer.zero_grad(set_to_none=True)
            backward(loss)
            optimizer.step()
            step, num_samples = step + 1, num_samples + batch.num_samples
            note = None
            if progress.wants_note:
                smoothed_loss = loss.item()
                seconds = time.perf_counter() - began
                note = f"loss {smoothed_loss:.4f}  {num_samples / seconds:,.0f} samples/s{_hit_note(embedding)}"
            progress.advance(note)
        seconds = time.perf_counter() - began
    if not step:
        raise DataError("the data holds no training samples")
    return dict(steps=step, samples=num_samples, seconds=seconds, samples_per_s=num_samples / seconds)


def _hit_note(embedding: nn.Module) -> str:
    stats = getattr(embedding, "stats", None)
    return "" if stats is None else f"  hit ratio {stats.hit_ratio:.4f}"


def evaluate(
    model: DLRM, data: ClickData, settings: dict[str, Any], rates: LabelRates, launched: Launched = ALONE
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Held-out probabilities (N,), labels (N,), and the scores of every one-feature predictor {name: (N,)}.

    Every process predicts its share of each batch; all get everything."""
    probabilities, labels, scores = [], [], []
    model.eval()
    with torch.no_grad():
        for batch in itertools.islice(data.test_batches(settings["BATCH_SIZE"]), settings["TEST_BATCHES"]):
            dense, values, offsets, _ = tensors(share_of(batch, launched.rank, launched.world_size))
            probabilities.append(torch.sigmoid(model(dense, values, offsets)).numpy())
            labels.append(batch.labels)
            scores.append(rates.score(batch))
    if not labels:
        raise DataError("the data holds no held-out samples")
    shares = launched.gather(probabilities)
    probabilities = [np.concatenate(batch) for batch in zip(*shares, strict=True)]
    one_feature = dict(zip(rates.score_names, np.concatenate(scores, axis=1)))
    for name, extra in getattr(data, "extra_scores", {}).items():
        one_feature[name] = extra[: sum(map(len, labels))]
    return np.concatenate(probabilities), np.concatenate(labels), one_feature


def largest_footprint(data: ClickData, settings: dict[str, Any], num_batches: int = 20) -> int:
    """The most distinct rows that one of the first training batches touches."""
    return max(
        (len(np.unique(rows)) for rows in train_rows(data, settings["BATCH_SIZE"], num_batches)),
        default=0,
    )


def report_cache(embedding: nn.Module, data: ClickData, stats: dict[str, Any], launched: Launched) -> dict[str, Any]:
    """Prints what this process's cache held and moved in training; returns it for the results file."""
    num_rows = sum(data.table_sizes)
    whose = f" of process 0 of {launched.world_size}" if launched.world_size > 1 else ""
    print(
        f"cache{whose}: {embedding.num_slots:,} slots for {num_rows:,} rows, "
        f"{embedding.num_slots / num_rows:.4%} resident; "
        f"hit ratio {stats['hit_ratio']:.4f} ({stats['hits']:,} hits, {stats['misses']:,} misses, "
        f"{stats['misses_unique']:,} of them distinct within their batch)"
    )
    print(
        f"moved: {stats['rows_fetched']:,} rows in ({stats['bytes_fetched'] / 2**20:,.1f} MiB), "
        f"{stats['rows_written_back']:,} rows back ({stats['bytes_written_back'] / 2**20:,.1f} MiB), "
        f"{stats['evictions']:,} evictions"
    )
    per_table = stats.pop("hit_ratio_per_table")
    if len(per_table) == len(data.table_names):  # else this process's cache holds other tables than the data has
        stats["hit_ratio_per_table"] = dict(zip(data.table_names, per_table, strict=True))
        biggest = sorted(range(len(data.table_sizes)), key=lambda table: -data.table_sizes[table])[:5]
        shares = (f"{data.table_names[table]} {per_table[table]:.4f}" for table in biggest)
        print(f"hit ratio of the biggest tables: {', '.join(shares)}")
    print("device bytes: " + ", ".join(f"{name} {size:,}" for name, size in embedding.device_bytes().items()))
    return dict(stats, num_slots=embedding.num_slots, num_rows=num_rows)


def snapshot(stats: Any) -> dict[str, Any]:
    """The counters as plain numbers, so that evaluating does not change them."""
    names = ("hits", "misses", "misses_unique", "evictions", "rows_fetched", "rows_written_back", "bytes_fetched")
    taken: dict[str, Any] = {name: int(getattr(stats, name)) for name in (*names, "bytes_written_back")}
    taken["hit_ratio"] = float(stats.hit_ratio)
    looked_up = stats.hits_per_table + stats.misses_per_table
    taken["hit_ratio_per_table"] = (stats.hits_per_table / np.maximum(looked_up, 1)).round(6).tolist()
    return taken


def run(arguments: argparse.Namespace, settings: dict[str, Any], launched: Launched = ALONE) -> dict[str, Any]:
    """The whole job; returns the results."""
    torch.set_num_threads(settings["THREADS"])
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it did not write

    began = time.perf_counter()
    dtype = TABLE_DTYPES[settings["TABLE_DTYPE"]]
    options = settings["SYNTHETIC_OPTIONS"] if settings["SYNTHETIC"] else settings["DATA_OPTIONS"]
    data = open_data(settings["DATA"], settings["SYNTHETIC"], settings["SEED"], options)
    num_rows = sum(data.table_sizes)
    print(
        f"data: {settings['SYNTHETIC'] or settings['DATA']}, {len(data.table_sizes)} tables, {num_rows:,} rows of "
        f"{settings['EMBEDDING_DIM']} x {settings['TABLE_DTYPE']}, {data.num_dense} dense features, "
        f"batches of {settings['BATCH_SIZE']:,} ({time.perf_counter() - began:.1f} s)",
        flush=True,
    )
    if arguments.uncached:
        embedding: nn.Module = PlainTables(data.table_sizes, settings["EMBEDDING_DIM"], dtype=dtype)
    else:
        id_counts = count_ids(data, settings)
        embedding = cached_tables(
            settings["freq_cache"],
            arguments.cache_ratio,
            data.table_sizes,
            settings["EMBEDDING_DIM"],
            id_counts,
            launched,
            dtype,
        )
        footprint = largest_footprint(data, settings)
        print(
            f"cache: {embedding.num_slots:,} slots; the first batches touch up to {footprint:,} distinct rows each, "
            f"{footprint / embedding.num_slots:.0%} of the slots",
            flush=True,
        )
    model = build_model(settings, embedding, data)
    optimizer = build_optimizer(settings, model, arguments.uncached)

    known_rates = data.label_rates() if hasattr(data, "label_rates") else None
    rates = known_rates or LabelRates(data.table_names, data.table_sizes)
    torch.manual_seed(settings["SEED"] + 2)
    speed = train(model, optimizer, data, settings, rates if known_rates is None else None, launched)
    stats = None if arguments.uncached else snapshot(embedding.stats)
    probabilities, labels, one_feature = evaluate(model, data, settings, rates, launched)
    baseline_name, baseline_auroc, ranked = LabelRates.best(one_feature, labels)

    results: dict[str, Any] = dict(
        auroc=auroc(probabilities, labels),
        baseline_auroc=baseline_auroc,
        logloss=log_loss(probabilities, labels),
        hit_ratio=1.0 if stats is None else stats["hit_ratio"],  # uncached: every row is in memory
        samples_per_s=speed["samples_per_s"],
        baseline=baseline_name,
        baseline_logloss=log_loss(one_feature[baseline_name], labels) if baseline_name else None,
        held_out_samples=len(labels),
        uncached=arguments.uncached,
        table_dtype=settings["TABLE_DTYPE"],
        config=arguments.config.name,
        seed=settings["SEED"],
        threads=settings["THREADS"],
        processes=launched.world_size,
        torch=torch.__version__,
        steps=speed["steps"],
        train_seconds=speed["seconds"],
    )
    print(f"trained {speed['samples']:,} samples in {speed['steps']:,} steps, {speed['seconds']:.1f} s")
    all_steps = data.num_train_batches(settings["BATCH_SIZE"])
    if known_rates is not None and all_steps is not None and speed["steps"] < all_steps:
        print(f"only {speed['steps']:,} of {all_steps:,} batches were trained; the baseline knows all training weeks")
    if stats is not None:
        results["cache"] = report_cache(embedding, data, stats, launched)
        ratio = arguments.cache_ratio or settings["freq_cache"].get("cache_ratio")
        if ratio is not None:
            assert embedding.num_slots <= max(1, ratio * num_rows), "the cache grew beyond its share of the rows"
    print(
        f"held out: {len(labels):,} samples; the strongest single features (each chosen on the held-out data itself):"
    )
    for name, value in ranked[:5]:
        print(f"  {value:.4f}  {name}")
    print(
        f"model AUROC {results['auroc']:.4f}, {results['auroc'] - baseline_auroc:+.4f} over the best of them; "
        f"log loss {results['logloss']:.4f} against {results['baseline_logloss'] or float('nan'):.4f}"
    )
    return results


def main() -> int:
    arguments = parse_arguments()
    launched = ALONE
    try:
        settings = read_settings(arguments)
        launched = launch(settings, arguments.uncached)
        quiet = open(os.devnull, "w") if launched.rank else None  # one process speaks
        with contextlib.redirect_stdout(quiet) if quiet else contextlib.nullcontext():
            results = run(arguments, settings, launched)
    except (SettingError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if launched.by_launcher:
            torch.distributed.destroy_process_group()
    if launched.rank:
        return 0
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    keys = ("auroc", "baseline_auroc", "logloss", "hit_ratio", "samples_per_s")
    print(" ".join(f"{key}={results[key]!r}" for key in keys), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
