"""RECE: tokens and classes that fall into neighbouring chunks of some round (arXiv 2408.02354)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rece.ops.lsh import (
    Chunks,
    ShardOfChunks,
    buckets,
    sort_into_chunks,
    sort_shard_into_chunks,
)
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.products import search_dtype
from hf_rece.ops.rows import DenseRows, OutputRows
from hf_rece.ops.shards import ShardedRows, VocabShards


@torch.no_grad()
def rece_plan(
    hidden: Tensor,
    rows: OutputRows,
    labels: Tensor,
    directions: Tensor,
    *,
    n_chunks: int,
    n_extra_chunks: int,
    excluded_ids: Tensor | None,
    tile_bytes: int,
) -> Plan:
    """Return the pairs whose chunks are neighbours in some round, each pair once.

    In each round, tokens and classes are sorted by the direction they lie closest to; both orders
    are cut into n_chunks chunks; a token meets the classes of chunks at most n_extra_chunks from
    its own. A pair belongs to the first round that finds it. Over ShardedRows, this is the part of
    the plan that scores this process's classes, see hf_rece.ops.vocab_parallel.local_plan.

    Args:
        hidden: (N, D).
        rows: C rows of width D.
        labels: (N,) int64.
        directions: (R, n_buckets, D).
        n_chunks: chunks a round.
        n_extra_chunks: neighbours on each side.
        excluded_ids: (E,) int64 classes that keep their place in the order but are never scored.
        tile_bytes: bytes of a tile.

    Memory:
        O(R (N + C)) integers; over ShardedRows, of C those of the process's own classes.
    """
    shards = rows.shards if isinstance(rows, ShardedRows) else VocabShards(rows.n_rows)
    n_buckets = directions.shape[1]
    operands = search_dtype(hidden, rows.tensors())
    grids: list[Grid] = []
    earlier: list[EarlierRound] = []
    for round_directions in directions.unbind(0):
        own_rows = rows.local if isinstance(rows, ShardedRows) else rows
        of_tokens, of_classes = (
            buckets(vectors, round_directions, tile_bytes, operands=operands)
            for vectors in (DenseRows(hidden), own_rows)
        )
        token_chunks = sort_into_chunks(of_tokens, n_chunks)
        class_chunks: Chunks | ShardOfChunks = (
            sort_shard_into_chunks(of_classes, n_buckets, n_chunks, shards)
            if isinstance(rows, ShardedRows)
            else sort_into_chunks(of_classes, n_chunks)
        )
        classes = class_chunks.table(padding=shards.n_local)
        if excluded_ids is not None:
            excluded = torch.isin(classes, (excluded_ids - shards.first).to(classes.dtype))
            classes = classes.masked_fill(excluded, shards.n_local)
        grids.append(
            Grid(
                tokens=_windows(token_chunks, n_extra_chunks, padding=len(hidden)),
                classes=classes,
                skip=_label_places(token_chunks, class_chunks, labels, n_extra_chunks, shards),
                skips_once=True,
                earlier=tuple(earlier),
            )
        )
        if len(grids) < len(directions):
            earlier.append(
                EarlierRound(token_chunks.numbers(), class_chunks.numbers(), n_extra_chunks)
            )
    return Plan(tuple(grids), "logaddexp", len(hidden), shards.n_local, tile_bytes)


def _windows(chunks: Chunks, reach: int, padding: int) -> Tensor:
    """Return (n_chunks, (1 + 2 reach) size): the tokens of each chunk and of its neighbours.

    The tokens overlap rather than the classes, since classes are many and their rows are gathered.
    """
    table = chunks.table(padding)
    edge = table.new_full((reach, chunks.size), padding)
    padded = torch.cat([edge, table, edge])  # (n_chunks + 2 reach, size)
    return padded.unfold(0, 1 + 2 * reach, 1).transpose(1, 2).reshape(chunks.n_chunks, -1)


def _label_places(
    tokens: Chunks,
    classes: Chunks | ShardOfChunks,
    labels: Tensor,
    reach: int,
    shards: VocabShards,
) -> Tensor:
    """Return (S, 3) int64 (group, token position, class position) of the labels that were found."""
    own = shards.is_local(labels)
    group, column = classes.places(labels[own] - shards.first)
    token_position = tokens.positions()[own].long()
    # Position of the token in the window that starts `reach` chunks before the label's chunk.
    token = token_position - (group - reach) * tokens.size
    found = (token >= 0) & (token < (1 + 2 * reach) * tokens.size)
    return torch.stack([group, token, column], dim=1)[found]
