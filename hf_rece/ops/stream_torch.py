"""The streaming kernel in plain torch: the specification that faster kernels are held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rece.ops.plan import Plan, Tile, walk
from hf_rece.ops.products import (
    batched_product,
    batched_transposed_product,
    multiplies_halves,
    operand_dtype,
)
from hf_rece.ops.rows import OutputRows, accumulation_dtype


@dataclass(frozen=True)
class Scores:
    """How a logit is made: l = softcap(scale * (<h, w> + b)), softcap(z) = c tanh(z / c).

    Args:
        hidden: (N, D).
        rows: C rows of width D.
        bias: (C,) or None.
        scale: logit_scale.
        softcap: c, or None for no cap.
        autocast: what the operands of products are rounded to, or None.
    """

    hidden: Tensor
    rows: OutputRows
    bias: Tensor | None
    scale: float
    softcap: float | None
    autocast: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which logits and gradients are accumulated."""
        return accumulation_dtype(self.hidden.dtype)


@dataclass(frozen=True)
class Gradients:
    """Buffers that a backward walk adds into; None where no gradient is wanted.

    Args:
        hidden: (N, D) in the accumulation dtype.
        rows: one buffer for each of the rows' tensors, None for those without a gradient.
        bias: (C,) in the accumulation dtype.
    """

    hidden: Tensor | None
    rows: tuple[Tensor | None, ...] | None
    bias: Tensor | None


# ----------------------------------------------------------------------------------------- tiles


def _tile_inputs(scores: Scores, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the tile's hidden states (G, n, D) and rows (G, m, D), ready to be multiplied."""
    n_groups, n = tile.tokens.shape
    # Padding tokens and classes read the last row: their logits are dropped or weigh nothing.
    tokens = tile.tokens.reshape(-1).clamp(max=len(scores.hidden) - 1)
    hidden = scores.hidden.index_select(0, tokens)
    rows = scores.rows.rows(_row_ids(tile, scores.rows.n_rows))
    dtype = operand_dtype(hidden.dtype, rows.dtype, scores.autocast)
    if dtype.itemsize > 2 or not multiplies_halves(hidden.device):
        dtype = scores.dtype
    return hidden.to(dtype).view(n_groups, n, -1), rows.to(dtype).view(n_groups, -1, rows.shape[1])


def _row_ids(tile: Tile, n_rows: int) -> Tensor | slice:
    if isinstance(tile.classes, slice):
        return tile.classes
    return tile.classes.reshape(-1).clamp(max=n_rows - 1)


def _capped_logits(scores: Scores, tile: Tile, hidden: Tensor, rows: Tensor) -> Tensor:
    """Return logits (G, n, m) before log-weights and drops."""
    logits = batched_product(hidden, rows)
    if scores.bias is not None:
        bias = scores.bias[_row_ids(tile, scores.rows.n_rows)].to(scores.dtype)
        logits += bias.view(len(rows), 1, -1)
    return cap_logits(logits, scores.scale, scores.softcap)


def cap_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Apply logit_scale, then logit_softcap, in place."""
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _drop(logits: Tensor, tile: Tile) -> Tensor:
    """Set logits that are not scored to -inf, in place."""
    if tile.dropped is not None:
        logits.masked_fill_(tile.dropped, -torch.inf)
    if tile.skip is not None:
        logits.view(-1).index_fill_(0, tile.skip, -torch.inf)
    return logits


def _weigh(logits: Tensor, tile: Tile) -> Tensor:
    """Add the class log-weights, in place."""
    return logits if tile.class_log_weight is None else logits.add_(tile.class_log_weight[:, None])


# --------------------------------------------------------------------------------------- forward


@dataclass(frozen=True)
class Observations:
    """What a forward walk notes of the classes that each token meets, beside their merge.

    Args:
        largest: (N + 1,) the largest logit, without log-weights; -inf for a token without classes.
        mean: (N + 1,) the mean logit, without log-weights, each class in proportion to its share of
            the merge; NaN with merge="sum", whose classes share nothing.
    """

    largest: Tensor
    mean: Tensor


def forward(
    scores: Scores, plan: Plan, *, observe: bool = False
) -> tuple[Tensor, Tensor | None, Observations | None]:
    """Return each token's merged scores, -inf (or 0 for "sum") for a token that meets no class.

    Returns:
        (N + 1,) values in the accumulation dtype; the last belongs to the padding token.
        (N + 1,) int64 number of the group that won, for merge="maximum"; else None.
        What was observed on the way, if asked for.
    """
    merge = {
        "logaddexp": _merge_logaddexp,
        "maximum": _merge_maximum,
        "sum": _merge_sum,
    }[plan.merge]
    seen = None
    if observe:
        empty = scores.hidden.new_full((plan.n_tokens + 1,), -torch.inf, dtype=scores.dtype)
        seen = Observations(empty, torch.full_like(empty, torch.nan))
    merged, winner = merge(scores, plan, seen)
    return merged, winner, seen


def _scored_tiles(
    scores: Scores, plan: Plan, seen: Observations | None
) -> Iterator[tuple[Tile, Tensor]]:
    for tile in walk(plan, scores.rows.width):
        hidden, rows = _tile_inputs(scores, tile)
        logits = _drop(_capped_logits(scores, tile, hidden, rows), tile)
        if seen is not None:
            _note_largest(logits, tile, seen)
        yield tile, _weigh(logits, tile)


def _note_largest(logits: Tensor, tile: Tile, seen: Observations) -> None:
    seen.largest.scatter_reduce_(0, tile.tokens.reshape(-1), logits.amax(2).reshape(-1), "amax")


def _max_and_sum(logits: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return (G, n) maxima and sums of exp(logit - maximum), overwriting the logits by exp."""
    # A finite floor in place of -inf keeps -inf minus the maximum from being NaN.
    top = logits.amax(2).clamp_(min=torch.finfo(logits.dtype).min)
    total = logits.sub_(top.unsqueeze(2)).exp_().sum(2)
    if tile.token_log_weight is not None:
        top = top + tile.token_log_weight
    return top, total


def _mean_logit(exponentials: Tensor, top: Tensor, total: Tensor, tile: Tile) -> Tensor:
    """Return (G, n) mean logits without log-weights, from what _max_and_sum left and returned."""
    # entr(e) = -e log(e), and log(e) is the logit less its maximum.
    mean: Tensor = top - torch.special.entr(exponentials).sum(2) / total
    if tile.token_log_weight is not None:
        mean -= tile.token_log_weight
    if tile.class_log_weight is not None:
        weights = tile.class_log_weight.to(exponentials.dtype).unsqueeze(1)
        mean -= torch.linalg.vecdot(exponentials, weights) / total
    return mean.masked_fill_(total == 0, 0)


def _merge_logaddexp(
    scores: Scores, plan: Plan, seen: Observations | None
) -> tuple[Tensor, Tensor | None]:
    size = (plan.n_tokens + 1,)
    floor = torch.finfo(scores.dtype).min
    running_max = scores.hidden.new_full(size, floor, dtype=scores.dtype)
    running_sum = torch.zeros_like(running_max)
    running_mean = torch.zeros_like(running_max)  # times running_sum
    for tile, logits in _scored_tiles(scores, plan, seen):
        top, total = _max_and_sum(logits, tile)
        tokens = tile.tokens.reshape(-1)
        old = running_max[tokens]
        running_max.scatter_reduce_(0, tokens, top.reshape(-1), "amax")
        new = running_max[tokens]
        # A token that occurs in several groups of the tile is written the same value each time.
        shrink = (old - new).exp_()
        mass = total.reshape(-1) * (top.reshape(-1) - new).exp_()
        running_sum[tokens] = running_sum[tokens] * shrink
        running_sum.index_add_(0, tokens, mass)
        if seen is not None:
            mean = _mean_logit(logits, top, total, tile).reshape(-1)
            running_mean[tokens] = running_mean[tokens] * shrink
            running_mean.index_add_(0, tokens, mass * mean)
    if seen is not None:
        seen.mean.copy_(running_mean / running_sum)
    return running_sum.log_().add_(running_max), None


def _merge_maximum(
    scores: Scores, plan: Plan, seen: Observations | None
) -> tuple[Tensor, Tensor | None]:
    size = (plan.n_tokens + 1,)
    best = scores.hidden.new_full(size, -torch.inf, dtype=scores.dtype)
    winner = torch.full(size, -1, dtype=torch.long, device=best.device)
    for tile, logits in _scored_tiles(scores, plan, seen):
        top, total = _max_and_sum(logits, tile)
        mean = None if seen is None else _mean_logit(logits, top, total, tile)
        value = total.log_().add_(top)  # (G, n)
        tokens = tile.tokens.reshape(-1)
        best.scatter_reduce_(0, tokens, value.reshape(-1), "amax")
        groups = torch.arange(len(value), device=best.device) + tile.first_group
        won = (value == best[tile.tokens]) & (value > -torch.inf)
        # Of groups with equal values, the last one written wins: one group alone, as published.
        winner[tile.tokens[won]] = groups.unsqueeze(1).expand_as(won)[won]
        if seen is not None and mean is not None:
            seen.mean[tile.tokens[won]] = mean[won]
    return best, winner


def _merge_sum(
    scores: Scores, plan: Plan, seen: Observations | None
) -> tuple[Tensor, Tensor | None]:
    total = scores.hidden.new_zeros((plan.n_tokens + 1,), dtype=scores.dtype)
    for tile, logits in _scored_tiles(scores, plan, seen):
        total.index_add_(0, tile.tokens.reshape(-1), F.softplus(logits).sum(2).reshape(-1))
    return total, None


# -------------------------------------------------------------------------------------- backward


def backward(
    scores: Scores,
    plan: Plan,
    merged: Tensor,
    winner: Tensor | None,
    grad: Tensor,
    into: Gradients,
) -> None:
    """Add the gradients of `forward` into the buffers, recomputing the logits tile by tile.

    Args:
        scores: as in forward.
        plan: as in forward.
        merged: (N + 1,), from forward.
        winner: (N + 1,), from forward.
        grad: (N + 1,), gradient of the merged values, 0 for the padding token.
        into: buffers to add into.
    """
    shift = _shift(merged, plan)
    if winner is not None:
        plan = winners_only(plan, winner)
    for tile in walk(plan, scores.rows.width):
        # A call of its own, so that nothing of a tile outlives it.
        _backward_tile(scores, plan, tile, shift, winner, grad, into)


def _backward_tile(
    scores: Scores,
    plan: Plan,
    tile: Tile,
    shift: Tensor,
    winner: Tensor | None,
    grad: Tensor,
    into: Gradients,
) -> None:
    hidden, rows = _tile_inputs(scores, tile)
    logits = _capped_logits(scores, tile, hidden, rows)
    slope = None if scores.softcap is None else 1 - (logits / scores.softcap).square_()
    share = _share(_weigh(_drop(logits, tile), tile), tile, plan, shift, winner)
    if slope is not None:
        share *= slope
    _add_tile_grads(scores, tile, share, grad[tile.tokens], (hidden, rows), into)


def _shift(merged: Tensor, plan: Plan) -> Tensor:
    """Return what to subtract from a logit so that its exponential is its share of the merge."""
    shift = merged.masked_fill(merged == -torch.inf, 0)
    # exp(logit - inf) = 0: the padding token's share, whatever it scored.
    shift[plan.n_tokens] = torch.inf
    return shift


def winners_only(plan: Plan, winner: Tensor) -> Plan:
    """Return the plan without the tokens of groups that lost: their gradient is zero."""
    grids, first_group = [], 0
    for grid in plan.grids:
        groups = torch.arange(len(grid.tokens), device=winner.device) + first_group
        first_group += len(groups)
        if grid.skip is not None or grid.token_log_weight is not None:
            grids.append(grid)  # these know tokens by their places
            continue
        tokens = grid.tokens.long()
        won = winner[tokens] == groups.unsqueeze(1)
        most = max(1, int(won.sum(1).max()))
        kept = tokens.masked_fill(~won, plan.n_tokens).sort(dim=1).values[:, :most]
        grids.append(replace(grid, tokens=kept))
    return replace(plan, grids=tuple(grids))


def _share(logits: Tensor, tile: Tile, plan: Plan, shift: Tensor, winner: Tensor | None) -> Tensor:
    """Return d merged / d logit (G, n, m), overwriting the logits."""
    if plan.merge == "sum":
        return logits.sigmoid_()
    token_shift = shift[tile.tokens]  # (G, n)
    if tile.token_log_weight is not None:
        token_shift = token_shift - tile.token_log_weight
    if winner is not None:
        groups = torch.arange(len(logits), device=logits.device) + tile.first_group
        lost = winner[tile.tokens] != groups.unsqueeze(1)
        token_shift = token_shift.masked_fill(lost, torch.inf)
    return logits.sub_(token_shift.unsqueeze(2)).exp_()


def _add_tile_grads(
    scores: Scores,
    tile: Tile,
    share: Tensor,
    grad: Tensor,
    inputs: tuple[Tensor, Tensor],
    into: Gradients,
) -> None:
    hidden, rows = inputs
    # The token's factor multiplies the narrow (G, n, D) side, not the (G, n, m) shares.
    factor = (grad * scores.scale).unsqueeze(2)  # (G, n, 1)
    ids = _row_ids(tile, scores.rows.n_rows)
    if into.bias is not None:
        grad_bias = torch.bmm(share.transpose(1, 2), factor).view(-1)
        if isinstance(ids, slice):
            into.bias[ids] += grad_bias
        else:
            into.bias.index_add_(0, ids, grad_bias)
    unit = None
    if rows.dtype != share.dtype:
        # Rounded to half precision, shares and factors near zero need room.
        room = 2.0**15 if rows.dtype == torch.float16 else 1.0
        largest = factor.abs().amax().clamp(min=torch.finfo(factor.dtype).tiny)
        share, factor, unit = share.mul_(room).to(rows.dtype), factor / largest, largest / room
    if into.hidden is not None:
        tokens = tile.tokens.reshape(-1).clamp(max=len(scores.hidden) - 1)
        grad_hidden = _in_units(batched_product(share, rows.transpose(1, 2)).mul_(factor), unit)
        into.hidden.index_add_(0, tokens, grad_hidden.view(len(tokens), -1))
    if into.rows is not None:
        weighted = (hidden * factor).to(rows.dtype)
        grad_rows = _in_units(batched_transposed_product(share, weighted), unit)
        scores.rows.add_grad(into.rows, ids, grad_rows.reshape(-1, scores.rows.width))


def _in_units(grad: Tensor, unit: Tensor | None) -> Tensor:
    return grad if unit is None else grad.mul_(unit)
