"""NDCG, hit rate, recall and MRR at k for evaluate: predictions are rank counts."""

from typing import Any

import datasets
import evaluate

from hf_rece.metrics.ranking import DEFAULT_KS, ranking_metrics

_INPUTS = """
Args:
    predictions: for each user, how many candidates are scored above the target.
    references: for each user, how many other candidates are scored like the target.
    ks: cut-offs, (5, 10, 20) unless given.
    topk_ids: recommendations to all users, best first, at least max(ks) each; adds coverage@k.
    n_items: size of the catalogue; needed with topk_ids.
Returns:
    ndcg@k, hr@k, recall@k and mrr@k for each k, expected over the order of tied candidates.
"""


class RankingAtK(evaluate.Metric):
    """Ranking metrics over rank counts; batches and processes may be uneven."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Ranking metrics with exact treatment of ties.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        ks: Any = DEFAULT_KS,
        topk_ids: Any = None,
        n_items: int | None = None,
    ) -> dict[str, float]:
        return ranking_metrics(
            predictions, references, ks=tuple(ks), topk_ids=topk_ids, n_items=n_items
        )
