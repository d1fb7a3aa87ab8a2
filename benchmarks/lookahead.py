"""How much of a fetch's time Lookahead hides behind training.

    .venv/bin/python benchmarks/lookahead.py [--fetch-ms 2] [--blocks 12] [--threads 1] [--scale 0.1]

A bag and a small MLP are trained on a synthetic stream, one id a sample, with and without Lookahead (window 16, depth
1, policy "lookahead" in both), over a store as it is and over one whose every read takes `--fetch-ms` longer, asleep.
The four take turns in blocks of 20 steps (not step by step: a fetch in the background of one would pass while another
is timed), and the first two steps of a block do not count.

    hidden share = 1 - (ahead, slow store - ahead, fast store) / (without, slow store - without, fast store)

by the medians of the times of a step, `next` on the loader included.
"""

import sys
import threading
import time
from typing import Any

import numba
import numpy as np
import torch
from harness import (
    REPOSITORY,
    argument_parser,
    command_line,
    default_out,
    describe_machine,
    markdown_table,
    summary,
    write_results,
)
from torch import nn

sys.path.insert(0, str(REPOSITORY))

from colossal_freqcache import FreqAwareEmbeddingBag, Lookahead, optim
from colossal_freqcache.kernels import make_kernels
from colossal_freqcache.stores import RamStore
from colossal_freqcache.synthetic import PRESETS, TableStream

NUM_ROWS, DIM, NUM_SLOTS, BATCH_SIZE = 1_000_000, 32, 30_000, 4096
WINDOW, DEPTH = 16, 1
BLOCK_STEPS, NOT_COUNTED = 20, 2


class SlowStore(RamStore):
    """A RamStore of which every read takes `seconds` longer, once `is_slow`; it counts the reads of other threads."""

    def __init__(self, seconds: float):
        super().__init__(make_kernels("cpu"))
        self.seconds, self.is_slow = seconds, False
        self.reads = self.reads_beside = 0

    def read(self, rows, records, places):
        if self.is_slow:
            self.reads += 1
            self.reads_beside += threading.current_thread() is not threading.main_thread()
            if self.seconds:
                time.sleep(self.seconds)
        super().read(rows, records, places)


class Contender:
    """One training run, a step at a time."""

    def __init__(self, batches: list[torch.Tensor], ahead: bool, fetch_ms: float):
        torch.manual_seed(0)
        self.store = SlowStore(fetch_ms / 1e3)
        self.bag = FreqAwareEmbeddingBag(
            NUM_ROWS,
            DIM,
            mode="sum",
            num_slots=NUM_SLOTS,
            evict_strategy="lookahead",
            optimizer="adagrad",
            store=self.store,
        )
        self.model = nn.Sequential(self.bag, nn.Linear(DIM, 256), nn.ReLU(), nn.Linear(256, 1))
        self.optimizer = optim.Adagrad(self.model.parameters(), lr=0.01)
        self.batches = iter(Lookahead(batches, self.bag, window=WINDOW, depth=DEPTH) if ahead else batches)
        self.store.is_slow = True

    def step(self) -> None:
        ids = next(self.batches)
        self.model(ids).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(fetch_ms: float, blocks: int, seed: int = 0) -> dict[str, Any]:
    """{"times": {contender: ms of each step}, "reads": {contender: [in the background, all]}, "hidden": share}."""
    stream = TableStream(NUM_ROWS, PRESETS["kaggle"].fit(3), seed=seed)
    steps = blocks * BLOCK_STEPS
    batches = [torch.from_numpy(stream.draw(BATCH_SIZE)).view(-1, 1) for _ in range(steps)]
    contenders = {
        f"{'Lookahead' if ahead else 'without'}, {store} store": Contender(batches, ahead, ms)
        for store, ms in (("fast", 0.0), ("slow", fetch_ms))
        for ahead in (True, False)
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks):
        names = list(contenders)
        for turn in range(len(names)):
            name = names[(block + turn) % len(names)]
            for number in range(BLOCK_STEPS):
                began = time.perf_counter()
                contenders[name].step()
                if number >= NOT_COUNTED:
                    times[name].append((time.perf_counter() - began) * 1e3)
    for contender in contenders.values():
        contender.store.is_slow = False
    medians = {name: float(np.median(of_one)) for name, of_one in times.items()}
    added = {kind: medians[f"{kind}, slow store"] - medians[f"{kind}, fast store"] for kind in ("Lookahead", "without")}
    tables = [contender.bag.logical_weight() for contender in contenders.values()]
    assert all(torch.equal(tables[0], table) for table in tables), "the contenders trained different tables"
    return {
        "times": {name: summary(of_one) for name, of_one in times.items()},
        "reads": {name: [each.store.reads_beside, each.store.reads] for name, each in contenders.items()},
        "hit_ratios": {name: each.bag.stats.hit_ratio for name, each in contenders.items()},
        "added_ms": added,
        "hidden_share": 1 - added["Lookahead"] / added["without"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argument_parser(__doc__, "the blocks")
    parser.add_argument("--fetch-ms", type=float, default=2.0)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.out is None:
        args.out = default_out("lookahead", parser, args, "scale", "fetch_ms", "blocks", "threads")
    torch.set_num_threads(args.threads)
    machine = describe_machine([torch, numba, np])
    found = measure(args.fetch_ms, max(1, round(args.scale * args.blocks)), args.seed)
    command = command_line("benchmarks/lookahead.py", sys.argv[1:] if arguments is None else arguments)
    results = {"command": command, "threads": args.threads, "fetch_ms": args.fetch_ms, "machine": machine, **found}
    rows = [
        [name, time["min"], time["median"], time["p80"], *found["reads"][name], f"{found['hit_ratios'][name]:.3f}"]
        for name, time in found["times"].items()
    ]
    header = ["ms a step", "min", "median", "p80", "reads in the background", "reads", "hit ratio"]
    markdown = (
        f"`{command}`, commit {machine['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"torch {torch.__version__}, {args.threads} thread(s)\n\n{markdown_table(header, rows)}\n\n"
        f"{args.fetch_ms} ms more a fetch cost {found['added_ms']['without']:.2f} ms a step without Lookahead, "
        f"{found['added_ms']['Lookahead']:.2f} ms with: {found['hidden_share']:.0%} hidden."
    )
    write_results(args.out, results, markdown)
    print(markdown)
    return results


if __name__ == "__main__":
    main()
