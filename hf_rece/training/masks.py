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
    return _largest({"": torch.rand(shape, generator=generator)}, n_active)[""]


def magnitude_masks(weights: Mapping[str, Tensor], n_active: int) -> dict[str, Tensor]:
    """Return, by name, the masks of the n_active largest magnitudes of all weights together."""
    return _largest({name: weight.detach().abs() for name, weight in weights.items()}, n_active)


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
        By name, bool of the shape of the weight, which weights were dropped or grown.
    """
    n_active = sum(int(mask.sum()) for mask in masks.values())
    n_weights = sum(mask.numel() for mask in masks.values())
    n_kept = sum(floors[name] for name in weights)
    n_moved = max(min(round(ratio * n_active), n_active - n_kept, n_weights - n_active), 0)
    small: dict[str, Tensor] = {}
    steep: dict[str, Tensor] = {}
    for name, weight in weights.items():
        mask = masks[name]
        magnitude = weight.abs().float()
        kept = _largest({name: magnitude.masked_fill(~mask, -torch.inf)}, floors[name])[name]
        small[name] = -magnitude.masked_fill_(~mask | kept, torch.inf)
        steep[name] = gradients[name].abs().masked_fill_(mask, -torch.inf)
    dropped, grown = _largest(small, n_moved), _largest(steep, n_moved)
    moved = {name: dropped[name] | grown[name] for name in weights}
    for name, weight in weights.items():
        masks[name].logical_xor_(moved[name])
        weight.masked_fill_(moved[name], 0)
    return moved


def _largest(scores: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Return, by name, masks of exactly n entries: the largest scores of all tensors together."""
    joined = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros(joined.shape, dtype=torch.bool, device=joined.device)
    chosen[joined.topk(n, sorted=False).indices] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }
