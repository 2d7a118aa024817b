"""SCE, scalable cross-entropy: the softmax inside buckets of top tokens and top classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.checks import check_at_least
from hf_rece.losses.options import CommonOptions, Options, Problem, prepare, softmax_loss
from hf_rece.ops.lsh import random_directions
from hf_rece.ops.plans.sce import mixed_directions, sce_plan
from hf_rece.ops.rows import OutputRows


@dataclass(frozen=True, slots=True, kw_only=True)
class SCEConfig:
    """Knobs of SCE; each token lies in n_buckets bucket_size_x / N buckets on average."""

    n_buckets: int | None = field(
        default=None,
        metadata={"help": "Buckets. More cover more tokens. None: floor(2 sqrt(N))."},
    )
    bucket_size_x: int | None = field(
        default=None,
        metadata={"help": "Tokens a bucket. More cover more tokens. None: floor(2 sqrt(N))."},
    )
    bucket_size_y: int = field(
        default=256, metadata={"help": "Classes a bucket: the candidates that a token meets."}
    )
    mix: bool = field(
        default=True,
        metadata={"help": "Centres are random mixtures of the batch's states, not random vectors."},
    )

    def __post_init__(self) -> None:
        for name in ("n_buckets", "bucket_size_x"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        check_at_least("bucket_size_y", self.bucket_size_y, 1)


def sce_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_buckets: int | None = None,
    bucket_size_x: int | None = None,
    bucket_size_y: int = 256,
    mix: bool = True,
    directions: Tensor | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the cross-entropy inside the bucket where it is largest, in nats.

        loss_i = max over buckets b of i of  log(exp(l_iy) + sum over j in b, j != y, of exp(l_ij))
        - l_iy

    Bucket b holds the bucket_size_x tokens and the bucket_size_y classes with the largest inner
    products with directions[b]. A mean counts the tokens that are in a bucket and have a loss other
    than zero; a token in no bucket has loss 0 and no gradient.

    Equals cross_entropy_loss when a bucket holds all tokens and classes. Is a lower bound of it
    otherwise, so it is no likelihood, and values under different knobs do not compare.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned.
        n_buckets: see SCEConfig.
        bucket_size_x: see SCEConfig; clamped to N.
        bucket_size_y: see SCEConfig; clamped to C.
        mix: see SCEConfig.
        directions: (n_buckets, D) to use instead of drawing; sets n_buckets.
        **common: see hf_rece.losses.options.CommonOptions. num_items_in_batch takes the place of
            the
            count of covered tokens.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for knobs out of range, and as cross_entropy_loss.

    Memory:
        The gradients, O(N + n_buckets (bucket_size_x + bucket_size_y)) integers, and one tile.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> round(sce_loss(hidden, weight, labels).item(), 4)
        0.5514

    Reference:
        Mezentsev, Gusak, Oseledets, Frolov, 2024, arXiv 2409.18721. The published program lets
        padding tokens into buckets; here only labelled tokens take part.
    """
    config = SCEConfig(
        n_buckets=n_buckets, bucket_size_x=bucket_size_x, bucket_size_y=bucket_size_y, mix=mix
    )
    problem = prepare(hidden, weight, labels, Options(**common))
    n_tokens, n_classes = len(problem.labels), problem.rows.n_rows
    if directions is None:
        directions = _directions(config, problem)
    elif directions.dim() != 2 or directions.shape[1] != problem.rows.width:
        raise ArgumentError(
            "directions",
            tuple(directions.shape),
            f"the hidden states are {problem.rows.width} wide",
            f"Pass a tensor of shape (n_buckets, {problem.rows.width})",
        )
    plan = sce_plan(
        problem.hidden,
        problem.rows,
        problem.labels,
        directions.detach(),
        bucket_size_x=max(1, min(bucket_size_x or balanced_size(n_tokens), n_tokens)),
        bucket_size_y=min(bucket_size_y, n_classes),
        excluded_ids=problem.excluded_ids,
        tile_bytes=problem.tile_bytes,
    )
    label_logits, others = problem.stream(plan)
    losses = softmax_loss(label_logits, others)
    return problem.reduce(losses, counted=(losses.detach() != 0).sum())


def balanced_size(n_tokens: int) -> int:
    """Return floor(2 sqrt(N)), at least 1: with as many buckets, a token lies in 4 on average."""
    return max(1, math.isqrt(4 * n_tokens))


@torch.no_grad()
def _directions(config: SCEConfig, problem: Problem) -> Tensor:
    n_buckets = config.n_buckets or balanced_size(len(problem.labels))
    generator = problem.options.generator
    if config.mix:
        return mixed_directions(n_buckets, problem.hidden, generator)
    return random_directions(n_buckets, problem.hidden, generator)
