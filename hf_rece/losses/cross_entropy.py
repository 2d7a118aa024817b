"""Exact cross-entropy, streamed: log(sum over j of exp(l_j)) - l_y without an (N, C) tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

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
    """Exact cross-entropy has no knobs."""


def cross_entropy_loss(
    hidden: Tensor, weight: Tensor | OutputRows, labels: Tensor, **common: Unpack[CommonOptions]
) -> Tensor:
    """Return the exact cross-entropy over all classes, in nats.

        loss_i = log(sum over classes j of exp(l_ij)) - l_iy,    l_ij = <h_i, w_j> + b_j

    Equals `torch.nn.functional.cross_entropy(hidden @ weight.T, labels)`.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned: no shift is applied.
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
    options = Options(**common)
    check_sparse_grad("cross_entropy", options)
    problem = prepare(hidden, weight, labels, options)
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
