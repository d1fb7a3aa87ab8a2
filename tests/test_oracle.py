"""Random traces against an oracle of forty plain lines. `pytest tests/test_oracle.py`

Proves: whatever the order of forwards, held graphs, dropped graphs, backwards, steps, evaluations, prefetches, batches
announced and admitted ahead, flushes and loads, every output and the whole table equal those of a plain table, and
every invariant (`check()`) holds.
Weights and gradients are small integers in float64 and lr is 1, so all sums are exact and equality is the right test.
"""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from colossal_freqcache import CacheTooSmallError, FreqAwareEmbeddingBag, optim

NUM_ROWS, DIM, NUM_SLOTS, CEILING = 12, 2, 4, 6
POLICIES = ("dataset", "lfu", "lru", "s3fifo", "lookahead")

MAX_EXAMPLES = 150
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate, hypothesis.Phase.shrink)

bags_of_ids = st.lists(st.lists(st.integers(0, NUM_ROWS - 1), max_size=3), min_size=1, max_size=3)


class Oracle:
    """What a table without a cache does: sum pooling, summed gradients, w -= g."""

    def __init__(self, table):
        self.table = table.clone()
        self.grad = torch.zeros_like(table)

    def forward(self, bags):
        return torch.stack([self.table[ids].sum(0) for ids in bags])

    def backward(self, bags, grad):
        for ids, row in zip(bags, grad, strict=True):
            for one in ids:
                self.grad[one] += row

    def step(self):
        self.table -= self.grad

    def zero_grad(self):
        self.grad.zero_()


class CacheAgainstOracle(RuleBasedStateMachine):
    """Each rule does the same to both and compares."""

    evictions = 0

    @initialize(
        policy=st.sampled_from(POLICIES),
        kernels=st.sampled_from(("cpu", "torch")),
        counts=st.none() | st.permutations(range(NUM_ROWS)),
    )
    def build(self, policy, kernels, counts):
        table = torch.arange(NUM_ROWS * DIM, dtype=torch.float64).reshape(NUM_ROWS, DIM)
        self.bag = FreqAwareEmbeddingBag(
            NUM_ROWS,
            DIM,
            mode="sum",
            _weight=table,
            num_slots=NUM_SLOTS,
            max_cache_bytes=CEILING * DIM * 8,
            evict_strategy=policy,
            kernels=kernels,
            ids_freq_mapping=counts,
        )
        self.optimizer = optim.SGD(self.bag.parameters(), lr=1.0)
        self.oracle = Oracle(table)
        self.held = []  # (bags, output) of forwards that wait for their backward
        self.stepped = False  # the gradient was stepped and not cleared
        self.bag._look_ahead(self)

    def lookup(self, bags):
        """The output, or None where the rows that are needed at once really do not fit."""
        values = torch.tensor([one for ids in bags for one in ids], dtype=torch.int64)
        offsets = torch.tensor([sum(len(ids) for ids in bags[:number]) for number in range(len(bags))])
        before = self.bag.logical_weight()
        try:
            out = self.bag(values, offsets)
        except CacheTooSmallError:
            pinned = self.bag._cache.slots.id_of_slot[self.bag._cache.slots.pins > 0].tolist()
            assert len({*pinned, *values.tolist()}) > CEILING
            assert torch.equal(before, self.bag.logical_weight())
            return None
        assert torch.equal(out.detach(), self.oracle.forward(bags))
        return out

    @rule(bags=bags_of_ids)
    def forward_and_hold(self, bags):
        out = self.lookup(bags)
        if out is not None:
            self.held.append((bags, out))

    @rule(bags=bags_of_ids)
    def forward_and_drop(self, bags):
        self.lookup(bags)

    @rule(bags=bags_of_ids)
    def evaluate(self, bags):
        with torch.no_grad():
            self.lookup(bags)

    @rule(bags=bags_of_ids)
    def prefetch(self, bags):
        try:
            self.bag.prefetch(torch.tensor([one for ids in bags for one in ids], dtype=torch.int64))
        except CacheTooSmallError:
            pass

    @rule(bags=bags_of_ids)
    def announce(self, bags):
        """A batch that a Lookahead has pulled; whether it is ever forwarded is left open."""
        values = torch.tensor([one for ids in bags for one in ids], dtype=torch.int64)
        with ThreadPoolExecutor(1) as executor:
            wanted = self.bag._wanted_ids((values, torch.zeros(1, dtype=torch.int64)), executor)
        self.bag._announce(self, wanted)

    @precondition(lambda self: self.bag._cache.ahead.num_announced)
    @rule(depth=st.integers(0, 2))
    def hand_out(self, depth):
        self.bag._hand_out(self, depth)

    @rule()
    def look_ahead_anew(self):
        self.bag._end_look_ahead(self, collected=False)
        self.bag._look_ahead(self)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), scale=st.integers(-2, 2))
    def backward(self, data, scale):
        bags, out = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        grad = torch.full_like(out, float(scale))
        if self.stepped and self.bag.weight.grad._nnz():
            with pytest.raises(RuntimeError, match="zero_grad"):
                out.backward(grad)
            return
        out.backward(grad)
        self.stepped = False
        self.oracle.backward(bags, grad)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop_graph(self, data):
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        gc.collect()

    @rule(set_to_none=st.booleans())
    def step_and_clear(self, set_to_none):
        if not self.stepped:
            self.optimizer.step()
            self.oracle.step()
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.oracle.zero_grad()
        self.stepped = False

    @precondition(lambda self: not self.stepped and self.bag.weight.grad is not None)
    @rule()
    def step_without_clearing(self):
        self.optimizer.step()
        self.oracle.step()
        self.oracle.zero_grad()
        self.stepped = True

    @rule()
    def clear(self):
        self.optimizer.zero_grad()
        self.oracle.zero_grad()
        self.stepped = False

    @rule()
    def flush(self):
        self.bag.flush()

    @rule(value=st.integers(-9, 9))
    def load(self, value):
        table = self.oracle.table + value
        self.bag.load_state_dict({"weight": table})
        self.oracle.table = table

    @invariant()
    def sound(self):
        if hasattr(self, "bag"):
            self.bag._cache.check()
            assert torch.equal(self.bag.logical_weight(), self.oracle.table)
            assert self.bag.num_slots <= CEILING

    def teardown(self):
        if hasattr(self, "bag"):
            CacheAgainstOracle.evictions += self.bag.stats.evictions


def test_random_traces():
    """Traces of up to 40 operations each; rows must have been evicted on the way."""
    CacheAgainstOracle.evictions = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it grows to.*")  # traces grow the cache from 4 to 6 slots
        warnings.filterwarnings("ignore", message="the rows of the next batch do not fit")
        hypothesis.stateful.run_state_machine_as_test(
            CacheAgainstOracle,
            settings=hypothesis.settings(
                max_examples=MAX_EXAMPLES, stateful_step_count=40, deadline=None, phases=PHASES
            ),
        )
    assert CacheAgainstOracle.evictions > 2 * MAX_EXAMPLES
