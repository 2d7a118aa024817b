import pytest
import torch
from torch.nn import functional as F

from hf_rece.errors import ArgumentError
from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import DenseRows


def test_equals_an_embedding_and_its_gradient():
    weight = torch.randn(9, 4, requires_grad=True)
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    direction = torch.randn(2, 3, 4)
    own, dense = lookup(DenseRows(weight), ids), F.embedding(ids, weight)
    assert torch.equal(own, dense)
    (left,) = torch.autograd.grad((own * direction).sum(), weight)
    (right,) = torch.autograd.grad((dense * direction).sum(), weight)
    torch.testing.assert_close(left, right)


def test_passes_gradcheck():
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([4, 4, 0])
    assert torch.autograd.gradcheck(lambda w: lookup(DenseRows(w), ids), (weight,))


def test_no_ids_give_no_rows():
    assert lookup(DenseRows(torch.randn(5, 3)), torch.empty(2, 0, dtype=torch.long)).shape == (
        2,
        0,
        3,
    )


def test_gradients_of_half_precision_add_up_in_single():
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    lookup(DenseRows(weight), torch.zeros(1000, dtype=torch.long)).sum().backward()
    assert weight.grad.item() == 1000  # bfloat16 alone stops at 256


def test_frozen_rows_give_no_graph():
    assert not lookup(DenseRows(torch.randn(5, 3)), torch.tensor([1])).requires_grad


@pytest.mark.parametrize("wrong", [-1, 5])
def test_ids_out_of_range_are_named(wrong):
    with pytest.raises(ArgumentError, match=r"input_ids=.*the table has 5 rows.*from 0 to 4"):
        lookup(DenseRows(torch.randn(5, 3)), torch.tensor([2, wrong]))
