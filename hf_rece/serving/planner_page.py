"""The planner's page: what every loss would cost at a shape, as a table with a chart in it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio
import torch

from hf_rece.errors import ArgumentError, HfReceError
from hf_rece.losses.planning import DTYPES, LossPlan, human_bytes, human_flops, plan_losses
from hf_rece.serving.page import fill, log_slider, panel

_SIDE = 1024  # of the matrices that are timed
_MOST_STEPS = 3  # of an axis
_LARGEST = 10**12  # beyond any vocabulary, batch or memory in MiB
_SECONDS = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def planner() -> None:
    """Add the planner to the gradio.Blocks that is being made; measures this machine's speed."""
    speeds = measured_speeds()
    first = (100_000, 4096, 64, "float32", "cpu", False, 64)
    classes, tokens, width, dtype, device, has_budget, budget = first
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            controls: list[Any] = [
                log_slider("Classes (items or words)", classes, 100, 10**8),
                log_slider("Tokens a step", tokens, 16, 10**6),
                log_slider("Width", width, 8, 16384),
                gradio.Radio(list(DTYPES), value=dtype, label="Data type"),
                gradio.Radio(["cpu", "cuda"], value=device, label="Device"),
                gradio.Checkbox(has_budget, label="Keep to a memory budget"),
                log_slider("Memory budget, MiB", budget, 1, 10**6, visible=has_budget),
            ]
        with gradio.Column(scale=2, min_width=320):
            plan = panel(show_plan(speeds, *first))
    on: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    *_, asked, slider = controls
    asked.input(lambda checked: gradio.update(visible=checked), asked, slider, **on)
    plan_shape = partial(show_plan, speeds)
    # Of what is typed and moved only the last counts.
    moved = [control.input for control in controls]
    gradio.on(moved, plan_shape, controls, plan, trigger_mode="always_last", **on)


def matmul_flops_per_second(device: str) -> float:
    """Return the floating point operations a second of a float32 matrix product on this machine.

    Args:
        device: "cpu" or "cuda".
    """
    left, right = torch.rand(2, _SIDE, _SIDE, device=device).unbind()

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(left, right).sum().item()  # waits for a GPU
        return time.perf_counter() - start

    seconds()
    return 2 * _SIDE**3 / min(seconds() for _ in range(5))


def measured_speeds() -> dict[str, float]:
    """Return matmul_flops_per_second of each device that this machine has."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: matmul_flops_per_second(device) for device in devices}


def show_plan(
    speeds: Mapping[str, float],
    classes: object,
    tokens: object,
    width: object,
    dtype: str,
    device: str,
    has_budget: bool,
    budget: object,
) -> str:
    """Return what every loss costs at a shape as HTML, or what is wrong with the shape.

    Args:
        speeds: floating point operations a second by device, see measured_speeds; of a device that
            is not there, operations are shown in place of time.
        classes: C, as it was typed; so are the other numbers.
        tokens: N, tokens a step that carry a label.
        width: D.
        dtype: of hidden states and rows.
        device: "cpu" or "cuda".
        has_budget: whether the budget counts.
        budget: memory budget in MiB.
    """
    try:
        plans = plan_losses(
            _whole("tokens", tokens),
            _whole("classes", classes),
            _whole("width", width),
            dtype=dtype,
            device=device,
            memory_budget=f"{_whole('memory budget', budget)}MiB" if has_budget else None,
        )
    except HfReceError as error:
        return fill("problem.html", message=str(error))
    speed = speeds.get(device)
    works = [plan.flops / (speed or 1) for plan in plans]
    memory = _Axis.of("memory", [plan.bytes for plan in plans], 32, human_bytes)
    if speed:
        work = _Axis.of("time, estimate", works, 10, human_seconds)
    else:
        work = _Axis.of("operations", works, 10, human_flops)
    rows = [_row(plan, memory, work, amount) for plan, amount in zip(plans, works, strict=True)]
    measured = human_flops(speed) if speed else None
    return fill("plan.html", rows=rows, memory=memory, work=work, speed=measured, device=device)


def _whole(name: str, value: object) -> int:
    """Return what somebody typed into a box as a whole number, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        fix = f"Type a whole number from 1 to {_LARGEST:,}"
        raise ArgumentError(name, value, "nothing can be planned for that", fix)
    return value


def human_seconds(seconds: float) -> str:
    """Return a time in the largest unit below it.

    Example:
        >>> human_seconds(0.0123), human_seconds(5400)
        ('12.3 ms', '5,400 s')
    """
    unit = next((unit for unit, size in _SECONDS.items() if seconds >= size), "ns")
    value = seconds / _SECONDS[unit]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from base^low to base^high."""

    title: str
    text: Callable[[float], str]
    base: int
    low: int
    high: int

    @classmethod
    def of(
        cls, title: str, values: Sequence[float], base: int, text: Callable[[float], str]
    ) -> _Axis:
        low, high = math.floor(math.log(min(values), base)), math.ceil(math.log(max(values), base))
        if high - low > _MOST_STEPS:
            return cls.of(title, values, base * base, text)
        return cls(title, text, base, low, max(high, low + 1))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places in percent, and what is written there: 32 MiB rather than 32.0 MiB."""
        powers = [float(self.base) ** power for power in range(self.low, self.high + 1)]
        return [(self.percent(x), re.sub(r"\.0+ ", " ", self.text(x))) for x in powers]

    def percent(self, value: float) -> float:
        return round(100 * (math.log(value, self.base) - self.low) / (self.high - self.low), 2)

    def cell(self, value: float, over_dense: float) -> dict[str, Any]:
        text, percent = self.text(value), self.percent(value)
        return {"text": text, "percent": percent, "over_dense": f"{over_dense:.2g}"}


def _row(plan: LossPlan, memory: _Axis, work: _Axis, amount: float) -> dict[str, Any]:
    knobs = [f"{name}={value}" for name, value in plan.knobs.items() if type(value) is int]
    return {
        "loss": plan.loss,
        "knobs": ", ".join(knobs),
        "candidates": f"{plan.candidates:,}",
        "memory": memory.cell(plan.bytes, plan.bytes_over_dense),
        "work": work.cell(amount, plan.flops_over_dense),
    }
