"""What to do where a tile does not fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def with_smaller_tiles(tile_bytes: int, work: Callable[[int], Result]) -> Result:
    """Return work(tile_bytes); if memory runs out, begin again with half as much, once.

    Args:
        tile_bytes: bytes of a tile.
        work: makes all that it adds into, so that what it did before it failed is gone.
    """
    try:
        return work(tile_bytes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        half = max(tile_bytes // 2, 1)
        warnings.warn(
            f"out of memory with tile_bytes={tile_bytes}: going on with {half}. Pass tile_bytes, "
            "or memory_budget, to begin with less",
            stacklevel=2,
        )
    # Not in the except clause: its error holds on to the tensors of the tile that failed.
    return work(half)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, or Python, found no memory on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # CPUs have no error class of their own.
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    )
