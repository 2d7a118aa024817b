"""Input table and output layer of which each process holds the rows of its own classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_rece.errors import ArgumentError
from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.shards import ShardedRows, VocabShards

# Rows are drawn by blocks of so many, so that they do not depend on the number of processes.
_ROWS_A_BLOCK = 4096


class ShardedEmbedding(nn.Module):
    """nn.Embedding over processes: each looks up its own ids, wherever their rows are.

    Collective: all processes call it, each with ids of any shape.

    Args:
        shards: how the classes are cut.
        width: D.
    """

    def __init__(self, shards: VocabShards, width: int) -> None:
        super().__init__()
        self.shards = shards
        self.weight = nn.Parameter(torch.empty(shards.n_local, width))

    @property
    def rows(self) -> ShardedRows:
        """The rows of all processes."""
        return ShardedRows(DenseRows(self.weight), self.shards)

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows (..., D) of ids (...)."""
        return lookup(self.rows, ids)


class ShardedLinear(nn.Module):
    """nn.Linear whose output rows are cut over processes: for losses and searches, not for logits.

    Args:
        shards: how the classes are cut.
        width: D.
        bias: learn a bias for each class.
    """

    def __init__(self, shards: VocabShards, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.shards = shards
        self.weight = nn.Parameter(torch.empty(shards.n_local, width))
        self.bias = nn.Parameter(torch.zeros(shards.n_local)) if bias else None

    @property
    def rows(self) -> ShardedRows:
        """The rows of all processes."""
        return ShardedRows(DenseRows(self.weight), self.shards)

    def forward(self, hidden: Tensor) -> Tensor:
        """Raise ArgumentError: no process has the logits of all classes."""
        raise ArgumentError(
            "output_logits",
            True,
            "the output rows are cut over processes",
            "Use recommend, or load the saved model in one process",
        )


@torch.no_grad()
def draw_rows(weight: Tensor, shards: VocabShards, std: float) -> None:
    """Fill this process's rows (n_local, D) with normal draws. Collective.

    Together they are the same table whatever the number of processes: a block of rows is drawn at
    a time, by a seed that the first process draws.

    Args:
        weight: rows `shards.first` to `shards.stop`.
        shards: how the classes are cut.
        std: standard deviation.
    """
    seed = int(shards.take_from_first(torch.randint(2**62, ())))
    block = torch.empty(_ROWS_A_BLOCK, weight.shape[1])
    for start in range(0, shards.n_classes, _ROWS_A_BLOCK):
        first, stop = max(start, shards.first), min(start + _ROWS_A_BLOCK, shards.stop)
        if first < stop:
            block.normal_(0.0, std, generator=torch.Generator().manual_seed(seed + start))
            weight[first - shards.first : stop - shards.first] = block[first - start : stop - start]
