"""The streaming kernel in C++ for float32 vectors on a CPU.

Torch makes a tile's logits by one call, drops pairs by a second, exponentiates by a third; with
vectors as narrow as a recommender's the calls between the products take most of the time. Here
a block of logits stays in the cache from its first product to its gradients (kernels.cpp).

What it does not serve it leaves to torch: other dtypes, rows that are not stored as they are,
wide vectors, merge="sum", and observations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rece.ops import native, stream_torch
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.rows import DenseRows, OutputRows
from hf_rece.ops.stream_torch import Gradients, Observations, Scores


def serves(hidden: Tensor, rows: OutputRows) -> bool:
    """Whether the kernels can score these hidden states (N, D) against these rows."""
    return type(rows) is DenseRows and native.serves(hidden, rows.weight)


def forward(
    scores: Scores, plan: Plan, *, observe: bool = False
) -> tuple[Tensor, Tensor | None, Observations | None]:
    """Return what stream_torch.forward returns."""
    if observe or plan.merge == "sum":
        return stream_torch.forward(scores, plan, observe=observe)
    size = (plan.n_tokens + 1,)
    is_maximum = plan.merge == "maximum"
    lowest = -torch.inf if is_maximum else torch.finfo(torch.float32).min
    top = torch.full(size, lowest)
    total = torch.zeros(size)
    winner = torch.full(size, -1, dtype=torch.int32) if is_maximum else None
    for problem in _problems(scores, plan):
        problem.call("stream_forward", top, total, winner)
    if winner is not None:
        return top, winner.long(), None
    return total.log_().add_(top), None, None


def backward(
    scores: Scores,
    plan: Plan,
    merged: Tensor,
    winner: Tensor | None,
    grad: Tensor,
    into: Gradients,
) -> None:
    """Add what stream_torch.backward adds."""
    if plan.merge == "sum":
        return stream_torch.backward(scores, plan, merged, winner, grad, into)
    shift = merged.masked_fill(merged == -torch.inf, 0)
    factor = grad * scores.scale
    rows = None if into.rows is None else into.rows[0]
    if winner is not None:
        plan, winner = stream_torch.winners_only(plan, winner), winner.to(torch.int32)
    for problem in _problems(scores, plan):
        problem.call("stream_backward", shift, factor, winner, into.hidden, rows, into.bias)
    return None


# ---------------------------------------------------------------------------------- what C++ takes


class _Earlier(ctypes.Structure):
    _fields_ = [
        ("token_chunks", ctypes.c_void_p),
        ("class_chunks", ctypes.c_void_p),
        ("reach", ctypes.c_int32),
        ("is_short", ctypes.c_int32),
    ]


_POINTERS = (
    "hidden", "rows", "bias", "tokens", "classes", "skip_start", "skip_token", "skip_class",
    "own_labels", "earlier", "blocked", "token_log_weight", "class_log_weight",
)  # fmt: skip
_SIZES = (
    "n_tokens", "n_classes", "width", "n_groups", "n", "m", "n_earlier", "first_group", "n_threads",
)  # fmt: skip


class _Struct(ctypes.Structure):
    """`Problem` of kernels.cpp, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Problem:
    """A grid as the kernels take it, and the tensors that it points into."""

    struct: _Struct
    tensors: dict[str, Tensor | None]
    earlier: ctypes.Array[_Earlier]
    chunks: list[tuple[Tensor, Tensor]]

    def call(self, function: str, *buffers: Tensor | None) -> None:
        """Call a kernel, which reads and writes the buffers."""
        native.call(function, ctypes.byref(self.struct), *map(native.pointer, buffers))


def _problems(scores: Scores, plan: Plan) -> Iterator[_Problem]:
    """Yield the plan's grids."""
    if plan.n_tokens == 0:
        return
    first_group = 0
    for grid in plan.grids:
        yield _problem(scores, plan, grid, first_group)
        first_group += len(grid.tokens)


def _problem(scores: Scores, plan: Plan, grid: Grid, first_group: int) -> _Problem:
    n_groups, n = grid.tokens.shape
    (weight,) = scores.rows.tensors()
    rounds = [_chunks(round_) for round_ in grid.earlier]
    earlier = (_Earlier * len(rounds))(*(struct for struct, _ in rounds))
    tensors = {
        "hidden": _as(torch.float32, scores.hidden.detach()),
        "rows": weight.detach(),
        "bias": _as(torch.float32, None if scores.bias is None else scores.bias.detach()),
        "tokens": _as(torch.int32, grid.tokens),
        "classes": _as(torch.int32, grid.classes),
        "own_labels": _as(torch.int32, grid.own_labels),
        "blocked": _mask(grid.blocked, plan.n_classes),
        "token_log_weight": _as(torch.float32, grid.token_log_weight),
        "class_log_weight": _as(torch.float32, grid.class_log_weight),
        **_skips(grid),
    }
    struct = _Struct(
        **{name: native.pointer(tensor) for name, tensor in tensors.items()},
        earlier=ctypes.cast(earlier, ctypes.c_void_p),
        n_tokens=plan.n_tokens,
        n_classes=plan.n_classes,
        width=scores.rows.width,
        n_groups=n_groups,
        n=n,
        m=plan.n_classes if grid.classes is None else grid.classes.shape[1],
        n_earlier=len(grid.earlier),
        first_group=first_group,
        n_threads=torch.get_num_threads(),
        scale=scores.scale,
        softcap=scores.softcap or 0.0,
    )
    return _Problem(struct, tensors, earlier, [tables for _, tables in rounds])


def _chunks(earlier: EarlierRound) -> tuple[_Earlier, tuple[Tensor, Tensor]]:
    """Return a round as the kernels take it, and the tables that it points into."""
    tables = (earlier.token_chunks, earlier.class_chunks)
    is_short = all(table.dtype == torch.int16 for table in tables)
    dtype = torch.int16 if is_short else torch.int32
    tokens, classes = (table.to(dtype).contiguous() for table in tables)
    struct = _Earlier(native.pointer(tokens), native.pointer(classes), earlier.reach, is_short)
    return struct, (tokens, classes)


def _skips(grid: Grid) -> dict[str, Tensor | None]:
    """Return the pairs to skip by group: where each group's begin, and their places in it."""
    if grid.skip is None or len(grid.skip) == 0:
        return {}
    group, token, place = grid.skip[grid.skip[:, 0].argsort()].unbind(1)
    start = torch.zeros(len(grid.tokens) + 1, dtype=torch.long)
    start[1:] = torch.bincount(group, minlength=len(grid.tokens)).cumsum(0)
    return {
        "skip_start": start,
        "skip_token": _as(torch.int32, token),
        "skip_class": _as(torch.int32, place),
    }


def _mask(ids: Tensor | None, n_classes: int) -> Tensor | None:
    if ids is None:
        return None
    return torch.zeros(n_classes, dtype=torch.uint8).index_fill_(0, ids, 1)


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()
