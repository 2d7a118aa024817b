"""Compositional embeddings: a row for each digit of an id, combined into the row of the id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hf_rece.embeddings.digits import (
    check_codes,
    narrowest,
    own_codes,
    quotient_remainder,
    widened,
)
from hf_rece.errors import ArgumentError
from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import SeparableRows, add_rows, mixed_radix_digits

_MOST_ROWS = 2**20  # of factors, where there are fewer ids

Operation = Literal["mult", "add", "concat"]


class CompositionalEmbedding(nn.Module):
    """A table of C rows of width D, composed of k small factors; both input lookup and output rows.

        row(id) = F_1[d_1(id)] op F_2[d_2(id)] op ... op F_k[d_k(id)]

    The k factors F lie one below the other in one parameter.

    The digits d_1 ... d_k of an id are unlike those of every other id (complementary partitions).
    By default they are those of the id itself in mixed radices; with k = 2, quotient and remainder.
    Ids without a meaning make a poor tied output, because ids with a common digit are scored alike:
    pass codes that mean something, such as hf_rece.embeddings.codes makes from a log.

    Args:
        num_embeddings: C.
        embedding_dim: D.
        operation: "mult" and "add" combine factors of width D elementwise, "concat" puts factors of
            width D / k side by side; k divides D.
        radices: number of values of each digit, most significant first; their product is at least
            C. The factors have sum(radices) rows.
        compression: in place of radices, how many times fewer parameters than the C x D of a dense
            table: quotient and remainder, or as many equal digits as codes has columns.
        codes: (C, k) integers, the digits of each id; None for the id's own.
        n_codes: in place of codes, k: makes a table with the ids' own digits until set_codes.
        std: standard deviation of a composed row's elements at the start.

    Raises:
        ArgumentError: for an unknown operation, not exactly one of radices and compression, radices
            that cannot number C ids, a width that "concat" cannot share out, or codes that repeat
            or exceed their radix.

    Memory:
        sum(radices) x D (x 1/k with "concat") parameters; given codes take 1 byte a digit, 2 beyond
        256 values, 4 beyond 65,536.

    Reference:
        Shi, Mudigere, Naumov, Yang, 2019, arXiv 1909.02107. Differs by initialisation: the
        published program draws factors from U(sqrt(1/C), 1), which makes all rows nearly parallel;
        here composed rows have zero mean and the given standard deviation.

    Example:
        >>> table = CompositionalEmbedding(1000, 8, compression=10, operation="add")
        >>> table(torch.tensor([[3, 999]])).shape
        torch.Size([1, 2, 8])
    """

    codes: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        operation: Operation = "mult",
        radices: Sequence[int] | None = None,
        compression: float | None = None,
        codes: Tensor | None = None,
        n_codes: int | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if operation not in get_args(Operation):
            raise ArgumentError(
                "operation", operation, "no such operation", "Pass mult, add or concat"
            )
        if codes is not None:
            n_codes = _n_columns(codes, num_embeddings)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.operation: Operation = operation
        self.radices = resolve_radices(
            num_embeddings, embedding_dim, operation, radices, compression, n_codes
        )
        if codes is not None:
            codes = widened(codes)
            check_codes(codes, self.radices)
            codes = codes.to(narrowest(self.radices))
        elif n_codes is not None:
            codes = own_codes(num_embeddings, self.radices)
        self.register_buffer("codes", codes)
        n_parts = len(self.radices) if operation == "concat" else 1
        self.factors = nn.Parameter(torch.empty(sum(self.radices), embedding_dim // n_parts))
        self.reset_parameters(std)

    def reset_parameters(self, std: float) -> None:
        """Draw the factors anew, so that composed rows have standard deviation `std`."""
        nn.init.normal_(self.factors, std=self.factor_std(std))

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Make the codes, where there are any, the digits of the ids themselves."""
        if self.codes is not None:
            self.codes.copy_(own_codes(self.num_embeddings, self.radices))

    def factor_std(self, std: float) -> float:
        """Return the standard deviation of the factors that gives composed rows `std`."""
        k = len(self.radices)
        of_operation = {"mult": math.pow(std, 1 / k), "add": std / math.sqrt(k), "concat": std}
        return of_operation[self.operation]

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Replace the codes of a table that was made with codes, before training.

        Raises:
            ArgumentError: if the table has none, or the codes repeat or do not fit.
        """
        if self.codes is None:
            raise ArgumentError(
                "codes", "a tensor", "this table computes its codes", "Make the table with codes"
            )
        _n_columns(codes, self.num_embeddings)
        codes = widened(codes)
        check_codes(codes, self.radices)
        self.codes.copy_(codes)

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.num_embeddings

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.embedding_dim

    def tensors(self) -> tuple[Tensor, ...]:
        """Return `(factors,)`."""
        return (self.factors,)

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return composed rows (K, D)."""
        parts = self._parts(self._places(ids))
        if self.operation == "mult":
            return parts.prod(1)
        return parts.sum(1) if self.operation == "add" else parts.flatten(1)

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the gradient (K, D) of composed rows to the factors' buffer."""
        (buffer,) = grads
        if buffer is None:
            return
        places = self._places(ids)
        k = places.shape[1]
        if self.operation == "concat":
            of_parts = grad.reshape(len(places), k, -1)
        elif self.operation == "add":
            of_parts = grad.unsqueeze(1).expand(-1, k, -1)
        else:
            parts = self._parts(places).to(grad.dtype)
            others = [torch.cat([parts[:, :j], parts[:, j + 1 :]], dim=1).prod(1) for j in range(k)]
            of_parts = grad.unsqueeze(1) * torch.stack(others, dim=1)
        add_rows(buffer, places.view(-1), of_parts.reshape(len(places) * k, -1))

    def separable(self) -> SeparableRows | None:
        """Return the rows as independent parts; None where a logit is no sum over all digits."""
        if self.operation == "mult" or self.codes is not None:
            return None
        part = self.factors.shape[1]
        n_parts = self.embedding_dim // part
        columns = [
            slice(j % n_parts * part, (j % n_parts + 1) * part) for j in range(len(self.radices))
        ]
        return SeparableRows(self.factors.split(self.radices), columns, self.num_embeddings)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return rows (..., D) for ids (...) int64."""
        return lookup(self, input_ids)

    def extra_repr(self) -> str:
        """Say what is composed of what."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, operation={self.operation!r}, "
            f"radices={self.radices}, codes={'own' if self.codes is None else 'given'}"
        )

    def _parts(self, places: Tensor) -> Tensor:
        """Return the factors' rows (K, k, D or D / k) that are combined."""
        return self.factors.index_select(0, places.view(-1)).view(*places.shape, -1)

    def _places(self, ids: Tensor | slice) -> Tensor:
        """Return, for each id, where its k rows lie among those of the factors: (K, k)."""
        if self.codes is not None:
            digits = widened(self.codes[ids])
        else:
            if isinstance(ids, slice):
                ids = torch.arange(ids.start, ids.stop, device=self.factors.device)
            digits = torch.stack(mixed_radix_digits(ids, self.radices), dim=1)
        firsts = [0, *accumulate(self.radices[:-1])]
        return digits + torch.tensor(firsts, device=digits.device)


def resolve_radices(
    n_rows: int,
    width: int,
    operation: Operation,
    radices: Sequence[int] | None,
    compression: float | None,
    n_codes: int | None,
) -> tuple[int, ...]:
    """Return the number of values of each digit.

    Args:
        n_rows: C.
        width: D.
        operation: what combines the factors.
        radices: as given, or None.
        compression: as given, or None.
        n_codes: columns of given codes, or None.

    Raises:
        ArgumentError: as CompositionalEmbedding.
    """
    if (radices is None) == (compression is None):
        raise ArgumentError(
            "compression", compression, f"radices is {radices}", "Pass exactly one of them"
        )
    budget = None
    if radices is None and compression is not None:
        # "concat" has factors of 1 / k of the width.
        share = (n_codes or 2) if operation == "concat" else 1
        budget = int(n_rows * share / compression) if compression >= 1 else 0
        radices = [budget // n_codes] * n_codes if n_codes else quotient_remainder(n_rows, budget)
    radices = tuple(int(radix) for radix in radices or ())
    if len(radices) < 2 or min(radices) < 1 or math.prod(radices) < n_rows:
        raise ArgumentError(
            "radices" if budget is None else "compression",
            radices if budget is None else compression,
            f"{sum(radices) if budget is None else budget} rows of factors cannot number "
            f"{n_rows} ids",
            "Pass two or more radices whose product is at least that, or less compression",
        )
    if sum(radices) > max(n_rows, _MOST_ROWS):
        raise ArgumentError(
            "radices",
            radices,
            f"{sum(radices)} rows of factors for {n_rows} ids",
            "Pass radices with a smaller sum, or a dense table",
        )
    if n_codes is not None and n_codes != len(radices):
        raise ArgumentError(
            "codes", n_codes, f"there are {len(radices)} radices", "Pass a column for each radix"
        )
    if operation == "concat" and width % len(radices):
        raise ArgumentError(
            "radices",
            radices,
            f"{len(radices)} factors cannot share {width} columns equally",
            "Pass a number of digits that divides the width",
        )
    return radices


def _n_columns(codes: Tensor, n_rows: int) -> int:
    if codes.dim() != 2 or len(codes) != n_rows or codes.is_floating_point():
        raise ArgumentError(
            "codes",
            (tuple(codes.shape), codes.dtype),
            f"there are {n_rows} ids",
            f"Pass integers of shape ({n_rows}, digits)",
        )
    return codes.shape[1]
