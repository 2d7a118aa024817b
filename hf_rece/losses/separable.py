"""Exact cross-entropy over rows that are sums of independent parts, at the cost of the parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rece.losses.options import Problem
from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.plans.exhaustive import exhaustive_plan
from hf_rece.ops.rows import DenseRows, HasSeparableRows, SeparableRows, mixed_radix_digits
from hf_rece.ops.stream import stream


def separable_losses(problem: Problem) -> Tensor | None:
    """Return the exact cross-entropy (N,); None where it is not separable, or not faster so.

    Where the logit of an id is a sum over its digits, a_t of the first and b_r of the rest, and all
    combinations of tops t and rests r are classes, the normaliser factorises:

        log(sum over t, r of exp(a_t + b_r)) = log(sum_t exp(a_t)) + log(sum_r exp(b_r))

    Tops of which some id is excluded or beyond C are left out of that and joined class by class.
    With N tokens this costs O(N D sum(radices)) in place of O(N D C).

    Reference:
        Follows from the additive form of arXiv 1909.02107, section 4.
    """
    options = problem.options
    plain = options.bias is None and options.logit_softcap is None and options.statistics is None
    if not plain or not isinstance(problem.rows, HasSeparableRows):
        return None
    parts = problem.rows.separable()
    split = None if parts is None else _split(parts, problem.excluded_ids)
    if parts is None or split is None:
        return None
    digits = mixed_radix_digits(problem.labels, parts.radices)
    label_logit = problem.hidden.new_zeros((), dtype=torch.float32)
    normaliser = label_logit
    for j, (factor, columns) in enumerate(zip(parts.factors, parts.columns, strict=True)):
        incomplete = split.incomplete_tops if j == 0 and len(split.incomplete_tops) else None
        plan = exhaustive_plan(
            digits[j], len(factor), excluded_ids=incomplete, tile_bytes=problem.tile_bytes
        )
        own, others = _stream(problem, problem.hidden[:, columns], factor, digits[j], plan)
        of_digit = torch.logaddexp(own, others)
        if incomplete is not None:
            # The labels of incomplete tops are among the classes that are joined below.
            of_digit = torch.where(torch.isin(digits[0], incomplete), others, of_digit)
        label_logit, normaliser = label_logit + own, normaliser + of_digit
    if len(split.classes):
        normaliser = torch.logaddexp(normaliser, _one_by_one(problem, split.classes))
    return normaliser - label_logit


@dataclass(frozen=True)
class _Split:
    """What does not factorise.

    Args:
        incomplete_tops: (I,) first digits of which not every combination is a class.
        classes: (M,) the classes with such a first digit.
    """

    incomplete_tops: Tensor
    classes: Tensor


def _split(parts: SeparableRows, excluded_ids: Tensor | None) -> _Split | None:
    below = math.prod(parts.radices[1:])
    n_complete = parts.n_rows // below
    device = parts.factors[0].device
    none = torch.empty(0, dtype=torch.long, device=device)
    excluded = none if excluded_ids is None else excluded_ids
    last = torch.arange(n_complete, parts.radices[0], device=device)  # incomplete, or beyond C
    tops = torch.unique(torch.cat([excluded // below, last]))
    classes = (tops.unsqueeze(1) * below + torch.arange(below, device=device)).view(-1)
    classes = classes[(classes < parts.n_rows) & ~torch.isin(classes, excluded)]
    if len(tops) == parts.radices[0] or sum(parts.radices) + len(classes) >= parts.n_rows:
        return None
    return _Split(tops, classes)


def _one_by_one(problem: Problem, classes: Tensor) -> Tensor:
    """Return (N,) log-sum-exp over these classes (M,), the label among them."""
    tokens = torch.arange(len(problem.labels), dtype=torch.int32, device=classes.device)
    grid = Grid(tokens=tokens.unsqueeze(0), classes=classes.unsqueeze(0))
    plan = Plan((grid,), "logaddexp", len(tokens), problem.rows.n_rows, problem.tile_bytes)
    return problem.stream(plan)[1]


def _stream(
    problem: Problem, hidden: Tensor, factor: Tensor, labels: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    options = problem.options
    return stream(
        hidden,
        DenseRows(factor),
        labels,
        plan,
        logit_scale=options.logit_scale,
        backend=options.backend,
    )
