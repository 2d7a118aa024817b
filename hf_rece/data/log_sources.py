"""What a log is read from, files, frames or datasets, and which of its columns are which."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetsError
from datasets.utils import tqdm

from hf_rece.errors import ArgumentError, DataError, HfReceError

USER, ITEM, TIME = "user_id", "item_id", "timestamp"

# How others name the columns; case, "_" and "-" do not count.
CONVENTIONS = {
    USER: ("user_id", "user", "query_id", "session_id", "visitor_id", "reviewer_id"),
    ITEM: ("item_id", "item", "movie_id", "product_id", "track_id", "asin", "parent_asin"),
    TIME: ("timestamp", "datetime", "time", "date", "unix_review_time"),
}
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".inter": "\t"}
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_ENDINGS = ".csv, .tsv, .inter, .jsonl or .parquet"
_TYPE_OF_RECBOLE = re.compile(r":(token|float)(_seq)?$")
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class LogTable:
    """A source that has been opened, but not read.

    Args:
        name: what to call it in messages.
        columns: names of its columns.
        select: reads some of them.
        scan: of files: what reads them piece by piece.
        is_text: whether they are text files, in which integers are strings too.
    """

    name: str
    columns: Sequence[str]
    select: Callable[[list[str]], pl.DataFrame]
    scan: pl.LazyFrame | None = None
    is_text: bool = False

    def read(self, columns: Mapping[str, str]) -> pl.DataFrame:
        """Return columns under other names.

        Args:
            columns: the source's names by the new ones.

        Raises:
            DataError: if the values cannot be read.
        """
        with readable(self.name):
            frame = self.select(list(dict.fromkeys(columns.values())))
        return frame.select(pl.col(column).alias(role) for role, column in columns.items())


def open_log(source: Any, split: str, separator: str | None) -> LogTable:
    """Return what load_interactions reads a log from.

    Args:
        source: one of what load_interactions takes, but no list.
        split: of a Hub dataset or a DatasetDict.
        separator: of the columns of a text file; None for that of its ending.

    Raises:
        ArgumentError: for a split that is not there, or a separator of more than one character.
        DataError: if nothing can be read.
    """
    if separator is not None and len(separator.encode()) != 1:
        raise ArgumentError("separator", separator, "not one character", "Pass such as ';' or '|'")
    if isinstance(source, (str, Path)):
        return _open_path(str(source), split, separator)
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        if split not in source:
            raise ArgumentError("split", split, "no such split", f"Pass one of {', '.join(source)}")
        source = source[split]
    if isinstance(source, (Dataset, IterableDataset)):
        return _open_dataset(source, "the dataset")
    if isinstance(source, (pl.DataFrame, pl.LazyFrame)):
        return _open_frame(source.lazy(), f"the {type(source).__name__}")
    if type(source).__module__.startswith("pandas"):
        names = list(map(str, source.columns))
        return LogTable("the DataFrame", names, lambda columns: pl.from_pandas(source[columns]))
    if hasattr(source, "__arrow_c_stream__"):  # pyarrow, DuckDB and others
        table = pa.table(source)
        return LogTable("the table", table.column_names, lambda columns: _of_arrow(table, columns))
    raise DataError(
        f"source of type {type(source).__name__}",
        "cannot be read as a log",
        "Pass a path, a Hub id, a dataset, or a frame of polars, pandas or pyarrow",
    )


def find_columns(table: LogTable, named: Mapping[str, str | None]) -> dict[str, str]:
    """Return the names of the columns of users, items and times in a table.

    Args:
        table: of the log.
        named: by role (USER, ITEM, TIME) what the caller named; None for what to recognise.

    Raises:
        DataError: for a column that is not there, is not recognised, or could be several.
    """
    if not table.columns:
        raise DataError(table.name, "the log is empty", "Pass a log with at least one interaction")
    found = {role: _candidates(role, name, table.columns) for role, name in named.items()}
    problems, flags = [], []
    for role, columns in found.items():
        if len(columns) != 1:
            word = "time" if role == TIME else role.removesuffix("_id")
            missing = f"there is no column {named[role]!r}" if named[role] else f"no {word} column"
            several = f"{' and '.join(columns)} could each be the {word} column"
            problems.append(several if columns else missing)
            flags.append(f"{word}_column")
    if problems:
        also = ", or pass the file's separator" if len(table.columns) == 1 else ""
        raise DataError(
            table.name,
            f"{'; '.join(problems)}; the columns are {', '.join(table.columns)}",
            f"Name the right one with {', '.join(flags)}{also}",
        )
    return {role: columns[0] for role, columns in found.items()}


def _candidates(role: str, name: str | None, columns: Sequence[str]) -> list[str]:
    """Return the columns that could be meant: the best match, and what matches as well."""
    if name is not None:
        return [c for c in columns if c == name] or [c for c in columns if _untyped(c) == name]
    conventions = {_plain(convention) for convention in CONVENTIONS[role]}
    return (
        [c for c in columns if c == role]
        or [c for c in columns if _plain(c) == _plain(role)]
        or [c for c in columns if _plain(c) in conventions]
    )


def _untyped(column: str) -> str:
    """Return user_id of user_id:token."""
    return _TYPE_OF_RECBOLE.sub("", column)


def _plain(column: str) -> str:
    return _untyped(column).lower().replace("_", "").replace("-", "")


def _open_path(source: str, split: str, separator: str | None) -> LogTable:
    path = Path(source)
    suffix = path.suffix.lower()
    if separator is None:
        separator = _SEPARATORS.get(suffix)
    if separator is not None or suffix in (".parquet", *_JSON_LINES) or path.exists():
        return _open_file(path, separator)
    if source.count("/") > 1 or path.is_absolute():
        raise DataError(
            path.name,
            "not a file that can be read",
            f"Pass {_ENDINGS}, or a Hub dataset id",
        )
    try:
        return _open_dataset(datasets.load_dataset(source, split=split), source)
    except HfReceError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            source,
            f"neither a file nor a Hub dataset that can be read: {error}",
            "Check the path, or the id and split",
        ) from error


def _open_file(path: Path, separator: str | None) -> LogTable:
    if not path.exists() and not glob(str(path), recursive=True):
        raise DataError(path.name, "no such file", "Check the path")
    if path.is_dir():
        if not any(path.rglob("*.parquet")):
            raise DataError(path.name, "no Parquet file is in this folder", "Pass the file itself")
        return _open_frame(pl.scan_parquet(path / "**/*.parquet"), path.name)
    if path.suffix.lower() == ".parquet":
        return _open_frame(pl.scan_parquet(path), path.name)
    if separator is None and path.suffix.lower() in _JSON_LINES:
        with readable(path.name):
            return _open_frame(pl.scan_ndjson(path, infer_schema_length=None), path.name)
    if separator is None:
        raise DataError(path.name, "not a file that can be read", f"Pass {_ENDINGS}")
    # As text: guessing types takes ten times as long, and takes 007 for 7.
    text = _open_frame(pl.scan_csv(path, separator=separator, infer_schema=False), path.name)

    def select(columns: list[str]) -> pl.DataFrame:
        return pl.DataFrame([_integers_if_written_so(values) for values in text.select(columns)])

    return dataclasses.replace(text, select=select, is_text=True)


def _open_frame(frame: pl.LazyFrame, name: str) -> LogTable:
    with readable(name):
        columns = frame.collect_schema().names()
    return LogTable(name, columns, lambda columns: frame.select(columns).collect(), frame)


def _open_dataset(dataset: Dataset | IterableDataset, name: str) -> LogTable:
    """Return a dataset, streamed or not, as a table that is read in batches of Arrow."""

    def select(columns: list[str]) -> pl.DataFrame:
        batches = dataset.select_columns(columns).with_format("arrow").iter(_BATCH_ROWS)
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        parts = [pl.DataFrame(schema=dict.fromkeys(columns, pl.Null))]
        with tqdm(desc="Reading the log", total=rows, unit=" rows", delay=1) as bar:
            for batch in batches:
                parts.append(_of_arrow(batch, columns))
                bar.update(batch.num_rows)
        return pl.concat(parts, how="vertical_relaxed")

    with readable(name):  # a stream may know its columns from its first row alone
        columns = dataset.column_names or list(next(iter(dataset), {}))
    return LogTable(name, columns, select)


def _of_arrow(table: pa.Table, columns: list[str]) -> pl.DataFrame:
    table = table.select(columns)
    table.validate(full=True)  # polars takes all strings for UTF-8
    frame = pl.from_arrow(table)
    return frame if isinstance(frame, pl.DataFrame) else frame.to_frame()


def _integers_if_written_so(values: pl.Series) -> pl.Series:
    numbers = values.cast(pl.Int64, strict=False)
    return numbers if numbers.cast(pl.String).equals(values) else values


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of reading into one message.

    Raises:
        DataError: naming what is read.
    """
    try:
        yield
    except HfReceError:
        raise
    except pl.exceptions.NoDataError as error:
        raise DataError(name, "the file is empty", "Pass a file with a header") from error
    # Polars panics over some damaged Parquet files, and over some columns of pandas says TypeError.
    except (
        pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, DatasetsError,
        TypeError, ValueError, OverflowError,
    ) as error:  # fmt: skip
        raise DataError(
            name,
            f"not a readable table: {error.__cause__ or error}",
            "Save it as UTF-8 CSV, as JSON lines, or as Parquet",
        ) from error
    except OSError as error:
        raise DataError(name, f"cannot be read: {error}", "Check the file") from error
