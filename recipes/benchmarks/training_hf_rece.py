"""Train our SASRec on a split that training.py wrote, with one loss.

    python recipes/benchmarks/training_hf_rece.py FOLDER ...  # as training.py calls it

As training_rectools.py: the same settings, from the same split, and the same figures on the last
line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from measuring import resident_mib, training_row
from transformers import TrainerCallback, set_seed

from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.trainer import RecommenderTrainer


class Seconds(TrainerCallback):
    """Keeps the seconds of every epoch, and of every step once its batch is there."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of an epoch."""
        self.epoch_start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock of an epoch."""
        self.epochs.append(time.perf_counter() - self.epoch_start)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of a step."""
        self.step_start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock of a step."""
        self.steps.append(time.perf_counter() - self.step_start)


def network(args: argparse.Namespace) -> RecommenderModel:
    backbone = SASRecConfig(
        hidden_size=args.width,
        intermediate_size=args.width,
        hidden_act="relu",
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        max_position_embeddings=args.max_length,
        dropout=args.dropout,
    )
    return RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=args.vocab_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loss_type", required=True)
    for name in ("epochs", "seed", "threads", "width", "blocks", "heads", "max_length",
                 "batch_size", "vocab_size"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning_rate", "dropout"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    splits = load_from_disk(str(args.folder / "split"))
    model, clock = network(args), Seconds()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            loss_type=args.loss_type,
            seed=args.seed,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=args.learning_rate,
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
        row = training_row(clock.epochs, clock.steps, before)
        test = trainer.evaluate(splits["test"], metric_key_prefix="test")
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["ndcg@10"] = round(test["test_ndcg@10"], 5)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
