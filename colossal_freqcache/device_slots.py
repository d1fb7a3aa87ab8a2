"""DeviceSlots: which row sits in which slot, for a cache whose maps live on the training device. Arrays only.

Nothing here grows with the table: an id finds its slot through a hash table of slots (in the torch set, by a search).
Shapes: C slots, K buckets of 8 cells. Bytes a slot: 4 or 8 for the id, as many for the row unless rows are ids, 4 for
the last use, 1 for dirty, 4 for a count of uses where the policy wants one, and 9.2 of the hash table: 22 with 32-bit
numbers and ordered rows, 30 with 64-bit ones (34 where uses are counted as well).
"""

import torch

__all__ = ["BUCKET_CELLS", "FREE", "DeviceSlots"]

FREE = -1
BUCKET_CELLS = 8  # seven entries and a count
SLOTS_PER_BUCKET = 3.5  # half of the entries stay empty


class DeviceSlots:
    """The maps of a device cache, changed by its kernel set alone.

    Attributes (tensors on the device):
        id_of_slot, row_of_slot: int32[C] (int64 from 2**31 - 1 rows on), FREE where empty; one tensor where row == id.
        last_use: int32[C], number of the last batch that used the slot's row; slots from `num_used` on: 0.
        uses: int32[C], a count that fades; empty unless `counts_uses`.
        dirty: uint8[C], 1 where the record may differ from the store's.
        entries: int32[8 * K + 1], the hash table and a spare cell that stays 0 (kernels.cuda.index).
        num_slots, num_used: C, slots that hold a row: always the first ones.
        version: goes up with every change of the maps.
    """

    # I1  s < num_used  <=>  id_of_slot[s] != FREE, and no id is in two slots
    # I2  the hash table holds id_of_slot[s] -> s for exactly these slots
    # I3  the newest value of a row is in its slot if it has one, else in the store

    def __init__(
        self, num_slots: int, num_rows: int, rows_are_ids: bool, counts_uses: bool, device: torch.device
    ) -> None:
        self.device = device
        self.num_slots, self.num_used, self.version = num_slots, 0, 0
        self.num_rows = num_rows
        self.number = torch.int32 if num_rows < 2**31 - 1 else torch.int64
        self.id_of_slot = torch.full((num_slots,), FREE, dtype=self.number, device=device)
        self.row_of_slot = self.id_of_slot if rows_are_ids else self.id_of_slot.clone()
        self.rows_are_ids = rows_are_ids
        self.last_use = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.counts_uses = counts_uses
        self.uses = torch.zeros(num_slots if counts_uses else 0, dtype=torch.int32, device=device)
        self.dirty = torch.zeros(num_slots, dtype=torch.uint8, device=device)
        self.num_buckets = max(1, int(num_slots / SLOTS_PER_BUCKET) + 1)
        self.slot_bits = max(1, (num_slots - 1).bit_length())
        cells = torch.full((self.num_buckets, BUCKET_CELLS), FREE, dtype=torch.int32, device=device)
        cells[:, BUCKET_CELLS - 1] = 0
        self.entries = torch.cat([cells.reshape(-1), cells.new_zeros(1)])

    def num_bytes(self) -> int:
        """Bytes of all of it."""
        parts = [self.id_of_slot, self.last_use, self.uses, self.dirty, self.entries]
        if not self.rows_are_ids:
            parts.append(self.row_of_slot)
        return sum(part.numel() * part.element_size() for part in parts)

    def check(self, row_of_id: torch.Tensor | None = None, has_entries: bool = True) -> None:
        """Asserts I1 and I2. For tests: O(C) and a sync."""
        ids, rows = self.id_of_slot.cpu().long(), self.row_of_slot.cpu().long()
        assert (ids[: self.num_used] >= 0).all() and (ids[self.num_used :] == FREE).all(), "I1"
        assert ids[: self.num_used].unique().numel() == self.num_used, "I1: a row in two slots"
        expected = ids if row_of_id is None else torch.where(ids < 0, FREE, row_of_id.cpu().long()[ids.clamp(min=0)])
        assert torch.equal(rows, expected), "I1: rows"
        assert not self.dirty.cpu()[self.num_used :].any()
        if has_entries:
            cells = self.entries.cpu()[:-1].view(-1, BUCKET_CELLS)
            held = cells[:, :-1]
            slots = (held[held >= 0] & ((1 << self.slot_bits) - 1)).sort().values
            assert torch.equal(slots.long(), torch.arange(self.num_used)), "I2"
            assert (cells[:, -1] >= 0).all() and self.entries.cpu()[-1] == 0, "I2: counts"
