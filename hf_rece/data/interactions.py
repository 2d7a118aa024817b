"""Read an interaction log: who met what, when."""

from __future__ import annotations

import hashlib
from glob import glob
from pathlib import Path
from typing import Any

import polars as pl

from hf_rece.errors import ArgumentError, DataError

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t"}


def load_interactions(
    source: Any,
    *,
    user_column: str = USER,
    item_column: str = ITEM,
    time_column: str = TIME,
    split: str = "train",
) -> pl.DataFrame:
    """Return a log as a table with columns user_id, item_id, timestamp.

    Rows are sorted by (user_id, timestamp); rows of one user at one time keep the source's order.
    Users and items keep their own dtype, integer or string. A CSV or TSV column is integer if all
    its ids are written as integers are: 007 is a string, or it would be the same item as 7.

    Args:
        source: path of a CSV, TSV or Parquet file (or a glob of them, or a folder of Parquet
            files), a list of such paths, a polars or pandas DataFrame, a datasets.Dataset, or the
            Hub id of a dataset.
        user_column: the source's column of user ids.
        item_column: the source's column of item ids.
        time_column: the source's column of times: numbers, datetimes or ISO 8601 strings.
        split: split to read of a Hub dataset.

    Raises:
        DataError: if nothing can be read, a column is missing or of no use, a value is null, a time
            cannot be read, or the log is empty.
    """
    columns = {USER: user_column, ITEM: item_column, TIME: time_column}
    frame, name = _read(source, split, [user_column, item_column, time_column])
    for role, column in columns.items():
        if column not in frame.columns:
            raise DataError(
                name,
                f"there is no column {column!r}; the columns are {', '.join(frame.columns)}",
                f"Name the right one with {role.split('_')[0].replace('timestamp', 'time')}_column",
            )
    frame = frame.select(pl.col(column).alias(role) for role, column in columns.items())
    if frame.is_empty():
        raise DataError(name, "the log is empty", "Pass a log with at least one interaction")
    _check_nulls(frame, name, columns)
    frame = frame.with_columns(
        _ids(frame, USER, name, user_column),
        _ids(frame, ITEM, name, item_column),
        _times(frame[TIME], name, time_column),
    )
    return _by_user_and_time(frame)


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


def _read(source: Any, split: str, columns: list[str]) -> tuple[pl.DataFrame, str]:
    """Return the table and what to call it in messages; columns are those of user, item, time."""
    if isinstance(source, pl.DataFrame):
        return source, "the DataFrame"
    if isinstance(source, (str, Path)):
        return _read_path(str(source), split, columns)
    if isinstance(source, (list, tuple)) and source:
        parts = [_read_path(str(path), split, columns) for path in source]
        frames = [frame.select(c for c in frame.columns if c in columns) for frame, _ in parts]
        try:
            return pl.concat(frames, how="vertical_relaxed"), parts[0][1]
        except pl.exceptions.PolarsError as error:
            raise DataError(
                ", ".join(name for _, name in parts),
                f"the files do not fit together: {error}",
                "Give all files the same columns, of the same types",
            ) from error
    if hasattr(source, "to_polars"):  # datasets.Dataset
        return source.to_polars(), "the dataset"
    if type(source).__module__.startswith("pandas"):
        try:
            return pl.from_pandas(source), "the DataFrame"
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise DataError(
                "the DataFrame",
                f"a column holds values of several types: {error}",
                "Convert each column to one type",
            ) from error
    raise DataError(
        f"source of type {type(source).__name__}",
        "cannot be read as a log",
        "Pass a path, a polars or pandas DataFrame, a datasets.Dataset or a Hub id",
    )


def _read_path(source: str, split: str, columns: list[str]) -> tuple[pl.DataFrame, str]:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in _SEPARATORS or suffix == ".parquet" or path.exists():
        return _read_file(path, suffix, columns), path.name
    if source.count("/") > 1 or path.is_absolute():
        raise DataError(
            path.name,
            "not a file that can be read",
            "Pass .csv, .tsv or .parquet, or a Hub dataset id",
        )
    from datasets import load_dataset  # heavy, and only Hub users need it

    try:
        frame: pl.DataFrame = load_dataset(source, split=split).to_polars()
    except (OSError, ValueError) as error:
        raise DataError(
            source,
            f"neither a file nor a Hub dataset that can be read: {error}",
            "Check the path, or the id and split",
        ) from error
    return frame, source


def _read_file(path: Path, suffix: str, columns: list[str]) -> pl.DataFrame:
    if not path.exists() and not glob(str(path), recursive=True):
        raise DataError(path.name, "no such file", "Check the path")
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise DataError(path.name, "no Parquet file is in this folder", "Pass the file itself")
    try:
        if suffix == ".parquet":
            return pl.read_parquet(path)
        if path.is_dir():
            return pl.read_parquet(path / "**/*.parquet")
        if suffix in _SEPARATORS:
            return _read_csv(path, _SEPARATORS[suffix], columns)
    except pl.exceptions.NoDataError as error:
        raise DataError(path.name, "the file is empty", "Pass a file with a header") from error
    # Polars panics over some damaged Parquet files.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(
            path.name, f"not a readable table: {error}", "Save it as UTF-8 CSV, or as Parquet"
        ) from error
    raise DataError(path.name, "not a file that can be read", "Pass .csv, .tsv or .parquet")


def _read_csv(path: Path, separator: str, columns: list[str]) -> pl.DataFrame:
    # As text: guessing types takes ten times as long, and takes 007 for 7.
    table = pl.scan_csv(path, separator=separator, infer_schema=False)
    if not set(columns) <= set(table.collect_schema().names()):
        return table.head(1).collect()  # enough to say which columns there are
    frame = table.select(*dict.fromkeys(columns)).collect()
    ids = dict.fromkeys(columns[:2])
    return frame.with_columns(_integers_if_written_so(frame[column]) for column in ids)


def _integers_if_written_so(values: pl.Series) -> pl.Series:
    numbers = values.cast(pl.Int64, strict=False)
    return numbers if numbers.cast(pl.String).equals(values) else values


def _by_user_and_time(frame: pl.DataFrame) -> pl.DataFrame:
    # Two stable sorts by one number each take a quarter of the time of one sort by two columns.
    users = frame.select(pl.col(USER).unique().sort()).with_row_index("order")
    return (
        frame.join(users, on=USER, how="left", maintain_order="left")
        .sort(TIME, maintain_order=True)
        .sort("order", maintain_order=True)
        .drop("order")
    )


def _check_nulls(frame: pl.DataFrame, name: str, columns: dict[str, str]) -> None:
    for role, column in columns.items():
        values = frame[role]
        missing = (
            values.is_null() | values.is_nan() if values.dtype.is_float() else values.is_null()
        )
        if missing.any():
            raise DataError(
                f"{name}, column {column!r}",
                f"{missing.sum()} of {len(frame)} values are missing, the first in row "
                f"{missing.arg_true()[0]}",
                "Drop or fill these rows",
            )


def _ids(frame: pl.DataFrame, role: str, name: str, column: str) -> pl.Series:
    values = frame[role]
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


def _times(values: pl.Series, name: str, column: str) -> pl.Series:
    if values.dtype.is_numeric():
        return values
    if values.dtype.is_temporal() and values.dtype in (pl.Date, pl.Datetime):
        return values.cast(pl.Datetime("us")).dt.epoch("us").alias(TIME)
    if values.dtype == pl.String:
        # Integers first: as floats, nanoseconds would lose their last digits.
        for dtype in (pl.Int64, pl.Float64):
            numbers = values.cast(dtype, strict=False)
            if not numbers.is_null().any() and numbers.is_finite().all():
                return numbers
        try:
            times = values.str.to_datetime(time_unit="us", time_zone="UTC")
            return times.dt.epoch("us").alias(TIME)
        except pl.exceptions.PolarsError as error:
            raise _unreadable_time(values, name, column) from error
    raise _unreadable_time(values, name, column)


def _unreadable_time(values: pl.Series, name: str, column: str) -> DataError:
    return DataError(
        f"{name}, column {column!r}",
        f"values such as {values[0]!r} cannot be read as times",
        "Pass numbers, datetimes or ISO 8601 strings such as 2024-05-31T12:00:00",
    )
