"""The gradients of a walk, added up in float32 and returned in the tensors' own dtypes.

The gradient of a (C, D) table in bfloat16 takes 2 C D bytes, its float32 sums 4 C D. They are never
there together:

    every class in order    the classes are walked in windows, each a third of those left: what is
                            not yet written of the result is the room for a window's sums, and for
                            those of the hidden states until their last classes are walked
    few pairs a class       the same for a very large table on a GPU, which walks the whole plan for
                            each window
    any other plan          the sums are rounded where they lie
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rece.ops.labels import label_backward
from hf_rece.ops.plan import MIN_TILE_SIDE, Grid, Plan
from hf_rece.ops.products import multiplies_halves
from hf_rece.ops.rows import DenseRows, gradient_buffer, gradient_buffers, narrowed
from hf_rece.ops.stream_torch import Gradients, Scores

AddGradients = Callable[[Scores, Plan, Gradients], None]

# Bytes of sums below which windows, of which there are a dozen, cost more than they save.
_WORTH_WINDOWS = 16 * 2**20
# The same of plans that gather their classes, whose pairs are all scored again for each window.
_WORTH_PASSES, _PAIRS_A_CLASS = 2**30, 100
# Bytes of a window's sums that may have room of their own.
_OWN_ROOM = 2**20


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
        The sums in the accumulation dtype; of dense rows in half precision, under a plan of all
        classes, the result alone and O(N), where classes are at least six times as many as tokens.
    """
    hidden, bias = scores.hidden, scores.bias
    into = Gradients(
        hidden=None,
        rows=None,
        bias=None
        if bias is None or not wanted.bias
        else torch.zeros(len(bias), dtype=scores.dtype, device=bias.device),
    )
    if _pays_windows(scores, plan, wanted):
        found = _by_windows(scores, plan, labels, wanted, into, add, row_share)
    else:
        tensors = scores.rows.tensors()
        into = replace(
            into,
            hidden=gradient_buffer(hidden) if wanted.hidden else None,
            rows=gradient_buffers(tensors, wanted.rows),
        )
        label_backward(scores, labels.ids, labels.grad, into, plan.tile_bytes)
        add(scores, plan, into)
        rows = tuple(
            None if sums is None else narrowed(_shared(sums, row_share), tensor.dtype)
            for tensor, sums in zip(tensors, into.rows or [None] * len(tensors), strict=True)
        )
        states = None if into.hidden is None else narrowed(into.hidden, hidden.dtype)
        found = Gradients(states, rows, into.bias)
    if bias is None or found.bias is None:
        return found
    return replace(found, bias=_shared(found.bias, row_share).to(bias.dtype))


def _shared(sums: Tensor, share: float) -> Tensor:
    return sums if share == 1.0 else sums.mul_(share)


# ----------------------------------------------------------------------------------------- windows


def window_edges(start: int, stop: int, end: int, least: int) -> list[int]:
    """Return where the windows of classes from `start` to `stop` begin, and `stop`.

    Each is a third of what is left up to `end`, so that its sums fit behind it; the last, of
    `least` or fewer to `end`, is all that is left.
    """
    edges = [start]
    while edges[-1] < stop:
        left = end - edges[-1]
        third = left // 3 // MIN_TILE_SIDE * MIN_TILE_SIDE
        edges.append(min(edges[-1] + (third if third and left > least else left), stop))
    return edges


def _pays_windows(scores: Scores, plan: Plan, wanted: Wanted) -> bool:
    # Not a subclass: its gradient may be another.
    if type(scores.rows) is not DenseRows or not all(wanted.rows):
        return False
    weight = scores.rows.weight
    if weight.dtype.itemsize != 2:
        return False
    if not _gathers(plan):
        return 4 * weight.numel() > _WORTH_WINDOWS
    n_pairs = sum(
        grid.tokens.numel() * (plan.n_classes if grid.classes is None else grid.classes.shape[1])
        for grid in plan.grids
    )
    is_cheap = multiplies_halves(weight.device) and n_pairs <= _PAIRS_A_CLASS * plan.n_classes
    return is_cheap and 4 * weight.numel() > _WORTH_PASSES


def _gathers(plan: Plan) -> bool:
    return any(grid.classes is not None for grid in plan.grids)


def _by_windows(
    scores: Scores,
    plan: Plan,
    labels: Labels,
    wanted: Wanted,
    into: Gradients,
    add: AddGradients,
    share: float,
) -> Gradients:
    """Return the gradients of hidden states and dense rows; that of the bias is in `into`."""
    (weight,) = scores.rows.tensors()
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    hidden, (n_classes, width) = scores.hidden, weight.shape
    kept = end = n_classes
    if wanted.hidden and hidden.dtype.itemsize == 2 and 6 * len(hidden) <= n_classes:
        # Of the last rows, two a token are lent to the hidden states' sums.
        kept, end = (_aligned(n_classes - rows * len(hidden)) for rows in (3, 2))
    if _gathers(plan):
        kept = 0  # a walk for all hidden states, and one for each window
    least = _own_room(plan, weight.device) // (4 * width)
    first = window_edges(0, kept, end, least)
    second = window_edges(kept, n_classes, n_classes, least)
    cut = _Cut.make(scores, plan, labels, first + second)

    def add_rows(edges: list[int], states: Tensor | None) -> None:
        for window in starmap(slice, pairwise(edges)):
            sums = _room(result[window.stop : end if states is not None else None], window)
            bias = None if into.bias is None else into.bias[window]
            cut.add_labels(window, Gradients(None, (sums,), bias))
            add(*cut.window(window), Gradients(states, (sums,), bias))
            result[window] = _shared(sums, share)

    states = None
    if wanted.hidden:
        states = gradient_buffer(hidden) if end == n_classes else _lent(result[end:], hidden.shape)
        into_states = Gradients(states, None, None)
        label_backward(scores, labels.ids, labels.grad, into_states, plan.tile_bytes)
        if kept < n_classes:
            add(*cut.window(slice(kept, n_classes)), into_states)
    add_rows(first, states)
    if states is not None:
        rounded = states.to(hidden.dtype) if end < n_classes else narrowed(states, hidden.dtype)
        states = None
    add_rows(second, None)
    return Gradients(rounded if wanted.hidden else None, (result,), into.bias)


def _own_room(plan: Plan, device: torch.device) -> int:
    # A CPU's library keeps a program of a megabyte for every shape of a product: few windows.
    return _OWN_ROOM if multiplies_halves(device) else max(_OWN_ROOM, plan.tile_bytes // 2)


def _aligned(number: int) -> int:
    return number // MIN_TILE_SIDE * MIN_TILE_SIDE


def _room(behind: Tensor, window: slice) -> Tensor:
    """Return zeros (window's rows, D) float32, in the memory of the result's rows behind it."""
    shape = torch.Size((window.stop - window.start, behind.shape[1]))
    if behind.numel() < 2 * shape.numel():
        return torch.zeros(shape, device=behind.device)
    return _lent(behind, shape)


def _lent(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return float32 zeros in the memory of rows in half precision."""
    return rows.view(-1)[: 2 * shape.numel()].view(torch.float32).view(shape).zero_()


@dataclass(frozen=True)
class _Cut:
    """A problem of all classes, cut by its classes.

    Args:
        scores: of the problem.
        plan: of the problem.
        labels: of the problem.
        orders: places of the labels, then of each grid's skips and blocks, sorted by class.
        below: of each of these, how many lie below a window's edge.
    """

    scores: Scores
    plan: Plan
    labels: Labels
    orders: list[Tensor]
    below: list[dict[int, int]]

    @classmethod
    def make(cls, scores: Scores, plan: Plan, labels: Labels, edges: list[int]) -> _Cut:
        """Sort once; the host waits once."""
        none = labels.ids.new_empty(0)
        keys = [labels.ids]
        for grid in plan.grids:
            of_classes = none if grid.skip is None else grid.skip[:, 2].contiguous()
            keys.append(of_classes if grid.classes is None else none)
            keys.append(none if grid.blocked is None else grid.blocked)
        at = torch.tensor(edges, device=none.device)
        orders, bounds = [], []
        for key in keys:
            values, order = key.sort(stable=True)
            orders.append(order)
            bounds.append(torch.searchsorted(values, at))
        below = [dict(zip(edges, bound, strict=True)) for bound in torch.stack(bounds).tolist()]
        return cls(scores, plan, labels, orders, below)

    def add_labels(self, window: slice, into: Gradients) -> None:
        """Add the gradients of the rows of a window's labels."""
        ids, plan = self.labels.ids - window.start, self.plan
        members = self._members(0, window)
        scores = self._scores(window)
        label_backward(scores, ids, self.labels.grad, into, plan.tile_bytes, tokens=members)

    def window(self, window: slice) -> tuple[Scores, Plan]:
        """Return the problem of a window's classes."""
        grids = tuple(
            _window_of(
                grid, window, self._members(2 * i + 1, window), self._members(2 * i + 2, window)
            )
            for i, grid in enumerate(self.plan.grids)
        )
        n_classes = window.stop - window.start
        return self._scores(window), replace(self.plan, grids=grids, n_classes=n_classes)

    def _scores(self, window: slice) -> Scores:
        (weight,), bias = self.scores.rows.tensors(), self.scores.bias
        bias = None if bias is None else bias[window]
        return replace(self.scores, rows=DenseRows(weight[window]), bias=bias)

    def _members(self, number: int, window: slice) -> Tensor:
        below = self.below[number]
        return self.orders[number][below[window.start] : below[window.stop]]


def _window_of(grid: Grid, window: slice, skip: Tensor, blocked: Tensor) -> Grid:
    """Return the part of a grid in a window, of whose skips and blocks these places are here."""
    if grid.classes is not None:
        return _gathered_of(grid, window)
    first, weight = window.start, grid.class_log_weight
    pairs = None if grid.skip is None else grid.skip[skip] - grid.skip.new_tensor([0, 0, first])
    return replace(
        grid,
        skip=pairs,
        blocked=None if grid.blocked is None else grid.blocked[blocked] - first,
        class_log_weight=None if weight is None else weight[:, window],
    )


def _gathered_of(grid: Grid, window: slice) -> Grid:
    """Return a grid in which the classes outside a window are padding."""
    classes, first = cast(Tensor, grid.classes), window.start
    outside = (classes < first) | (classes >= window.stop)
    earlier = tuple(
        replace(found, class_chunks=F.pad(found.class_chunks[window], (0, 1)))
        for found in grid.earlier
    )
    return replace(
        grid,
        classes=(classes - first).masked_fill_(outside, window.stop - first),
        own_labels=None if grid.own_labels is None else grid.own_labels - first,
        earlier=earlier,
    )
