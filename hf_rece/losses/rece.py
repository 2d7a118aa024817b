"""RECE, reduced cross-entropy: the softmax over the classes that hashing brings near."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.budget import MEMORY_BUDGET, Choice, Levels, check_budget, choose
from hf_rece.losses.checks import check_at_least
from hf_rece.losses.estimates import Estimate, Pairs, Shape, estimate, hash_bytes
from hf_rece.losses.options import (
    CommonOptions,
    Options,
    check_sparse_grad,
    prepare,
    softmax_loss,
)
from hf_rece.ops.lsh import random_directions
from hf_rece.ops.plans.rece import rece_plan
from hf_rece.ops.rows import OutputRows


@dataclass(frozen=True, slots=True, kw_only=True)
class RECEConfig:
    """Knobs of RECE; candidates a token: about n_rounds (1 + 2 n_extra_chunks) C / n_chunks."""

    n_buckets: int | None = field(
        default=None,
        metadata={
            "help": "Random directions a round. More mean fewer candidates and less memory. "
            "None: floor(sqrt(4 buckets_per_chunk (1 + 2 n_extra_chunks) min(C, N)))."
        },
    )
    buckets_per_chunk: int = field(
        default=1, metadata={"help": "n_chunks = n_buckets // buckets_per_chunk."}
    )
    n_extra_chunks: int | None = field(
        default=None,
        metadata={
            "help": "Neighbouring chunks met on each side. Cost grows with 1 + 2 x. None: 1, or "
            "what memory_budget allows."
        },
    )
    n_rounds: int = field(
        default=2,
        metadata={"help": "Independent rounds. More rounds come closer to the exact loss."},
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        if self.n_buckets is not None:
            check_at_least("n_buckets", self.n_buckets, 1)
        check_at_least("buckets_per_chunk", self.buckets_per_chunk, 1)
        if self.n_extra_chunks is not None:
            check_at_least("n_extra_chunks", self.n_extra_chunks, 0)
        check_at_least("n_rounds", self.n_rounds, 1)
        check_budget(self.memory_budget)


def rece_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_buckets: int | None = None,
    buckets_per_chunk: int = 1,
    n_extra_chunks: int | None = None,
    n_rounds: int = 2,
    directions: Tensor | None = None,
    memory_budget: int | str | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the cross-entropy over each token's label and its candidates, in nats.

        loss_i = log(exp(l_iy) + sum over j in A_i of exp(l_ij)) - l_iy

    A_i holds the classes whose chunk is near the token's in some round, each once, without the
    label. In a round, tokens and classes are sorted by argmax over b of <directions[b], vector> and
    cut into n_chunks chunks.

    Equals cross_entropy_loss with n_buckets=1. Is a lower bound of it otherwise, so it is no
    likelihood, and values under different knobs do not compare.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned.
        n_buckets: see RECEConfig; clamped to min(N, C).
        buckets_per_chunk: see RECEConfig.
        n_extra_chunks: see RECEConfig.
        n_rounds: see RECEConfig.
        directions: (n_rounds, n_buckets, D) to use instead of drawing; sets both numbers.
        memory_budget: bytes, or text such as "2GiB"; None for none. It raises n_extra_chunks, or
            lowers n_buckets where that alone is free. See hf_rece.losses.budget.choose.
        **common: see hf_rece.losses.options.CommonOptions.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for knobs out of range, and as cross_entropy_loss.

    Memory:
        The gradients, O(n_rounds (N + C)) integers, and one tile.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> round(rece_loss(hidden, weight, labels, n_buckets=1).item(), 4)
        0.5514

    Reference:
        Gusak, Mezentsev, Oseledets, Frolov, 2024, arXiv 2408.02354. The published program pads the
        table to a multiple of n_buckets and counts each duplicate by sorting candidates; here
        chunks may be ragged, and the first round that finds a pair keeps it. Values are the same.
    """
    options = Options(**common)
    check_sparse_grad("rece", options)
    problem = prepare(hidden, weight, labels, options)
    if directions is not None:
        _check_directions(directions, problem.rows.width)
        n_rounds, n_buckets = directions.shape[:2]
    config = RECEConfig(
        n_buckets=n_buckets,
        buckets_per_chunk=buckets_per_chunk,
        n_extra_chunks=n_extra_chunks,
        n_rounds=n_rounds,
        memory_budget=memory_budget,
    )
    choice = choose_rece(config, problem.cost_shape(memory_budget), options.tile_bytes)
    n_buckets = n_buckets_for(choice.config, len(problem.labels), problem.rows.n_rows)
    if directions is None:
        with problem.draws():
            drawn = [
                random_directions(n_buckets, problem.hidden, options.generator)
                for _ in range(n_rounds)
            ]
        directions = torch.stack(drawn)
    n_chunks = max(1, directions.shape[1] // buckets_per_chunk)
    plan = rece_plan(
        problem.hidden,
        problem.rows,
        problem.labels,
        # One chunk holds all pairs: more rounds would find none.
        directions if n_chunks > 1 else directions[:1],
        n_chunks=n_chunks,
        n_extra_chunks=min(choice.config.n_extra_chunks or 0, n_chunks - 1),
        excluded_ids=problem.excluded_ids,
        tile_bytes=choice.tile_bytes,
    )
    label_logits, others = problem.stream(plan)
    return problem.reduce(softmax_loss(label_logits, others))


def _check_directions(directions: Tensor, width: int) -> None:
    if directions.dim() != 3 or directions.shape[2] != width:
        raise ArgumentError(
            "directions",
            tuple(directions.shape),
            f"the hidden states are {width} wide",
            f"Pass a tensor of shape (n_rounds, n_buckets, {width})",
        )


def n_buckets_for(config: RECEConfig, n_tokens: int, n_classes: int) -> int:
    """Return the buckets that N tokens and C classes get: given or balanced, then clamped."""
    smaller = max(1, min(n_tokens, n_classes))
    n_buckets = config.n_buckets
    if n_buckets is None:
        window = 1 + 2 * (1 if config.n_extra_chunks is None else config.n_extra_chunks)
        n_buckets = math.isqrt(4 * config.buckets_per_chunk * window * smaller)
    return min(n_buckets, smaller)


def choose_rece(
    config: RECEConfig, shape: Shape, tile_bytes: int | None = None
) -> Choice[RECEConfig]:
    """Return the knobs and tile that the budget allows, and what the loss costs with them."""
    n_buckets = n_buckets_for(config, shape.n_tokens, shape.n_classes)
    reach = 1 if config.n_extra_chunks is None else config.n_extra_chunks
    default = replace(config, n_buckets=n_buckets, n_extra_chunks=reach)

    def config_of(level: int) -> RECEConfig:
        if config.n_extra_chunks is None:
            return replace(default, n_extra_chunks=level)
        return replace(default, n_buckets=n_buckets - level)

    # As many pairs as there are, however many rounds meet them.
    if config.n_extra_chunks is None:
        top = (n_buckets // config.buckets_per_chunk // config.n_rounds - 1) // 2
    elif config.n_buckets is None:
        top = n_buckets - config.buckets_per_chunk * config.n_rounds * (1 + 2 * reach)
    else:
        top = 0
    levels = Levels(max(0, top), config_of, lambda knobs, tile: _cost(knobs, shape, tile))
    return choose(levels, default, shape, config.memory_budget, tile_bytes)


def _cost(config: RECEConfig, shape: Shape, tile_bytes: int) -> Estimate:
    """Return what RECE costs with knobs that are all set."""
    n_tokens, n_classes, n_buckets = shape.n_tokens, shape.n_classes, config.n_buckets or 1
    n_chunks = max(1, n_buckets // config.buckets_per_chunk)
    n_rounds = config.n_rounds if n_chunks > 1 else 1
    reach = min(config.n_extra_chunks or 0, n_chunks - 1)
    window, size = 1 + 2 * reach, -(-n_tokens // n_chunks)
    tokens, classes = window * size, -(-n_classes // n_chunks)
    numbers = 2 if n_chunks < 2**15 else 4  # bytes of a chunk's number
    # Windows are overlapping views of one order of the tokens, padded at both ends.
    table = 4 * ((n_chunks + 2 * reach) * size + n_chunks * classes)
    earlier = (n_rounds - 1) * (n_tokens + n_classes) * numbers
    skips = (n_rounds - 1) * n_tokens * 24  # of the rounds that are not being walked
    directions = (config.n_rounds - 1) * n_buckets * shape.width * shape.wide
    hashing = max(hash_bytes(shape, n, n_buckets, tile_bytes) for n in (n_tokens, n_classes))
    return estimate(
        shape,
        [Pairs(n_chunks, tokens, classes, has_drops=n_rounds > 1)] * n_rounds,
        tile_bytes,
        plan=n_rounds * table + earlier + skips,
        n_skips=n_tokens,  # a label that is met
        search=directions + hashing + table,
        search_flops=n_rounds * 2 * shape.width * n_buckets * (n_tokens + n_classes),
        candidates=n_rounds * window * classes,
    )
