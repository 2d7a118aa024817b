"""Save, load and ask a recommender with a million items.

    python recipes/benchmarks/serving.py --items 1000000

One process makes the model (SASRec, D=64, tied dense table, items of ten characters) and saves it;
a fresh one loads it and recommends ten items to 100 users with ten seen items each, twice: the
first call and the next. Beyond the table: the largest resident size while loading and recommending,
less the resident size before, less the bytes of the table.
Writes results/serving.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import environment
from measuring import resident_mib
from rich.console import Console
from rich.table import Table

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig

RESULTS = Path(__file__).parent / "results" / "serving.json"
N_USERS, N_SEEN, K = 100, 10, 10


def save(folder: str, n_items: int, width: int) -> dict[str, float]:
    torch.manual_seed(0)
    backbone = SASRecConfig(hidden_size=width, max_position_embeddings=50)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=n_items + 1))
    model.tokenizer = ItemTokenizer(items=[f"B{i:09d}" for i in range(n_items)])
    started = time.perf_counter()
    model.save_pretrained(folder)
    return {"save_seconds": time.perf_counter() - started}


def ask(folder: str) -> dict[str, float]:
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    model = RecommenderModel.from_pretrained(folder)
    found = {"load_seconds": time.perf_counter() - started}
    items = model.own_tokenizer().items
    histories = [
        [items[i] for i in torch.randint(len(items), (N_SEEN,)).tolist()] for _ in range(N_USERS)
    ]
    for name in ("first_recommend_seconds", "recommend_seconds"):
        started = time.perf_counter()
        model.recommend(histories, k=K)
        found[name] = time.perf_counter() - started
    table = model.get_input_embeddings().weight
    table_mib = table.numel() * table.element_size() / 2**20
    beyond = resident_mib("VmHWM") - before - table_mib
    return {**found, "table_mib": table_mib, "peak_beyond_the_table_mib": beyond}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        sys.stdout.write(json.dumps(ask(args.ask)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        row = save(folder, args.items, args.width)
        words = [sys.executable, __file__, "--ask", folder]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        row |= json.loads(done.stdout.splitlines()[-1])
        row["saved_mib"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    row["save_and_load_seconds"] = row["save_seconds"] + row["load_seconds"]
    row = {name: round(value, 2) for name, value in row.items()}
    table = Table(title=f"{args.items:,} items, D={args.width}, {N_USERS} users")
    for column in ("what", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)
    record = {**environment(), "items": args.items, "width": args.width, **row}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
