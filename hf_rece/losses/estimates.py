"""What a loss costs, from its shape alone: peak memory, floating point operations, candidates.

The peak is that of loss + backward above hidden states and table. Its terms, each a method or
function below, follow the tensors that are alive at the two moments that can be the peak:

    search      while the plan is built: directions, sorts, top-k buffers; no gradient is there yet
    backward    the gradients, the plan, what the walk knows of skipped pairs, and a tile

Both hold the values that are kept for each token, and what the libraries load. Letters as in
hf_rece.ops: N tokens, C classes, D width, K asked for, G groups of n tokens and m classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_rece.ops import native
from hf_rece.ops.plan import MIN_TILE_SIDE, tile_shape
from hf_rece.ops.rows import accumulation_dtype
from hf_rece.ops.topk import hit_capacity, serves_search

_INT32, _INT64 = 4, 8
# Measured on CPUs: what oneDNN and MKL compile, load and keep once a process. A GPU's allocator
# counts tensors only.
LIBRARY_BYTES = {"cpu": 3 * 2**20}
LIBRARY_BYTES_AT_MOST = {"cpu": 10 * 2**20}
# label logit, running maximum, sum, merge, its copies for autograd and backward, gradients of both.
_VALUES_A_TOKEN = 8
# Budgets make no smaller tiles: many of them take time.
SMALLEST_TILE_BYTES = 2**20
# Values of splits: a GPU of 132 processors, some programs on each, of 128 tokens.
_SPLIT_VALUES = 132 * 4 * 128
# streamed_topk searches for so many hidden states at once.
_QUERIES = 256


@dataclass(frozen=True)
class Shape:
    """The shape of a problem, as far as it decides cost.

    Args:
        n_tokens: N.
        n_classes: C.
        width: D.
        dtype: of hidden states and table.
        device: torch.device or its name; the tile's default size depends on it.
        wants_hidden: hidden states want a gradient.
        n_weights: numbers in the table that want a gradient; None for all of a dense one, C D.
        n_sequences: rows of a batch, for negatives that each row draws.
        has_ignored: some tokens carry no label, so that the others are copied.
        has_softcap: logits are capped.
        sparse_grad: the table's gradient holds the rows that are touched, and no others.
        is_native: C++ kernels score the pairs, a block a thread in place of tiles. Budgets do not
            count on it, so that they choose the same on every machine.
        is_triton: fused GPU kernels score the pairs; no tile of dense rows leaves the chip.
    """

    n_tokens: int
    n_classes: int
    width: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wants_hidden: bool = True
    n_weights: int | None = None
    n_sequences: int = 1
    has_ignored: bool = False
    has_softcap: bool = False
    sparse_grad: bool = False
    is_native: bool = False
    is_triton: bool = False

    @property
    def item(self) -> int:
        """Bytes of a number of the inputs."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in the accumulation dtype."""
        return accumulation_dtype(self.dtype).itemsize

    @property
    def weights(self) -> int:
        """Numbers in the table that want a gradient."""
        return self.n_classes * self.width if self.n_weights is None else self.n_weights

    @property
    def is_dense(self) -> bool:
        """Whether the table is a tensor of rows."""
        return self.weights in (0, self.n_classes * self.width)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, at most: as sums, which are rounded where they lie."""
        return self.wide * (self.weights + self.wants_hidden * self.n_tokens * self.width)

    @property
    def tile_factor(self) -> float:
        """Peak bytes of a walk for each byte of a tile, at most; see walk_bytes."""
        # Half of a tile's bytes may be states and rows, three times; a byte a pair for drops; two
        # more tiles for the cap's slope.
        return (3.25 if self.has_softcap else 1.75) * self.wide / 4


@dataclass(frozen=True)
class Pairs:
    """A grid of the plan, by its size.

    Args:
        n_groups: G.
        n: tokens a group.
        m: classes a group.
        as_slices: all classes in order, read in place rather than gathered.
        has_drops: a byte a pair says which to drop.
        whole_rows: groups are compared by their whole log-sum-exp, so classes are not split.
    """

    n_groups: int
    n: int
    m: int
    as_slices: bool = False
    has_drops: bool = False
    whole_rows: bool = False

    @property
    def count(self) -> int:
        """Pairs that are scored, padding included."""
        return self.n_groups * self.n * self.m

    def tile(self, width: int, tile_bytes: int) -> tuple[int, int, int]:
        """Return how many groups, tokens and classes a tile holds, as ops.plan.walk cuts it."""
        groups, n, m = tile_shape(self.n_groups, self.n, self.m, width, tile_bytes)
        if self.whole_rows and m < self.m:
            n, m = max(1, min(self.n, tile_bytes // (4 * (self.m + width)))), self.m
        return groups, n, m


@dataclass(frozen=True)
class Estimate:
    """What a loss costs.

    Args:
        terms: bytes by name. "plan", "tokens" and "libraries" are there all the time; beside them
            either "search", or "gradients", "skips" and "tile".
        bound: bytes that are not exceeded, however the tile's size is divided: for budgets.
        flops: floating point operations of forward and backward, a multiplication and an addition
            being two.
        candidates: classes that a token is scored against, at most.
    """

    terms: dict[str, int]
    bound: int
    flops: int
    candidates: int

    @property
    def bytes(self) -> int:
        """Extra peak of loss + backward."""
        return _peak(self.terms)


def _peak(terms: dict[str, int]) -> int:
    backward = terms["gradients"] + terms["skips"] + terms["tile"]
    return terms["plan"] + terms["tokens"] + terms["libraries"] + max(backward, terms["search"])


def walk_bytes(shape: Shape, pairs: Pairs, tile_bytes: int) -> int:
    """Return the peak bytes of walking a grid backward, beside the gradients.

    While a tile's gradients are added, its states are there three times and its rows twice.
    """
    groups, n, m = pairs.tile(shape.width, tile_bytes)
    in_place = pairs.as_slices and shape.item == shape.wide
    logits = groups * n * m
    states, rows = groups * n * shape.width, groups * m * shape.width
    read = states + (0 if in_place else rows)
    raw = 0 if shape.item == shape.wide else (states + rows) * shape.item
    moments = (
        shape.wide * read + raw,
        shape.wide * ((3 if shape.has_softcap else 1) * logits + read),
        shape.wide * (logits + read + 2 * states + rows),
    )
    return max(moments) + pairs.has_drops * logits + _INT64 * groups * (2 * n + m)


def native_bytes(shape: Shape, tile_bytes: int) -> int:
    """Return the peak bytes of the C++ kernels beside the gradients, or of the labels' products."""
    blocks = torch.get_num_threads() * native.block_bytes(shape.width, shape.has_softcap)
    labels = 3 * min(shape.n_tokens * shape.width * shape.wide, tile_bytes // 2)
    return max(blocks, labels)


def estimate(
    shape: Shape,
    grids: Sequence[Pairs],
    tile_bytes: int,
    *,
    plan: int,
    n_skips: int = 0,
    search: int = 0,
    walk: int = 0,
    search_flops: int = 0,
    candidates: int,
) -> Estimate:
    """Return the cost of a plan.

    Args:
        shape: of the problem.
        grids: the pairs that are scored.
        tile_bytes: bytes of a tile.
        plan: bytes that the plan keeps until the end of backward.
        n_skips: single pairs that grids drop.
        search: bytes of the search at its peak, beside what is kept.
        walk: bytes that backward needs before the first tile.
        search_flops: operations of the search.
        candidates: classes that a token is scored against.
    """
    n_tokens, width = shape.n_tokens, shape.width
    if shape.sparse_grad:
        # Labels and scored classes are rows of a problem of their own: found by a sort, and copied.
        gathered = sum(grid.n_groups * grid.m for grid in grids) + n_tokens
        touched = min(shape.n_classes, gathered)
        shape = replace(shape, n_weights=touched * width * (shape.weights > 0))
        search += 5 * _INT64 * gathered
        plan += touched * (width * shape.item + _INT64)
    walked = max(walk, *(walk_bytes(shape, grid, tile_bytes) for grid in grids))
    copies = shape.has_ignored * 2 * n_tokens * width * shape.item  # of the states, and gradient
    if shape.is_native:
        walked = native_bytes(shape, tile_bytes)
    elif shape.is_triton:
        walked = triton_bytes(shape, grids, tile_bytes)
    terms = {
        "gradients": gradient_bytes(shape, grids, tile_bytes),
        "tile": walked,
        # Where each skipped pair is: (group, token, class), the size of its tile, its place there.
        "skips": n_skips * 6 * _INT64,
        "plan": plan + n_skips * 3 * _INT64,
        "tokens": n_tokens * (_VALUES_A_TOKEN * shape.wide + _INT64) + copies,
        "search": search,
        "libraries": 0 if shape.is_native else LIBRARY_BYTES.get(shape.device.type, 0),
    }
    least = max(walk, *(walk_bytes(shape, grid, 1) for grid in grids))
    largest = {
        **terms,
        "tile": walked if shape.is_triton else least + int(shape.tile_factor * tile_bytes),
        "libraries": LIBRARY_BYTES_AT_MOST.get(shape.device.type, 0),
        # Hits of a top-k come in bursts: pending and union may hold k more each, 7 k in place of 5.
        "search": search * 7 // 5,
    }
    pairs = sum(grid.count for grid in grids)
    return Estimate(
        terms=terms,
        bound=_peak(largest),
        flops=pair_flops(shape) * pairs + search_flops,
        candidates=max(1, min(candidates, shape.n_classes)),
    )


def gradient_bytes(shape: Shape, grids: Sequence[Pairs], tile_bytes: int) -> int:
    """Return the bytes of the gradients of states and table, as ops.gradients makes them.

    In half precision the sums of a dense table that is walked in order are made in the room of the
    result, but for the last; where there are six classes a token, those of the states too. What
    oneDNN compiles for each window, a megabyte or so on a CPU, is not counted.
    """
    in_order = shape.is_dense and all(grid.as_slices for grid in grids)
    if not in_order or shape.item == shape.wide or not shape.weights:
        return shape.gradient_bytes
    lent = shape.n_classes >= 6 * shape.n_tokens
    of_states = shape.wants_hidden * shape.n_tokens * shape.width
    room = max(2**20, tile_bytes // 2 if shape.device.type == "cpu" else 0)
    return shape.weights * shape.item + of_states * (shape.item if lent else shape.wide) + room


def triton_bytes(shape: Shape, grids: Sequence[Pairs], tile_bytes: int) -> int:
    """Return what the fused kernels write beside the gradients.

    A few float32 numbers for each group and token, from every split of a walk, of which there are
    more the fewer tokens there are; rows that are no dense tensor are gathered, a tile at a time.
    """
    pairs = max(grid.n_groups * grid.n for grid in grids)
    values = 4 * _INT32 * max(pairs, _SPLIT_VALUES)
    return values + (0 if shape.is_dense else tile_bytes)


def pair_flops(shape: Shape) -> int:
    """Return the operations of one pair: forward, again in backward, and a gradient each."""
    return 2 * shape.width * (2 + shape.wants_hidden + (shape.weights > 0))


def exact_flops(shape: Shape) -> int:
    """Return the operations of streamed exact cross-entropy."""
    return pair_flops(shape) * shape.n_tokens * shape.n_classes


def dense_estimate(shape: Shape) -> Estimate:
    """Return the cost of torch.nn.functional.cross_entropy(hidden @ weight.T, labels).

    At the peak three tensors of (N, C) are alive: the log-softmax, its gradient, and the gradient
    of the logits. The last is still there while the gradients of states and table are made.
    """
    n_tokens, n_classes = shape.n_tokens, shape.n_classes
    logits = n_tokens * n_classes * shape.item
    wanted = shape.weights + shape.wants_hidden * n_tokens * shape.width
    terms = {
        "gradients": wanted * shape.item,
        "tile": logits,
        "skips": 0,
        "plan": 0,
        "tokens": n_tokens * 2 * shape.item,
        "search": 3 * logits,
        "libraries": LIBRARY_BYTES.get(shape.device.type, 0),
    }
    products = 1 + shape.wants_hidden + (shape.weights > 0)
    flops = products * 2 * n_tokens * n_classes * shape.width
    return Estimate(terms, _peak(terms), flops, n_classes)


def topk_bytes(shape: Shape, n_queries: int, k: int, n_rows: int, tile_bytes: int) -> int:
    """Return the peak bytes of ops.topk.streamed_topk.

    Args:
        shape: of the problem.
        n_queries: hidden states that are searched for.
        k: rows asked for.
        n_rows: rows that are searched.
        tile_bytes: bytes of a tile.
    """
    found = shape.wide + _INT64  # score and id
    block = min(n_queries, _QUERIES)
    if shape.is_native and serves_search(block, n_rows, k, tile_bytes):
        capacity = hit_capacity(n_rows, k)
        sample = min(8192, n_rows // 16) * (2 * block + shape.width) * shape.wide
        # A hit as it is found takes 16 bytes, in lists that double.
        found_bytes = block * (capacity * found + k * found) + 16 * block * capacity
        return 2 * n_queries * k * found + max(sample, found_bytes)
    # A block's best, hits not yet sorted in, the union of the two, and the best of that; or all
    # results twice, while those of the blocks are joined.
    buffers = k * found * max((n_queries - block) + block * (1 + 1 + 2 + 1), 2 * n_queries)
    # Not in whole rows, so that a byte more of a tile is a few bytes more here.
    step = min(max(tile_bytes / (4 * (block + shape.width)), MIN_TILE_SIDE), n_rows)
    # Two tiles of scores, a byte a score for hits.
    return buffers + int(step * (block * (2 * shape.wide + 1) + 2 * shape.width * shape.wide))


def hash_bytes(shape: Shape, n_vectors: int, n_directions: int, tile_bytes: int) -> int:
    """Return the peak bytes of ops.lsh: bucket, stable sort and places of `n_vectors` vectors."""
    directions = 2 * (n_directions + 32) * shape.width * shape.wide  # drawn, and in whole lanes
    tile = min(tile_bytes, 8 * n_vectors * (n_directions + 32 + shape.width))
    if shape.is_native:
        tile = 0
    # Buckets, their order as int64 and int32, places.
    return directions + tile + n_vectors * (2 * _INT64 + 3 * _INT32)
