"""The contract of the streaming kernel, its autograd function, and the choice of backend."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops import stream_torch
from hf_rece.ops.plan import Plan
from hf_rece.ops.rows import OutputRows, accumulation_dtype
from hf_rece.ops.stream_torch import Gradients, Scores

Backend = Literal["auto", "torch"]
BACKENDS = ("auto", "torch")


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
    outputs = _Stream.apply(
        plan, rows, logit_scale, logit_softcap, labels, hidden, bias, *rows.tensors()
    )
    return cast("tuple[Tensor, Tensor]", outputs)


class _Stream(torch.autograd.Function):
    """(label logits, merged scores) and their gradients, recomputed tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        rows: OutputRows,
        scale: float,
        softcap: float | None,
        labels: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scores = Scores(hidden, rows, bias, scale, softcap)
        # Autocast would run the tile's products in low precision.
        with torch.autocast(hidden.device.type, enabled=False):
            own = stream_torch.label_logits(scores, labels, plan.tile_bytes)
            merged, winner = stream_torch.forward(scores, plan)
        ctx.save_for_backward(labels, hidden, bias, merged, winner, *tensors)
        ctx.plan, ctx.rows, ctx.scale, ctx.softcap = plan, rows, scale, softcap
        return own, merged[: plan.n_tokens].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_own: Tensor, grad_merged: Tensor) -> tuple[Tensor | None, ...]:
        labels, hidden, bias, merged, winner, *tensors = ctx.saved_tensors
        scores = Scores(hidden, ctx.rows, bias, ctx.scale, ctx.softcap)
        wants_hidden, wants_bias, *wants_rows = ctx.needs_input_grad[5:]
        into = Gradients(
            hidden=_buffer(hidden) if wants_hidden else None,
            rows=_row_buffers(tensors, wants_rows),
            bias=_buffer(bias) if wants_bias else None,
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
            None,
            None,
            None,
            None,
            None,
            None if into.hidden is None else into.hidden.to(hidden.dtype),
            None if into.bias is None else into.bias.to(bias.dtype),
            *rows_grads,
        )


def _row_buffers(tensors: list[Tensor], wanted: list[bool]) -> tuple[Tensor | None, ...] | None:
    if not any(wanted):
        return None
    return tuple(
        _buffer(tensor) if wants else None for tensor, wants in zip(tensors, wanted, strict=True)
    )


def _buffer(tensor: Tensor) -> Tensor:
    dtype = accumulation_dtype(tensor.dtype)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
