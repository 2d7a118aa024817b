"""Matrix products of a tile, by the fastest library at hand, outside autograd and autocast.

Operands in half precision are added up, and returned, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

_ROUNDING_DEVICES = ("cuda",)
_STEP = 64
# A result of more numbers is not copied: that takes more memory than a program of oneDNN's.
_COPIED = 2**22


def recurring(n: int) -> int:
    """Return n >= 1 rounded up to one of few: powers of two up to 64, multiples of it above."""
    return 1 << (n - 1).bit_length() if n < _STEP else n + -n % _STEP


def multiplies_halves(device: torch.device) -> bool:
    """Whether a device multiplies in half precision, and does so much faster than in float32."""
    return device.type in _ROUNDING_DEVICES


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what torch.autocast rounds the operands of products to; None where it is off.

    None on a CPU, whose products are as fast in float32.
    """
    if not multiplies_halves(device) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def search_dtype(hidden: Tensor, tensors: Sequence[Tensor]) -> torch.dtype | None:
    """Return what a search for likely classes may round its operands to; None for nothing.

    A choice of candidates bears the rounding that the model's own states or rows have had, and a
    GPU is several times faster by it. float16 is left out: mixed directions overflow it.

    Args:
        hidden: (N, D).
        tensors: what the rows are made of.
    """
    dtype = hidden.dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    dtype = operand_dtype(dtype, dtype, autocast_dtype(hidden.device))
    return dtype if dtype == torch.bfloat16 and multiplies_halves(hidden.device) else None


def operand_dtype(
    left: torch.dtype, right: torch.dtype, autocast: torch.dtype | None
) -> torch.dtype:
    """Return the dtype of a product's operands: autocast's, unless they are in float64."""
    dtype = torch.promote_types(left, right)
    return dtype if autocast is None or dtype == torch.float64 else autocast


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return in what to compute without torch.autocast."""
    return torch.autocast(device.type, enabled=False)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (n, k) @ right (m, k).T, (n, m)."""
    if left.dtype.itemsize == 2:
        return _product_of_halves(left, right.T, "mm")
    if _onednn_serves(left, right):
        n, m = len(left), len(right)
        # oneDNN keeps a program of a megabyte for every shape that it has met, and steps differ in
        # their number of tokens.
        columns = recurring(m) if n * m <= _COPIED else m
        if recurring(n) > n or columns > m:
            found = product(_padded(left, recurring(n)), _padded(right, columns))
            return found[:n, :m].contiguous()  # without a copy where only rows were added
        # torch.mm calls MKL, which runs at half of this speed on processors of other makers.
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")  # type: ignore[no-any-return]
    return left @ right.T


def _padded(matrix: Tensor, n_rows: int) -> Tensor:
    more = n_rows - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(more, matrix.shape[1])]) if more else matrix


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, n, k) @ right (G, m, k) transposed, (G, n, m)."""
    if len(left) == 1:
        return product(left[0], right[0]).unsqueeze(0)
    return _batched(left, right.transpose(1, 2))


def batched_transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, n, m) transposed @ right (G, n, k), (G, m, k)."""
    if len(left) == 1:
        return product(right[0].T, left[0].T).T.unsqueeze(0)
    return _batched(left.transpose(1, 2), right)


def _batched(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype.itemsize == 2:
        return _product_of_halves(left, right, "bmm")
    return torch.bmm(left, right)


def _product_of_halves(left: Tensor, right: Tensor, name: Literal["mm", "bmm"]) -> Tensor:
    multiply = getattr(torch, name)
    # Known to torch 2.8 and later, on NVIDIA's GPUs.
    is_known = "dtype" in getattr(torch.ops.aten, name).overloads() and torch.version.hip is None
    if left.device.type == "cuda" and is_known:
        found: Tensor = multiply(left, right, out_dtype=torch.float32)
    else:
        found = multiply(left.float(), right.float())
    return found


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
