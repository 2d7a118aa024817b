"""What every loss would cost at a shape, beside dense cross-entropy: rows of `hf-rece plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, LossName
from hf_rece.losses.checks import check_at_least, check_choice
from hf_rece.losses.estimates import Estimate, Shape, dense_estimate
from hf_rece.ops import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE = "dense"


@dataclass(frozen=True)
class LossPlan:
    """A loss at a shape: with which knobs it runs, and what it costs.

    Args:
        loss: name in LOSSES, or "dense" for torch's cross-entropy over all logits.
        knobs: its knobs, all set.
        tile_bytes: bytes of a tile; 0 for dense.
        bytes: extra peak of loss + backward above hidden states and table.
        flops: floating point operations of forward and backward.
        candidates: classes that a token is scored against.
        bytes_over_dense: ratio to dense.
        flops_over_dense: ratio to dense.
        terms: what the bytes are made of, see hf_rece.losses.estimates.Estimate.
    """

    loss: str
    knobs: dict[str, Any]
    tile_bytes: int
    bytes: int
    flops: int
    candidates: int
    bytes_over_dense: float
    flops_over_dense: float
    terms: dict[str, int]


def plan_losses(
    n_tokens: int,
    n_classes: int,
    width: int,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    memory_budget: int | str | None = None,
    losses: Sequence[str] | None = None,
) -> list[LossPlan]:
    """Return dense cross-entropy and what each loss would cost with its defaults, or in a budget.

    Args:
        n_tokens: tokens a step that carry a label.
        n_classes: classes.
        width: of hidden states and rows.
        dtype: of both, "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; decides the default tile.
        memory_budget: see hf_rece.losses.budget; None for the defaults of the losses.
        losses: names in LOSSES; None for all.

    Raises:
        ArgumentError: for numbers below 1, unknown names, or a budget that a loss cannot keep.

    Example:
        >>> dense, rece = plan_losses(4096, 100_000, 64, losses=["rece"])
        >>> dense.bytes > 100 * rece.bytes, rece.knobs["n_buckets"]
        (True, 221)
    """
    for name, value in (("tokens", n_tokens), ("classes", n_classes), ("width", width)):
        check_at_least(name, value, 1)
    check_choice("dtype", dtype, tuple(DTYPES))
    check_choice("device", device, ("cpu", "cuda"))
    names: Sequence[Any] = get_args(LossName) if losses is None else losses
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise ArgumentError(
            "losses", unknown, "no such losses", f"Pass some of {', '.join(get_args(LossName))}"
        )
    numbers, where = DTYPES[dtype], torch.device(device)
    is_native = native.serves_shape(width, numbers, where)
    shape = Shape(
        n_tokens, n_classes, width, numbers, where,
        is_native=is_native, is_triton=where.type == "cuda",
    )  # fmt: skip
    dense = dense_estimate(shape)
    plans = [_row(DENSE, {}, 0, dense, dense)]
    for name in names:
        entry: Any = LOSSES[name]
        # As a loss does under a budget: it holds with ignored tokens, and without C++ kernels.
        roomy = replace(shape, has_ignored=memory_budget is not None, is_native=False)
        choice = entry.choose(entry.config(memory_budget=memory_budget), roomy)
        config = replace(choice.config, memory_budget=None)
        knobs = {
            knob.name: getattr(config, knob.name)
            for knob in fields(config)
            if knob.name != "memory_budget"
        }
        estimate = entry.choose(config, shape, choice.tile_bytes).estimate
        plans.append(_row(name, knobs, choice.tile_bytes, estimate, dense))
    return plans


def _row(
    loss: str, knobs: dict[str, Any], tile_bytes: int, estimate: Estimate, dense: Estimate
) -> LossPlan:
    return LossPlan(
        loss=loss,
        knobs=knobs,
        tile_bytes=tile_bytes,
        bytes=estimate.bytes,
        flops=estimate.flops,
        candidates=estimate.candidates,
        bytes_over_dense=estimate.bytes / dense.bytes,
        flops_over_dense=estimate.flops / dense.flops,
        terms=estimate.terms,
    )


def human_bytes(n_bytes: float) -> str:
    """Return bytes in the largest binary unit below them.

    Example:
        >>> human_bytes(3 * 2**19)
        '1.50 MiB'
    """
    return _human(n_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def human_flops(flops: float) -> str:
    """Return floating point operations in the largest decimal unit below them.

    Example:
        >>> human_flops(209_715_200_000)
        '210 GFLOP'
    """
    return _human(flops, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _human(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {units[power]}"
