"""From a log larger than memory to sequences on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hf_rece.data.interactions import ITEM, TIME, USER
from hf_rece.data.item_tokenizer import Item, ItemTokenizer
from hf_rece.data.kept import Minima, Stage, find_kept
from hf_rece.data.partition import Advance, Buckets
from hf_rece.data.prepared import (
    DATA,
    MANIFEST,
    UNFINISHED,
    PreparedLog,
    is_prepared,
    open_prepared,
    write_manifest,
)
from hf_rece.data.shards import write_shards
from hf_rece.data.splits import check_quantile, split_protocol
from hf_rece.data.survey import Survey, log_files, survey_log
from hf_rece.errors import ArgumentError, DataError, HfReceError, WriteError
from hf_rece.files import clear_write_errors, complete_file, sync, write_text
from hf_rece.version import __version__

COLUMNS = {USER: "user_column", ITEM: "item_column", TIME: "time_column"}
ROWS_A_SHARD = 1 << 22


def prepare_log(
    source: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    separator: str | None = None,
    min_user_interactions: int = 3,
    min_item_interactions: int = 1,
    split: Literal["leave_one_out", "temporal"] = "leave_one_out",
    quantile: float = 0.95,
    n_shards: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> PreparedLog:
    """Turn a log that need not fit into memory into sequences on disk, filtered and split.

    The sequences are those of load_interactions, k_core_filter, ItemTokenizer.from_interactions and
    leave_one_out_split or temporal_split. Memory: one shard's interactions, a few counts of each
    item, and the tokenizer. Disk, for the time of the work: about the log again.

    Killed at any moment, the same call goes on where it stopped, with the same result. What is
    there is whole: files are written beside their place, flushed and renamed, prepared.json last.
    Called again when finished, it returns what is there. hf_rece.data.prepared describes the files.

    Args:
        source: a CSV, TSV, .inter, JSON lines or Parquet file, a glob, a folder of Parquet files,
            or a list of these.
        output_dir: folder to fill; must be new, empty, or a prepared log.
        user_column: as of load_interactions, and so the next three.
        item_column: see there.
        time_column: see there.
        separator: see there.
        min_user_interactions: as of k_core_filter.
        min_item_interactions: as of k_core_filter.
        split: how test and validation are held out.
        quantile: as of temporal_split.
        n_shards: of each split; raise it to lower memory. None: one for 4 million interactions.
        overwrite: prepare anew what is there, of other files or settings or of the same.
        progress: show bars on stderr.

    Raises:
        ArgumentError: for a minimum, quantile or n_shards out of range.
        DataError: naming the file that cannot be read, or has a missing column, a null or a time
            that is none; if nothing remains for a split, output_dir holds something else, or
            another process is at it.
        WriteError: if the disk is full; what is done stays, and the same call goes on from there.
    """
    _check(split, min_user_interactions, min_item_interactions, quantile, n_shards)
    files, output = log_files(source), Path(output_dir)
    asked_for = {
        "files": [_identity(file) for file in files],
        "user_column": user_column,
        "item_column": item_column,
        "time_column": time_column,
        "separator": separator,
        "min_user_interactions": min_user_interactions,
        "min_item_interactions": min_item_interactions,
        "split": split,
        "quantile": quantile if split == "temporal" else None,
        "n_shards": n_shards,
    }
    _check_output(output, asked_for, overwrite)
    with _alone(output), clear_write_errors(output):
        if overwrite or not (output / MANIFEST).exists() or _asked_for(output) != asked_for:
            _begin(output, asked_for)
            try:
                with _shown(progress) as stage:
                    _prepare(output, files, asked_for, stage)
            except WriteError:
                raise  # what is done stays
            except HfReceError:
                _clear(output)
                raise
        shutil.rmtree(output / UNFINISHED)
        return open_prepared(output)


def save_tokenizer(folder: Path, items: list[Item]) -> ItemTokenizer:
    """Save the tokenizer of a prepared log.

    Args:
        folder: of the prepared log.
        items: in order of token id.

    Raises:
        WriteError: as complete_file.
    """
    tokenizer = ItemTokenizer(items=items)
    with TemporaryDirectory(dir=folder) as beside:
        tokenizer.save_pretrained(beside)
        for path in Path(beside).iterdir():
            with complete_file(folder / path.name) as file:
                file.write(path.read_bytes())
    return tokenizer


def _prepare(output: Path, files: list[Path], asked_for: dict[str, Any], stage: Stage) -> None:
    survey = _survey(output, files, asked_for, stage)
    buckets = Buckets(
        output / UNFINISHED,
        survey,
        asked_for["n_shards"] or -(-survey.rows // ROWS_A_SHARD),
        keep_times=asked_for["quantile"] is not None,
    )
    if not buckets.grouped:
        with stage("reading", buckets.survey.rows) as advance:
            buckets.deal(advance)
        with stage("grouping by user", buckets.n_buckets) as advance:
            buckets.group(advance)
    buckets.clear_parts()
    minima = Minima(asked_for["min_user_interactions"], asked_for["min_item_interactions"])
    kept = find_kept(buckets, minima, asked_for["quantile"], stage)
    (output / DATA).mkdir(exist_ok=True)
    with stage("writing", buckets.n_buckets) as advance:
        write_shards(output, buckets, kept, minima.user, advance)
    write_manifest(
        output,
        buckets.n_buckets,
        protocol=split_protocol(asked_for["quantile"]),
        users=kept.users,
        tokenizer=save_tokenizer(output, buckets.items[kept.by_popularity].to_list()),
        interactions=kept.interactions,
        asked_for=asked_for,
    )


def _check(split: str, min_user: int, min_item: int, quantile: float, n_shards: int | None) -> None:
    if split not in ("leave_one_out", "temporal"):
        raise ArgumentError("split", split, "no such split", "Pass leave_one_out or temporal")
    for name, minimum in (("user", min_user), ("item", min_item)):
        if minimum < 0:
            name = f"min_{name}_interactions"
            raise ArgumentError(name, minimum, "negative", "Pass 0 to keep all")
    check_quantile(quantile)
    if n_shards is not None and not 1 <= n_shards < 100_000:
        raise ArgumentError("n_shards", n_shards, "out of range", "Pass 1 to 99,999, or None")


def _identity(file: Path) -> dict[str, Any]:
    """Return what tells whether a file has changed."""
    facts = file.stat()
    return {"file": file.name, "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}


def _asked_for(output: Path) -> Any:
    return open_prepared(output).manifest["asked_for"]


def _check_output(output: Path, asked_for: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds anything else.

    Raises:
        DataError: if it does.
    """
    if output.exists() and not is_prepared(output) and (output.is_file() or any(output.iterdir())):
        raise DataError(str(output), "not empty, and not a prepared log", "Pass another output_dir")
    if overwrite or not (output / MANIFEST).exists():
        return
    before = _asked_for(output)
    other = [name for name, value in asked_for.items() if before.get(name) != value]
    if other:
        raise DataError(
            str(output),
            f"holds a log prepared with other {', '.join(other)}",
            "Pass another output_dir, or overwrite to replace it",
        )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes out of a folder.

    Raises:
        DataError: if one is at it.
    """
    (output / UNFINISHED).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / UNFINISHED / "lock", timeout=0):
            yield
    except Timeout:
        raise DataError(
            str(output),
            "another process is preparing it",
            "Wait for it, or pass another output_dir",
        ) from None


def _begin(output: Path, asked_for: dict[str, Any]) -> None:
    """Leave in a folder only what the same call has left."""
    path = output / UNFINISHED / "asked_for.json"
    text = json.dumps({"made_by": f"hf_rece {__version__}", **asked_for})
    if path.exists() and path.read_text("utf-8") == text and not (output / MANIFEST).exists():
        return
    path.unlink(missing_ok=True)
    _remove_outputs(output)
    for left in (output / UNFINISHED).iterdir():
        if left.name != "lock":
            left.unlink()
    sync(output / UNFINISHED)
    write_text(path, text)


def _clear(output: Path) -> None:
    """Remove what a call that cannot succeed has made."""
    _remove_outputs(output)
    shutil.rmtree(output / UNFINISHED)
    if not any(output.iterdir()):
        output.rmdir()


def _remove_outputs(output: Path) -> None:
    for name in (MANIFEST, "items.json", "tokenizer_config.json"):  # what says it is good first
        (output / name).unlink(missing_ok=True)
    sync(output)
    if (output / DATA).exists():
        shutil.rmtree(output / DATA)


def _survey(output: Path, files: list[Path], asked_for: dict[str, Any], stage: Stage) -> Survey:
    """Return the survey of the log, from the working folder if there is one."""
    path = output / UNFINISHED / "survey.json"
    if path.exists():
        return Survey.from_dict(json.loads(path.read_text("utf-8")))
    named = {role: asked_for[name] for role, name in COLUMNS.items()}
    with stage("looking at files", len(files)) as advance:
        survey = survey_log(files, named, asked_for["separator"], advance)
    write_text(path, json.dumps(survey.to_dict()))
    return survey


@contextmanager
def _shown(shown: bool) -> Iterator[Stage]:
    """Show a bar on stderr for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown
    ) as bars:

        @contextmanager
        def stage(name: str, total: int) -> Iterator[Advance]:
            task = bars.add_task(name, total=total)
            yield lambda n: bars.advance(task, n)

        yield stage
