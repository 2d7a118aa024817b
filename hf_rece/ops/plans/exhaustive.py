"""Exact cross-entropy: every token meets every class."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rece.ops.plan import Grid, Plan, one_group


def exhaustive_plan(
    labels: Tensor, n_classes: int, *, excluded_ids: Tensor | None, tile_bytes: int
) -> Plan:
    """Return the plan of all pairs but the labels' own.

    Args:
        labels: (N,) int64 in [0, C).
        n_classes: C.
        excluded_ids: (E,) int64 classes that are never scored, or None.
        tile_bytes: bytes of a tile.
    """
    n_tokens = len(labels)
    tokens = one_group(n_tokens, labels.device)
    pairs = torch.stack([torch.zeros_like(labels), tokens[0, :n_tokens].long(), labels], dim=1)
    grid = Grid(
        tokens=tokens,
        classes=None,
        skip=pairs,
        skips_once=True,
        blocked=excluded_ids,
    )
    return Plan((grid,), "logaddexp", n_tokens, n_classes, tile_bytes)
