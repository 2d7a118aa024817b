"""RECE against a dense oracle that finds the candidates by brute force."""

import pytest
import torch

from hf_rece.losses.cross_entropy import cross_entropy_loss
from hf_rece.losses.rece import RECEConfig, n_buckets_for, rece_loss
from tests.oracles import assert_same_gradients, dense_logits, rece_candidates, softmax_over


@pytest.mark.parametrize("buckets_per_chunk", [1, 2])
@pytest.mark.parametrize("n_extra_chunks", [0, 1, 5])
@pytest.mark.parametrize("n_rounds", [1, 3])
def test_equals_the_oracle_on_ragged_chunks(buckets_per_chunk, n_extra_chunks, n_rounds, inputs):
    hidden, weight, labels = inputs(n_tokens=23, n_classes=41)
    labels[labels == 4] = 5
    directions = torch.randn(n_rounds, 8, 6, dtype=torch.float64)
    mask = rece_candidates(
        hidden, weight, directions, 8 // buckets_per_chunk, n_extra_chunks, excluded=[4]
    )
    wanted = softmax_over(dense_logits(hidden, weight), labels, mask)
    loss = rece_loss(
        hidden,
        weight,
        labels,
        buckets_per_chunk=buckets_per_chunk,
        n_extra_chunks=n_extra_chunks,
        directions=directions,
        excluded_ids=[4],
        reduction="none",
    )
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(loss, wanted, hidden, weight)


def test_a_duplicate_counted_twice_would_be_noticed(inputs):
    hidden, weight, labels = inputs()
    directions = torch.randn(1, 4, 6, dtype=torch.float64)
    once = rece_loss(hidden, weight, labels, directions=directions)
    twice = rece_loss(hidden, weight, labels, directions=directions.repeat(2, 1, 1))
    torch.testing.assert_close(once, twice)


def test_one_bucket_is_full_cross_entropy(inputs):
    hidden, weight, labels = inputs()
    torch.testing.assert_close(
        rece_loss(hidden, weight, labels, n_buckets=1),
        cross_entropy_loss(hidden, weight, labels),
    )


def test_is_a_lower_bound_that_rises_with_rounds(inputs):
    hidden, weight, labels = inputs(n_tokens=60, n_classes=200)
    directions = torch.randn(6, 20, 6, dtype=torch.float64)
    losses = [rece_loss(hidden, weight, labels, directions=directions[:r]) for r in range(1, 7)]
    losses.append(cross_entropy_loss(hidden, weight, labels))
    assert losses == sorted(losses)


def test_defaults_balance_the_buckets():
    assert n_buckets_for(RECEConfig(), 4096, 100_000) == 221
    assert n_buckets_for(RECEConfig(n_buckets=500), 30, 100) == 30


def test_directions_of_another_width_are_refused(inputs):
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"directions=\(2, 4, 5\)"):
        rece_loss(hidden, weight, labels, directions=torch.randn(2, 4, 5))
