"""A file of users in, a file of recommendations out: streamed, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_rece.data.interactions import ITEM, USER
from hf_rece.data.item_tokenizer import Item, ItemTokenizer
from hf_rece.data.splits import HISTORY
from hf_rece.errors import DataError
from hf_rece.files import complete_files
from hf_rece.models.recommendation import Recommendation
from hf_rece.models.recommender import RecommenderModel


@dataclass(frozen=True)
class ScoredUsers:
    """What recommend_parquet did.

    Args:
        n_users: users read.
        n_answered: users with a known item, who got recommendations.
        n_recommendations: rows written.
        n_unknown: places in histories whose item the model does not know.
    """

    n_users: int
    n_answered: int
    n_recommendations: int
    n_unknown: int


def recommend_parquet(
    model: RecommenderModel,
    users: str | Path,
    output: str | Path,
    *,
    k: int = 10,
    user_column: str = USER,
    history_column: str = HISTORY,
    batch_size: int = 1024,
    progress: bool = True,
    **limits: Any,
) -> ScoredUsers:
    """Recommend to every user of a Parquet file, and write a Parquet file.

    Users come in as rows of (user, list of item ids in order of time). Recommendations go out as
    rows of (user_id, rank, item_id, score), best first, users in their order; the column of users
    keeps name and type. A user without a known item gets no row.

    `output` appears when it is complete: a failure leaves what was there before.

    Args:
        model: with its tokenizer.
        users: Parquet file.
        output: Parquet file.
        k: items for a user.
        user_column: column of user ids.
        history_column: column of histories, lists of item ids of the type that the model knows.
        batch_size: users read, scored and written at once; what bounds memory.
        progress: show a bar on stderr.
        **limits: filter_seen, allowed_items, denied_items and index, as RecommenderModel.recommend.

    Raises:
        DataError: if `users` is no Parquet file or has no such columns, or histories are no lists
            of the type of the model's items.
        WriteError: if `output` cannot be written.
        ArgumentError: as RecommenderModel.recommend.
    """
    tokenizer = model.own_tokenizer()
    file = _open(users)
    _check_columns(file.schema_arrow, str(users), user_column, history_column, tokenizer)
    schema = _schema(file.schema_arrow.field(user_column), tokenizer)
    counts = {"n_users": 0, "n_answered": 0, "n_recommendations": 0, "n_unknown": 0}
    columns = [user_column, history_column]
    output = Path(output)
    with (
        complete_files(output.parent, output.name) as folder,
        pq.ParquetWriter(folder / output.name, schema) as writer,
        _bar(file.metadata.num_rows, progress) as advance,
    ):
        for piece in file.iter_batches(batch_size=batch_size, columns=columns):
            histories = [history or [] for history in piece.column(history_column).to_pylist()]
            known = [tokenizer.known_items(history) for history in histories]
            answers = model.recommend(known, k, batch_size=batch_size, **limits)
            table = _table(piece.column(user_column), answers, schema)
            writer.write_table(table)
            counts["n_users"] += len(histories)
            counts["n_answered"] += sum(map(bool, answers))
            counts["n_recommendations"] += len(table)
            counts["n_unknown"] += sum(map(len, histories)) - sum(map(len, known))
            advance(len(histories))
    return ScoredUsers(**counts)


def _open(users: str | Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(users)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(str(users), f"not a Parquet file: {reason}", "Check the path") from None


def _check_columns(
    schema: pa.Schema, name: str, user_column: str, history_column: str, tokenizer: ItemTokenizer
) -> None:
    missing = [column for column in (user_column, history_column) if column not in schema.names]
    if missing:
        raise DataError(
            name,
            f"there is no column {', '.join(missing)}; the columns are {', '.join(schema.names)}",
            "Name the right one with user_column or history_column",
        )
    kind = schema.field(history_column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    wanted = _item_type(tokenizer)
    inner = kind.value_type if lists else kind
    fits = pa.types.is_integer(inner) if wanted == pa.int64() else _is_text(inner)
    if not lists or not (fits or pa.types.is_null(inner)):
        raise DataError(
            f"{name}, column {history_column!r}",
            f"it holds {kind}, and the model's items are {wanted}",
            f"Write one row a user, with a list of {wanted}",
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _item_type(tokenizer: ItemTokenizer) -> pa.DataType:
    whole = tokenizer.items and isinstance(tokenizer.items[0], int)
    return pa.int64() if whole else pa.string()


def _schema(user: pa.Field, tokenizer: ItemTokenizer) -> pa.Schema:
    return pa.schema(
        [
            pa.field(user.name, user.type),
            pa.field("rank", pa.int32()),
            pa.field(ITEM, _item_type(tokenizer)),
            pa.field("score", pa.float32()),
        ]
    )


def _table(
    users: pa.Array, answers: Sequence[Sequence[Recommendation]], schema: pa.Schema
) -> pa.Table:
    """Return one row for each recommendation."""
    places, ranks = [], []
    items: list[Item] = []
    scores: list[float] = []
    for place, answer in enumerate(answers):
        for rank, found in enumerate(answer, start=1):
            places.append(place)
            ranks.append(rank)
            items.append(found.item)
            scores.append(found.score)
    columns = [users.take(pa.array(places, pa.int64())), ranks, items, scores]
    arrays = [
        pa.array(column, field.type) if isinstance(column, list) else column
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """Show a progress bar on stderr; yields what advances it."""
    columns = (
        TextColumn("users"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("users", total=total)
        yield lambda n: bar.advance(task, n)
