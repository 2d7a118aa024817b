"""Masks of sparse weights: drawn at the start, moved by magnitude and gradient. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A tensor never falls below this share of its first active weights: an empty one gets no gradient
# through the others, and would never recover.
SMALLEST_SHARE = 0.1


def random_mask(shape: torch.Size, n_active: int, generator: torch.Generator) -> Tensor:
    """Return a mask of `shape` with exactly n_active entries set, drawn uniformly on the CPU."""
    scores = torch.rand(shape.numel(), generator=generator)
    return _mask_of(scores.topk(n_active, sorted=False).indices, shape)


def magnitude_mask(weight: Tensor, n_active: int) -> Tensor:
    """Return the mask, of the shape of `weight`, of its n_active largest magnitudes."""
    scores = weight.detach().abs().flatten()
    return _mask_of(scores.topk(n_active, sorted=False).indices, weight.shape)


@torch.no_grad()
def move_weights(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    ratio: float,
    floors: Mapping[str, int],
) -> dict[str, Tensor]:
    """Drop the smallest active weights, grow as many where the gradients are largest; in place.

    All tensors share one budget: magnitudes are compared between them, and so are gradients.
    Exactly as many weights are grown as are dropped, ties or not. A weight that was just dropped
    does not come back at once. Dropped and grown weights are 0.

    Args:
        weights: by name, any shapes.
        masks: the active weights, bool of the shapes of the weights.
        gradients: accumulated, of the shapes of the weights.
        ratio: share of the active weights to move; fewer move if there is nowhere to go.
        floors: active weights that each tensor keeps at least; its largest ones.

    Returns:
        By name, the flat indices of the weights that were dropped or grown.
    """
    n_active = sum(int(mask.sum()) for mask in masks.values())
    n_weights = sum(mask.numel() for mask in masks.values())
    n_kept = sum(floors[name] for name in weights)
    n_moved = min(round(ratio * n_active), n_active - n_kept, n_weights - n_active)
    if n_moved <= 0:
        return {name: torch.empty(0, dtype=torch.long) for name in weights}
    small: dict[str, Tensor] = {}
    steep: dict[str, Tensor] = {}
    for name, weight in weights.items():
        mask = masks[name].flatten()
        magnitude = weight.flatten().abs().float()
        kept = magnitude.masked_fill(~mask, -1.0).topk(floors[name], sorted=False).indices
        small[name] = -magnitude.masked_fill_(~mask, torch.inf)
        small[name][kept] = -torch.inf
        steep[name] = gradients[name].flatten().abs().masked_fill_(mask, -torch.inf)
    dropped, grown = _largest(small, n_moved), _largest(steep, n_moved)
    moved: dict[str, Tensor] = {}
    for name, weight in weights.items():
        moved[name] = torch.cat([dropped[name], grown[name]])
        masks[name].view(-1)[dropped[name]] = False
        masks[name].view(-1)[grown[name]] = True
        weight.view(-1)[moved[name]] = 0
    return moved


def _largest(scores: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Return, by name, the flat indices of the n largest scores of all tensors together."""
    joined = torch.cat(list(scores.values()))
    chosen = _mask_of(joined.topk(n, sorted=False).indices, joined.shape)
    parts = chosen.split([len(score) for score in scores.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(scores, parts, strict=True)}


def _mask_of(indices: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask.view(shape)
