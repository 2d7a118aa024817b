"""An output layer whose rows are those of a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import OutputRows

_ROWS_AT_ONCE = 4096


class TableHead(nn.Module):
    """logits = <hidden, rows of the table> + bias.

    Args:
        table: a module of C rows of width D: CompositionalEmbedding or LMAEmbedding.
        bias: learn a bias for each class.
        tied: the table is the model's input table, whose parameters it stays.
    """

    def __init__(self, table: nn.Module, *, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.own_table = None if tied else table
        # In a tuple, it is no submodule: saved, loaded and moved once, by its owner.
        self.tied_table: tuple[nn.Module, ...] = (table,) if tied else ()
        self.bias = nn.Parameter(torch.zeros(self.rows.n_rows)) if bias else None

    @property
    def table(self) -> nn.Module:
        """The table, its own or the one that it is tied to."""
        return self.tied_table[0] if self.own_table is None else self.own_table

    @property
    def rows(self) -> OutputRows:
        """The table's output rows.

        Raises:
            TypeError: for a table that has none.
        """
        if not isinstance(self.table, OutputRows):
            raise TypeError(f"{type(self.table).__name__} has no output rows")
        return self.table

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., C): what this package avoids, for whoever wants them all the same."""
        every = torch.arange(self.rows.n_rows, device=hidden.device)
        pieces = [hidden @ lookup(self.rows, ids).T for ids in every.split(_ROWS_AT_ONCE)]
        logits = torch.cat(pieces, dim=-1)
        return logits if self.bias is None else logits + self.bias
