"""The stratified loss estimates the exact one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.losses.cross_entropy import cross_entropy_loss
from hf_rece.losses.stratified import StratifiedConfig, n_groups_for, stratified_loss


def draw(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("knobs", [{"n_hard": 99}, {"n_hard": 5, "n_random": 99}])
def test_is_exact_when_a_stratum_holds_all_classes(knobs, inputs):
    hidden, weight, labels = inputs()
    labels[labels == 3] = 4
    torch.testing.assert_close(
        stratified_loss(hidden, weight, labels, excluded_ids=[3], **knobs),
        cross_entropy_loss(hidden, weight, labels, excluded_ids=[3]),
    )


@settings(max_examples=6, deadline=None)
@given(
    n_classes=st.integers(20, 90),
    n_hard=st.integers(1, 6),
    n_random=st.integers(8, 15),  # larger than S and y: a block that they cover stands for nothing
    n_groups=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_the_sum_of_exponentials_is_unbiased(n_classes, n_hard, n_random, n_groups, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(12, 4, dtype=torch.float64) / 4
    weight = torch.randn(n_classes, 4, dtype=torch.float64)
    labels = torch.randint(n_classes, (12,))
    knobs = {"n_hard": n_hard, "n_random": n_random, "n_groups": n_groups, "reduction": "none"}
    draws = torch.stack(
        [stratified_loss(hidden, weight, labels, generator=draw(i), **knobs) for i in range(300)]
    ).exp()  # one plus the ratio of the others' sum to the label's exponential
    wanted = cross_entropy_loss(hidden, weight, labels, reduction="none").exp()
    standard_error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - wanted).abs() <= 5.5 * standard_error + 1e-9).all()


def test_without_the_weight_of_the_rest_the_estimate_would_fall_short(inputs):
    hidden, weight, labels = inputs(n_tokens=64, n_classes=2000)
    exact = cross_entropy_loss(hidden, weight / 3, labels)
    estimate = stratified_loss(hidden, weight / 3, labels, n_hard=50, n_random=50)
    assert (estimate - exact).abs() < 0.1


def test_every_class_is_met_when_tokens_outnumber_blocks(inputs):
    hidden, weight, labels = inputs(n_tokens=64, n_classes=100)
    loss = stratified_loss(hidden, weight, labels, n_hard=4, n_random=4)
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad.abs().sum(1) > 0).all()


def test_fewer_tokens_than_blocks_still_meet_a_block_each(inputs):
    hidden, weight, labels = inputs(n_tokens=3, n_classes=500)
    loss = stratified_loss(hidden, weight, labels, n_hard=4, n_random=8, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    assert 3 * 8 <= (grad.abs().sum(1) > 0).sum() <= 3 * (4 + 8 + 1)


def test_the_gradient_points_where_the_exact_one_does(inputs):
    hidden, weight, labels = inputs(n_tokens=256, n_classes=4000, width=16)
    exact = torch.autograd.grad(cross_entropy_loss(hidden, weight / 3, labels), (hidden, weight))
    ours = torch.autograd.grad(
        stratified_loss(hidden, weight / 3, labels, n_hard=200, n_random=200), (hidden, weight)
    )
    for left, right in zip(ours, exact, strict=True):
        assert torch.cosine_similarity(left.flatten(), right.flatten(), dim=0) > 0.95


def test_small_catalogues_get_groups_of_few_tokens():
    config = StratifiedConfig()
    assert n_groups_for(config, n_tokens=4096, n_classes=1_000_000) == 256
    assert n_groups_for(config, n_tokens=1500, n_classes=12_000) == 384
    assert n_groups_for(config, n_tokens=1500, n_classes=1_000) == 1500
    assert n_groups_for(StratifiedConfig(n_groups=7), n_tokens=5, n_classes=1_000) == 5
