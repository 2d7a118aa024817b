"""Random numbers that processes draw together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_rece.ops.shards import VocabShards


@contextmanager
def same_draws(
    shards: VocabShards, generator: torch.Generator | None, device: torch.device
) -> Iterator[None]:
    """Let every process of a group draw what the first one would have drawn. Collective.

    Other groups draw other numbers, even where all were seeded alike: with the same ones, they
    would meet the same classes.

    Args:
        shards: whose processes.
        generator: that is drawn from; None for the device's own, which only the first process's
            draws move on, so that dropout goes on as it would have.
        device: of the draws.
    """
    if shards.world_size == 1:
        yield
        return
    source = _generator_of(device) if generator is None else generator
    before = source.get_state()
    source.set_state(shards.take_from_first(before.clone()))
    if shards.data_rank:
        seed = torch.randint(2**62, (), generator=source, device=device)
        source.manual_seed(int(seed) + shards.data_rank)
    try:
        yield
    finally:
        if generator is None and shards.rank:
            source.set_state(before)


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
