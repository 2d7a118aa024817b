"""Exact cross-entropy equals torch's."""

import torch
from torch.nn import functional as F

from hf_rece.losses.cross_entropy import cross_entropy_loss
from tests.oracles import dense_logits


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_equals_torch_with_bias_scale_softcap_and_excluded(inputs):
    hidden, weight, labels = inputs()
    labels[labels == 0] = 1
    bias = torch.randn(40, dtype=torch.float64, requires_grad=True)
    logits = dense_logits(hidden, weight, bias, logit_scale=0.7, logit_softcap=3.0)
    wanted = F.cross_entropy(logits[:, 1:], labels - 1)
    loss = cross_entropy_loss(
        hidden, weight, labels, bias=bias, logit_scale=0.7, logit_softcap=3.0, excluded_ids=[0]
    )
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(
        grads(loss, hidden, weight, bias), grads(wanted, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_large_logits_do_not_overflow():
    hidden = torch.full((2, 4), 300.0)
    weight = torch.stack([torch.full((4,), 300.0), torch.full((4,), -300.0)])
    loss = cross_entropy_loss(hidden, weight, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 720_000.0]))


def test_error_is_no_larger_than_the_dense_loss_in_float32(inputs):
    hidden, weight, labels = inputs(n_tokens=64, n_classes=5000, width=32)
    exact = F.cross_entropy(hidden @ weight.T, labels)
    single = [tensor.detach().float() for tensor in (hidden, weight)]
    dense = F.cross_entropy(single[0] @ single[1].T, labels)
    streamed = cross_entropy_loss(*single, labels, tile_bytes=100_000)
    assert (streamed - exact).abs() <= (dense - exact).abs() + 1e-5
