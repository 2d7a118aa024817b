"""Files of safetensors with whole tensors, written and read by rows."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rece.errors import DataError, WriteError
from hf_rece.models import sharded_checkpoint
from hf_rece.models.sharded_checkpoint import ConsolidatedReader, write_consolidated
from hf_rece.ops.shards import VocabShards, shard_classes
from tests.processes import in_processes


def tensors():
    table = torch.arange(33, dtype=torch.float32).view(11, 3)
    whole = {
        "one": torch.tensor(3, dtype=torch.uint8), "half": torch.ones(5, dtype=torch.bfloat16),
        "ids": torch.arange(4).view(2, 2), "empty": torch.zeros(0, 3), "mask": table[0] > 1,
    }  # fmt: skip
    return whole, {"table": table, "bias": table[:, 0].half(), "second": table + 1}


def write(rank, path):
    sharded_checkpoint._PIECE_BYTES = 24  # two rows
    shards = shard_classes(11)
    whole, by_rows = tensors()
    own = {name: rows[shards.first : shards.stop] for name, rows in by_rows.items()}
    write_consolidated(path, whole if rank == 0 else {}, own, shards, {"format": "pt"})
    return path.exists()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_file_is_as_safetensors_writes_it(world_size, tmp_path):
    path = tmp_path / "model.safetensors"
    assert in_processes(write, world_size, path) == [True] * world_size
    whole, by_rows = tensors()
    loaded = load_file(path)
    assert set(loaded) == {*whole, *by_rows}
    for name, tensor in {**whole, **by_rows}.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_rows_are_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_checkpoint, "_PIECE_BYTES", 24)
    whole, by_rows = tensors()
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, content in zip(files, (whole, by_rows), strict=True):
        save_file(content, file)
    with ConsolidatedReader("here", files) as reader:
        for rank in range(3):
            shards = VocabShards(11, rank, 3)
            own = torch.empty(shards.n_local, 3)
            reader.read_into(own, "table", shards)
            assert torch.equal(own, by_rows["table"][shards.first : shards.stop])
        one = torch.zeros((), dtype=torch.uint8)
        reader.read_into(one, "one")
        assert one == 3
        with pytest.raises(DataError, match="here: there is no other"):
            reader.read_into(one, "other")
        with pytest.raises(DataError, match=r"table has shape \[11, 3\].*wants \[12, 3\]"):
            reader.read_into(torch.empty(6, 3), "table", VocabShards(12, 0, 2))


def test_a_full_disk_leaves_the_file_that_is_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"model\.safetensors: not written \(No space left"):
        write_consolidated(path, tensors()[0], {}, VocabShards(11, 0, 1))
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
