"""Draw memory and time of every loss beside dense cross-entropy, from results/*.json.

    python recipes/benchmarks/plot.py

Reads what losses.py wrote for 4,096 tokens and 100,000 classes; writes results/losses.png.
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    record = json.loads((RESULTS / "losses_4096_100000_64.json").read_text())
    losses, floor = record["losses"], record["gradients_mib"]
    names = list(losses)
    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    colors = ["#888888" if name == "dense" else "#3b75af" for name in names]
    bars = memory.barh(names, [losses[name]["extra_peak_mib"] for name in names], color=colors)
    memory.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    memory.axvline(floor, color="#c44e52", linewidth=1)
    memory.text(floor, -0.9, " the two gradients", color="#c44e52", fontsize=8, va="center")
    memory.set(xscale="log", xlabel="extra peak memory, MiB", xlim=(10, 2e4))
    bars = seconds.barh(names, [1000 * losses[name]["seconds"] for name in names], color=colors)
    seconds.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    seconds.set(xscale="log", xlabel="loss + backward, ms", xlim=(1, 2e4))
    memory.invert_yaxis()
    for axes in (memory, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "{tokens:,} tokens, {classes:,} classes, width {width}, CPU".format(**record["shape"])
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "losses.png", dpi=140)


if __name__ == "__main__":
    main()
