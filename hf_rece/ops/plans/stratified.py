"""Stratified: each group's hardest classes exactly, a weighted random block for all the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rece.ops.lsh import buckets, random_directions, sort_into_chunks
from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.products import search_dtype
from hf_rece.ops.rows import DenseRows, OutputRows
from hf_rece.ops.smaller_tiles import with_smaller_tiles
from hf_rece.ops.topk import streamed_topk


@dataclass(frozen=True)
class _Blocks:
    """A random partition of K things into blocks whose sizes differ by at most one.

    Args:
        members: (K,) int64 in random order; the thing at place p is in block p % n_blocks.
        place: (K',) int64 of every thing, -1 for things that are in no block.
        n_blocks: number of blocks.
    """

    members: Tensor
    place: Tensor
    n_blocks: int

    def table(self, padding: int) -> Tensor:
        """Return (n_blocks, ceil(K / n_blocks)) int32, filled up with `padding`."""
        missing = -len(self.members) % self.n_blocks
        filler = self.members.new_full((missing,), padding)
        return torch.cat([self.members, filler]).to(torch.int32).view(-1, self.n_blocks).T

    def block(self, ids: Tensor) -> Tensor:
        """Return the block of each thing, negative for things that are in none."""
        place = self.place[ids]
        return torch.where(place < 0, place, place % self.n_blocks)


def _partition(members: Tensor, n_things: int, n_blocks: int) -> _Blocks:
    place = torch.full((n_things,), -1, dtype=torch.long, device=members.device)
    place[members] = torch.arange(len(members), device=members.device)
    return _Blocks(members, place, n_blocks)


@torch.no_grad()
def stratified_plan(
    hidden: Tensor,
    rows: OutputRows,
    labels: Tensor,
    *,
    n_groups: int,
    n_hard: int,
    n_random: int,
    bias: Tensor | None,
    excluded_ids: Tensor | None,
    tile_bytes: int,
    generator: torch.Generator | None,
) -> Plan:
    r"""Return each group's hard classes with weight 1, and one random block for each token.

    Tokens are sorted by one hash of their states, centred on the batch mean, and cut into groups.
    S, the hard set of a group, is the n_hard classes with the largest logit at the group's mean
    state. Classes and tokens are each cut at random into as many blocks; token i also meets the
    classes R_i of its block that are neither in S nor its label y, each with the log-weight
    log((C - 1 - |S \\ y|) / |R_i|), so that they stand for all the rest.

    Args:
        hidden: (N, D).
        rows: C rows of width D.
        labels: (N,) int64.
        n_groups: groups of tokens.
        n_hard: classes a hard set.
        n_random: classes a random block, at most.
        bias: (C,) or None; takes part in the choice of the hard sets.
        excluded_ids: (E,) int64 classes that are never scored.
        tile_bytes: bytes of a tile.
        generator: of the directions and the partitions.

    Memory:
        O(n_groups n_hard + N + C) integers: 32 bytes a class at the peak. Over ShardedRows too, in
        every process: the blocks are one permutation of all classes.
    """
    n_tokens, n_classes = len(hidden), rows.n_rows
    groups, hard = _hard_sets(
        hidden, rows, n_groups, n_hard, bias, excluded_ids, tile_bytes, generator
    )
    allowed = torch.randperm(n_classes, generator=generator, device=hidden.device)
    if excluded_ids is not None:
        allowed = allowed[~torch.isin(allowed, excluded_ids)]
    n_blocks = -(-len(allowed) // n_random)
    classes = _partition(allowed, n_classes + 1, n_blocks)
    shuffled = torch.randperm(n_tokens, generator=generator, device=hidden.device)
    tokens = _partition(shuffled, n_tokens, n_blocks)

    hits = with_smaller_tiles(
        tile_bytes, lambda size: _find_hits(groups, hard, labels, tokens, classes, size)
    )
    hard_grid = Grid(groups, hard, skip=hits.labels_in_hard, skips_once=True)
    if n_hard >= len(allowed):  # nothing is left to estimate
        return Plan((hard_grid,), "logaddexp", n_tokens, n_classes, tile_bytes)

    label_in_block = classes.block(labels) == tokens.block(shuffled.sort().values)
    n_exact = n_hard - hits.label_is_hard.long()  # |S \ y|
    block_size = (len(allowed) - tokens.place % n_blocks - 1) // n_blocks + 1
    n_met = block_size - hits.hard_in_block - label_in_block.long()  # |R_i|
    log_weight = ((len(allowed) - 1 - n_exact) / n_met.clamp(min=1)).log()
    own = label_in_block.nonzero()[:, 0]
    pairs = torch.cat([torch.stack([own, labels[own]], dim=1), hits.pairs])
    padded_weight = torch.cat([log_weight, log_weight.new_zeros(1)])
    table = tokens.table(padding=n_tokens)
    n_used = min(n_blocks, n_tokens)  # with fewer tokens than blocks, some blocks meet none
    random_grid = Grid(
        table[:n_used],
        classes.table(padding=n_classes)[:n_used],
        skip=_skip(pairs, tokens, classes),
        token_log_weight=padded_weight[table[:n_used].long()].to(
            torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ),
    )
    return Plan((hard_grid, random_grid), "logaddexp", n_tokens, n_classes, tile_bytes)


def _hard_sets(
    hidden: Tensor,
    rows: OutputRows,
    n_groups: int,
    n_hard: int,
    bias: Tensor | None,
    excluded_ids: Tensor | None,
    tile_bytes: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens (G, n) and the hard classes (G, n_hard) of each group, int32."""
    directions = random_directions(n_groups, hidden, generator)
    states = hidden.to(directions.dtype)
    # Without centring, the direction that all states share decides every bucket.
    operands = search_dtype(hidden, rows.tensors())
    centred = DenseRows(states - states.mean(0))
    bucket_of = buckets(centred, directions, tile_bytes, operands=operands)
    groups = sort_into_chunks(bucket_of, n_groups).table(padding=len(hidden))
    means = torch.zeros_like(directions)
    real = groups < len(hidden)
    group_of = torch.arange(n_groups, device=hidden.device).unsqueeze(1).expand_as(groups)[real]
    means.index_add_(0, group_of, states[groups[real].long()])
    means /= real.sum(1, keepdim=True).clamp(min=1)
    _, hard = streamed_topk(
        means,
        rows,
        n_hard,
        bias=bias,
        excluded_ids=excluded_ids,
        tile_bytes=tile_bytes,
        operands=operands,
    )
    return groups, hard.masked_fill_(hard < 0, rows.n_rows).to(torch.int32)


@dataclass(frozen=True)
class _Hits:
    """Where the strata overlap.

    Args:
        labels_in_hard: (S, 3) int64 (group, token position, class position) of labels in hard sets.
        label_is_hard: (N,) bool.
        pairs: (P, 2) int64 (token, class): hard classes, other than the label, in the token's
            block.
        hard_in_block: (N,) int64, how many of `pairs` each token has.
    """

    labels_in_hard: Tensor
    label_is_hard: Tensor
    pairs: Tensor
    hard_in_block: Tensor


def _find_hits(
    groups: Tensor,
    hard: Tensor,
    labels: Tensor,
    tokens: _Blocks,
    classes: _Blocks,
    tile_bytes: int,
) -> _Hits:
    padding = len(labels)
    own = torch.cat([labels, labels.new_full((1,), -1)]).to(torch.int32)
    block = torch.cat([tokens.place % tokens.n_blocks, labels.new_full((1,), -2)]).to(torch.int32)
    step = max(1, tile_bytes // (groups.shape[1] * hard.shape[1]))
    in_hard, in_block = [], []
    for first in range(0, len(groups), step):
        members = groups[first : first + step].long()  # (G, n)
        candidates = hard[first : first + step]  # (G, n_hard)
        is_own = own[members].unsqueeze(2) == candidates.unsqueeze(1)  # (G, n, n_hard)
        in_hard.append(_offset(is_own.nonzero(), first))
        home = classes.block(candidates.long()).to(torch.int32)
        met = (block[members].unsqueeze(2) == home.unsqueeze(1)) & ~is_own
        group, token, place = met.nonzero().unbind(1)
        in_block.append(
            torch.stack([members[group, token], candidates[group, place].long()], dim=1)
        )
    places, pairs = torch.cat(in_hard), torch.cat(in_block)
    label_is_hard = torch.zeros(padding, dtype=torch.bool, device=labels.device)
    label_is_hard[groups[places[:, 0], places[:, 1]].long()] = True
    return _Hits(places, label_is_hard, pairs, torch.bincount(pairs[:, 0], minlength=padding))


def _offset(places: Tensor, first_group: int) -> Tensor:
    places[:, 0] += first_group
    return places


def _skip(pairs: Tensor, tokens: _Blocks, classes: _Blocks) -> Tensor:
    """Return (P, 3) int64 (block, token position, class position) of the pairs (P, 2)."""
    token, column = tokens.place[pairs[:, 0]], classes.place[pairs[:, 1]]
    n_blocks = tokens.n_blocks
    return torch.stack([token % n_blocks, token // n_blocks, column // n_blocks], dim=1)
