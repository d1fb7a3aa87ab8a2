"""What a rank sends, looks up and fetches in one training step, from 1 to 1,024 ranks: counted at a few, then on paper.

    python benchmarks/scaling.py [--count-only] [--optimizer adagrad] [--samples 16384] [--out FILE]

The model is the few plain functions below, for `output="share"`. The run first trains small tables on 2 and on 4 gloo
ranks and compares, at every step and on every rank, the bytes of the model with those that `Ranks.bytes_sent` counted
and with those that were handed to torch.distributed. A difference ends the run. Then it evaluates the model for click
logs: 26 tables as large and as skewed as Criteo's Kaggle set, one id a bag, and once more for long bags. How many
distinct rows a step has comes from the calibrated generator of the package, drawn in full, not from a formula.

What the model has to know of the ids (how many are distinct, where they live) are arguments: the check takes them from
the very batches, the example from the generator.

Shapes: W ranks, B bags of a rank (each table), N ids of a rank, T tables, D width, R rows of all tables, C slots.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from harness import REPOSITORY, command_line, describe_machine, markdown_table, write_results

import colossal_freqcache
from colossal_freqcache import optim
from colossal_freqcache.parallel import ShardedFreqAwareEmbeddingBagCollection, balanced_plan
from colossal_freqcache.synthetic import PRESETS, TableStream

sys.path.insert(0, str(REPOSITORY / "tests"))

from ranks import run_on_ranks

KINDS = ("ids", "rows", "numbers")
RANKS = [2**power for power in range(11)]
CACHE_RATIO = 0.015


# ---- the model ------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """What one rank passes to a forward, and how many others there are.

    ranks: W. bags: B of this rank, each table. bags_elsewhere: those of all other ranks together. ids: N of this rank.
    tables: T. dim: D. element_bytes: of a weight. id_bytes: 4 while the largest table (row sharding: a rank's part of
    all rows) is below 2^31 rows, else 8.
    """

    ranks: int
    bags: int
    bags_elsewhere: int
    ids: int
    tables: int
    dim: int
    element_bytes: int = 4
    id_bytes: int = 4


def headers_sent(ranks: int) -> int:
    """Before a lookup 4 + W int64 (may it go on, what must be alike, how many ids go to whom), 1 byte of status after
    it, and 1 in its backward."""
    return (8 * (4 + ranks) + 2) * (ranks - 1)


def row_sums_sent(ranks: int, updated_rows: int) -> int:
    """Row-wise Adagrad needs one sum over the whole row; with column sharding each rank sends its part, a float64."""
    return 8 * updated_rows * (ranks - 1)


def column_sent(share: Share, width: int, updated_rows: int = 0) -> dict[str, int]:
    """Bytes by kind that a rank with `width` columns sends; updated_rows: with row-wise Adagrad, distinct rows of all.

    Lengths and ids of its bags go to everyone; pooled parts of the others' bags, and gradients of its own, to each."""
    rows = share.bags_elsewhere * share.tables * width + share.bags * share.tables * (share.dim - width)
    return {
        "ids": (share.tables * share.bags + share.ids) * share.id_bytes * (share.ranks - 1),
        "rows": rows * share.element_bytes,
        "numbers": headers_sent(share.ranks) + row_sums_sent(share.ranks, updated_rows),
    }


def row_sent(share: Share, requested: int, served: int) -> dict[str, int]:
    """Bytes by kind that a rank sends which requests `requested` rows of others and serves `served` of its own to them.

    A rank requests each distinct id of its share once. Whole rows go forward, whole rows of gradients back."""
    return {
        "ids": requested * share.id_bytes,
        "rows": (served + requested) * share.dim * share.element_bytes,
        "numbers": headers_sent(share.ranks),
    }


def table_sent(share: Share, own_tables: int, own_ids: int) -> dict[str, int]:
    """Bytes by kind that a rank with `own_tables` tables sends; `own_ids` ids of its share fall into those.

    Lengths and ids go to the table's rank; pooled outputs of its tables go out, gradients of the others' tables too."""
    foreign_tables = share.tables - own_tables
    pooled = share.bags_elsewhere * own_tables + share.bags * foreign_tables
    return {
        "ids": (foreign_tables * share.bags + share.ids - own_ids) * share.id_bytes,
        "rows": pooled * share.dim * share.element_bytes,
        "numbers": headers_sent(share.ranks),
    }


def column_width(dim: int, ranks: int, rank: int = 0) -> int:
    """Columns of `rank`; the first ranks have one more where W does not divide D."""
    return dim // ranks + (rank < dim % ranks)


def record_bytes(width: int, optimizer: str, element_bytes: int = 4) -> int:
    """A row of `width` columns with its optimizer state: what a miss fetches and, once trained, writes back."""
    state = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": width, "adam": 2 * width}[optimizer]
    return (width + state) * element_bytes


def link_efficiency(num_bytes: int) -> float:
    """Payload over all bytes of PCIe packets that carry one record.

    24 bytes around at most 256: framing, sequence number, a header of 4 words, LCRC
    (https://www.intel.com/content/www/us/en/docs/programmable/683390/current/understanding-pci-express-throughput.html
    gives 5 to 7 words; 256 is the usual limit of a payload)."""
    return num_bytes / (num_bytes + 24 * -(-num_bytes // 256))


# ---- the model against counted bytes --------------------------------------------------------------------------------

CHECK_TABLES = [60, 900, 3, 1500, 240]
CHECK_DIM = 6  # 4 ranks have 2, 2, 1 and 1 columns
CHECK_SLOTS = 330
CHECKS = (("column", "sgd"), ("column", "rowwise_adagrad"), ("row", "rowwise_adagrad"), ("table", "rowwise_adagrad"))
OPTIMIZERS = {"sgd": optim.SGD, "rowwise_adagrad": optim.RowWiseAdagrad}


class Bags(NamedTuple):
    """values: (N,) ids local to their table, table-major. lengths: (T, B)."""

    values: np.ndarray
    lengths: np.ndarray

    def ids_of_the_whole(self) -> np.ndarray:
        first_ids = np.cumsum([0, *CHECK_TABLES[:-1]])
        return self.values + np.repeat(first_ids, self.lengths.sum(1))


def check_bags(step: int, rank: int) -> Bags:
    """Rank `rank`'s share of step `step`: 10 + 3 rank bags of 0 to 3 ids, small ids far more often."""
    generator = np.random.default_rng([step, rank])
    lengths = generator.integers(0, 4, (len(CHECK_TABLES), 10 + 3 * rank))
    draws = [
        generator.zipf(1.2, n).astype(np.uint64) % np.uint64(rows)
        for rows, n in zip(CHECK_TABLES, lengths.sum(1), strict=True)
    ]
    return Bags(np.concatenate(draws).astype(np.int64), lengths)


def check_plan(ranks: int) -> list[int]:
    """The rank of each table; with 4 ranks, the last one has none."""
    return [table % min(ranks, 3) for table in range(len(CHECK_TABLES))]


def modelled(rank: int, ranks: int, sharding: str, optimizer: str, step: int) -> dict[str, int]:
    """Bytes sent by kind, "looked_up" ids and "record" bytes of a rank in a step, from the batches of all ranks."""
    shares = [check_bags(step, source) for source in range(ranks)]
    mine = shares[rank]
    all_bags = sum(share.lengths.shape[1] for share in shares)
    bags = mine.lengths.shape[1]
    share = Share(ranks, bags, all_bags - bags, mine.values.size, len(CHECK_TABLES), CHECK_DIM)
    distinct = [np.unique(other.ids_of_the_whole()) for other in shares]
    if sharding == "column":
        width = column_width(CHECK_DIM, ranks, rank)
        updated = np.unique(np.concatenate(distinct)).size if optimizer == "rowwise_adagrad" else 0
        sent = column_sent(share, width, updated)
        looked_up = sum(other.values.size for other in shares)
    elif sharding == "row":
        width = CHECK_DIM
        to_here = [int((ids % ranks == rank).sum()) for ids in distinct]
        sent = row_sent(share, distinct[rank].size - to_here[rank], sum(to_here) - to_here[rank])
        looked_up = sum(to_here)
    else:
        width = CHECK_DIM
        own = np.array(check_plan(ranks)) == rank
        sent = table_sent(share, int(own.sum()), int(mine.lengths[own].sum()))
        looked_up = sum(int(other.lengths[own].sum()) for other in shares)
    return {**sent, "looked_up": looked_up, "record": record_bytes(width, optimizer)}


# Every exchange of torch.distributed that moves data; what is not priced here must not occur in a step.
_ALLOWED = ("all_to_all_single", "all_gather")
_FORBIDDEN = (
    "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "broadcast", "broadcast_object_list",
    "gather", "gather_object", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send", "isend", "irecv", "batch_isend_irecv",
)  # fmt: skip


@contextlib.contextmanager
def on_the_wire() -> Iterator[list[int]]:
    """One int: the bytes that this rank hands to torch.distributed for other ranks meanwhile, by a count of its own."""
    total = [0]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    real_all_to_all, real_all_gather = dist.all_to_all_single, dist.all_gather

    def all_to_all(
        output: torch.Tensor, sent: torch.Tensor, receive: list[int], send: list[int], **options: Any
    ) -> Any:
        total[0] += (sent.numel() - send[rank]) * sent.element_size()
        return real_all_to_all(output, sent, receive, send, **options)

    def all_gather(gathered: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        total[0] += own.numel() * own.element_size() * (ranks - 1)
        return real_all_gather(gathered, own, **options)

    def forbid(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **options: Any) -> Any:
            raise AssertionError(f"a training step called torch.distributed.{name}, which the model does not price")

        return refuse

    with contextlib.ExitStack() as patches:
        for name, stand_in in zip(_ALLOWED, (all_to_all, all_gather), strict=True):
            patches.enter_context(patch.object(dist, name, stand_in))
        for name in _FORBIDDEN:
            patches.enter_context(patch.object(dist, name, forbid(name)))
        yield total


def count_steps(rank: int, ranks: int, sharding: str, optimizer: str, num_steps: int) -> dict[str, list[int]]:
    """What this rank counted in each step: KINDS, "wire", "looked_up", and of the cache "fetched", "fetched_bytes"."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it grows to.*")
        bags = ShardedFreqAwareEmbeddingBagCollection(
            CHECK_TABLES,
            CHECK_DIM,
            mode="sum",
            num_slots=CHECK_SLOTS,
            optimizer=optimizer,
            sharding=sharding,
            plan=check_plan(ranks) if sharding == "table" else None,
        )
        trained_by = OPTIMIZERS[optimizer](bags.parameters(), lr=0.05)
        counted: dict[str, list[int]] = {name: [] for name in (*KINDS, "wire", "looked_up", "fetched", "fetched_bytes")}
        for step in range(num_steps):
            share = check_bags(step, rank)
            offsets = torch.from_numpy(np.cumsum(share.lengths) - share.lengths.reshape(-1))
            before, stats_before = dict(bags._ranks.bytes_sent), bags.stats.as_dict()
            with on_the_wire() as wire:
                bags(torch.from_numpy(share.values), offsets).square().mean().backward()
                trained_by.step()
            trained_by.zero_grad()
            stats = {name: value - stats_before[name] for name, value in bags.stats.as_dict().items()}
            for kind in KINDS:
                counted[kind].append(bags._ranks.bytes_sent[kind] - before[kind])
            counted["wire"].append(wire[0])
            counted["looked_up"].append(stats["hits"] + stats["misses"])
            counted["fetched"].append(stats["rows_fetched"])
            counted["fetched_bytes"].append(stats["bytes_fetched"])
    return counted


def _count_on_rank(rank: int, ranks: int, folder: str, num_steps: int) -> None:
    counted = [count_steps(rank, ranks, sharding, optimizer, num_steps) for sharding, optimizer in CHECKS]
    Path(folder, f"{rank}.json").write_text(json.dumps(counted))


def count_on(ranks: int, num_steps: int) -> list[list[dict[str, list[int]]]]:
    """What `count_steps` gives on each of `ranks` gloo ranks, for each of CHECKS."""
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(_count_on_rank, ranks, folder, num_steps)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def compare(found: Sequence[Sequence[dict[str, list[int]]]]) -> list[dict[str, Any]]:
    """Holds what `count_on` gave against the model; one entry for each of CHECKS, summed over steps and ranks.

    Raises:
        RuntimeError: a rank counted, in some step, other bytes than the model or than it handed to torch.distributed.
    """
    ranks = len(found)
    entries = []
    for number, (sharding, optimizer) in enumerate(CHECKS):
        model = dict.fromkeys((*KINDS, "looked_up"), 0)
        counted = dict.fromkeys((*KINDS, "looked_up", "fetched", "fetched_bytes"), 0)
        for rank, of_rank in enumerate(checks[number] for checks in found):
            for step in range(len(of_rank["wire"])):
                expected = modelled(rank, ranks, sharding, optimizer, step)
                expected["fetched_bytes"] = of_rank["fetched"][step] * expected.pop("record")
                expected["wire"] = sum(expected[kind] for kind in KINDS)
                actual = {name: of_rank[name][step] for name in expected}
                if actual != expected:
                    raise RuntimeError(
                        f"sharding={sharding!r}, {optimizer}, rank {rank} of {ranks}, step {step}: counted {actual}, "
                        f"the model says {expected}"
                    )
                for name in model:
                    model[name] += expected[name]
                for name in counted:
                    counted[name] += of_rank[name][step]
        entries.append(
            {"ranks": ranks, "sharding": sharding, "optimizer": optimizer, "model": model, "counted": counted}
        )
    return entries


# ---- how many rows are distinct: from the generator -----------------------------------------------------------------

SAMPLED_SHARES = 16  # from which the requests of one rank are taken
CHUNK = 1 << 20  # ids drawn at a time


class Stream:
    """The ids of all tables, as ids of the whole, `length` ids a bag."""

    def __init__(self, preset: str, seed: int, scale: float = 1.0) -> None:
        self.sizes = [
            size if size <= 10_000 else max(10_000, round(size * scale)) for size in PRESETS[preset].table_sizes
        ]
        self.pooling = list(PRESETS[preset].pooling) or [1] * len(self.sizes)
        self.first_ids = np.cumsum([0, *self.sizes[:-1]])
        self.streams = [
            TableStream(size, PRESETS[preset].fit(table), seed=seed, salt=table)
            for table, size in enumerate(self.sizes)
        ]

    def draw(self, samples: int) -> Iterator[np.ndarray]:
        """The ids of the next `samples` samples, in pieces of one table."""
        for first_id, length, stream in zip(self.first_ids, self.pooling, self.streams, strict=True):
            left = samples * length
            while left:
                piece = stream.draw(min(left, CHUNK))
                left -= piece.size
                yield piece + first_id


def table_ranks(stream: Stream, ranks: int) -> list[dict[str, Any]]:
    """What each rank that has tables gets of them: the "tables" by number, and their "ids_a_sample"."""
    plan = balanced_plan(stream.sizes, ranks, [float(length) for length in stream.pooling])
    owned = [[table for table, at in enumerate(plan) if at == rank] for rank in sorted(set(plan))]
    return [{"tables": tables, "ids_a_sample": sum(stream.pooling[table] for table in tables)} for tables in owned]


def missed_rows(previous: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Which rows the step `current` misses, bool (n,) as the two steps' rows, the most frequent row first.

    The cache has 1.5 % of the rows as slots, or as many as a step has rows, if those are more. It holds what eviction
    "dataset" leaves there: the rows of the step before and, beside them, the most frequent ones."""
    num_previous = int(previous.sum())
    slots = max(int(CACHE_RATIO * previous.size), num_previous, int(current.sum()))
    resident = previous.copy()
    resident[np.flatnonzero(~previous)[: slots - num_previous]] = True
    return current & ~resident


def measure_stream(preset: str, samples: int, most_ranks: int, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """What the model has to know of the ids, by number of ranks with `samples` samples each.

    A first stream, as long as the largest step, is counted and orders the rows, as a user's counts do. The steps come
    from a second one: with W ranks, shares 0..W-1 are one step and W..2W-1 the next, which is the one described."""
    counted, stream = Stream(preset, 2 * seed, scale), Stream(preset, 2 * seed + 1, scale)
    num_rows, num_tables = sum(stream.sizes), len(stream.sizes)
    counts = np.zeros(num_rows, np.int32)
    for ids in counted.draw(most_ranks * samples):
        first = ids.min()
        found = np.bincount(ids - first)
        counts[first : first + found.size] += found.astype(np.int32)
    id_of_row = np.argsort(-counts, kind="stable")
    table_of_row = np.repeat(np.arange(num_tables, dtype=np.int8), stream.sizes)[id_of_row]

    requests = np.zeros(num_rows, np.int8)  # by how many of the first SAMPLED_SHARES shares
    num_drawn = 0

    def draw(shares: int, into: np.ndarray) -> None:
        """Marks the ids of the next shares."""
        nonlocal num_drawn
        while shares:
            sampled = num_drawn < SAMPLED_SHARES
            now = 1 if sampled else shares
            for ids in stream.draw(now * samples):
                into[ids] = True
                if sampled:
                    requests[np.unique(ids)] += 1
            num_drawn += now
            shares -= now

    previous = np.zeros(num_rows, np.bool_)  # by id of the whole
    draw(1, previous)
    by_ranks = {}
    for ranks in (ranks for ranks in RANKS if ranks <= most_ranks):
        current = np.zeros(num_rows, np.bool_)
        draw(ranks, current)
        previous_rows, current_rows = previous[id_of_row], current[id_of_row]
        missed = missed_rows(previous_rows, current_rows)
        of_table_ranks = table_ranks(stream, ranks)
        for of_rank in of_table_ranks:
            is_own = np.zeros(num_tables, np.bool_)
            is_own[of_rank["tables"]] = True
            own = is_own[table_of_row]
            of_rank["distinct"] = int(current_rows[own].sum())
            of_rank["missed"] = int(missed_rows(previous_rows[own], current_rows[own]).sum())
        by_ranks[str(ranks)] = {
            "distinct": int(current.sum()),
            "missed": int(missed.sum()),
            "busiest_owner": {
                "distinct": int(np.bincount(np.flatnonzero(current) % ranks).max()),
                "missed": int(np.bincount(id_of_row[missed] % ranks, minlength=1).max()),
            },
            "table_ranks": of_table_ranks,
        }
        previous |= current
    draw(max(0, SAMPLED_SHARES - num_drawn), current)
    requested = np.flatnonzero(requests)
    for ranks, found in by_ranks.items():
        of_owner = np.bincount(requested % int(ranks), weights=requests[requested])
        found["busiest_owner"]["share_of_requests"] = float(of_owner.max() / of_owner.sum())
    return {
        "tables": num_tables,
        "rows": num_rows,
        "ids_a_sample": sum(stream.pooling),
        "distinct_a_share": round(int(requests.sum(dtype=np.int64)) / SAMPLED_SHARES),
        "by_ranks": by_ranks,
    }


def measure_share(preset: str, samples: int, num_shares: int, seed: int) -> dict[str, Any]:
    """What decides the bytes sent: the distinct rows of a share (mean of `num_shares`), and tables by ranks."""
    stream = Stream(preset, seed)
    distinct = 0
    for _ in range(num_shares):
        last_table, pieces = None, []
        for ids in stream.draw(samples):
            table = int(np.searchsorted(stream.first_ids, ids[0], side="right"))
            if table != last_table and pieces:
                distinct += np.unique(np.concatenate(pieces)).size
                pieces = []
            last_table = table
            pieces.append(ids)
        distinct += np.unique(np.concatenate(pieces)).size
    return {
        "tables": len(stream.sizes),
        "rows": sum(stream.sizes),
        "ids_a_sample": sum(stream.pooling),
        "distinct_a_share": round(distinct / num_shares),
        "table_ranks": {str(ranks): table_ranks(stream, ranks) for ranks in RANKS},
    }


# ---- the model beyond -----------------------------------------------------------------------------------------------


def busiest_table_rank(share: Share, of_ranks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the rank sends that sends the most; all pass as many bags as this one."""
    sent = [table_sent(share, len(of["tables"]), share.bags * of["ids_a_sample"]) for of in of_ranks]
    return max(sent, key=lambda by_kind: sum(by_kind.values()))


def evaluate(stream: dict[str, Any], samples: int, dim: int, optimizer: str) -> dict[str, list[dict[str, Any]]]:
    """By sharding, one entry for each number of ranks: what the busiest rank does in a step with equal shares.

    ids, rows, headers, row_sums: bytes sent. looked_up: ids. slots: rows that must be resident at once. fetched: rows.
    record: bytes of one. fetched_bytes, and those that the link carries for them; as much is written back."""
    tables, distinct = stream["tables"], stream["distinct_a_share"]
    ids = samples * stream["ids_a_sample"]
    entries: dict[str, list[dict[str, Any]]] = {"column": [], "row": [], "table": []}

    def enter(
        sharding: str, ranks: int, sent: dict[str, int], looked_up: int, slots: int, fetched: int, width: int
    ) -> None:
        record = record_bytes(width, optimizer)
        headers = headers_sent(ranks)
        entries[sharding].append(
            {
                "ranks": ranks,
                "ids": sent["ids"],
                "rows": sent["rows"],
                "headers": headers,
                "row_sums": sent["numbers"] - headers,
                "sent": sum(sent.values()),
                "looked_up": looked_up,
                "slots": slots,
                "fetched": fetched,
                "record": record,
                "fetched_bytes": fetched * record,
                "on_the_link": round(fetched * record / link_efficiency(record)),
            }
        )

    for key, found in stream["by_ranks"].items():
        ranks = int(key)
        share = Share(ranks, samples, samples * (ranks - 1), ids, tables, dim)
        if ranks <= dim:
            width = column_width(dim, ranks)
            sent = column_sent(share, width, found["distinct"] if optimizer == "rowwise_adagrad" else 0)
            enter("column", ranks, sent, ranks * ids, found["distinct"], found["missed"], width)
        busiest = found["busiest_owner"]
        requests_here = round(busiest["share_of_requests"] * distinct * ranks)  # of all ranks, this one among them
        own = requests_here // ranks
        sent = row_sent(share, distinct - own, requests_here - own)
        enter("row", ranks, sent, requests_here, busiest["distinct"], busiest["missed"], dim)
        by_rank = found["table_ranks"]
        sent = busiest_table_rank(share, by_rank)
        looked_up = ranks * samples * max(of["ids_a_sample"] for of in by_rank)
        enter(
            "table",
            ranks,
            sent,
            looked_up,
            max(of["distinct"] for of in by_rank),
            max(of["missed"] for of in by_rank),
            dim,
        )
    return entries


def evaluate_long_bags(share_facts: dict[str, Any], samples: int, dim: int) -> list[dict[str, Any]]:
    """Bytes that a rank sends by sharding, for each number of ranks; SGD, rows spread evenly (row), busiest (table)."""
    tables, distinct = share_facts["tables"], share_facts["distinct_a_share"]
    entries = []
    for ranks in RANKS:
        share = Share(ranks, samples, samples * (ranks - 1), samples * share_facts["ids_a_sample"], tables, dim)
        elsewhere = distinct - distinct // ranks
        entry: dict[str, Any] = {"ranks": ranks, "column": None}
        if ranks <= dim:
            entry["column"] = sum(column_sent(share, column_width(dim, ranks)).values())
        entry["row"] = sum(row_sent(share, elsewhere, elsewhere).values())
        entry["table"] = sum(busiest_table_rank(share, share_facts["table_ranks"][str(ranks)]).values())
        entries.append(entry)
    return entries


def column_meets_row(samples: int, ids: int, tables: int, dim: int, distinct: int) -> float:
    """The number of ranks above which a rank sends more with column than with row sharding; W divides D, float32, SGD.

    Both divided by W - 1, and set equal: 4 (T B + N) + 8 T B D / W = (4 + 8 D) distinct / W."""
    return ((4 + 8 * dim) * distinct - 8 * tables * samples * dim) / (4 * (tables * samples + ids))


# ---- a run ----------------------------------------------------------------------------------------------------------


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def counted_table(entries: Sequence[dict[str, Any]]) -> str:
    """Bytes of all ranks and steps together; the comparison itself was made for each rank and step."""
    rows = []
    for entry in entries:
        model, counted = entry["model"], entry["counted"]
        cells = [f"{model[name]:,} / {counted[name]:,}" for name in (*KINDS, "looked_up")]
        rows.append([f"{entry['ranks']}", entry["sharding"], entry["optimizer"], *cells, f"{counted['fetched']:,}"])
    return markdown_table(
        ["ranks", "sharding", "optimizer", "ids", "rows", "numbers", "ids looked up", "rows fetched (counted)"], rows
    )


def summary_table(example: dict[str, list[dict[str, Any]]]) -> str:
    """The shardings side by side; bytes as 10^6, ids looked up as 10^3."""
    header = ["ranks", "sent: column", "without row sums", "row", "table", "looked up, 10^3: column", "row", "table"]
    header += ["on the link: column", "row", "table"]
    rows = []
    for number, of_row in enumerate(example["row"]):
        column = example["column"][number] if number < len(example["column"]) else None
        table = example["table"][number]
        without_sums = None if column is None else column["sent"] - column["row_sums"]
        cells = [None if column is None else column["sent"], without_sums, of_row["sent"], table["sent"]]
        for name, unit in (("looked_up", 1000), ("on_the_link", 1)):  # _megabytes divides by 10^6
            cells += [None if of is None else of[name] * unit for of in (column, of_row, table)]
        rows.append([f"{of_row['ranks']:,}", *("-" if cell is None else _megabytes(cell) for cell in cells)])
    return markdown_table(header, rows)


def example_table(entries: Sequence[dict[str, Any]]) -> str:
    """One sharding, a line for each number of ranks; bytes as 10^6."""
    header = ["ranks", "ids", "rows", "headers", "row sums", "sent", "ids looked up", "rows at once", "rows fetched"]
    header += ["record", "fetched", "efficiency", "on the link"]
    rows = [
        [
            f"{entry['ranks']:,}",
            *(_megabytes(entry[name]) for name in ("ids", "rows", "headers", "row_sums")),
            f"**{_megabytes(entry['sent'])}**",
            *(f"{entry[name]:,}" for name in ("looked_up", "slots", "fetched", "record")),
            _megabytes(entry["fetched_bytes"]),
            f"{link_efficiency(entry['record']):.0%}",
            f"**{_megabytes(entry['on_the_link'])}**",
        ]
        for entry in entries
    ]
    return markdown_table(header, rows)


def long_bags_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"{entry['ranks']:,}"]
        + ["-" if entry[name] is None else _megabytes(entry[name]) for name in entries[0] if name != "ranks"]
        for entry in entries
    ]
    return markdown_table(list(entries[0]), rows)


def as_markdown(results: dict[str, Any]) -> str:
    settings, stream, share_facts = results["settings"], results["stream"], results["long_bags_share"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join(
        [
            "# Bytes per step and rank, from 1 to 1,024 ranks",
            f"`{results['command']}`",
            f"{versions}; commit {results['commit']}. What the columns mean, and what follows: "
            "[docs/scaling.md](../../docs/scaling.md). Every number is in the JSON file beside.",
            "## Counted: model / counted, bytes of all ranks",
            f"{settings['steps']} training steps of {len(CHECK_TABLES)} tables x {CHECK_DIM} float32, 10 + 3 r bags of "
            "0 to 3 ids on rank r, gloo. Every rank and step agreed; sums are shown.",
            counted_table(results["counted"]),
            "## Computed: click logs, one id a bag",
            f"{stream['tables']} tables, {stream['rows']:,} rows x {settings['dim']} float32, "
            f"{settings['samples']:,} samples a rank ({stream['distinct_a_share']:,} distinct rows), "
            f"{settings['optimizer']}. The busiest rank in one step; bytes in units of 10^6.",
            summary_table(results["example"]),
            *(f"### {sharding}\n\n{example_table(entries)}" for sharding, entries in results["example"].items()),
            "## Computed: long bags",
            f"{share_facts['tables']} tables, {share_facts['rows']:,} rows, {share_facts['ids_a_sample']} ids a "
            f"sample, {settings['samples']:,} samples a rank ({share_facts['distinct_a_share']:,} distinct rows), SGD. "
            f"10^6 bytes that a rank sends; column sends more than row above {results['long_bags_meet']:.1f} ranks.",
            long_bags_table(results["long_bags"]),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count-only", action="store_true", help="compare with counted bytes, and stop")
    parser.add_argument("--steps", type=int, default=6, help="counted steps")
    parser.add_argument("--samples", type=int, default=16_384, help="samples of a rank")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--optimizer", choices=("sgd", "rowwise_adagrad", "adagrad", "adam"), default="rowwise_adagrad")
    parser.add_argument("--most-ranks", type=int, choices=RANKS, default=RANKS[-1])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows of tables above 10,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "scaling")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the comparison; without --count-only writes OUT.json and OUT.md and returns what they hold."""
    args = parse(argv)
    counted = [entry for ranks in (2, 4) for entry in compare(count_on(ranks, args.steps))]
    print("model / counted: equal on every rank and in every step")
    print(counted_table(counted))
    if args.count_only:
        return {"counted": counted}
    machine = describe_machine([torch, np, colossal_freqcache])
    stream = measure_stream("kaggle", args.samples, args.most_ranks, args.seed, args.scale)
    share_facts = measure_share("meta", args.samples, 2, args.seed)
    results = {
        "command": command_line("benchmarks/scaling.py", sys.argv[1:] if argv is None else argv),
        "versions": machine["versions"],
        "commit": machine["commit"],
        "settings": {name: getattr(args, name) for name in ("steps", "samples", "dim", "optimizer", "scale", "seed")},
        "counted": counted,
        "stream": stream,
        "example": evaluate(stream, args.samples, args.dim, args.optimizer),
        "long_bags_share": share_facts,
        "long_bags": evaluate_long_bags(share_facts, args.samples, args.dim),
        "long_bags_meet": column_meets_row(
            args.samples,
            args.samples * share_facts["ids_a_sample"],
            share_facts["tables"],
            args.dim,
            share_facts["distinct_a_share"],
        ),
    }
    write_results(args.out, results, as_markdown(results))
    print(args.out.with_suffix(".md").read_text())
    return results


if __name__ == "__main__":
    main()
