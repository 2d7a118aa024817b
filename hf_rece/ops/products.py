"""Matrix products of a tile, by the fastest library at hand."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 64


def recurring(n: int) -> int:
    """Return n >= 1 rounded up to one of few: powers of two up to 64, multiples of it above."""
    return 1 << (n - 1).bit_length() if n < _STEP else n + -n % _STEP


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (n, k) @ right (m, k).T, (n, m), outside autograd."""
    if _onednn_serves(left, right):
        n, m = len(left), len(right)
        # oneDNN keeps a program of a megabyte for every shape that it has met, and steps differ in
        # their number of tokens.
        if recurring(n) > n or recurring(m) > m:
            return product(_padded(left), _padded(right))[:n, :m].contiguous()
        # torch.mm calls MKL, which runs at half of this speed on processors of other makers.
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")  # type: ignore[no-any-return]
    return left @ right.T


def _padded(matrix: Tensor) -> Tensor:
    more = recurring(len(matrix)) - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(more, matrix.shape[1])]) if more else matrix


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, n, k) @ right (G, m, k) transposed, (G, n, m), outside autograd."""
    if len(left) == 1:
        return product(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right.transpose(1, 2))


def batched_transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, n, m) transposed @ right (G, n, k), (G, m, k), outside autograd."""
    if len(left) == 1:
        return product(right[0].T, left[0].T).T.unsqueeze(0)
    return torch.bmm(left.transpose(1, 2), right)


def _onednn_serves(left: Tensor, right: Tensor) -> bool:
    # The operator is the one that torch.compile calls; builds without oneDNN lack it.
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.numel() > 0
        and right.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
