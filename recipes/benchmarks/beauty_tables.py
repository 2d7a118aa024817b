"""Train SASRec on Amazon Beauty with each compressed item table; print NDCG@10 beside dense.

    python recipes/benchmarks/beauty_tables.py amazon_beauty.parquet --seeds 0
    python recipes/benchmarks/beauty_tables.py amazon_beauty.parquet --tables lma --compressions 4

Sampled softmax with 256 negatives a sequence; protocol, model and epochs are those of beauty.py,
whose sampled_softmax runs are the dense ones that the others are compared with. They have dropout
.5, at which dense is best here; smaller tables overfit less and have dropout .2, as has the row
`dense` of this script. "dsl" is dense in training and has density 1 / compression in its table.
Each training runs in a fresh process and adds one line to results/beauty_tables.jsonl; lines that
are there already are not run again. `--table` only prints.
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

from hf_rece import DynamicSparsityCallback

RESULTS = Path(__file__).parent / "results" / "beauty_tables.jsonl"
DROPOUT = 0.2
# The best of 0, .03, .1 and .5 by validation after 12 epochs: more moves undo what was learned.
INITIAL_RATIO = 0.1
TABLES: dict[str, dict[str, Any]] = {
    "dense": {"type": "dense"},
    "qr_mult": {"type": "compositional", "operation": "mult", "codes": "id"},
    "qr_add": {"type": "compositional", "operation": "add", "codes": "id"},
    "qr_concat": {"type": "compositional", "operation": "concat", "codes": "id"},
    "codes_quantile": {"type": "compositional", "codes": "quantile"},
    "codes_kmeans": {"type": "compositional", "codes": "kmeans"},
    "lma": {"type": "lma"},
    "hashing": {"type": "lma", "n_keys": 0},
    "dsl": {"type": "dense"},
}
# Compressions of each table.
GRID = dict.fromkeys(TABLES, (2.0, 4.0, 16.0)) | {"dense": (1.0,), "dsl": (2.0, 5.0, 10.0)}


def run(log: str, table: str, compression: float, seed: int, epochs: int) -> dict[str, object]:
    settings = dict(TABLES[table])
    if settings["type"] != "dense":
        settings["compression"] = compression
    callbacks = []
    if table == "dsl":
        share = {"*embed_tokens.weight": 1 / compression}
        callbacks = [DynamicSparsityCallback(share, initial_ratio=INITIAL_RATIO)]
    measured = train(
        log,
        "sampled_softmax",
        seed,
        epochs,
        item_embedding=settings,
        callbacks=callbacks,
        dropout=DROPOUT,
    )
    return {"table": table, "compression": compression, "dropout": DROPOUT, **measured}


def show() -> None:
    dense = pl.read_ndjson(DENSE, infer_schema_length=None).filter(loss="sampled_softmax")
    reference = dense["test_ndcg@10"].mean()
    runs = pl.read_ndjson(RESULTS, infer_schema_length=None)
    summary = runs.group_by("table", "compression").agg(
        pl.len().alias("seeds"),
        pl.col("epochs").first(),
        *(pl.col(c).mean() for c in ("test_ndcg@10", "test_hr@10", "test_coverage@10")),
    )
    table = Table(title=f"Amazon Beauty, leave-one-out, SASRec D=64, test; dense {reference:.4f}")
    columns = ("table", "compression", "seeds", "epochs", "NDCG@10", "of dense", "HR@10", "cov.")
    for name in columns:
        table.add_column(name, justify="left" if name == "table" else "right")
    for row in summary.sort("compression", "test_ndcg@10").iter_rows(named=True):
        ndcg = row["test_ndcg@10"]
        table.add_row(
            row["table"], f"{row['compression']:g}", str(row["seeds"]), str(row["epochs"]),
            f"{ndcg:.4f}", f"{ndcg / reference:.3f}", f"{row['test_hr@10']:.4f}",
            f"{row['test_coverage@10']:.3f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", help="amazon_beauty.parquet")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--compressions", nargs="*", type=float, default=[1, 2, 4, 5, 10, 16])
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
        if compression in GRID[table]
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
