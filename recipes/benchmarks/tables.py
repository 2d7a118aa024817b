r"""One training step with each item table: memory of all that is kept, peak, seconds.

    python recipes/benchmarks/tables.py                                           # C=100,000
    python recipes/benchmarks/tables.py --classes 10000000 --losses rece stratified --repeats 1
    python recipes/benchmarks/tables.py --classes 10000000 --suffix _sparse_grad \
        --losses sampled_softmax sce --tables dense "dense, sparse_grad"

A step looks N input ids up, scores them against the same table (tied), goes backward, and updates
with fused Adam, or with RowAdamW where gradients are sparse. Each (table, loss) runs in a fresh
process. Peak: the largest resident size after the table is made and stepped, less the resident size
before there was a table. State: bytes of parameters, codes and signatures, gradients and both
moments, counted from the live tensors. Time: the least of the repeats after the first step, which
makes the moments.
Writes results/tables_N_C_D.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from measuring import resident_mib
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_rece.embeddings.item_table import item_table_settings
from hf_rece.losses import build_loss
from hf_rece.losses.options import SPARSE_GRAD_LOSSES
from hf_rece.training.row_adam import RowAdamW

RESULTS = Path(__file__).parent / "results"
COMPRESSION = 16
SPARSE_GRAD = "dense, sparse_grad"
TABLES: dict[str, dict[str, Any]] = {
    "dense": {"type": "dense"},
    SPARSE_GRAD: {"type": "dense"},
    "qr_mult": {"type": "compositional", "operation": "mult", "codes": "id"},
    "qr_add": {"type": "compositional", "operation": "add", "codes": "id"},
    "qr_concat": {"type": "compositional", "operation": "concat", "codes": "id"},
    "codes": {"type": "compositional", "operation": "concat", "codes": "given"},
    "lma": {"type": "lma"},
    "hashing": {"type": "lma", "n_keys": 0},
}


def make(name: str, n_classes: int, width: int) -> nn.Module:
    if name in ("dense", SPARSE_GRAD):
        return nn.Embedding(n_classes, width, sparse=name == SPARSE_GRAD)
    table = item_table_settings({**TABLES[name], "compression": COMPRESSION}).make(n_classes, width)
    if name == "codes":
        radices = table.radices
        # Codes as a log would give them: each digit says nothing of the id's number.
        columns = [torch.randint(radix, (n_classes,), dtype=torch.int32) for radix in radices]
        table.codes.copy_(torch.stack(columns, dim=1))
    return table


def optimizer_of(name: str, table: nn.Module) -> torch.optim.Optimizer:
    if name == SPARSE_GRAD:
        return RowAdamW(table.parameters())
    return torch.optim.Adam(table.parameters(), fused=True)


def n_bytes(tensor: torch.Tensor) -> int:
    if tensor.is_sparse:
        return n_bytes(tensor._indices()) + n_bytes(tensor._values())
    return tensor.numel() * tensor.element_size()


def step(table: nn.Module, loss: Callable[..., Any], ids: tuple[torch.Tensor, ...]) -> None:
    inputs, labels = ids
    weight = table.weight if isinstance(table, nn.Embedding) else table
    loss(table(inputs), weight, labels).backward()


def measure(name: str, loss_type: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    n_tokens, n_classes, width = shape
    torch.manual_seed(0)
    loss = build_loss(loss_type, **({"sparse_grad": True} if name == SPARSE_GRAD else {}))
    small = make(name, 4096, width)
    step(small, loss, torch.randint(4096, (2, 64)).unbind(0))  # loads the code
    optimizer_of(name, small).step()
    ids = torch.randint(n_classes, (2, n_tokens)).unbind(0)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    table = make(name, n_classes, width)
    optimizer = optimizer_of(name, table)
    seconds = []
    for _ in range(1 + repeats):
        optimizer.zero_grad()
        start = time.perf_counter()
        step(table, loss, ids)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resident_mib("VmHWM") - before
    tensors = [*table.parameters(), *table.buffers(), *(p.grad for p in table.parameters())]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    return {
        "extra_peak_mib": round(peak, 1),
        "state_mib": round(sum(map(n_bytes, tensors)) / 2**20, 1),
        "parameters": sum(p.numel() for p in table.parameters()),
        "seconds": min(seconds[1:]),
    }


def show(runs: dict[str, dict[str, Any]], shape: tuple[int, int, int]) -> None:
    title = "One step with Adam, N={:,}, C={:,}, D={}, 16x compression".format(*shape)
    table = Table(title=title)
    for name in ("loss", "table", "extra peak MiB", "state MiB", "fewer", "seconds", "/ dense"):
        table.add_column(name, justify="left" if name in ("loss", "table") else "right")
    for key, row in runs.items():
        loss_type, name = key.split(", ", 1)
        dense = runs.get(f"{loss_type}, dense")
        if dense is not None:
            row["state_fewer"] = round(dense["state_mib"] / row["state_mib"], 2)
            row["time_over_dense"] = round(row["seconds"] / dense["seconds"], 3)
        table.add_row(
            loss_type, name, f"{row['extra_peak_mib']:,.0f}", f"{row['state_mib']:,.0f}",
            str(row.get("state_fewer", "")),
            f"{row['seconds']:.3f}", str(row.get("time_over_dense", "")),
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 4096), ("classes", 100_000), ("width", 64), ("repeats", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--losses", nargs="*", default=["cross_entropy", "rece", "sce", "stratified"]
    )
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--suffix", default="", help="of the name of the results")
    parser.add_argument("--one", action="store_true", help="measure in this process, print JSON")
    args = parser.parse_args()
    shape = (args.tokens, args.classes, args.width)
    if args.one:
        print(json.dumps(measure(args.tables[0], args.losses[0], shape, args.repeats)))
        return
    runs = {}
    for loss_type in args.losses:
        for name in args.tables:
            if name == SPARSE_GRAD and loss_type not in SPARSE_GRAD_LOSSES:
                continue
            command = [sys.executable, __file__, "--one", "--losses", loss_type, "--tables", name]
            for field in ("tokens", "classes", "width", "repeats"):
                command += [f"--{field}", str(getattr(args, field))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[f"{loss_type}, {name}"] = json.loads(done.stdout)
            print(loss_type, name, done.stdout.strip(), flush=True)
    show(runs, shape)
    record = {**environment(), "shape": shape, "compression": COMPRESSION, "runs": runs}
    path = RESULTS / ("tables_{}_{}_{}{}.json".format(*shape, args.suffix))
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
