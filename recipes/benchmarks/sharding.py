r"""Memory of each process, one against several, for a vocabulary that is cut over them.

    python recipes/benchmarks/sharding.py      # 4 million classes, width 64, 1,024 tokens

A step looks N input ids up, scores them against the same table (tied), goes backward, and updates
with fused Adam; two steps, the first of which makes the moments. With W processes each holds C / W
rows and brings N / W tokens. Memory is the largest resident size from before there was a table, in
the process that takes most; every run is in fresh processes on this machine, with a thread each.
The first process's losses are compared too: both runs draw the same rows.
Writes results/sharding.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from environment import environment
from measuring import Row, forget_peak, plain, resident_mib
from rich.console import Console
from rich.table import Table
from torch import distributed

from hf_rece.embeddings.sharded import ShardedEmbedding, draw_rows
from hf_rece.losses import build_loss
from hf_rece.ops.shards import shard_classes

RESULTS = Path(__file__).parent / "results"
STEPS = 2


def make(n_classes: int, width: int) -> ShardedEmbedding:
    table = ShardedEmbedding(shard_classes(n_classes), width)
    draw_rows(table.weight, table.shards, std=0.1)
    return table


def step(table: ShardedEmbedding, loss_type: str, ids: tuple[torch.Tensor, ...]) -> float:
    """Return the mean loss of all tokens, after forward, backward and its optimizer step."""
    optimizer = torch.optim.Adam(table.parameters(), fused=True)
    inputs, labels = (part.chunk(table.shards.world_size)[table.shards.rank] for part in ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = build_loss(loss_type)(table(inputs), table.rows, labels, generator=generator)
        loss.backward()
        optimizer.step()
    total = table.shards.sum(loss.detach().clone())
    return float(total) / table.shards.world_size


def measure(loss_type: str, shape: tuple[int, int, int]) -> Row:
    n_tokens, n_classes, width = shape
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step(make(4096, width), loss_type, tuple(torch.randint(4096, (2, 64))))  # loads the code
    torch.manual_seed(0)
    ids = tuple(torch.randint(n_classes, (2, n_tokens)))
    before = resident_mib("VmRSS")
    forget_peak()
    loss = step(make(n_classes, width), loss_type, ids)
    return {"extra_peak_mib": round(resident_mib("VmHWM") - before, 1), "loss": round(loss, 6)}


def in_processes(world_size: int, loss_type: str, shape: tuple[int, int, int]) -> Row:
    """Return the largest memory of the processes, that of each, and the loss."""
    words = [__file__, "--losses", loss_type, "--shape", *map(str, shape)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    with TemporaryDirectory() as folder:
        command = [sys.executable, *launch, *words, "--one", folder]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"not_run": plain(done.stderr.strip().splitlines()[-1])}
        rows = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    of_each = [row["extra_peak_mib"] for row in rows]
    return {"extra_peak_mib": max(of_each), "of_each": of_each, "loss": rows[0]["loss"]}


def show(runs: dict[str, Row], shape: tuple[int, int, int]) -> None:
    title = "Two steps with Adam, N={:,}, C={:,}, D={}".format(*shape)
    table = Table(title=title)
    for name in ("loss", "processes", "MiB a process", "/ one", "loss of step 2"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for key, row in runs.items():
        loss_type, world_size = key.split(", ")
        cells = [row["not_run"], "", ""] if "not_run" in row else [
            f"{row['extra_peak_mib']:,.0f}", f"{row['share_of_one']:.3f}", f"{row['loss']:.5f}"
        ]  # fmt: skip
        table.add_row(loss_type, world_size, *cells)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[1024, 4_000_000, 64], help="N C D")
    parser.add_argument("--losses", nargs="*", default=["stratified", "cross_entropy"])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--one", help="be a process that writes into this folder")
    args = parser.parse_args()
    shape = tuple(args.shape)
    if args.one:
        distributed.init_process_group("gloo")
        row = measure(args.losses[0], shape)
        Path(args.one, f"{distributed.get_rank()}.json").write_text(json.dumps(row))
        distributed.barrier()
        distributed.destroy_process_group()
        return
    runs: dict[str, Row] = {}
    for loss_type in args.losses:
        for world_size in args.processes:
            row = runs[f"{loss_type}, {world_size}"] = in_processes(world_size, loss_type, shape)
            one = runs.get(f"{loss_type}, 1", {}).get("extra_peak_mib")
            if one and "not_run" not in row:
                row["share_of_one"] = round(row["extra_peak_mib"] / one, 3)
            print(loss_type, world_size, json.dumps(row), flush=True)
    show(runs, shape)
    record = {**environment(), "shape": shape, "runs": runs}
    (RESULTS / "sharding.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
