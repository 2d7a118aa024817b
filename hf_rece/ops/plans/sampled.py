"""Sampled losses: tokens meet random classes, shared by the batch or drawn for each sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops.plan import Grid, Merge, Plan, one_group

Sampler = Literal["uniform", "log_uniform", "in_batch"]
SharedBy = Literal["batch", "sequence"]


@dataclass(frozen=True)
class Negatives:
    """Drawn classes and what they stand for.

    Args:
        classes: (G, K) int64.
        log_weight: (G, K) or None for weight 1.
    """

    classes: Tensor
    log_weight: Tensor | None


@torch.no_grad()
def sampled_plan(
    labels: Tensor,
    n_classes: int,
    negatives: Negatives,
    *,
    sequence_ids: Tensor | None,
    merge: Merge,
    tile_bytes: int,
) -> Plan:
    """Return the plan in which each token meets the negatives of its batch, or of its sequence.

    Args:
        labels: (N,) int64.
        n_classes: C.
        negatives: one row for the batch, or one for each of G sequences.
        sequence_ids: (N,) int64 in [0, G), not decreasing; None if the batch shares its negatives.
        merge: "logaddexp" for a softmax, "sum" for a binary link.
        tile_bytes: bytes of a tile.
    """
    n_tokens = len(labels)
    grid = Grid(
        tokens=_sequence_table(sequence_ids, len(negatives.classes), n_tokens, labels.device),
        classes=negatives.classes.to(torch.int32),
        own_labels=torch.cat([labels, labels.new_full((1,), n_classes)]),
        class_log_weight=negatives.log_weight,
    )
    return Plan((grid,), merge, n_tokens, n_classes, tile_bytes)


def _sequence_table(
    sequence_ids: Tensor | None, n_sequences: int, n_tokens: int, device: torch.device
) -> Tensor:
    """Return (G, n) int32, the tokens of each sequence, padded with N."""
    if sequence_ids is None or n_tokens == 0:
        return one_group(n_tokens, device)
    tokens = torch.arange(n_tokens, dtype=torch.int32, device=device)
    lengths = torch.bincount(sequence_ids, minlength=n_sequences)
    first = lengths.cumsum(0) - lengths
    table = tokens.new_full((n_sequences, int(lengths.max())), n_tokens)
    table[sequence_ids, tokens - first[sequence_ids]] = tokens
    return table


@torch.no_grad()
def draw_negatives(
    labels: Tensor,
    n_classes: int,
    *,
    n_negatives: int,
    sampler: Sampler,
    n_draws: int,
    logq: bool,
    excluded_ids: Tensor | None,
    generator: torch.Generator | None,
) -> Negatives:
    """Draw n_draws rows of negatives.

    Args:
        labels: (N,) int64; "in_batch" draws from these.
        n_classes: C.
        n_negatives: K.
        sampler: "uniform" over the classes; "log_uniform", P(rank r) proportional to
            log((r + 2) / (r + 1)), for classes numbered by falling popularity; "in_batch", the
            labels of K random tokens, each class once with the weight of its occurrences. The first
            two draw with replacement.
        n_draws: rows to draw; 1 for "in_batch".
        logq: weigh a class drawn with probability q by 1 / (K q), so that the negatives stand for
            all classes.
        excluded_ids: (E,) int64 classes that are never drawn.
        generator: of the draws.

    Raises:
        ArgumentError: if every class is excluded.
    """
    if sampler == "in_batch":
        return _in_batch(labels, n_negatives, logq, generator)
    excluded = labels.new_empty(0) if excluded_ids is None else torch.unique(excluded_ids)
    n_allowed = n_classes - len(excluded)
    if n_allowed == 0:
        raise ArgumentError(
            "excluded_ids", n_classes, "every class is excluded", "Leave classes to draw from"
        )
    shape = (n_draws, n_negatives)
    if sampler == "uniform":
        ranks = torch.randint(n_allowed, shape, device=labels.device, generator=generator)
        log_q = torch.full(shape, -math.log(n_allowed), device=labels.device)
    else:
        uniform = torch.rand(shape, dtype=torch.float64, device=labels.device, generator=generator)
        # Inverse of the distribution function log(r + 2) / log(n + 1).
        ranks = (uniform * math.log(n_allowed + 1)).exp_().long().sub_(1).clamp_(0, n_allowed - 1)
        log_q = ((ranks + 2) / (ranks + 1)).log().div_(math.log(n_allowed + 1)).log_()
    # The k-th excluded class pushes on by one all ranks from its own, less the k before it.
    pushed = excluded - torch.arange(len(excluded), device=labels.device)
    classes = ranks + torch.searchsorted(pushed, ranks, right=True)
    return Negatives(classes, -math.log(n_negatives) - log_q if logq else None)


def _in_batch(
    labels: Tensor, n_negatives: int, logq: bool, generator: torch.Generator | None
) -> Negatives:
    drawn = torch.randperm(len(labels), device=labels.device, generator=generator)[:n_negatives]
    classes, n_drawn = torch.unique(labels[drawn], return_counts=True)
    weight = n_drawn.float()
    if logq:
        everything, n_occurrences = torch.unique(labels, return_counts=True)
        share = n_occurrences[torch.searchsorted(everything, classes)] / len(labels)
        weight = weight / (len(drawn) * share)
    return Negatives(classes.unsqueeze(0), weight.log().unsqueeze(0))
