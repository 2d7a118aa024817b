"""Bucket, stable sort, chunk: how RECE and the stratified loss bring similar vectors together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rece.ops import native
from hf_rece.ops.products import product, without_autocast
from hf_rece.ops.rows import DenseRows, OutputRows, accumulation_dtype
from hf_rece.ops.shards import VocabShards
from hf_rece.ops.smaller_tiles import with_smaller_tiles

_LANE = 32


@dataclass(frozen=True)
class Chunks:
    """K sorted vectors, cut into chunks of equal size.

    Args:
        order: (K,) int32, vector ids sorted by bucket.
        size: vectors a chunk; the last chunks may be short, or empty.
        n_chunks: number of chunks.
    """

    order: Tensor
    size: int
    n_chunks: int

    def table(self, padding: int) -> Tensor:
        """Return (n_chunks, size) int32, the ids of each chunk, filled up with `padding`."""
        missing = self.n_chunks * self.size - len(self.order)
        filler = self.order.new_full((missing,), padding)
        return torch.cat([self.order, filler]).view(self.n_chunks, self.size)

    def positions(self) -> Tensor:
        """Return (K,) int32, the place of each vector in the sorted order."""
        places = torch.empty_like(self.order)
        places[self.order.long()] = torch.arange(
            len(self.order), dtype=torch.int32, device=self.order.device
        )
        return places

    def numbers(self) -> Tensor:
        """Return (K + 1,), the chunk of each vector; the last entry, for padding, is 0."""
        numbers = self.positions().div_(self.size, rounding_mode="floor")
        return torch.cat([numbers, numbers.new_zeros(1)]).to(_narrow(self.n_chunks))

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chunk (K,) of vectors (K,), and their places (K,) in its row of the table."""
        positions = self.positions()[ids].long()
        return positions // self.size, positions % self.size


@dataclass(frozen=True)
class ShardOfChunks:
    """This process's part of chunks of classes that are cut over processes.

    As Chunks, but a chunk's row of the table has this process's classes alone, numbered as in its
    shard.

    Args:
        order: (K,) int32, class ids sorted by bucket.
        chunks: (K,) int64 ascending, the chunk that each of `order` is in.
        n_chunks: number of chunks.
    """

    order: Tensor
    chunks: Tensor
    n_chunks: int

    def table(self, padding: int) -> Tensor:
        """Return (n_chunks, m) int32, the ids of each chunk, filled up with `padding`."""
        longest = int(torch.bincount(self.chunks).max())
        table = self.order.new_full((self.n_chunks, longest), padding)
        table[self.chunks, self._columns()] = self.order
        return table

    def numbers(self) -> Tensor:
        """Return (K + 1,), the chunk of each class; the last entry, for padding, is 0."""
        numbers = torch.zeros(
            len(self.order) + 1, dtype=_narrow(self.n_chunks), device=self.order.device
        )
        numbers[self.order.long()] = self.chunks.to(numbers.dtype)
        return numbers

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chunk (K,) of classes (K,), and their places (K,) in its row of the table."""
        where = torch.empty_like(self.chunks)
        where[self.order.long()] = torch.arange(len(where), device=where.device)
        return self.chunks[where[ids]], self._columns()[where[ids]]

    def _columns(self) -> Tensor:
        sizes = torch.bincount(self.chunks, minlength=self.n_chunks)
        return _counted_up(self.chunks, sizes)


def _narrow(n_chunks: int) -> torch.dtype:
    # int16 halves the traffic of the (n, m) comparisons that decide about duplicates.
    return torch.int16 if n_chunks < 2**15 else torch.int32


def _counted_up(sorted_ids: Tensor, sizes: Tensor) -> Tensor:
    """Return (K,) 0, 1, 2, ... for each run of equal ids (K,), which are as long as sizes says."""
    first = sizes.cumsum(0) - sizes
    return torch.arange(len(sorted_ids), device=sorted_ids.device) - first[sorted_ids]


@dataclass
class _SharedSeed:
    """Where directions come from within shared_directions.

    Args:
        seed: of the generators.
        generators: of the devices that drew any.
    """

    seed: int
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


_SHARED: ContextVar[_SharedSeed | None] = ContextVar("shared_directions", default=None)


@contextmanager
def shared_directions(seed: int) -> Iterator[None]:
    """Let directions depend on `seed` alone, where the caller gives no generator for them.

    Processes that hash tokens of their own do so by the same directions; whatever else is drawn
    stays each process's own. A process that needs more directions than another draws others.

    Args:
        seed: the same in all processes.
    """
    token = _SHARED.set(_SharedSeed(seed))
    try:
        yield
    finally:
        _SHARED.reset(token)


def random_directions(n: int, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return (n, D) standard normal directions on the device of `hidden` (N, D)."""
    shared = _SHARED.get()
    if generator is None and shared is not None:
        generator = shared.generator(hidden.device)
    return torch.randn(
        n,
        hidden.shape[1],
        dtype=accumulation_dtype(hidden.dtype),
        device=hidden.device,
        generator=generator,
    )


@torch.no_grad()
def buckets(
    vectors: OutputRows, directions: Tensor, tile_bytes: int, *, operands: torch.dtype | None = None
) -> Tensor:
    """Return (K,) int16 or int32, for each of K vectors the direction it lies closest to.

    Args:
        vectors: K rows of width D.
        directions: (B, D); a vector's bucket is argmax over b of <directions[b], vector>.
        tile_bytes: bytes of one tile of inner products.
        operands: dtype that vectors and directions are rounded to; None for that of the directions.
    """
    n_buckets = len(directions)
    dtype = torch.int16 if n_buckets < 2**15 else torch.int32
    if type(vectors) is DenseRows and native.serves(vectors.weight, directions):
        return native.nearest(vectors.weight, directions).to(dtype)
    found = torch.empty(vectors.n_rows, dtype=dtype, device=directions.device)
    # Whole lanes of vector instructions: repeated directions change no maximum.
    padded = directions[
        torch.arange(-(-n_buckets // _LANE) * _LANE, device=found.device) % n_buckets
    ]
    countdown = torch.arange(len(padded), 0, -1, dtype=padded.dtype, device=found.device)
    padded = padded.to(operands or padded.dtype)

    def scan(tile_bytes: int) -> None:
        # Half a tile: the maximum is taken while the scores are still near the processor.
        step = max(64, tile_bytes // (8 * (n_buckets + vectors.width)) // 64 * 64)
        for start in range(0, vectors.n_rows, step):
            piece = slice(start, min(start + step, vectors.n_rows))
            scores = product(vectors.rows(piece).to(padded.dtype), padded)
            found[piece] = len(padded) - _first_of_largest(scores, countdown)

    with without_autocast(found.device):
        with_smaller_tiles(tile_bytes, scan)
    return found.remainder_(n_buckets)  # equal directions need not round alike


def _first_of_largest(scores: Tensor, countdown: Tensor) -> Tensor:
    """Return (K,), the largest entry of countdown (B,) among each row's maxima; overwrites scores.

    torch.argmax searches one number at a time; these three passes have vector instructions.
    """
    return scores.eq_(scores.amax(1, keepdim=True)).mul_(countdown).amax(1)


def sort_into_chunks(bucket_of: Tensor, n_chunks: int) -> Chunks:
    """Sort vectors by bucket, ties in their given order, and cut the order into chunks."""
    order = torch.sort(bucket_of, stable=True).indices.to(torch.int32)
    return Chunks(order, max(1, -(-len(order) // n_chunks)), n_chunks)


def sort_shard_into_chunks(
    bucket_of: Tensor, n_buckets: int, n_chunks: int, shards: VocabShards
) -> ShardOfChunks:
    """Sort all processes' classes as sort_into_chunks does; return this one's part. Collective.

    A class comes after all those of smaller buckets, and those of its own bucket before it: to know
    how many these are, processes tell each other how many they have in each bucket.

    Args:
        bucket_of: (n_local,) buckets of this process's classes.
        n_buckets: number of buckets.
        n_chunks: number of chunks.
        shards: how the classes are cut.
    """
    order = torch.sort(bucket_of, stable=True).indices
    ascending = bucket_of[order].long()
    own = torch.bincount(ascending, minlength=n_buckets)
    of_all = shards.join(own.unsqueeze(0), [1] * shards.world_size)
    sizes = of_all.sum(0)
    before = sizes.cumsum(0) - sizes + of_all[: shards.rank].sum(0)
    position = before[ascending] + _counted_up(ascending, own)
    size = max(1, -(-shards.n_classes // n_chunks))
    return ShardOfChunks(order.to(torch.int32), position // size, n_chunks)
