"""Train RecTools' SASRec on a split that training.py wrote; runs where RecTools is installed.

    python recipes/benchmarks/training_rectools.py FOLDER --epochs 10 ...  # as training.py calls it

RecTools wants numpy < 2 (below Python 3.13) and pandas < 3, hf_rece numpy 2, so it lives in an
environment of its own, with torch. Adam with betas .9 and .98, and the padding of every sequence to
`max_length`, are RecTools' own.
"""

import argparse
import json
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytorch_lightning
import rectools
import torch
from measuring import resident_mib, training_row
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


class Seconds(pytorch_lightning.Callback):
    """Keeps the seconds of every epoch, and of every step once its batch is there.

    Of the class, since RecTools copies its trainer.
    """

    epochs: ClassVar[list[float]] = []
    steps: ClassVar[list[float]] = []

    def on_train_epoch_start(self, *_):
        """Start the clock of an epoch."""
        self.epoch_start = time.perf_counter()

    def on_train_epoch_end(self, *_):
        """Stop the clock of an epoch."""
        self.epochs.append(time.perf_counter() - self.epoch_start)

    def on_train_batch_start(self, *_):
        """Start the clock of a step."""
        self.step_start = time.perf_counter()

    def on_train_batch_end(self, *_):
        """Stop the clock of a step."""
        self.steps.append(time.perf_counter() - self.step_start)


def dataset(users: np.ndarray, items: np.ndarray) -> Dataset:
    """Interactions in the order of the log, as RecTools takes them."""
    frame = pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.to_datetime(np.arange(len(frame)), unit="s")
    return Dataset.construct(frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name in ("epochs", "seed", "threads", "width", "blocks", "heads", "max_length",
                 "batch_size"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning_rate", "dropout"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pytorch_lightning.seed_everything(args.seed)
    split = np.load(args.folder / "split.npz")

    def lightning() -> pytorch_lightning.Trainer:
        return pytorch_lightning.Trainer(
            max_epochs=args.epochs,
            min_epochs=args.epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[Seconds()],
        )

    model = SASRecModel(
        n_blocks=args.blocks,
        n_heads=args.heads,
        n_factors=args.width,
        dropout_rate=args.dropout,
        session_max_len=args.max_length,
        loss="softmax",
        lr=args.learning_rate,
        batch_size=args.batch_size,
        get_trainer_func=lightning,
    )
    train = dataset(split["train_users"], split["train_items"])
    before = resident_mib("VmRSS")
    model.fit(train)
    row = training_row(Seconds.epochs, Seconds.steps, before)
    # What a list can't hold is not scored: users without a known item get no recommendation.
    recommended = model.recommend(
        users=np.unique(split["test_users"]),
        dataset=dataset(split["test_users"], split["test_items"]),
        k=10,
        filter_viewed=True,
        on_unsupported_targets="ignore",
    )
    np.savez(
        args.folder / "recommended.npz",
        **{name: recommended[name].to_numpy() for name in (Columns.User, Columns.Item)},
    )
    row["parameters"] = sum(p.numel() for p in model.torch_model.parameters())
    row["versions"] = {
        "rectools": rectools.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
