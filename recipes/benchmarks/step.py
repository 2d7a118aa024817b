"""One full training step with ten million classes: loss, backward, Adam. Peak memory and seconds.

    python recipes/benchmarks/step.py

Each loss runs in a fresh process; the peak is the process's, weights, gradient and both moments
included. Writes results/step.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table

from hf_rece.losses import build_loss

RESULTS = Path(__file__).parent / "results" / "step.json"


def step(loss_type: str, n_tokens: int, n_classes: int, width: int) -> dict[str, float]:
    torch.manual_seed(0)
    weight = torch.empty(n_classes, width).normal_(std=0.1).requires_grad_()
    hidden = torch.randn(n_tokens, width, requires_grad=True)
    labels = torch.randint(n_classes, (n_tokens,))
    optimizer = torch.optim.Adam([weight, hidden], fused=True)
    start = time.perf_counter()
    loss = build_loss(loss_type)(hidden, weight, labels)
    loss.backward()
    loss_seconds = time.perf_counter() - start
    optimizer.step()
    return {
        "loss_and_backward_seconds": round(loss_seconds, 2),
        "step_seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 4096), ("classes", 10_000_000), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--losses", nargs="*", default=["rece", "sce", "stratified", "cross_entropy"]
    )
    parser.add_argument("--only", help="run this loss in this process and print JSON")
    args = parser.parse_args()
    shape = (args.tokens, args.classes, args.width)
    if args.only:
        print(json.dumps(step(args.only, *shape)))
        return
    table = Table(title="One training step, N={:,}, C={:,}, D={}".format(*shape))
    for name in ("loss", "loss + backward s", "whole step s", "peak GiB"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    rows = {}
    for loss in args.losses:
        command = [sys.executable, __file__, "--only", loss]
        for name, value in zip(("tokens", "classes", "width"), shape, strict=True):
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[loss] = json.loads(done.stdout)
        table.add_row(loss, *(f"{value:.2f}" for value in rows[loss].values()))
    Console().print(table)
    # Weight, gradient, two moments: what any loss needs here.
    floor = round(4 * 4 * args.width * (args.classes + args.tokens) / 2**30, 2)
    record = {**environment(), "shape": shape, "state_gib": floor, "losses": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
