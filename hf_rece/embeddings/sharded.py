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


class ShardedLayer(nn.Module):
    """Rows of which each process holds those of its classes.

    Backward makes their gradients the mean over all processes, as DDP does: that over a group comes
    from the losses and lookups, and that over groups (see hf_rece.ops.shards) from here, by a
    message of a shard's size whenever backward is through with a parameter.

    Args:
        shards: how the classes are cut.
        width: D.
    """

    averages_gradients = True  # False while gradients accumulate, as in DDP's no_sync

    def __init__(self, shards: VocabShards, width: int) -> None:
        super().__init__()
        self.shards = shards
        self.weight = nn.Parameter(torch.empty(shards.n_local, width))

    @property
    def rows(self) -> ShardedRows:
        """The rows of all processes."""
        for parameter in self.parameters() if self.shards.data_size > 1 else ():
            # Asked for each time: a copied or replaced parameter has no hook.
            if parameter.requires_grad and not hasattr(parameter, "has_average_hook"):
                parameter.register_post_accumulate_grad_hook(self._average)
                parameter.has_average_hook = True  # type: ignore[attr-defined]
        return ShardedRows(DenseRows(self.weight), self.shards)

    def _average(self, parameter: Tensor) -> None:
        if self.averages_gradients and parameter.grad is not None:
            self.shards.average_over_data(parameter.grad)


class ShardedEmbedding(ShardedLayer):
    """nn.Embedding over processes: each looks up its own ids, wherever their rows are.

    Collective: all processes call it, each with ids of any shape.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows (..., D) of ids (...)."""
        return lookup(self.rows, ids)


class ShardedLinear(ShardedLayer):
    """nn.Linear whose output rows are cut over processes: for losses and searches, not for logits.

    Args:
        shards: how the classes are cut.
        width: D.
        bias: learn a bias for each class.
    """

    def __init__(self, shards: VocabShards, width: int, *, bias: bool = False) -> None:
        super().__init__(shards, width)
        self.bias = nn.Parameter(torch.zeros(shards.n_local)) if bias else None

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
    a time, by a seed that the first process of all draws.

    Args:
        weight: rows `shards.first` to `shards.stop`.
        shards: how the classes are cut.
        std: standard deviation.
    """
    seed = int(shards.take_from_main(torch.randint(2**62, ())))
    block = torch.empty(_ROWS_A_BLOCK, weight.shape[1])
    for start in range(0, shards.n_classes, _ROWS_A_BLOCK):
        first, stop = max(start, shards.first), min(start + _ROWS_A_BLOCK, shards.stop)
        if first < stop:
            block.normal_(0.0, std, generator=torch.Generator().manual_seed(seed + start))
            weight[first - shards.first : stop - shards.first] = block[first - start : stop - start]
