"""The kernel sets: one conformance suite for all, by value against plain loops and against each other.

    python -m pytest tests/test_kernels.py

Proves, for every function of every set: its value is that of a few plain lines in float64, for empty inputs, one id,
all ids equal, widths 1 to 257, both types and bfloat16 (rounded once), many tables with empty bags and padding; sums
have the order of the batch; results do not depend on the slots, nor on where in the batch a row stands, to the last
bit; `plan` gives exactly equal plans in all sets, on random batches; offsets beyond 2**31 elements are reached.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_freqcache.kernels import KERNEL_SETS, BatchPlan, make_kernels
from colossal_freqcache.kernels.cpu import GRAIN, PLAN_GRAIN
from colossal_freqcache.kernels.parts import in_parts, num_parts
from colossal_freqcache.slots import SlotTable

DIMS = (1, 7, 32, 257)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BATCHES = ("ragged", "empty", "no bags", "one id", "one hot", "all equal", "all padding")


def close(dtype, terms=8):
    """Tolerances for sums of that many terms of order one."""
    unit = torch.finfo(dtype).eps
    if dtype == torch.bfloat16:  # computed in float32, rounded once
        return {"rtol": unit / 2, "atol": close(torch.float32, terms)["atol"]}
    return {"rtol": 16 * terms * unit, "atol": 16 * terms * unit}


class Batch:
    """A looked-up batch over a random block: T tables of B bags, `num_unique` rows in scattered slots.

    records (C, W), slot_of_unique int32[U], unique_of_position int32[N] by first occurrence, offsets int64[T*B+1].
    """

    def __init__(self, name, dim, dtype, state=0, seed=0):
        generator = np.random.default_rng(seed)
        self.num_tables = 3 if name in ("ragged", "empty", "no bags", "one hot") else 1
        lengths = {
            "ragged": [0, 3, 5, 0, 1, 0, 0, 2, 0, 0, 4, 0],
            "empty": [0] * 12,
            "one id": [0, 1],
            "one hot": [1] * 12,
            "all equal": [6, 5],
            "all padding": [2, 3],
            "no bags": [],
        }[name]
        self.bags = len(lengths) // self.num_tables
        num_positions = sum(lengths)
        ids = generator.integers(0, 7, num_positions)
        if name == "all equal":
            ids[:] = 3
        ids[generator.random(num_positions) < 0.2] = -1
        if name == "one id":
            ids[:] = 2
        if name == "all padding":
            ids[:] = -1
        number = {}
        unique = [-1 if i < 0 else number.setdefault(int(i), len(number)) for i in ids]
        self.unique_of_position = torch.tensor(unique, dtype=torch.int32)
        self.num_unique = len(number)
        num_slots = 29
        self.slot_of_unique = torch.from_numpy(generator.permutation(num_slots)[: self.num_unique].astype(np.int32))
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        self.dim, self.dtype = dim, dtype
        self.records = torch.from_numpy(generator.standard_normal((num_slots, dim * (1 + state)))).to(dtype)
        self.weights = torch.from_numpy(generator.random(num_positions) + 0.5).to(dtype)
        grad = generator.standard_normal((self.bags, self.num_tables, dim))
        self.grad = torch.from_numpy(grad).to(dtype)
        order = generator.permutation(self.num_unique)
        self.place_of_unique = torch.from_numpy(order.astype(np.int32))

    def lookup(self):
        return self.records, self.dim, self.slot_of_unique, self.unique_of_position, self.offsets

    def row(self, position):
        """float64 row at a position, None for padding."""
        unique = int(self.unique_of_position[position])
        return None if unique < 0 else self.records[int(self.slot_of_unique[unique]), : self.dim].double()

    def positions(self, bag):
        """The bag's positions that are not padding, in order."""
        span = range(int(self.offsets[bag]), int(self.offsets[bag + 1]))
        return [position for position in span if self.unique_of_position[position] >= 0]

    def grad_of(self, bag):
        return self.grad[bag % self.bags, bag // self.bags]

    def all_bags(self):
        return range(self.bags * self.num_tables)

    def moved(self, seed=1):
        """The same batch with its rows in other slots."""
        other = object.__new__(Batch)
        other.__dict__.update(self.__dict__)
        permutation = torch.from_numpy(np.random.default_rng(seed).permutation(self.records.shape[0]))
        other.records = torch.empty_like(self.records)
        other.records[permutation] = self.records
        other.slot_of_unique = permutation[self.slot_of_unique.long()].int()
        return other


@pytest.fixture(params=KERNEL_SETS)
def kernel_set(request):
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32
    return make_kernels(request.param, dtype)


@pytest.fixture(params=DTYPES, ids=["float32", "float64", "bfloat16"])
def dtype(request):
    return request.param


every_batch = pytest.mark.parametrize("name", BATCHES)
every_dim = pytest.mark.parametrize("dim", DIMS)


# ---- pooling -----------------------------------------------------------------------------------------------------


@every_batch
@every_dim
@pytest.mark.parametrize("form", ["sum", "mean", "weighted"])
def test_pool(kernel_set, name, dim, dtype, form):
    """out[b, t] = sum of w_i * row_i, divided by the positions that are no padding for the mean; 0 for an empty bag."""
    batch = Batch(name, dim, dtype)
    weights = batch.weights if form == "weighted" else None
    out = kernel_set.pool(*batch.lookup(), weights, form == "mean", batch.num_tables)
    expected = torch.zeros(batch.bags, batch.num_tables, dim, dtype=torch.float64)
    for bag in batch.all_bags():
        positions = batch.positions(bag)
        for position in positions:
            weight = float(batch.weights[position]) if weights is not None else 1.0
            expected[bag % batch.bags, bag // batch.bags] += weight * batch.row(position)
        if form == "mean" and positions:
            expected[bag % batch.bags, bag // batch.bags] /= len(positions)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, **close(dtype))


@every_batch
@every_dim
def test_pool_max(kernel_set, name, dim, dtype):
    """The elementwise maximum, and the first position that has it; -1 and 0 where the bag is empty."""
    batch = Batch(name, dim, dtype)
    batch.records[:, : dim // 2] = batch.records[:, : dim // 2].round()  # ties
    out, chosen = kernel_set.pool_max(*batch.lookup(), batch.num_tables)
    assert out.shape == (batch.bags, batch.num_tables, dim) and chosen.shape == (batch.bags * batch.num_tables, dim)
    for bag in batch.all_bags():
        positions = batch.positions(bag)
        pooled = out[bag % batch.bags, bag // batch.bags]
        if not positions:
            assert not pooled.any() and (chosen[bag] == -1).all()
            continue
        rows = torch.stack([batch.row(position) for position in positions])
        assert torch.equal(pooled.double(), rows.max(0).values)
        first = torch.tensor(positions)[(rows == rows.max(0).values).int().argmax(0)]
        assert torch.equal(chosen[bag], first)


def test_pool_max_treats_nan_as_torch_does(kernel_set):
    """The first value stands until a greater one comes: a nan in front stays, a later one is never greater."""
    nan = float("nan")
    records = torch.tensor([[nan, 1.0], [1.0, nan], [2.0, 0.0]])
    for numbers in ([0, 1], [1, 0], [2, 0], [0, 2], [0], [2, 1, 0]):
        expected = torch.nn.functional.embedding_bag(torch.tensor([numbers]), records, mode="max")
        unique = torch.arange(len(numbers), dtype=torch.int32)
        slots, offsets = torch.tensor(numbers, dtype=torch.int32), torch.tensor([0, len(numbers)])
        out, chosen = kernel_set.pool_max(records, 2, slots, unique, offsets, 1)
        assert torch.equal(out[:, 0].nan_to_num(-1), expected.nan_to_num(-1)), numbers
        assert (chosen >= 0).all()


@every_batch
@every_dim
@pytest.mark.parametrize("form", ["sum", "mean", "weighted", "scaled", "mean scaled", "weighted scaled"])
def test_pool_backward(kernel_set, name, dim, dtype, form):
    """Per row the sum over its positions of w_i * grad, / bag's positions (mean), / row's positions (scaled)."""
    batch = Batch(name, dim, dtype)
    weights = batch.weights if "weighted" in form else None
    arguments = (batch.grad, batch.unique_of_position, batch.offsets, weights, "mean" in form, "scaled" in form)
    values = kernel_set.pool_backward(*arguments, batch.place_of_unique, batch.num_unique)
    expected = torch.zeros(batch.num_unique, dim, dtype=torch.float64)
    occurrences = torch.bincount(batch.unique_of_position[batch.unique_of_position >= 0], minlength=batch.num_unique)
    for bag in batch.all_bags():
        positions = batch.positions(bag)
        for position in positions:
            unique = int(batch.unique_of_position[position])
            factor = 1.0 if weights is None else float(batch.weights[position])
            factor /= len(positions) if "mean" in form else 1
            factor /= int(occurrences[unique]) if "scaled" in form else 1
            expected[int(batch.place_of_unique[unique])] += factor * batch.grad_of(bag).double()
    assert values.dtype == dtype and values.shape == (batch.num_unique, dim)
    torch.testing.assert_close(values.double(), expected, **close(dtype))


@every_batch
@every_dim
def test_pool_max_backward(kernel_set, name, dim, dtype):
    batch = Batch(name, dim, dtype)
    _, chosen = kernel_set.pool_max(*batch.lookup(), batch.num_tables)
    arguments = (batch.grad, batch.unique_of_position, batch.offsets, chosen)
    values = kernel_set.pool_max_backward(*arguments, batch.place_of_unique, batch.num_unique)
    expected = torch.zeros(batch.num_unique, dim, dtype=torch.float64)
    for bag in batch.all_bags():
        for lane in range(dim):
            position = int(chosen[bag, lane])
            if position >= 0:
                place = int(batch.place_of_unique[int(batch.unique_of_position[position])])
                expected[place, lane] += float(batch.grad_of(bag)[lane])
    torch.testing.assert_close(values.double(), expected, **close(dtype))


@every_batch
@every_dim
def test_weight_gradient(kernel_set, name, dim, dtype):
    """dot(grad of the bag, row), 0 for padding."""
    batch = Batch(name, dim, dtype)
    out = kernel_set.weight_gradient(batch.grad, *batch.lookup())
    expected = torch.zeros(batch.unique_of_position.numel(), dtype=torch.float64)
    for bag in batch.all_bags():
        for position in batch.positions(bag):
            expected[position] = batch.grad_of(bag).double() @ batch.row(position)
    torch.testing.assert_close(out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-13 * dim)


@pytest.mark.parametrize("dim", [1, 7, 32])
def test_sums_have_the_order_of_the_batch(kernel_set, dim):
    """Bit for bit those of a float32 loop over the positions, forward and backward; magnitudes make order matter."""
    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((5, dim)) * 10.0 ** generator.integers(-4, 4, (5, 1))).astype(np.float32)
    numbers = np.concatenate([np.arange(5), generator.integers(0, 5, 40)])
    positions, bags = numbers.size, 9
    offsets = torch.arange(bags + 1) * (positions // bags)
    unique = torch.from_numpy(numbers.astype(np.int32))
    slots = torch.arange(5, dtype=torch.int32)
    out = kernel_set.pool(torch.from_numpy(rows), dim, slots, unique, offsets, None, False, 1)
    grad = (generator.standard_normal((bags, 1, dim)) * 10.0 ** generator.integers(-4, 4, (bags, 1, 1))).astype(
        np.float32
    )
    arguments = (torch.from_numpy(grad), unique, offsets, None, False, False, slots, 5)
    values = kernel_set.pool_backward(*arguments)
    expected, expected_values = np.zeros((bags, 1, dim), np.float32), np.zeros((5, dim), np.float32)
    for position, number in enumerate(numbers):
        bag = position // (positions // bags)
        expected[bag, 0] += rows[number]
        expected_values[number] += grad[bag, 0]
    assert np.array_equal(out.numpy(), expected) and np.array_equal(values.numpy(), expected_values)


@every_dim
@pytest.mark.parametrize("name", ["ragged", "all equal"])
def test_results_do_not_depend_on_the_slots(kernel_set, name, dim, dtype):
    """The rows in other slots: every output has the same bits, every record the same new value."""
    batch = Batch(name, dim, dtype)
    results = []
    for placed in (batch.moved(), batch):
        out = [
            kernel_set.pool(*placed.lookup(), weights, mean, placed.num_tables)
            for weights, mean in ((None, False), (None, True), (placed.weights, False))
        ]
        out += kernel_set.pool_max(*placed.lookup(), placed.num_tables)
        out.append(kernel_set.weight_gradient(placed.grad, *placed.lookup()))
        out.append(kernel_set.renormalize(placed.records, dim, placed.slot_of_unique, 1.0, 2.0))
        out.append(placed.records[placed.slot_of_unique.long()])
        results.append(out)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- norms -------------------------------------------------------------------------------------------------------


@every_dim
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 3.0, 0.5])
def test_renormalize(kernel_set, dim, dtype, norm_type):
    """Rows above the norm are scaled to it, the others keep every bit; state columns are left alone."""
    batch = Batch("ragged", dim, dtype, state=1)
    before = batch.records.clone()
    slots = torch.tensor([3, 0, 28, 11, 5], dtype=torch.int32)
    batch.records[5, :dim] = before[5, :dim] = 0
    norms = torch.linalg.vector_norm(before[slots.long(), :dim].double(), norm_type, dim=1)
    limit = float(norms.median())
    changed = kernel_set.renormalize(batch.records, dim, slots, limit, norm_type)
    near = (norms - limit).abs() <= 1e-12 * limit  # the median itself: rounding decides
    assert torch.equal((norms > limit)[~near], changed[~near]) and changed.dtype == torch.bool
    for slot, norm, is_changed in zip(slots.tolist(), norms.tolist(), changed.tolist(), strict=True):
        if is_changed:
            expected = before[slot, :dim].double() * (limit / (norm + 1e-7))
            torch.testing.assert_close(batch.records[slot, :dim].double(), expected, **close(dtype, 1))
        else:
            assert torch.equal(batch.records[slot], before[slot])
    assert torch.equal(batch.records[:, dim:], before[:, dim:])
    others = [slot for slot in range(29) if slot not in slots.tolist()]
    assert torch.equal(batch.records[others], before[others])


def test_renormalize_nothing(kernel_set):
    assert kernel_set.renormalize(torch.ones(3, 2), 2, torch.empty(0, dtype=torch.int32), 0.1, 2.0).numel() == 0


# ---- moving rows -------------------------------------------------------------------------------------------------


@every_dim
@pytest.mark.parametrize("types", [(torch.int64, torch.int32), (torch.int32, torch.int64), (torch.int64, torch.int64)])
def test_copy_rows(kernel_set, dim, dtype, types):
    source, target = torch.randn(20, dim).to(dtype), torch.zeros(9, dim, dtype=dtype)
    expected = target.clone()
    rows, places = [19, 3, 0, 7], [0, 8, 4, 2]
    expected[places] = source[rows]
    kernel_set.copy_rows(source, torch.tensor(rows, dtype=types[0]), target, torch.tensor(places, dtype=types[1]))
    assert torch.equal(target, expected)
    nothing = torch.empty(0, dtype=torch.int64)
    kernel_set.copy_rows(source, nothing, target, nothing)
    assert torch.equal(target, expected)


# ---- updates -----------------------------------------------------------------------------------------------------

LR, EPS, BETAS, STEP_SIZE = 0.1, 1e-8, (0.9, 0.999), 0.07


def by_definition(rule, record, grad, dim):
    """The row's new record in float64, by the formula in the protocol's docstring."""
    w, state, g = record[:dim].clone(), record[dim:].clone(), grad
    if rule == "sgd":
        w -= LR * g
    elif rule == "adagrad":
        state += g * g
        w -= LR * g / (state.sqrt() + EPS)
    elif rule == "rowwise_adagrad":
        state += (g * g).mean()
        w -= LR / (state.sqrt() + EPS) * g
    else:
        state[:dim] += (1 - BETAS[0]) * (g - state[:dim])
        state[dim:] += (1 - BETAS[1]) * (g * g - state[dim:])
        w -= STEP_SIZE * state[:dim] / (state[dim:].sqrt() + EPS)
    return torch.cat([w, state])


RULES = {"sgd": (LR,), "adagrad": (LR, EPS), "rowwise_adagrad": (LR, EPS), "adam": (*BETAS, EPS, STEP_SIZE)}


def state_width(rule, dim):
    return {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim}[rule]


def update(kernel_set, rule, records, dim, slots, grads):
    of_rows = (kernel_set.square_sums(grads) / dim,) if rule == "rowwise_adagrad" else ()
    getattr(kernel_set, f"update_{rule}")(records, dim, slots, grads, *of_rows, *RULES[rule])


def block(rule, dim, dtype, num_slots=40):
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(num_slots, dim + state_width(rule, dim), generator=generator, dtype=torch.float64)
    records[:, dim:] = records[:, dim:].abs()
    return records.to(dtype), torch.randn(num_slots, dim, generator=generator, dtype=torch.float64).to(dtype)


@every_dim
@pytest.mark.parametrize("rule", RULES)
def test_update(kernel_set, rule, dim, dtype):
    """Only the rows given move, by the formula; an update of no row does nothing."""
    records, grads = block(rule, dim, dtype)
    before = records.clone()
    slots = torch.tensor([7, 39, 0, 21, 5], dtype=torch.int32)
    grads = grads[:5]
    update(kernel_set, rule, records, dim, slots, grads)
    for number, slot in enumerate(slots.tolist()):
        expected = by_definition(rule, before[slot].double(), grads[number].double(), dim)
        torch.testing.assert_close(records[slot].double(), expected, **close(dtype, 2))
    others = [slot for slot in range(40) if slot not in slots.tolist()]
    assert torch.equal(records[others], before[others])
    after = records.clone()
    update(kernel_set, rule, records, dim, slots[:0], grads[:0])
    assert torch.equal(records, after)


@every_dim
@pytest.mark.parametrize("rule", RULES)
def test_an_update_does_not_depend_on_where_the_row_stands(kernel_set, rule, dim, dtype):
    """Each row alone, all at once, and in another order: the same bits, in vector loops and their remainders alike."""
    start, grads = block(rule, dim, dtype)
    results = []
    for order in (torch.arange(37), torch.randperm(37, generator=torch.Generator().manual_seed(1))):
        records = start.clone()
        update(kernel_set, rule, records, dim, order.int(), grads[order].contiguous())
        results.append(records)
    records = start.clone()
    for slot in range(37):
        update(
            kernel_set, rule, records, dim, torch.tensor([slot], dtype=torch.int32), grads[slot : slot + 1].contiguous()
        )
    results.append(records)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rule", ["adagrad", "rowwise_adagrad", "adam"])
def test_an_update_of_fresh_state_by_a_zero_gradient_is_nothing(kernel_set, rule):
    """0 / (sqrt(0) + eps) is 0, not nan."""
    records = torch.zeros(2, 4 + state_width(rule, 4))
    records[:, :4] = 1
    update(kernel_set, rule, records, 4, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, 4))
    assert (records[:, :4] == 1).all() and not records[:, 4:].any()


# ---- plan --------------------------------------------------------------------------------------------------------


def plan_by_loops(values, offsets, table_rows, padding_ids, slots):
    """(unique_of_position, slot_of_unique, id_of_unique, counts), or the first bad position."""
    num_tables = len(table_rows)
    bags = (len(offsets) - 1) // num_tables
    number, of_position = {}, [None] * len(values)
    counts = np.zeros((num_tables, 4), np.int64)
    start = 0
    for table, rows in enumerate(table_rows):
        for position in range(offsets[table * bags], offsets[(table + 1) * bags]):
            local = values[position]
            if not 0 <= local < rows:
                return position
            if local == padding_ids[table]:
                of_position[position] = -1
                continue
            identity = start + local
            slot = int(slots.slot_of_id[identity]) - 1
            is_new = identity not in number
            of_position[position] = number.setdefault(identity, len(number))
            prepaid = slot >= 0 and bool(slots.marks[slot] & int(slots.PREPAID))
            counts[table] += [1, slot < 0, slot < 0 and is_new, prepaid]
        start += rows
    return of_position, [int(slots.slot_of_id[identity]) - 1 for identity in number], list(number), counts.tolist()


@st.composite
def lookups(draw):
    """(sizes, padding, values, offsets, ids resident, ids prepaid); now and then with a bad id."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    bags = draw(st.integers(0, 3))
    padding = [draw(st.one_of(st.just(-1), st.integers(0, rows - 1))) for rows in sizes]
    allow_bad = draw(st.integers(0, 3)) == 0
    values, offsets = [], [0]
    for rows in sizes:
        local = st.integers(-2, rows + 2) if allow_bad else st.integers(0, rows - 1)
        for _ in range(bags):
            values += draw(st.lists(local, max_size=5))
            offsets.append(len(values))
    total = sum(sizes)
    resident = draw(st.lists(st.integers(0, total - 1), unique=True, max_size=total))
    prepaid = [number for number in resident if draw(st.booleans())]
    return sizes, padding, values, offsets, resident, prepaid


def slot_table(num_rows, resident, prepaid=()):
    slots = SlotTable(max(1, len(resident)), num_rows, True)
    ids = np.array(resident, np.int64)
    taken = slots.take_free(ids.size)
    slots.admit(ids, ids, taken)
    for number in prepaid:
        slots.marks[int(slots.slot_of_id[number]) - 1] = int(slots.PREFETCHED | slots.PREPAID)
    return slots


SETS = {name: make_kernels(name) for name in KERNEL_SETS}  # one of each for all examples: scratch must not leak


@given(st.lists(lookups(), min_size=1, max_size=3))
@settings(max_examples=150)
def test_plan_is_the_same_in_every_set(sequence):
    """Exactly: unique numbers by first occurrence, slots, ids, counts per table; or the same first bad position."""
    for sizes, padding, values, offsets, resident, prepaid in sequence:
        slots = slot_table(sum(sizes), resident, prepaid)
        marks = slots.marks.clone()
        expected = plan_by_loops(values, offsets, sizes, padding, slots)
        rows = torch.tensor(sizes)
        arguments = (torch.tensor(values, dtype=torch.int64), torch.tensor(offsets), rows, rows.cumsum(0) - rows)
        for name, kernels in SETS.items():
            plan = kernels.plan(*arguments, torch.tensor(padding), slots)
            if not isinstance(plan, BatchPlan):
                assert plan == expected, name
                continue
            assert [part.dtype for part in plan] == [torch.int32, torch.int32, torch.int64, torch.int64]
            assert [part.tolist() for part in plan] == list(expected), name
        assert torch.equal(slots.marks, marks) and not slots.pins.any()


def test_plan_of_nothing(kernel_set):
    for offsets in ([0], [0, 0, 0]):
        arguments = (torch.empty(0, dtype=torch.int64), torch.tensor(offsets), torch.tensor([5]), torch.tensor([0]))
        plan = kernel_set.plan(*arguments, torch.tensor([-1]), slot_table(5, [1]))
        assert [part.numel() for part in plan] == [0, 0, 0, 4] and not plan.counts.any()


def test_plans_of_growing_batches_with_many_collisions(kernel_set):
    """Ids far apart and side by side, missing all: each is found again, whatever the size of the batch before."""
    num_rows = 1 << 22
    slots = slot_table(num_rows, [])
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 1000, 5, 5000):
        ids = np.concatenate(
            [np.arange(size), np.arange(size) * (num_rows // size), generator.integers(0, num_rows, size)]
        )
        values = torch.from_numpy(generator.permutation(ids).astype(np.int64))
        one = torch.tensor([0, values.numel()])
        plan = kernel_set.plan(values, one, torch.tensor([num_rows]), torch.tensor([0]), torch.tensor([-1]), slots)
        assert torch.equal(plan.id_of_unique[plan.unique_of_position.long()], values)
        assert plan.id_of_unique.unique().numel() == plan.id_of_unique.numel()
        first = [
            int((plan.unique_of_position == number).nonzero()[0])
            for number in range(min(20, plan.id_of_unique.numel()))
        ]
        assert first == sorted(first)


def test_ids_that_do_not_fit_are_bad_whatever_their_size(kernel_set):
    for bad in (-1, 5, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)):
        values = torch.tensor([0, 4, bad])
        arguments = (values, torch.tensor([0, 3]), torch.tensor([5]), torch.tensor([0]), torch.tensor([-1]))
        assert kernel_set.plan(*arguments, slot_table(5, [0, 4])) == 2


def test_plan_leaves_the_map_as_it_was(kernel_set):
    """Also where an id is bad: what it notes in the map while it runs is gone."""
    slots = slot_table(50, [3, 7, 8])
    before = slots.slot_of_id.clone()
    for last in (49, 50):
        values = torch.tensor([3, 9, 9, 7, 3, 20, last])
        kernel_set.plan(values, torch.tensor([0, 7]), torch.tensor([50]), torch.tensor([0]), torch.tensor([20]), slots)
        assert torch.equal(slots.slot_of_id, before)


@pytest.mark.parametrize("largest", [1, 2, 100, 2**11, 2**11 + 1, 2**22 + 5, 2**31 - 1])
def test_order_slots(kernel_set, largest):
    generator = np.random.default_rng(0)
    for count in (0, 1, 2, 1000):
        drawn = np.unique(np.append(generator.integers(0, largest, count), largest))[-count or largest + 1 :]
        slots = torch.from_numpy(generator.permutation(drawn).astype(np.int32))
        ascending, place_of_unique = kernel_set.order_slots(slots)
        assert ascending.dtype == torch.int64 and place_of_unique.dtype == torch.int32
        assert ascending.tolist() == sorted(slots.tolist())
        assert torch.equal(ascending[place_of_unique.long()], slots.long())


@pytest.mark.parametrize(
    ("offsets", "num_values", "has_end", "expected"),
    [
        ([0, 2, 2], 5, False, ([0, 2, 2, 5], True)),
        ([0, 2, 5], 5, True, ([0, 2, 5], True)),
        ([], 0, False, ([0], True)),
        ([0, 3, 2], 5, False, ([0, 3, 2, 5], False)),
        ([0, 6], 5, False, ([0, 6, 5], False)),
    ],
)
def test_copy_offsets(kernel_set, offsets, num_values, has_end, expected):
    offsets = torch.tensor(offsets, dtype=torch.int64)
    copy, is_rising = kernel_set.copy_offsets(offsets, num_values, has_end)
    assert (copy.tolist(), is_rising) == expected
    copy.fill_(9)
    assert not (offsets == 9).any()


# ---- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbering", ["first come", "by id", "by anything"])
@pytest.mark.parametrize("tables", [1, 3, 8])
@pytest.mark.parametrize("form", ["one hot", "ragged", "weighted", "max"])
def test_the_bits_do_not_depend_on_the_number_of_threads(form, tables, numbering):
    """Forward, backward and update of a batch that is shared out, with 1, 2 and 5 threads.

    A backward shares out the tables where they make even parts (8 by 2 and 4) and the numbers of their rows allow it
    (ranks that exchange rows number them by id, owner by owner), else the rows. Table 4 is all padding.
    """
    kernels = make_kernels("cpu")
    generator = np.random.default_rng(0)
    bags, dim = 9000 // tables, 64
    lengths = np.ones(tables * bags, np.int64) if form == "one hot" else generator.integers(0, 3, tables * bags)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    per_table = lengths.reshape(tables, bags).sum(1)
    numbers = np.concatenate(
        [1000 * table + generator.integers(0, 1000, count) ** 2 // 1000 for table, count in enumerate(per_table)]
    )
    looked_up = numbers // 1000 != 4
    _, first, inverse = np.unique(numbers[looked_up], return_index=True, return_inverse=True)
    unique = torch.full(numbers.shape, -1, dtype=torch.int32)
    number_of_row = {
        "first come": np.argsort(np.argsort(first)),
        "by id": np.arange(first.size),
        "by anything": generator.permutation(first.size),
    }[numbering]
    unique[torch.from_numpy(looked_up)] = torch.from_numpy(number_of_row[inverse].astype(np.int32))
    slots = torch.from_numpy(generator.permutation(9000)[: first.size].astype(np.int32))
    weights = torch.rand(numbers.size) if form == "weighted" else None
    grad = torch.randn(bags, tables, dim)
    fresh = torch.rand(9000, 2 * dim)
    results = []
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert num_parts(bags * tables * dim, GRAIN) == min(threads, 4)
            records = fresh.clone()
            ascending, places = kernels.order_slots(slots)
            if form == "max":
                out, chosen = kernels.pool_max(records, dim, slots, unique, offsets, tables)
                values = kernels.pool_max_backward(grad, unique, offsets, chosen, places, first.size)
            else:
                out = kernels.pool(records, dim, slots, unique, offsets, weights, form == "ragged", tables)
                arguments = (weights, form == "ragged", False, places, first.size)
                values = kernels.pool_backward(grad, unique, offsets, *arguments)
            kernels.update_adagrad(records, dim, ascending.int(), values, 0.1, 1e-8)
            moved = torch.empty_like(records)
            kernels.copy_rows(records, torch.arange(9000), moved, torch.arange(9000).flip(0))
            results.append((out, values.clone(), records, moved))
            values.fill_(torch.nan)  # its memory is used again: nothing may be left from before
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        for number, (part, expected) in enumerate(zip(result, results[0], strict=True)):
            assert torch.equal(part, expected), number


@pytest.mark.parametrize("sizes", [[5000], [5000, 3], [9, 4000, 700, 60_000, 1], [4000] * 26])
def test_plans_of_tables_shared_out_are_those_of_one_thread(sizes):
    """Some rows resident, repeats, padding, tables of unequal length in the batch; then a bad id in one, and in two."""
    kernels, generator = make_kernels("cpu"), np.random.default_rng(0)
    tables, bags = len(sizes), 100
    lengths = generator.integers(0, 6 * PLAN_GRAIN // (tables * bags), (tables, bags)) * generator.integers(
        1, 3, (tables, 1)
    )
    offsets = torch.from_numpy(np.concatenate([[0], lengths.reshape(-1).cumsum()]))
    values = torch.from_numpy(
        np.concatenate([generator.integers(0, rows, count) for rows, count in zip(sizes, lengths.sum(1), strict=True)])
    )
    rows = torch.tensor(sizes)
    slots = slot_table(sum(sizes), sorted(generator.choice(sum(sizes), sum(sizes) // 3, replace=False).tolist()))
    entries = slots.slot_of_id.clone()
    arguments = offsets, rows, rows.cumsum(0) - rows, torch.tensor([0] + [-1] * (tables - 1)), slots
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = kernels.plan(values, *arguments)
        bad = values.clone()
        bad[-1] = sizes[-1]
        twice = bad.clone()
        twice[7] = -1
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for part, of_one in zip(kernels.plan(values, *arguments), expected, strict=True):
                assert torch.equal(part, of_one)
            assert kernels.plan(bad, *arguments) == values.numel() - 1
            assert kernels.plan(twice, *arguments) == 7
            assert torch.equal(slots.slot_of_id, entries)
    finally:
        torch.set_num_threads(num_threads)


def test_a_part_that_raises():
    """The error arrives after every part has ended, and the next call works."""

    def kernel(first, last):
        done.append(first)
        if first:
            raise ValueError("a part")

    done = []
    with pytest.raises(ValueError, match="a part"):
        in_parts(kernel, 10, 3)
    assert sorted(done) == [0, 3, 6]
    in_parts(lambda first, last: done.append(last), 10, 2)
    assert sorted(done[3:]) == [5, 10]


# ---- large offsets -----------------------------------------------------------------------------------------------


def test_slots_beyond_two_to_the_31_elements(kernel_set):
    """A block of 2.2e9 floats, of which three pages are touched: a 32-bit product of slot and width would wrap."""
    dim, num_slots = 33, 67_000_000
    assert num_slots * dim > 2**31
    records = torch.from_numpy(np.empty((num_slots, dim), np.float32))
    slots = torch.tensor([num_slots - 1, 2], dtype=torch.int32)
    rows = torch.randn(2, dim)
    kernel_set.copy_rows(rows, torch.arange(2), records, slots)
    unique, offsets = torch.tensor([0, 1, 0], dtype=torch.int32), torch.tensor([0, 1, 3])
    out = kernel_set.pool(records, dim, slots, unique, offsets, None, False, 1)
    assert torch.equal(out[:, 0], torch.stack([rows[0], rows[1] + rows[0]]))
    maximum, _ = kernel_set.pool_max(records, dim, slots, unique, offsets, 1)
    assert torch.equal(maximum[:, 0], torch.stack([rows[0], torch.maximum(*rows)]))
    gradient = kernel_set.weight_gradient(torch.ones(2, 1, dim), records, dim, slots, unique, offsets)
    torch.testing.assert_close(gradient, rows.sum(1)[[0, 1, 0]])
    update(kernel_set, "sgd", records, dim, slots, torch.ones(2, dim))
    assert torch.equal(records[slots.long()], rows - torch.tensor(LR))
    assert kernel_set.renormalize(records, dim, slots, 1.0, 2.0).all()
    torch.testing.assert_close(torch.linalg.vector_norm(records[slots.long()], dim=1), torch.ones(2))


@pytest.mark.parametrize("name", KERNEL_SETS)
@pytest.mark.parametrize("seed", range(20))
def test_distinct_ids_are_those_of_the_plan(name, seed):
    """Numbered as `plan` does, table after table; some of them are empty in the batch, two have padding."""
    generator = torch.Generator().manual_seed(seed)
    table_rows = torch.tensor([50, 3, 200])
    starts = torch.cumsum(table_rows, 0) - table_rows
    lengths = torch.randint(0, 4, (3, 5), generator=generator) * torch.randint(0, 2, (3, 1), generator=generator)
    per_table = zip(table_rows.tolist(), lengths.sum(1).tolist(), strict=True)
    values = torch.cat([torch.randint(rows, (count,), generator=generator) for rows, count in per_table])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.reshape(-1).cumsum(0)])
    batch = values, offsets, table_rows, starts, torch.tensor([-1, 1, 7])
    wanted = make_kernels(name).distinct_ids(*batch)
    plan = make_kernels("torch").plan(*batch, SlotTable(10, 253, rows_are_ids=True))
    assert torch.equal(wanted.ids, plan.id_of_unique)
    ends = [int((plan.id_of_unique < end).sum()) for end in (starts + table_rows).tolist()]
    assert wanted.table_ends.tolist() == [0, *ends]
    if values.numel():
        values[-1] = 200
        assert make_kernels(name).distinct_ids(*batch) == values.numel() - 1
