"""Messages between processes: of tensors, wherever they lie, and of nothing else.

NCCL sends from GPUs alone, gloo not every message from them: what lies elsewhere is copied to where
its group sends from, and what came back is copied to where it lay. Objects are never sent: they
would be pickled, and unpickled by whoever receives them.

Order of messages. NCCL wants the messages of all groups in one order in all processes. A step has
that: forward, and the backward of one graph, send the same messages whatever the data are, and
DistributedDataParallel (DDP) starts its buckets in their order, from the thread that sends those of
backward. But DDP does not wait for its buckets, and the gradients of lookups are sent meanwhile, by
another group. NCCL promises progress then where the kernels of both find room on the GPU; or, from
2.26 on with NCCL_LAUNCH_ORDER_IMPLICIT=1 in the environment, in any case: set that. Gloo keeps the
messages of groups apart. (Run on gloo; not yet on NCCL.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, distributed


def device_for(group: Any, device: torch.device) -> torch.device:
    """Return where a process group sends from what lies on a device.

    Args:
        group: process group; None for the default one.
        device: where a tensor lies.
    """
    pairs = distributed.get_backend_config(group).split(",")
    backends: dict[str, str] = dict(pair.split(":") for pair in pairs)
    if backends.get(device.type) == "gloo":
        return torch.device("cpu")
    if device.type in backends:
        return device
    bound = getattr(group or distributed.group.WORLD, "bound_device_id", None)
    return bound or torch.device(next(iter(backends)), torch.accelerator.current_device_index())


def reduce_all(values: Tensor, operation: Literal["sum", "max"], group: Any) -> Tensor:
    """Return the sum, or maximum, of the processes' values, in place."""
    how = distributed.ReduceOp.SUM if operation == "sum" else distributed.ReduceOp.MAX
    with _to_be_sent(values, group) as there:
        distributed.all_reduce(there, how, group=group)
    return values


def gather_all(values: Tensor, world_size: int, group: Any) -> Tensor:
    """Return the values (world_size, K, ...) of all processes, each (K, ...)."""
    own = _as_bytes(values).to(device_for(group, values.device))
    pieces = own.new_empty(world_size, *own.shape)
    distributed.all_gather(list(pieces.unbind(0)), own, group=group)
    return pieces.to(values.device).view(values.dtype).view(world_size, *values.shape)


def exchange(
    values: Tensor, n_sent: Sequence[int], n_received: Sequence[int], group: Any
) -> Tensor:
    """Return the rows that other processes send to this one, by rank.

    Args:
        values: (sum of n_sent, ...) rows for the first process, for the second one, and so on.
        n_sent: rows for each process.
        n_received: rows of each process.
        group: process group.
    """
    own = _as_bytes(values).to(device_for(group, values.device))
    received = own.new_empty(sum(n_received), own.shape[1])
    distributed.all_to_all_single(received, own, list(n_received), list(n_sent), group=group)
    return received.to(values.device).view(values.dtype).view(-1, *values.shape[1:])


def take_from_first(values: Tensor, group: Any) -> Tensor:
    """Return the first process's values, in place; they are contiguous."""
    with _to_be_sent(_as_bytes(values.view(-1)), group) as there:
        distributed.broadcast(there, group_src=0, group=group)
    return values


def send(values: Tensor, rank: int, group: Any) -> None:
    """Send values to a process of the group, which receives them."""
    own = _as_bytes(values).to(device_for(group, values.device))
    distributed.send(own, group_dst=rank, group=group)


def receive(values: Tensor, rank: int, group: Any) -> None:
    """Fill values, which are contiguous, by those that a process of the group sends."""
    with _to_be_sent(_as_bytes(values), group) as there:
        distributed.recv(there, group_src=rank, group=group)


def wait_for_all(group: Any) -> None:
    """Return when all processes have called this."""
    int(reduce_all(torch.zeros(()), "sum", group))


def _as_bytes(values: Tensor) -> Tensor:
    """Return (K, bytes of a row) of values (K, ...), a view where they are contiguous.

    Backends differ in the types that they send: gloo exchanges no bfloat16.
    """
    return values.reshape(len(values), values.shape[1:].numel()).contiguous().view(torch.uint8)


@contextmanager
def _to_be_sent(values: Tensor, group: Any) -> Iterator[Tensor]:
    """Yield the values where the group sends from, and bring back what became of them."""
    there = values.to(device_for(group, values.device))
    yield there
    if there is not values:
        values.copy_(there)
