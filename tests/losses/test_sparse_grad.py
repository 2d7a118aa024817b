"""Row-sparse gradients are the dense ones, without the rows that are zero."""

import pytest
import torch

from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, build_loss
from hf_rece.losses.options import SPARSE_GRAD_LOSSES

C, D = 400, 5
KNOBS = {
    "sce": [{"n_buckets": 6, "bucket_size_y": 7}],
    "sampled_softmax": [
        {"n_negatives": 9},
        {"n_negatives": 9, "sampler": "log_uniform", "logq": True},
        {"n_negatives": 9, "sampler": "in_batch", "logq": True},
        {"n_negatives": 9, "shared_by": "sequence"},
    ],
    "bce": [{"n_negatives": 3}, {"n_negatives": 3, "shared_by": "sequence"}],
    "gbce": [{"n_negatives": 9}],
}
cases = pytest.mark.parametrize(
    ("name", "knobs"), [(name, knobs) for name in KNOBS for knobs in KNOBS[name]]
)


def problem(dtype=torch.float64):
    hidden = torch.randn(3, 4, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(C, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(C, dtype=dtype, requires_grad=True)
    labels = torch.randint(1, C, (3, 4))
    labels[0, :2] = -100
    return hidden, weight, bias, labels


def result(name, knobs, tensors, **common):
    hidden, weight, bias, labels = tensors
    loss = build_loss(name, **knobs, excluded_ids=[0, 7, C - 1], **common)
    generator = torch.Generator().manual_seed(3)
    value = loss(hidden, weight, labels.clamp(max=C - 2), bias=bias, generator=generator)
    return value, *torch.autograd.grad(value, (hidden, weight, bias))


@cases
def test_loss_and_gradients_are_the_dense_ones(name, knobs):
    tensors = problem()
    if (tensors[3] == 7).any():
        tensors[3][tensors[3] == 7] = 8
    dense = result(name, knobs, tensors)
    sparse = result(name, knobs, tensors, sparse_grad=True)
    assert sparse[2].is_sparse
    assert sparse[3].is_sparse
    assert sparse[2].coalesce().indices().shape[1] < C / 2
    for own, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(own.to_dense(), expected, rtol=1e-9, atol=1e-12)


@cases
def test_no_labelled_token_is_a_zero_loss_with_a_graph(name, knobs):
    hidden, weight, bias, labels = problem()
    value, _, grad_weight, _ = result(
        name, knobs, (hidden, weight, bias, torch.full_like(labels, -100)), sparse_grad=True
    )
    assert value == 0
    assert grad_weight.to_dense().abs().sum() == 0


def test_the_table_of_losses_says_which_take_it():
    assert set(KNOBS) == set(SPARSE_GRAD_LOSSES)
    for name in set(LOSSES) - set(SPARSE_GRAD_LOSSES):
        with pytest.raises(ArgumentError, match=f"sparse_grad.*{name} gives every row"):
            build_loss(name, sparse_grad=True)
        hidden, weight, _, labels = problem()
        with pytest.raises(ArgumentError, match="sparse_grad"):
            LOSSES[name].function(hidden, weight, labels, sparse_grad=True)


@pytest.mark.parametrize("make", [lambda w: w * 2, lambda w: LMAEmbedding(C, D, compression=4)])
def test_computed_rows_are_refused(make):
    hidden, weight, _, labels = problem(torch.float32)
    with pytest.raises(ArgumentError, match=r"sparse_grad.*computed"):
        build_loss("sce", sparse_grad=True)(hidden, make(weight), labels)


def test_bf16_weights_get_bf16_gradients():
    hidden, weight, bias, labels = problem(torch.bfloat16)
    grad = result("sampled_softmax", {}, (hidden, weight, bias, labels), sparse_grad=True)[2]
    assert grad.dtype == torch.bfloat16
