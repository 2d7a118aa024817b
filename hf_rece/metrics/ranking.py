r"""Ranking metrics as functions of rank counts: no score is ever looked at twice.

A target's rank is known as two counts: `greater`, the candidates scored above it, and `tied`, the
other candidates scored like it. Each metric is its exact expectation over all orders of the tied
candidates,

    metric = 1 / (tied + 1) * sum over r = greater + 1 ... greater + tied + 1 of metric at rank r

so that a model that scores all items alike is at chance, and not first. Each user has one target:
the ideal DCG is 1, and recall@k equals hit rate@k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_rece.errors import ArgumentError

DEFAULT_KS = (5, 10, 20)


def ndcg_at_k(greater: ArrayLike, tied: ArrayLike, k: int) -> float:
    """Return the mean of 1 / log2(rank + 1) for ranks up to k, else 0.

    Args:
        greater: (n_users,) integers, candidates scored above the target.
        tied: (n_users,) integers, other candidates scored like the target.
        k: cut-off, at least 1.

    Raises:
        ArgumentError: if k < 1, the counts differ in shape, are negative or empty.

    Example:
        >>> round(ndcg_at_k([0, 2, 10], [0, 0, 0], k=10), 6)  # 1/log2(2), 1/log2(4), 0
        0.5
    """
    return _mean_expectation(greater, tied, 1 / np.log2(np.arange(1, _cutoff(k) + 1) + 1))


def hit_rate_at_k(greater: ArrayLike, tied: ArrayLike, k: int) -> float:
    """Return the share of targets with rank at most k.

    Args:
        greater: see ndcg_at_k.
        tied: see ndcg_at_k.
        k: see ndcg_at_k.

    Raises:
        ArgumentError: as ndcg_at_k.

    Example:
        >>> hit_rate_at_k([0, 2, 10, 0], [0, 0, 0, 19], k=10)  # the last is tied with 19 others
        0.625
    """
    return _mean_expectation(greater, tied, np.ones(_cutoff(k)))


def recall_at_k(greater: ArrayLike, tied: ArrayLike, k: int) -> float:
    """Return the mean share of a user's targets with rank at most k; with one target, the hit rate.

    Args:
        greater: see ndcg_at_k.
        tied: see ndcg_at_k.
        k: see ndcg_at_k.

    Raises:
        ArgumentError: as ndcg_at_k.
    """
    return hit_rate_at_k(greater, tied, k)


def mrr_at_k(greater: ArrayLike, tied: ArrayLike, k: int) -> float:
    """Return the mean of 1 / rank for ranks up to k, else 0.

    Args:
        greater: see ndcg_at_k.
        tied: see ndcg_at_k.
        k: see ndcg_at_k.

    Raises:
        ArgumentError: as ndcg_at_k.

    Example:
        >>> mrr_at_k([0, 1], [0, 0], k=10)
        0.75
    """
    return _mean_expectation(greater, tied, 1 / np.arange(1, _cutoff(k) + 1))


def coverage_at_k(topk_ids: ArrayLike, n_items: int, k: int) -> float:
    """Return the share of the catalogue that is in some user's first k recommendations.

    Args:
        topk_ids: (n_users, at least k) item ids, best first; negative ids are missing entries.
        n_items: size of the catalogue.
        k: cut-off, at least 1.

    Raises:
        ArgumentError: if k or n_items < 1, or topk_ids has fewer than k columns.

    Example:
        >>> coverage_at_k([[0, 1], [0, 2]], n_items=4, k=1)
        0.25
    """
    ids = np.asarray(topk_ids)
    if n_items < 1:
        raise ArgumentError("n_items", n_items, "an empty catalogue", "Pass its size")
    if ids.ndim != 2 or ids.shape[1] < _cutoff(k):
        raise ArgumentError(
            "topk_ids", ids.shape, f"not {k} ids a user", "Recommend at least k items to each user"
        )
    shown = np.unique(ids[:, :k])
    return int((shown >= 0).sum()) / n_items


def ranking_metrics(
    greater: ArrayLike,
    tied: ArrayLike,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    topk_ids: ArrayLike | None = None,
    n_items: int | None = None,
) -> dict[str, float]:
    """Return ndcg@k, hr@k, recall@k, mrr@k, and with topk_ids coverage@k, for each k.

    Args:
        greater: see ndcg_at_k.
        tied: see ndcg_at_k.
        ks: cut-offs.
        topk_ids: see coverage_at_k; None leaves coverage out.
        n_items: size of the catalogue; needed with topk_ids.

    Raises:
        ArgumentError: as ndcg_at_k and coverage_at_k.
    """
    metrics: dict[str, float] = {}
    for k in ks:
        metrics[f"ndcg@{k}"] = ndcg_at_k(greater, tied, k)
        metrics[f"hr@{k}"] = hit_rate_at_k(greater, tied, k)
        metrics[f"recall@{k}"] = recall_at_k(greater, tied, k)
        metrics[f"mrr@{k}"] = mrr_at_k(greater, tied, k)
        if topk_ids is not None:
            metrics[f"coverage@{k}"] = coverage_at_k(topk_ids, n_items or 0, k)
    return metrics


def _mean_expectation(
    greater: ArrayLike, tied: ArrayLike, gain_at_rank: NDArray[np.float64]
) -> float:
    """Return the mean over users of the expected gain; ranks beyond the gains count 0."""
    above, alike = _counts("greater", greater), _counts("tied", tied)
    if above.shape != alike.shape:
        raise ArgumentError(
            "tied", alike.shape, f"greater has shape {above.shape}", "Pass a count for each user"
        )
    total: Any = np.concatenate([[0.0], np.cumsum(gain_at_rank)])  # total[r]: gains of ranks 1..r
    k = len(gain_at_rank)
    first, last = np.minimum(above, k), np.minimum(above + alike + 1, k)
    return float(((total[last] - total[first]) / (alike + 1)).mean())


def _counts(name: str, values: ArrayLike) -> NDArray[np.int64]:
    counts = np.asarray(values)
    if counts.ndim != 1 or counts.size == 0:
        raise ArgumentError(name, counts.shape, "not a count for each user", "Pass (n_users,)")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ArgumentError(name, counts[:5].tolist(), "not counts", "Pass integers from 0")
    return counts.astype(np.int64)


def _cutoff(k: int) -> int:
    if k < 1:
        raise ArgumentError("k", k, "no rank is counted", "Pass 1 or more")
    return k
