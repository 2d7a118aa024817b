"""The digits of an id: one code for each id, no code twice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import mixed_radix_digits

_IDS_AT_ONCE = 2**18


def quotient_remainder(n_rows: int, budget: int) -> tuple[int, ...]:
    """Return the number of quotients and of remainders, together `budget` at most.

    The remainders are as few as that allows: the fewer ids have a quotient in common, the better.
    Nothing comes back where no pair is small enough.
    """
    # m + n_rows / m = budget has its smaller solution here.
    discriminant = budget * budget - 4 * n_rows
    if discriminant < 0:
        return ()
    first = max(1, math.floor((budget - math.sqrt(discriminant)) / 2))
    for remainders in range(first, first + 3):
        quotients = -(-n_rows // remainders)
        if quotients + remainders <= budget:
            return quotients, remainders
    return ()


def check_codes(codes: Tensor, radices: Sequence[int]) -> None:
    """Raise ArgumentError if a digit is missing or out of range, or two ids have the same digits.

    Args:
        codes: (C, k) integers.
        radices: number of values of each digit.
    """
    if codes.shape[1] != len(radices):
        raise ArgumentError(
            "codes",
            tuple(codes.shape),
            f"there are {len(radices)} radices",
            "Pass a column for each radix",
        )
    check_digits(codes, radices)
    if codes.is_meta or len(codes) == 0:
        return
    number = code_numbers(codes, radices)
    distinct, count = torch.unique(number, return_counts=True)
    if len(distinct) < len(codes):
        same = (number == distinct[count > 1][0]).nonzero()[:, 0]
        raise ArgumentError(
            "codes",
            codes[same[0]].tolist(),
            f"ids {same[:3].tolist()} have this code, and {len(codes) - len(distinct)} codes "
            "repeat another",
            "Give every id a code of its own; hf_rece.embeddings.codes.distinct_codes does",
        )


def check_digits(codes: Tensor, radices: Sequence[int]) -> None:
    """Raise ArgumentError if a digit is out of range.

    Args:
        codes: (C, k) integers.
        radices: number of values of each digit.
    """
    if codes.is_meta or len(codes) == 0:
        return
    for column, radix in enumerate(radices):
        low, high = int(codes[:, column].min()), int(codes[:, column].max())
        if low < 0 or high >= radix:
            raise ArgumentError(
                "codes",
                (low, high),
                f"smallest and largest digit {column}, which has {radix} values",
                f"Pass digits from 0 to {radix - 1}",
            )


def code_numbers(codes: Tensor, radices: Sequence[int]) -> Tensor:
    """Return (C,) int64, equal for two ids just where all their digits are equal."""
    number, n_values = codes[:, 0].long(), radices[0]
    for column, radix in zip(codes.unbind(1)[1:], radices[1:], strict=True):
        if n_values * radix >= 2**62:
            number = torch.unique(number, return_inverse=True)[1]
            n_values = len(codes)
        number, n_values = number * radix + column, n_values * radix
    return number


def narrowest(radices: Sequence[int]) -> torch.dtype:
    """Return the smallest integer type that holds digits with so many values; see widened."""
    largest = max(radices) - 1
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**16 else torch.int32


def widened(codes: Tensor) -> Tensor:
    """Return int64 digits of codes in their narrowest type, whose int16 are read without a sign."""
    digits = codes.long()
    return digits.bitwise_and_(2**16 - 1) if codes.dtype == torch.int16 else digits


def own_codes(n_rows: int, radices: Sequence[int]) -> Tensor:
    """Return codes (C, k), the digits of the ids themselves, in their narrowest type."""
    codes = torch.empty(n_rows, len(radices), dtype=narrowest(radices))
    for start in range(0, n_rows, _IDS_AT_ONCE):
        ids = torch.arange(start, min(start + _IDS_AT_ONCE, n_rows))
        for column, digit in enumerate(mixed_radix_digits(ids, radices)):
            codes[start : start + len(ids), column] = digit
    return codes
