"""Measure extra peak memory and time of loss + backward on the CPU, each in a fresh process.

    python recipes/benchmarks/losses.py                                    # N=4096, C=100,000, D=64
    python recipes/benchmarks/losses.py --tokens 25600 --classes 1000000 --skip dense --repeats 1
    python recipes/benchmarks/losses.py --tokens 2048 --classes 151936 --width 896 --repeats 1

Memory: inputs and zeroed gradients are allocated and touched, the peak counter is reset, and the
peak resident size during loss + backward is read, less the resident size before; a run on 64 tokens
has loaded the code; the median of `--passes` through all losses in turn. Time: the least of the
repeats after the first, and of the passes, because a machine is not equally fast at all times.
`--frozen`: the output rows want no gradient, as under an adapter on other layers.
Writes results/losses_N_C_D.json, or losses_N_C_D_frozen.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from hf_rece.losses import LOSSES, build_loss

RESULTS = Path(__file__).parent / "results"
DENSE = "dense"


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def dense(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


def inputs(n_tokens: int, n_classes: int, width: int, frozen: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, width, generator=generator)
    weight = torch.randn(n_classes, width, generator=generator).mul_(0.1)
    for tensor in (hidden,) if frozen else (hidden, weight):
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor).zero_()  # ones first: zeros alone are not touched
    return hidden, weight, torch.randint(n_classes, (n_tokens,), generator=generator)


def timed(loss_type: str, tensors: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    loss = dense(*tensors) if loss_type == DENSE else build_loss(loss_type)(*tensors)
    loss.backward()
    return time.perf_counter() - start


def measure(loss_type: str, shape: dict[str, int], repeats: int, frozen: bool) -> dict[str, float]:
    # The first call loads the code: no part of a loss's memory.
    timed(loss_type, inputs(64, 512, shape["width"], frozen))
    tensors = inputs(shape["tokens"], shape["classes"], shape["width"], frozen)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    first = timed(loss_type, tensors)
    peak = resident_mib("VmHWM") - before
    times = [timed(loss_type, tensors) for _ in range(repeats)] or [first]
    return {"extra_peak_mib": round(peak, 1), "seconds": min(times)}


def in_fresh_process(
    loss_type: str, shape: dict[str, int], repeats: int, frozen: bool
) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", loss_type, "--repeats", str(repeats)]
    for name, value in shape.items():
        command += [f"--{name}", str(value)]
    command += ["--frozen"] * frozen
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{loss_type} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def show(rows: dict[str, dict[str, float]], shape: dict[str, int], floor: float) -> None:
    reference = DENSE if DENSE in rows else "cross_entropy"
    title = "N={tokens:,}, C={classes:,}, D={width}".format(**shape)
    table = Table(title=f"Loss + backward, {title}; the gradients alone: {floor:.0f} MiB")
    for name in ("loss", "extra peak MiB", "seconds", f"time / {reference}"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for name, row in rows.items():
        ratio = row["seconds"] / rows[reference]["seconds"]
        row[f"time_over_{reference}"] = round(ratio, 4)
        table.add_row(
            name, f"{row['extra_peak_mib']:,.0f}", f"{row['seconds']:.3f}", f"{ratio:.4f}"
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 4096), ("classes", 100_000), ("width", 64), ("repeats", 5),
                        ("passes", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--only", help="measure this loss in this process and print JSON")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("tokens", "classes", "width")}
    if args.only:
        print(json.dumps(measure(args.only, shape, args.repeats, args.frozen)))
        return
    names = [name for name in (DENSE, *LOSSES) if name not in args.skip]
    passes = [
        {name: in_fresh_process(name, shape, args.repeats, args.frozen) for name in names}
        for _ in range(args.passes)
    ]
    rows = {
        name: {
            "extra_peak_mib": median(each[name]["extra_peak_mib"] for each in passes),
            "seconds": min(each[name]["seconds"] for each in passes),
        }
        for name in names
    }
    floor = 4 * args.width * (args.tokens + args.classes * (not args.frozen)) / 2**20
    show(rows, shape, floor)
    record = {
        "shape": shape,
        "frozen": args.frozen,
        "gradients_mib": round(floor, 1),
        "losses": rows,
    }
    suffix = "_frozen" * args.frozen
    path = RESULTS / f"losses_{args.tokens}_{args.classes}_{args.width}{suffix}.json"
    path.write_text(json.dumps({**environment(), **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
