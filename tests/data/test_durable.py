"""Files that are whole or not there."""

import errno

import pytest

from hf_rece.data.durable import whole_file
from hf_rece.errors import DiskFullError


def test_a_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with whole_file(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / "file.part").write_bytes(b"a half-written and rather long file")
    with whole_file(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "forbidden", "interrupted"],
)
def test_an_error_leaves_what_was_there(tmp_path, error, raised):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write_half():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(raised):
        write_half()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
