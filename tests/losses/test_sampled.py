"""Sampled losses against dense oracles that are told which classes were drawn."""

import pytest
import torch

from hf_rece.losses.cross_entropy import cross_entropy_loss
from hf_rece.losses.sampled import bce_loss, gbce_loss, sampled_softmax_loss
from hf_rece.ops.plans.sampled import draw_negatives
from tests.oracles import assert_same_gradients, binary_losses, dense_logits, sampled_softmax_losses


def seeded():
    return torch.Generator().manual_seed(3)


def drawn(labels, sampler, n_negatives, n_draws=1, logq=False):
    return draw_negatives(
        labels,
        40,
        n_negatives=n_negatives,
        sampler=sampler,
        n_draws=n_draws,
        logq=logq,
        excluded_ids=torch.tensor([0]),
        generator=seeded(),
    )


@pytest.mark.parametrize("shared_by", ["batch", "sequence"])
@pytest.mark.parametrize("sampler", ["uniform", "log_uniform"])
@pytest.mark.parametrize("logq", [False, True])
def test_sampled_softmax_equals_the_oracle(shared_by, sampler, logq, inputs):
    hidden, weight, labels = inputs()
    labels = labels.clamp(min=1)
    n_draws, per_draw = (4, 6) if shared_by == "sequence" else (1, 24)
    negatives = drawn(labels, sampler, 9, n_draws, logq)
    classes = negatives.classes.repeat_interleave(per_draw, 0)
    weights = negatives.log_weight
    if weights is not None:
        weights = weights.exp().double().repeat_interleave(per_draw, 0)
    wanted = sampled_softmax_losses(dense_logits(hidden, weight), labels, classes, weights)
    loss = sampled_softmax_loss(
        hidden.view(4, 6, 6),
        weight,
        labels.view(4, 6),
        n_negatives=9,
        sampler=sampler,
        shared_by=shared_by,
        logq=logq,
        excluded_ids=[0],
        generator=seeded(),
        reduction="none",
    )
    torch.testing.assert_close(loss.view(-1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_function", [bce_loss, gbce_loss])
def test_binary_losses_equal_the_oracle(loss_function, inputs):
    hidden, weight, labels = inputs()
    labels = labels.clamp(min=1)
    classes = drawn(labels, "uniform", 7).classes.repeat_interleave(24, 0)
    alpha, t = 7 / (39 - 1), 0.75
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha) if loss_function is gbce_loss else 1.0
    wanted = binary_losses(dense_logits(hidden, weight), labels, classes, beta)
    loss = loss_function(
        hidden,
        weight,
        labels,
        n_negatives=7,
        excluded_ids=[0],
        generator=seeded(),
        reduction="none",
    )
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(loss, wanted, hidden, weight)


def test_gbce_without_calibration_is_bce(inputs):
    hidden, weight, labels = inputs()
    torch.testing.assert_close(
        gbce_loss(hidden, weight, labels, n_negatives=5, t=0.0, generator=seeded()),
        bce_loss(hidden, weight, labels, n_negatives=5, generator=seeded()),
    )


@pytest.mark.parametrize("sampler", ["uniform", "log_uniform"])
def test_logq_makes_the_sum_of_exponentials_unbiased(sampler, inputs):
    hidden, weight, labels = inputs()
    loss = sampled_softmax_loss(
        hidden, weight, labels, n_negatives=200_000, sampler=sampler, logq=True
    )
    torch.testing.assert_close(loss, cross_entropy_loss(hidden, weight, labels), rtol=0.01, atol=0)


def test_log_uniform_draws_by_rank(inputs):
    _, _, labels = inputs()
    classes = drawn(labels, "log_uniform", 100_000).classes
    share = torch.bincount(classes.view(-1), minlength=40) / 100_000
    ranks = torch.arange(39)
    wanted = ((ranks + 2) / (ranks + 1)).log() / torch.tensor(40.0).log()
    assert share[0] == 0
    torch.testing.assert_close(share[1:], wanted, atol=0.005, rtol=0)


def test_in_batch_negatives_are_the_other_labels(inputs):
    hidden, weight, labels = inputs(n_tokens=12)
    logits = dense_logits(hidden, weight)
    wanted = sampled_softmax_losses(logits, labels, labels.expand(12, 12))
    loss = sampled_softmax_loss(
        hidden, weight, labels, sampler="in_batch", n_negatives=12, reduction="none"
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_in_batch_with_logq_weighs_each_class_once(inputs):
    hidden, weight, labels = inputs(n_tokens=30, n_classes=10)
    logits = dense_logits(hidden, weight)
    distinct = labels.unique().expand(30, -1)
    loss = sampled_softmax_loss(
        hidden, weight, labels, sampler="in_batch", n_negatives=30, logq=True, reduction="none"
    )
    torch.testing.assert_close(
        loss, sampled_softmax_losses(logits, labels, distinct), rtol=1e-5, atol=1e-6
    )


def test_sequences_draw_their_own_negatives(inputs):
    hidden, weight, _ = inputs()
    same = hidden.detach()[:1].expand(24, 6).reshape(4, 6, 6)
    losses = sampled_softmax_loss(
        same,
        weight,
        torch.ones(4, 6, dtype=torch.long),
        n_negatives=5,
        shared_by="sequence",
        reduction="none",
    )
    assert all(len(row.unique()) == 1 for row in losses)
    assert len(losses[:, 0].unique()) == 4


def test_negatives_by_sequence_need_sequences(inputs):
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"labels=\(24,\).*shape \(B, T\)"):
        sampled_softmax_loss(hidden, weight, labels, shared_by="sequence")
