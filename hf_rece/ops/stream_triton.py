"""The streaming kernel as fused GPU kernels: no tile of logits leaves the chip.

How a plan becomes launches. Each grid is one launch over all of its groups:

    forward    a program folds BLOCK_N tokens of a group with a split of its columns; the splits and
               the groups of a token, a few numbers each, are merged in torch
    backward   up to a width of 256 (128 in float32): `hidden_kernel` adds up a block of states'
               gradient over the columns, `rows_kernel` a block of rows' over the tokens; each makes
               the logits again, as two cheap products cost less than adding through memory.
               Wider: `wide_kernel` makes a tile once and adds both gradients by atomics

    exhaustive grid      one group; a block of rows belongs to one program, nothing is gathered
    gathered groups      ids are read in the kernel; gradients are added by atomics
    drops, log-weights   looked up in the tile: own labels, skipped pairs, chunks of earlier rounds
    maximum              backward walks only the tokens that a group has won

Dense rows are read where they lie. Others are gathered, `tile_bytes` at a time, and give their
gradient back through `add_grad`. With torch.use_deterministic_algorithms gathered gradients pass
through such a buffer too, and no atomics are left; a wide backward then makes the logits once for
every 256 columns.

Products take the inputs' dtype, float32 where hidden and rows differ, that of autocast where it is
on, and are added up in float32; float32 operands are multiplied in full precision unless torch
allows TF32. In backward, gradients of logits are rounded to the dtype of the products.

    triton_tile.py       reads, makes and drops a tile: what the kernels share
    triton_kernels.py    the four kernels
    triton_windows.py    a grid as the kernels take it; block sizes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_rece.ops.plan import Plan
from hf_rece.ops.stream_torch import Gradients, Observations, Scores
from hf_rece.ops.triton_kernels import forward_kernel, hidden_kernel, rows_kernel, wide_kernel
from hf_rece.ops.triton_tile import Inputs, Merged, Pairs
from hf_rece.ops.triton_windows import (
    Blocks,
    Kind,
    Window,
    Work,
    blocks_of,
    is_interpreted,
    n_splits,
    works_of,
)

__all__ = ["backward", "forward", "is_interpreted"]

# Blocks of tokens that share a block of rows while it is near.
_TURN = 8
_LOWEST = torch.finfo(torch.float32).min


# --------------------------------------------------------------------------------------- forward


def forward(
    scores: Scores, plan: Plan, *, observe: bool = False
) -> tuple[Tensor, Tensor | None, Observations | None]:
    """Return what stream_torch.forward returns."""
    scores = _rounded(scores)
    fold = {"logaddexp": _fold_logaddexp, "maximum": _fold_maximum, "sum": _fold_sum}[plan.merge]
    running = _Running.make(plan, scores.hidden.device, observe)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(scores.hidden):
        for first_number, work in works_of(scores, plan):
            values = _group_values(work, observe)  # (1 or 3, G, n)
            tokens = work.grid.tokens.long()
            if running.seen is not None:
                largest = values[1].reshape(-1)
                running.seen.largest.scatter_reduce_(0, tokens.reshape(-1), largest, "amax")
            fold(running, tokens, first_number, values)
    return running.result(plan)


def _rounded(scores: Scores) -> Scores:
    """Round the hidden states as autocast asks; rows are rounded as they are read."""
    return (
        scores
        if scores.autocast is None
        else replace(scores, hidden=scores.hidden.to(scores.autocast))
    )


@dataclass(frozen=True)
class _Running:
    """What the grids folded so far make of each token, all (N + 1,).

    Args:
        top: largest value so far; only for merges other than "sum".
        total: sum of values, or of exp(value - top).
        mean: mean logit, times `total`.
        winner: int64 number of the winning group, -1 for none.
        seen: what is observed, or None.
    """

    top: Tensor
    total: Tensor
    mean: Tensor
    winner: Tensor
    seen: Observations | None

    @classmethod
    def make(cls, plan: Plan, device: torch.device, observe: bool) -> _Running:
        top = torch.full((plan.n_tokens + 1,), -torch.inf, device=device)
        seen = Observations(top.clone(), torch.full_like(top, torch.nan)) if observe else None
        winner = torch.full_like(top, -1, dtype=torch.long)
        return cls(top, torch.zeros_like(top), torch.zeros_like(top), winner, seen)

    def result(self, plan: Plan) -> tuple[Tensor, Tensor | None, Observations | None]:
        """Return what forward returns."""
        if plan.merge == "sum":
            return self.total, None, self.seen
        if plan.merge == "maximum":
            return self.top, self.winner, self.seen
        if self.seen is not None:
            self.seen.mean.copy_(self.mean / self.total)
        return self.total.log().add_(self.top.clamp(min=_LOWEST)), None, self.seen


def _fold_logaddexp(running: _Running, tokens: Tensor, _: int, values: Tensor) -> None:
    flat, value = tokens.reshape(-1), values[0].reshape(-1)
    # A finite floor in place of -inf keeps -inf minus the maximum from being NaN.
    old = running.top.clamp(min=_LOWEST)
    running.top.scatter_reduce_(0, flat, value, "amax")
    new = running.top.clamp(min=_LOWEST)
    shrink = (old - new).exp_()
    mass = (value - new[flat]).exp_()
    running.total.mul_(shrink).index_add_(0, flat, mass)
    if running.seen is not None:
        running.mean.mul_(shrink).index_add_(0, flat, mass * values[2].reshape(-1))


def _fold_maximum(running: _Running, tokens: Tensor, first_number: int, values: Tensor) -> None:
    value = values[0]
    running.top.scatter_reduce_(0, tokens.reshape(-1), value.reshape(-1), "amax")
    number = torch.arange(len(value), device=value.device).unsqueeze(1) + first_number
    won = (value == running.top[tokens]) & (value > -torch.inf)
    # Of groups with equal values the last wins: one group alone, as published.
    candidates = torch.where(won, number, -1)
    running.winner.scatter_reduce_(0, tokens.reshape(-1), candidates.reshape(-1), "amax")
    if running.seen is not None:
        won &= running.winner[tokens] == number
        running.seen.mean[tokens[won]] = values[2][won]


def _fold_sum(running: _Running, tokens: Tensor, _: int, values: Tensor) -> None:
    running.total.index_add_(0, tokens.reshape(-1), values[0].reshape(-1))


def _group_values(work: Work, observe: bool) -> Tensor:
    """Return (1 or 3, G, n): values, and the largest and the mean logit if observed."""
    scratch = 0 if work.is_dense else work.scores.rows.width * work.scores.hidden.element_size()
    whole: list[Tensor] = []
    pieces: list[Tensor] = []
    for window in work.windows(scratch):
        pieces.append(_window_values(work, window, observe))
        if window.columns.stop == work.pairs.m:
            whole.append(_join(torch.cat(pieces, 1), is_sum=work.plan.merge == "sum"))
            pieces = []
    values = torch.cat(whole, 1)
    if work.grid.token_log_weight is not None and work.plan.merge != "sum":
        values[0] += work.grid.token_log_weight
    return values


def _window_values(work: Work, window: Window, observe: bool) -> Tensor:
    """Return (1 or 3, splits, window's groups, n)."""
    inputs, pairs = work.arguments(window)
    blocks = blocks_of("forward", inputs, pairs, work.operands(window))
    n_programs = window.n_groups * -(-pairs.n // blocks.tokens)
    splits = n_splits(n_programs, -(-pairs.n_columns // blocks.classes), inputs.hidden.device)
    shape = (3 if observe else 1, splits, window.n_groups, pairs.n)
    values = torch.empty(shape, device=inputs.hidden.device)
    forward_kernel[(n_programs * splits,)](
        inputs.in_units(),
        pairs,
        values,
        splits,
        OBSERVE=observe,
        ONE=blocks.width >= inputs.width,
        **work.constants(window),
        **blocks.options(inputs),
    )
    return values


def _join(values: Tensor, *, is_sum: bool) -> Tensor:
    """Return (1 or 3, G, n) from those of splits of the same groups, (1 or 3, splits, G, n)."""
    parts = values[0]
    merged = parts.sum(0) if is_sum else parts.logsumexp(0)
    if len(values) == 1:
        return merged.unsqueeze(0)
    # Of a token without classes the difference is NaN.
    share = (parts - merged).exp_().masked_fill_(parts == -torch.inf, 0)
    share /= share.sum(0).masked_fill_(merged == -torch.inf, 1)  # 1 already, but for rounding
    return torch.stack([merged, values[1].amax(0), (share * values[2]).sum(0)])


# -------------------------------------------------------------------------------------- backward


def backward(
    scores: Scores,
    plan: Plan,
    merged: Tensor,
    winner: Tensor | None,
    grad: Tensor,
    into: Gradients,
) -> None:
    """Add what stream_torch.backward adds."""
    scores = _rounded(scores)
    largest = grad.abs().amax()
    largest = torch.where(largest > 0, largest, 1)
    # The kernels round gradients of logits to the inputs' dtype: in float16 those near 0 need room.
    room = 2.0**15 if scores.hidden.dtype == torch.float16 else 1.0
    shift = merged.masked_fill(merged == -torch.inf, 0)
    # exp(logit - inf) = 0: the padding token's share, whatever it scored.
    shift[plan.n_tokens] = torch.inf
    known = Merged(
        shift=shift,
        factor=grad / largest * room,
        unit=(largest * (scores.scale / room)).view(1),
        winner=winner,
        first_number=0,
    )
    with torch.cuda.device_of(scores.hidden):
        for first_number, work in works_of(scores, plan):
            won = work if winner is None else _winners_first(work, winner, first_number)
            _add_grads(won, known._replace(first_number=first_number), into)


def _winners_first(work: Work, winner: Tensor, first_number: int) -> Work:
    """Return the grid with the tokens that a group has won before all others."""
    grid, pairs = work.grid, work.pairs
    if grid.skip is not None or grid.token_log_weight is not None:
        return work  # these know tokens by their places
    number = torch.arange(len(grid.tokens), device=winner.device).unsqueeze(1) + first_number
    lost = winner[grid.tokens.long()] != number
    tokens = grid.tokens.masked_fill(lost, work.plan.n_tokens).sort(dim=1).values
    used = (~lost).sum(1, dtype=torch.int32)
    return replace(
        work, grid=replace(grid, tokens=tokens), pairs=pairs._replace(tokens=tokens, used=used)
    )


def _add_grads(work: Work, known: Merged, into: Gradients) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    in_place = work.is_dense and (work.grid.classes is None or not deterministic)
    width = work.scores.rows.width
    scratch = 0 if in_place else width * (4 + work.scores.hidden.element_size())
    for window in work.windows(scratch):
        target = _Target.make(work, window, into, in_place, deterministic)
        inputs, pairs = work.arguments(window)
        how = work.operands(window), work.constants(window)
        _Launch(inputs, pairs, window.n_groups, known, target, *how).run(deterministic)
        target.hand_over(work, window, into)


@dataclass(frozen=True)
class _Target:
    """Where the gradients of a window are added.

    Args:
        hidden: (N, D), or (window's groups, n, D) in a deterministic run; or None.
        rows: (C, D), or (window's rows, D); or None.
        bias: (window's rows,) or None.
        rows_by_place: whether `rows` are the window's, in order.
        in_place: whether `rows` is the caller's buffer.
    """

    hidden: Tensor | None
    rows: Tensor | None
    bias: Tensor | None
    rows_by_place: bool
    in_place: bool

    @classmethod
    def make(
        cls, work: Work, window: Window, into: Gradients, in_place: bool, deterministic: bool
    ) -> _Target:
        """Return the caller's buffers where the kernels may add to them, else zeros."""
        n_rows = window.n_groups * window.n_columns
        width, device = work.scores.rows.width, work.scores.hidden.device
        hidden = into.hidden
        if hidden is not None and deterministic:
            hidden = torch.zeros((window.n_groups, work.pairs.n, width), device=device)
        rows = None
        if into.rows is not None and in_place:
            (rows,) = into.rows
            if rows is not None and work.grid.classes is None:
                rows = rows[window.columns]
        elif into.rows is not None:
            rows = torch.zeros((n_rows, width), device=device)
        bias = None if into.bias is None else torch.zeros(n_rows, device=device)
        by_place = not in_place or work.grid.classes is None
        return cls(hidden, rows, bias, by_place, in_place)

    def hand_over(self, work: Work, window: Window, into: Gradients) -> None:
        """Add what is not in the caller's buffers yet."""
        if into.hidden is not None and self.hidden is not None and self.hidden.dim() == 3:
            tokens = work.grid.tokens[window.groups].reshape(-1).long()
            tokens = tokens.clamp(max=work.plan.n_tokens - 1)
            into.hidden.index_add_(0, tokens, self.hidden.view(len(tokens), -1))
        ids = work.ids(window.groups, window.columns)
        if into.rows is not None and self.rows is not None and not self.in_place:
            work.scores.rows.add_grad(into.rows, ids, self.rows)
        if into.bias is not None and self.bias is not None:
            if isinstance(ids, slice):
                into.bias[ids] += self.bias
            else:
                into.bias.index_add_(0, ids, self.bias)


@dataclass(frozen=True)
class _Launch:
    """The backward kernels of a window."""

    inputs: Inputs
    pairs: Pairs
    n_groups: int
    known: Merged
    target: _Target
    operands: torch.dtype
    constants: dict[str, Any]

    def run(self, deterministic: bool) -> None:
        """Add to the target."""
        spanned = self._blocks("hidden").width >= self.inputs.width
        if not spanned and not deterministic:
            return self._wide()
        if self.target.hidden is not None:
            self._narrow("hidden", deterministic)
        if self.target.rows is not None or self.target.bias is not None:
            self._narrow("rows", deterministic)
        return None

    def _blocks(self, kind: Kind) -> Blocks:
        return blocks_of(kind, self.inputs, self.pairs, self.operands)

    def _wide(self) -> None:
        blocks = self._blocks("wide")
        n_tiles = -(-self.pairs.n // blocks.tokens) * -(-self.pairs.n_columns // blocks.classes)
        wide_kernel[(self.n_groups * n_tiles,)](
            self.inputs.in_units(),
            self.pairs,
            self.known,
            self.target.hidden,
            self.target.rows,
            self.target.bias,
            OUT_BY_PLACE=self.target.rows_by_place,
            TURN=_TURN,
            **self.constants,
            **blocks.options(self.inputs),
        )

    def _narrow(self, kind: Kind, deterministic: bool) -> None:
        inputs, pairs, target = self.inputs, self.pairs, self.target
        blocks = self._blocks(kind)
        n_blocks = -(-pairs.n // blocks.tokens), -(-pairs.n_columns // blocks.classes)
        n_owned, n_walked = n_blocks if kind == "hidden" else n_blocks[::-1]
        n_programs = self.n_groups * n_owned * -(-inputs.width // blocks.width)
        splits = 1 if deterministic else n_splits(n_programs, n_walked, inputs.hidden.device)
        shared = {
            "ONE": blocks.width >= inputs.width,
            **self.constants,
            **blocks.options(inputs),
        }
        grid, packed = (n_programs * splits,), inputs.in_units()
        if kind == "hidden":
            shared |= {"OUT_BY_PLACE": deterministic, "ATOMIC": not deterministic}
            hidden_kernel[grid](packed, pairs, self.known, target.hidden, splits, **shared)
        else:
            atomic = splits > 1 or not target.rows_by_place
            shared |= {"OUT_BY_PLACE": target.rows_by_place, "ATOMIC": atomic}
            rows_kernel[grid](packed, pairs, self.known, target.rows, target.bias, splits, **shared)
