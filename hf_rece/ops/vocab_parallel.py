"""The streaming kernel over classes that are cut over processes: one more merge.

    gather   the tokens of all processes: every process makes the same plan     losses/options.py
    local    cut the plan to the classes of this process                        local_plan
    stream   walk it with any backend, over the local shard                     stream_torch.py
    merge    fold the processes' log-sum-exps, as tiles and rounds are folded   sharded_stream

A shard's gradient is the mean over the processes of what their losses ask for: that of a whole
table under DistributedDataParallel. It stays on its process, and so does its optimiser state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hf_rece.ops.gradients import Labels, Wanted, gradients_of
from hf_rece.ops.labels import label_logits
from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.products import autocast_dtype, without_autocast
from hf_rece.ops.shards import ShardedRows, VocabShards
from hf_rece.ops.stream import Backend, Kernel, choose_kernel, walked
from hf_rece.ops.stream_torch import Gradients, Scores

# ------------------------------------------------------------------------------------- local plans


@torch.no_grad()
def local_plan(plan: Plan, shards: VocabShards) -> Plan:
    """Return the part of a plan that scores this process's classes, numbered as in its shard.

    Groups and tokens stay as they are; a group may be left with no class. The parts of all
    processes together are the plan. RECE's is made as such a part, and stays as it is.

    Args:
        plan: over all C classes, the same in every process; or local already.
        shards: how the classes are cut.

    Memory:
        O(pairs of the plan's group and class that are local) integers.
    """
    if plan.n_classes == shards.n_local:
        return plan
    grids = tuple(_local_grid(grid, shards) for grid in plan.grids)
    return replace(plan, grids=grids, n_classes=shards.n_local)


def _local_grid(grid: Grid, shards: VocabShards) -> Grid:
    if grid.classes is None:
        skip, blocked = grid.skip, grid.blocked
        if skip is not None:
            skip = skip[shards.is_local(skip[:, 2])] - skip.new_tensor([0, 0, shards.first])
        if blocked is not None:
            blocked = blocked[shards.is_local(blocked)] - shards.first
        return replace(grid, skip=skip, blocked=blocked)
    n_columns = grid.classes.shape[1]
    group, column = shards.is_local(grid.classes).nonzero().unbind(1)  # in order
    n_kept = torch.bincount(group, minlength=len(grid.classes))
    place = torch.arange(len(group), device=group.device) - (n_kept.cumsum(0) - n_kept)[group]

    def kept(values: Tensor, padding: float) -> Tensor:
        table = values.new_full((len(values), int(n_kept.max())), padding)
        table[group, place] = values[group, column]
        return table

    skip, weight, own = grid.skip, grid.class_log_weight, grid.own_labels
    if skip is not None and len(group):
        wanted, known = skip[:, 0] * n_columns + skip[:, 2], group * n_columns + column
        index = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
        skip = torch.stack([skip[:, 0], skip[:, 1], place[index]], dim=1)[known[index] == wanted]
    elif skip is not None:
        skip = skip[:0]
    return replace(
        grid,
        classes=kept(grid.classes, shards.stop) - shards.first,
        skip=skip,
        own_labels=None if own is None else shards.localise(own, -1),
        class_log_weight=None if weight is None else kept(weight, 0.0),
    )


# ------------------------------------------------------------------------------------------ stream


def sharded_stream(
    hidden: Tensor,
    rows: ShardedRows,
    labels: Tensor,
    plan: Plan,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what hf_rece.ops.stream.stream returns, over rows that are cut over processes.

    Collective, and so is its backward: three messages of the size of the tokens (with
    merge="maximum", of the plan's pairs of group and token) forward, and one backward. hidden gets
    the gradient through this process's classes, which SharedTokens.gather adds up; the rows get the
    mean over the processes. Where a tile does not fit, a process walks its own part again, see
    with_smaller_tiles, and the others wait for it.

    Args:
        hidden: (N, D), the tokens of all processes.
        rows: C output rows of width D.
        labels: (N,) int64 in [0, C).
        plan: the pairs of all N tokens and C classes, the same in every process, or of this
            process's classes.
        bias: of this process's classes, or None.
        logit_scale: multiplies every logit.
        logit_softcap: caps a logit at c tanh(logit / c), after the scale.
        backend: see choose_kernel.

    Returns:
        label_logits: (N,), the same in every process.
        merged: (N,) likewise.
    """
    kernel = choose_kernel(backend, hidden, rows.local)
    local = local_plan(plan, rows.shards)
    autocast = autocast_dtype(hidden.device)
    how = _How(kernel, backend == "auto", local, rows, logit_scale, logit_softcap, autocast)
    label_logits, merged = _ShardedStream.apply(how, labels, hidden, bias, *rows.tensors())
    return label_logits, merged


@dataclass(frozen=True)
class _How:
    """What is no tensor; the plan is local."""

    kernel: Kernel
    may_differ: bool
    plan: Plan
    rows: ShardedRows
    scale: float
    softcap: float | None
    autocast: torch.dtype | None

    def scores(self, hidden: Tensor, bias: Tensor | None) -> Scores:
        return Scores(hidden, self.rows.local, bias, self.scale, self.softcap, self.autocast)

    def own_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return which labels (N,) are of this process, and their rows; row 0 for the others."""
        return self.rows.shards.is_local(labels), self.rows.shards.localise(labels, 0)


class _ShardedStream(torch.autograd.Function):
    """(label logits, merged scores) of all processes, and the gradients of this one's shard."""

    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        labels: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scores, plan, shards = how.scores(hidden, bias), how.plan, how.rows.shards
        is_own, local = how.own_labels(labels)

        def walk(kernel: Kernel, plan: Plan) -> tuple[Tensor, list[Tensor]]:
            sized = replace(how, kernel=kernel, plan=plan)
            own = label_logits(scores, local, plan.tile_bytes)
            if plan.merge == "maximum":
                return own, [_group_values(sized, scores, grid) for grid in plan.grids]
            return own, [kernel.forward(scores, plan)[0]]

        with without_autocast(hidden.device):
            own, values = walked(how.kernel, plan, walk, may_differ=how.may_differ)
            own = shards.sum(own.masked_fill_(~is_own, 0))
            winner = None
            if plan.merge == "maximum":
                merged, winner = _merge_maximum(how, scores, values)
            else:
                merged = _MERGES[plan.merge](values[0], shards)
        ctx.save_for_backward(labels, hidden, bias, merged, winner, *tensors)
        ctx.how = how
        return own, merged[: plan.n_tokens].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_own: Tensor, grad_merged: Tensor) -> tuple[Tensor | None, ...]:
        labels, hidden, bias, merged, winner, *_ = ctx.saved_tensors
        how: _How = ctx.how
        scores, shards = how.scores(hidden, bias), how.rows.shards
        wants_hidden, wants_bias, *wants_rows = ctx.needs_input_grad[2:]
        wanted = Wanted(wants_hidden, wants_bias, wants_rows)
        # Each process knows the gradients of its own tokens' losses.
        both = shards.sum(torch.stack([grad_own, grad_merged]))
        grad_own, grad_merged = torch.cat([both, both.new_zeros(2, 1)], dim=1).unbind(0)
        is_own, local = how.own_labels(labels)
        of_labels = Labels(local, grad_own[:-1].masked_fill(~is_own, 0))
        share = 1 / shards.world_size

        def walk(kernel: Kernel, plan: Plan) -> Gradients:
            def add(scores: Scores, plan: Plan, into: Gradients) -> None:
                kernel.backward(scores, plan, merged, winner, grad_merged, into)

            return gradients_of(scores, plan, of_labels, wanted, add, row_share=share)

        with without_autocast(hidden.device):
            found = walked(how.kernel, how.plan, walk, may_differ=how.may_differ)
        return None, None, found.hidden, found.bias, *(found.rows or ())


# ------------------------------------------------------------------------------------------- merge


def _merge_logaddexp(values: Tensor, shards: VocabShards) -> Tensor:
    """Return the log of the sum over the processes of exp(values), elementwise. Collective."""
    # A finite floor in place of -inf keeps -inf minus the maximum from being NaN.
    top = shards.largest(values.clone()).clamp_(min=torch.finfo(values.dtype).min)
    return shards.sum((values - top).exp_()).log_().add_(top)


def _merge_sum(values: Tensor, shards: VocabShards) -> Tensor:
    return shards.sum(values)


_MERGES = {"logaddexp": _merge_logaddexp, "sum": _merge_sum}


def _merge_maximum(how: _How, scores: Scores, local: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return each token's largest log-sum-exp of a group (N + 1,), and that group's number.

    Groups are compared by all of their classes, so theirs are merged before the maximum is taken.

    Args:
        how: the plan, local.
        scores: of all tokens.
        local: of each grid, its _group_values.
    """
    plan = how.plan
    best = scores.hidden.new_full((plan.n_tokens + 1,), -torch.inf, dtype=scores.dtype)
    winner = torch.full_like(best, -1, dtype=torch.long)
    first_group = 0
    for grid, of_classes_here in zip(plan.grids, local, strict=True):
        values = _merge_logaddexp(of_classes_here, how.rows.shards)
        tokens = grid.tokens.reshape(-1).long()
        best.scatter_reduce_(0, tokens, values, "amax")
        groups = torch.arange(len(grid.tokens), device=best.device) + first_group
        first_group += len(groups)
        won = (values == best[tokens]) & (values > -torch.inf)
        # Of groups with equal values, the last.
        numbers = groups.repeat_interleave(grid.tokens.shape[1])[won]
        winner.scatter_reduce_(0, tokens[won], numbers, "amax")
    return best, winner


def _pieces(grid: Grid, scores: Scores, plan: Plan) -> list[Grid]:
    """Cut a grid, whose classes are given, into groups whose states together fill a tile."""
    a_group = grid.tokens.shape[1] * scores.hidden.shape[1] * scores.hidden.element_size()
    step = max(1, plan.tile_bytes // a_group)
    classes = cast(Tensor, grid.classes)
    return [
        replace(grid, tokens=of_tokens, classes=of_classes)
        for of_tokens, of_classes in zip(grid.tokens.split(step), classes.split(step), strict=True)
    ]


def _group_values(how: _How, scores: Scores, grid: Grid) -> Tensor:
    """Return (G * n,) log-sum-exps of each token over the local classes of each of its groups."""
    pieces = _pieces(grid, scores, how.plan)
    return torch.cat([_values_of_piece(how, scores, piece) for piece in pieces])


def _values_of_piece(how: _How, scores: Scores, grid: Grid) -> Tensor:
    # As a plan in which every pair of group and token is a token of its own.
    members = grid.tokens.reshape(-1).long()
    places = torch.arange(len(members), device=members.device)
    own = None
    if grid.own_labels is not None:
        own = torch.cat([grid.own_labels[members], grid.own_labels[-1:]])
    states = scores.hidden.index_select(0, members.clamp(max=len(scores.hidden) - 1))
    apart = replace(grid, tokens=places.view(grid.tokens.shape), own_labels=own)
    plan = replace(how.plan, grids=(apart,), merge="logaddexp", n_tokens=len(members))
    of_states = replace(scores, hidden=states)
    merged, _, _ = how.kernel.forward(of_states, plan)
    return merged[:-1]
