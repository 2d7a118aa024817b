"""Streamed top-k over all classes, and the exact rank of a label, without a score matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops.plan import MIN_TILE_SIDE, resolve_tile_bytes
from hf_rece.ops.products import product
from hf_rece.ops.rows import OutputRows, accumulation_dtype, as_output_rows
from hf_rece.ops.smaller_tiles import with_smaller_tiles

# A row's new candidates are cheaper to pick out one by one than to sort, up to this share of a
# tile.
_SPARSE_SHARE = 1 / 16
_QUERIES = 256
# A first threshold from a sample spares the hits that later classes push out again.
_SAMPLED_ONE_IN, _SAMPLE, _WORTH_SAMPLING = 16, 8192, 32


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
) -> tuple[Tensor, Tensor]:
    """Return the k classes with the largest scores <h, w> + b of each hidden state, best first.

    Args:
        hidden: (N, D) floating point.
        weight: (C, D) tensor or OutputRows.
        k: how many classes, at least 1.
        bias: (C,) or None.
        excluded_ids: (E,) int64, classes never returned.
        seen_ids: (N, S) int64 padded with -1, classes not returned for that hidden state.
        allowed_ids: (A,) int64 distinct, the only classes returned; None allows all.
        tile_bytes: bytes of one tile of scores; None for the device's default.

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

    def scan(tile_bytes: int) -> list[tuple[Tensor, Tensor]]:
        sized = replace(search, tile_bytes=tile_bytes)
        return [_best_of(sized, queries, k) for queries in search.query_blocks()]

    best = with_smaller_tiles(search.tile_bytes, scan)
    return torch.cat([scores for scores, _ in best]), torch.cat([ids for _, ids in best])


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
    their inner products count as tied, so that equal rows tie whatever tile they fall in.

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
    _check_ids("labels", labels, search.rows.n_rows, padding=False)
    own_rows = search.rows.rows(labels).to(search.dtype)
    states = hidden.to(search.dtype)
    own = torch.linalg.vecdot(states, own_rows)
    if bias is not None:
        own += bias[labels].to(search.dtype)
    # The error of an inner product is bounded by eps times the product of the norms.
    slack = 4 * torch.finfo(search.dtype).eps * states.norm(dim=1) * own_rows.norm(dim=1)

    def scan(tile_bytes: int) -> tuple[Tensor, Tensor]:
        return _count_above(replace(search, tile_bytes=tile_bytes), labels, own, slack)

    return with_smaller_tiles(search.tile_bytes, scan)


def _count_above(
    search: _Search, labels: Tensor, own: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what label_rank returns, of labels that score own +- slack, each (N,)."""
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


@dataclass(frozen=True)
class _Search:
    """Everything that a scan over the classes needs, checked."""

    hidden: Tensor
    rows: OutputRows
    bias: Tensor | None
    excluded_ids: Tensor | None
    seen_ids: Tensor | None
    allowed_ids: Tensor | None
    tile_bytes: int
    dtype: torch.dtype

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
        rows = as_output_rows(weight)
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
        return cls(hidden, rows, bias, excluded_ids, seen_ids, allowed_ids, budget, dtype)

    def query_blocks(self) -> Iterator[slice]:
        """Yield the hidden states in blocks: few, so that a tile spans many classes."""
        for start in range(0, len(self.hidden), _QUERIES):
            yield slice(start, min(start + _QUERIES, len(self.hidden)))

    @torch.no_grad()
    def tiles(self, queries: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (class ids (m,), scores (n, m)), -inf for classes that do not compete."""
        n_classes = self.rows.n_rows if self.allowed_ids is None else len(self.allowed_ids)
        width = self.rows.width
        n_queries = queries.stop - queries.start
        step = max(self.tile_bytes // (4 * (n_queries + width)), MIN_TILE_SIDE)
        step += -step % 8  # see _places
        hidden = self.hidden[queries].to(self.dtype)
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
        stride = max(_SAMPLED_ONE_IN, n_classes // _SAMPLE)
        # Four standard deviations above the mean of a Poisson count.
        rank = math.ceil(k / stride + 4 * math.sqrt(k / stride) + 4)
        if rank * _WORTH_SAMPLING > n_classes // stride:
            return None
        sample = torch.arange(0, n_classes, stride, device=self.hidden.device)
        if self.allowed_ids is not None:
            sample = self.allowed_ids[sample]
        tiles = [tile for _, tile in replace(self, allowed_ids=sample).tiles(queries)]
        return torch.cat(tiles, dim=1).topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)

    def _columns(self, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.hidden.device
        if self.allowed_ids is None:
            classes = torch.arange(columns.start, columns.stop, device=device)
            rows, bias = self.rows.rows(columns), None if self.bias is None else self.bias[columns]
        else:
            classes = self.allowed_ids[columns]
            rows, bias = self.rows.rows(classes), None if self.bias is None else self.bias[classes]
        return classes, rows.to(self.dtype), None if bias is None else bias.to(self.dtype)

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
        best = _BestOf.make(k, search, queries, threshold)
        for classes, tile in search.tiles(queries):
            best.add(classes, tile)
        scores, ids = best.sorted()
        # With k scores above its threshold, a query has missed nothing.
        if threshold is None or bool((scores[:, -1] > -torch.inf).all()):
            break
    return scores, ids


@dataclass
class _BestOf:
    """The k best classes of a block of n queries so far, and later hits not yet sorted in.

    Hits are collected and folded k at a time: a fold costs as much as a scan of many tiles.
    """

    scores: Tensor  # (n, k)
    ids: Tensor  # (n, k)
    threshold: Tensor  # (n, 1): only larger scores can still enter
    pending: list[tuple[Tensor, Tensor]]
    n_pending: int = 0

    @classmethod
    def make(cls, k: int, search: _Search, queries: slice, threshold: Tensor | None) -> _BestOf:
        shape = (queries.stop - queries.start, k)
        device = search.hidden.device
        scores = torch.full(shape, -torch.inf, dtype=search.dtype, device=device)
        ids = torch.full(shape, -1, dtype=torch.long, device=device)
        return cls(scores, ids, scores[:, :1].clone() if threshold is None else threshold, [])

    def add(self, classes: Tensor, tile: Tensor) -> None:
        """Take note of the tile's scores (n, m) of the classes (m,)."""
        mask = tile > self.threshold
        n_hits = int(mask.count_nonzero())
        if n_hits == 0:
            return
        k = self.scores.shape[1]
        if n_hits > _SPARSE_SHARE * tile.numel():
            scores, place = tile.topk(min(k, tile.shape[1]), dim=1, sorted=False)
            ids = classes[place].masked_fill_(scores == -torch.inf, -1)
        else:
            scores, ids = _gather_hits(tile, classes, *_places(mask))
        self.pending.append((scores, ids))
        self.n_pending += scores.shape[1]
        if self.n_pending >= k:
            self._fold()

    def _fold(self) -> None:
        scores = torch.cat([self.scores, *(scores for scores, _ in self.pending)], dim=1)
        ids = torch.cat([self.ids, *(ids for _, ids in self.pending)], dim=1)
        self.scores, place = scores.topk(self.scores.shape[1], dim=1, sorted=False)
        self.ids = ids.gather(1, place)
        self.threshold = torch.maximum(self.threshold, self.scores.amin(1, keepdim=True))
        self.pending, self.n_pending = [], 0

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Return scores (n, k) and class ids (n, k), best first."""
        if self.pending:
            self._fold()
        scores, order = self.scores.sort(dim=1, descending=True)
        return scores, self.ids.gather(1, order)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of each True in a contiguous (n, m) mask, in order."""
    if mask.numel() % 8:
        row, column = mask.nonzero().unbind(1)
        return row, column
    # Hits are rare: eight entries are looked at as one integer.
    eights = mask.view(-1, 8)
    hit = eights.view(torch.int64).view(-1).nonzero()[:, 0]
    inner = eights[hit].nonzero()
    place = hit[inner[:, 0]] * 8 + inner[:, 1]
    return place // mask.shape[1], place % mask.shape[1]


def _gather_hits(
    tile: Tensor, classes: Tensor, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the hits of each row of the tile side by side, padded with (-inf, -1)."""
    n_hits = torch.bincount(row, minlength=len(tile))
    first = n_hits.cumsum(0) - n_hits
    place = torch.arange(len(row), device=row.device) - first[row]
    width = int(n_hits.max())
    scores = tile.new_full((len(tile), width), -torch.inf)
    ids = torch.full((len(tile), width), -1, dtype=torch.long, device=tile.device)
    scores[row, place] = tile[row, column]
    ids[row, place] = classes[column]
    return scores, ids


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
