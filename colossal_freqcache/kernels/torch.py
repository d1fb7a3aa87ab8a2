"""The plain torch twin of the kernel set: one obvious torch expression per kernel, no numba. Tests compare by value.

Row updates use single elementwise operations only: those round the same way in torch's vector and scalar loops, while a
fused one (addcmul, addcdiv) may not, and the bits would then depend on where in the batch a row stands.
Shapes as in `kernels`.
"""

import torch

from ..rounding import random_bits, round_stochastically
from . import BatchPlan, WantedIds

__all__ = ["TorchKernels"]


class TorchKernels:
    """The torch set."""

    name = "torch"

    def workspace_bytes(self) -> int:
        """Bytes that outlive a call and depend on the largest batch: none."""
        return 0

    def copy_offsets(self, offsets, num_values, has_end):
        end = offsets.new_full((0 if has_end else 1,), num_values)
        copy = torch.cat([offsets, end])
        return copy, bool((copy.diff() >= 0).all())

    def plan(self, values, offsets, table_rows, table_starts, padding_ids, slots):
        num_tables = table_rows.numel()
        found = _distinct(values, offsets, table_rows, table_starts, padding_ids)
        if isinstance(found, int):
            return found
        kept, table, sorted_ids, number, first, order = found
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        unique_of_position = torch.full((values.numel(),), -1, dtype=torch.int32)
        unique_of_position[kept] = place[number].int()
        id_of_unique = sorted_ids[order]
        slot_of_unique = slots.slot_of_id[id_of_unique] - 1
        slot = slot_of_unique[place[number]]
        missed = slot < 0
        prepaid = ~missed & ((slots.marks[slot.clamp(min=0).long()] & int(slots.PREPAID)) != 0)
        counts = [
            torch.bincount(table, minlength=num_tables),
            torch.bincount(table[missed], minlength=num_tables),
            torch.bincount(table[first[order][slot_of_unique < 0]], minlength=num_tables),
            torch.bincount(table[prepaid], minlength=num_tables),
        ]
        return BatchPlan(unique_of_position, slot_of_unique, id_of_unique, torch.stack(counts, 1))

    def distinct_ids(self, values, offsets, table_rows, table_starts, padding_ids):
        found = _distinct(values, offsets, table_rows, table_starts, padding_ids)
        if isinstance(found, int):
            return found
        _, table, sorted_ids, _, first, order = found
        per_table = torch.bincount(table[first], minlength=table_rows.numel())
        ends = torch.cat([per_table.new_zeros(1), per_table.cumsum(0)])
        return WantedIds(sorted_ids[order], ends)

    def add_pins(self, in_use, slots, delta):
        slots = slots.long()
        before = in_use[slots] > 0
        in_use[slots] += delta
        return int((in_use[slots] > 0).sum() - before.sum())

    def order_slots(self, slot_of_unique):
        slots, order = torch.sort(slot_of_unique.long())
        place_of_unique = torch.empty(order.numel(), dtype=torch.int32, device=order.device)
        place_of_unique[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
        return slots, place_of_unique

    def copy_rows(self, source, source_rows, target, target_rows):
        target[target_rows.long()] = source[source_rows.long()]

    def pool(self, records, dim, slot_of_unique, unique_of_position, offsets, weights, mean, num_tables):
        bag, kept = _bag_of_position(offsets, unique_of_position)
        rows = records[slot_of_unique.long()[unique_of_position[kept].long()], :dim]
        if weights is not None:
            rows = rows * weights.detach()[kept].unsqueeze(1)
        out = _sums(rows, bag, offsets.numel() - 1)
        if mean:
            out /= torch.bincount(bag, minlength=out.shape[0]).clamp(min=1).to(out.dtype).unsqueeze(1)
        return _batch_major(out, num_tables)

    def pool_max(self, records, dim, slot_of_unique, unique_of_position, offsets, num_tables):
        num_bags = offsets.numel() - 1
        bag, kept = _bag_of_position(offsets, unique_of_position)
        rows = records[slot_of_unique.long()[unique_of_position[kept].long()], :dim]
        lane = bag.unsqueeze(1).expand_as(rows)
        # As in a loop that asks "is it greater?": a nan that comes first stays, any other never wins.
        first = bag.diff(prepend=bag.new_tensor([-1])) != 0
        stuck = rows.isnan() & first.unsqueeze(1)
        rows_as_they_are, rows = rows, torch.where(rows.isnan(), -torch.inf, rows)
        out = rows.new_full((num_bags, dim), -torch.inf).scatter_reduce(0, lane, rows, "amax")
        position = kept.nonzero().expand_as(rows)
        none = unique_of_position.numel()
        candidates = torch.where((rows == out[bag]) | stuck, position, none)
        chosen = torch.full((num_bags, dim), none, device=bag.device).scatter_reduce(0, lane, candidates, "amin")
        out[bag[first]] = torch.where(stuck[first], rows_as_they_are[first], out[bag[first]])
        out[torch.bincount(bag, minlength=num_bags) == 0] = 0
        return _batch_major(out, num_tables), torch.where(chosen == none, -1, chosen)

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        bag, kept = _bag_of_position(offsets, unique_of_position)
        unique = unique_of_position[kept].long()
        rows = _table_major(grad)[bag]
        if mean:
            rows = rows / torch.bincount(bag, minlength=offsets.numel() - 1)[bag].to(rows.dtype).unsqueeze(1)
        if weights is not None:
            rows = rows * weights.detach()[kept].unsqueeze(1)
        if scale_by_freq:
            rows = rows / torch.bincount(unique)[unique].to(rows.dtype).unsqueeze(1)
        return _sums(rows, place_of_unique.long()[unique], num_places)

    def pool_max_backward(self, grad, unique_of_position, offsets, chosen, place_of_unique, num_places):
        dim = grad.shape[2]
        bags, lanes = (chosen >= 0).nonzero(as_tuple=True)
        places = place_of_unique.long()[unique_of_position[chosen[bags, lanes]].long()]
        values = _sums(_table_major(grad)[bags, lanes], places * dim + lanes, num_places * dim)
        return values.view(num_places, dim)

    def weight_gradient(self, grad, records, dim, slot_of_unique, unique_of_position, offsets):
        bag, kept = _bag_of_position(offsets, unique_of_position)
        rows = records[slot_of_unique.long()[unique_of_position[kept].long()], :dim]
        out = grad.new_zeros(unique_of_position.numel())
        out[kept] = (_table_major(grad)[bag].double() * rows.double()).sum(1).to(grad.dtype)
        return out

    def renormalize(self, records, dim, slots, max_norm, norm_type):
        slots = slots.long()
        rows = records[slots, :dim]
        norms = torch.linalg.vector_norm(rows.double(), norm_type, dim=1)
        changed = norms > max_norm
        scale = (max_norm / (norms[changed] + 1e-7)).to(rows.dtype)
        records[slots[changed], :dim] = rows[changed] * scale.unsqueeze(1)
        return changed

    def update_sgd(self, records, dim, slots, grads, lr):
        slots = slots.long()
        records[slots, :dim] = records[slots, :dim] - grads * lr

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        slots = slots.long()
        sums = records[slots, dim : 2 * dim] + grads * grads
        records[slots, dim : 2 * dim] = sums
        records[slots, :dim] = records[slots, :dim] - grads / (sums.sqrt() + eps) * lr

    def square_sums(self, grads):
        squares = torch.zeros(grads.shape[0], dtype=torch.float64, device=grads.device)
        for d in range(grads.shape[1]):  # one order for every row, wherever it stands in the batch
            squares += grads[:, d].double() * grads[:, d].double()
        return squares

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        slots = slots.long()
        sums = (records[slots, dim].double() + mean_squares).to(records.dtype)
        records[slots, dim] = sums
        records[slots, :dim] = records[slots, :dim] - grads * (lr / (sums.sqrt() + eps)).unsqueeze(1)

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        slots = slots.long()
        m = records[slots, dim : 2 * dim]
        v = records[slots, 2 * dim : 3 * dim]
        m = m + (grads - m) * (1 - beta1)
        v = v + (grads * grads - v) * (1 - beta2)
        records[slots, dim : 2 * dim] = m
        records[slots, 2 * dim : 3 * dim] = v
        records[slots, :dim] = records[slots, :dim] - m / (v.sqrt() + eps) * step_size

    def widen(self, values):
        return values.float()

    def narrow(self, values, dtype):
        return values.to(dtype)

    def widen_rows(self, records, width, slots):
        return records[slots.long(), :width].float()

    def narrow_rows(self, rows, records, slots, rounding):
        dtype = records.dtype
        rounded = rows.to(dtype) if rounding is None else round_stochastically(rows, dtype, random_bits(rounding))
        records[slots.long(), : rows.shape[1]] = rounded


def _distinct(values, offsets, table_rows, table_starts, padding_ids):
    """(positions that count, their tables, sorted ids, number in them of each position, first position of each, their
    order by that), or the first bad position."""
    num_tables = table_rows.numel()
    table = torch.repeat_interleave(torch.arange(num_tables), _positions_per_table(offsets, num_tables))
    bad = (values < 0) | (values >= table_rows[table])
    if bad.any():
        return int(bad.nonzero()[0, 0])
    kept = values != padding_ids[table]
    ids, table = (table_starts[table] + values)[kept], table[kept]
    # torch.unique numbers by value; number by first occurrence instead.
    sorted_ids, number = torch.unique(ids, return_inverse=True)
    first = torch.full((sorted_ids.numel(),), ids.numel()).scatter_reduce(0, number, torch.arange(ids.numel()), "amin")
    return kept, table, sorted_ids, number, first, torch.argsort(first)


def _positions_per_table(offsets: torch.Tensor, num_tables: int) -> torch.Tensor:
    bags_per_table = (offsets.numel() - 1) // num_tables
    return offsets[::bags_per_table].diff() if bags_per_table else torch.zeros(num_tables, dtype=torch.int64)


def _bag_of_position(offsets: torch.Tensor, unique_of_position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the bag of each position that is not padding, which positions those are)."""
    kept = unique_of_position >= 0
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())
    return bag[kept], kept


def _sums(rows: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
    """out[places[i]] += rows[i], in order of i on every device."""
    out = rows.new_zeros(num_places, *rows.shape[1:])
    if rows.is_cuda:
        return out.index_put_((places,), rows, accumulate=True)  # sorts; index_add_ adds in any order there
    return out.index_add_(0, places, rows)  # in order; index_put_ is not where torch has several threads


def _batch_major(out: torch.Tensor, num_tables: int) -> torch.Tensor:
    """(T*B, D) by bag -> (B, T, D)."""
    return out.reshape(num_tables, out.shape[0] // num_tables, out.shape[1]).transpose(0, 1).contiguous()


def _table_major(grad: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (T*B, D) by bag."""
    return grad.transpose(0, 1).reshape(-1, grad.shape[2])
