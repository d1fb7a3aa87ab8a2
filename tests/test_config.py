"""FreqCacheConfig: settings are checked once, and give the slots and the ceiling.

python -m pytest tests/test_config.py
"""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_freqcache import FreqAwareEmbeddingBag, FreqCacheConfig

SIZES = {  # settings -> (slots, ceiling) for 1,000 rows of 100 bytes
    "nothing: 1.5 %, four times that on a CPU": ({}, (15, 60)),
    "a ratio": ({"cache_ratio": 0.1}, (100, 400)),
    "a ratio rounds down": ({"cache_ratio": 0.0029}, (2, 8)),
    "at least one slot": ({"cache_ratio": 1e-9}, (1, 4)),
    "all rows": ({"cache_ratio": 1.0}, (1000, 1000)),
    "all rows, as an int": ({"cache_ratio": 1}, (1000, 1000)),
    "slots": ({"num_slots": 7}, (7, 28)),
    "more slots than rows": ({"num_slots": 5000}, (1000, 1000)),
    "no growth beyond the rows": ({"num_slots": 300}, (300, 1000)),
    "bytes alone are the size too": ({"max_cache_bytes": 4250}, (42, 42)),
    "bytes for more than all rows": ({"max_cache_bytes": 10**9}, (1000, 1000)),
    "bytes as the ceiling of slots": ({"num_slots": 10, "max_cache_bytes": 2500}, (10, 25)),
    "bytes as the ceiling of a ratio": ({"cache_ratio": 0.01, "max_cache_bytes": 10**9}, (10, 1000)),
    "bytes that are exactly the slots: no growth": ({"num_slots": 10, "max_cache_bytes": 1000}, (10, 10)),
}


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    settings, expected = SIZES[name]
    assert FreqCacheConfig(**settings).size_in_slots(1000, 100) == expected


@given(
    st.integers(1, 10**9),
    st.integers(1, 4096),
    st.one_of(
        st.none(),
        st.floats(0, 1, exclude_min=True).map(lambda ratio: {"cache_ratio": ratio}),
        st.integers(1, 10**9).map(lambda slots: {"num_slots": slots}),
    ),
    st.one_of(st.none(), st.integers(4096, 10**12)),
)
def test_sizes_stay_within_rows_and_bytes(num_rows, row_bytes, size, max_cache_bytes):
    """1 <= slots <= ceiling <= rows, and neither passes the bytes."""
    config = FreqCacheConfig(**(size or {}), max_cache_bytes=max_cache_bytes)
    slots, ceiling = config.size_in_slots(num_rows, row_bytes)
    assert 1 <= slots <= ceiling <= num_rows
    assert max_cache_bytes is None or ceiling * row_bytes <= max_cache_bytes


def test_bytes_for_less_than_a_row_are_refused_with_the_row():
    with pytest.raises(ValueError, match=r"max_cache_bytes=99 .* 100 bytes.*at least 100"):
        FreqCacheConfig(max_cache_bytes=99).size_in_slots(1000, 100)


def test_slots_that_the_bytes_do_not_hold_are_refused_or_at_least_told():
    """num_slots=50 and bytes for 10: whoever asked for 50 slots must hear that there are 10."""
    with pytest.raises((ValueError, UserWarning), match=r"50.*1000|1000.*50"):
        FreqAwareEmbeddingBag(1000, 25, num_slots=50, max_cache_bytes=1000)


BAD = [
    ("cache_ratio", 0.0),
    ("cache_ratio", 1.0000001),
    ("cache_ratio", -1),
    ("cache_ratio", float("nan")),
    ("cache_ratio", float("inf")),
    ("cache_ratio", True),
    ("cache_ratio", "0.1"),
    ("num_slots", 0),
    ("num_slots", -5),
    ("num_slots", 2.0),
    ("num_slots", True),
    ("max_cache_bytes", 0),
    ("max_cache_bytes", -1),
    ("max_cache_bytes", 1e6),
    ("warmup_ratio", -0.1),
    ("warmup_ratio", 1.5),
    ("warmup_ratio", None),
    ("warmup_ratio", float("nan")),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_value_is_named_with_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=f"^{field}={re.escape(repr(value))} is not allowed: ."):
        FreqCacheConfig(**{field: value})


def test_numpy_numbers_are_numbers():
    """Sizes are often computed."""
    assert FreqCacheConfig(cache_ratio=np.float64(0.1)).size_in_slots(1000, 4) == (100, 400)
    assert FreqCacheConfig(cache_ratio=np.float32(0.5)).size_in_slots(1000, 4) == (500, 1000)
    assert FreqCacheConfig(num_slots=np.int64(5)).size_in_slots(1000, 4) == (5, 20)
    assert FreqCacheConfig(max_cache_bytes=np.int32(400)).size_in_slots(1000, 4) == (100, 100)


def test_two_sizes_contradict():
    with pytest.raises(ValueError, match=r"cache_ratio=0\.1 and num_slots=5"):
        FreqCacheConfig(cache_ratio=0.1, num_slots=5)


def test_a_config_is_frozen_and_compares_by_value():
    config = FreqCacheConfig(num_slots=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_slots = 6
    assert config == FreqCacheConfig(num_slots=5) != FreqCacheConfig(num_slots=6)
    with pytest.raises(ValueError, match="num_slots=0"):
        dataclasses.replace(config, num_slots=0)


def test_an_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="cache_rate"):
        FreqCacheConfig(cache_rate=0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, (64, 1)), ({"window": 0}, (0, 0)), ({"window": 16, "depth": 4}, (16, 4)), ({"depth": 0}, (64, 0))],
)
def test_what_is_known_and_admitted_ahead(settings, expected):
    assert FreqCacheConfig(**settings).window_and_depth() == expected


def test_no_more_is_admitted_ahead_than_known():
    with pytest.raises(ValueError, match="depth=3 is not allowed: at most window=2"):
        FreqCacheConfig(window=2, depth=3)


@pytest.mark.parametrize(
    ("field", "value"), [("sharding", "diagonal"), ("depth", -1), ("depth", True), ("window", -1), ("window", 1.5)]
)
def test_settings_of_several_ranks_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is not allowed"):
        FreqCacheConfig(**{field: value})


def test_a_section_lists_the_known_names_where_one_is_unknown():
    with pytest.raises(ValueError, match=r"my file: unknown 'cache_rate' \(did you mean 'cache_ratio'\?\); known are"):
        FreqCacheConfig.from_dict({"cache_rate": 0.1}, "my file")
    with pytest.raises(ValueError, match="freq_cache is a list"):
        FreqCacheConfig.from_dict([0.1])
    assert FreqCacheConfig.from_dict({"num_slots": 3, "sharding": "row"}) == FreqCacheConfig(
        num_slots=3, sharding="row"
    )


def test_bag_keywords_are_what_a_bag_takes():
    config = FreqCacheConfig(num_slots=3, sharding="row", depth=1, optimizer="adagrad")
    assert config.bag_keywords() == {
        "num_slots": 3,
        "warmup_ratio": 1.0,
        "optimizer": "adagrad",
        "store": "ram",
        "kernels": "auto",
        "rounding_seed": 0,
    }
    FreqAwareEmbeddingBag(10, 2, **config.bag_keywords())


@pytest.mark.parametrize(
    ("warmup_ratio", "with_counts", "expected"), [(1.0, True, 20), (0.5, True, 10), (0.0, True, 0), (1.0, False, 0)]
)
def test_warmup_fills_its_share_of_the_slots_with_the_most_frequent_rows(warmup_ratio, with_counts, expected):
    """Where the counts are known; it is neither a miss nor a fetch."""
    counts = np.arange(100) if with_counts else None
    bag = FreqAwareEmbeddingBag(100, 2, num_slots=20, warmup_ratio=warmup_ratio, ids_freq_mapping=counts)
    ids = bag._cache.slots.id_of_slot.numpy()
    assert sorted(ids[ids >= 0].tolist()) == list(range(100 - expected, 100))
    assert bag.stats.misses == bag.stats.rows_fetched == bag.stats.bytes_fetched == 0
    bag._cache.check()
