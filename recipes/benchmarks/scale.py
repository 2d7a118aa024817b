r"""Simulate training steps of 10 million to 1 billion items on 1 to 1,024 GPUs; no GPU was used.

    python recipes/benchmarks/scale.py
    python recipes/benchmarks/scale.py --device A100-80 --loss rece --width 128 --tokens 25600

What a step keeps, multiplies, reads and sends follows from its shape (scale_model.py); speeds are
shares of data sheets. How far the same formulas are off on this machine, where steps were measured,
is printed first: some files of results/ give the speeds, others are held against them.
Prints its assumptions, the largest catalogue that fits, and steps at several sizes; writes
results/scale.json (every loss, table and sharding) and results/scale.png.
"""

import argparse
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from environment import environment
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from scale_measured import FITTED, HELD_OUT, fitted, measured
from scale_model import (
    ASSUMPTIONS,
    GPUS,
    SHARDINGS,
    TABLES,
    Case,
    Device,
    cost_of,
    seconds,
)

from hf_rece.losses import LOSSES

RESULTS = Path(__file__).parent / "results"
USABLE = 0.9
ITEMS = (10**7, 10**8, 10**9)
RANKS = (1, 8, 64, 1024)
WIDTHS = (64, 128, 256)
# How a table may be held by several processes.
LAYOUTS = (
    ("dense", "ddp"),
    ("dense", "fsdp"),
    ("dense", "vocab_parallel"),
    ("dense", "vocab_parallel_8"),
    ("dense", "vocab_parallel_64"),
    ("sparse_grad", "ddp"),
    ("compositional", "ddp"),
    ("compositional", "fsdp"),
    ("lma", "ddp"),
    ("lma", "fsdp"),
)
GB = 1e9


def fits(case: Case, device: Device) -> bool:
    return cost_of(case).bytes <= USABLE * device.memory


def largest_catalogue(case: Case, device: Device) -> int:
    """Return the most items that fit, to 5 percent, up to a hundred billion; 0 for none."""
    low, high = math.log(1000), math.log(1e11)
    if not fits(replace(case, items=1000), device):
        return 0
    while high - low > 0.05:
        middle = (low + high) / 2
        if fits(replace(case, items=round(math.exp(middle))), device):
            low = middle
        else:
            high = middle
    return round(math.exp(low))


def check(console: Console) -> dict[str, Any]:
    """Print and return how far predictions are off for steps that were measured on this machine."""
    processor = fitted([(case, row["seconds"]) for _, case, row in measured(FITTED)])
    rows = []
    for file, case, row in measured(HELD_OUT):
        cost = cost_of(case)
        own = 0 if case.updates else cost.memory["table"]  # losses.py counts from the table on
        predicted = sum(seconds(cost, processor).values()) if "seconds" in row else None
        rows.append(
            {
                "file": file,
                "case": ", ".join(
                    [case.loss, case.table] + [f"{case.ranks} processes"] * case.is_cut
                ),
                "seconds": row.get("seconds"),
                "predicted_seconds": predicted and round(predicted, 4),
                "mib": row["extra_peak_mib"],
                "predicted_mib": round((cost.bytes - own) / 2**20, 1),
            }
        )
    table = Table(title="Held out: measured on CPUs, and what was predicted")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in ("file", "case") else "right")
    for row in rows:
        table.add_row(
            *("" if v is None else v if isinstance(v, str) else f"{v:,.2f}" for v in row.values())
        )
    console.print(table)
    factors = {
        name: sorted(_factor(row[name], row[f"predicted_{name}"]) for row in rows if row[name])
        for name in ("seconds", "mib")
    }
    for name, off in factors.items():
        console.print(
            f"{name}: off by a factor of {median(off):.2f} in the median, {off[-1]:.2f} at most"
        )
    return {"held_out": rows, "worst_factor": {k: round(v[-1], 2) for k, v in factors.items()}}


def _factor(measured_value: float, predicted: float) -> float:
    return max(measured_value / predicted, predicted / measured_value)


def show_catalogues(console: Console, case: Case, device: Device, name: str) -> list[list[Any]]:
    title = f"Most items that fit {name}: {case.loss}, width {case.width}, {case.tokens:,} tokens"
    table = Table(title=title)
    for column in ("table", "sharding", *(f"{ranks:,} GPU{'s' * (ranks > 1)}" for ranks in RANKS)):
        table.add_column(column, justify="left" if column in ("table", "sharding") else "right")
    rows = []
    for of_table, sharding in LAYOUTS:
        own = replace(case, table=of_table, sharding=sharding)
        if own.is_possible:
            most = [largest_catalogue(replace(own, ranks=ranks), device) for ranks in RANKS]
            rows.append([of_table, sharding, *most])
            table.add_row(of_table, sharding, *map(human, most))
    console.print(table)
    return rows


def human(number: float) -> str:
    power = min(3, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def show_steps(console: Console, case: Case, device: Device, name: str) -> None:
    title = f"A step on {name}: {case.loss}, width {case.width}, {case.tokens:,} tokens a GPU"
    table = Table(
        title=title,
        caption="GB a GPU; seconds, of these for messages; in red what does not fit",
        show_lines=True,
    )
    layouts = [(t, s) for t, s in LAYOUTS if replace(case, table=t, sharding=s).is_possible]
    for column in ("items", "GPUs", *(f"{t}\n{s}" for t, s in layouts)):
        table.add_column(column, justify="right")
    for items, ranks in product(ITEMS, RANKS):
        cells = []
        for of_table, sharding in layouts:
            if ranks == 1 and sharding != "ddp":
                cells.append("")
                continue
            own = replace(case, items=items, ranks=ranks, table=of_table, sharding=sharding)
            cost = cost_of(own)
            took = seconds(cost, device, ranks)
            cell = f"{short(cost.bytes / GB)} GB\n{short(sum(took.values()))} s"
            cell += f", {short(took['messages'])}" if ranks > 1 else ""
            cells.append(cell if fits(own, device) else f"[red]{cell}")
        table.add_row(human(items), str(ranks), *cells)
    console.print(table)


COLUMNS = (
    "items", "width", "ranks", "loss", "table", "sharding", "gb_per_rank", "step_seconds",
    "message_seconds", "gb_sent_per_rank", "fits",
)  # fmt: skip


def grid(tokens: int, device: Device) -> list[list[Any]]:
    """Return a row of COLUMNS for everything that hf_rece can run, and torch's own loss."""
    rows = []
    sizes = product(ITEMS, WIDTHS, RANKS, ("dense", *LOSSES), TABLES, SHARDINGS)
    for items, width, ranks, loss, table, sharding in sizes:
        case = Case(items, width, tokens, ranks, loss, table, sharding)
        if not case.is_possible or (ranks == 1 and sharding != "ddp"):
            continue
        cost = cost_of(case)
        took = seconds(cost, device, ranks)
        figures = (cost.bytes / GB, sum(took.values()), took["messages"], cost.sent / GB)
        rows.append(
            [items, width, ranks, loss, table, sharding]
            + [float(f"{figure:.3g}") for figure in figures]
            + [fits(case, device)]
        )
    return rows


STYLES = {
    ("dense", "ddp"): ("#888888", "dense, replicated (DDP)"),
    ("dense", "fsdp"): ("#c9a227", "dense, FSDP"),
    ("dense", "vocab_parallel"): ("#3b75af", "dense, vocabulary-parallel"),
    ("dense", "vocab_parallel_8"): ("#7fb3d9", "dense, vocabulary-parallel by 8"),
    ("sparse_grad", "ddp"): ("#8d5fa8", "dense, row optimiser (DDP)"),
    ("compositional", "ddp"): ("#4c9f70", "compositional 16x (DDP)"),
    ("lma", "ddp"): ("#c44e52", "LMA 16x (DDP)"),
}


def draw(case: Case, device: Device, name: str) -> None:
    """Draw bytes and seconds over items, a line for each layout; dotted where it does not fit."""
    items = [round(10 ** (7 + 2 * i / 24)) for i in range(25)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for (table, sharding), (colour, label) in STYLES.items():
        own = replace(case, table=table, sharding=sharding)
        if not own.is_possible:
            continue
        cases = [replace(own, items=n) for n in items]
        costs = [cost_of(c) for c in cases]
        n_fit = sum(fits(c, device) for c in cases)
        values = (
            [cost.bytes / GB for cost in costs],
            [sum(seconds(cost, device, case.ranks).values()) for cost in costs],
        )
        for plot, of_plot in zip(axes, values, strict=True):
            line(plot, items, of_plot, n_fit, colour, label)
    usable = USABLE * device.memory / GB
    axes[0].axhline(usable, color="black", linewidth=0.8)
    axes[0].text(items[0], usable * 1.08, f"{usable:.0f} GB fit", fontsize=8)
    for plot, label in zip(axes, ("GB a GPU", "seconds a step"), strict=True):
        plot.set(xscale="log", yscale="log", xlabel="items", ylabel=label)
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.25, which="major")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"Simulated from data sheets, not measured: {case.loss}, width {case.width}, "
        f"{case.tokens:,} tokens on each of {case.ranks} {name}; dotted: does not fit",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.png", dpi=140)


def line(plot: Axes, x: list[int], y: list[float], n_fit: int, colour: str, label: str) -> None:
    plot.plot(x[:n_fit], y[:n_fit], color=colour, label=label, linewidth=1.8)
    start = max(0, n_fit - 1)
    plot.plot(x[start:], y[start:], color=colour, linewidth=1.2, linestyle=":")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="H100-80", choices=GPUS)
    parser.add_argument("--loss", default="sce", choices=LOSSES)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="labelled tokens a GPU")
    parser.add_argument("--ranks", type=int, default=64, help="GPUs of the picture")
    args = parser.parse_args()
    console = Console(width=150)
    for assumption in ASSUMPTIONS:
        console.print(f"- {assumption}", highlight=False)
    checked = check(console)
    device = GPUS[args.device]
    case = Case(ITEMS[0], args.width, args.tokens, args.ranks, args.loss)
    catalogues = show_catalogues(console, case, device, args.device)
    show_steps(console, case, device, args.device)
    draw(case, device, args.device)
    record = {
        **environment(),
        "simulated": f"{args.device} from its data sheet, not measured",
        "tokens_per_rank": args.tokens,
        "assumptions": ASSUMPTIONS,
        **checked,
        "largest_catalogue": {
            "loss": args.loss, "width": args.width, "ranks": RANKS, "rows": catalogues
        },
        "columns": COLUMNS,
    }  # fmt: skip
    head = json.dumps(record, indent=1).removesuffix("\n}")
    rows = ",\n".join("  " + json.dumps(row) for row in grid(args.tokens, device))
    (RESULTS / "scale.json").write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
