"""The contract of the streaming kernel, its autograd function, and the choice of backend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.ops import native, stream_native, stream_torch
from hf_rece.ops.fallback import is_refused, or_by
from hf_rece.ops.gradients import Labels, Wanted, gradients_of
from hf_rece.ops.labels import label_logits
from hf_rece.ops.plan import Plan
from hf_rece.ops.products import autocast_dtype, without_autocast
from hf_rece.ops.rows import OutputRows
from hf_rece.ops.smaller_tiles import with_smaller_tiles
from hf_rece.ops.stream_torch import Gradients, Observations, Scores

Backend = Literal["auto", "torch", "native", "triton"]
Result = TypeVar("Result")
BACKENDS = ("auto", "torch", "native", "triton")


class Kernel(Protocol):
    """What a backend does: merged scores of a plan, and their gradients."""

    def forward(
        self, scores: Scores, plan: Plan, *, observe: bool = False
    ) -> tuple[Tensor, Tensor | None, Observations | None]:
        """Return what stream_torch.forward returns."""

    def backward(
        self,
        scores: Scores,
        plan: Plan,
        merged: Tensor,
        winner: Tensor | None,
        grad: Tensor,
        into: Gradients,
    ) -> None:
        """Add what stream_torch.backward adds."""


def choose_kernel(backend: Backend, hidden: Tensor, rows: OutputRows) -> Kernel:
    """Return the backend's functions.

    Args:
        backend: "auto" takes "triton" for hidden states on an NVIDIA GPU that multiplies matrices
            in bfloat16, where Triton is installed and has compiled whatever this process asked of
            it, and "native" on a CPU that has a compiler, else "torch". float64 is always left to
            "torch"; so is, by "native", all but float32 rows of at most 256 numbers, stored as
            they are.
        hidden: (N, D), for its device and dtype.
        rows: for their dtype.

    Raises:
        ArgumentError: for an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ArgumentError(
            "backend", backend, "no such backend", f"Pass one of {', '.join(BACKENDS)}"
        )
    is_double = torch.float64 in (hidden.dtype, *(tensor.dtype for tensor in rows.tensors()))
    if backend == "native" or (backend == "auto" and hidden.device.type == "cpu"):
        return _native_kernel(backend, hidden, rows)
    if backend == "torch" or is_double or (backend == "auto" and not _has_fast_gpu(hidden)):
        return cast(Kernel, stream_torch)
    if backend == "auto" and is_refused():
        return cast(Kernel, stream_torch)
    if find_spec("triton") is None:
        if backend == "auto":
            return cast(Kernel, stream_torch)
        raise ArgumentError(
            "backend", backend, "Triton is not installed", 'pip install "hf_rece[triton]"'
        )
    # By name: whoever does not choose Triton does not wait for its import.
    kernel = import_module("hf_rece.ops.stream_triton")
    if hidden.device.type != "cuda" and not kernel.is_interpreted():
        raise ArgumentError(
            "backend",
            backend,
            f"Triton compiles for GPUs, and the hidden states are on {hidden.device.type!r}",
            "Move them to a GPU, pass 'auto', or set TRITON_INTERPRET=1 before the import to debug",
        )
    return cast(Kernel, kernel)


def takes_triton(backend: Backend, hidden: Tensor, rows: OutputRows) -> bool:
    """Return whether choose_kernel takes Triton's kernels on a GPU."""
    if hidden.device.type != "cuda":
        return False
    return choose_kernel(backend, hidden, rows) is sys.modules.get("hf_rece.ops.stream_triton")


def _native_kernel(backend: Backend, hidden: Tensor, rows: OutputRows) -> Kernel:
    if stream_native.serves(hidden, rows):
        return cast(Kernel, stream_native)
    if backend == "native" and hidden.device.type != "cpu":
        raise ArgumentError(
            "backend", backend, f"the hidden states are on {hidden.device.type!r}", "Pass 'auto'"
        )
    if backend == "native" and native.library() is None:
        raise ArgumentError(
            "backend",
            backend,
            "its kernels are compiled by the machine's C++ compiler, on Linux, and were not",
            "Install g++, or pass 'auto', which does without",
        )
    return cast(Kernel, stream_torch)


def _has_fast_gpu(hidden: Tensor) -> bool:
    if hidden.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(hidden.device) >= (8, 0)


@dataclass
class TokenStatistics:
    """Filled by the loss that it is passed to: how sure the model is of each token.

    Exact with cross_entropy; with stratified an estimate of that; with other losses about the
    classes that they score.

    Args:
        entropy: float32 of the labels' shape, in nats, of the softmax over the label and the
            classes scored, in proportion to their log-weights; NaN with bce and gbce.
        is_top1: bool of the labels' shape: no class scored is above the label.
    """

    entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    is_top1: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


def stream(
    hidden: Tensor,
    rows: OutputRows,
    labels: Tensor,
    plan: Plan,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: Backend = "auto",
    statistics: TokenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Score each token's label, and merge its scores over the plan's pairs.

    Both results are differentiable in hidden, in the rows' tensors and in bias. The labels' own
    pairs are no part of the merge: a loss joins them by its own formula.

    Under torch.autocast on a GPU the operands of products are rounded to its dtype; all sums, the
    results, and whatever runs on a CPU keep theirs.

    Args:
        hidden: (N, D) floating point.
        rows: C output rows of width D.
        labels: (N,) int64 in [0, C).
        plan: the pairs, made for these N tokens and C classes.
        bias: (C,) or None.
        logit_scale: multiplies every logit.
        logit_softcap: caps a logit at c tanh(logit / c), after the scale.
        backend: see choose_kernel.
        statistics: filled with (N,) tensors on the way, unless None.

    Returns:
        label_logits: (N,) in the accumulation dtype (float32; float64 for float64 inputs).
        merged: (N,) likewise; -inf for a token that met no class (0 with merge="sum").

    Raises:
        ArgumentError: for an unknown backend, or one that cannot run here.

    Memory:
        The gradients, plus one tile; gradients.py says how they are added up in float32. Forward
        keeps two numbers a token. Where a tile does not fit, its pass begins again with tiles half
        as large, once, with a warning.
    """
    kernel = choose_kernel(backend, hidden, rows)
    autocast = autocast_dtype(hidden.device)
    observe = statistics is not None
    knobs = logit_scale, logit_softcap, autocast, observe
    how = _How(kernel, backend == "auto", plan, rows, *knobs)
    label_logits, merged, largest, mean = _Stream.apply(how, labels, hidden, bias, *rows.tensors())
    if statistics is not None:
        own, others = label_logits.detach(), merged.detach()
        share = (own - others).sigmoid()  # of the label, in the softmax over all that is scored
        total = torch.logaddexp(own, others)
        expected = share * own + (1 - share) * mean.masked_fill(share == 1, 0)
        statistics.entropy, statistics.is_top1 = total - expected, own >= largest
    return label_logits, merged


def walked(
    kernel: Kernel, plan: Plan, work: Callable[[Kernel, Plan], Result], *, may_differ: bool
) -> Result:
    """Return work(kernel, plan); with smaller tiles where memory runs out.

    Args:
        kernel: by which to walk the plan.
        plan: to walk.
        work: makes all that it adds into, so that what it did before it failed is gone.
        may_differ: torch serves in place of a kernel that does not compile.
    """

    def by(kernel: Kernel) -> Result:
        def sized(tile_bytes: int) -> Result:
            return work(kernel, replace(plan, tile_bytes=tile_bytes))

        return with_smaller_tiles(plan.tile_bytes, sized)

    return or_by(cast(Kernel, stream_torch), kernel, by) if may_differ else by(kernel)


@dataclass(frozen=True)
class _How:
    """What is no tensor."""

    kernel: Kernel
    may_differ: bool
    plan: Plan
    rows: OutputRows
    scale: float
    softcap: float | None
    autocast: torch.dtype | None
    observe: bool

    def scores(self, hidden: Tensor, bias: Tensor | None) -> Scores:
        return Scores(hidden, self.rows, bias, self.scale, self.softcap, self.autocast)

    def walked(self, work: Callable[[Kernel, Plan], Result]) -> Result:
        return walked(self.kernel, self.plan, work, may_differ=self.may_differ)


class _Stream(torch.autograd.Function):
    """(label logits, merged scores) and their gradients, recomputed tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        labels: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        scores = how.scores(hidden, bias)

        def walk(kernel: Kernel, plan: Plan) -> Any:
            own = label_logits(scores, labels, plan.tile_bytes)
            return plan, own, *kernel.forward(scores, plan, observe=how.observe)

        # Autocast would return a tile's products in low precision too.
        with without_autocast(hidden.device):
            plan, own, merged, winner, seen = walked(
                how.kernel, how.plan, walk, may_differ=how.may_differ
            )
        ctx.save_for_backward(labels, hidden, bias, merged, winner, *tensors)
        ctx.how = replace(how, plan=plan)
        merged = merged[: plan.n_tokens].clone()
        if seen is None:
            return own, merged, None, None
        largest, mean = seen.largest[: plan.n_tokens], seen.mean[: plan.n_tokens]
        ctx.mark_non_differentiable(largest, mean)
        return own, merged, largest, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_own: Tensor, grad_merged: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        labels, hidden, bias, merged, winner, *_ = ctx.saved_tensors
        how: _How = ctx.how
        scores = how.scores(hidden, bias)
        wants_hidden, wants_bias, *wants_rows = ctx.needs_input_grad[2:]
        wanted = Wanted(wants_hidden, wants_bias, wants_rows)
        padded = torch.cat([grad_merged, grad_merged.new_zeros(1)])

        def walk(kernel: Kernel, plan: Plan) -> Gradients:
            def add(scores: Scores, plan: Plan, into: Gradients) -> None:
                kernel.backward(scores, plan, merged, winner, padded, into)

            return gradients_of(scores, plan, Labels(labels, grad_own), wanted, add)

        with without_autocast(hidden.device):
            found = how.walked(walk)
        return None, None, found.hidden, found.bias, *(found.rows or ())
