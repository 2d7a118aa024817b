"""Files that appear when they are complete."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from hf_rece.errors import HfReceError, WriteError
from hf_rece.files import (
    clear_write_errors,
    complete_files,
    finish_files,
    make_folder,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_at_the_end(tmp_path):
    (tmp_path / "a").write_text("old")
    with complete_files(tmp_path, "config") as part:
        (part / "a").write_text("new")
        (part / "deep").mkdir()
        (part / "deep" / "b").write_text("b")
        (part / "config").write_text("c")
        assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a", "config", "deep"]
    assert ((tmp_path / "a").read_text(), (tmp_path / "deep" / "b").read_text()) == ("new", "b")


def test_files_of_an_earlier_save_go(tmp_path):
    for name in ("model-1.x", "model-2.x", "notes"):
        (tmp_path / name).write_text("old")
    with complete_files(tmp_path, "config", replaced=("model-*.x",)) as part:
        (part / "model-1.x").write_text("new")
        (part / "config").write_text("new")
    assert names(tmp_path) == ["config", "model-1.x", "notes"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with suppress(Killed), complete_files(tmp_path, "a") as part:
        (part / "a").write_text("half")
        raise Killed
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("dies_at", range(1, 10))
def test_whoever_dies_while_files_move_has_written_all(dies_at, tmp_path, monkeypatch):
    for name in ("config", "weights", "items", "old shard"):
        (tmp_path / name).write_text("old")
    steps = iter(range(1, 99))

    def counted(call):
        def counting(*args, **kwargs):
            if next(steps) == dies_at:
                raise Killed
            return call(*args, **kwargs)

        return counting

    stale = {"replaced": ("* shard",)}
    with (
        monkeypatch.context() as patch,
        suppress(Killed),
        complete_files(tmp_path, "config", **stale) as part,
    ):
        for name in ("config", "weights", "items"):
            (part / name).write_text("new")
        for owner, name in ((type(part), "replace"), (type(part), "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(shutil, "rmtree", counted(lambda path, **kwargs: None))
    there = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert "config" not in there or set(there.values()) in ({"old"}, {"new"})
    finish_files(tmp_path, "config", **stale)
    assert names(tmp_path) == ["config", "items", "weights"]
    assert all(path.read_text() == "new" for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_start_together_finish_files_once(tmp_path, monkeypatch):
    def together(text, loads=json.loads):
        time.sleep(max(0, start - time.time()))
        return loads(text)

    monkeypatch.setattr(json, "loads", together)
    for attempt in range(5):
        start = time.time() + 0.1
        folder = tmp_path / str(attempt)
        done = folder / "_finished-config"
        done.mkdir(parents=True)
        (folder / "config").write_text("old")
        wanted = ["config", *(f"{i:03d}" for i in range(100))]
        for name in wanted:
            (done / name).write_text("new")
        (done / "_names.json").write_text(json.dumps(wanted))
        children = [in_child(lambda: finish_files(folder, "config")) for _ in range(4)]  # noqa: B023
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert names(folder) == sorted(wanted)
        assert (folder / "config").read_text() == "new"


def in_child(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    with complete_files(tmp_path, "a") as part:
        left = part
        (part / "a").write_text("")
    left.mkdir()
    (left / "junk").write_text("half")
    with complete_files(tmp_path, "a") as part:
        assert names(part) == []
        (part / "a").write_text("new")
    assert names(tmp_path) == ["a"]


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "two"
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(WriteError, match="Input/output error"):
        write_text(tmp_path / "a", "three")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "two"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("Error in write_index: write error in a.faiss: 10 != 20"),
    ],
)
def test_a_full_disk_has_one_message(error, tmp_path):
    message = r"a: not written \(.*MiB free\)\. Make room"
    with (
        pytest.raises(WriteError, match=message) as caught,
        clear_write_errors(tmp_path / "a"),
    ):
        raise error
    assert isinstance(caught.value, HfReceError)
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("error", [RuntimeError("other"), FileNotFoundError(2, "no")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)), clear_write_errors(tmp_path / "a"):
        raise error


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file: cannot be written"):
        make_folder(tmp_path / "file")
    with (
        pytest.raises(WriteError, match=r"cannot be written \(No such file"),
        complete_files(tmp_path / "no", "a"),
    ):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts disks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


WRITERS = {
    "text": lambda path: path.write_text("x" * 3_000_000),
    "torch": lambda path: torch.save(torch.zeros(1_000_000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(1_000_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_really_full(writer, small_disk):
    (small_disk / "a").write_text("old")
    with pytest.raises(WriteError, match=r"MiB free"), complete_files(small_disk, "a") as part:
        WRITERS[writer](part / "a")
    assert names(small_disk) == ["a"]
    assert (small_disk / "a").read_text() == "old"


def test_a_file_longer_than_the_process_may_write(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(WriteError, match="a: not written"), complete_files(tmp_path, "a") as p:
            WRITERS["safetensors"](p / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == []
