"""Held-out targets."""

import resource
import subprocess
import sys
import time

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split, temporal_split
from hf_rece.errors import ArgumentError, DataError


def log(sequences, start=None):
    """A log of users 0, 1, ... whose items come one time unit after another."""
    rows = [
        (user, item, (0 if start is None else start[user]) + step)
        for user, items in enumerate(sequences)
        for step, item in enumerate(items)
    ]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def decoded(part, tokenizer):
    return {
        row["user_id"]: tokenizer.convert_ids_to_items(row["item_ids"])
        + tokenizer.convert_ids_to_items([row["target_id"]] if "target_id" in row else [])
        for row in part
    }


def test_leave_one_out_holds_out_the_last_two():
    interactions = log([["a", "b", "c", "d"], ["d", "c"], ["a"], ["c", "b", "a"]])
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = leave_one_out_split(interactions, tokenizer)
    assert decoded(splits["train"], tokenizer) == {0: ["a", "b"], 1: ["d", "c"]}
    assert decoded(splits["validation"], tokenizer) == {0: ["a", "b", "c"], 3: ["c", "b"]}
    assert decoded(splits["test"], tokenizer) == {0: ["a", "b", "c", "d"], 3: ["c", "b", "a"]}


def test_temporal_takes_late_users_out_of_training():
    interactions = log([[1, 2, 3], [4, 5, 6], [7, 8, 9]], start=[0, 5, 90])
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = temporal_split(interactions, tokenizer, quantile=0.7)
    assert decoded(splits["train"], tokenizer) == {0: [1, 2, 3], 1: [4, 5, 6]}
    assert decoded(splits["validation"], tokenizer) == {2: [7, 8]}
    assert decoded(splits["test"], tokenizer) == {2: [7, 8, 9]}


def test_temporal_tells_times_apart_that_floats_do_not():
    """Nanoseconds since 1970 do not fit a float64."""
    now = 1_700_000_000_000_000_000
    interactions = log([[1, 2, 3], [4, 5, 6]], start=[now, now + 3])
    splits = temporal_split(
        interactions, ItemTokenizer.from_interactions(interactions), quantile=0.7
    )
    assert splits["train"]["user_id"][:] == [0]
    assert splits["test"]["user_id"][:] == [1]


def test_the_order_of_the_table_does_not_matter():
    interactions = log([["a", "b", "c", "d"], ["d", "c", "a"], ["c", "b", "a"]])
    tokenizer = ItemTokenizer.from_interactions(interactions)
    wanted = leave_one_out_split(interactions, tokenizer)["test"].to_list()
    shuffled = interactions.sample(fraction=1, shuffle=True, seed=1)
    assert not shuffled.equals(interactions)
    assert leave_one_out_split(shuffled, tokenizer)["test"].to_list() == wanted


@pytest.mark.parametrize(
    ("items", "dtype"),
    [([3, 1, 2], pl.Int8), ([2**64 - 1, 1, 2], pl.UInt64), (["ä", "", " "], None)],
)
def test_ids_of_every_dtype_are_encoded(items, dtype):
    # Another log taught the tokenizer 1000, which Int8 cannot hold.
    known = items if isinstance(items[0], str) else [*items, 1000]
    tokenizer = ItemTokenizer(items=known)
    interactions = log([range(3), range(3)]).with_columns(item_id=pl.Series(items * 2, dtype=dtype))
    with_two = pl.concat([interactions, interactions.with_columns(pl.col("timestamp") + 3)])
    splits = leave_one_out_split(with_two, tokenizer)
    assert decoded(splits["test"], tokenizer) == {0: items * 2, 1: items * 2}


def test_integers_of_a_smaller_file_match_the_strings_of_the_log_trained_on():
    # A CSV file with an item 007 has string ids; a part of it without that item has integers.
    tokenizer = ItemTokenizer(items=["007", "7", "8"])
    splits = leave_one_out_split(log([[7, 8, 7, 8]]), tokenizer)
    assert decoded(splits["test"], tokenizer) == {0: ["7", "8", "7", "8"]}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=6).filter(
        lambda sequences: max(map(len, sequences)) >= 4
    )
)
def test_each_interaction_of_a_long_user_is_a_target_or_trained_on_once(sequences):
    interactions = log(sequences)
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = leave_one_out_split(interactions, tokenizer)
    train, validation, test = (decoded(splits[name], tokenizer) for name in splits)
    for user, items in enumerate(sequences):
        if len(items) >= 3:
            assert test[user] == items
            assert validation[user] == items[:-1]
            assert train.get(user, items[:-2]) == items[:-2]
            assert (user in train) == (len(items) >= 4)
        else:
            assert user not in validation
            assert user not in test
            assert (user in train) == (len(items) == 2)


def test_real_temporal_users_are_in_one_part_only(shared):
    interactions = load_interactions(shared / "data" / "yelp2019_kcgn.parquet")
    splits = temporal_split(interactions, ItemTokenizer.from_interactions(interactions))
    train, test = set(splits["train"]["user_id"]), set(splits["test"]["user_id"])
    point = interactions["timestamp"].quantile(0.95, "lower")
    late = interactions.filter(pl.col("timestamp") > point)["user_id"].unique()
    assert not train & test
    assert test <= set(late)
    assert not train & set(late)
    assert splits["validation"]["user_id"] == splits["test"]["user_id"]


def test_users_too_short_to_hold_out_leave_nothing():
    interactions = log([["a", "b"], ["b"]])
    with pytest.raises(DataError, match=r"no sequence for test.*three interactions"):
        leave_one_out_split(interactions, ItemTokenizer.from_interactions(interactions))


def test_an_item_unknown_to_the_tokenizer_is_refused():
    with pytest.raises(DataError, match="1 users have items"):
        leave_one_out_split(log([["a", "b", "c"]]), ItemTokenizer(items=["a", "b"]))


def test_the_quantile_lies_between_0_and_1():
    interactions = log([["a", "b", "c"]])
    with pytest.raises(ArgumentError, match=r"quantile=1.5"):
        temporal_split(interactions, ItemTokenizer.from_interactions(interactions), quantile=1.5)


def test_beauty_has_the_published_size(shared):
    interactions = load_interactions(shared / "data" / "amazon_beauty.parquet")
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = leave_one_out_split(interactions, tokenizer)
    assert (len(tokenizer) - 1, len(splits["test"])) == (12101, 22363)
    assert sum(len(row["item_ids"]) for row in splits["train"]) == 198502 - 2 * 22363


_TWENTY_MILLION = """
import numpy as np, polars as pl
from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
random = np.random.default_rng(0)
n = 20_000_000
frame = pl.DataFrame({"user_id": random.integers(500_000, size=n, dtype=np.int32),
    "item_id": random.integers(200_000, size=n, dtype=np.int32),
    "timestamp": random.integers(10**9, size=n)})
log = load_interactions(frame)
del frame
splits = leave_one_out_split(log, ItemTokenizer.from_interactions(log))
assert len(splits["test"]) == 500_000
"""


@pytest.mark.slow
def test_twenty_million_interactions_in_a_minute_and_four_gib():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _TWENTY_MILLION], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"20 million interactions: {seconds:.0f} s, {peak:.1f} GiB")
    assert seconds < 60
    assert peak < 4
