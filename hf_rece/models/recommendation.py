"""What goes into a recommender and what comes out: outputs, histories, answers in own ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_rece.data.interactions import ITEM, USER
from hf_rece.data.item_tokenizer import Item, ItemTokenizer
from hf_rece.errors import ArgumentError, DataError


@dataclass
class RecommenderOutput(ModelOutput):
    """What RecommenderModel returns.

    Args:
        loss: scalar; the training loss in training, the exact cross-entropy in evaluation.
        last_hidden_state: (B, T, D), without labels.
        logits: (B, T, C), only with output_logits=True.
        greater: (N,) int64, for each label the items scored above it, with rank_k.
        tied: (N,) int64, for each label the other items scored like it, with rank_k.
        topk_ids: (N, rank_k) int64, for each label the best items, with rank_k.
        losses: (N,) float32, the exact cross-entropy of each label, in evaluation.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    greater: Tensor | None = None
    tied: Tensor | None = None
    topk_ids: Tensor | None = None
    losses: Tensor | None = None


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Args:
        item: the user's own item id.
        score: its logit.
    """

    item: Item
    score: float


def known_histories(
    tokenizer: ItemTokenizer, histories: Sequence[Sequence[Item]]
) -> list[list[Item]]:
    """Return the known items of each history; one warning names those that are not known.

    Args:
        tokenizer: the model's vocabulary of items.
        histories: lists of item ids in order of time.

    Raises:
        ArgumentError: if histories is one history rather than a list of them.
        DataError: if they hold what is no item id.
    """
    if isinstance(histories, str) or any(isinstance(history, (str, int)) for history in histories):
        raise ArgumentError(
            "histories", histories, "one history, not a list of them", "Pass [history]"
        )
    try:
        known = [tokenizer.known_items(history) for history in histories]
    except TypeError as error:
        raise DataError(
            "histories", f"not lists of item ids ({error})", "Pass lists of integers or strings"
        ) from error
    unknown = {
        item
        for history, kept in zip(histories, known, strict=True)
        for item in set(history) - set(kept)
    }
    _warn_of_unknown(unknown, stacklevel=5)  # recommend's caller, past its inference_mode
    return known


def known_ids(tokenizer: ItemTokenizer, items: Sequence[Item]) -> set[int]:
    """Return the token ids of the known ones of `items`; one warning names the others.

    Raises:
        ArgumentError: if items is one item rather than a list of them.
    """
    if isinstance(items, (str, int)):
        raise ArgumentError("denied_items", items, "one item, not a list of them", "Pass [item]")
    known = tokenizer.known_items(items)
    _warn_of_unknown(set(items) - set(known), stacklevel=6)
    return set(tokenizer.convert_items_to_ids(known))


def _warn_of_unknown(unknown: set[Item], stacklevel: int) -> None:
    if unknown:
        shown = ", ".join(sorted(map(repr, unknown))[:5])
        warnings.warn(
            f"{len(unknown)} items are not in the vocabulary and were left out: {shown}",
            stacklevel=stacklevel,
        )


def named_recommendations(
    tokenizer: ItemTokenizer, scores: Sequence[float], ids: Sequence[int]
) -> list[Recommendation]:
    """Return the answer to one history.

    Args:
        tokenizer: the model's vocabulary of items.
        scores: (k,), best first.
        ids: (k,) token ids, -1 for the missing entries at the end.
    """
    n_found = sum(token >= 0 for token in ids)
    items = tokenizer.convert_ids_to_items(ids[:n_found])
    return [Recommendation(*pair) for pair in zip(items, scores[:n_found], strict=True)]


def recommendations_frame(
    users: Sequence[Any], answers: Sequence[Sequence[Recommendation]]
) -> pl.DataFrame:
    """Return what recommend answered as a table, in the columns and order of RecTools.

    Args:
        users: an id for each answer.
        answers: as RecommenderModel.recommend returns them.

    Returns:
        user_id, item_id, score (float64), rank (int64, from 1): best first, users in their order.

    Raises:
        ArgumentError: if there are not as many users as answers.
    """
    if len(users) != len(answers):
        raise ArgumentError(
            "users", f"{len(users)} users", f"there are {len(answers)} answers", "Pass one for each"
        )
    found = [
        (place, each.item, each.score, rank)
        for place, answer in enumerate(answers)
        for rank, each in enumerate(answer, start=1)
    ]
    schema = {"place": pl.Int64, ITEM: None, "score": pl.Float64, "rank": pl.Int64}
    table = pl.DataFrame(found, schema=schema, orient="row", infer_schema_length=None)
    of_rows = pl.Series(USER, users).gather(table["place"])
    return table.select(of_rows, ITEM, "score", "rank")
