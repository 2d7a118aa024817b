"""Measure loss + backward beside plain matrix products of as many operations.

    python recipes/benchmarks/products.py                # N=4096, C=100,000, D=64
    python recipes/benchmarks/products.py --tokens 25600 --classes 1000000 --losses rece

A loss that scores P (token, class) pairs makes four products of them: logits, the same again in
backward, and two gradients, 8 P D operations. They are given four yardsticks: "plain", hidden
states by a matrix of D rows, four times P / N columns, by torch.matmul into memory that is there;
"batched", as many for each bucket at once (RECE); "square", matrices of 1,024 by torch.matmul; and
"onednn", the same by oneDNN, on some processors twice as fast. Loss and yardsticks take turns;
least times count.
Writes results/products_N_C_D.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from measuring import Row, flops_per_second, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_rece.losses import build_loss
from hf_rece.losses.planning import LossPlan, plan_losses
from hf_rece.ops.products import product

RESULTS = Path(__file__).parent / "results"
COLUMNS = 1 << 13  # of a plain product at once: its output stays below the memory of a machine


def plain(n_tokens: int, width: int, n_pairs: int) -> Callable[[], torch.Tensor]:
    """Return four products of the pairs, hidden states by columns."""
    n_columns = 4 * -(-n_pairs // n_tokens)
    hidden, output = torch.randn(n_tokens, width), torch.empty(n_tokens * COLUMNS)
    matrix = torch.randn(width, min(n_columns, COLUMNS))

    def products() -> torch.Tensor:
        for start in range(0, n_columns, COLUMNS):
            n = min(COLUMNS, n_columns - start)
            torch.matmul(hidden, matrix[:, :n], out=output[: n_tokens * n].view(n_tokens, n))
        return output

    return products


def batched(n_tokens: int, width: int, n_pairs: int, n_groups: int) -> Callable[[], torch.Tensor]:
    """Return four products of the pairs, in groups of tokens that meet the same classes."""
    tokens = -(-n_tokens // n_groups)
    n_columns = -(-n_pairs // (n_groups * tokens))
    left, right = torch.randn(n_groups, tokens, width), torch.randn(n_groups, width, n_columns)
    output = torch.empty(n_groups, tokens, n_columns)

    def products() -> torch.Tensor:
        for _ in range(4):
            torch.matmul(left, right, out=output)
        return output

    return products


def measure(plan: LossPlan, args: argparse.Namespace) -> Row:
    """Return least seconds of a loss and of the yardsticks."""
    n, width = args.tokens, args.width
    n_pairs = n * plan.candidates
    hidden = torch.randn(n, width).requires_grad_()
    weight = (0.1 * torch.randn(args.classes, width)).requires_grad_()
    labels = torch.randint(args.classes, (n,))
    loss = build_loss(plan.loss)

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        value = loss(hidden, weight, labels)
        value.backward()
        return value

    turns = {"loss": step, "plain": plain(n, width, n_pairs)}
    if plan.loss == "rece":
        turns["batched"] = batched(n, width, n_pairs, plan.knobs["n_buckets"])
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in track(range(args.repeats + 1), plan.loss, transient=True):
        for name, turn in turns.items():
            times[name].append(timed(turn))
    seconds = {name: min(each[1:]) for name, each in times.items()}
    operations = 8.0 * n_pairs * width
    seconds["square"] = operations / flops_per_second("cpu", torch.float32)
    square = torch.randn(1024, 1024)
    best = min(timed(lambda: product(square, square)) for _ in range(args.repeats))
    seconds["onednn"] = operations * best / (2 * 1024**3)
    over = {f"over_{name}": seconds["loss"] / each for name, each in seconds.items()}
    del over["over_loss"]
    return {"pairs": n_pairs, "seconds": seconds, **{k: round(v, 2) for k, v in over.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 4096), ("classes", 100_000), ("width", 64), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--losses", nargs="*", default=["cross_entropy", "rece", "stratified"])
    args = parser.parse_args()
    shape = {"tokens": args.tokens, "classes": args.classes, "width": args.width}
    plans = plan_losses(*shape.values(), losses=args.losses)
    rows = {plan.loss: measure(plan, args) for plan in plans if plan.loss in args.losses}
    table = Table(title=f"Loss + backward over products of its pairs, {shape}")
    for column in (
        "loss",
        "million pairs",
        "seconds",
        "/ plain",
        "/ batched",
        "/ square",
        "/ onednn",
    ):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for name, row in rows.items():
        ratios = [
            str(row.get(f"over_{kind}", "")) for kind in ("plain", "batched", "square", "onednn")
        ]
        seconds = f"{row['seconds']['loss']:.4f}"
        table.add_row(name, f"{row['pairs'] / 1e6:,.1f}", seconds, *ratios)
    Console(width=100).print(table)
    path = RESULTS / f"products_{args.tokens}_{args.classes}_{args.width}.json"
    found = {**environment(), "shape": shape, "losses": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
