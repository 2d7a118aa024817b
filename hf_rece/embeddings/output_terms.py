"""What an output layer computes, written as rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_rece.ops.rows import OutputRows


class OutputTerms(NamedTuple):
    """What an output layer computes of hidden states: logits = <hidden, rows> + bias.

    Args:
        hidden: (..., D'), the states that the rows are multiplied with; D' exceeds D where an
            adapter adds terms of its own.
        rows: C rows of width D'.
        bias: (C,) or None.
    """

    hidden: Tensor
    rows: OutputRows
    bias: Tensor | None
