"""Read an interaction log: who met what, when."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import polars as pl

from hf_rece.data.log_sources import ITEM as ITEM
from hf_rece.data.log_sources import TIME as TIME
from hf_rece.data.log_sources import USER as USER
from hf_rece.data.log_sources import find_columns, open_log
from hf_rece.errors import ArgumentError, DataError


def load_interactions(
    source: Any,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    split: str = "train",
    separator: str | None = None,
) -> pl.DataFrame:
    """Return a log as a table with columns user_id, item_id, timestamp.

    Rows are sorted by (user_id, timestamp); rows of one user at one time keep the source's order.
    Users and items keep their own dtype, integer or string. A column of a text file is integer if
    all its ids are written as integers are: 007 is a string, or it would be the same item as 7.
    Ratings and weights are not read: every row is an interaction.

    Columns that are not named are recognised, case, "_" and "-" aside, and with or without the
    types of RecBole (user_id:token); user_id, item_id and timestamp come first:

        user: user_id, user, query_id, session_id, visitor_id, reviewer_id
        item: item_id, item, movie_id, product_id, track_id, asin, parent_asin
        time: timestamp, datetime, time, date, unix_review_time

    Args:
        source: path of a CSV, TSV, RecBole (.inter), JSON lines or Parquet file (or a glob of them,
            or a folder of Parquet files), a Hub id, a datasets.Dataset or IterableDataset, a
            DatasetDict, a polars DataFrame or LazyFrame, a pandas DataFrame, a pyarrow Table or
            what else speaks Arrow's stream interface; or a list of these. Only the three columns
            are read, streams in batches.
        user_column: the source's column of user ids.
        item_column: the source's column of item ids.
        time_column: the source's column of times: numbers, datetimes or ISO 8601 strings.
        split: split to read of a Hub dataset or a DatasetDict.
        separator: one character between the columns of a text file. None: a comma in .csv, else a
            tab.

    Raises:
        ArgumentError: for a separator of several characters, or a split that is not there.
        DataError: if nothing can be read, a column is missing, not recognised, ambiguous or of no
            use, a value is null, a time cannot be read, or the log is empty.
    """
    several = isinstance(source, (list, tuple)) and len(source) > 0
    tables = [open_log(part, split, separator) for part in (source if several else [source])]
    named = {USER: user_column, ITEM: item_column, TIME: time_column}
    found = [find_columns(table, named) for table in tables]
    parts = [table.read(columns) for table, columns in zip(tables, found, strict=True)]
    name, columns = ", ".join(dict.fromkeys(table.name for table in tables)), found[0]
    frame = _joined(parts, name)
    if frame.is_empty():
        raise DataError(name, "the log is empty", "Pass a log with at least one interaction")
    return by_user_and_time(as_interactions(frame, name, columns))


def as_interactions(
    frame: pl.DataFrame, name: str, columns: Mapping[str, str], *, first_row: int = 0
) -> pl.DataFrame:
    """Return a table as load_interactions does, but in its own order.

    Args:
        frame: columns user_id, item_id, timestamp, with the values of the source.
        name: of the source in messages.
        columns: the source's names of the columns, by those.
        first_row: row of the source that the table begins with.

    Raises:
        DataError: if a value is null, an id is neither integer nor string, or a time cannot be
            read.
    """
    _check_nulls(frame, name, columns, first_row)
    return frame.with_columns(
        _ids(frame, USER, name, columns[USER]),
        _ids(frame, ITEM, name, columns[ITEM]),
        _times(frame[TIME], name, columns[TIME]),
    )


def k_core_filter(
    interactions: pl.DataFrame, *, min_user_interactions: int = 5, min_item_interactions: int = 5
) -> pl.DataFrame:
    """Drop rare users and items until all that remain meet both minima.

    Args:
        interactions: a table as load_interactions returns it.
        min_user_interactions: fewest interactions of a user that stays.
        min_item_interactions: fewest interactions of an item that stays.

    Raises:
        ArgumentError: if a minimum is negative.
        DataError: if nothing remains.
    """
    minima = {USER: min_user_interactions, ITEM: min_item_interactions}
    for column, minimum in minima.items():
        if minimum < 0:
            name = f"min_{column.removesuffix('_id')}_interactions"
            raise ArgumentError(name, minimum, "negative", "Pass 0 to keep all")
    before = -1
    while len(interactions) != before:
        before = len(interactions)
        for column, minimum in minima.items():
            interactions = interactions.filter(pl.len().over(column) >= minimum)
    if interactions.is_empty():
        raise DataError(
            "interactions",
            f"no user with {min_user_interactions} and item with {min_item_interactions} "
            "interactions remains",
            "Lower min_user_interactions or min_item_interactions",
        )
    return interactions


def log_facts(interactions: pl.DataFrame) -> str:
    """Return what identifies a log: its numbers of users, items, interactions, and a fingerprint.

    The fingerprint is the SHA-256 of its rows as CSV, user, item and time, in their order.

    Args:
        interactions: a table as load_interactions returns it.
    """
    fingerprint = hashlib.sha256()
    for part in interactions.select(USER, ITEM, TIME).iter_slices(1 << 20):
        fingerprint.update(part.write_csv(include_header=False).encode())
    return (
        f"a log of {interactions[USER].n_unique():,} users, {interactions[ITEM].n_unique():,} "
        f"items and {len(interactions):,} interactions, SHA-256 {fingerprint.hexdigest()}"
    )


def _joined(parts: list[pl.DataFrame], name: str) -> pl.DataFrame:
    dated = [part[TIME].dtype.is_temporal() for part in parts]
    try:
        # Polars would make a date the number of its day.
        if any(dated) and not all(dated):
            raise pl.exceptions.SchemaError("times are dates in some, and not in others")
        return pl.concat(parts, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(
            name,
            f"the parts do not fit together: {error}",
            "Give the columns of all of them the same types",
        ) from error


def by_user_and_time(frame: pl.DataFrame) -> pl.DataFrame:
    """Return interactions sorted by user, then time; of one user at one time, in their order."""
    # Two stable sorts by one number each take a quarter of the time of one sort by two columns.
    users = frame.select(pl.col(USER).unique().sort()).with_row_index("order")
    return (
        frame.join(users, on=USER, how="left", maintain_order="left")
        .sort(TIME, maintain_order=True)
        .sort("order", maintain_order=True)
        .drop("order")
    )


def _check_nulls(
    frame: pl.DataFrame, name: str, columns: Mapping[str, str], first_row: int
) -> None:
    for role, column in columns.items():
        values = frame[role]
        missing = (
            values.is_null() | values.is_nan() if values.dtype.is_float() else values.is_null()
        )
        if missing.any():
            raise DataError(
                f"{name}, column {column!r}",
                f"{missing.sum()} of {len(frame)} values are missing, the first in row "
                f"{first_row + missing.arg_true()[0]}",
                "Drop or fill these rows",
            )


def _ids(frame: pl.DataFrame, role: str, name: str, column: str) -> pl.Series:
    values = _of_64_bits(frame[role], name, column)
    if values.dtype.is_integer() or values.dtype == pl.String:
        return values
    if values.dtype in (pl.Categorical, pl.Enum):
        return values.cast(pl.String)
    # Beyond 2**53, floats are whole but not all integers: neighbouring ids would be one.
    if values.dtype.is_float() and ((values == values.round()) & (values.abs() < 2**53)).all():
        return values.cast(pl.Int64)
    raise DataError(
        f"{name}, column {column!r}",
        f"ids of type {values.dtype} are neither integers nor strings",
        f"Convert the column, or name another with {role.removesuffix('_id')}_column",
    )


def _of_64_bits(values: pl.Series, name: str, column: str) -> pl.Series:
    """Return integers of 128 bits, which Arrow does not have, as int64; all else as it is."""
    if str(values.dtype) not in ("Int128", "UInt128"):
        return values
    try:
        return values.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError:
        raise DataError(
            f"{name}, column {column!r}",
            f"integers from {values.min()!r} to {values.max()!r} do not fit into 64 bits",
            "Write them as strings, or as smaller integers",
        ) from None


def _times(values: pl.Series, name: str, column: str) -> pl.Series:
    if values.dtype.is_numeric():
        return _of_64_bits(values, name, column)
    if values.dtype.is_temporal() and values.dtype in (pl.Date, pl.Datetime):
        return values.cast(pl.Datetime("us")).dt.epoch("us").alias(TIME)
    if values.dtype == pl.String:
        # Integers first: as floats, nanoseconds would lose their last digits.
        for dtype in (pl.Int64, pl.Float64):
            numbers = values.cast(dtype, strict=False)
            if not numbers.is_null().any() and numbers.is_finite().all():
                return numbers
        return written_dates(values, name, column)
    raise _unreadable_time(values, name, column)


def written_dates(values: pl.Series, name: str, column: str) -> pl.Series:
    """Return ISO 8601 strings as microseconds since 1970, int64.

    Args:
        values: strings.
        name: of the source in messages.
        column: of the source in messages.

    Raises:
        DataError: for strings that are no dates.
    """
    try:
        times = values.str.to_datetime(time_unit="us", time_zone="UTC")
    except pl.exceptions.PolarsError as error:
        raise _unreadable_time(values, name, column) from error
    return times.dt.epoch("us").alias(TIME)


def _unreadable_time(values: pl.Series, name: str, column: str) -> DataError:
    return DataError(
        f"{name}, column {column!r}",
        f"values such as {values[0]!r} cannot be read as times",
        "Pass numbers, datetimes or ISO 8601 strings such as 2024-05-31T12:00:00",
    )
