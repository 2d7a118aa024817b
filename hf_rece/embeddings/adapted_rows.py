"""Output rows that an adapter makes of other rows, without ever making all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rece.ops.rows import OutputRows, accumulation_dtype

# Rows read at once where every row is read in turn.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class SideBySideRows:
    """Rows [left, right], of width D + E: an inner product with [h, g] is <h, left> + <g, right>.

    A low-rank update W + s B A is read so: <h, (W + s B A)_j> = <[h, s A h], [W_j, B_j]>. The
    hidden side then carries what depends on the token (A, scaling, dropout).

    Args:
        left: C rows of width D.
        right: C rows of width E.
    """

    left: OutputRows
    right: OutputRows

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.left.n_rows

    @property
    def width(self) -> int:
        """D + E, the width of a row."""
        return self.left.width + self.right.width

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of both."""
        return (*self.left.tensors(), *self.right.tensors())

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D + E)."""
        return torch.cat([self.left.rows(ids), self.right.rows(ids)], dim=1)

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add `grad` (K, D + E), each part to its own rows."""
        n_left = len(self.left.tensors())
        left, right = grad.split([self.left.width, self.right.width], dim=1)
        self.left.add_grad(grads[:n_left], ids, left)
        self.right.add_grad(grads[n_left:], ids, right)


@dataclass(frozen=True)
class ScaledRows:
    """Rows times a factor of their own: row j is scale_j base_j.

    Args:
        base: C rows of width D.
        scale: (C,).
    """

    base: OutputRows
    scale: Tensor

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.base.n_rows

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.base.width

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the factors and the tensors of the base."""
        return (self.scale, *self.base.tensors())

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D)."""
        return self.base.rows(ids) * self.scale[ids].unsqueeze(1)

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the gradient (K, D) to the factors and to the base."""
        of_scale, *of_base = grads
        if of_scale is not None:
            own = torch.linalg.vecdot(grad, self.base.rows(ids).to(grad.dtype))
            if isinstance(ids, slice):
                of_scale[ids] += own
            else:
                of_scale.index_add_(0, ids, own.to(of_scale.dtype))
        if any(buffer is not None for buffer in of_base):
            self.base.add_grad(tuple(of_base), ids, grad * self.scale[ids].unsqueeze(1))


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of a base, a few of them replaced by others.

    Args:
        base: C rows of width D.
        replaced: (K,) int64 sorted distinct classes.
        replacement: (K, D), their rows.
    """

    base: OutputRows
    replaced: Tensor
    replacement: Tensor

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.base.n_rows

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.base.width

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the replacement and the tensors of the base."""
        return (self.replacement, *self.base.tensors())

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D)."""
        rows = self.base.rows(ids)
        where, which = self._find(ids)
        return rows.index_copy(0, where, self.replacement[which].to(rows.dtype))

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the gradient (K, D) to the replacement or to the base, each row to its own."""
        of_replacement, *of_base = grads
        where, which = self._find(ids)
        if of_replacement is not None:
            of_replacement.index_add_(0, which, grad[where].to(of_replacement.dtype))
        if any(buffer is not None for buffer in of_base):
            self.base.add_grad(tuple(of_base), ids, grad.index_fill(0, where, 0))

    def _find(self, ids: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the places among `ids` of replaced classes, and which replacement each has."""
        if isinstance(ids, slice):
            inside = (self.replaced >= ids.start) & (self.replaced < ids.stop)
            return self.replaced[inside] - ids.start, inside.nonzero()[:, 0]
        which = torch.searchsorted(self.replaced, ids).clamp_(max=len(self.replaced) - 1)
        where = (self.replaced[which] == ids).nonzero()[:, 0]
        return where, which[where]


@torch.no_grad()
def low_rank_row_norms(base: OutputRows, left: Tensor, right: Tensor) -> Tensor:
    """Return (C,) the Euclidean norms of the rows of W + left @ right, a few rows at a time.

    Args:
        base: C rows W of width D.
        left: (C, r).
        right: (r, D).
    """
    dtype = accumulation_dtype(left.dtype)
    norms = torch.empty(base.n_rows, dtype=dtype, device=left.device)
    for start in range(0, base.n_rows, _ROWS_AT_ONCE):
        piece = slice(start, min(start + _ROWS_AT_ONCE, base.n_rows))
        rows = base.rows(piece).to(dtype).addmm(left[piece].to(dtype), right.to(dtype))
        norms[piece] = rows.norm(dim=1)
    return norms
