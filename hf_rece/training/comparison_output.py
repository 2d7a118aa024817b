"""A comparison of runs as a table on the terminal, a plot, or data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_rece.errors import ArgumentError
from hf_rece.files import complete_files
from hf_rece.training.compare import Comparison, data_letters, is_lower_better, short_digest

_PLOTS, _TABLES = (".png", ".svg", ".pdf"), (".csv", ".json")


@dataclass
class CompareArguments:
    """How to compare runs."""

    metric: str | None = field(
        default=None,
        metadata={"help": "Such as recall@20. None: ndcg@10, perplexity or loss, as most have."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Plot (.png, .svg or .pdf; needs hf_rece[plot]) or data (.csv, .json)."},
    )

    def __post_init__(self) -> None:
        if self.output is not None:
            check_output(self.output)


def show_comparison(comparison: Comparison) -> None:
    """Print what the runs share, a table of them, and warnings."""
    console = Console(highlight=False)
    common = dict(comparison.common)
    data = common.pop("evaluated_on", None)
    if data is not None:
        console.print(f"Evaluated on: {short_digest(data)}.", markup=False)
    if common:
        shared = ", ".join(f"{name}={_text(value)}" for name, value in common.items())
        console.print(f"The same for all: {shared}.", markup=False)
    console.print(_table(comparison))
    for warning in comparison.warnings:
        console.print(f"Warning: {warning}.", markup=False, style="yellow")


def _table(comparison: Comparison) -> Table:
    frame, metric = comparison.table, comparison.metric
    letters = data_letters(comparison.runs)
    own = ("run", "evaluated_on", "loss_type", metric, "of_best", "seconds", "peak_mib")
    others = [name for name in frame.columns if name not in own]

    def what_differs(row: dict[str, Any]) -> str:
        return "\n".join(f"{n}={_text(row[n])}" for n in others if row[n] is not None)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {"run": lambda row: row["run"]}
    if "evaluated_on" in frame.columns:
        columns["data"] = lambda row: letters.get(row["evaluated_on"], "?")
    if "loss_type" in frame.columns:
        columns["training loss"] = lambda row: row["loss_type"] or "?"
    if others:
        columns["what differs"] = what_differs
    numbers: dict[str, Callable[[dict[str, Any]], str]] = {
        metric: lambda row: _number(row[metric], ",.4f"),
        "of best": lambda row: _number(row["of_best"], ".3f"),
        "seconds": lambda row: _number(row["seconds"], ",.0f"),
        "peak MiB": lambda row: _number(row["peak_mib"], ",.0f"),
    }
    table = Table(title=f"{metric} of {comparison.part}, of the final models")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name == "what differs")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.iter_rows(named=True):
        table.add_row(*(escape(cell(row)) for cell in (columns | numbers).values()))
    return table


def check_output(output: str) -> None:
    """Check, before anything is read, that a comparison can be written there.

    Raises:
        ArgumentError: for an unknown ending, a folder that is not there, or no matplotlib.
    """
    path = Path(output)
    if path.suffix not in (*_PLOTS, *_TABLES):
        known = ", ".join((*_PLOTS, *_TABLES))
        raise ArgumentError("output", output, "unknown ending", f"Pass one of {known}")
    if not path.parent.is_dir():
        raise ArgumentError("output", output, "its folder is not there", "Make it first")
    if path.suffix in _PLOTS:
        _figure_class()


def write_comparison(comparison: Comparison, output: str | Path) -> None:
    """Write a plot (.png, .svg, .pdf), the table (.csv), or table, curves and warnings (.json).

    Raises:
        ArgumentError: as check_output.
    """
    check_output(str(output))
    path = Path(output)
    with complete_files(path.parent, path.name) as folder:
        part = folder / path.name
        if path.name.endswith(_PLOTS):
            plot_comparison(comparison).savefig(part, dpi=140)
        elif path.suffix == ".csv":
            comparison.table.write_csv(part)
        else:
            part.write_text(json.dumps(_as_json(comparison), indent=1) + "\n", "utf-8")


def plot_comparison(comparison: Comparison) -> Any:
    """Return a matplotlib Figure: the metric of validation over steps, and quality over memory.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    metric, part, runs = comparison.metric, comparison.part, comparison.runs
    n_columns = min(len(runs), 5)
    height = 4.2 + 0.25 * -(-len(runs) // n_columns)
    figure = _figure_class()(figsize=(10, height), layout="constrained")
    curves, cost = figure.subplots(1, 2)
    letters = data_letters(runs)
    for place, run in enumerate(runs):
        color, line = f"C{place % 10}", ("-", "--", ":")[place // 10 % 3]
        label = run.name
        if len(letters) > 1:
            label += f" (data {letters.get(run.evaluated_on or '', '?')})"
        points = [(step, found[metric]) for step, found in run.curve if metric in found]
        steps, values = zip(*points, strict=True) if points else ((), ())
        curves.plot(steps, values, line, color=color, label=label, marker="o", markersize=3)
        value = run.metrics[part].get(metric)
        if value is not None and run.peak_mib is not None:
            cost.scatter([run.peak_mib], [value], s=60, color=color)
            place_of_text = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            cost.annotate(run.name, (run.peak_mib, value), fontsize=8, **place_of_text)
    better = f"{'lower' if is_lower_better(metric) else 'higher'} is better"
    curves.set(xlabel="steps", ylabel=f"{metric} of validation, {better}", title="In training")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    cost.set(xlabel="peak memory, MiB", ylabel=f"{metric} of {part}", title="The final models")
    cost.margins(0.15)
    found = [value for value in comparison.table[metric] if value and math.isfinite(value)]
    for axes in (curves, cost):
        if found and min(found) > 0 and max(found) > 20 * min(found):
            axes.set_yscale("log")
        if axes.dataLim.width < 0:  # nothing was drawn
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    where = {"loc": "outside lower center", "ncols": n_columns, "frameon": False}
    figure.legend(*curves.get_legend_handles_labels(), **where)
    return figure


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ArgumentError(
            "output", "plot", "matplotlib is not installed", 'pip install "hf_rece[plot]"'
        ) from None
    return Figure


def _as_json(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    curves = {
        run.name: [[step, found[metric]] for step, found in run.curve if metric in found]
        for run in comparison.runs
    }
    return {
        "metric": metric,
        "part": comparison.part,
        "common": comparison.common,
        "runs": comparison.table.to_dicts(),
        "validation_curves": curves,
        "warnings": list(comparison.warnings),
    }


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
