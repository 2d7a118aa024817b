"""Mixing of integers: the same pseudo-random numbers in every version of every library."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each value (...) hashed to 64 bits, one to one.

    Reference:
        The finaliser of SplitMix64: Steele, Lea, Flood, 2014.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(seed: int, purpose: str, *shape: int) -> NDArray[np.uint64]:
    """Return an array of 64 pseudo-random bits each, that follow from seed and purpose alone."""
    start = mix(np.array([seed & (2**64 - 1)], dtype=np.uint64)) ^ np.uint64(
        zlib.crc32(purpose.encode())
    )
    count = np.arange(int(np.prod(shape)), dtype=np.uint64)
    return mix(mix(start) + count).reshape(shape)
