"""Streamed top-k over all classes, and the exact rank of a label, without a score matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops import native
from hf_rece.ops.best_of import BestOf
from hf_rece.ops.plan import MIN_TILE_SIDE, resolve_tile_bytes
from hf_rece.ops.products import product, recurring, without_autocast
from hf_rece.ops.rows import DenseRows, OutputRows, accumulation_dtype, as_output_rows
from hf_rece.ops.shards import ShardedRows, VocabShards
from hf_rece.ops.smaller_tiles import with_smaller_tiles

_QUERIES = 256
# So much of what all processes found is joined at once: the same in all, as messages hang on it.
_JOINED_BYTES = 2**28
# A first threshold from a sample spares the hits that later classes push out again.
_SAMPLED_ONE_IN, _SAMPLE, _WORTH_SAMPLING = 16, 8192, 32
_HIT_BYTES = 12


def streamed_topk(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    k: int,
    *,
    bias: Tensor | None = None,
    excluded_ids: Tensor | None = None,
    seen_ids: Tensor | None = None,
    allowed_ids: Tensor | None = None,
    tile_bytes: int | None = None,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k classes with the largest scores <h, w> + b of each hidden state, best first.

    Over ShardedRows every process asks for the same hidden states and gets the same answer, by two
    messages whatever the data; bias is the process's own part.

    Args:
        hidden: (N, D) floating point.
        weight: (C, D) tensor or OutputRows.
        k: how many classes, at least 1.
        bias: (C,) or None.
        excluded_ids: (E,) int64, classes never returned.
        seen_ids: (N, S) int64 padded with -1, classes not returned for that hidden state.
        allowed_ids: (A,) int64 distinct, the only classes returned; None allows all.
        tile_bytes: bytes of one tile of scores; None for the device's default.
        operands: dtype that states and rows are rounded to, for a search that may be inexact; None
            for that of the scores.

    Returns:
        scores: (N, k) float32 (float64 for float64 inputs); -inf where fewer than k classes remain.
        ids: (N, k) int64; -1 where fewer than k classes remain.

    Raises:
        ArgumentError: if k < 1, shapes disagree or an id is out of range.

    Memory:
        O(N k) plus one tile.
    """
    if k < 1:
        raise ArgumentError("k", k, "at least one class must be asked for", "Pass k >= 1")
    search = _Search.make(hidden, weight, bias, excluded_ids, seen_ids, allowed_ids, tile_bytes)
    search = replace(search, operands=operands or search.dtype)

    def scan(tile_bytes: int) -> list[tuple[Tensor, Tensor]]:
        sized = replace(search, tile_bytes=tile_bytes)
        return [_best_of(sized, queries, k) for queries in search.query_blocks()]

    with without_autocast(hidden.device):
        best = with_smaller_tiles(search.tile_bytes, scan)
    scores, ids = torch.cat([scores for scores, _ in best]), torch.cat([ids for _, ids in best])
    return (scores, ids) if search.shards is None else _best_of_all(scores, ids, search.shards)


def _best_of_all(scores: Tensor, ids: Tensor, shards: VocabShards) -> tuple[Tensor, Tensor]:
    """Return the best of all processes' scores (N, k), and their classes (N, k)."""
    k = scores.shape[1]
    ids = torch.where(ids < 0, ids, ids + shards.first)
    a_query = shards.world_size * k * (scores.element_size() + ids.element_size())
    step = max(1, _JOINED_BYTES // a_query)
    pieces = zip(scores.split(step), ids.split(step), strict=True)
    best = [_best_of_piece(of_scores, of_ids, k, shards) for of_scores, of_ids in pieces]
    return torch.cat([each for each, _ in best]), torch.cat([each for _, each in best])


def _best_of_piece(
    scores: Tensor, ids: Tensor, k: int, shards: VocabShards
) -> tuple[Tensor, Tensor]:
    sizes = [len(scores)] * shards.world_size
    # (W N, k) -> (N, W k)
    every, classes = (
        torch.cat(shards.join(part, sizes).split(len(scores)), dim=1) for part in (scores, ids)
    )
    best, place = every.topk(k, dim=1)
    return best, classes.gather(1, place)


def label_rank(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    excluded_ids: Tensor | None = None,
    seen_ids: Tensor | None = None,
    tile_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Count the classes that are scored above each label, and those tied with it.

    The label's rank is `greater + 1` when nothing is tied. Scores closer than the rounding error of
    their inner products count as tied, so that equal rows tie whatever tile they fall in. Over
    ShardedRows as streamed_topk.

    Args:
        hidden: (N, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) int64 in [0, C).
        bias: (C,) or None.
        excluded_ids: (E,) int64, classes that do not compete.
        seen_ids: (N, S) int64 padded with -1, classes that do not compete for that hidden state.
            The label itself always does.
        tile_bytes: bytes of one tile of scores; None for the device's default.

    Returns:
        greater: (N,) int64, competing classes with a larger score.
        tied: (N,) int64, competing classes other than the label with an equal score.

    Raises:
        ArgumentError: if shapes disagree or an id is out of range.

    Memory:
        O(N) plus one tile.
    """
    search = _Search.make(hidden, weight, bias, excluded_ids, seen_ids, None, tile_bytes)
    rows: OutputRows = as_output_rows(weight)
    _check_ids("labels", labels, rows.n_rows, padding=False)
    own_rows = rows.rows(labels).to(search.dtype)
    states = hidden.to(search.dtype)
    with without_autocast(hidden.device):
        own = torch.linalg.vecdot(states, own_rows)
    if bias is not None:
        own += _of_labels(bias, labels, search.shards).to(search.dtype)
    if search.shards is not None:
        labels = search.shards.localise(labels, -1)
    # The error of an inner product is bounded by eps times the product of the norms.
    slack = 4 * torch.finfo(search.dtype).eps * states.norm(dim=1) * own_rows.norm(dim=1)

    def scan(tile_bytes: int) -> tuple[Tensor, Tensor]:
        return _count_above(replace(search, tile_bytes=tile_bytes), labels, own, slack)

    with without_autocast(hidden.device):
        greater, tied = with_smaller_tiles(search.tile_bytes, scan)
    if search.shards is not None:
        greater, tied = search.shards.sum(torch.stack([greater, tied])).unbind(0)
    return greater, tied


def _count_above(
    search: _Search, labels: Tensor, own: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """Return label_rank over the classes here, of labels that score own +- slack, each (N,)."""
    greater = torch.zeros_like(labels)
    tied = torch.zeros_like(labels)
    for queries in search.query_blocks():
        above = (own[queries] + slack[queries]).unsqueeze(1)
        below = (own[queries] - slack[queries]).unsqueeze(1)
        for classes, tile in search.tiles(queries):
            column = labels[queries] - classes[0]
            inside = (column >= 0) & (column < tile.shape[1])
            tile[inside.nonzero()[:, 0], column[inside]] = -torch.inf
            n_above = (tile > above).sum(1)
            greater[queries] += n_above
            tied[queries] += (tile >= below).sum(1) - n_above
    return greater, tied


def _of_labels(bias: Tensor, labels: Tensor, shards: VocabShards | None) -> Tensor:
    """Return the bias (N,) of each label."""
    if shards is None:
        return bias[labels]
    own = bias[shards.localise(labels, 0)]
    return shards.sum(own.masked_fill(~shards.is_local(labels), 0))


@dataclass(frozen=True)
class _Search:
    """Everything that a scan over the classes needs, checked; of a shard, with its own ids."""

    hidden: Tensor
    rows: OutputRows
    shards: VocabShards | None
    bias: Tensor | None
    excluded_ids: Tensor | None
    seen_ids: Tensor | None
    allowed_ids: Tensor | None
    tile_bytes: int
    dtype: torch.dtype
    operands: torch.dtype

    @classmethod
    def make(
        cls,
        hidden: Tensor,
        weight: Tensor | OutputRows,
        bias: Tensor | None,
        excluded_ids: Tensor | None,
        seen_ids: Tensor | None,
        allowed_ids: Tensor | None,
        tile_bytes: int | None,
    ) -> _Search:
        rows: OutputRows = as_output_rows(weight)
        if hidden.dim() != 2 or hidden.shape[1] != rows.width:
            raise ArgumentError(
                "hidden",
                tuple(hidden.shape),
                f"the output rows are {rows.width} wide",
                f"Pass hidden states of shape (N, {rows.width})",
            )
        if seen_ids is not None and (seen_ids.dim() != 2 or len(seen_ids) != len(hidden)):
            raise ArgumentError(
                "seen_ids",
                tuple(seen_ids.shape),
                f"there are {len(hidden)} hidden states",
                "Pass one row of class ids for each, padded with -1",
            )
        for name, ids in (("excluded_ids", excluded_ids), ("allowed_ids", allowed_ids)):
            if ids is not None:
                _check_ids(name, ids, rows.n_rows, padding=False)
        if seen_ids is not None:
            _check_ids("seen_ids", seen_ids, rows.n_rows, padding=True)
        budget = resolve_tile_bytes(tile_bytes, hidden.device)
        dtype = accumulation_dtype(hidden.dtype)
        shards = None
        if isinstance(rows, ShardedRows):
            shards, rows = rows.shards, rows.local
            seen_ids = None if seen_ids is None else shards.localise(seen_ids, -1)
            excluded_ids, allowed_ids = (
                None if ids is None else ids[shards.is_local(ids)] - shards.first
                for ids in (excluded_ids, allowed_ids)
            )
        given = (excluded_ids, seen_ids, allowed_ids)
        return cls(hidden, rows, shards, bias, *given, budget, dtype, operands=dtype)

    def query_blocks(self) -> Iterator[slice]:
        """Yield the hidden states in blocks: few, so that a tile spans many classes."""
        for start in range(0, len(self.hidden), _QUERIES):
            yield slice(start, min(start + _QUERIES, len(self.hidden)))

    @torch.no_grad()
    def tiles(self, queries: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (class ids (m,), scores (n, m)), -inf for classes that do not compete."""
        n_classes = self.rows.n_rows if self.allowed_ids is None else len(self.allowed_ids)
        width = self.rows.width
        n_queries = recurring(queries.stop - queries.start)
        step = self.tile_bytes // (4 * (n_queries + width))
        step = max(step // MIN_TILE_SIDE, 1) * MIN_TILE_SIDE  # of eights: see best_of.py
        hidden = self.hidden[queries].to(self.operands)
        for start in range(0, n_classes, step):
            columns = slice(start, min(start + step, n_classes))
            classes, rows, bias = self._columns(columns)
            scores = product(hidden, rows)
            if bias is not None:
                scores += bias
            self._withdraw(scores, queries, columns, classes)
            yield classes, scores

    def likely_threshold(self, queries: slice, k: int) -> Tensor | None:
        """Return scores (n, 1) that more than k classes very likely exceed, from a sample.

        None where a sample would not pay.
        """
        n_classes = self.rows.n_rows if self.allowed_ids is None else len(self.allowed_ids)
        stride, rank = _sampling(n_classes, k)
        if rank * _WORTH_SAMPLING > n_classes // stride:
            return None
        sample = torch.arange(0, n_classes, stride, device=self.hidden.device)
        if self.allowed_ids is not None:
            sample = self.allowed_ids[sample]
        tiles = [tile for _, tile in replace(self, allowed_ids=sample).tiles(queries)]
        return torch.cat(tiles, dim=1).topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)

    def native_hits(
        self, queries: slice, k: int, threshold: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return scores (n, m) and ids (n, m) of what is above the threshold, by C++ kernels.

        None where these do not serve, or found more than likely_threshold lets expect.
        """
        if (
            self.allowed_ids is not None
            or type(self.rows) is not DenseRows
            or not native.serves(self.hidden, self.rows.weight)
            or not serves_search(queries.stop - queries.start, self.rows.n_rows, k, self.tile_bytes)
        ):
            return None
        capacity = hit_capacity(self.rows.n_rows, k)
        bias = None if self.bias is None else self.bias.to(self.dtype).contiguous()
        hits = native.search(self.hidden[queries], self.rows.weight, bias, threshold, capacity)
        if hits is None:
            return None
        scores, ids = hits
        if self.excluded_ids is not None:
            scores.masked_fill_(torch.isin(ids, self.excluded_ids), -torch.inf)
        if self.seen_ids is not None:
            seen = self.seen_ids[queries].contiguous()
            place = torch.searchsorted(ids, seen).clamp_(max=capacity - 1)
            row, column = (ids.gather(1, place) == seen).nonzero().unbind(1)
            scores[row, place[row, column]] = -torch.inf
        return hits

    def _columns(self, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.hidden.device
        if self.allowed_ids is None:
            classes = torch.arange(columns.start, columns.stop, device=device)
            rows, bias = self.rows.rows(columns), None if self.bias is None else self.bias[columns]
        else:
            classes = self.allowed_ids[columns]
            rows, bias = self.rows.rows(classes), None if self.bias is None else self.bias[classes]
        return classes, rows.to(self.operands), None if bias is None else bias.to(self.dtype)

    def _withdraw(self, scores: Tensor, queries: slice, columns: slice, classes: Tensor) -> None:
        if self.excluded_ids is not None:
            scores.masked_fill_(torch.isin(classes, self.excluded_ids), -torch.inf)
        if self.seen_ids is None:
            return
        seen = self.seen_ids[queries]
        if self.allowed_ids is None:
            row, place = ((seen >= columns.start) & (seen < columns.stop)).nonzero().unbind(1)
            scores[row, seen[row, place] - columns.start] = -torch.inf
        else:
            order = classes.argsort()
            place = torch.searchsorted(classes[order], seen).clamp_(max=len(classes) - 1)
            found = order[place]  # (n, S) column of each seen class, if it is here at all
            row, column = (classes[found] == seen).nonzero().unbind(1)
            scores[row, found[row, column]] = -torch.inf


def _best_of(search: _Search, queries: slice, k: int) -> tuple[Tensor, Tensor]:
    """Return scores (n, k) and ids (n, k) of a block of queries, best first."""
    for threshold in (search.likely_threshold(queries, k), None):
        hits = None if threshold is None else search.native_hits(queries, k, threshold)
        if hits is None:
            states = search.hidden[queries].to(search.dtype)
            best = BestOf.none((len(states), k), states, threshold)
            for classes, tile in search.tiles(queries):
                best.add(classes, tile)
            scores, ids = best.sorted()
        else:
            scores, place = hits[0].topk(k, dim=1)
            ids = hits[1].gather(1, place).masked_fill_(scores == -torch.inf, -1)
        # With k scores above its threshold, a query has missed nothing.
        if threshold is None or bool((scores[:, -1] > -torch.inf).all()):
            break
    return scores, ids


def _sampling(n_classes: int, k: int) -> tuple[int, int]:
    """Return one in how many classes to sample, and the rank of the sample's threshold."""
    stride = max(_SAMPLED_ONE_IN, n_classes // _SAMPLE)
    # Four standard deviations above the mean of a Poisson count.
    return stride, math.ceil(k / stride + 4 * math.sqrt(k / stride) + 4)


def hit_capacity(n_classes: int, k: int) -> int:
    """Return for how many hits of a query native.search has room."""
    stride, rank = _sampling(n_classes, k)
    # Six standard deviations above the mean of what a sample of that rank leaves above itself.
    return stride * (rank + math.ceil(6 * math.sqrt(rank)) + 6)


def serves_search(n_queries: int, n_classes: int, k: int, tile_bytes: int) -> bool:
    """Whether the hits of native.search take about a tile, not more."""
    stride, rank = _sampling(n_classes, k)
    pays = rank * _WORTH_SAMPLING <= n_classes // stride
    return pays and n_queries * hit_capacity(n_classes, k) * _HIT_BYTES <= 2 * tile_bytes


def _check_ids(name: str, ids: Tensor, n_classes: int, *, padding: bool) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < (-1 if padding else 0) or high >= n_classes:
        raise ArgumentError(
            name,
            (low, high),
            f"smallest and largest id, but there are {n_classes} classes",
            f"Pass ids from 0 to {n_classes - 1}" + (", padded with -1" if padding else ""),
        )
