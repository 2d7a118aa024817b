"""What to do where a tile does not fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# The most that a tile takes in this process from now on, None where all have fitted so far.
_most_bytes: int | None = None


def with_smaller_tiles(tile_bytes: int, work: Callable[[int], Result]) -> Result:
    """Return work(tile_bytes); if memory runs out, begin again with half as much, once.

    The half is then the most that any later tile of this process takes, so that no later step fails
    first: `restore_tile_bytes` forgets it. Processes that share a vocabulary may differ in it: no
    message depends on the size of a tile. Where the half does not fit either, the process raises,
    and those that share its vocabulary learn of it by the end of their connection to it.

    Args:
        tile_bytes: bytes of a tile.
        work: makes all that it adds into, so that what it did before it failed is gone. It is about
            this process alone, and sends no message.
    """
    global _most_bytes
    if _most_bytes is not None:
        tile_bytes = min(tile_bytes, _most_bytes)
    try:
        return work(tile_bytes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _most_bytes = max(tile_bytes // 2, 1)
        warnings.warn(
            f"out of memory with tile_bytes={tile_bytes}: going on with {_most_bytes}, here and in "
            "all later steps. Pass tile_bytes, or memory_budget, to begin with less",
            stacklevel=2,
        )
    # Not in the except clause: its error holds on to the tensors of the tile that failed.
    return work(_most_bytes)


def restore_tile_bytes() -> None:
    """Let tiles be as large as they are asked for, after one that did not fit."""
    global _most_bytes
    _most_bytes = None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, or Python, found no memory on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # CPUs have no error class of their own.
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    )
