"""The logits of the labels' own pairs, which are no part of a plan, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_rece.ops.products import operand_dtype
from hf_rece.ops.stream_torch import Gradients, Scores, cap_logits


def label_logits(scores: Scores, labels: Tensor, tile_bytes: int) -> Tensor:
    """Return the logit (N,) of each token's own label (N,)."""
    pieces = [
        cap_logits(_pair_scores(scores, piece, ids), scores.scale, scores.softcap)
        for piece, ids in _label_pieces(scores, labels, tile_bytes)
    ]
    return torch.cat(pieces) if pieces else scores.hidden.new_zeros(0, dtype=scores.dtype)


def label_backward(
    scores: Scores,
    labels: Tensor,
    grad: Tensor,
    into: Gradients,
    tile_bytes: int,
    tokens: Tensor | None = None,
) -> None:
    """Add the gradients of `label_logits`, whose own gradient is `grad` (N,), into the buffers.

    With distinct `tokens` (K,), only theirs.
    """
    for piece, ids in _label_pieces(scores, labels, tile_bytes, tokens):
        factor = grad[piece] * scores.scale
        if scores.softcap is not None:
            logits = cap_logits(_pair_scores(scores, piece, ids), scores.scale, scores.softcap)
            factor = factor * (1 - (logits / scores.softcap).square_())
        if into.hidden is not None:
            into.hidden[piece] += _operand(scores, scores.rows.rows(ids)) * factor.unsqueeze(1)
        if into.rows is not None:
            hidden = _operand(scores, scores.hidden[piece])
            scores.rows.add_grad(into.rows, ids, hidden * factor.unsqueeze(1))
        if into.bias is not None:
            into.bias.index_add_(0, ids, factor)


def _label_pieces(
    scores: Scores, labels: Tensor, tile_bytes: int, tokens: Tensor | None = None
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    step = max(1, tile_bytes // (8 * scores.rows.width))
    for start in range(0, len(labels if tokens is None else tokens), step):
        part = slice(start, start + step)
        piece = part if tokens is None else tokens[part]
        yield piece, labels[piece]


def _pair_scores(scores: Scores, piece: slice | Tensor, ids: Tensor) -> Tensor:
    hidden = _operand(scores, scores.hidden[piece])
    logits: Tensor = torch.linalg.vecdot(hidden, _operand(scores, scores.rows.rows(ids)))
    return logits if scores.bias is None else logits + scores.bias[ids].to(scores.dtype)


def _operand(scores: Scores, vectors: Tensor) -> Tensor:
    """Return vectors as they are multiplied with those of other classes."""
    dtype = operand_dtype(vectors.dtype, vectors.dtype, scores.autocast)
    return vectors.to(dtype).to(scores.dtype)
