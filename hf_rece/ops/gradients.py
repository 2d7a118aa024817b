"""The gradients of a walk, added up in float32 and returned in the tensors' own dtypes.

The gradient of a (C, D) table in bfloat16 takes 2 C D bytes, its float32 sums 4 C D. They are never
there together:

    every class in order    the classes are walked in windows, each a third of those left: what is
                            not yet written of the result is the room for a window's sums
    any other plan          the sums are rounded where they lie
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hf_rece.ops.labels import label_backward
from hf_rece.ops.plan import MIN_TILE_SIDE, Grid, Plan
from hf_rece.ops.rows import DenseRows, gradient_buffer, gradient_buffers, narrowed
from hf_rece.ops.stream_torch import Gradients, Scores

AddGradients = Callable[[Scores, Plan, Gradients], None]

# Bytes of sums below which windows, of which there are a dozen, cost more than they save.
_WORTH_WINDOWS = 16 * 2**20
# The last window is no larger than one in so many of the classes, as it needs room of its own.
_LAST_WINDOW = 64


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted.

    Args:
        hidden: that of the hidden states.
        bias: that of the bias.
        rows: that of each of the rows' tensors.
    """

    hidden: bool
    bias: bool
    rows: Sequence[bool]


@dataclass(frozen=True)
class Labels:
    """The labels' own pairs.

    Args:
        ids: (N,) int64.
        grad: (N,), gradient of their logits.
    """

    ids: Tensor
    grad: Tensor


def gradients_of(
    scores: Scores,
    plan: Plan,
    labels: Labels,
    wanted: Wanted,
    add: AddGradients,
    *,
    row_share: float = 1.0,
) -> Gradients:
    """Return the gradients of label logits and merged scores, in the dtypes of their tensors.

    Args:
        scores: as in the forward walk.
        plan: as in the forward walk.
        labels: and the gradient of their logits.
        wanted: which gradients.
        add: adds the gradients of the merged scores of some classes into buffers.
        row_share: multiplies the gradients of rows and bias.

    Memory:
        The sums of the hidden states' gradient in the accumulation dtype, and those of the rows';
        of dense rows in half precision under a plan of all classes, 1/16 of those at most beside
        the result.
    """
    hidden, bias = scores.hidden, scores.bias
    into = Gradients(
        hidden=gradient_buffer(hidden) if wanted.hidden else None,
        rows=None,
        bias=None
        if bias is None or not wanted.bias
        else torch.zeros(len(bias), dtype=scores.dtype, device=bias.device),
    )
    rows: tuple[Tensor | None, ...]
    if _pays_windows(scores, plan, wanted):
        rows = (_by_windows(scores, plan, labels, into, add, row_share),)
    else:
        tensors = scores.rows.tensors()
        into = replace(into, rows=gradient_buffers(tensors, wanted.rows))
        label_backward(scores, labels.ids, labels.grad, into, plan.tile_bytes)
        add(scores, plan, into)
        rows = tuple(
            None if sums is None else narrowed(_shared(sums, row_share), tensor.dtype)
            for tensor, sums in zip(tensors, into.rows or [None] * len(tensors), strict=True)
        )
    return Gradients(
        hidden=None if into.hidden is None else narrowed(into.hidden, hidden.dtype),
        rows=rows,
        bias=None
        if into.bias is None or bias is None
        else _shared(into.bias, row_share).to(bias.dtype),
    )


def _shared(sums: Tensor, share: float) -> Tensor:
    return sums if share == 1.0 else sums.mul_(share)


# ----------------------------------------------------------------------------------------- windows


def window_edges(n_classes: int) -> list[int]:
    """Return where windows begin, and C: each a third of what is left, until little is."""
    edges = [0]
    least = max(n_classes // _LAST_WINDOW, 3 * MIN_TILE_SIDE)
    while n_classes - edges[-1] > least:
        third = (n_classes - edges[-1]) // 3
        edges.append(edges[-1] + third // MIN_TILE_SIDE * MIN_TILE_SIDE)
    return [*edges, n_classes]


def _pays_windows(scores: Scores, plan: Plan, wanted: Wanted) -> bool:
    # Not a subclass: its gradient may be another.
    if type(scores.rows) is not DenseRows or not all(wanted.rows):
        return False
    weight = scores.rows.weight
    return (
        weight.dtype.itemsize == 2
        and 4 * weight.numel() > _WORTH_WINDOWS
        and all(grid.classes is None for grid in plan.grids)
    )


def _by_windows(
    scores: Scores, plan: Plan, labels: Labels, into: Gradients, add: AddGradients, share: float
) -> Tensor:
    """Return the gradient of dense rows; add those of hidden states and bias into their buffers."""
    (weight,) = scores.rows.tensors()
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    edges = window_edges(len(weight))
    tokens, *grids = _cut(plan, labels.ids, edges)
    for number, (start, stop) in enumerate(pairwise(edges)):
        window = slice(start, stop)
        sums = _room(result, window)
        part = Gradients(into.hidden, (sums,), None if into.bias is None else into.bias[window])
        bias = None if scores.bias is None else scores.bias[window]
        of_window = replace(scores, rows=DenseRows(weight[window]), bias=bias)
        members = tokens[number]
        label_backward(
            of_window, labels.ids - start, labels.grad, part, plan.tile_bytes, tokens=members
        )
        cut = tuple(
            _window_of(grid, window, skip[number], blocked[number])
            for grid, skip, blocked in zip(plan.grids, grids[::2], grids[1::2], strict=True)
        )
        add(of_window, replace(plan, grids=cut, n_classes=stop - start), part)
        result[window] = _shared(sums, share)
    return result


def _room(result: Tensor, window: slice) -> Tensor:
    """Return zeros (window's rows, D) float32, behind the window in the memory of the result."""
    shape = (window.stop - window.start, result.shape[1])
    behind, n = result[window.stop :].view(-1), 2 * shape[0] * shape[1]
    if behind.numel() < n:
        return torch.zeros(shape, device=result.device)
    return behind[:n].view(torch.float32).view(shape).zero_()


def _cut(plan: Plan, labels: Tensor, edges: list[int]) -> list[list[Tensor]]:
    """Return, window by window, the places of the labels, and of each grid's skips and blocks.

    Sorted once, and the host waits once.
    """
    none = labels.new_empty(0)
    keys = [labels]
    for grid in plan.grids:
        keys.append(none if grid.skip is None else grid.skip[:, 2])
        keys.append(none if grid.blocked is None else grid.blocked)
    at = torch.tensor(edges, device=labels.device)
    orders = [key.contiguous().sort(stable=True) for key in keys]
    bounds = torch.stack([torch.searchsorted(order.values, at) for order in orders]).tolist()
    return [
        [order.indices[first:last] for first, last in pairwise(bound)]
        for order, bound in zip(orders, bounds, strict=True)
    ]


def _window_of(grid: Grid, window: slice, skip: Tensor, blocked: Tensor) -> Grid:
    """Return the part of a grid of all classes, of whose skips and blocks these places are here."""
    first, weight = window.start, grid.class_log_weight
    pairs = None if grid.skip is None else grid.skip[skip] - grid.skip.new_tensor([0, 0, first])
    return replace(
        grid,
        skip=pairs,
        blocked=None if grid.blocked is None else grid.blocked[blocked] - first,
        class_log_weight=None if weight is None else weight[:, window],
    )
