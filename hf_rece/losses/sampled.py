"""Losses over drawn negatives: sampled softmax, binary cross-entropy and its generalisation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.budget import MEMORY_BUDGET, Choice, Levels, check_budget, choose
from hf_rece.losses.checks import check_at_least, check_choice, check_flag
from hf_rece.losses.estimates import Estimate, Pairs, Shape, estimate
from hf_rece.losses.options import CommonOptions, Options, Problem, prepare, softmax_loss
from hf_rece.ops.plan import Merge
from hf_rece.ops.plans.sampled import Sampler, SharedBy, draw_negatives, sampled_plan
from hf_rece.ops.rows import OutputRows

_N_NEGATIVES = {"help": "Negatives a token meets."}
_SAMPLER = {
    "help": "uniform; log_uniform, for classes numbered by popularity; in_batch, other tokens' "
    "labels (softmax only)."
}
_SHARED_BY = {
    "help": "batch: all tokens meet the same negatives; sequence: each row draws its own."
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSoftmaxConfig:
    """Knobs of the sampled softmax."""

    n_negatives: int = field(default=256, metadata=_N_NEGATIVES)
    sampler: Sampler = field(default="uniform", metadata=_SAMPLER)
    shared_by: SharedBy = field(default="batch", metadata=_SHARED_BY)
    logq: bool = field(
        default=False,
        metadata={"help": "Weigh negatives by 1 / (K q), so that they stand for all classes."},
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        check_budget(self.memory_budget)
        check_flag("logq", self.logq)
        _check_sampling(self.n_negatives, self.sampler, self.shared_by, get_args(Sampler))
        if self.sampler == "in_batch" and self.shared_by == "sequence":
            raise ArgumentError(
                "shared_by",
                self.shared_by,
                "in-batch negatives are the batch's",
                'Pass shared_by="batch"',
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BCEConfig:
    """Knobs of the binary cross-entropy."""

    n_negatives: int = field(default=1, metadata=_N_NEGATIVES)
    sampler: Sampler = field(default="uniform", metadata=_SAMPLER)
    shared_by: SharedBy = field(default="batch", metadata=_SHARED_BY)
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        check_budget(self.memory_budget)
        _check_sampling(self.n_negatives, self.sampler, self.shared_by, ("uniform", "log_uniform"))


@dataclass(frozen=True, slots=True, kw_only=True)
class GBCEConfig:
    """Knobs of the generalised binary cross-entropy."""

    n_negatives: int = field(default=256, metadata=_N_NEGATIVES)
    sampler: Sampler = field(default="uniform", metadata=_SAMPLER)
    shared_by: SharedBy = field(default="batch", metadata=_SHARED_BY)
    t: float = field(
        default=0.75,
        metadata={
            "help": "Calibration, 0 to 1: 0 is BCE, 1 undoes the overconfidence of sampling."
        },
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)

    def __post_init__(self) -> None:
        check_budget(self.memory_budget)
        _check_sampling(self.n_negatives, self.sampler, self.shared_by, ("uniform", "log_uniform"))
        if not isinstance(self.t, int | float) or not 0 <= self.t <= 1:
            raise ArgumentError("t", self.t, "out of range", "Pass a number from 0 to 1")


Sampled = TypeVar("Sampled", bound=SampledSoftmaxConfig | BCEConfig | GBCEConfig)


def sampled_softmax_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_negatives: int = 256,
    sampler: Sampler = "uniform",
    shared_by: SharedBy = "batch",
    logq: bool = False,
    memory_budget: int | str | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the cross-entropy over each token's label and its drawn negatives, in nats.

        loss_i = log(exp(l_iy) + sum over draws k, j_k != y, of exp(l_ij_k) / (K q_j_k)) - l_iy

    Without logq, each draw has weight 1. Draws that hit the label are dropped.

    With logq, the sum of exponentials is an unbiased estimate of that of the exact loss. Without,
    it is no likelihood, and values under different knobs do not compare.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned; (B, T) for shared_by="sequence".
        n_negatives: see SampledSoftmaxConfig.
        sampler: see SampledSoftmaxConfig.
        shared_by: see SampledSoftmaxConfig.
        logq: see SampledSoftmaxConfig.
        memory_budget: bytes, or text such as "2GiB"; None for none. See hf_rece.losses.budget.
        **common: see hf_rece.losses.options.CommonOptions.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for knobs out of range, and as cross_entropy_loss.

    Memory:
        The gradients, O(N + K) integers (O(N + B K) by sequence), and one tile.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.zeros(4, 3), torch.eye(9, 3), torch.arange(4)
        >>> loss = sampled_softmax_loss(hidden, weight, labels, sampler="in_batch")
        >>> round(loss.item(), 4)  # log(4): the label and three others, all with logit 0
        1.3863

    Reference:
        Bengio and Senecal, 2008, "Adaptive importance sampling to accelerate training of a neural
        probabilistic language model", equation 10; without logq the negatives-only variant of
        Klenitskiy and Vasilev, 2023, arXiv 2309.07602.
    """
    config = SampledSoftmaxConfig(
        n_negatives=n_negatives,
        sampler=sampler,
        shared_by=shared_by,
        logq=logq,
        memory_budget=memory_budget,
    )
    problem = prepare(hidden, weight, labels, Options(**common))
    label_logits, others = _stream_negatives(problem, config, "logaddexp")
    return problem.reduce(softmax_loss(label_logits, others))


def bce_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_negatives: int = 1,
    sampler: Sampler = "uniform",
    shared_by: SharedBy = "batch",
    memory_budget: int | str | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the binary cross-entropy of label against negatives, averaged, in nats.

        loss_i = -(log sigma(l_iy) + sum over draws k of log(1 - sigma(l_ij_k))) / (K + 1)

    Draws that hit the label are dropped from the sum. Is no likelihood over the classes.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned; (B, T) for shared_by="sequence".
        n_negatives: see BCEConfig.
        sampler: see BCEConfig.
        shared_by: see BCEConfig.
        memory_budget: bytes, or text such as "2GiB"; None for none. See hf_rece.losses.budget.
        **common: see hf_rece.losses.options.CommonOptions.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for knobs out of range, and as cross_entropy_loss.

    Memory:
        The gradients, O(N + K) integers (O(N + B K) by sequence), and one tile.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.zeros(2, 3), torch.ones(100_000, 3), torch.arange(2)
        >>> round(bce_loss(hidden, weight, labels).item(), 4)  # log(2)
        0.6931

    Reference:
        Kang and McAuley, 2018, arXiv 1808.09781, equation 7, there with one negative.
    """
    config = BCEConfig(
        n_negatives=n_negatives,
        sampler=sampler,
        shared_by=shared_by,
        memory_budget=memory_budget,
    )
    problem = prepare(hidden, weight, labels, Options(**common))
    label_logits, others = _stream_negatives(problem, config, "sum")
    return problem.reduce((F.softplus(-label_logits) + others) / (n_negatives + 1))


def gbce_loss(
    hidden: Tensor,
    weight: Tensor | OutputRows,
    labels: Tensor,
    *,
    n_negatives: int = 256,
    sampler: Sampler = "uniform",
    shared_by: SharedBy = "batch",
    t: float = 0.75,
    memory_budget: int | str | None = None,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Return the generalised binary cross-entropy, in nats.

        loss_i = -(log sigma(l_iy)^beta + sum over draws k of log(1 - sigma(l_ij_k))) / (K + 1)
        beta = alpha (t (1 - 1 / alpha) + 1 / alpha),    alpha = K / (C - 1)

    Equals bce_loss with t=0. Is no likelihood over the classes.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: (N,) or (B, T) integers, already aligned; (B, T) for shared_by="sequence".
        n_negatives: see GBCEConfig.
        sampler: see GBCEConfig.
        shared_by: see GBCEConfig.
        t: see GBCEConfig.
        memory_budget: bytes, or text such as "2GiB"; None for none. See hf_rece.losses.budget.
        **common: see hf_rece.losses.options.CommonOptions.

    Returns:
        A scalar, or with reduction="none" a tensor of the labels' shape; float32 (float64 for
        float64 inputs).

    Raises:
        ArgumentError: for knobs out of range, and as cross_entropy_loss.

    Memory:
        The gradients, O(N + K) integers (O(N + B K) by sequence), and one tile.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.zeros(2, 3), torch.ones(100_000, 3), torch.arange(2)
        >>> round(gbce_loss(hidden, weight, labels, n_negatives=1, t=0.0).item(), 4)  # log(2)
        0.6931

    Reference:
        Petrov and Macdonald, 2023, arXiv 2308.07192, equations 13 and 14. C here leaves out the
        excluded classes.
    """
    config = GBCEConfig(
        n_negatives=n_negatives,
        sampler=sampler,
        shared_by=shared_by,
        t=t,
        memory_budget=memory_budget,
    )
    problem = prepare(hidden, weight, labels, Options(**common))
    label_logits, others = _stream_negatives(problem, config, "sum")
    n_excluded = 0 if problem.excluded_ids is None else len(problem.excluded_ids)
    alpha = n_negatives / max(problem.rows.n_rows - n_excluded - 1, 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    return problem.reduce((beta * F.softplus(-label_logits) + others) / (n_negatives + 1))


def choose_sampled(config: Sampled, shape: Shape, tile_bytes: int | None = None) -> Choice[Sampled]:
    """Return the tile that the budget allows, and what a loss over negatives costs."""

    def cost(_: Sampled, tile: int) -> Estimate:
        n_tokens, n_negatives = shape.n_tokens, config.n_negatives
        n_draws = max(1, shape.n_sequences) if config.shared_by == "sequence" else 1
        drawn = n_draws * n_negatives
        is_binary = not isinstance(config, SampledSoftmaxConfig)
        return estimate(
            replace(shape, is_native=shape.is_native and not is_binary),
            [Pairs(n_draws, -(-n_tokens // n_draws), n_negatives, has_drops=True)],
            tile,
            plan=4 * n_tokens + 8 * n_tokens + 8 * drawn,  # and labels; ids, log-weights
            search=24 * drawn,
            candidates=n_negatives,
        )

    levels = Levels(top=0, config=lambda _: config, estimate=cost)
    return choose(levels, config, shape, config.memory_budget, tile_bytes)


def _stream_negatives(
    problem: Problem, config: SampledSoftmaxConfig | BCEConfig | GBCEConfig, merge: Merge
) -> tuple[Tensor, Tensor]:
    sequence_ids, n_draws = None, 1
    if config.shared_by == "sequence":
        sequence_ids, n_draws = problem.sequence_ids()
    shape = problem.cost_shape(config.memory_budget)
    tile_bytes = choose_sampled(config, shape, problem.options.tile_bytes).tile_bytes
    with problem.draws():
        negatives = draw_negatives(
            problem.labels,
            problem.rows.n_rows,
            n_negatives=config.n_negatives,
            sampler=config.sampler,
            n_draws=n_draws,
            logq=isinstance(config, SampledSoftmaxConfig) and config.logq,
            excluded_ids=problem.excluded_ids,
            generator=problem.options.generator,
        )
    plan = sampled_plan(
        problem.labels,
        problem.rows.n_rows,
        negatives,
        sequence_ids=sequence_ids,
        merge=merge,
        tile_bytes=tile_bytes,
    )
    return problem.stream(plan)


def _check_sampling(
    n_negatives: int, sampler: str, shared_by: str, samplers: tuple[str, ...]
) -> None:
    check_at_least("n_negatives", n_negatives, 1)
    check_choice("sampler", sampler, samplers)
    check_choice("shared_by", shared_by, get_args(SharedBy))
