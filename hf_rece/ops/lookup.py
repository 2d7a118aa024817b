"""Input lookup in any table of rows, differentiable in what the rows are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import OutputRows, gradient_buffers, narrowed
from hf_rece.ops.shards import ShardedRows


def lookup(rows: OutputRows, ids: Tensor) -> Tensor:
    """Return the rows (..., D) of ids (...).

    Over ShardedRows each process asks for ids of its own, by three messages and three backward.

    Args:
        rows: C rows of width D.
        ids: (...) integers in [0, C).

    Raises:
        ArgumentError: for an id out of range, on a CPU; elsewhere the device says so.
    """
    flat = ids.reshape(-1).long()
    if not isinstance(rows, ShardedRows):  # these tell all processes
        _check(rows, flat)
    found: Tensor = _Lookup.apply(rows, flat, *rows.tensors())
    return found.view(*ids.shape, rows.width)


def _check(rows: OutputRows, flat: Tensor) -> None:
    if flat.device.type == "cuda":  # composed and hashed rows answer any id
        torch._assert_async(((flat >= 0) & (flat < rows.n_rows)).all())
    if flat.numel() and not flat.is_meta and flat.device.type == "cpu":
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= rows.n_rows:
            raise ArgumentError(
                "input_ids",
                (low, high),
                f"smallest and largest id, but the table has {rows.n_rows} rows",
                f"Pass ids from 0 to {rows.n_rows - 1}, or make a larger table",
            )


class _Lookup(torch.autograd.Function):
    """rows(ids), whose gradient add_grad knows."""

    @staticmethod
    def forward(ctx: Any, rows: OutputRows, ids: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(ids, *tensors)
        ctx.rows = rows
        return rows.rows(ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, *tensors = ctx.saved_tensors
        buffers = gradient_buffers(tensors, ctx.needs_input_grad[2:])
        if buffers is None:
            return (None,) * (2 + len(tensors))
        ctx.rows.add_grad(buffers, ids, grad)
        return (
            None,
            None,
            *(
                None if buffer is None else narrowed(buffer, tensor.dtype)
                for buffer, tensor in zip(buffers, tensors, strict=True)
            ),
        )
