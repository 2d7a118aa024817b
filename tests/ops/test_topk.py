"""Streamed top-k and ranks against dense ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.ops.topk import label_rank, streamed_topk


def problem(n_tokens, n_classes, width, seed):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n_tokens, width, generator=draw),
        torch.randn(n_classes, width, generator=draw),
        torch.randn(n_classes, generator=draw),
        torch.randint(-1, n_classes, (n_tokens, 5), generator=draw),
        torch.randint(n_classes, (n_tokens,), generator=draw),
    )


def dense(hidden, weight, bias, seen, excluded):
    scores = hidden @ weight.T + bias
    scores[:, excluded] = -torch.inf
    for row, ids in zip(scores, seen, strict=True):
        row[ids[ids >= 0]] = -torch.inf
    return scores


shapes = given(
    n_tokens=st.integers(1, 300),
    n_classes=st.integers(2, 900),
    k=st.integers(1, 60),
    tile_bytes=st.sampled_from([1, 100_000, 4 * 2**20]),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None)
@shapes
def test_top_k_equals_the_dense_one(n_tokens, n_classes, k, tile_bytes, seed):
    hidden, weight, bias, seen, _ = problem(n_tokens, n_classes, 4, seed)
    excluded = torch.tensor([0])
    scores, ids = streamed_topk(
        hidden, weight, k, bias=bias, excluded_ids=excluded, seen_ids=seen, tile_bytes=tile_bytes
    )
    all_scores = dense(hidden, weight, bias, seen, excluded)
    found = min(k, n_classes)
    wanted = all_scores.topk(found, dim=1).values
    torch.testing.assert_close(scores[:, :found], wanted, atol=1e-5, rtol=1e-5)
    assert (scores[:, found:] == -torch.inf).all()
    assert torch.equal(ids == -1, scores == -torch.inf)
    real = ids.clamp(min=0)
    torch.testing.assert_close(
        all_scores.gather(1, real)[ids >= 0], scores[ids >= 0], atol=1e-5, rtol=1e-5
    )
    for row in ids.tolist():
        known = [i for i in row if i >= 0]
        assert len(set(known)) == len(known)


@settings(max_examples=25, deadline=None)
@shapes
def test_ranks_equal_the_dense_ones(n_tokens, n_classes, k, tile_bytes, seed):
    del k
    hidden, weight, bias, seen, labels = problem(n_tokens, n_classes, 4, seed)
    hidden, weight, bias = hidden.double(), weight.double(), bias.double()
    excluded = torch.tensor([0])
    greater, tied = label_rank(
        hidden,
        weight,
        labels,
        bias=bias,
        excluded_ids=excluded,
        seen_ids=seen,
        tile_bytes=tile_bytes,
    )
    scores = dense(hidden, weight, bias, seen, excluded)
    own = (hidden @ weight.T + bias).gather(1, labels.unsqueeze(1))
    scores.scatter_(1, labels.unsqueeze(1), -torch.inf)
    assert torch.equal(greater, (scores > own).sum(1))
    assert tied.count_nonzero() == 0


@pytest.mark.parametrize("tile_bytes", [1, 50_000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_tie_whatever_tile_they_fall_in(tile_bytes, dtype):
    hidden = torch.randn(9, 64, dtype=dtype)
    weight = torch.randn(1, 64, dtype=dtype).expand(1000, 64)
    greater, tied = label_rank(hidden, weight, torch.arange(9), tile_bytes=tile_bytes)
    assert greater.count_nonzero() == 0
    assert (tied == 999).all()


def test_allowed_ids_answer_in_their_own_numbers():
    hidden, weight, bias, seen, _ = problem(7, 500, 4, 0)
    allowed = torch.randperm(500)[:90]
    _, ids = streamed_topk(
        hidden, weight, 8, bias=bias, seen_ids=seen, allowed_ids=allowed, tile_bytes=1
    )
    scores = dense(hidden, weight, bias, seen, [])
    forbidden = torch.ones(500, dtype=torch.bool)
    forbidden[allowed] = False
    scores[:, forbidden] = -torch.inf
    assert torch.equal(ids, scores.topk(8).indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"hidden": torch.ones(2, 3)}, r"hidden=\(2, 3\).*4 wide"),
        ({"excluded_ids": torch.tensor([9])}, "excluded_ids=.*9 classes"),
        ({"seen_ids": torch.tensor([[-2], [0]])}, "seen_ids=.*padded with -1"),
        ({"seen_ids": torch.tensor([[1]])}, "seen_ids=.*2 hidden states"),
        ({"allowed_ids": torch.tensor([-1])}, "allowed_ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {"hidden": torch.ones(2, 4), "weight": torch.ones(9, 4), "k": 3, **change}
    with pytest.raises(ArgumentError, match=message):
        streamed_topk(**arguments)


def test_labels_out_of_range_are_named():
    with pytest.raises(ArgumentError, match="labels"):
        label_rank(torch.ones(1, 4), torch.ones(9, 4), torch.tensor([9]))


def test_a_sample_of_classes_that_misleads_does_not_change_the_answer():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8192, 4, generator=draw)
    weight[::16] *= 50  # every sixteenth class, those that the first threshold is taken from
    hidden = torch.randn(5, 4, generator=draw)
    scores, ids = streamed_topk(hidden, weight, 20, tile_bytes=2**16)
    wanted = (hidden @ weight.T).topk(20)
    torch.testing.assert_close(scores, wanted.values)
    assert torch.equal(ids, wanted.indices)


def test_an_inexact_search_finds_the_best_of_rounded_vectors():
    hidden, weight, bias, seen, _ = problem(7, 500, 24, 3)
    found, ids = streamed_topk(
        hidden, weight, 8, bias=bias, seen_ids=seen, tile_bytes=2**14, operands=torch.bfloat16
    )
    rounded = (t.bfloat16().float() for t in (hidden, weight))
    wanted = dense(*rounded, bias, seen, []).topk(8)
    torch.testing.assert_close(found, wanted.values)
    assert torch.equal(ids, wanted.indices)


def test_autocast_makes_no_rank_coarser():
    hidden, weight, bias, seen, labels = problem(7, 500, 300, 3)
    plain = label_rank(hidden, weight, labels, bias=bias, seen_ids=seen)
    best = streamed_topk(hidden, weight, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = label_rank(hidden, weight, labels, bias=bias, seen_ids=seen)
        again = streamed_topk(hidden, weight, 5)
    for left, right in zip((*cast, *again), (*plain, *best), strict=True):
        assert torch.equal(left, right)
