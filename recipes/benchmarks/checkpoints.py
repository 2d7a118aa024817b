"""Size of a saved recommender with each item table, after checking that it loads bit for bit.

    python recipes/benchmarks/checkpoints.py --classes 1000000

The compressed tables are at 16x, dynamic sparse learning at densities .5, .2 and .1 of the table,
after two training steps. Writes results/checkpoints.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from environment import environment
from rich.console import Console
from rich.table import Table
from tables import COMPRESSION, TABLES

from hf_rece import (
    DynamicSparsityCallback,
    RecommenderConfig,
    RecommenderModel,
    RecommenderTrainer,
    RecommenderTrainingArguments,
    SASRecConfig,
)

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
DENSITIES = (0.5, 0.2, 0.1)


def make(n_classes: int, item_embedding: dict[str, Any] | None) -> RecommenderModel:
    backbone = SASRecConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=50)
    config = RecommenderConfig(
        backbone=backbone,
        vocab_size=n_classes,
        item_embedding=item_embedding,
        loss_type="sampled_softmax",
    )
    return RecommenderModel(config)


def sparse(n_classes: int, density: float, folder: str) -> RecommenderModel:
    model = make(n_classes, None)
    histories = torch.randint(1, n_classes, (8, 10)).tolist()
    arguments = RecommenderTrainingArguments(
        output_dir=folder, max_steps=2, save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    callback = DynamicSparsityCallback({"*embed_tokens.weight": density}, update_interval=1)
    train = Dataset.from_dict({"item_ids": histories})
    RecommenderTrainer(model, arguments, train_dataset=train, callbacks=[callback]).train()
    return model


def measure(model: RecommenderModel, folder: str) -> dict[str, float]:
    model.save_pretrained(folder)
    again = RecommenderModel.from_pretrained(folder)
    state, loaded = model.state_dict(), again.state_dict()
    if state.keys() != loaded.keys() or not all(torch.equal(loaded[n], state[n]) for n in state):
        raise SystemExit("the checkpoint does not load bit for bit")
    return {"mib": round((Path(folder) / "model.safetensors").stat().st_size / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for name, table in TABLES.items():
        settings = table if name == "dense" else {**table, "compression": COMPRESSION}
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(make(args.classes, settings), folder)
    for density in DENSITIES:
        with tempfile.TemporaryDirectory() as folder:
            rows[f"dsl, density {density:g}"] = measure(
                sparse(args.classes, density, folder), folder
            )
    table = Table(title=f"model.safetensors, {args.classes:,} items, D=64; loads bit for bit")
    for column in ("table", "MiB", "times smaller"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, row in rows.items():
        row["times_smaller"] = round(rows["dense"]["mib"] / row["mib"], 2)
        table.add_row(name, f"{row['mib']:,.1f}", str(row["times_smaller"]))
    Console().print(table)
    record = {**environment(), "classes": args.classes, "compression": COMPRESSION, "tables": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
