"""Draw what the benchmarks measured, each beside its peers, from results/.

    python recipes/benchmarks/plot.py

losses.png: a shape of losses.py. losses_grid.png: memory and time over the grid. training.png:
SASRec beside RecTools. llm_MODEL.png: steps of a language model. What was not measured is left as
it is; a contender that did not run is named with its reason.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
OURS = ("cross_entropy", "rece", "sce", "stratified", "sampled_softmax", "bce", "gbce")
BLUE, GREY = "#3b75af", "#888888"
LABELS = {
    "torch_chunked": "torch, chunked",
    "torch_chunked_256": "torch, 256 a chunk",
    "torch_default": "torch, default",
    "cce": "CCE",
    "cce_exact": "CCE exact",
    "cce_compile": "CCE torch_compile",
    "liger": "Liger",
    "trl": "TRL",
    "rectools": "RecTools",
    "oracle_rece": "RECE all at once (oracle)",
    "oracle_sce": "SCE all at once (oracle)",
}
Rows = dict[str, dict[str, Any]]


def bars(axes: Axes, rows: Rows, field: str, xlabel: str) -> None:
    """Draw a bar for each row, ours in blue; in place of a bar, why there is none."""
    names = list(rows)
    values = [rows[name].get(field, 0) for name in names]
    axes.barh(
        [LABELS.get(name, name) for name in names],
        values,
        color=[BLUE if name in OURS else GREY for name in names],
    )
    axes.set(xscale="log", xlabel=xlabel)
    measured = [value for value in values if value > 0]
    axes.set_xlim(min(measured) / 3, max(measured) * 8)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        number = f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        text = rows[name].get("not_run", number)
        start = value if value > 0 else min(measured) / 3
        axes.text(start, place, f" {text}", va="center", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def side_by_side(rows: Rows, memory: str, seconds: str, title: str, name: str) -> list[Axes]:
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.24 * len(rows)), sharey=True)
    bars(axes[0], rows, memory, "peak memory, MiB" if memory == "peak_mib" else "extra MiB")
    bars(axes[1], rows, seconds, "seconds")
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=140)
    return list(axes)


def draw_losses() -> None:
    record = json.loads((RESULTS / "losses_4096_100000_64.json").read_text())
    title = "Loss + backward: {tokens:,} tokens, {classes:,} classes, width {width}, CPU"
    rows, floor = record["losses"], record["gradients_mib"]
    memory, _ = side_by_side(
        rows, "extra_peak_mib", "seconds", title.format(**record["shape"]), "losses.png"
    )
    memory.axvline(floor, color="#c44e52", linewidth=1)
    memory.text(floor, -0.9, " the two gradients", color="#c44e52", fontsize=7, va="center")
    memory.figure.savefig(RESULTS / "losses.png", dpi=140)


def draw_grid() -> None:
    """Draw memory and time over the grid, a figure for each kind of device."""
    lines = (RESULTS / "losses_grid.jsonl").read_text().splitlines()
    records = sorted((json.loads(line) for line in lines), key=_size)
    for device in {record["shape"]["device"] for record in records}:
        suffix = "" if device == "cpu" else f"_{device}"
        of_device = [record for record in records if record["shape"]["device"] == device]
        _draw_grid(of_device, RESULTS / f"losses_grid{suffix}.png")


def _draw_grid(records: list[dict[str, Any]], path: Path) -> None:
    """Draw a line of marks for each shape, a mark for each contender that ran."""
    names = {
        name for record in records for name, row in record["losses"].items() if "seconds" in row
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.3 * len(records)), sharey=True)
    for name in [*(n for n in OURS if n in names), *sorted(names - set(OURS))]:
        places = [i for i, r in enumerate(records) if "seconds" in r["losses"].get(name, {})]
        style = "o" if name in OURS else "x"
        for plot, field in zip(axes, ("extra_peak_mib", "seconds"), strict=True):
            values = [records[place]["losses"][name][field] for place in places]
            plot.plot(values, places, style, label=LABELS.get(name, name), markersize=6, alpha=0.8)
    shapes = (record["shape"] for record in records)
    labels = ["N={tokens:,} C={classes:,} D={width:,}".format(**shape) for shape in shapes]
    for plot, label in zip(axes, ("extra MiB", "seconds"), strict=True):
        plot.set(xscale="log", xlabel=label, yticks=range(len(records)), yticklabels=labels)
        plot.grid(axis="y", alpha=0.3)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Loss + backward: who has no mark did not run, or not in time", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def _size(record: dict[str, Any]) -> tuple[int, int]:
    shape = record["shape"]
    return shape["width"], shape["tokens"] * shape["classes"]


def draw_training() -> None:
    record = json.loads((RESULTS / "training.json").read_text())
    title = "SASRec on {log}: {epochs} epoch(s), {threads} threads, seconds an epoch"
    rows = record["trainings"]
    side_by_side(rows, "peak_mib", "seconds_per_epoch", title.format(**record), "training.png")


def draw_language_models() -> None:
    for path in sorted(RESULTS.glob("llm_*.json")):
        record = json.loads(path.read_text())
        title = "A step of {model}: {batch} x {length} tokens, {device}".format(**record)
        name = path.with_suffix(".png").name
        side_by_side(record["heads"], "extra_peak_mib", "seconds", title, name)


def main() -> None:
    draws: tuple[Callable[[], None], ...] = (
        draw_losses, draw_grid, draw_training, draw_language_models
    )  # fmt: skip
    for draw in draws:
        try:
            draw()
        except FileNotFoundError as missing:
            print(f"{draw.__name__}: {Path(missing.filename).name} is not there yet")


if __name__ == "__main__":
    main()
