"""Train SASRec with our losses and with RecTools, same log and network: epoch time, memory, NDCG.

    python -m venv .venv_rectools
    .venv_rectools/bin/pip install "rectools[torch]==0.19.0" torch==2.13.0
    python recipes/benchmarks/training.py amazon_beauty.parquet --epochs 10 \
        --rectools_python .venv_rectools/bin/python

D=64, 2 blocks, 2 heads, feed-forward of D, length 50, batches of 128, Adam (.9, .98) at a constant
1e-3, dropout .2. Each training runs in a fresh process; peak is its largest resident size from its
start to the end of training, interpreter and data included. NDCG@10 is hf_rece's, for both: full
ranking, seen items filtered, the last item of each user; RecTools' lists of ten are ranked by it.
Writes results/training.json, or with --max_users results/training_USERS.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import DatasetDict
from environment import environment
from measuring import Row, in_fresh_process, resident_mib
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from hf_rece.data.interactions import USER, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.metrics.ranking import ndcg_at_k
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.trainer import RecommenderTrainer

RESULTS = Path(__file__).parent / "results"
PEER = "rectools"
CONTENDERS = (PEER, "cross_entropy", "stratified", "rece", "sce")
SETTINGS = {"width": 64, "blocks": 2, "heads": 2, "max_length": 50, "batch_size": 128,
            "learning_rate": 1e-3, "dropout": 0.2}  # fmt: skip


class EpochSeconds(TrainerCallback):
    """Keeps the seconds of every epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.start)


def split_log(log: str, max_users: int | None) -> tuple[ItemTokenizer, DatasetDict]:
    interactions = load_interactions(log)
    if max_users:
        users = interactions[USER].unique(maintain_order=True).head(max_users)
        interactions = interactions.filter(pl.col(USER).is_in(users.implode()))
    tokenizer = ItemTokenizer.from_interactions(interactions)
    return tokenizer, leave_one_out_split(interactions, tokenizer)


def ours(args: argparse.Namespace, loss_type: str) -> Row:
    torch.set_num_threads(args.threads)
    tokenizer, splits = split_log(args.log, args.max_users)
    set_seed(args.seed)
    backbone = SASRecConfig(
        hidden_size=SETTINGS["width"],
        intermediate_size=SETTINGS["width"],
        hidden_act="relu",
        num_hidden_layers=SETTINGS["blocks"],
        num_attention_heads=SETTINGS["heads"],
        max_position_embeddings=SETTINGS["max_length"],
        dropout=SETTINGS["dropout"],
    )
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=len(tokenizer)))
    clock = EpochSeconds()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            loss_type=loss_type,
            seed=args.seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=SETTINGS["batch_size"],
            per_device_eval_batch_size=256,
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta2=0.98,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RecommenderTrainer(
            model, arguments, train_dataset=splits["train"], callbacks=[clock]
        )
        before = resident_mib("VmRSS")
        trainer.train()
        peak = resident_mib("VmHWM")
        test = trainer.evaluate(splits["test"], metric_key_prefix="test")
    return {
        "epoch_seconds": [round(seconds, 3) for seconds in clock.seconds],
        "peak_mib": round(peak, 1),
        "before_training_mib": round(before, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ndcg@10": round(test["test_ndcg@10"], 5),
    }


def theirs(args: argparse.Namespace, splits: DatasetDict) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        columns = {}
        for part in ("train", "test"):
            frame = splits[part].to_polars().select("user_id", "item_ids")
            rows = frame.explode("item_ids")
            columns[f"{part}_users"] = rows["user_id"].to_numpy()
            columns[f"{part}_items"] = rows["item_ids"].to_numpy()
        np.savez(Path(folder) / "split.npz", **columns)
        words = [str(Path(__file__).with_name("training_rectools.py")), folder]
        own = {name: getattr(args, name) for name in ("epochs", "seed", "threads")}
        for name, value in {**own, **SETTINGS}.items():
            words += [f"--{name}", str(value)]
        row = in_fresh_process(words, args.timeout, python=args.rectools_python)
        if "not_run" not in row:
            found = np.load(Path(folder) / "recommended.npz")
            row["ndcg@10"] = ndcg_of_lists(found["user_id"], found["item_id"], splits)
    if "rectools" in row.get("not_run", "") or "pytorch_lightning" in row.get("not_run", ""):
        row = {"not_run": "not installed: see the head of training.py, --rectools_python"}
    return row


def ndcg_of_lists(users: np.ndarray, items: np.ndarray, splits: DatasetDict) -> float:
    """Return NDCG@10 of lists of ten, best first: a target outside its list has rank eleven."""
    lists: dict[int, list[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        lists.setdefault(user, []).append(item)
    greater = []
    for user, target in zip(splits["test"]["user_id"], splits["test"]["target_id"], strict=True):
        found = lists.get(user, [])
        greater.append(found.index(target) if target in found else 10)
    return round(ndcg_at_k(greater, [0] * len(greater), 10), 5)


def show(rows: dict[str, Row], title: str) -> None:
    table = Table(title=title)
    for name in ("training", "s/epoch", "times faster", "peak MiB", "of RecTools", "NDCG@10"):
        table.add_column(name, justify="left" if name == "training" else "right")
    peer = rows.get(PEER, {})
    for name, row in rows.items():
        if "not_run" in row:
            table.add_row(name, row["not_run"])
            continue
        row["seconds_per_epoch"] = round(median(row["epoch_seconds"]), 3)
        if "peak_mib" in peer:
            row["times_faster"] = round(peer["seconds_per_epoch"] / row["seconds_per_epoch"], 2)
            row["share_of_peak"] = round(row["peak_mib"] / peer["peak_mib"], 3)
        table.add_row(
            name, f"{row['seconds_per_epoch']:.1f}", str(row.get("times_faster", "")),
            f"{row['peak_mib']:,.0f}", str(row.get("share_of_peak", "")), f"{row['ndcg@10']:.4f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="amazon_beauty.parquet")
    for name, value in (("epochs", 10), ("threads", 2), ("seed", 0), ("max_users", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rectools_python", default=sys.executable)
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds a training")
    parser.add_argument("--suffix", default="", help="of the name of the results")
    parser.add_argument("--one", help="train with this loss in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(ours(args, args.one)))
        return
    splits = split_log(args.log, args.max_users)[1]
    rows = {}
    for name in args.contenders:
        if name == PEER:
            rows[name] = theirs(args, splits)
        else:
            words = [__file__, args.log, "--one", name]
            for field in ("epochs", "threads", "seed"):
                words += [f"--{field}", str(getattr(args, field))]
            words += ["--max_users", str(args.max_users)] if args.max_users else []
            rows[name] = in_fresh_process(words, args.timeout)
        print(name, rows[name], flush=True)
    n_users = len(splits["test"])
    show(rows, f"SASRec, {n_users:,} users, {args.epochs} epochs, {args.threads} threads")
    record = {**environment(), "threads": args.threads, "log": Path(args.log).name,
              "users": n_users, "epochs": args.epochs, "seed": args.seed,
              "settings": SETTINGS, "trainings": rows}  # fmt: skip
    suffix = (f"_{args.max_users}" if args.max_users else "") + args.suffix
    (RESULTS / f"training{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
