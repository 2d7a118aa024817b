"""Which processes hold a vocabulary together, and which the same part of it."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_rece.errors import ArgumentError
from hf_rece.ops.messages import device_for


def vocab_mesh(vocab_parallel_size: int | None = None) -> DeviceMesh:
    """Return all processes as a mesh ("data", "vocab"); neighbours hold a vocabulary together.

    Collective: makes process groups.

    Args:
        vocab_parallel_size: processes of a row, such as those of one machine; None for all.

    Raises:
        ArgumentError: if the number of processes is no multiple of it.
    """
    n_processes = distributed.get_world_size()
    size = n_processes if vocab_parallel_size is None else vocab_parallel_size
    if size < 1 or n_processes % size:
        raise ArgumentError(
            "vocab_parallel_size",
            vocab_parallel_size,
            f"{n_processes} processes are no rows of as many",
            "Pass a divisor of their number",
        )
    sends_from = device_for(None, torch.device("cpu")).type
    return init_device_mesh(
        sends_from, (n_processes // size, size), mesh_dim_names=("data", "vocab")
    )
