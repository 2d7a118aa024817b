"""Files that appear when they are complete, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import BinaryIO

from filelock import FileLock
from safetensors import SafetensorError

from hf_rece.errors import DataError, WriteError

# What starts by "_" is left out of what Trainer uploads.
UNFINISHED, FINISHED = "_unfinished", "_finished"
_NAMES = "_names.json"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# safetensors and faiss write through libraries that know no errno; torch tells no reason at all.
_SIGNS = (*(f"os error {number}" for number in _NO_ROOM), "inline_container", "write error")


@contextmanager
def complete_files(
    folder: str | Path, last: str, *, replaced: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder; the files written there move into `folder` at the end, together.

    Until the end nothing in `folder` changes, and nothing does if the body raises or the process is
    killed. A process that is killed while files move, by a power cut too, has written all of them:
    finish_files moves the rest. Until then there is no file called `last`, by which they are found.

    Args:
        folder: an existing one.
        last: name of the file that makes the others count.
        replaced: patterns (fnmatch) of files that go if no new file has their name.

    Raises:
        WriteError: if the disk is full or the folder cannot be written.
        DataError: as finish_files.
    """
    folder = Path(folder)
    part = folder / f"{UNFINISHED}-{last}"
    with clear_write_errors(folder / last):
        try:
            finish_files(folder, last, replaced=replaced)
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            make_folder(part, parents=False)
            yield part
            names = [str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()]
            (part / _NAMES).write_text(json.dumps(names), "utf-8")
            sync_files(part)
            part.rename(folder / f"{FINISHED}-{last}")
            finish_files(folder, last, replaced=replaced)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def finish_files(folder: str | Path, last: str, *, replaced: Sequence[str] = ()) -> None:
    """Move the files that a killed process had written and begun to move; mostly there are none.

    Processes that start together may all call it: one moves, the others wait for it.

    Args:
        folder: as complete_files takes it, and so on.
        last: see there.
        replaced: see there.

    Raises:
        DataError: if what is there was not left by complete_files: it would move files elsewhere.
    """
    folder = Path(folder)
    done = folder / f"{FINISHED}-{last}"
    # The cache of the Hub stores files as links, and no process of ours has been killed in it.
    if not done.exists() or done.is_symlink() or (done / _NAMES).is_symlink():
        return
    with suppress(FileNotFoundError), FileLock(done / "_lock"):  # who waited finds nothing left
        if (done / _NAMES).is_file():
            _move_all(done, folder, last, replaced)
        shutil.rmtree(done)


def _move_all(done: Path, folder: Path, last: str, replaced: Sequence[str]) -> None:
    names = _names_of(done / _NAMES)
    left = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    names_left = [name for name in sorted(names, key=lambda name: name == last) if name in left]
    for name in names_left:
        parents = list(PurePath(name).parents)[:-1]
        if (folder / name).is_dir() or any((folder / parent).is_symlink() for parent in parents):
            raise _not_ours(done, f"{name!r} would be moved elsewhere")
    if len(names) > 1 and last in names_left:
        (folder / last).unlink(missing_ok=True)
    for path in folder.iterdir():
        stale = path.name not in names and any(fnmatch(path.name, each) for each in replaced)
        if stale and path.is_file():
            path.unlink()
    for name in names_left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).replace(folder / name)
    sync(folder)


def _names_of(path: Path) -> list[str]:
    """Return the names of files that complete_files wrote down.

    Raises:
        DataError: for what is no list of names within a folder.
    """
    try:
        names = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _not_ours(path.parent, f"{path.name} is no list of names")
    for name in map(PurePath, names):
        if name.is_absolute() or ".." in name.parts or not name.parts:
            raise _not_ours(path.parent, f"{path.name} names a file elsewhere, {str(name)!r}")
    return names


def _not_ours(done: Path, problem: str) -> DataError:
    return DataError(str(done), problem, "Delete it if you trust the rest of the folder")


@contextmanager
def complete_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears, or replaces what is there, when it is complete.

    What a killed process leaves beside it, the next writer of the same file overwrites.

    Raises:
        WriteError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{UNFINISHED}-{path.name}")
    with clear_write_errors(path):
        try:
            with part.open("wb") as file:
                yield file
            sync(part)
            part.replace(path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8 that appears, or replaces what is there, when it is complete.

    Raises:
        WriteError: as complete_file.
    """
    with complete_file(path) as file:
        file.write(text.encode())


def sync_files(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def clear_write_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk, in the words of whichever library met it, into one message.

    Args:
        path: what is written.

    Raises:
        WriteError: in place of errors of the file system; other errors pass.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _NO_ROOM and not any(
            sign in str(error) for sign in _SIGNS
        ):
            raise
        raise _write_error(path, error) from error


def _write_error(path: str | Path, error: Exception) -> WriteError:
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).strip().splitlines()[0][-100:]
    there = next(each for each in Path(path).absolute().parents if each.exists())
    free = shutil.disk_usage(there).free / 2**20
    return WriteError(
        path,
        f"not written ({reason}; {free:,.1f} MiB free)",
        "Make room or pass another folder; what was there before is as it was",
    )


def make_folder(path: str | Path, *, parents: bool = True) -> Path:
    """Make a folder, unless it is there, and return it.

    Raises:
        WriteError: if it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise WriteError(path, f"cannot be written ({error.strerror})", "Check the path") from None
    return path
