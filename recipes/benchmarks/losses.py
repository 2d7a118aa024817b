"""Measure extra peak memory and time of loss + backward beside the peers, each in a fresh process.

    python recipes/benchmarks/losses.py                                    # N=4096, C=100,000, D=64
    python recipes/benchmarks/losses.py --tokens 25600 --classes 1000000 --repeats 1
    python recipes/benchmarks/losses.py --tokens 2048 --classes 151936 --width 896 --repeats 1
    python recipes/benchmarks/losses.py --grid recommender language_model --repeats 1
    python recipes/benchmarks/losses.py --tokens 16384 --classes 248320 --width 2048 --device cuda

Memory: inputs and zeroed gradients are allocated and touched, the peak counter is reset, and the
peak (resident size on a CPU, allocated bytes on a GPU) during loss + backward is read, less what
was there before; a run on 64 tokens has loaded the code; the median of `--passes` through all
contenders in turn. Time: the least of the repeats after the first, and of the passes, because a
machine is not equally fast at all times. float32 on a CPU, bfloat16 on a GPU, or `--dtype`.
`--frozen`: the output rows want no gradient, as under an adapter on other layers.
Writes results/losses_N_C_D.json (_frozen, _cuda_DTYPE), with `--grid` a line for each shape of
results/losses_grid.jsonl; lines that are there already are not run again.
"""

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, DENSE, LABELS, Shape, reason_not_to_run
from environment import environment
from measuring import MIB, Row, cost, flops_per_second, fold, in_fresh_process, timed
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
EXACT = "cross_entropy"
GRIDS = {
    "recommender": [
        (4096, 10_000, 64), (4096, 100_000, 64), (25_600, 100_000, 64), (25_600, 100_000, 256),
        (4096, 1_000_000, 64), (25_600, 1_000_000, 64), (100_000, 1_000_000, 128),
        (4096, 10_000_000, 64), (25_600, 10_000_000, 64),
    ],
    "language_model": [
        (2048, 32_000, 1024), (8192, 32_000, 4096), (2048, 151_936, 1024), (8192, 128_256, 4096),
        (16_384, 248_320, 2048), (8192, 262_144, 2048),
    ],
}  # fmt: skip


def inputs(shape: Shape, frozen: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(shape.device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def draw(n_rows: int) -> torch.Tensor:
        return torch.randn(
            n_rows, shape.width, generator=generator, device=shape.device, dtype=dtype
        )

    hidden, weight = draw(shape.tokens), draw(shape.classes).mul_(0.1)
    for tensor in (hidden,) if frozen else (hidden, weight):
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor).zero_()  # ones first: zeros alone are not touched
    size, where = (shape.tokens,), shape.device
    return hidden, weight, torch.randint(shape.classes, size, generator=generator, device=where)


def measure(name: str, shape: Shape, repeats: int, frozen: bool) -> Row:
    loss = CONTENDERS[name].make()
    values = []

    def step(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        value = loss(*tensors)
        value.backward()
        values.append(value.detach())
        return value

    # The first call loads the code: no part of a loss's memory.
    small = inputs(Shape(64, 512, shape.width, shape.dtype, shape.device), frozen)
    timed(lambda: step(small))
    tensors = inputs(shape, frozen)
    row = cost(lambda: step(tensors), shape.device, repeats)
    return {**row, "loss": round(float(values[-1]), 5)}


def run(args: argparse.Namespace, shape: Shape, speed: float) -> dict[str, Row]:
    """Return a row for each contender, whether it ran or not."""
    rows: dict[str, list[Row]] = {name: [] for name in args.contenders}
    for _ in range(args.passes):
        for name, passes in rows.items():
            reason = reason_not_to_run(name, shape, speed, args.timeout)
            words = [__file__, "--only", name, "--repeats", str(args.repeats)]
            for field, value in asdict(shape).items():
                words += [f"--{field}", str(value)]
            words += ["--frozen"] * args.frozen
            passes.append({"not_run": reason} if reason else in_fresh_process(words, args.timeout))
    return {name: fold(passes) for name, passes in rows.items()}


def show(rows: dict[str, Row], shape: Shape, floor: float) -> None:
    reference = DENSE if "seconds" in rows.get(DENSE, {}) else EXACT
    title = f"N={shape.tokens:,}, C={shape.classes:,}, D={shape.width}, {shape.dtype}"
    table = Table(title=f"Loss + backward, {title}; the gradients alone: {floor:.0f} MiB")
    for name in ("loss", "extra peak MiB", "seconds", f"time / {reference}"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for name, row in rows.items():
        label = LABELS.get(name, name)
        if "not_run" in row:
            table.add_row(label, row["not_run"], "", "")
            continue
        ratio = row["seconds"] / rows.get(reference, {}).get("seconds", float("nan"))
        if ratio == ratio:
            row[f"time_over_{reference}"] = round(ratio, 4)
        seconds = f"{row['seconds']:.4f}"
        table.add_row(label, f"{row['extra_peak_mib']:,.0f}", seconds, f"{ratio:.4f}")
    Console(width=120).print(table)


def record(args: argparse.Namespace, shape: Shape, speed: float) -> dict[str, Any]:
    rows = run(args, shape, speed)
    floor = shape.itemsize * shape.width * (shape.tokens + shape.classes * (not args.frozen)) / MIB
    show(rows, shape, floor)
    head = {**environment(shape.device), "shape": asdict(shape), "frozen": args.frozen}
    return {**head, "gradients_mib": round(floor, 1), "losses": rows}


def run_grid(args: argparse.Namespace, speed: float) -> None:
    path = RESULTS / "losses_grid.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = [json.loads(line)["shape"] for line in lines]
    for sizes in (sizes for name in args.grid for sizes in GRIDS[name]):
        shape = Shape(*sizes, args.dtype, args.device)
        if asdict(shape) not in done:
            line = json.dumps(record(args, shape, speed))
            with path.open("a") as file:
                file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 4096), ("classes", 100_000), ("width", 64), ("repeats", 5),
                        ("passes", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--grid", nargs="*", default=[], choices=GRIDS)
    parser.add_argument(
        "--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME"
    )
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU, if not given")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one contender")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--only", help="measure this one in this process and print JSON")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.contenders = [name for name in args.contenders if name not in args.skip]
    shape = Shape(args.tokens, args.classes, args.width, args.dtype, args.device)
    if args.only:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(args.only, shape, args.repeats, args.frozen)))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    speed = flops_per_second(args.device, getattr(torch, args.dtype))
    if args.grid:
        run_grid(args, speed)
        return
    suffix = "_frozen" * args.frozen
    suffix += f"_{args.device}_{args.dtype}" * (args.device != "cpu")
    path = RESULTS / f"losses_{args.tokens}_{args.classes}_{args.width}{suffix}.json"
    path.write_text(json.dumps(record(args, shape, speed), indent=1) + "\n")


if __name__ == "__main__":
    main()
