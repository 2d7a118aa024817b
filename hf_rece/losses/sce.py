"""SCE, scalable cross-entropy: the softmax inside buckets of top tokens and top classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.budget import MEMORY_BUDGET, Choice, Levels, check_budget, choose
from hf_rece.losses.checks import check_at_least, check_flag
from hf_rece.losses.estimates import Estimate, Pairs, Shape, estimate, topk_bytes
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
    bucket_size_y: int | None = field(
        default=None,
        metadata={
            "help": "Classes a bucket: the candidates that a token meets. None: 256, or what "
            "memory_budget allows."
        },
    )
    mix: bool = field(
        default=True,
        metadata={"help": "Centres are random mixtures of the batch's states, not random vectors."},
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        check_flag("mix", self.mix)
        for name in ("n_buckets", "bucket_size_x", "bucket_size_y"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        check_budget(self.memory_budget)


def sce_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_buckets: int | None = None,
    bucket_size_x: int | None = None,
    bucket_size_y: int | None = None,
    mix: bool = True,
    directions: Tensor | None = None,
    memory_budget: int | str | None = None,
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
        memory_budget: bytes, or text such as "2GiB"; None for none. It raises bucket_size_y, or
            n_buckets where that alone is free. See hf_rece.losses.budget.choose.
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
    options = Options(**common)
    problem = prepare(hidden, weight, labels, options)
    if directions is not None:
        if directions.dim() != 2 or directions.shape[1] != problem.rows.width:
            raise ArgumentError(
                "directions",
                tuple(directions.shape),
                f"the hidden states are {problem.rows.width} wide",
                f"Pass a tensor of shape (n_buckets, {problem.rows.width})",
            )
        n_buckets = len(directions)
    config = SCEConfig(
        n_buckets=n_buckets,
        bucket_size_x=bucket_size_x,
        bucket_size_y=bucket_size_y,
        mix=mix,
        memory_budget=memory_budget,
    )
    choice = choose_sce(config, problem.cost_shape(memory_budget), options.tile_bytes)
    knobs, n_tokens = choice.config, len(problem.labels)
    if directions is None:
        with problem.draws():
            directions = _directions(knobs, problem)
    plan = sce_plan(
        problem.hidden,
        problem.rows,
        problem.labels,
        directions.detach(),
        bucket_size_x=max(1, min(knobs.bucket_size_x or 1, n_tokens)),
        bucket_size_y=min(knobs.bucket_size_y or 1, problem.rows.n_rows),
        excluded_ids=problem.excluded_ids,
        tile_bytes=choice.tile_bytes,
    )
    label_logits, others = problem.stream(plan)
    losses = softmax_loss(label_logits, others)
    return problem.reduce(losses, counted=(losses.detach() != 0).sum())


def balanced_size(n_tokens: int) -> int:
    """Return floor(2 sqrt(N)), at least 1: with as many buckets, a token lies in 4 on average."""
    return max(1, math.isqrt(4 * n_tokens))


@torch.no_grad()
def _directions(config: SCEConfig, problem: Problem) -> Tensor:
    n_buckets = config.n_buckets or 1
    generator = problem.options.generator
    if config.mix:
        return mixed_directions(n_buckets, problem.hidden, generator)
    return random_directions(n_buckets, problem.hidden, generator)


def choose_sce(config: SCEConfig, shape: Shape, tile_bytes: int | None = None) -> Choice[SCEConfig]:
    """Return the knobs and tile that the budget allows, and what the loss costs with them."""
    n_tokens, n_classes = shape.n_tokens, shape.n_classes
    size_x = max(1, min(config.bucket_size_x or balanced_size(n_tokens), n_tokens))
    default = replace(
        config,
        n_buckets=config.n_buckets or balanced_size(n_tokens),
        bucket_size_x=size_x,
        bucket_size_y=min(config.bucket_size_y or 256, n_classes),
    )

    def config_of(level: int) -> SCEConfig:
        if config.bucket_size_y is None:
            return replace(default, bucket_size_y=level + 1)
        return replace(default, n_buckets=level + 1) if config.n_buckets is None else default

    # As many pairs as there are, however many buckets meet them.
    if config.bucket_size_y is None:
        top = min(n_tokens * n_classes // ((default.n_buckets or 1) * size_x), n_classes)
    elif config.n_buckets is None:
        top = n_tokens * n_classes // (size_x * (default.bucket_size_y or 1))
    else:
        top = 1
    levels = Levels(max(0, top - 1), config_of, lambda knobs, tile: _cost(knobs, shape, tile))
    return choose(levels, default, shape, config.memory_budget, tile_bytes)


def _cost(config: SCEConfig, shape: Shape, tile_bytes: int) -> Estimate:
    """Return what SCE costs with knobs that are all set."""
    n_tokens, n_classes, width = shape.n_tokens, shape.n_classes, shape.width
    n_buckets, size_x, size_y = (
        knob or 1 for knob in (config.n_buckets, config.bucket_size_x, config.bucket_size_y)
    )
    size_x, size_y = max(1, min(size_x, n_tokens)), min(size_y, n_classes)
    members = n_buckets * size_x
    directions = n_buckets * (width + config.mix * 1024) * shape.wide  # mixed 1024 states at once
    search = max(
        topk_bytes(shape, n_buckets, size_x, n_tokens, tile_bytes),
        members * 12 + topk_bytes(shape, n_buckets, size_y, n_classes, tile_bytes),
    )
    return estimate(
        shape,
        [Pairs(n_buckets, size_x, size_y, has_drops=True, whole_rows=True)],
        tile_bytes,
        # Tokens and classes of each bucket, tokens that it won, each token's label and winner.
        plan=4 * (members + n_buckets * size_y) + 8 * members + 16 * n_tokens,
        search=directions + search,
        # Tokens of each bucket, whether it won them, and the winners sorted to the front.
        walk=members * 25,
        search_flops=2 * width * n_buckets * ((1 + config.mix) * n_tokens + n_classes),
        candidates=size_y,
    )
