"""AdamW over touched rows."""

import pytest
import torch
from torch import nn

from hf_rece.errors import ArgumentError
from hf_rece.training.row_adam import RowAdamW, clip_gradients

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}


def sparse(gradient, ids):
    ids = torch.as_tensor(ids)
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), gradient[ids], gradient.shape, check_invariants=True
    )


def run(optimizer_class, start, gradients, **settings):
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_class([weight], **{**SETTINGS, **settings})
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach(), optimizer


def test_is_adamw_where_every_row_is_in_every_step():
    start = torch.randn(6, 3, dtype=torch.float64)
    gradients = [torch.randn(6, 3, dtype=torch.float64) for _ in range(5)]
    everything = [sparse(gradient, range(6)) for gradient in gradients]
    expected, _ = run(torch.optim.AdamW, start, gradients, weight_decay=0.3)
    for given in (gradients, everything):
        torch.testing.assert_close(run(RowAdamW, start, given, weight_decay=0.3)[0], expected)


def test_is_sparse_adam_without_decay():
    start = torch.randn(6, 3, dtype=torch.float64)
    gradients = [sparse(torch.randn(6, 3).double(), ids) for ids in ([0, 2], [2], [1, 2, 5])]
    # SparseAdam adds eps to a root that is not yet corrected for its bias.
    expected, _ = run(torch.optim.SparseAdam, start, [g.clone() for g in gradients], eps=1e-12)
    torch.testing.assert_close(run(RowAdamW, start, gradients, eps=1e-12)[0], expected)


def test_rows_left_out_keep_value_and_moments():
    start = torch.randn(6, 3)
    gradients = [sparse(torch.randn(6, 3), ids) for ids in ([0, 1], [1, 3])]
    first, before = run(RowAdamW, start, gradients[:1], weight_decay=0.3)
    last, after = run(RowAdamW, start, gradients, weight_decay=0.3)
    moments = [next(iter(o.state.values()))["exp_avg"] for o in (before, after)]
    for row in (0, 2, 4, 5):
        assert torch.equal(first[row], last[row])
        assert torch.equal(moments[0][row], moments[1][row])
    assert (first[1] != last[1]).all()


def test_occurrences_of_a_row_are_summed_before_the_moments():
    start, gradient = torch.randn(4, 3), torch.randn(4, 3)
    twice = torch.sparse_coo_tensor(
        [[1, 1]], torch.stack([gradient[1], gradient[1]]), (4, 3), check_invariants=True
    )
    once = sparse(2 * gradient, [1])
    torch.testing.assert_close(run(RowAdamW, start, [twice])[0], run(RowAdamW, start, [once])[0])


def test_state_survives_a_checkpoint():
    start = torch.randn(6, 3)
    gradients = [sparse(torch.randn(6, 3), ids) for ids in ([0, 1], [1, 3], [1, 4])]
    whole, _ = run(RowAdamW, start, gradients)
    half, optimizer = run(RowAdamW, start, gradients[:2])
    weight = nn.Parameter(half.clone())
    again = RowAdamW([weight], lr=5.0)
    again.load_state_dict(optimizer.state_dict())
    weight.grad = gradients[2]
    again.step()
    torch.testing.assert_close(weight.detach(), whole)


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": float("nan")}, {"weight_decay": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        RowAdamW([nn.Parameter(torch.zeros(2))], **settings)


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_is_that_of_the_dense_gradients(max_norm):
    dense, rows = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(5, 3))
    gradient = torch.randn(5, 3)
    results = []
    for given in (sparse(gradient, [0, 2, 2]), torch.zeros(5, 3)):
        dense.grad, rows.grad = torch.arange(4.0), given
        if not given.is_sparse:
            given[0], given[2] = gradient[0], 2 * gradient[2]
            norm = nn.utils.clip_grad_norm_([dense, rows], max_norm)
        else:
            norm = clip_gradients([dense, rows], max_norm)
        results.append((norm, dense.grad.clone(), rows.grad.to_dense().clone()))
    torch.testing.assert_close(*results)
