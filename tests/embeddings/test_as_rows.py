"""Output layers as rows: what is read, and what is refused by name."""

import pytest
import torch
from torch import nn

from hf_rece import ArgumentError
from hf_rece.embeddings.as_rows import as_rows


def logits_of(terms):
    logits = terms.hidden @ terms.rows.rows(slice(0, terms.rows.n_rows)).T
    return logits if terms.bias is None else logits + terms.bias


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_read_with_its_bias(bias):
    layer, hidden = nn.Linear(4, 9, bias=bias), torch.randn(2, 3, 4)
    terms = as_rows(layer, hidden)
    torch.testing.assert_close(logits_of(terms), layer(hidden))
    assert (terms.bias is None) == (not bias)


def test_an_embedding_is_read_by_its_table():
    layer, hidden = nn.Embedding(9, 4), torch.randn(3, 4)
    torch.testing.assert_close(logits_of(as_rows(layer, hidden)), hidden @ layer.weight.T)


def test_the_rows_are_the_parameter_itself():
    layer = nn.Linear(4, 9)
    (weight,) = as_rows(layer, torch.randn(3, 4)).rows.tensors()
    assert weight is layer.weight


def test_a_weight_that_is_computed_is_read_with_its_gradient():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 9))
    hidden = torch.randn(3, 4)
    logits_of(as_rows(layer, hidden)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


class Scaled(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 2


def quantised():
    layer = nn.Linear(4, 9)
    layer.weight = nn.Parameter(torch.zeros(9, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Scaled(4, 9), r"test_as_rows\.Scaled"),
        (nn.Sequential(nn.Linear(4, 9)), r"container\.Sequential"),
        (nn.Identity(), r"Identity"),
        (nn.Bilinear(4, 4, 9), r"Bilinear"),
        (quantised(), r"quantised \(torch\.int8\)"),
    ],
)
def test_a_layer_that_is_not_known_is_refused_by_name(layer, named):
    with pytest.raises(ArgumentError, match=named):
        as_rows(layer, torch.randn(3, 4))
