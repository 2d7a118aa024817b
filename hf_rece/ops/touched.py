"""The few rows that a plan touches, as a problem of their own: the way to row-sparse gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rece.ops.plan import Plan


@dataclass(frozen=True)
class TouchedRows:
    """A plan, its labels and its rows, renumbered so that only the touched classes are left.

    Args:
        weight: (U, D), the touched rows; its gradient reaches the whole table as a sparse tensor.
        bias: (U,) likewise, or None.
        labels: (N,) int64 in [0, U).
        plan: the same pairs, over U classes.
    """

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    plan: Plan


def touched_rows(weight: Tensor, bias: Tensor | None, labels: Tensor, plan: Plan) -> TouchedRows:
    """Return the problem on the U classes that are labels or that the plan scores.

    Args:
        weight: (C, D); a leaf, or its sparse gradient has nowhere to go.
        bias: (C,) or None.
        labels: (N,) int64.
        plan: whose grids all gather their classes, and know no earlier rounds.

    Memory:
        O(U D) for the rows and as much for their gradient; O(plan) integers.
    """
    gathered = [grid.classes for grid in plan.grids if grid.classes is not None]
    ids = torch.unique(torch.cat([labels, *(classes.reshape(-1).long() for classes in gathered)]))
    if plan.n_tokens == 0:
        ids = ids.new_zeros(1)
    ids = ids[ids < plan.n_classes]

    def renumbered(classes: Tensor | None) -> Tensor | None:
        # Padding is C, above all ids, and so becomes U.
        return None if classes is None else torch.searchsorted(ids, classes.long()).to(torch.int32)

    grids = tuple(
        replace(grid, classes=renumbered(grid.classes), own_labels=renumbered(grid.own_labels))
        for grid in plan.grids
    )
    return TouchedRows(
        weight=F.embedding(ids, weight, sparse=True),
        bias=None if bias is None else torch.gather(bias, 0, ids, sparse_grad=True),
        labels=torch.searchsorted(ids, labels),
        plan=replace(plan, grids=grids, n_classes=len(ids)),
    )
