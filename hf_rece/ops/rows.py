"""Output rows: what a loss asks of the output layer, instead of reading its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError

# Numbers that `narrowed` rounds by a copy, to begin with.
_FIRST_PIECE = 2**16


@runtime_checkable
class OutputRows(Protocol):
    """A table of C output rows of width D, read and differentiated by row.

    Dense weights, adapters on an output layer, compressed and sharded tables all answer this
    protocol, so that no loss ever needs the whole (C, D) matrix.
    """

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""

    @property
    def width(self) -> int:
        """D, the width of a row."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the rows are made of; autograd differentiates these."""

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D) for class ids (K,) int64 or a slice of classes."""

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the gradient (K, D) of rows `ids` into `grads`, one buffer for each of `tensors()`.

        A buffer is None where its tensor wants no gradient. An id may occur several times in `ids`.
        """


@dataclass(frozen=True)
class DenseRows:
    """Output rows stored as they are.

    Args:
        weight: (C, D) floating point.
    """

    weight: Tensor

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.weight.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return `(weight,)`."""
        return (self.weight,)

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D); a slice is a view."""
        return self.weight[ids] if isinstance(ids, slice) else self.weight.index_select(0, ids)

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add `grad` (K, D) to the rows `ids` of the one gradient buffer."""
        (buffer,) = grads
        if buffer is None:
            return
        if isinstance(ids, slice):
            buffer[ids] += grad
        else:
            add_rows(buffer, ids, grad)


@dataclass(frozen=True)
class SeparableRows:
    """Rows that are sums of independent parts: logit(id) = sum over j of <h_j, F_j[digit_j(id)]>.

    The digits are those of the id in mixed radices, so that every combination of digits below C
    is an id.

    Args:
        factors: k tensors (radix_j, D_j).
        columns: the columns h_j of a hidden state that each factor is multiplied with.
        n_rows: C.
    """

    factors: tuple[Tensor, ...]
    columns: list[slice]
    n_rows: int

    @property
    def radices(self) -> tuple[int, ...]:
        """The number of values of each digit, most significant first."""
        return tuple(len(factor) for factor in self.factors)


@runtime_checkable
class HasSeparableRows(Protocol):
    """Output rows that may be sums of independent parts."""

    def separable(self) -> SeparableRows | None:
        """Return the parts; None where a logit is no sum over all digits of the id."""


def mixed_radix_digits(ids: Tensor, radices: Sequence[int]) -> list[Tensor]:
    """Return the digits (K,) of ids (K,), most significant first.

    Args:
        ids: (K,) int64, below the product of the radices.
        radices: number of values of each digit, most significant first.
    """
    digits = []
    for radix in reversed(radices[1:]):
        quotient = ids // radix
        digits.append(ids - quotient * radix)
        ids = quotient
    return [ids, *reversed(digits)]


def add_rows(buffer: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Add grad (K, D) to the rows `ids` (K,) of buffer (C, D), in place; an id may repeat."""
    buffer.index_add_(0, ids, grad.to(buffer.dtype))


def gradient_buffers(
    tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...] | None:
    """Return zeroed buffers in the accumulation dtype for the tensors that want a gradient."""
    if not any(wanted):
        return None
    return tuple(
        gradient_buffer(tensor) if wants else None
        for tensor, wants in zip(tensors, wanted, strict=True)
    )


def gradient_buffer(tensor: Tensor) -> Tensor:
    """Return zeros like `tensor`, contiguous and in its accumulation dtype."""
    dtype = accumulation_dtype(tensor.dtype)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def narrowed(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `sums`, contiguous, in a dtype: one of half the size in the same memory, to the front.

    The sums are lost.
    """
    if 2 * dtype.itemsize != sums.dtype.itemsize:
        return sums.to(dtype)
    wide, n = sums.view(-1), sums.numel()
    narrow = wide.view(dtype)[:n]
    done = min(n, _FIRST_PIECE)
    narrow[:done] = wide[:done].clone()
    while done < n:
        # Numbers from `done` to twice that are read behind what they are written over.
        piece = slice(done, min(2 * done, n))
        narrow[piece] = wide[piece]
        done = piece.stop
    return narrow.view(sums.shape)


def as_output_rows(weight: Tensor | OutputRows) -> OutputRows:
    """Return `weight` as OutputRows.

    Args:
        weight: (C, D) floating point tensor, or OutputRows, which pass unchanged.

    Raises:
        ArgumentError: if `weight` is neither.
    """
    if isinstance(weight, Tensor):
        if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[0] == 0:
            raise ArgumentError(
                "weight",
                (tuple(weight.shape), weight.dtype),
                "output rows are a floating point matrix with a row for each class",
                "Pass the output layer's weight of shape (classes, width)",
            )
        return DenseRows(weight)
    if isinstance(weight, OutputRows):
        return weight
    raise ArgumentError(
        "weight",
        type(weight).__name__,
        "neither a tensor nor OutputRows",
        "Pass the output layer's weight of shape (classes, width), or an object with "
        "n_rows, width, tensors, rows and add_grad",
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits and gradients of `dtype` inputs are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32
