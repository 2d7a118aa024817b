"""RECE: tokens and classes that fall into neighbouring chunks of some round (arXiv 2408.02354)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rece.ops.lsh import Chunks, buckets, sort_into_chunks
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.products import search_dtype
from hf_rece.ops.rows import DenseRows, OutputRows


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
    its own. A pair belongs to the first round that finds it.

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
        O(R (N + C)) integers. Over ShardedRows too, in every process: all classes are sorted
        together.
    """
    operands = search_dtype(hidden, rows.tensors())
    grids: list[Grid] = []
    earlier: list[EarlierRound] = []
    for round_directions in directions.unbind(0):
        token_chunks, class_chunks = (
            sort_into_chunks(
                buckets(vectors, round_directions, tile_bytes, operands=operands), n_chunks
            )
            for vectors in (DenseRows(hidden), rows)
        )
        classes = class_chunks.table(padding=rows.n_rows)
        if excluded_ids is not None:
            excluded = torch.isin(classes, excluded_ids.to(classes.dtype))
            classes = classes.masked_fill(excluded, rows.n_rows)
        grids.append(
            Grid(
                tokens=_windows(token_chunks, n_extra_chunks, padding=len(hidden)),
                classes=classes,
                skip=_label_places(token_chunks, class_chunks, labels, n_extra_chunks),
                skips_once=True,
                earlier=tuple(earlier),
            )
        )
        if len(grids) < len(directions):
            earlier.append(
                EarlierRound(token_chunks.numbers(), class_chunks.numbers(), n_extra_chunks)
            )
    return Plan(tuple(grids), "logaddexp", len(hidden), rows.n_rows, tile_bytes)


def _windows(chunks: Chunks, reach: int, padding: int) -> Tensor:
    """Return (n_chunks, (1 + 2 reach) size): the tokens of each chunk and of its neighbours.

    The tokens overlap rather than the classes, since classes are many and their rows are gathered.
    """
    table = chunks.table(padding)
    edge = table.new_full((reach, chunks.size), padding)
    padded = torch.cat([edge, table, edge])  # (n_chunks + 2 reach, size)
    return padded.unfold(0, 1 + 2 * reach, 1).transpose(1, 2).reshape(chunks.n_chunks, -1)


def _label_places(tokens: Chunks, classes: Chunks, labels: Tensor, reach: int) -> Tensor:
    """Return (S, 3) int64 (group, token position, class position) of the labels that were found."""
    label_position = classes.positions()[labels].long()
    token_position = tokens.positions().long()
    group = label_position // classes.size
    # Position of the token in the window that starts `reach` chunks before the label's chunk.
    token = token_position - (group - reach) * tokens.size
    found = (token >= 0) & (token < (1 + 2 * reach) * tokens.size)
    return torch.stack([group, token, label_position % classes.size], dim=1)[found]
