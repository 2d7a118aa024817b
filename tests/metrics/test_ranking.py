"""Ranking metrics against brute force over the orders of ties."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.metrics import ranking
from hf_rece.metrics.ranking import (
    coverage_at_k,
    hit_rate_at_k,
    mrr_at_k,
    ndcg_at_k,
    ranking_metrics,
    recall_at_k,
)

GAINS = {
    ndcg_at_k: lambda rank: 1 / np.log2(rank + 1),
    hit_rate_at_k: lambda rank: 1.0,
    recall_at_k: lambda rank: 1.0,
    mrr_at_k: lambda rank: 1 / rank,
}
counts = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8)
every_metric = pytest.mark.parametrize("metric", GAINS, ids=lambda metric: metric.__name__)


@every_metric
@given(counts=counts, k=st.integers(1, 40))
def test_equals_the_mean_over_all_orders_of_ties(metric, counts, k):
    wanted = np.mean(
        [
            np.mean(
                [
                    GAINS[metric](rank) if rank <= k else 0.0
                    for rank in range(greater + 1, greater + tied + 2)
                ]
            )
            for greater, tied in counts
        ]
    )
    greater, tied = map(list, zip(*counts, strict=True))
    assert metric(greater, tied, k) == pytest.approx(wanted)


@every_metric
@given(counts=counts, k=st.integers(1, 30))
def test_lies_in_0_1_and_grows_with_k(metric, counts, k):
    greater, tied = map(list, zip(*counts, strict=True))
    small, large = metric(greater, tied, k), metric(greater, tied, k + 1)
    assert 0 <= small <= large <= 1 + 1e-12


def test_a_constant_model_is_at_chance():
    assert hit_rate_at_k([0] * 5, [99] * 5, 10) == pytest.approx(0.1)


def test_examples_of_the_documentation_hold():
    assert doctest.testmod(ranking) == (0, 4)


def test_coverage_ignores_missing_entries():
    assert coverage_at_k([[3, -1], [3, 4]], n_items=10, k=2) == pytest.approx(0.2)


def test_names_are_the_usual_ones():
    metrics = ranking_metrics([0], [0], ks=[10], topk_ids=[list(range(10))], n_items=20)
    assert metrics == {"ndcg@10": 1, "hr@10": 1, "recall@10": 1, "mrr@10": 1, "coverage@10": 0.5}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ndcg_at_k([0], [0], 0), "k=0"),
        (lambda: ndcg_at_k([], [], 5), "greater"),
        (lambda: ndcg_at_k([0, 1], [0], 5), "tied"),
        (lambda: ndcg_at_k([-1], [0], 5), "greater"),
        (lambda: ndcg_at_k([0.5], [0], 5), "greater"),
        (lambda: coverage_at_k([[1]], 10, 2), "topk_ids"),
        (lambda: coverage_at_k([[1]], 0, 1), "n_items"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ArgumentError, match=name):
        call()
