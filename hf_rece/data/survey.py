"""A first look at the files of a log: how many rows, and of which types, without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any

import polars as pl

from hf_rece.data.interactions import ITEM, TIME, USER, as_interactions, written_dates
from hf_rece.data.log_sources import LogTable, find_columns, open_log, readable
from hf_rece.errors import DataError

_BATCH_ROWS = 1 << 20
_INTEGER, _NUMBER, _DATE, _TEXT = "integer", "number", "date", "text"
_DTYPES = {_INTEGER: pl.Int64, _NUMBER: pl.Float64, _DATE: pl.Int64, _TEXT: pl.String}


@dataclass(frozen=True)
class LogFile:
    """A file of a log that has been looked at.

    Args:
        path: of the file.
        columns: its names of the columns user_id, item_id and timestamp, by those.
        kinds: what these columns hold: "integer", "number", "date" or "text".
        rows: interactions.
        separator: of the columns of a text file; None for that of its ending.
    """

    path: str
    columns: dict[str, str]
    kinds: dict[str, str]
    rows: int
    separator: str | None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return Path(self.path).name

    def open(self) -> LogTable:
        """Return the file as a table that has not been read."""
        return open_log(self.path, "train", self.separator)


@dataclass(frozen=True)
class Survey:
    """What is known of a log before it is read.

    Args:
        files: in order.
        kinds: what the columns user_id, item_id and timestamp hold in all of the files.
    """

    files: list[LogFile]
    kinds: dict[str, str]

    @property
    def rows(self) -> int:
        """Interactions of the whole log."""
        return sum(file.rows for file in self.files)

    @property
    def schema(self) -> pl.Schema:
        """The types in which the log is read: int64 or string ids, int64 or float64 times."""
        return pl.Schema({role: _DTYPES[kind] for role, kind in self.kinds.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return what from_dict makes this of again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Survey:
        """Return the survey that to_dict wrote down."""
        return cls([LogFile(**file) for file in values["files"]], values["kinds"])


def log_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files of a log, in the order in which they are read.

    Args:
        source: a file, a glob, or a folder of Parquet files; or a list of these.

    Raises:
        DataError: for a name that is no file.
    """
    names = [source] if isinstance(source, (str, Path)) else source
    found: list[Path] = []
    for name in names:
        path = Path(name)
        files = (
            [path] if path.is_file() else [Path(file) for file in glob(str(path), recursive=True)]
        )
        if path.is_dir():
            files = list(path.rglob("*.parquet"))
        files = sorted(file for file in files if file.is_file())
        if not files:
            raise DataError(str(name), "no such file", "Check the path, the folder or the pattern")
        found += files
    return found


def survey_log(
    files: Sequence[Path],
    named: dict[str, str | None],
    separator: str | None,
    advance: Callable[[int], object],
) -> Survey:
    """Look at the files of a log: text is read once, of Parquet mostly what it says of itself.

    Args:
        files: as log_files returns them.
        named: by role (user_id, item_id, timestamp) the columns that the caller named; None for
            those to recognise.
        separator: of the columns of text files; None for that of their ending.
        advance: told 1 for each file.

    Raises:
        DataError: naming the file that cannot be read, lacks a column, or does not fit the others;
            for a log without rows.
    """
    looked_at = []
    for path in files:
        looked_at.append(_look_at(path, named, separator))
        advance(1)
    kinds = {role: _common(role, looked_at) for role in named}
    survey = Survey(looked_at, kinds)
    if survey.rows == 0:
        raise DataError(
            looked_at[0].name, "the log is empty", "Pass a log with at least one interaction"
        )
    return survey


def read_batches(file: LogFile, survey: Survey) -> Iterator[pl.DataFrame]:
    """Yield a file piece by piece: user_id, item_id, timestamp in the types of the survey.

    Raises:
        DataError: if not all of it can be read, a value is null, or an id or a time is none.
    """
    first_row = 0
    for batch in _raw_batches(file):
        yield _typed(batch, file, survey, first_row)
        first_row += len(batch)
    # Over some damaged Parquet files polars prints why, and ends as if it were done.
    if first_row != file.rows:
        raise DataError(
            file.name,
            f"damaged: {first_row:,} of its {file.rows:,} rows can be read",
            "Copy or download it again",
        )


def _look_at(path: Path, named: dict[str, str | None], separator: str | None) -> LogFile:
    table = open_log(path, "train", separator)
    columns = find_columns(table, named)
    scan = _scan(table, columns)
    with readable(table.name):
        schema = scan.collect_schema()
        written = [role for role, dtype in schema.items() if dtype == pl.String]
        if not table.is_text:  # ids that Parquet has as strings are strings
            written = [role for role in written if role == TIME]
        questions = [
            _written_as(role, dtype) for role in written for dtype in (pl.Int64, pl.Float64)
        ]
        answers = scan.select(pl.len().alias("rows"), *questions).collect(engine="streaming")
    found = answers.row(0, named=True)
    kinds = {role: _kind_of_type(dtype, role) for role, dtype in schema.items()}
    for role in written:
        if found[f"{role} Int64"]:
            kinds[role] = _INTEGER
        elif role == TIME:
            kinds[role] = _NUMBER if found[f"{role} Float64"] else _DATE
    return LogFile(str(path), columns, kinds, found["rows"], separator)


def _scan(table: LogTable, columns: dict[str, str]) -> pl.LazyFrame:
    if table.scan is None:
        raise DataError(
            table.name, "not a file", "Pass CSV, TSV, .inter, JSON lines or Parquet files"
        )
    return table.scan.select(pl.col(column).alias(role) for role, column in columns.items())


def _written_as(role: str, dtype: type[pl.DataType]) -> pl.Expr:
    """Return whether all strings of a column are numbers; ids only as integers are written."""
    text = pl.col(role)
    numbers = text.cast(dtype, strict=False)
    fits = numbers.is_finite() if role == TIME else numbers.cast(pl.String) == text
    return fits.fill_null(text.is_null()).all().alias(f"{role} {dtype.__name__}")


def _kind_of_type(dtype: pl.DataType, role: str) -> str:
    """Return the kind of a column by its type; what is no id or time is refused when it is read."""
    if dtype.is_integer():
        return _INTEGER
    if role == TIME:
        return _DATE if dtype.is_temporal() or dtype == pl.String else _NUMBER
    return _INTEGER if dtype.is_float() else _TEXT


def _common(role: str, files: Sequence[LogFile]) -> str:
    """Return the kind that holds the values of all files."""
    kinds = {file.kinds[role]: file.name for file in reversed(files) if file.rows}
    if not kinds or len(kinds) == 1:
        return next(iter(kinds), _INTEGER)
    if _DATE in kinds:
        other = next(name for kind, name in kinds.items() if kind != _DATE)
        raise DataError(
            f"{kinds[_DATE]}, {other}",
            "times are dates in one, and numbers in the other",
            "Give the times of all files one type",
        )
    return _TEXT if _TEXT in kinds else _NUMBER


def _raw_batches(file: LogFile) -> Iterator[pl.DataFrame]:
    with readable(file.name):
        yield from _scan(file.open(), file.columns).collect_batches(
            chunk_size=_BATCH_ROWS, maintain_order=True
        )


def _typed(batch: pl.DataFrame, file: LogFile, survey: Survey, first_row: int) -> pl.DataFrame:
    """Return a piece of a file in the types of the survey."""
    with readable(file.name):
        numbers = [
            pl.col(role).cast(_DTYPES[file.kinds[role]])
            for role in (USER, ITEM, TIME)
            if batch.schema[role] == pl.String and file.kinds[role] in (_INTEGER, _NUMBER)
        ]
        batch = batch.with_columns(numbers)
        if batch.schema[TIME] == pl.String and not batch[TIME].has_nulls():
            # A piece whose dates are all written as years would pass for numbers.
            batch = batch.with_columns(written_dates(batch[TIME], file.name, file.columns[TIME]))
        batch = as_interactions(batch, file.name, file.columns, first_row=first_row)
        return batch.cast(survey.schema)
