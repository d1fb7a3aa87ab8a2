"""A synthetic id stream as skewed as those of public click logs, drawn at memory speed. Knows no rows and no caches.

For each table: a rank is drawn from a Zipf-Mandelbrot law p(r) ~ (r + q)^-a over a hidden universe larger than the
table; ranks beyond the table are folded onto it by a hash, which keeps the long tail of ids seen once; a bijection
scatters the ranks over the ids, so that no cache profits from id order. Optional drift re-homes a share of the ranks to
other ids as the stream goes on; optional bursts repeat recent ids. (a, q) and the size of the universe were fitted to
published numbers of ids seen at least 1, 3, 10 or 15 times; they stand in PRESETS. A run over them is *synthetic,
calibrated*: label it so.

Shapes: n draws, T tables, R rows of one table, L_t ids a bag of table t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "COVERAGE_SHARES",
    "KAGGLE_TABLE_SIZES",
    "PRESETS",
    "Preset",
    "TableFit",
    "TableStream",
    "ZipfMandelbrot",
    "hash64",
    "unit_interval",
]

DRAWS_PER_DRIFT_EPOCH = 1_000_000
# Of the rows of a table, hottest first: where `TableFit.fitted_coverage` is given.
COVERAGE_SHARES = (0.001, 0.01, 0.015, 0.1)

# Distinct values per column in Criteo's Kaggle train.txt (45,840,617 lines), as in the public DLRM code.
KAGGLE_TABLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]  # fmt: skip


@dataclass(frozen=True)
class TableFit:
    """The law of one table. `ranks_per_row`: hidden universe over rows. `fitted_coverage`: the share of accesses on the
    hottest 0.1, 1, 1.5 and 10 % of the rows that the fit implies (None where only the law itself is known).
    `default_share`: share of accesses that all go to one default id, on top of the law."""

    a: float = 1.3
    q: float = 2.0
    ranks_per_row: float = 1.0
    fitted_coverage: tuple[float, ...] | None = None
    default_share: float = 0.0
    uniform: bool = False


@dataclass(frozen=True)
class Preset:
    """Table sizes, the fits of the big tables by position (`other` for the rest), and ids per bag (1 where absent)."""

    table_sizes: Sequence[int]
    fits: dict[int, TableFit]
    other: TableFit = TableFit()
    pooling: Sequence[int] = field(default_factory=tuple)

    def fit(self, table: int) -> TableFit:
        """The law of one table."""
        return self.fits.get(table, self.other)


# Criteo 1 TB, hashed to at most 40 million rows a table (MLPerf DLRM v1), and the multi-hot sizes of MLPerf DLRM-DCNv2
_TB_40M = [
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976, 14,
    39979771, 25641295, 39664984, 585935, 12972, 108, 36,
]  # fmt: skip
_TB_MULTI_HOT = [
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14,
    40000000, 40000000, 40000000, 590152, 12973, 108, 36,
]  # fmt: skip
_MULTI_HOT_IDS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]
# C1, banner_pos, site_id, site_domain, site_category, app_id, app_domain, app_category, device_id, device_ip,
# device_model, device_type, device_conn_type, C14..C21
_AVAZU = [
    7, 7, 4737, 7745, 26, 8552, 559, 36, 2686408, 6729486, 8251, 5, 4, 2626, 8, 9, 435, 4, 68, 172, 60,
]  # fmt: skip
_FLAT_HEAD = TableFit(2.5, 4000)

PRESETS: dict[str, Preset] = {
    # fitted to the ids seen >= 1 and >= 10 times in Criteo's Kaggle set
    "kaggle": Preset(
        KAGGLE_TABLE_SIZES,
        {
            2: TableFit(1.058, 0, 256, (0.597, 0.695, 0.710, 0.780)),
            11: TableFit(1.066, 0, 79, (0.627, 0.727, 0.744, 0.813)),
            20: TableFit(1.112, 3, 133, (0.647, 0.756, 0.773, 0.841)),
            15: TableFit(1.126, 3, 36, (0.675, 0.787, 0.803, 0.870)),
            3: TableFit(1.183, 3, 3.8, (0.743, 0.856, 0.872, 0.931)),
            23: TableFit(1.48, 30, 1.2, (0.69, 0.90, 0.92, 0.97)),
            25: TableFit(1.56, 30, 1.05, (0.62, 0.89, 0.91, 0.97)),
            9: TableFit(1.40, 3, 1.0, (0.75, 0.91, 0.92, 0.97)),
        },
    ),
    # fitted to the ids seen >= 1, >= 3 and >= 15 times in Criteo's terabyte; the universe is that of the uncapped table
    "tb40m": Preset(
        _TB_40M,
        {
            0: TableFit(1.096, 1.7, 3.8 * 227605432 / 39884406),
            9: TableFit(1.152, 3.2, 3.5 * 130229467 / 38532951),
            19: TableFit(1.077, 0.2, 5.8 * 292775614 / 39979771),
            20: TableFit(1.312, 30, 3.1 * 40790948 / 25641295),
            21: TableFit(1.115, 2.6, 3.5 * 187188510 / 39664984),
            10: _FLAT_HEAD,
            11: _FLAT_HEAD,
            22: _FLAT_HEAD,
        },
    ),
    # fitted to the ids seen >= 1 and >= 2 times: the hard case for a cache
    "avazu": Preset(
        _AVAZU,
        {
            8: TableFit(0.8, 0, 2.51, default_share=0.825),
            9: TableFit(0.95, 100, 1.63, (0.299, 0.489, 0.525, 0.704)),
        },
    ),
    # many ids a bag, exponent 1: the reuse seen in published locality statistics of production traces
    "meta": Preset(_TB_MULTI_HOT, {}, TableFit(1.0, 2, 1.0), _MULTI_HOT_IDS),
    # the worst case for any cache
    "uniform": Preset(KAGGLE_TABLE_SIZES, {}, TableFit(uniform=True)),
}


class ZipfMandelbrot:
    """p(r) ~ (r + q)^-a for r = 1..num_ranks. The first 4,096 ranks by their exact cumulative table; the tail by the
    inverse of its integral, x = (lo^e + v (hi^e - lo^e))^(1/e) with e = 1 - a, r = floor(x - q + 1/2)."""

    HEAD = 4096

    def __init__(self, a: float, q: float, num_ranks: int):
        if a <= 0 or q <= -1 or num_ranks < 1:
            raise ValueError(f"expected a > 0, q > -1 and num_ranks >= 1, got a={a}, q={q}, num_ranks={num_ranks}")
        self.a, self.q, self.num_ranks = float(a), float(q), int(num_ranks)
        head = min(self.HEAD, self.num_ranks)
        weight = (np.arange(1, head + 1, dtype=np.float64) + q) ** -self.a
        self.head = head
        self.tail_low, self.tail_high = head + 0.5 + q, self.num_ranks + 0.5 + q
        tail = self._integral(self.tail_high)
        self.total = weight.sum() + tail
        self.cumulative = np.cumsum(weight) / self.total
        self.head_mass = float(self.cumulative[-1]) if tail > 0 else 1.0
        self.cumulative[-1] = self.head_mass

    def _integral(self, high: float) -> float:
        if high <= self.tail_low:
            return 0.0
        e = 1.0 - self.a
        if abs(e) < 1e-9:
            return math.log(high / self.tail_low)
        return (high**e - self.tail_low**e) / e

    def mass_of_top(self, num_top: int) -> float:
        """The share of draws that falls on the `num_top` most frequent ranks."""
        if num_top <= 0:
            return 0.0
        if num_top <= self.head:
            return float(self.cumulative[num_top - 1])
        return self.head_mass + self._integral(min(num_top, self.num_ranks) + 0.5 + self.q) / self.total

    def draw(self, generator: np.random.Generator, n: int) -> np.ndarray:
        """(n,) int64 ranks, 0 = most frequent."""
        v = generator.random(n)
        in_tail = np.flatnonzero(v >= self.head_mass)
        rank = np.searchsorted(self.cumulative, v, side="right")
        if len(in_tail):
            share = (v[in_tail] - self.head_mass) / (1.0 - self.head_mass)
            e = 1.0 - self.a
            if abs(e) < 1e-9:
                x = self.tail_low * np.exp(share * math.log(self.tail_high / self.tail_low))
            else:
                low, high = self.tail_low**e, self.tail_high**e
                x = np.exp(np.log(low + share * (high - low)) * (1.0 / e))
            tail_rank = (x - (self.q - 0.5)).astype(np.int64)
            rank[in_tail] = np.clip(tail_rank, self.head + 1, self.num_ranks) - 1
        return rank


def hash64(keys: np.ndarray, salt: int) -> np.ndarray:
    """splitmix64's finaliser on keys + salt: (n,) uint64, evenly mixed."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def unit_interval(hashes: np.ndarray) -> np.ndarray:
    """uint64 hashes as float64 in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


class TableStream:
    """The endless id stream of one table; `draw` goes on where the last call ended.

    Args:
        num_rows (int): R; ids are 0..R-1.
        fit (TableFit): the law.
        seed (int), salt (int): the draws depend on both, the map from ranks to ids on `salt` alone.
        drift (float): share of the ranks that move to another id per million draws. 0: none.
        burst (float): chance that a draw repeats one of the last `window` ids, the lag log-uniform. 0: none.
        sorted_ids (bool): id = rank (0 the hottest) instead of scattered.
        start_at (int): draws already made, which sets the drift's clock.
    """

    def __init__(
        self,
        num_rows: int,
        fit: TableFit = TableFit(),
        seed: int = 0,
        salt: int = 0,
        drift: float = 0.0,
        burst: float = 0.0,
        window: int = 200_000,
        sorted_ids: bool = False,
        start_at: int = 0,
    ):
        if not 0 <= burst < 1 or drift < 0:
            raise ValueError(f"expected 0 <= burst < 1 and drift >= 0, got burst={burst}, drift={drift}")
        self.num_rows, self.fit, self.salt = int(num_rows), fit, salt
        self.drift, self.burst, self.window, self.sorted_ids = drift, burst, window, sorted_ids
        self.num_drawn = start_at
        self.law = None if fit.uniform else ZipfMandelbrot(fit.a, fit.q, max(1, round(num_rows * fit.ranks_per_row)))
        self.generator = np.random.default_rng([seed, salt])
        self.multiplier, self.shift = _scatter(self.num_rows, salt)
        self.history = np.zeros(0, dtype=np.int64)

    def draw(self, n: int) -> np.ndarray:
        """(n,) int64 ids."""
        if self.law is None:
            ids = self.generator.integers(0, self.num_rows, n)
        else:
            ranks = self.law.draw(self.generator, n)
            if self.fit.default_share:
                ranks[self.generator.random(n) < self.fit.default_share] = 0
            ids = self.ids_of_ranks(ranks)
        if self.burst:
            ids = self._with_bursts(ids)
        self.num_drawn += n
        return ids

    def ids_of_ranks(self, ranks: np.ndarray) -> np.ndarray:
        """Where each rank (0 = hottest) lives now: fold, drift, scatter."""
        beyond = np.flatnonzero(ranks >= self.num_rows)
        row = ranks
        if len(beyond):
            row = ranks.copy()
            row[beyond] = (hash64(ranks[beyond], 1) % np.uint64(self.num_rows)).astype(np.int64)
        if self.drift:
            clock = self.drift * (self.num_drawn + np.arange(len(ranks))) / DRAWS_PER_DRIFT_EPOCH
            moves = np.floor(clock + unit_interval(hash64(ranks, 2 + self.salt))).astype(np.int64)
            moved = np.flatnonzero(moves > 0)
            row = row.copy()
            row[moved] = (hash64(ranks[moved] * 1_000_003 + moves[moved], 3) % np.uint64(self.num_rows)).astype(
                np.int64
            )
        return row if self.sorted_ids else (row * self.multiplier + self.shift) % self.num_rows

    def _with_bursts(self, fresh: np.ndarray) -> np.ndarray:
        """Position i repeats position i - lag with probability `burst`; chains are followed to their start."""
        known = len(self.history)
        joined = np.concatenate([self.history, fresh])
        source = np.arange(len(joined))
        repeats = known + np.flatnonzero(self.generator.random(len(fresh)) < self.burst)
        lag = np.exp(self.generator.random(len(repeats)) * math.log(self.window)).astype(np.int64)
        source[repeats] = np.maximum(repeats - np.maximum(lag, 1), 0)
        while True:
            further = source[source[repeats]]
            if np.array_equal(further, source[repeats]):
                break
            source[repeats] = further
        ids = joined[source]
        self.history = ids[-self.window :].copy()
        return ids[known:]


def _scatter(num_rows: int, salt: int) -> tuple[int, int]:
    """(multiplier, shift) of the bijection row -> (row * multiplier + shift) mod num_rows."""
    multiplier = int(num_rows * 0.6180339887498949) | 1
    while math.gcd(multiplier, num_rows) != 1:
        multiplier += 2 if num_rows % 2 == 0 else 1
    return multiplier % max(num_rows, 1) or 1, (salt * 7919 + 17) % num_rows
