"""RowMover: a thread that moves records between a store and the cache block, in order, while training goes on.

Knows rows, slots and records; nothing of ids, maps or policies: those are changed by the thread that asks, before it
asks. So a move never decides anything. Shapes: n rows to write, m rows to read.

Moves are done one after the other: a row that one move writes can be read by the next. What fails stops the ones that
wait behind it, since they may read what was not written.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["Move", "RowMover"]


class Move:
    """Some slots' records go to the store, then rows from the store come into slots (which may be the same).

    Args:
        written_rows, written_slots: int64[n], int32[n]. read_rows, read_slots: int64[m], int32[m].

    Attributes:
        written: whether the store has what was to be written. Read it after `RowMover.wait` only.
    """

    def __init__(
        self,
        written_rows: torch.Tensor,
        written_slots: torch.Tensor,
        read_rows: torch.Tensor,
        read_slots: torch.Tensor,
    ) -> None:
        self.written_rows, self.written_slots = written_rows, written_slots
        self.read_rows, self.read_slots = read_rows, read_slots
        self.written = False
        self.future: Future | None = None


class RowMover:
    """One worker thread, started with the first move, ended by `close`.

    Args:
        store: the RowStore. records: (C, W), the cache block.
    """

    def __init__(self, store: Any, records: torch.Tensor) -> None:
        self._store, self._records = store, records
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="freqcache-move")
        self._failed = False

    def start(self, move: Move) -> None:
        """Queues a move."""
        move.future = self._threads.submit(self._run, move)

    def _run(self, move: Move) -> None:
        if self._failed:
            return
        try:
            with torch.no_grad():
                if move.written_rows.numel():
                    self._store.write(move.written_rows, self._records, move.written_slots)
                move.written = True
                if move.read_rows.numel():
                    self._store.read(move.read_rows, self._records, move.read_slots)
        except BaseException:
            self._failed = True
            raise

    def wait(self, move: Move) -> BaseException | None:
        """Returns when the move has ended: with what it raised, or None (also where it was left out)."""
        return move.future.exception()

    def close(self) -> None:
        """Ends the thread, after the moves that were started."""
        self._threads.shutdown(wait=True)
