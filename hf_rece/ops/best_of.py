"""The best classes of a scan, tile by tile: what streamed top-k keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A row's new candidates are cheaper to pick out one by one than to sort, up to this share of a
# tile.
_SPARSE_SHARE = 1 / 16


@dataclass
class BestOf:
    """The k best classes of a block of n queries so far, and later hits not yet sorted in.

    Hits are collected and folded k at a time: a fold costs as much as a scan of many tiles.
    """

    scores: Tensor  # (n, k)
    ids: Tensor  # (n, k)
    threshold: Tensor  # (n, 1): only larger scores can still enter
    pending: list[tuple[Tensor, Tensor]]
    n_pending: int = 0

    @classmethod
    def none(cls, shape: tuple[int, int], states: Tensor, threshold: Tensor | None) -> BestOf:
        """Return room for the best classes, none of which is known yet.

        Args:
            shape: n queries, k classes.
            states: whose dtype and device the scores will have.
            threshold: (n, 1), or None for none.
        """
        scores = states.new_full(shape, -torch.inf)
        ids = torch.full(shape, -1, dtype=torch.long, device=states.device)
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
