"""The contract of the streaming kernel, its autograd function, and the choice of backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops import stream_torch
from hf_rece.ops.plan import Plan
from hf_rece.ops.rows import OutputRows, gradient_buffer, gradient_buffers
from hf_rece.ops.stream_torch import Gradients, Scores

Backend = Literal["auto", "torch"]
BACKENDS = ("auto", "torch")


@dataclass
class TokenStatistics:
    """Filled by the loss that it is passed to: how sure the model is of each token.

    Exact with cross_entropy; with stratified an estimate of that; with other losses about the
    classes that they score.

    Args:
        entropy: float32 of the labels' shape, in nats, of the softmax over the label and the
            classes scored, in proportion to their log-weights; NaN with bce and gbce.
        is_top1: bool of the labels' shape: no class scored is above the label.
    """

    entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    is_top1: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


def stream(
    hidden: Tensor,
    rows: OutputRows,
    labels: Tensor,
    plan: Plan,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: Backend = "auto",
    statistics: TokenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Score each token's label, and merge its scores over the plan's pairs.

    Both results are differentiable in hidden, in the rows' tensors and in bias. The labels' own
    pairs are no part of the merge: a loss joins them by its own formula.

    Args:
        hidden: (N, D) floating point.
        rows: C output rows of width D.
        labels: (N,) int64 in [0, C).
        plan: the pairs, made for these N tokens and C classes.
        bias: (C,) or None.
        logit_scale: multiplies every logit.
        logit_softcap: caps a logit at c tanh(logit / c), after the scale.
        backend: "auto" chooses the fastest backend here, "torch" is the plain one.
        statistics: filled with (N,) tensors on the way, unless None.

    Returns:
        label_logits: (N,) in the accumulation dtype (float32; float64 for float64 inputs).
        merged: (N,) likewise; -inf for a token that met no class (0 with merge="sum").

    Raises:
        ArgumentError: for an unknown backend.

    Memory:
        O(N + D * C) for the gradients, plus one tile. Forward keeps two numbers a token.
    """
    if backend not in BACKENDS:
        raise ArgumentError(
            "backend", backend, "no such backend", f"Pass one of {', '.join(BACKENDS)}"
        )
    observe = statistics is not None
    label_logits, merged, largest, mean = _Stream.apply(
        plan, rows, logit_scale, logit_softcap, observe, labels, hidden, bias, *rows.tensors()
    )
    if statistics is not None:
        own, others = label_logits.detach(), merged.detach()
        share = (own - others).sigmoid()  # of the label, in the softmax over all that is scored
        total = torch.logaddexp(own, others)
        expected = share * own + (1 - share) * mean.masked_fill(share == 1, 0)
        statistics.entropy, statistics.is_top1 = total - expected, own >= largest
    return label_logits, merged


class _Stream(torch.autograd.Function):
    """(label logits, merged scores) and their gradients, recomputed tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        rows: OutputRows,
        scale: float,
        softcap: float | None,
        observe: bool,
        labels: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        scores = Scores(hidden, rows, bias, scale, softcap)
        # Autocast would run the tile's products in low precision.
        with torch.autocast(hidden.device.type, enabled=False):
            own = stream_torch.label_logits(scores, labels, plan.tile_bytes)
            merged, winner, seen = stream_torch.forward(scores, plan, observe=observe)
        ctx.save_for_backward(labels, hidden, bias, merged, winner, *tensors)
        ctx.plan, ctx.rows, ctx.scale, ctx.softcap = plan, rows, scale, softcap
        merged = merged[: plan.n_tokens].clone()
        if seen is None:
            return own, merged, None, None
        largest, mean = seen.largest[: plan.n_tokens], seen.mean[: plan.n_tokens]
        ctx.mark_non_differentiable(largest, mean)
        return own, merged, largest, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_own: Tensor, grad_merged: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        labels, hidden, bias, merged, winner, *tensors = ctx.saved_tensors
        scores = Scores(hidden, ctx.rows, bias, ctx.scale, ctx.softcap)
        wants_hidden, wants_bias, *wants_rows = ctx.needs_input_grad[6:]
        into = Gradients(
            hidden=gradient_buffer(hidden) if wants_hidden else None,
            rows=gradient_buffers(tensors, wants_rows),
            bias=gradient_buffer(bias) if wants_bias else None,
        )
        padded = torch.cat([grad_merged, grad_merged.new_zeros(1)])
        with torch.autocast(hidden.device.type, enabled=False):
            stream_torch.label_backward(scores, labels, grad_own, into, ctx.plan.tile_bytes)
            stream_torch.backward(scores, ctx.plan, merged, winner, padded, into)
        rows_grads = [
            None if buffer is None else buffer.to(tensor.dtype)
            for tensor, buffer in zip(tensors, into.rows or [None] * len(tensors), strict=True)
        ]
        return (
            *(None,) * 6,
            None if into.hidden is None else into.hidden.to(hidden.dtype),
            None if into.bias is None else into.bias.to(bias.dtype),
            *rows_grads,
        )
