"""Train SASRec on Amazon Beauty with each loss for equal epochs; print NDCG@10, time and memory.

    python recipes/benchmarks/beauty.py amazon_beauty.parquet --seeds 0
    python recipes/benchmarks/beauty.py amazon_beauty.parquet --losses stratified --seeds 0 1 2

Leave-one-out, full ranking, seen items filtered, test metrics of the best of eight points
by validation NDCG@10.
Each training runs in a fresh process and adds one line to results/beauty.jsonl; lines that are
there already are not run again. `--table` only prints what is there.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from environment import environment
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.trainer import RecommenderTrainer

RESULTS = Path(__file__).parent / "results" / "beauty.jsonl"
LOSSES = {
    "cross_entropy": {"loss_type": "cross_entropy"},
    "stratified": {"loss_type": "stratified"},
    "stratified_2560": {
        "loss_type": "stratified",
        "n_groups": 400,
        "n_hard": 512,
        "n_random": 2048,
    },
    "rece": {"loss_type": "rece"},
    "sce": {"loss_type": "sce"},
    "sampled_softmax": {
        "loss_type": "sampled_softmax",
        "n_negatives": 256,
        "shared_by": "sequence",
    },
    "sampled_softmax_batch": {"loss_type": "sampled_softmax", "n_negatives": 256},
    "sampled_softmax_batch_sparse_grad": {
        "loss_type": "sampled_softmax",
        "n_negatives": 256,
        "sparse_grad": True,
    },
    "gbce": {"loss_type": "gbce", "n_negatives": 256, "shared_by": "sequence"},
    "gbce_batch": {"loss_type": "gbce", "n_negatives": 256},
}


def train(
    log: str,
    name: str,
    seed: int,
    epochs: int,
    *,
    item_embedding: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    dropout: float = 0.5,
) -> dict[str, object]:
    interactions = load_interactions(log)
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = leave_one_out_split(interactions, tokenizer)
    set_seed(seed)
    knobs = dict(LOSSES[name])
    backbone = SASRecConfig(
        hidden_size=64, num_hidden_layers=2, max_position_embeddings=50, dropout=dropout
    )
    config = RecommenderConfig(
        backbone=backbone, vocab_size=len(tokenizer), item_embedding=item_embedding
    )
    model = RecommenderModel(config)
    model.learn_item_tables(splits["train"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            loss_type=knobs.pop("loss_type"),
            loss_kwargs=knobs,
            seed=seed,
            num_train_epochs=epochs,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=512,
            learning_rate=3e-3,
            warmup_steps=100,
            weight_decay=0.0,
            adam_beta2=0.98,
            max_grad_norm=0.0,
            train_sampling_strategy="group_by_length",
            eval_strategy="steps",
            eval_steps=1 / 8,
            save_strategy="best",
            save_total_limit=1,
            metric_for_best_model="eval_ndcg@10",
            load_best_model_at_end=True,
            logging_strategy="epoch",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RecommenderTrainer(
            model,
            arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            callbacks=list(callbacks),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        best = trainer.state.best_global_step * epochs / trainer.state.max_steps
        validation_seconds = sum(
            entry["eval_runtime"] for entry in trainer.state.log_history if "eval_runtime" in entry
        )
        test = trainer.evaluate(splits["test"], metric_key_prefix="test")
    return {
        "loss": name,
        "knobs": knobs,
        "seed": seed,
        "epochs": epochs,
        "best_epoch": round(best),
        "train_seconds": round(seconds - validation_seconds, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **{
            name: round(value, 5) for name, value in test.items() if "@10" in name or "loss" in name
        },
        **environment(),
    }


def show() -> None:
    runs = pl.read_ndjson(RESULTS, infer_schema_length=None)
    summary = runs.group_by("loss").agg(
        pl.len().alias("seeds"),
        pl.col("epochs").first(),
        *(
            pl.col(c).mean()
            for c in ("test_ndcg@10", "test_hr@10", "test_coverage@10", "test_loss")
        ),
        pl.col("test_ndcg@10").std().alias("std"),
        pl.col("train_seconds", "peak_rss_mib").mean(),
    )
    exact = summary.filter(pl.col("loss") == "cross_entropy")["test_ndcg@10"].item()
    table = Table(title="Amazon Beauty, leave-one-out, SASRec D=64, test metrics (mean over seeds)")
    for name in ("loss", "seeds", "epochs", "NDCG@10", "± std", "of exact", "HR@10", "coverage@10",
                 "exact loss", "train s", "peak MiB"):  # fmt: skip
        table.add_column(name, justify="left" if name == "loss" else "right")
    for row in summary.sort("test_ndcg@10", descending=True).iter_rows(named=True):
        ndcg = row["test_ndcg@10"]
        spread = "" if row["std"] is None else f"{row['std']:.4f}"
        table.add_row(
            row["loss"], str(row["seeds"]), str(row["epochs"]), f"{ndcg:.4f}", spread,
            f"{ndcg / exact:.3f}", f"{row['test_hr@10']:.4f}", f"{row['test_coverage@10']:.3f}",
            f"{row['test_loss']:.2f}", f"{row['train_seconds']:.0f}", f"{row['peak_rss_mib']:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", help="amazon_beauty.parquet")
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--one", action="store_true", help="train in this process and print JSON")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(args.log, args.losses[0], args.seeds[0], args.epochs)))
        return
    done = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    for seed in args.seeds if not args.table else []:
        for loss in args.losses:
            if any(
                (run["loss"], run["seed"], run["epochs"]) == (loss, seed, args.epochs)
                for run in done
            ):
                continue
            command = [sys.executable, __file__, args.log, "--one", "--losses", loss]
            command += ["--seeds", str(seed), "--epochs", str(args.epochs)]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            with RESULTS.open("a") as file:
                file.write(line.splitlines()[-1] + "\n")
            print(line.splitlines()[-1], flush=True)
    show()


if __name__ == "__main__":
    main()
