"""A log larger than memory dealt by user into buckets that fit, and each bucket into histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from hf_rece.data.interactions import ITEM, TIME, USER, by_user_and_time
from hf_rece.data.survey import LogFile, Survey, read_batches
from hf_rece.files import complete_file

_UNIT_ROWS = 1 << 22  # files are read in units of so many interactions: what a stop may cost
_CHUNK_ROWS = 1 << 21  # interactions that are dealt at once
_COMPRESSED = ipc.IpcWriteOptions(compression="lz4")
TIMES, CODES = "timestamps", "item_codes"
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Buckets:
    """The interactions of a log dealt by user into files of a working folder.

    Each step writes whole files, and leaves out those that are there.

    Args:
        folder: where the files are.
        survey: of the log.
        n_buckets: buckets; the users of one are held in memory at once.
        keep_times: keep the times of histories, which a temporal split asks for.
    """

    folder: Path
    survey: Survey
    n_buckets: int
    keep_times: bool

    def deal(self, advance: Advance) -> None:
        """Read the log and deal its interactions to buckets, in the order of the log.

        A file of Arrow holds a unit: record batches of bucket 0, 1, ... of its first chunk, then of
        its second, and so on. Another one holds the unit's distinct items.

        Args:
            advance: told how many interactions have been dealt.

        Raises:
            DataError: as read_batches.
            WriteError: as complete_file.
        """
        for unit, part in zip(self._units, self._parts, strict=True):
            if part.exists():
                advance(sum(file.rows for file in unit))
            else:
                self._deal_unit(unit, part, advance)

    def group(self, advance: Advance) -> None:
        """Sort each bucket by user and time, and write its histories, a row a user.

        Columns: user_id, item_codes (lists), and timestamps (lists) if they are kept.

        Args:
            advance: told 1 for each bucket.

        Raises:
            WriteError: as complete_file.
        """
        for bucket in range(self.n_buckets):
            path = self._histories(bucket)
            if not path.exists():
                _write(path, self._grouped(bucket))
            advance(1)

    def clear_parts(self) -> None:
        """Remove what group has read."""
        for part in self._parts:
            part.unlink(missing_ok=True)
            _items_of(part).unlink(missing_ok=True)

    @property
    def grouped(self) -> bool:
        """Whether the histories of all buckets are there."""
        return all(self._histories(bucket).exists() for bucket in range(self.n_buckets))

    @cached_property
    def items(self) -> pl.Series:
        """The items of the log in ascending order: the code of an item is its place in them."""
        path = self.folder / "items.arrow"
        if not path.exists():
            parts = [pl.DataFrame(_read(_items_of(part), [ITEM])) for part in self._parts]
            _write(path, _arrow(pl.concat(parts).unique().sort(ITEM)))
        return pl.DataFrame(_read(path, [ITEM]))[ITEM]

    def read(self, bucket: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of the histories of a bucket."""
        return _read(self._histories(bucket), columns)

    @property
    def _units(self) -> list[list[LogFile]]:
        units: list[list[LogFile]] = [[]]
        for file in self.survey.files:
            if units[-1] and sum(f.rows for f in units[-1]) + file.rows > _UNIT_ROWS:
                units.append([])
            units[-1].append(file)
        return units

    @property
    def _parts(self) -> list[Path]:
        return [self.folder / f"part-{i:05d}.arrow" for i in range(len(self._units))]

    def _histories(self, bucket: int) -> Path:
        return self.folder / f"bucket-{bucket:05d}.arrow"

    def _deal_unit(self, unit: Sequence[LogFile], part: Path, advance: Advance) -> None:
        items = pl.DataFrame(schema={ITEM: self.survey.schema[ITEM]})
        schema = _arrow(pl.DataFrame(schema=self.survey.schema)).schema
        with complete_file(part) as file, ipc.new_file(file, schema, options=_COMPRESSED) as writer:
            for chunk in self._chunks(unit):
                buckets = shard_of_users(chunk[USER], self.n_buckets)
                order = np.argsort(buckets, kind="stable")
                bounds = np.searchsorted(buckets[order], np.arange(self.n_buckets + 1))
                batch = _arrow(chunk[order]).combine_chunks().to_batches()[0]
                for first, end in pairwise(bounds):
                    writer.write_batch(batch.slice(first, end - first))
                items = pl.concat([items, chunk.select(ITEM).unique()]).unique()
                advance(len(chunk))
            _write(_items_of(part), _arrow(items))

    def _chunks(self, unit: Sequence[LogFile]) -> Iterator[pl.DataFrame]:
        waiting: list[pl.DataFrame] = []
        for file in unit:
            for batch in read_batches(file, self.survey):
                waiting.append(batch)
                if sum(map(len, waiting)) >= _CHUNK_ROWS:
                    yield pl.concat(waiting)
                    waiting = []
        rest = pl.concat(waiting) if waiting else pl.DataFrame()
        if len(rest):
            yield rest

    def _grouped(self, bucket: int) -> pa.Table:
        rows = by_user_and_time(self._dealt(bucket))
        codes = self._codes(rows[ITEM])
        is_first = (rows[USER] != rows[USER].shift()).fill_null(True)
        first = is_first.arg_true().to_numpy()
        bounds = np.append(first, len(rows)).astype(np.int32)
        columns = {
            USER: _arrow(rows[first].select(USER))[USER],
            CODES: pa.ListArray.from_arrays(bounds, codes),
        }
        if self.keep_times:
            columns[TIMES] = pa.ListArray.from_arrays(bounds, rows[TIME].to_numpy())
        return pa.table(columns)

    def _dealt(self, bucket: int) -> pl.DataFrame:
        """Return the interactions of a bucket in the order of the log."""
        batches = []
        for part in self._parts:
            with pa.OSFile(str(part)) as file:
                reader = ipc.open_file(file)
                places = range(bucket, reader.num_record_batches, self.n_buckets)
                batches += [reader.get_batch(place) for place in places]
        empty = pl.DataFrame(schema=self.survey.schema)
        return pl.concat([empty, *map(pl.DataFrame, batches)])

    def _codes(self, items: pl.Series) -> NDArray[np.int32]:
        known = pl.DataFrame({ITEM: self.items}).with_row_index("code")
        codes = items.to_frame().join(known, on=ITEM, how="left", maintain_order="left")["code"]
        return codes.to_numpy().astype(np.int32)


def shard_of_users(users: pl.Series, n_shards: int) -> NDArray[np.int64]:
    """Return the shard of each user: CRC-32 of the id modulo n_shards.

    Of the id in UTF-8, integers in digits: the same everywhere, and a function that Spark has too.
    """
    written = users.cast(pl.String).cast(pl.Binary).to_list()
    return np.fromiter(map(crc32, written), np.int64, len(users)) % n_shards


def _items_of(part: Path) -> Path:
    return part.with_suffix(".items.arrow")


def _write(path: Path, table: pa.Table) -> None:
    with (
        complete_file(path) as file,
        ipc.new_file(file, table.schema, options=_COMPRESSED) as writer,
    ):
        writer.write_table(table)


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    """Return columns of a file; what is not mapped is not resident when it has been used."""
    with pa.OSFile(str(path)) as file:
        places = [ipc.open_file(file).schema.get_field_index(name) for name in columns]
        return ipc.open_file(file, options=ipc.IpcReadOptions(included_fields=places)).read_all()


def _arrow(frame: pl.DataFrame) -> pa.Table:
    """Return a table with strings as older readers know them."""
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
