"""Output rows: any object that answers the protocol serves every loss."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_rece.losses import LOSSES, build_loss
from hf_rece.ops.rows import DenseRows, OutputRows, as_output_rows
from hf_rece.ops.topk import streamed_topk


@dataclass(frozen=True)
class LowRankRows:
    """Rows W + B A, as an adapter makes them: no (C, D) matrix of the sum is ever made."""

    weight: Tensor
    left: Tensor
    right: Tensor

    @property
    def n_rows(self):
        return len(self.weight)

    @property
    def width(self):
        return self.weight.shape[1]

    def tensors(self):
        return (self.weight, self.left, self.right)

    def rows(self, ids):
        return self.weight[ids] + self.left[ids] @ self.right

    def add_grad(self, grads, ids, grad):
        DenseRows(self.weight).add_grad(grads[:1], ids, grad)
        DenseRows(self.left).add_grad(grads[1:2], ids, grad @ self.right.T)
        grads[2].add_(self.left[ids].T @ grad)


@pytest.fixture
def low_rank():
    shapes = ((40, 6), (40, 2), (2, 6))
    return LowRankRows(*(torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes))


def test_a_protocol_is_enough(low_rank):
    assert isinstance(low_rank, OutputRows)
    assert as_output_rows(low_rank) is low_rank


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tile_bytes", [1, None])
def test_gradients_reach_every_tensor_behind_the_rows(name, tile_bytes, low_rank, inputs):
    hidden, _, labels = inputs()
    loss = build_loss(name, tile_bytes=tile_bytes)
    composed = low_rank.weight + low_rank.left @ low_rank.right
    leaves = (hidden, *low_rank.tensors())
    results = []
    for weight in (low_rank, composed):
        value = loss(hidden, weight, labels, generator=torch.Generator().manual_seed(1))
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_top_k_reads_rows_alone(low_rank, inputs):
    hidden, _, _ = inputs()
    composed = (low_rank.weight + low_rank.left @ low_rank.right).detach()
    ours, dense = (streamed_topk(hidden.detach(), rows, 5) for rows in (low_rank, composed))
    assert torch.equal(ours[1], dense[1])
