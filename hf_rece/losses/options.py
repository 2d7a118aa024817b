"""The arguments that every loss takes: documented, checked and applied once."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from hf_rece.errors import ArgumentError
from hf_rece.losses.checks import check_shapes, check_values, checked_ids
from hf_rece.losses.estimates import Shape
from hf_rece.losses.option_checks import check_options
from hf_rece.ops.plan import Plan, resolve_tile_bytes
from hf_rece.ops.rows import DenseRows, OutputRows, as_output_rows
from hf_rece.ops.same_draws import same_draws
from hf_rece.ops.shards import ShardedRows, SharedTokens
from hf_rece.ops.stream import BACKENDS, Backend, TokenStatistics, stream, takes_triton
from hf_rece.ops.touched import touched_rows
from hf_rece.ops.vocab_parallel import sharded_stream

Reduction = Literal["mean", "sum", "none"]

# The others give every row a gradient.
SPARSE_GRAD_LOSSES = ("sce", "sampled_softmax", "bce", "gbce")


class CommonOptions(TypedDict, total=False):
    """Arguments that every loss takes by name.

    bias: (C,) added to the logits, or None; over ShardedRows the process's own part.
    ignore_index: label of tokens that take no part anywhere; -100 unless given.
    excluded_ids: classes that are never scored as negatives (padding, mask, reserved rows), as a
        sequence of integers or an int64 tensor.
    reduction: "mean" over labelled tokens (the default), "sum", or "none" for a loss of the labels'
        shape with 0 at ignored tokens.
    num_items_in_batch: with "mean", divide the sum by this instead of the number of labelled
        tokens; a Trainer passes the count over all micro-batches of one optimiser step.
    logit_scale: multiplies every logit.
    logit_softcap: c, caps a logit at c tanh(logit / c), after the scale.
    tile_bytes: bytes of one tile of logits; None for the device's default, or for what the loss's
        memory_budget leaves. Larger tiles are fewer.
    backend: "auto", "torch", "native" or "triton"; "auto" takes Triton's kernels on a GPU and C++
        kernels on a CPU, where they serve.
    generator: torch.Generator of the random draws, on the device of the hidden states.
    statistics: TokenStatistics to fill with the entropy and correctness of each token, or None.
    sparse_grad: give weight and bias row-sparse gradients (sparse COO tensors of the rows touched)
        in place of dense ones. For the losses that touch few rows, SPARSE_GRAD_LOSSES, of a plain
        weight that is a leaf.
    """

    bias: Tensor | None
    ignore_index: int
    excluded_ids: Tensor | list[int] | tuple[int, ...] | None
    reduction: Reduction
    num_items_in_batch: Tensor | int | None
    logit_scale: float
    logit_softcap: float | None
    tile_bytes: int | None
    backend: Backend
    generator: torch.Generator | None
    statistics: TokenStatistics | None
    sparse_grad: bool


@dataclass(frozen=True)
class Options:
    """CommonOptions with their defaults, checked."""

    bias: Tensor | None = None
    ignore_index: int = -100
    excluded_ids: Tensor | list[int] | tuple[int, ...] | None = None
    reduction: Reduction = "mean"
    num_items_in_batch: Tensor | int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tile_bytes: int | None = None
    backend: Backend = "auto"
    generator: torch.Generator | None = None
    statistics: TokenStatistics | None = None
    sparse_grad: bool = False

    def __post_init__(self) -> None:
        check_options(vars(self))
        if self.reduction not in ("mean", "sum", "none"):
            raise ArgumentError(
                "reduction", self.reduction, "no such reduction", "Pass mean, sum or none"
            )
        if self.backend not in BACKENDS:
            raise ArgumentError(
                "backend", self.backend, "no such backend", f"Pass one of {', '.join(BACKENDS)}"
            )


@dataclass(frozen=True)
class Problem:
    """What a loss works on: the labelled tokens, the rows, and the options.

    Over ShardedRows, hidden and labels are those of all processes, in the order of ranks, so that
    all of them make the same plan; `kept` and `shape` are of the process's own.

    Args:
        hidden: (N, D), the hidden states that carry a label.
        rows: C rows of width D.
        labels: (N,) int64 in [0, C).
        kept: (N,) int64 positions of these tokens among all of the caller's, or None if all are
            kept.
        shape: the labels' shape as given.
        shared: whose tokens these are, over ShardedRows; each process told its labelled tokens,
            sequences, and tokens.
        excluded_ids: (E,) int64 or None.
        tile_bytes: bytes of a tile.
        options: as given.
    """

    hidden: Tensor
    rows: OutputRows
    labels: Tensor
    kept: Tensor | None
    shape: torch.Size
    shared: SharedTokens | None
    excluded_ids: Tensor | None
    tile_bytes: int
    options: Options

    def draws(self) -> AbstractContextManager[None]:
        """Return in what to draw: there, all processes draw the same."""
        if self.shared is None:
            return nullcontext()
        return same_draws(self.shared.shards, self.options.generator, self.hidden.device)

    def stream(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return label logits (N,) and merged scores (N,) over the plan's pairs."""
        rows, labels, bias = self.rows, self.labels, self.options.bias
        if isinstance(rows, ShardedRows):
            return sharded_stream(
                self.hidden,
                rows,
                labels,
                plan,
                bias=bias,
                logit_scale=self.options.logit_scale,
                logit_softcap=self.options.logit_softcap,
                backend=self.options.backend,
            )
        if self.options.sparse_grad:
            touched = touched_rows(leaf_weight(rows), bias, labels, plan)
            rows, labels, bias, plan = (
                DenseRows(touched.weight),
                touched.labels,
                touched.bias,
                touched.plan,
            )
        label_logits, merged = stream(
            self.hidden,
            rows,
            labels,
            plan,
            bias=bias,
            logit_scale=self.options.logit_scale,
            logit_softcap=self.options.logit_softcap,
            backend=self.options.backend,
            statistics=self.options.statistics,
        )
        if self.options.statistics is not None:
            seen = self.options.statistics
            seen.entropy = self._spread(seen.entropy.float())
            seen.is_top1 = self._spread(seen.is_top1)
        return label_logits, merged

    def cost_shape(self, memory_budget: int | str | None) -> Shape:
        """Return the shape that decides cost.

        Under a budget it is that of the labels as given, some of which may be ignored: the same
        for every step of one shape, however many tokens carry a label.
        """
        grads = [tensor for tensor in self.rows.tensors() if tensor.requires_grad]
        n_weights = sum(tensor.numel() for tensor in grads)
        n_given, n_sequences = math.prod(self.shape), math.prod(self.shape[:-1])
        if self.shared is not None:  # the same in every process
            n_sequences, n_given = self.shared.total(1), self.shared.total(2)
            n_weights = max(self.shared.shards.sizes) * self.rows.width if grads else 0
        budgeted = memory_budget is not None
        return Shape(
            n_tokens=n_given if budgeted else len(self.labels),
            n_classes=self.rows.n_rows,
            width=self.rows.width,
            dtype=self.hidden.dtype,
            device=self.hidden.device,
            wants_hidden=self.hidden.requires_grad,
            n_weights=n_weights,
            n_sequences=n_sequences,
            has_ignored=budgeted,
            has_softcap=self.options.logit_softcap is not None,
            sparse_grad=self.options.sparse_grad,
            is_triton=takes_triton(self.options.backend, self.hidden, self.rows),
        )

    def sequence_ids(self) -> tuple[Tensor, int]:
        """Return the sequence (N,) of each token, and how many sequences the labels' shape has.

        Raises:
            ArgumentError: if the labels have no sequence dimension.
        """
        if len(self.shape) < 2:
            raise ArgumentError(
                "labels",
                tuple(self.shape),
                "negatives for each sequence need to know the sequences",
                'Pass labels of shape (B, T), or shared_by="batch"',
            )
        kept = self.kept
        if kept is None:
            kept = torch.arange(math.prod(self.shape), device=self.labels.device)
        ids = kept // self.shape[-1]
        if self.shared is None:
            return ids, math.prod(self.shape[:-1])
        return self.shared.gather(ids + self.shared.before(1)), self.shared.total(1)

    def _spread(self, values: Tensor) -> Tensor:
        """Return values (N,) of the labelled tokens in the labels' shape, 0 elsewhere."""
        if self.kept is None:
            return values.view(self.shape)
        flat = values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.kept,), values).view(self.shape)

    def reduce(self, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """Reduce the losses (N,) of the labelled tokens as the caller asked.

        Over ShardedRows these are the losses of the process's own tokens, and a mean is scaled so
        that its mean over the processes is that over all tokens, as DDP takes it.

        Args:
            losses: (N,).
            counted: number of tokens that a mean divides by, if not all of them.
        """
        n_counted: Tensor | float = max(len(losses), 1)
        if counted is not None:
            n_counted = counted.clamp(min=1)
        if self.shared is not None:
            losses = losses[self.shared.own]
            n_counted = n_counted / self.shared.shards.world_size
        if self.options.reduction == "none":
            return self._spread(losses)
        total = losses.sum()
        if self.options.reduction == "sum":
            return total
        if self.options.num_items_in_batch is not None:
            # A step without any label has the loss 0.
            return total / torch.as_tensor(self.options.num_items_in_batch).clamp(min=1)
        return total / n_counted


def prepare(
    hidden: Tensor, weight: Tensor | OutputRows, labels: Tensor, options: Options
) -> Problem:
    """Check the inputs of a loss and drop the tokens without a label.

    Over ShardedRows, collective: three messages. The tokens are those of all processes, and what is
    wrong with those of one is raised in all.

    Args:
        hidden: (N, D) or (B, T, D) floating point.
        weight: (C, D) tensor or OutputRows.
        labels: integers of the same leading shape, already aligned: no shift is applied.
        options: shared options.

    Raises:
        ArgumentError: if shapes or widths disagree, a label is out of range or excluded, or hidden
            holds NaN.
    """
    rows = as_output_rows(weight)
    try:
        excluded, tile_bytes = _checked(hidden, rows, labels, options)
    except ArgumentError as error:
        if isinstance(rows, ShardedRows):  # the others wait for this process's tokens
            rows.shards.share_tokens(0, 0, 0, device=hidden.device, error=error)
        raise
    flat_labels = labels.reshape(-1).long()
    states = hidden.reshape(-1, hidden.shape[-1])
    labelled = flat_labels != options.ignore_index
    kept = None
    if not bool(labelled.all()):
        kept = labelled.nonzero()[:, 0]
        flat_labels, states = flat_labels[kept], states[kept]
    shared = None
    if isinstance(rows, ShardedRows):
        shared = rows.shards.share_tokens(
            len(flat_labels),
            math.prod(labels.shape[:-1]),
            labels.numel(),
            device=hidden.device,
        )
        states, flat_labels = shared.gather(states), shared.gather(flat_labels)
    check_values(states, flat_labels, rows.n_rows, excluded, options.ignore_index)
    return Problem(
        hidden=states,
        rows=rows,
        labels=flat_labels,
        kept=kept,
        shape=labels.shape,
        shared=shared,
        excluded_ids=excluded,
        tile_bytes=tile_bytes,
        options=options,
    )


def _checked(
    hidden: Tensor, rows: OutputRows, labels: Tensor, options: Options
) -> tuple[Tensor | None, int]:
    """Return excluded ids and the bytes of a tile, after checking all that one process can."""
    for name in ("statistics", "sparse_grad") if isinstance(rows, ShardedRows) else ():
        if getattr(options, name):
            raise ArgumentError(
                name, True, "not known of rows that are cut over processes", "Leave it out"
            )
    check_shapes(hidden, rows, labels, options.bias)
    excluded = checked_ids(options.excluded_ids, rows.n_rows, hidden.device)
    return excluded, resolve_tile_bytes(options.tile_bytes, hidden.device)


def check_sparse_grad(loss_type: str, options: Options) -> None:
    """Refuse sparse_grad for a loss that gives every row a gradient.

    Raises:
        ArgumentError: if `options` ask for it and `loss_type` is not in SPARSE_GRAD_LOSSES.
    """
    if options.sparse_grad and loss_type not in SPARSE_GRAD_LOSSES:
        raise ArgumentError(
            "sparse_grad",
            True,
            f"{loss_type} gives every row a gradient",
            f"Leave it out, or take one of {', '.join(SPARSE_GRAD_LOSSES)}",
        )


def leaf_weight(rows: OutputRows) -> Tensor:
    """Return the weight of plain rows, which may take a sparse gradient.

    Raises:
        ArgumentError: for rows that are computed: adapters, compressed tables, casts.
    """
    if isinstance(rows, DenseRows) and (rows.weight.is_leaf or not rows.weight.requires_grad):
        return rows.weight
    raise ArgumentError(
        "sparse_grad",
        True,
        "the output rows are computed from other tensors, whose gradients are dense",
        "Leave it out, or pass the parameter itself as weight",
    )


def softmax_loss(label_logits: Tensor, others: Tensor) -> Tensor:
    """Return log(exp(l_label) + exp(others)) - l_label, each (N,).

    Args:
        label_logits: (N,).
        others: (N,) log-sum-exp over the negatives, -inf where there are none.
    """
    return torch.logaddexp(label_logits, others) - label_logits
