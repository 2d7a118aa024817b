"""Prepare a log that is written as it is drawn: rate, peak memory, disk.

    python recipes/benchmarks/prepare.py --interactions 100000000

A synthetic log (strings as ids, a million items) goes to 24 Parquet files, one for each part of the
time, a quarter of a million users after another; a fresh process prepares it (leave-one-out, three
interactions a user at least). Peaks are of resident memory (VmHWM); CPU seconds add up all threads.
With --in_memory, another fresh process does the same by load_interactions and leave_one_out_split.
Writes results/prepare.json, a row for each number of interactions. With --folder, the log stays
there for another time; all else is removed.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from environment import environment
from measuring import in_fresh_process, resident_mib
from rich.console import Console
from rich.table import Table

from hf_rece import generate_interactions, k_core_filter, leave_one_out_split, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepare import prepare_log

RESULTS = Path(__file__).parent / "results" / "prepare.json"
N_FILES, USERS_A_CHUNK, MEAN_LENGTH = 24, 250_000, 12.0


def write_log(folder: Path, n_interactions: int, n_items: int) -> None:
    """Write the log, a chunk of users at a time, unless it is there."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    written = chunk = 0
    with ExitStack() as stack:
        writers = None
        while written < n_interactions:
            rows = generate_interactions(
                USERS_A_CHUNK, n_items, mean_length=MEAN_LENGTH, n_interests=400, seed=chunk
            )
            rows = rows.with_columns(pl.format("{}{}", pl.lit(chunk), "user_id").alias("user_id"))
            rows = rows.head(n_interactions - written).sort("timestamp")
            tables = [part.to_arrow(compat_level=pl.CompatLevel.oldest()) for part in months(rows)]
            if writers is None:
                paths = [folder / f"{i:02d}.parquet" for i in range(N_FILES)]
                writers = [
                    stack.enter_context(pq.ParquetWriter(path, tables[0].schema)) for path in paths
                ]
            for writer, table in zip(writers, tables, strict=True):
                writer.write_table(table)
            written, chunk = written + len(rows), chunk + 1


def months(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """Return the rows of each part of the time, all chunks cut at the same points."""
    first, last = 1_600_000_000, 1_600_000_000 + 15 * 30 * 24 * 3600
    inner = np.linspace(first, last, N_FILES + 1)[1:-1]
    ends = [0, *np.searchsorted(rows["timestamp"].to_numpy(), inner), len(rows)]
    return [rows[a:b] for a, b in pairwise(ends)]


def measure(source: str, output: str | None) -> dict[str, float]:
    before = resident_mib("VmHWM")
    started, worked = time.perf_counter(), time.process_time()
    if output is None:
        log = k_core_filter(
            load_interactions(source), min_user_interactions=3, min_item_interactions=1
        )
        splits = leave_one_out_split(log, ItemTokenizer.from_interactions(log))
        found = {"train_sequences": len(splits["train"])}
    else:
        prepared = prepare_log(source, output, progress=True)
        found = {
            "train_sequences": len(prepared.split("train")),
            "items": prepared.manifest["items"],
        }
    seconds = time.perf_counter() - started
    return {
        **found,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "peak_mib": round(resident_mib("VmHWM")),
        "peak_mib_of_imports": round(before),
    }


def run(n_interactions: int, n_items: int, in_memory: bool, where: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        log = Path(where or folder) / f"log_{n_interactions}_{n_items}"
        write_log(log, n_interactions, n_items)
        words = [__file__, "--measure", str(log / "*.parquet")]
        row = {"interactions": n_interactions, "log_mib": size_mib(log)}
        row |= in_fresh_process([*words, f"{folder}/prepared"])
        if "seconds" in row:
            row["interactions_per_second"] = round(n_interactions / row["seconds"])
            row["prepared_mib"] = size_mib(Path(folder) / "prepared")
        if in_memory:
            other = in_fresh_process(words)
            row |= {f"{name}_in_memory": value for name, value in other.items()}
        return row


def size_mib(folder: Path) -> int:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interactions", type=int, default=5_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--in_memory", action="store_true", help="measure the way in memory too")
    parser.add_argument("--folder", help="where there is space: 50 bytes an interaction")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        source, output = [*args.measure, None][:2]
        sys.stdout.write(json.dumps(measure(source, output)) + "\n")
        return
    row = run(args.interactions, args.items, args.in_memory, args.folder)
    table = Table(title=f"{row['interactions']:,} interactions")
    for column in ("what", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if not isinstance(value, str) else value)
    Console().print(table)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [other for other in rows if other["interactions"] != row["interactions"]] + [row]
    rows.sort(key=lambda each: each["interactions"])
    RESULTS.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
