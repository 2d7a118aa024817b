"""SCE: each bucket's top tokens meet its top classes (arXiv 2409.18721)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.products import search_dtype
from hf_rece.ops.rows import DenseRows, OutputRows, accumulation_dtype
from hf_rece.ops.topk import streamed_topk

# Fixed, so that the draws do not depend on the size of a tile.
_MIXED_AT_ONCE = 1024


@torch.no_grad()
def sce_plan(
    hidden: Tensor,
    rows: OutputRows,
    labels: Tensor,
    directions: Tensor,
    *,
    bucket_size_x: int,
    bucket_size_y: int,
    excluded_ids: Tensor | None,
    tile_bytes: int,
) -> Plan:
    """Return one group a bucket; a token in several buckets keeps the one with the largest loss.

    Args:
        hidden: (N, D).
        rows: C rows of width D.
        labels: (N,) int64.
        directions: (n_buckets, D), the buckets' centres; only their direction matters.
        bucket_size_x: tokens a bucket, at most N.
        bucket_size_y: classes a bucket.
        excluded_ids: (E,) int64 classes that are in no bucket.
        tile_bytes: bytes of a tile.

    Memory:
        O(n_buckets (bucket_size_x + bucket_size_y)) integers.
    """
    operands = search_dtype(hidden, rows.tensors())
    _, tokens = streamed_topk(
        directions, DenseRows(hidden), bucket_size_x, tile_bytes=tile_bytes, operands=operands
    )
    _, classes = streamed_topk(
        directions,
        rows,
        bucket_size_y,
        excluded_ids=excluded_ids,
        tile_bytes=tile_bytes,
        operands=operands,
    )
    n_tokens, n_classes = len(hidden), rows.n_rows
    grid = Grid(
        tokens=tokens.masked_fill_(tokens < 0, n_tokens).to(torch.int32),
        classes=classes.masked_fill_(classes < 0, n_classes).to(torch.int32),
        own_labels=torch.cat([labels, labels.new_full((1,), n_classes)]),
    )
    return Plan((grid,), "maximum", n_tokens, n_classes, tile_bytes)


@torch.no_grad()
def mixed_directions(n_buckets: int, hidden: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return (n_buckets, D): Omega^T hidden, random mixtures of the batch's own hidden states."""
    dtype = accumulation_dtype(hidden.dtype)
    directions = hidden.new_zeros((n_buckets, hidden.shape[1]), dtype=dtype)
    for piece in torch.split(hidden, _MIXED_AT_ONCE):
        weights = torch.randn(
            n_buckets, len(piece), dtype=dtype, device=hidden.device, generator=generator
        )
        directions.addmm_(weights, piece.to(dtype))
    return directions
