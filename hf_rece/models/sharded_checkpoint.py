"""Rows that are cut over processes, in ordinary files of safetensors, where they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from hf_rece.embeddings.sharded import ShardedLayer
from hf_rece.errors import DataError
from hf_rece.files import complete_file
from hf_rece.models.sparse_checkpoint import SparseCheckpoints
from hf_rece.ops import messages
from hf_rece.ops.shards import VocabShards

# Rows that the first process holds of another's, and writes, at once.
_PIECE_BYTES = 64 * 2**20
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_consolidated(
    path: str | Path,
    whole: Mapping[str, Tensor],
    sharded: Mapping[str, Tensor],
    shards: VocabShards,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in which every tensor is whole. Collective; the first one writes.

    Of several groups that hold all rows each, the first one sends them. No process holds more of a
    sharded tensor than its own rows and a piece of another's. The file is there at once, or not at
    all.

    Args:
        path: of the file.
        whole: tensors by name, the same in every process.
        sharded: this process's rows (n_local, ...) by name, in the same order in every process.
        shards: how the rows are cut.
        metadata: of the file.

    Raises:
        WriteError: in the process that writes, if the disk is full.

    Reference:
        The format of safetensors: the length of the header, the header as JSON, the tensors.
    """
    # Aligned: the widest numbers first. Sharded tensors are sent in the order of the file.
    tensors = dict(sorted({**whole, **sharded}.items(), key=lambda item: -item[1].element_size()))
    if not shards.is_main:
        for name in [name for name in tensors if name in sharded and not shards.data_rank]:
            for piece in _pieces(sharded[name]):
                messages.send(piece, 0, shards.group)
    else:
        with complete_file(path) as file:
            _write_header(file, tensors, sharded, shards, metadata)
            for name, tensor in tensors.items():
                for piece in _pieces(tensor) if tensor.dim() else (tensor.detach(),):
                    _write(file, piece)
                for rank in range(1, shards.world_size) if name in sharded else ():
                    for piece in _pieces(tensor, shards.sizes[rank]):
                        messages.receive(piece, rank, shards.group)
                        _write(file, piece)
    shards.wait_for_all()  # all may read the file now


def _write_header(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    sharded: Mapping[str, Tensor],
    shards: VocabShards,
    metadata: Mapping[str, str] | None,
) -> None:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if name in sharded:
            shape[0] = shards.n_classes
        start, end = end, end + torch.Size(shape).numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _pieces(rows: Tensor, n_rows: int | None = None) -> Iterator[Tensor]:
    """Yield rows piece by piece; with n_rows, empty pieces of as many rows of another process."""
    step = max(1, _PIECE_BYTES // max(1, rows[:1].numel() * rows.element_size()))
    for start in range(0, len(rows) if n_rows is None else n_rows, step):
        if n_rows is None:
            yield rows.detach()[start : start + step].contiguous()
        else:
            yield rows.new_empty(min(step, n_rows - start), *rows.shape[1:])


def _write(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
    file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]


class ConsolidatedReader:
    """Reads tensors, whole or by rows, from the safetensors files of a folder.

    Args:
        source: named in messages.
        files: that hold the tensors.
    """

    def __init__(self, source: str, files: list[Path]) -> None:
        self.source, self._stack, self._files = source, ExitStack(), files
        self._opened: dict[str, Any] = {}

    def __enter__(self) -> ConsolidatedReader:
        for path in self._files:
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
            self._opened.update(dict.fromkeys(opened.keys(), opened))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._opened)

    @torch.no_grad()
    def read_into(self, tensor: Tensor, name: str, shards: VocabShards | None = None) -> None:
        """Fill a tensor, or with `shards` this process's rows, from the one of that name.

        Raises:
            DataError: if there is none, or it has another shape.
        """
        shape = list(tensor.shape)
        if shards is not None:
            shape[0] = shards.n_classes
        if name not in self._opened:
            raise self._error(f"there is no {name}")
        whole = self._opened[name].get_slice(name)
        if whole.get_shape() != shape:
            raise self._error(f"{name} has shape {whole.get_shape()}, and the model wants {shape}")
        if not shape:
            tensor.copy_(self._opened[name].get_tensor(name))
            return
        first = 0 if shards is None else shards.first
        step = max(1, _PIECE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
        for start in range(0, len(tensor), step):
            piece = tensor[start : start + step]
            piece.copy_(whole[first + start : first + start + len(piece)])

    def _error(self, problem: str) -> DataError:
        return DataError(self.source, problem, "Load what save_pretrained wrote of this model")


def weight_files(source: str, hub: Mapping[str, Any]) -> list[Path]:
    """Return the files of weights of a folder or Hub id: one, or those that an index names.

    Args:
        source: folder or Hub id.
        hub: where files come from, as from_pretrained is told.
    """
    index = cached_file(
        source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub
    )
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    return [Path(str(cached_file(source, name, **hub))) for name in sorted(names)]


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name the parameters of which each process has its own rows; a tied one once."""
    ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ShardedLayer)
        for parameter in module.parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


class ShardedCheckpoints(SparseCheckpoints):
    """Base of models whose vocabulary may be cut over processes; what is saved is whole.

    With a vocabulary that is cut, save_pretrained and load_weights are collective.
    """

    vocab_shards: VocabShards | None = None

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Save as PreTrainedModel does: the first process writes, the others send their rows."""
        shards = self.vocab_shards
        if shards is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        path, sharded = Path(save_directory) / SAFE_WEIGHTS_NAME, sharded_parameters(self)
        if not shards.is_main:
            write_consolidated(path, {}, sharded, shards)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        own = self.names_of_own_rows()
        kwargs["state_dict"] = {n: t for n, t in self.state_dict().items() if n not in own}
        with TemporaryDirectory(dir=path.parent) as folder:
            super().save_pretrained(folder, **{**kwargs, "max_shard_size": 2**62})
            written = Path(folder) / SAFE_WEIGHTS_NAME
            whole = load_file(written) if written.exists() else {}
            written.unlink(missing_ok=True)
            for other in Path(folder).iterdir():
                os.replace(other, path.parent / other.name)
        write_consolidated(path, whole, sharded, shards, {"format": "pt"})

    def load_weights(self, source: str, files: list[Path]) -> None:
        """Fill a model whose vocabulary is cut from files of weights, of which it reads its rows.

        Args:
            source: named in messages.
            files: safetensors.

        Raises:
            DataError: if a weight is missing, or has another shape.
        """
        sharded = sharded_parameters(self)
        own = self.names_of_own_rows()
        with ConsolidatedReader(source, files) as reader:
            for name, parameter in sharded.items():
                reader.read_into(parameter, name, self.vocab_shards)
            for name, tensor in self.state_dict().items():
                if name not in own:
                    reader.read_into(tensor, name)

    def names_of_own_rows(self) -> set[str]:
        """Return the names of the parameters of which each process has its own rows, all names."""
        ids = {id(parameter) for parameter in sharded_parameters(self).values()}
        every = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in every if id(parameter) in ids}
