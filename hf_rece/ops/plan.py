"""A plan says which (token, class) pairs a loss scores; a tile is the part of it scored at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError

Merge = Literal["logaddexp", "maximum", "sum"]

# Measured: on a CPU a tile should stay in the cache, on a GPU it should fill the device.
DEFAULT_TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Below this a matrix product spends its time on being called.
MIN_TILE_SIDE = 64


@dataclass(frozen=True)
class EarlierRound:
    """Chunk numbers of one earlier round: the pairs that it found are those within reach.

    Args:
        token_chunks: (N + 1,) integers; the last, the padding token's, is not read.
        class_chunks: (C + 1,) integers; the last, the padding class's, is not read.
        reach: a token meets the classes of chunks at most this far from its own.
    """

    token_chunks: Tensor
    class_chunks: Tensor
    reach: int


@dataclass(frozen=True)
class Grid:
    """G groups; every token of a group meets every class of that group, except what is dropped.

    Args:
        tokens: (G, n) integers below N; N pads a ragged group.
        classes: (G, m) integers below C; C pads a ragged group. None with G = 1 means all classes
            in order, read as slices.
        skip: (S, 3) int64 (group, token position, class position) of single pairs to drop. Labels
            are dropped so, because they are scored apart.
        skips_once: no two of these pairs have the same group and token position.
        own_labels: (N + 1,) integers: drop every pair whose class is the token's label. For grids
            where a label's position is not known, or where a class may occur twice in a group.
        earlier: drop the pairs that these rounds have already scored.
        blocked: (B,) int64 class ids to drop; only for `classes=None`, elsewhere pad instead.
        token_log_weight: (G, n), added to all logits of a token, after scale and softcap.
        class_log_weight: (G, m), added to all logits of a class, after scale and softcap.
    """

    tokens: Tensor
    classes: Tensor | None
    skip: Tensor | None = None
    skips_once: bool = False
    own_labels: Tensor | None = None
    earlier: tuple[EarlierRound, ...] = ()
    blocked: Tensor | None = None
    token_log_weight: Tensor | None = None
    class_log_weight: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """The pairs that a loss scores, and how a token's scores are reduced.

    Args:
        grids: walked in order.
        merge: how the groups of a token are folded: "logaddexp" adds up exponentials; "maximum"
            keeps the group with the largest log-sum-exp; "sum" adds up softplus(logit), the binary
            link.
        n_tokens: N.
        n_classes: C.
        tile_bytes: bytes that one tile may take.
    """

    grids: tuple[Grid, ...]
    merge: Merge
    n_tokens: int
    n_classes: int
    tile_bytes: int


@dataclass(frozen=True)
class Tile:
    """The part of a grid that is scored by one batched matrix product.

    Args:
        tokens: (G, n) int64; N pads.
        classes: (G, m) int64; C pads. A slice, with G = 1, for consecutive classes.
        first_group: number of the tile's first group, counted over all grids of the plan.
        skip: (S,) int64, flat positions in the (G, n, m) logits to drop.
        dropped: bool, broadcastable to (G, n, m): further pairs to drop.
        token_log_weight: (G, n) or None.
        class_log_weight: (G, m) or None.
    """

    tokens: Tensor
    classes: Tensor | slice
    first_group: int
    skip: Tensor | None
    dropped: Tensor | None
    token_log_weight: Tensor | None
    class_log_weight: Tensor | None


def one_group(n_tokens: int, device: torch.device) -> Tensor:
    """Return (1, n) int32, all N tokens, padded so that matrix products of few shapes serve all N.

    oneDNN keeps a program of a megabyte for every shape that it has met.
    """
    n_padded = n_tokens
    if n_tokens > MIN_TILE_SIDE:
        n_padded = -(-n_tokens // MIN_TILE_SIDE) * MIN_TILE_SIDE
    return torch.arange(n_padded, dtype=torch.int32, device=device).clamp_(max=n_tokens)[None]


def resolve_tile_bytes(tile_bytes: int | None, device: torch.device) -> int:
    """Return the byte budget of a tile: the caller's, or the device's default.

    Raises:
        ArgumentError: if `tile_bytes` is not positive.
    """
    if tile_bytes is None:
        return DEFAULT_TILE_BYTES.get(device.type, DEFAULT_TILE_BYTES["cpu"])
    if tile_bytes <= 0:
        raise ArgumentError(
            "tile_bytes", tile_bytes, "a tile needs room", "Pass bytes such as 4 * 2**20, or None"
        )
    return tile_bytes


def tile_shape(n_groups: int, n: int, m: int, width: int, tile_bytes: int) -> tuple[int, int, int]:
    """Return how many groups, tokens and classes go into a tile of `tile_bytes` bytes.

    A tile holds float32 logits, its rows and their gradient. A group too large for a tile is split,
    never below MIN_TILE_SIDE tokens and classes: a budget too small for that is exceeded.
    """
    budget = tile_bytes // 4
    n, m = max(n, 1), max(m, 1)
    whole = n * m + 2 * (n + m) * width
    if whole <= budget:
        groups = max(1, min(n_groups, budget // whole))
        # Batched products are dealt out by groups: whole rounds leave no thread idle.
        n_threads = torch.get_num_threads()
        return groups - groups % n_threads if groups > n_threads else groups, n, m
    # The side s of a square tile solves s * s + 4 * s * width = budget.
    side = int((4 * width**2 + budget) ** 0.5) - 2 * width
    tokens = max(_even(n, max(side, MIN_TILE_SIDE)), min(n, MIN_TILE_SIDE))
    classes = min(m, max(_fill(budget, tokens, width), MIN_TILE_SIDE))
    if classes == m:
        tokens = min(n, max(_fill(budget, m, width), MIN_TILE_SIDE))
    return 1, tokens, classes


def _even(whole: int, longest: int) -> int:
    """Return the length of the fewest pieces of at most `longest`, all about equally long."""
    return -(-whole // -(-whole // min(whole, longest)))


def _fill(budget: int, side: int, width: int) -> int:
    """Return how long a tile may be whose other side is given."""
    return (budget - 2 * side * width) // (side + 2 * width)


def walk(plan: Plan, width: int) -> Iterator[Tile]:
    """Yield the plan's tiles; two walks of one plan yield the same tiles in the same order."""
    first_group = 0
    for grid in plan.grids if plan.n_tokens else ():
        n_groups, n = grid.tokens.shape
        m = plan.n_classes if grid.classes is None else grid.classes.shape[1]
        step_g, step_n, step_m = tile_shape(n_groups, n, m, width, plan.tile_bytes)
        if plan.merge == "maximum" and step_m < m:
            # Groups are compared by their whole log-sum-exp: only their tokens may be split.
            step_n, step_m = max(1, min(n, plan.tile_bytes // (4 * (m + width)))), m
        skips = _skip_by_tile(grid.skip, (n_groups, n, m), (step_g, step_n, step_m))
        for g in range(0, n_groups, step_g):
            groups = slice(g, min(g + step_g, n_groups))
            for c in range(0, m, step_m):
                columns = slice(c, min(c + step_m, m))
                for t in range(0, n, step_n):
                    tokens = slice(t, min(t + step_n, n))
                    yield _cut(plan, grid, (groups, tokens, columns), next(skips), first_group + g)
        first_group += n_groups


def _cut(
    plan: Plan,
    grid: Grid,
    piece: tuple[slice, slice, slice],
    skip: Tensor | None,
    first_group: int,
) -> Tile:
    groups, tokens, columns = piece
    token_ids = grid.tokens[groups, tokens].long()
    class_ids = columns if grid.classes is None else grid.classes[groups, columns].long()
    if grid.blocked is not None:
        inside = grid.blocked[(grid.blocked >= columns.start) & (grid.blocked < columns.stop)]
        n_columns = columns.stop - columns.start
        blocked = torch.zeros(n_columns, dtype=torch.bool, device=token_ids.device)
        dropped = blocked.index_fill_(0, inside - columns.start, True) if len(inside) else None
    else:
        dropped = (
            None if isinstance(class_ids, slice) else _dropped(plan, grid, token_ids, class_ids)
        )
    token_weight, class_weight = grid.token_log_weight, grid.class_log_weight
    return Tile(
        tokens=token_ids,
        classes=class_ids,
        first_group=first_group,
        skip=skip,
        dropped=dropped,
        token_log_weight=None if token_weight is None else token_weight[groups, tokens],
        class_log_weight=None if class_weight is None else class_weight[groups, columns],
    )


def _skip_by_tile(
    skip: Tensor | None, shape: tuple[int, int, int], step: tuple[int, int, int]
) -> Iterator[Tensor | None]:
    """Yield, tile by tile, the flat positions to drop in its logits.

    Args:
        skip: (S, 3) int64 (group, token position, class position), or None.
        shape: groups, tokens and classes of the grid.
        step: groups, tokens and classes of a tile.
    """
    n_tiles = [-(-whole // part) for whole, part in zip(shape, step, strict=True)]
    if skip is None or len(skip) == 0:
        yield from repeat(None, math.prod(n_tiles))
        return
    (g, t, c), (step_g, step_n, step_m) = skip.unbind(1), step
    # Tiles at the edge are smaller.
    n = (shape[1] - t // step_n * step_n).clamp(max=step_n)
    m = (shape[2] - c // step_m * step_m).clamp(max=step_m)
    flat = ((g % step_g) * n + t % step_n) * m + c % step_m
    tile = (g // step_g * n_tiles[2] + c // step_m) * n_tiles[1] + t // step_n
    start, by_tile = 0, flat[tile.argsort()]
    # One view at a time: tiles are many, and a view takes half a kilobyte.
    for count in torch.bincount(tile, minlength=math.prod(n_tiles)).tolist():
        yield by_tile[start : start + count] if count else None
        start += count


def _dropped(plan: Plan, grid: Grid, tokens: Tensor, classes: Tensor) -> Tensor | None:
    padding = classes.eq(plan.n_classes)  # (G, m)
    dropped = padding.unsqueeze(1) if bool(padding.any()) else None  # (G, 1, m)
    for chunks in grid.earlier:
        theirs = chunks.class_chunks[classes].unsqueeze(1)  # (G, 1, m)
        distance = chunks.token_chunks[tokens].unsqueeze(2) - theirs
        found = distance.abs_() <= chunks.reach  # (G, n, m)
        dropped = found if dropped is None else found.logical_or_(dropped)
    if grid.own_labels is not None:
        labels = grid.own_labels[tokens].to(torch.int32)  # narrow: (G, n, m) are compared
        own = labels.unsqueeze(2) == classes.to(torch.int32).unsqueeze(1)
        dropped = own if dropped is None else own.logical_or_(dropped)
    return dropped
