"""What every kernel set of a device cache must do: the Triton set against its plain twin, by value.

Run by `tests/test_cuda_kernels.py` (interpreted, on a CPU) and, in part, by `tests/gpu`. Each takes `device`.
Integers are compared exactly. Floats: exactly where the sums have one order; else with a float64 run of the twin,
within a few units in the last place of the sum of the terms' sizes.
Shapes: N positions, U unique rows, C slots, D width, T tables, B bags a table.
"""

import functools

import pytest
import torch

from colossal_freqcache.device_slots import DeviceSlots
from colossal_freqcache.kernels.device import KEYS, DevicePlan, DeviceTorchKernels, Tables

TABLES = (50, 3, 400)
NUM_ROWS = sum(TABLES)
RULES = {
    "sgd": (0, (0.05,)),
    "adagrad": (1, (0.05, 1e-10)),
    "rowwise_adagrad": (None, (0.05, 1e-10)),
    "adam": (2, (0.9, 0.999, 1e-8, 0.01)),
}
LONG = 700  # more positions of one row than rows.SHORT and two of its chunks

# name: (tables, bag lengths of all tables, ids)
BATCHES = {
    "ragged": (3, [0, 3, 5, 0, 1, 0, 0, 2, 0, 0, 4, 90], "random"),
    "padded": (3, [4, 3, 5, 0, 1, 2, 0, 2, 0, 7, 4, 9], "padded"),
    "empty bags": (3, [0] * 12, "random"),
    "no bags": (3, [], "random"),
    "one id": (1, [1], "random"),
    "one id of one table": (3, [0, 1, 0], "random"),
    "all equal": (1, [7] * (LONG // 7), "equal"),
    "long and short rows": (1, [7] * 220, "skewed"),
    "only padding": (1, [2, 3], "padding"),
    "one hot": (3, [1] * 150, "random"),
}
every_batch = pytest.mark.parametrize("name", BATCHES)


@functools.cache
def triton_set():
    from colossal_freqcache.kernels.cuda import CudaKernels

    return CudaKernels()


TWIN = DeviceTorchKernels()


def admit(kernels, slots, targets, num_fresh, ids, rows, use=1, written=None):
    """`exchange` for the rows of `ids` (M,), which no plan's other rows stand between; the rows to write back."""
    device, nothing = slots.device, torch.empty(0, dtype=torch.int32, device=slots.device)
    positions = torch.arange(ids.numel(), device=device)
    absent = torch.full((ids.numel(),), -1, dtype=torch.int32, device=device)
    plan = DevicePlan(positions, nothing, nothing, nothing, ids.to(slots.number), absent, nothing, nothing)
    written = torch.zeros(1, dtype=torch.int64, device=device) if written is None else written
    rows = ids.long() if rows is None else rows
    old_rows = kernels.exchange(slots, targets, num_fresh, positions, plan, rows, use, written)
    assert torch.equal(plan.slot_of_unique, targets)
    return old_rows


def row_order(device):
    """The row of each id: not the ids' own order."""
    return torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(5)).to(device)


def filled_slots(kernels, device, num_slots=300, used=200, rows_are_ids=False, counts_uses=True, seed=0):
    """Maps with `used` random ids, each used by a batch up to 9."""
    generator = torch.Generator().manual_seed(seed)
    slots = DeviceSlots(num_slots, NUM_ROWS, rows_are_ids, counts_uses, device)
    ids = torch.randperm(NUM_ROWS, generator=generator)[:used].to(device)
    targets = torch.arange(used, dtype=torch.int32, device=device)
    admit(kernels, slots, targets, used, ids, None if rows_are_ids else row_order(device)[ids])
    slots.num_used = used
    slots.last_use[:used] = torch.randint(1, 10, (used,), generator=generator, dtype=torch.int32).to(device)
    slots.dirty[:used] = torch.randint(0, 2, (used,), generator=generator, dtype=torch.uint8).to(device)
    if counts_uses:
        slots.uses[:used] = torch.randint(0, 6, (used,), generator=generator, dtype=torch.int32).to(device)
    return slots


def tables_of(num_tables, device):
    rows = torch.tensor(TABLES[-num_tables:])
    padding = torch.tensor([-1, 1, 7][-num_tables:])
    return Tables(rows.to(device), (rows.cumsum(0) - rows).to(device), padding.to(device))


def batch_of(name, device, seed=3):
    """(values, offsets, tables) of a batch by name."""
    num_tables, lengths, kind = BATCHES[name]
    generator = torch.Generator().manual_seed(seed)
    tables = tables_of(num_tables, torch.device("cpu"))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    bags_per_table = max(len(lengths) // num_tables, 1)
    table = torch.repeat_interleave(torch.arange(len(lengths)) // bags_per_table, torch.tensor(lengths).long())
    size = table.numel()
    values = (torch.rand(size, generator=generator) * tables.rows[table]).long()
    if kind == "skewed":
        values = (torch.rand(size, generator=generator) ** 4 * 60).long()
    if kind == "equal":
        values[:] = 11
    pads = {"padding": 1.0, "padded": 0.4}.get(kind, 0.0)
    values = torch.where(torch.rand(size, generator=generator) < pads, tables.padding[table].clamp(min=0), values)
    return values.to(device), offsets.to(device), tables_of(num_tables, device)


def assert_same_maps(a: DeviceSlots, b: DeviceSlots):
    """All but the hash table, whose cells may be in any order."""
    for part in ("id_of_slot", "row_of_slot", "last_use", "uses", "dirty"):
        assert torch.equal(getattr(a, part), getattr(b, part)), part


def assert_same_plan(a, b):
    """Every field, as far as it counts."""
    assert torch.equal(a.found, b.found) and torch.equal(a.counts, b.counts)
    num_unique = int(b.found[1])
    for part in ("order", "unique_of_position", "bag_of_position"):
        assert torch.equal(getattr(a, part), getattr(b, part)), part
    if num_unique:
        assert torch.equal(a.starts[: num_unique + 1], b.starts[: num_unique + 1])
    for part in ("id_of_unique", "slot_of_unique"):
        assert torch.equal(getattr(a, part)[:num_unique].long(), getattr(b, part)[:num_unique].long()), part


# ---- maps --------------------------------------------------------------------------------------------------------


@every_batch
@pytest.mark.parametrize("counts_uses", [False, True])
def test_plan(name, counts_uses, device):
    """Every field of the plan, and the marks that it leaves in the maps."""
    values, offsets, tables = batch_of(name, device)
    plans, maps = [], []
    for kernels in (triton_set(), TWIN):
        maps.append(filled_slots(kernels, device, counts_uses=counts_uses))
        plans.append(kernels.plan(values, offsets, tables, maps[-1], 12))
    assert_same_plan(*plans)
    assert_same_maps(*maps)
    num_unique, num_missing = plans[0].found[1:3].tolist()
    if num_missing:
        missing = [kernels.missing(plan, num_unique, num_missing) for kernels, plan in zip((triton_set(), TWIN), plans)]
        assert torch.equal(*missing)


def test_plan_of_an_empty_cache(device):
    """Nothing is resident: all are missing."""
    values, offsets, tables = batch_of("ragged", device)
    plans = [
        kernels.plan(values, offsets, tables, DeviceSlots(40, NUM_ROWS, True, False, device), 1)
        for kernels in (triton_set(), TWIN)
    ]
    assert_same_plan(*plans)
    assert plans[0].found[1] == plans[0].found[2] > 0


@pytest.mark.parametrize("where", [0, 40, 104])
@pytest.mark.parametrize("bad", [-1, 400, 2**40, -(2**63)])
def test_plan_names_the_first_bad_id(where, bad, device):
    """found[0] is N - the first of two bad ids, whatever they are; the others are looked up."""
    values, offsets, tables = batch_of("ragged", device)
    assert values.numel() == 105
    values[[where, 104]] = bad
    plans = [
        kernels.plan(values, offsets, tables, filled_slots(kernels, device), 12) for kernels in (triton_set(), TWIN)
    ]
    assert_same_plan(*plans)
    assert plans[0].found[0] == values.numel() - where


def test_plan_names_an_id_of_a_smaller_table(device):
    """Id 3 is good for the first table and past the end of the second, which has three rows."""
    offsets = torch.tensor([0, 1, 2, 3], device=device)
    plan = triton_set().plan(
        torch.full((3,), 3, device=device), offsets, tables_of(3, device), filled_slots(triton_set(), device), 12
    )
    assert plan.found[0] == 3 - 1


@pytest.mark.parametrize(
    "offsets", [[1, 2, 5], [-1, 2, 5], [0, 3, 2, 5], [0, 2, 4], [0, 2, 6], [0, 9, 5], [0, 5, 0, 5], [0], [5]]
)
def test_plan_tells_bad_offsets(offsets, device):
    """found[3] says so where they do not rise from 0 to N, with no bag at all, too; nothing is read out of bounds."""
    values = torch.arange(5, device=device)
    for kernels in (triton_set(), TWIN):
        slots = filled_slots(kernels, device)
        plan = kernels.plan(values, torch.tensor(offsets, device=device), tables_of(1, device), slots, 12)
        assert plan.found[3] != 0, kernels.name


def test_find(device):
    """Every id of the table, resident or not, and none at all."""
    slots = [filled_slots(kernels, device, used=300, seed=1) for kernels in (triton_set(), TWIN)]
    ids = torch.arange(NUM_ROWS, device=device)
    found = [kernels.find(ids, part) for kernels, part in zip((triton_set(), TWIN), slots)]
    assert torch.equal(*found)
    assert (found[0] >= 0).sum() == 300
    assert triton_set().find(ids[:0], slots[0]).shape == (0,)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "count, hand, window, protected_from, limit",
    [(1, 0, 200, 9, 8), (5, 190, 150, 6, 40), (30, 37, 200, 5, 60), (16, 199, 200, 4, 16), (90, 3, 200, 10, 200)],
)
def test_choose_victims(key, count, hand, window, protected_from, limit, device):
    """Exactly `count` distinct slots that no batch from `protected_from` on uses; those of the twin, and its fading."""
    slots = [filled_slots(kernels, device) for kernels in (triton_set(), TWIN)]
    before = slots[0].last_use.clone()
    arguments = (key, count, hand, window, protected_from, limit)
    victims = [kernels.choose_victims(part, *arguments) for kernels, part in zip((triton_set(), TWIN), slots)]
    assert victims[0].dtype == torch.int32 and victims[0].shape == (count,)
    assert victims[0].unique().numel() == count
    assert (before[victims[0].long()] < protected_from).all() and (victims[0] < 200).all()
    assert torch.equal(*victims)
    assert_same_maps(*slots)


def test_victims_of_a_large_window(device):
    """More slots than one program looks at, and a window that wraps."""
    parts = []
    for kernels in (triton_set(), TWIN):
        slots = DeviceSlots(2000, 2**20, True, False, device)
        slots.num_used = 1990
        slots.id_of_slot[:1990] = torch.arange(1990, dtype=torch.int32, device=device).flip(0) * 7
        slots.last_use[:1990] = (torch.arange(1990, dtype=torch.int32) * 37 % 11).to(device)
        parts.append(kernels.choose_victims(slots, "dataset", 33, 1500, 1200, 5, 264))
    assert torch.equal(*parts)


@pytest.mark.parametrize("rows_are_ids", [False, True])
@pytest.mark.parametrize("counts_uses", [False, True])
def test_exchange(rows_are_ids, counts_uses, device):
    """Fresh slots, clean ones and dirty ones: what is to be written back, the batch's slots, and the maps."""
    results = []
    for kernels in (triton_set(), TWIN):
        slots = filled_slots(kernels, device, rows_are_ids=rows_are_ids, counts_uses=counts_uses)
        absent = (kernels.find(torch.arange(NUM_ROWS, device=device), slots) < 0).nonzero()[:, 0]
        targets = torch.cat([torch.arange(200, 260), torch.arange(0, 180, 2)]).to(device, torch.int32)
        rows = None if rows_are_ids else row_order(device)[absent[:150]]
        written = torch.full((1,), 5, dtype=torch.int64, device=device)
        old_rows = admit(kernels, slots, targets, 60, absent[:150], rows, 13, written)
        slots.num_used = 260
        slots.check(None if rows_are_ids else row_order(device), kernels.has_entries)
        results.append((slots, old_rows, written))
    assert_same_maps(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])
    assert 5 < results[0][2] < 5 + 90
    assert (results[0][1] >= 0).sum() == results[0][2] - 5


@pytest.mark.parametrize("num_slots, most, rounds", [(7, 7, 10), (63, 40, 10), (300, 200, 3)])
def test_many_exchanges_at_full_load(num_slots, most, rounds, device):
    """Rows come and go until buckets have overflowed and emptied again: a dictionary holds the same."""
    kernels, generator = triton_set(), torch.Generator().manual_seed(0)
    slots = DeviceSlots(num_slots, 5000, True, False, device)
    slots.num_buckets = -(-num_slots // 5)  # five of seven cells taken, where in a cache half of them are
    slots.entries = torch.full((8 * slots.num_buckets + 1,), -1, dtype=torch.int32, device=device)
    slots.entries[7::8] = slots.entries[-1] = 0
    slot_of_id = {}
    went_on = 0
    for use in range(rounds):
        num_fresh = num_slots if use == 0 else 0
        count = num_fresh or int(torch.randint(1, most + 1, (), generator=generator))
        targets = torch.randperm(num_slots, generator=generator)[:count] if use else torch.arange(num_slots)
        ids = [one for one in torch.randperm(5000, generator=generator).tolist() if one not in slot_of_id][:count]
        id_of_slot = {slot: one for one, slot in slot_of_id.items()}
        for one, slot in zip(ids, targets.tolist(), strict=True):
            slot_of_id.pop(id_of_slot.get(slot), None)
            slot_of_id[one] = slot
        admit(kernels, slots, targets.int().to(device), num_fresh, torch.tensor(ids, device=device), None, use)
        slots.num_used = num_slots
        slots.check()
        went_on = max(went_on, int(slots.entries[7::8].max()))
        asked = torch.arange(5000) if use == rounds - 1 else torch.tensor(ids[:100])
        found = kernels.find(asked.to(device), slots).tolist()
        assert found == [slot_of_id.get(one, -1) for one in asked.tolist()]
    assert went_on > 0 or num_slots < 8


# ---- records -----------------------------------------------------------------------------------------------------


def rows_of(shape, device, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("width", [1, 7, 33, 128, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves(width, dtype, device):
    """copy_rows, and swap_rows with clean, dirty and fresh slots; nothing else changes, not one bit."""
    generator = torch.Generator().manual_seed(1)
    new_rows = torch.randperm(60, generator=generator)[:23].to(device)
    old_rows = torch.where(torch.arange(23) % 3 == 0, torch.arange(60, 83), -1).to(device)
    targets = torch.randperm(40, generator=generator)[:23].to(device, torch.int32)
    results = []
    for kernels in (triton_set(), TWIN):
        store, records = rows_of((90, width), device, dtype), rows_of((40, width), device, dtype, 1)
        kernels.swap_rows(store, old_rows, new_rows, records, targets)
        kernels.swap_rows(store, old_rows[:0], new_rows[:0], records, targets[:0])
        other = rows_of((50, width), device, dtype, 2)
        kernels.copy_rows(records, targets, other, torch.arange(23, device=device))
        results.append((store, records, other))
    for a, b in zip(*results):
        assert torch.equal(a, b)


class Looked:
    """A batch whose rows are all resident, in slots that no order explains; records of width * columns + rest."""

    def __init__(self, name, dim, device, dtype=torch.float32, width=None):
        kernels, generator = triton_set(), torch.Generator().manual_seed(2)
        self.values, self.offsets, tables = batch_of(name, device)
        self.num_tables = tables.rows.numel()
        slots = DeviceSlots(NUM_ROWS, NUM_ROWS, True, False, device)
        ids = torch.randperm(NUM_ROWS, generator=generator).to(device)
        everywhere = torch.arange(NUM_ROWS, dtype=torch.int32, device=device)
        admit(kernels, slots, everywhere, NUM_ROWS, ids, None)
        slots.num_used = NUM_ROWS
        self.plan = kernels.plan(self.values, self.offsets, tables, slots, 2)
        self.num_unique = int(self.plan.found[1])
        self.slots = self.plan.slot_of_unique[: self.num_unique]
        assert (self.slots >= 0).all()
        self.dim = dim
        self.records = rows_of((NUM_ROWS, width or dim), device, dtype).abs_() + 0.1
        self.records[:, :dim] = rows_of((NUM_ROWS, dim), device, dtype, 5)
        self.weights = rows_of((self.values.numel(),), device, dtype, 3)
        bags = (self.offsets.numel() - 1) // self.num_tables
        self.grad = rows_of((bags, self.num_tables, dim), device, dtype, 4)
        places = torch.randperm(self.num_unique, generator=generator)
        self.places = places.to(device, torch.int32)
        self.counts = self.plan.starts[1 : self.num_unique + 1] - self.plan.starts[: self.num_unique]

    def bags(self, kernels, mode, weighted=False, records=None):
        records = self.records if records is None else records
        weights = self.weights.to(records.dtype) if weighted else None
        return kernels.bags(records, self.dim, self.slots, self.plan, self.offsets, weights, mode, self.num_tables)

    def gradients(self, kernels, kept, mode, weighted=False, by_frequency=False, grad=None):
        grad = self.grad if grad is None else grad
        weights = self.weights.to(grad.dtype) if weighted else None
        arguments = (grad, self.plan, self.offsets, kept, weights, mode, by_frequency, self.slots)
        return kernels.row_gradients(*arguments, self.places, self.num_unique)


def assert_close(found, exact, sizes, ulps=6):
    """|found - exact| at most `ulps` units in the last place of `sizes`, the sum of the terms' absolute values."""
    unit = torch.finfo(found.dtype).eps
    bound = ulps * unit * sizes.double() + torch.finfo(found.dtype).tiny
    assert found.shape == exact.shape
    over = ((found.double() - exact.double()).abs() - bound).clamp(min=0)
    assert not over.any().item(), f"{int((over > 0).sum())} of {over.numel()} differ, by up to {over.max()}"


KINDS = {"sum": ("sum", False), "weighted": ("sum", True), "mean": ("mean", False), "max": ("max", False)}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_batch
@every_kind
def test_bags(name, kind, device):
    """A bag's sum is one in the order of its positions: exactly the twin's. Of a maximum, the same position."""
    mode, weighted = KINDS[kind]
    looked = Looked(name, 7, device)
    out, kept = looked.bags(triton_set(), mode, weighted)
    expected, chosen = looked.bags(TWIN, mode, weighted)
    if mode == "max":
        assert torch.equal(out, expected) and torch.equal(kept, chosen)
    else:
        sizes = TWIN.bags(
            looked.records.abs().double(), 7, looked.slots, looked.plan, looked.offsets,
            looked.weights.abs().double() if weighted else None, mode, looked.num_tables,
        )[0]  # fmt: skip
        assert_close(out, looked.bags(TWIN, mode, weighted, looked.records.double())[0], sizes, 90)
        if device.type == "cpu":
            assert torch.equal(out, expected)


SCALED = ("padded", "all equal", "long and short rows", "no bags")


@every_kind
@pytest.mark.parametrize("name, by_frequency", [(name, False) for name in BATCHES] + [(name, True) for name in SCALED])
def test_row_gradients(name, kind, by_frequency, device):
    """A row of few positions: the sum in the order of the batch, exactly the twin's. One of many: within rounding."""
    from colossal_freqcache.kernels.cuda import rows

    mode, weighted = KINDS[kind]
    looked = Looked(name, 7, device)
    _, kept = looked.bags(triton_set(), mode, weighted)
    _, chosen = looked.bags(TWIN, mode, weighted)
    found = looked.gradients(triton_set(), kept, mode, weighted, by_frequency)
    twin = looked.gradients(TWIN, chosen, mode, weighted, by_frequency)
    exact = looked.gradients(TWIN, chosen, mode, weighted, by_frequency, looked.grad.double())
    looked.weights = looked.weights.abs()
    sizes = looked.gradients(TWIN, chosen, mode, weighted, by_frequency, looked.grad.double().abs())
    assert_close(found, exact, sizes, 64)
    if not by_frequency and device.type == "cpu":
        short = looked.places[looked.counts <= rows.SHORT].long()
        assert torch.equal(found[short], twin[short])
    if name in ("all equal", "long and short rows"):
        assert looked.counts.max() > (rows.CHUNK if name == "all equal" else rows.SHORT)


@pytest.mark.parametrize("dim", [1, 32, 128, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widths_and_types(dim, dtype, device):
    """Pooling, its adjoint and the gradient of the weights, at widths that are and are not powers of two."""
    looked = Looked("ragged", dim, device, dtype, dim + 3)
    out, kept = looked.bags(triton_set(), "mean")
    expected, _ = looked.bags(TWIN, "mean")
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = looked.gradients(triton_set(), kept, "mean")
    torch.testing.assert_close(gradients, looked.gradients(TWIN, None, "mean"), rtol=1e-6, atol=1e-6)
    arguments = (looked.grad, looked.records, dim, looked.slots, looked.plan, looked.offsets)
    found, twin = (kernels.weight_gradients(*arguments) for kernels in (triton_set(), TWIN))
    torch.testing.assert_close(found, twin, rtol=1e-6, atol=1e-6)


@every_batch
def test_weight_gradients(name, device):
    """dot(gradient of the bag, row), 0 for padding: summed in float64, so within a unit of the last place."""
    looked = Looked(name, 32, device)
    arguments = (looked.records, 32, looked.slots, looked.plan, looked.offsets)
    found = triton_set().weight_gradients(looked.grad, *arguments)
    exact = TWIN.weight_gradients(looked.grad.double(), looked.records.double(), *arguments[1:])
    assert_close(found, exact, exact.abs(), 1)


def width_of(rule, dim):
    state = RULES[rule][0]
    return dim + 1 if state is None else dim * (1 + state)


def update(kernels, rule, records, dim, slots, grads):
    hyper = RULES[rule][1]
    if rule == "rowwise_adagrad":
        means = None if kernels is not TWIN else TWIN.square_sums(grads) / dim
        hyper = (means, *hyper)
    getattr(kernels, f"update_{rule}")(records, dim, slots, grads, *hyper)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [1, 7, 32, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates(rule, dim, dtype, device):
    """Each operation rounded as it is written: the twin's values; other slots keep theirs."""
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:37].to(device, torch.int32)
    grads = rows_of((37, dim), device, dtype, 1)
    results = []
    for kernels in (triton_set(), TWIN):
        records = rows_of((60, width_of(rule, dim)), device, dtype).abs_()
        update(kernels, rule, records, dim, slots, grads)
        update(kernels, rule, records, dim, slots[:0], grads[:0])
        results.append(records)
    assert not torch.equal(results[0], rows_of((60, width_of(rule, dim)), device, dtype).abs_())
    if dtype is torch.float64 or rule == "sgd":
        assert torch.equal(*results)
    else:  # torch's float32 square root is not the correctly rounded one on every CPU
        torch.testing.assert_close(*results, rtol=3e-7, atol=1e-7)


ADJOINTS = [("sum", False), ("weighted", False), ("mean", True), ("max", False)]
TRAINED = [
    (name, rule, *ADJOINTS[(first + number) % 4])
    for first, name in enumerate(["ragged", "all equal", "long and short rows"])
    for number, rule in enumerate(RULES)
]


@pytest.mark.parametrize("name, rule, kind, by_frequency", TRAINED)
def test_trained_in_the_backward_or_after_it(name, rule, kind, by_frequency, device):
    """train_rows leaves the bits of row_gradients and then the update, and marks the rows that it has trained."""
    mode, weighted = KINDS[kind]
    looked = Looked(name, 7, device, width=width_of(rule, 7))
    _, kept = looked.bags(triton_set(), mode, weighted)
    separate, together = looked.records.clone(), looked.records.clone()
    gradients = looked.gradients(triton_set(), kept, mode, weighted, by_frequency)
    slots = torch.empty_like(looked.slots)
    slots[looked.places.long()] = looked.slots
    update(triton_set(), rule, separate, 7, slots, gradients)
    dirty = torch.zeros(NUM_ROWS, dtype=torch.uint8, device=device)
    weights = looked.weights if weighted else None
    arguments = (looked.grad, looked.plan, looked.offsets, kept, weights, mode, by_frequency, looked.slots)
    assert triton_set().train_rows(*arguments, looked.num_unique, together, dirty, 7, (rule, RULES[rule][1]))
    assert torch.equal(separate, together)
    assert torch.equal(dirty.nonzero()[:, 0], looked.slots.long().sort().values)
    assert not torch.equal(together, looked.records)


def test_sums_do_not_depend_on_where_rows_stand(device):
    """Other rows before and behind a long row's and a short one's positions: the same bits of both."""
    grad = rows_of((720, 1, 7), device)
    found = []
    for shift in (0, 300):
        values = torch.cat([torch.full((400,), 20), torch.arange(20) // 10 + 30]).to(device)
        others = (torch.arange(shift) % 9).to(device)
        values = torch.cat([others, values])
        offsets = torch.arange(values.numel() + 1, device=device)
        slots = filled_slots(triton_set(), device)
        plan = triton_set().plan(values, offsets, tables_of(1, device), slots, 12)
        num_unique = int(plan.found[1])
        places = torch.arange(num_unique, dtype=torch.int32, device=device)
        own = torch.cat([grad[420 : 420 + shift], grad[:420]])
        kept = plan.starts
        arguments = (own, plan, offsets, kept, None, "sum", False, places, places, num_unique)
        found.append(triton_set().row_gradients(*arguments)[-3:])
    assert torch.equal(*found)


def test_offsets_beyond_two_to_the_31_elements(device):
    """Rows 2**30 elements apart (untouched address space between): moved, pooled, trained where they are."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 30 << 30:
        pytest.skip("30 GiB of free GPU memory are needed")
    stride, dim = 2**30, 7
    block = torch.empty(4 * stride + 64, device=device).as_strided((5, 2 * dim), (stride, 1))
    assert 4 * stride > 2**31
    block.copy_(rows_of((5, 2 * dim), device).abs())
    small = block.clone()
    values, offsets = torch.arange(5, device=device), torch.tensor([0, 2, 5], device=device)
    slots = DeviceSlots(5, 400, True, False, device)
    everywhere = torch.arange(5, dtype=torch.int32, device=device)
    kernels = triton_set()
    admit(kernels, slots, everywhere, 5, values.flip(0), None)
    slots.num_used = 5
    plan = kernels.plan(values, offsets, tables_of(1, device), slots, 2)
    grad = rows_of((2, 1, dim), device, seed=1)
    results = []
    for records in (block, small):
        out, kept = kernels.bags(records, dim, plan.slot_of_unique, plan, offsets, None, "sum", 1)
        best, _ = kernels.bags(records, dim, plan.slot_of_unique, plan, offsets, None, "max", 1)
        dots = kernels.weight_gradients(grad, records, dim, plan.slot_of_unique, plan, offsets)
        rule = ("adagrad", RULES["adagrad"][1])
        arguments = (grad, plan, offsets, kept, None, "sum", False, plan.slot_of_unique, 5, records, slots.dirty)
        assert kernels.train_rows(*arguments, dim, rule)
        store = rows_of((9, 2 * dim), device, seed=2)
        old_rows = torch.tensor([-1, 7], device=device)
        kernels.swap_rows(store, old_rows, torch.tensor([3, 4], device=device), records, everywhere[3:])
        kernels.copy_rows(records, everywhere[4:], records, everywhere[:1])
        results.append((out, best, dots, store, records.clone()))
    for a, b in zip(*results):
        assert torch.equal(a, b)
    # and as a store: its rows as far apart
    records = rows_of((3, 2 * dim), device, seed=3)
    before = records.clone()
    three, old_rows = everywhere[:3], torch.tensor([4, -1, -1], device=device)
    kernels.swap_rows(block, old_rows, torch.tensor([3, 2, 1], device=device), records, three)
    assert torch.equal(block[4], before[0])
    assert torch.equal(records, small[[3, 2, 1]])
