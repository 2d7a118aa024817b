"""TokenStatistics against the dense softmax over what each loss scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.losses import build_loss
from hf_rece.ops.stream import TokenStatistics

# Each scores every class, so that the dense softmax is the answer.
EXACT = {
    "cross_entropy": {},
    "rece": {"n_buckets": 1},
    "sce": {"n_buckets": 1, "bucket_size_x": 24, "bucket_size_y": 40},
    "stratified": {"n_hard": 40},
}


def statistics_of(name, tensors, **knobs):
    noted = TokenStatistics()
    build_loss(name, **knobs)(*tensors, statistics=noted)
    return noted


def dense_entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tile_bytes", [None, 1])
def test_losses_over_all_classes_note_the_exact_entropy_and_accuracy(inputs, name, tile_bytes):
    hidden, weight, labels = inputs()
    noted = statistics_of(name, (hidden, weight, labels), tile_bytes=tile_bytes, **EXACT[name])
    logits = (hidden @ weight.T).detach()
    torch.testing.assert_close(noted.entropy, dense_entropy(logits).float())
    assert noted.is_top1.tolist() == (logits.argmax(1) == labels).tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.1, 30), cap=st.one_of(st.none(), st.just(5.0)))
def test_shaped_logits_have_the_entropy_of_their_softmax(seed, scale, cap):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 4, generator=draw, dtype=torch.float64) for n in (9, 70))
    bias = torch.randn(70, generator=draw, dtype=torch.float64)
    labels = torch.randint(70, (9,), generator=draw)
    noted = statistics_of(
        "cross_entropy",
        (hidden, weight, labels),
        bias=bias,
        logit_scale=scale,
        logit_softcap=cap,
        tile_bytes=1,
    )
    logits = (hidden @ weight.T + bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(noted.entropy, dense_entropy(logits).float(), rtol=1e-4, atol=1e-5)


def test_tokens_without_a_label_have_none_of_it(inputs):
    hidden, weight, labels = inputs()
    labels[::3] = -100
    noted = statistics_of("cross_entropy", (hidden.view(4, 6, -1), weight, labels.view(4, 6)))
    assert noted.entropy.shape == noted.is_top1.shape == (4, 6)
    assert noted.entropy.view(-1)[::3].abs().max() == 0
    assert not noted.is_top1.view(-1)[::3].any()


@pytest.mark.parametrize("logq", [False, True])
def test_a_sampled_softmax_notes_the_entropy_of_its_sample(inputs, logq):
    hidden, weight, labels = inputs()
    knobs = {"n_negatives": 7, "logq": logq, "generator": torch.Generator().manual_seed(1)}
    noted = statistics_of("sampled_softmax", (hidden, weight, labels), **knobs)
    # At most eight classes are scored; with logq they stand for all forty.
    assert 0 < float(noted.entropy.max()) < torch.tensor(40.0 if logq else 8.0).log()


def test_the_stratified_entropy_estimates_the_exact_one():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 8, generator=draw), torch.randn(2000, 8, generator=draw) / 3
    labels = torch.randint(2000, (64,), generator=draw)
    noted = statistics_of(
        "stratified", (hidden, weight, labels), n_hard=64, n_random=256, generator=draw
    )
    exact = dense_entropy(hidden @ weight.T)
    assert float((noted.entropy - exact).mean().abs()) < 0.05
    assert float((noted.entropy - exact).abs().max()) < 0.5


def test_binary_losses_have_no_entropy(inputs):
    noted = statistics_of("gbce", inputs(), n_negatives=5)
    assert noted.entropy.isnan().all()


def test_noting_does_not_change_the_loss_or_its_gradients(inputs):
    hidden, weight, labels = inputs()
    plain, noting = (
        build_loss("stratified", n_hard=8, n_random=8)(
            hidden, weight, labels, generator=torch.Generator().manual_seed(0), statistics=noted
        )
        for noted in (None, TokenStatistics())
    )
    assert plain == noting
    for left, right in zip(
        torch.autograd.grad(plain, (hidden, weight)),
        torch.autograd.grad(noting, (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_log_weights_break_no_ties():
    # Capped so low that all logits are equal, whatever log-weights are added to some of them.
    tensors = torch.ones(1, 1), torch.tensor([[2.0], [3.0], [1.0]]), torch.tensor([2])
    options = {"n_negatives": 300, "logq": True, "logit_softcap": 0.01}
    assert statistics_of("sampled_softmax", tensors, **options).is_top1.all()
