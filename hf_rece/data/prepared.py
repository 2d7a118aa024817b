"""A prepared log: sequences in shards on disk, their tokenizer, and what they were made of.

    prepared/
      data/train-00000-of-00032.parquet        user_id, item_ids
      data/validation-00000-of-00032.parquet   user_id, item_ids, target_id
      data/test-00000-of-00032.parquet         user_id, item_ids, target_id
      items.json, tokenizer_config.json        the ItemTokenizer; item_ids are its token ids
      prepared.json                            written last: a folder without it is unfinished

user_id is int64 or string, item_ids list<int32> in order of time, target_id int32: the columns of
leave_one_out_split. The shard of a user is CRC-32 of the id (in UTF-8; integers in digits) modulo
the number of shards; in a shard, users are in ascending order. datasets.load_dataset("parquet",
data_files="prepared/data/train-*") reads them too.

prepared.json: format (1); description (protocol and facts of the log, for model cards); users,
items, interactions; splits (by name: rows, interactions, and shards: file, rows, bytes, sha256);
asked_for (files and settings).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from hf_rece.data.interactions import USER
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import HISTORY, TARGET
from hf_rece.errors import ArgumentError, DataError, HfReceError
from hf_rece.files import write_text

MANIFEST, UNFINISHED, DATA = "prepared.json", "unfinished", "data"
SPLITS = ("train", "validation", "test")
FORMAT = 1
# What prepared.json holds, and of which type.
_MANIFEST = {
    "description": str, "users": int, "items": int, "interactions": int, "splits": dict,
    "asked_for": dict,
}  # fmt: skip
_SPLIT = {"rows": int, "interactions": int, "shards": list}
_SHARD = {"file": str, "rows": int, "bytes": int, "sha256": str}
_TYPES = {HISTORY: pa.list_(pa.int32()), TARGET: pa.int32()}
_AGAIN, _ANEW = "Run hf-rece prepare again", "Copy it again, or prepare it again with overwrite"
Row = dict[str, Any]


@dataclass(frozen=True)
class PreparedLog:
    """What prepare_log made, opened.

    Args:
        path: the folder.
        manifest: what prepared.json holds.
    """

    path: Path
    manifest: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> ItemTokenizer:
        """The tokenizer of its items.

        Raises:
            DataError: if its files are damaged.
        """
        try:
            tokenizer: ItemTokenizer = ItemTokenizer.from_pretrained(str(self.path))
        except HfReceError:
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError("tokenizer_config.json", f"cannot be read ({error})", _ANEW) from error
        return tokenizer

    @property
    def description(self) -> str:
        """How it was split, and what identifies the log."""
        return str(self.manifest["description"])

    def split(self, name: str) -> PreparedSplit:
        """Return the rows of a split.

        Raises:
            ArgumentError: for a name other than train, validation and test.
            DataError: for a shard that is missing, cut short or no Parquet file.
        """
        if name not in SPLITS:
            raise ArgumentError("name", name, "no such split", f"Pass one of {', '.join(SPLITS)}")
        shards = self.manifest["splits"][name]["shards"]
        groups = [group for shard in shards for group in _row_groups(self.path, shard)]
        return PreparedSplit(groups, self.description)

    def check(self) -> None:
        """Read all shards, and compare them with what was written.

        Raises:
            DataError: naming a shard that differs.
        """
        for split in SPLITS:
            for shard in self.manifest["splits"][split]["shards"]:
                path = _shard(self.path, shard)
                if sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
                    raise DataError(shard["file"], "not what was written", _ANEW)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a shard that are read at once.

    Args:
        path: of the shard.
        index: of the row group in it.
        rows: how many of it, from its first.
    """

    path: Path
    index: int
    rows: int

    def read(self) -> pa.Table:
        """Return its rows.

        Raises:
            DataError: if they cannot be read.
        """
        try:
            group = pq.ParquetFile(self.path).read_row_group(self.index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(self.path.name, f"cannot be read: {error}", _ANEW) from error
        return group[: self.rows]


class PreparedSplit(TorchDataset[Row]):
    """The rows of a split as a dataset of torch, of which one row group is in memory.

    Rows are those of leave_one_out_split; item_ids are arrays. Read them in order, or nearly:
    another row group is read whenever a row is not in the one before.

    Args:
        groups: row groups in order.
        description: as of PreparedLog.
    """

    def __init__(self, groups: Sequence[RowGroup], description: str) -> None:
        self.groups, self.description = list(groups), description
        self._ends = np.cumsum([0, *(group.rows for group in self.groups)])[1:]
        self._now: tuple[int, Rows] | None = None

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        if self._now is None or self._now[0] != place:
            self._now = place, Rows(self.groups[place].read())
        return self._now[1][index - int(self._ends[place]) + self.groups[place].rows]

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def info(self) -> DatasetInfo:
        """What datasets.Dataset has under this name: the description."""
        return DatasetInfo(description=self.description)

    @cached_property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(pq.read_schema(self.groups[0].path).names) if self.groups else []

    def head(self, n: int) -> PreparedSplit:
        """Return the first n rows: a fair sample of the users, for shards are by a hash."""
        rows = np.diff(np.minimum(self._ends, n), prepend=0)
        groups = [replace(group, rows=int(r)) for group, r in zip(self.groups, rows, strict=True)]
        return PreparedSplit([group for group in groups if group.rows], self.description)

    def histories(self) -> Iterator[pa.ListArray]:
        """Yield the histories, those of a row group at a time."""
        for group in self.groups:
            yield group.read()[HISTORY].combine_chunks()

    def in_memory(self) -> Dataset:
        """Return the rows as a datasets.Dataset, all of them in memory."""
        return Dataset(pa.concat_tables(group.read() for group in self.groups), info=self.info)


class Rows:
    """A table of histories whose rows are quick to get.

    Args:
        table: user_id, item_ids and perhaps target_id.
    """

    def __init__(self, table: pa.Table) -> None:
        self._users = table[USER].to_pylist()
        histories = table[HISTORY].combine_chunks()
        self._ends = histories.offsets.to_numpy()
        self._items: NDArray[np.int32] = histories.values.to_numpy()
        self._targets = table[TARGET].to_pylist() if TARGET in table.column_names else None

    def __getitem__(self, index: int) -> Row:
        row = {
            USER: self._users[index],
            HISTORY: self._items[self._ends[index] : self._ends[index + 1]],
        }
        return row if self._targets is None else {**row, TARGET: self._targets[index]}


def is_prepared(folder: str | Path) -> bool:
    """Return whether a folder holds a prepared log, finished or not."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, UNFINISHED))


def open_prepared(folder: str | Path) -> PreparedLog:
    """Open what prepare_log made.

    Raises:
        DataError: if the folder holds no prepared log, or one that is unfinished, damaged or of
            another format, or that names files elsewhere.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        unfinished = (Path(folder) / UNFINISHED).exists()
        raise DataError(
            str(folder),
            "its preparation has not finished" if unfinished else f"there is no {MANIFEST} in it",
            f"{_AGAIN}, which goes on where it stopped" if unfinished else "Pass what it made",
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(path.name, f"damaged or cut short ({error})", _ANEW) from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DataError(path.name, "not the manifest of a prepared log", _ANEW)
    if manifest["format"] != FORMAT:
        raise DataError(
            path.name,
            f"format {manifest['format']}, and this version reads {FORMAT}",
            "Install the version of hf_rece that made it, or prepare the log again",
        )
    problem = _problem_of(manifest)
    if problem is not None:
        raise DataError(path.name, f"damaged, or written by hand: {problem}", _ANEW)
    return PreparedLog(Path(folder), manifest)


def _problem_of(manifest: Mapping[str, Any]) -> str | None:
    """Return what a manifest lacks, or which file elsewhere it names; None if it is sound."""
    parts = [("it", manifest, _MANIFEST)]
    for name in SPLITS:
        split = _inside(manifest, "splits", name)
        parts.append((name, split, _SPLIT))
        shards = _inside(split, "shards")
        if isinstance(shards, list):
            parts += [(f"a shard of {name}", shard, _SHARD) for shard in shards]
    for name, part, kinds in parts:
        wrong = [key for key, kind in kinds.items() if not isinstance(_inside(part, key), kind)]
        if wrong:
            return f"{name} has no usable {', '.join(wrong)}"
        file = part.get("file", "a")
        if Path(file).name != file or "\0" in file:
            return f"{name} is a file elsewhere ({file!r})"
    return None


def _inside(value: Any, *keys: str) -> Any:
    """Return what nested dictionaries hold under some keys, None if there is no such place."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def shard_path(folder: Path, split: str, index: int, n_shards: int) -> Path:
    """Return where a shard of a split is."""
    return folder / DATA / f"{split}-{index:05d}-of-{n_shards:05d}.parquet"


def write_manifest(
    folder: Path,
    n_shards: int,
    *,
    protocol: str,
    users: int,
    tokenizer: ItemTokenizer,
    interactions: int,
    asked_for: Mapping[str, Any],
) -> PreparedLog:
    """Finish a prepared log: write prepared.json over the shards that are there.

    Args:
        folder: with all shards and the tokenizer's files.
        n_shards: of each split.
        protocol: how the log was split, in words.
        users: whose interactions were kept.
        tokenizer: of the items that were kept.
        interactions: that were kept.
        asked_for: what to compare with before the log is prepared there once more.

    Raises:
        DataError: if a split has no row, or a shard is missing or cut short.
    """
    splits = {
        name: _facts([shard_path(folder, name, i, n_shards) for i in range(n_shards)])
        for name in SPLITS
    }
    for name in ("train", "test"):
        if splits[name]["rows"] == 0:
            raise DataError(
                "the log",
                f"the {protocol.partition(',')[0]} leaves no sequence for {name}",
                "Pass a log whose users have three interactions or more (and a lower quantile "
                "for the temporal split)",
            )
    shards = [shard["sha256"] for split in splits.values() for shard in split["shards"]]
    facts = (
        f"a log of {users:,} users, {len(tokenizer.items):,} items and {interactions:,} "
        f"interactions, SHA-256 of its shards {sha256(''.join(shards).encode()).hexdigest()}"
    )
    manifest = {
        "format": FORMAT,
        "description": f"{protocol}; {facts}",
        "users": users,
        "items": len(tokenizer.items),
        "interactions": interactions,
        "splits": splits,
        "asked_for": dict(asked_for),
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return PreparedLog(folder, manifest)


def _facts(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what prepared.json says of a split."""
    shards, interactions = [], 0
    for path in paths:
        content = path.read_bytes()
        metadata = pq.read_metadata(pa.BufferReader(content))
        column = metadata.schema.names.index("element")
        interactions += sum(
            metadata.row_group(i).column(column).num_values for i in range(metadata.num_row_groups)
        )
        shards.append(
            {
                "file": path.name,
                "rows": metadata.num_rows,
                "bytes": len(content),
                "sha256": sha256(content).hexdigest(),
            }
        )
    rows = sum(shard["rows"] for shard in shards)
    return {"rows": rows, "interactions": interactions, "shards": shards}


def _shard(folder: Path, shard: Mapping[str, Any]) -> Path:
    """Return the path of a shard.

    Raises:
        DataError: if it is missing, or not as long as it was.
    """
    path = folder / DATA / str(shard["file"])
    size = path.stat().st_size if path.exists() else None
    if size != shard["bytes"]:
        problem = "missing" if size is None else f"{size} bytes of {shard['bytes']}"
        raise DataError(path.name, problem, _ANEW)
    return path


def _row_groups(folder: Path, shard: Mapping[str, Any]) -> list[RowGroup]:
    path = _shard(folder, shard)
    try:
        metadata = pq.read_metadata(path)
        columns = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise DataError(path.name, f"not a Parquet file: {error}", _ANEW) from error
    if metadata.num_rows != shard["rows"] or not {USER, HISTORY} <= set(columns.names):
        raise DataError(path.name, f"other rows or columns than {MANIFEST} says", _ANEW)
    for name in _TYPES.keys() & set(columns.names):
        kind = columns.field(name).type
        if kind != _TYPES[name]:
            raise DataError(path.name, f"{name} holds {kind}, not {_TYPES[name]}", _ANEW)
    groups = [
        RowGroup(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)
    ]
    return [group for group in groups if group.rows]
