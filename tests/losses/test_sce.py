"""SCE against a dense oracle."""

import pytest
import torch

from hf_rece.losses.cross_entropy import cross_entropy_loss
from hf_rece.losses.sce import sce_loss
from tests.oracles import assert_same_gradients, dense_logits, sce_losses


def test_equals_the_oracle_with_uncovered_tokens(inputs):
    hidden, weight, labels = inputs()
    labels[labels == 0] = 1
    directions = torch.randn(3, 6, dtype=torch.float64)
    wanted = sce_losses(
        dense_logits(hidden, weight), hidden, weight, labels, directions, 7, 9, excluded=[0]
    )
    loss = sce_loss(
        hidden,
        weight,
        labels,
        bucket_size_x=7,
        bucket_size_y=9,
        directions=directions,
        excluded_ids=[0],
        reduction="none",
    )
    assert (wanted == 0).any()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(loss, wanted, hidden, weight)


def test_mean_counts_covered_tokens(inputs):
    hidden, weight, labels = inputs()
    directions = torch.randn(2, 6, dtype=torch.float64)
    knobs = {"bucket_size_x": 5, "bucket_size_y": 9, "directions": directions}
    losses = sce_loss(hidden, weight, labels, **knobs, reduction="none")
    mean = sce_loss(hidden, weight, labels, **knobs)
    torch.testing.assert_close(mean, losses[losses != 0].mean())


def test_buckets_of_everything_are_full_cross_entropy(inputs):
    hidden, weight, labels = inputs()
    torch.testing.assert_close(
        sce_loss(hidden, weight, labels, n_buckets=2, bucket_size_x=999, bucket_size_y=999),
        cross_entropy_loss(hidden, weight, labels),
    )


def test_only_the_direction_of_the_centres_matters(inputs):
    hidden, weight, labels = inputs()
    directions = torch.randn(4, 6, dtype=torch.float64)
    one, other = (
        sce_loss(hidden, weight, labels, bucket_size_y=5, directions=scale * directions)
        for scale in (1, 7)
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mix", [True, False])
def test_the_generator_repeats_the_draw(mix, inputs):
    hidden, weight, labels = inputs()
    one, other = (
        sce_loss(
            hidden,
            weight,
            labels,
            mix=mix,
            bucket_size_y=5,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )
    assert one == other
