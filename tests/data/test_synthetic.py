"""The synthetic log has structure to learn."""

import itertools
from collections import Counter, defaultdict

import polars as pl
import pytest

from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import temporal_split
from hf_rece.data.synthetic import generate_interactions
from hf_rece.errors import ArgumentError


@pytest.fixture(scope="module")
def sequences():
    log = generate_interactions(2000, 1000, seed=1)
    grouped = log.group_by("user_id", maintain_order=True).agg("item_id")
    return grouped["item_id"].to_list()


def test_one_seed_gives_one_log():
    assert generate_interactions(50, 90, seed=3).equals(generate_interactions(50, 90, seed=3))
    assert not generate_interactions(50, 90, seed=3).equals(generate_interactions(50, 90, seed=4))


def test_it_is_a_log_as_loaded():
    log = generate_interactions(50, 90)
    assert load_interactions(log).equals(log)


def test_popularity_is_skewed(sequences):
    counts = sorted(Counter(item for items in sequences for item in items).values(), reverse=True)
    assert sum(counts[: len(counts) // 10]) > 0.35 * sum(counts)


def test_the_last_item_tells_more_than_popularity(sequences):
    train, test = [items[:-1] for items in sequences], [items[-1] for items in sequences]
    popular = [item for item, _ in Counter(i for items in train for i in items).most_common(10)]
    successors = defaultdict(Counter)
    for items in train:
        for last, following in itertools.pairwise(items):
            successors[last][following] += 1
    by_popularity = sum(target in popular for target in test)
    by_transition = sum(
        target in [item for item, _ in successors[items[-1]].most_common(10)]
        for items, target in zip(train, test, strict=True)
    )
    assert by_transition > 2 * by_popularity > 0


def test_every_user_is_long_enough_to_hold_out(sequences):
    assert min(map(len, sequences)) >= 3
    assert 11 < sum(map(len, sequences)) / len(sequences) < 13


def test_time_runs_forward_and_spans_a_year():
    log = generate_interactions(500, 300)
    assert log.select((pl.col("timestamp").diff().over("user_id") >= 0).all()).item()
    assert log["timestamp"].max() - log["timestamp"].min() > 300 * 24 * 3600


def test_it_can_be_split_by_time():
    log = generate_interactions(500, 300)
    splits = temporal_split(log, ItemTokenizer.from_interactions(log))
    assert 10 < len(splits["test"]) < len(splits["train"])


@pytest.mark.parametrize(
    "knobs", [{"n_users": 0}, {"follow_probability": 1.2}, {"mean_length": 1.0}]
)
def test_bad_knobs_are_named(knobs):
    with pytest.raises(ArgumentError, match=next(iter(knobs))):
        generate_interactions(**knobs)
