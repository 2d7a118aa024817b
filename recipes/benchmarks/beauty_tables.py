"""Train SASRec on Amazon Beauty with each compressed item table; print NDCG@10 beside dense.

    python recipes/benchmarks/beauty_tables.py amazon_beauty.parquet --seeds 0
    python recipes/benchmarks/beauty_tables.py amazon_beauty.parquet --tables lma --compressions 4

Exact cross-entropy; protocol, model and epochs are those of beauty.py, whose cross_entropy runs are
the dense ones. Each training runs in a fresh process and adds one line to
results/beauty_tables.jsonl; lines that are there already are not run again. `--table` only prints.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
from beauty import RESULTS as DENSE
from beauty import train
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "beauty_tables.jsonl"
TABLES: dict[str, dict[str, Any]] = {
    "qr_mult": {"type": "compositional", "operation": "mult", "codes": "id"},
    "qr_add": {"type": "compositional", "operation": "add", "codes": "id"},
    "qr_concat": {"type": "compositional", "operation": "concat", "codes": "id"},
    "codes_quantile": {"type": "compositional", "codes": "quantile"},
    "codes_kmeans": {"type": "compositional", "codes": "kmeans"},
    "lma": {"type": "lma"},
    "hashing": {"type": "lma", "n_keys": 0},
}


def run(log: str, table: str, compression: float, seed: int, epochs: int) -> dict[str, object]:
    settings = {**TABLES[table], "compression": compression}
    measured = train(log, "cross_entropy", seed, epochs, item_embedding=settings)
    return {"table": table, "compression": compression, "item_embedding": settings, **measured}


def show() -> None:
    dense = pl.read_ndjson(DENSE, infer_schema_length=None).filter(loss="cross_entropy")
    exact = dense["test_ndcg@10"].mean()
    runs = pl.read_ndjson(RESULTS, infer_schema_length=None)
    summary = runs.group_by("table", "compression").agg(
        pl.len().alias("seeds"),
        pl.col("epochs").first(),
        *(pl.col(c).mean() for c in ("test_ndcg@10", "test_hr@10", "test_coverage@10")),
    )
    table = Table(title="Amazon Beauty, leave-one-out, SASRec D=64, exact cross-entropy, test")
    columns = ("table", "compression", "seeds", "epochs", "NDCG@10", "of dense", "HR@10", "cov.")
    for name in columns:
        table.add_column(name, justify="left" if name == "table" else "right")
    for row in summary.sort("compression", "test_ndcg@10").iter_rows(named=True):
        ndcg = row["test_ndcg@10"]
        table.add_row(
            row["table"], f"{row['compression']:g}", str(row["seeds"]), str(row["epochs"]),
            f"{ndcg:.4f}", f"{ndcg / exact:.3f}", f"{row['test_hr@10']:.4f}",
            f"{row['test_coverage@10']:.3f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", help="amazon_beauty.parquet")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--compressions", nargs="*", type=float, default=[2, 4, 16])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--one", action="store_true", help="train in this process and print JSON")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    wanted = [
        (table, compression, seed)
        for seed in args.seeds
        for compression in args.compressions
        for table in args.tables
    ]
    if args.one:
        print(json.dumps(run(args.log, *wanted[0], args.epochs)))
        return
    for table, compression, seed in wanted if not args.table else []:
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        done = [json.loads(line) for line in lines]
        key = (table, compression, seed, args.epochs)
        if any((r["table"], r["compression"], r["seed"], r["epochs"]) == key for r in done):
            continue
        command = [sys.executable, __file__, args.log, "--one", "--tables", table]
        command += ["--compressions", str(compression), "--seeds", str(seed)]
        command += ["--epochs", str(args.epochs)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        with RESULTS.open("a") as file:
            file.write(line.splitlines()[-1] + "\n")
        print(line.splitlines()[-1], flush=True)
    show()


if __name__ == "__main__":
    main()
