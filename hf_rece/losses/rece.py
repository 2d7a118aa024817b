"""RECE, reduced cross-entropy: the softmax over the classes that hashing brings near."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.checks import check_at_least
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
    n_extra_chunks: int = field(
        default=1,
        metadata={"help": "Neighbouring chunks met on each side. Cost grows with 1 + 2 x."},
    )
    n_rounds: int = field(
        default=2,
        metadata={"help": "Independent rounds. More rounds come closer to the exact loss."},
    )

    def __post_init__(self) -> None:
        if self.n_buckets is not None:
            check_at_least("n_buckets", self.n_buckets, 1)
        check_at_least("buckets_per_chunk", self.buckets_per_chunk, 1)
        check_at_least("n_extra_chunks", self.n_extra_chunks, 0)
        check_at_least("n_rounds", self.n_rounds, 1)


def rece_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_buckets: int | None = None,
    buckets_per_chunk: int = 1,
    n_extra_chunks: int = 1,
    n_rounds: int = 2,
    directions: Tensor | None = None,
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
    config = RECEConfig(
        n_buckets=n_buckets,
        buckets_per_chunk=buckets_per_chunk,
        n_extra_chunks=n_extra_chunks,
        n_rounds=n_rounds,
    )
    options = Options(**common)
    check_sparse_grad("rece", options)
    problem = prepare(hidden, weight, labels, options)
    if directions is None:
        n_buckets = n_buckets_for(config, len(problem.labels), problem.rows.n_rows)
        directions = torch.stack(
            [
                random_directions(n_buckets, problem.hidden, options.generator)
                for _ in range(n_rounds)
            ]
        )
    elif directions.dim() != 3 or directions.shape[2] != problem.rows.width:
        raise ArgumentError(
            "directions",
            tuple(directions.shape),
            f"the hidden states are {problem.rows.width} wide",
            f"Pass a tensor of shape (n_rounds, n_buckets, {problem.rows.width})",
        )
    plan = rece_plan(
        problem.hidden,
        problem.rows,
        problem.labels,
        directions,
        n_chunks=max(1, directions.shape[1] // buckets_per_chunk),
        n_extra_chunks=n_extra_chunks,
        excluded_ids=problem.excluded_ids,
        tile_bytes=problem.tile_bytes,
    )
    label_logits, others = problem.stream(plan)
    return problem.reduce(softmax_loss(label_logits, others))


def n_buckets_for(config: RECEConfig, n_tokens: int, n_classes: int) -> int:
    """Return the buckets that N tokens and C classes get: given or balanced, then clamped."""
    smaller = max(1, min(n_tokens, n_classes))
    n_buckets = config.n_buckets
    if n_buckets is None:
        window = 1 + 2 * config.n_extra_chunks
        n_buckets = math.isqrt(4 * config.buckets_per_chunk * window * smaller)
    return min(n_buckets, smaller)
