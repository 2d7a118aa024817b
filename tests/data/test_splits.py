"""Held-out targets."""

import resource
import subprocess
import sys
import time

import polars as pl
import pytest

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
    from hf_rece.data.interactions import load_interactions

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
