"""Exact cross-entropy, streamed: log(sum over j of exp(l_j)) - l_y without an (N, C) tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor
from typing_extensions import Unpack

from hf_rece.losses.budget import MEMORY_BUDGET, Choice, Levels, check_budget, choose
from hf_rece.losses.estimates import Estimate, Pairs, Shape, estimate
from hf_rece.losses.options import (
    CommonOptions,
    Options,
    check_sparse_grad,
    prepare,
    softmax_loss,
)
from hf_rece.losses.separable import separable_losses
from hf_rece.ops.plans.exhaustive import exhaustive_plan
from hf_rece.ops.rows import OutputRows


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropyConfig:
    """Exact cross-entropy has no knobs but its memory."""

    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        check_budget(self.memory_budget)


def cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    memory_budget: int | str | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the exact cross-entropy over all classes, in nats.

        loss_i = log(sum over classes j of exp(l_ij)) - l_iy,    l_ij = <h_i, w_j> + b_j

    Equals `torch.nn.functional.cross_entropy(hidden @ weight.T, labels)`.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned: no shift is applied.
        memory_budget: bytes, or text such as "2GiB"; None for none. See hf_rece.losses.budget.
        **common: see hf_rece.losses.options.CommonOptions.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for inputs that disagree in shape, labels out of range or excluded, NaN
            states.

    Rows that are sums over the digits of their ids (CompositionalEmbedding with "add" or "concat")
    are normalised digit by digit, where that is less work; see hf_rece.losses.separable.

    Memory:
        The gradients, O(N + C), and one tile.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(3), torch.eye(3)
        >>> round(cross_entropy_loss(hidden, weight, torch.arange(3)).item(), 4)
        0.5514
    """
    config = CrossEntropyConfig(memory_budget=memory_budget)
    options = Options(**common)
    check_sparse_grad("cross_entropy", options)
    problem = prepare(hidden, weight, labels, options)
    choice = choose_cross_entropy(config, problem.cost_shape(memory_budget), options.tile_bytes)
    problem = replace(problem, tile_bytes=choice.tile_bytes)
    losses = separable_losses(problem)
    if losses is not None:
        return problem.reduce(losses)
    plan = exhaustive_plan(
        problem.labels,
        problem.rows.n_rows,
        excluded_ids=problem.excluded_ids,
        tile_bytes=problem.tile_bytes,
    )
    label_logits, others = problem.stream(plan)
    return problem.reduce(softmax_loss(label_logits, others))


def choose_cross_entropy(
    config: CrossEntropyConfig, shape: Shape, tile_bytes: int | None = None
) -> Choice[CrossEntropyConfig]:
    """Return the tile that the budget allows, and what the loss costs."""

    def cost(_: CrossEntropyConfig, tile: int) -> Estimate:
        n_tokens, n_classes = shape.n_tokens, shape.n_classes
        return estimate(
            shape,
            [Pairs(1, n_tokens, n_classes, as_slices=True)],
            tile,
            plan=4 * n_tokens,
            n_skips=n_tokens,  # each token's own label
            candidates=n_classes,
        )

    # Rows are read in place: what that saves goes into a larger tile, which is faster.
    levels = Levels(top=0, config=lambda _: config, estimate=cost, default_tiles=2)
    return choose(levels, config, shape, config.memory_budget, tile_bytes)
