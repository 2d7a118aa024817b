"""Cut a log into training sequences and held-out targets."""

from __future__ import annotations

import math

import polars as pl
from datasets import Dataset, DatasetDict, DatasetInfo

from hf_rece.data.interactions import ITEM, TIME, USER, log_facts
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.errors import ArgumentError, DataError

HISTORY, TARGET = "item_ids", "target_id"


def leave_one_out_split(interactions: pl.DataFrame, tokenizer: ItemTokenizer) -> DatasetDict:
    """Hold out each user's last item for test and the one before for validation.

    Users with fewer than three interactions are only trained on; a single interaction has no next
    item to learn and is left out.

    Args:
        interactions: a table as load_interactions returns it.
        tokenizer: knows every item of the log.

    Returns:
        train: user_id, item_ids (all but the last two).
        validation: user_id, item_ids (all but the last two), target_id (the last but one).
        test: user_id, item_ids (all but the last), target_id (the last).

    Raises:
        DataError: if no user has three interactions, or an item is unknown to the tokenizer.
    """
    sequences = _sequences(interactions, tokenizer)
    held_out = sequences.filter(pl.col(HISTORY).list.len() >= 3)
    short = sequences.filter(pl.col(HISTORY).list.len() == 2)
    train = pl.concat([_without_last(held_out, 2), short], how="vertical_relaxed")
    return _splits(train, held_out, f"{split_protocol(None)}; {log_facts(interactions)}")


def temporal_split(
    interactions: pl.DataFrame, tokenizer: ItemTokenizer, *, quantile: float = 0.95
) -> DatasetDict:
    """Hold out the users who are active after a point in time, wholly.

    The point is the quantile of all timestamps. Held-out users' last item is the test target, the
    one before the validation target. Timestamps must be points on one clock: with positions inside
    each sequence instead, only long sequences would be held out.

    Args:
        interactions: a table as load_interactions returns it.
        tokenizer: knows every item of the log.
        quantile: share of interactions before the point in time, between 0 and 1.

    Returns:
        Splits of the columns that leave_one_out_split has; train holds the other users' whole
        sequences.

    Raises:
        ArgumentError: if quantile is not between 0 and 1.
        DataError: if a split comes out empty, or an item is unknown to the tokenizer.

    Reference:
        The protocol of arXiv 2408.02354 and 2409.18721.
    """
    check_quantile(quantile)
    # Series.quantile answers in float64, which nanoseconds do not fit.
    n_before = math.floor((len(interactions) - 1) * quantile)
    point = interactions[TIME].sort().head(n_before + 1).max()
    late = interactions.group_by(USER).agg((pl.col(TIME).max() > point).alias("late"))
    sequences = _sequences(interactions, tokenizer).join(late, on=USER, maintain_order="left")
    held_out = sequences.filter("late", pl.col(HISTORY).list.len() >= 3).drop("late")
    train = sequences.filter(~pl.col("late"), pl.col(HISTORY).list.len() >= 2).drop("late")
    return _splits(train, held_out, f"{split_protocol(quantile)}; {log_facts(interactions)}")


def check_quantile(quantile: float) -> None:
    """Raise ArgumentError unless quantile is between 0 and 1."""
    if not 0 < quantile < 1:
        raise ArgumentError("quantile", quantile, "out of range", "Pass a number such as 0.95")


def split_protocol(quantile: float | None) -> str:
    """Return in words how a temporal split holds out users, or leave-one-out for None."""
    if quantile is None:
        return "leave-one-out split, each user's last item for test, the one before for validation"
    return (
        f"temporal split, users active after the {quantile:g} quantile of all times held out, "
        "their last item for test, the one before for validation"
    )


def _sequences(interactions: pl.DataFrame, tokenizer: ItemTokenizer) -> pl.DataFrame:
    """Return one row a user: user_id, item_ids in order of time."""
    table = tokenizer.item_table()
    if table.schema[ITEM] == pl.String:
        interactions = interactions.cast({ITEM: pl.String})
    else:  # an id that the log's dtype cannot hold is not in the log: null, which matches nothing
        table = table.cast({ITEM: interactions.schema[ITEM]}, strict=False)
    encoded = (
        interactions.lazy()
        .sort([USER, TIME], maintain_order=True)
        .join(table.lazy(), on=ITEM, how="left", maintain_order="left")
    )
    sequences = (
        encoded.group_by(USER, maintain_order=True).agg(pl.col("token_id").alias(HISTORY)).collect()
    )
    unknown = sequences.filter(
        pl.col(HISTORY).list.drop_nulls().list.len() < pl.col(HISTORY).list.len()
    )
    if len(unknown):
        raise DataError(
            "interactions",
            f"{len(unknown)} users have items that the tokenizer does not know",
            "Make the tokenizer with ItemTokenizer.from_interactions of the same log",
        )
    return sequences


def _without_last(sequences: pl.DataFrame, n: int) -> pl.DataFrame:
    length = pl.col(HISTORY).list.len()
    return sequences.with_columns(pl.col(HISTORY).list.head(length - n))


def _splits(train: pl.DataFrame, held_out: pl.DataFrame, description: str) -> DatasetDict:
    """Return the parts; description begins with the protocol and a comma."""
    train = train.filter(pl.col(HISTORY).list.len() >= 2)
    for name, part in (("train", train), ("test", held_out)):
        if part.is_empty():
            raise DataError(
                "interactions",
                f"the {description.partition(',')[0]} leaves no sequence for {name}",
                "Pass a log whose users have three interactions or more (and a lower quantile "
                "for the temporal split)",
            )
    validation, test = (
        _without_last(held_out, n).with_columns(
            held_out[HISTORY].list.get(-n, null_on_oob=False).alias(TARGET)
        )
        for n in (2, 1)
    )
    parts = {"train": train, "validation": validation, "test": test}
    info = DatasetInfo(description=description)
    return DatasetDict({name: Dataset(part.to_arrow(), info=info) for name, part in parts.items()})
