"""Rows that adapters make, against the dense matrices that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.embeddings.adapted_rows import (
    ReplacedRows,
    ScaledRows,
    SideBySideRows,
    low_rank_row_norms,
)
from hf_rece.ops.rows import DenseRows, OutputRows

C, D, E = 11, 3, 2
REPLACED = torch.tensor([2, 3, 9])


def leaf(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()


def side_by_side():
    left, right = leaf(C, D), leaf(C, E, seed=1)
    rows = SideBySideRows(DenseRows(left), DenseRows(right))
    return rows, torch.cat([left, right], 1)


def scaled():
    weight, scale = leaf(C, D), leaf(C, seed=1)
    return ScaledRows(DenseRows(weight), scale), weight * scale.unsqueeze(1)


def replaced():
    weight, replacement = leaf(C, D), leaf(len(REPLACED), D, seed=1)
    rows = ReplacedRows(DenseRows(weight), REPLACED, replacement)
    return rows, weight.index_copy(0, REPLACED, replacement)


def replaced_in_part():
    """Rows 3 and 10 are replaced over rows that are replaced already."""
    below, dense = replaced()
    chosen, replacement = torch.tensor([3, 10]), leaf(2, D, seed=2)
    rows = ReplacedRows(below, chosen, replacement)
    return rows, dense.index_copy(0, chosen, replacement)


def everything():
    """DoRA over trained tokens, as deep as the wrappers nest."""
    base, dense = replaced()
    right, scale = leaf(C, E, seed=3), leaf(C, seed=4)
    rows = ScaledRows(SideBySideRows(base, DenseRows(right)), scale)
    return rows, torch.cat([dense, right], 1) * scale.unsqueeze(1)


KINDS = (side_by_side, scaled, replaced, replaced_in_part, everything)
ids = st.lists(st.integers(0, C - 1), max_size=15).map(
    lambda chosen: torch.tensor(chosen, dtype=torch.long)
)
slices = st.tuples(st.integers(0, C), st.integers(0, C)).map(
    lambda ends: slice(min(ends), max(ends))
)
kinds = st.sampled_from(KINDS)
quickly = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_the_protocol(kind):
    rows, dense = kind()
    assert isinstance(rows, OutputRows)
    assert (rows.n_rows, rows.width) == dense.shape


@quickly
@given(kinds, ids | slices)
def test_rows_are_those_of_the_dense_matrix(kind, chosen):
    rows, dense = kind()
    assert torch.equal(rows.rows(chosen), dense[chosen])


@quickly
@given(kinds, slices)
def test_a_slice_reads_the_same_as_its_ids(kind, chosen):
    rows, _ = kind()
    assert torch.equal(rows.rows(chosen), rows.rows(torch.arange(C)[chosen]))


@quickly
@given(kinds, st.lists(ids | slices, min_size=1, max_size=3), st.data())
def test_gradients_add_up_to_those_of_autograd(kind, calls, data):
    rows, dense = kind()
    tensors = rows.tensors()
    wanted = [data.draw(st.booleans()) for _ in tensors]
    grads = tuple(
        torch.zeros_like(tensor) if wants else None
        for tensor, wants in zip(tensors, wanted, strict=True)
    )
    total = torch.zeros((), dtype=torch.float64)
    for number, chosen in enumerate(calls):
        grad = leaf(*dense[chosen].shape, seed=10 + number).detach()
        rows.add_grad(grads, chosen, grad)
        total = total + (dense[chosen] * grad).sum()
    for got, want in zip(grads, torch.autograd.grad(total, tensors), strict=True):
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [slice(1, 8), torch.tensor([3, 3, 9])])
def test_buffers_may_be_narrower_than_the_gradient(kind, chosen):
    rows, dense = kind()
    grad = leaf(*dense[chosen].shape).detach()
    narrow, wide = (
        tuple(torch.zeros_like(t, dtype=dtype) for t in rows.tensors())
        for dtype in (torch.float32, torch.float64)
    )
    rows.add_grad(narrow, chosen, grad)
    rows.add_grad(wide, chosen, grad)
    for got, want in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_norms_are_those_of_the_sum(rows_at_once, monkeypatch):
    monkeypatch.setattr("hf_rece.embeddings.adapted_rows._ROWS_AT_ONCE", rows_at_once)
    base, left, right = leaf(C, D), leaf(C, E, seed=1), leaf(E, D, seed=2)
    found = low_rank_row_norms(DenseRows(base), left, right)
    torch.testing.assert_close(found, (base + left @ right).norm(dim=1).detach())
