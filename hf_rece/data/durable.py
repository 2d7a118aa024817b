"""Files that are there whole or not at all, whatever stops the process or the machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hf_rece.errors import DiskFullError

PART = ".part"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when it is complete and on the disk.

    What is written goes to NAME.part, which is flushed to the disk and renamed at the end. An error
    removes it; what a killed process leaves of it, the next writer overwrites.

    Args:
        path: of the file; what was there before stays until the end.

    Raises:
        DiskFullError: if the disk is full.
    """
    part = path.with_name(path.name + PART)
    with clear_disk_errors(path):
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names of the files in a folder to the disk, where the system has a way to."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Say in one message that the disk is full.

    Raises:
        DiskFullError: if it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            path.name,
            f"the disk is full ({error.strerror or error})",
            "Free space and run the same again, which goes on where it stopped",
        ) from error
