"""What a run says of itself: to Trainer's log while it goes on, and in a file when it has ended."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
from datasets import Dataset
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from hf_rece.files import write_text
from hf_rece.head import find_head
from hf_rece.training.publishing import Publishing
from hf_rece.training.sparsity import DynamicSparsityCallback

TRAINING_RUN = "training_run.json"
# Arguments that tell runs of one model on the same data apart.
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
_OF_TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks")


class Reporting(Publishing):
    """Trainer that reports memory and density, and leaves a record of its run in output_dir.

    Beside each training loss, and at the end, its log tells peak_mib; with DynamicSparsityCallback
    also density and ever_active. So they come to whatever report_to names. After training,
    output_dir holds training_run.json: loss and knobs, arguments, held-out data, time, memory, and
    the log, later evaluations included. compare_runs reads it.
    """

    _facts: dict[str, Any] | None = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with memory and density."""
        training = "loss" in logs or "train_runtime" in logs
        if training:
            logs["peak_mib"] = round(peak_mib(), 1)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, DynamicSparsityCallback) and training:
                logs.update(callback.shares())
            # Evaluated before training, it would write into the working directory.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(str(self.args.output_dir), default_logdir())
        super().log(logs, *args, **kwargs)
        if not self.is_in_train:
            self._save_record()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and record the run."""
        self._facts = None
        result = super().train(*args, **kwargs)
        self._facts = run_facts(self, result.metrics["train_runtime"])
        self._save_record()
        return result

    def _save_record(self) -> None:
        folder = Path(str(self.args.output_dir))
        if self._facts is not None and self.is_world_process_zero() and folder.is_dir():
            record = {**self._facts, "log_history": self.state.log_history}
            text = json.dumps(record, indent=1, default=str)
            write_text(folder / TRAINING_RUN, text + "\n")


def run_facts(trainer: Any, seconds: float) -> dict[str, Any]:
    """Return what is known of a finished training, ready for JSON.

    Args:
        trainer: that has trained.
        seconds: that it took.
    """
    given = trainer.args.to_dict()
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    facts = {
        **_loss_of(trainer.accelerator.unwrap_model(trainer.model)),
        "arguments": {name: given[name] for name in _ARGUMENTS},
        "evaluated_on": _held_out(trainer.eval_dataset),
        "sequences": n_rows(trainer.train_dataset),
        "epochs": float(trainer.state.epoch or 0),
        "steps": trainer.state.global_step,
        "best_global_step": best,
        "seconds": round(seconds, 1),
        "device": device_name(),
        "peak_mib": round(peak_mib()),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def device_name() -> str:
    """Return what the model was trained on, as others would call it."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def peak_mib() -> float:
    """Return the largest memory so far: of the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def n_rows(dataset: Any) -> int | None:
    """Return the length of a dataset; None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def _loss_of(model: Any) -> dict[str, Any]:
    """Return loss_type and loss_kwargs of a model; nothing if its loss is not one of ours."""
    head = find_head(model)
    if head is not None:
        knobs = head.loss.to_dict()
        return {"loss_type": knobs.pop("loss_type"), "loss_kwargs": knobs}
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "loss_kwargs"):
        return {}
    return {"loss_type": config.loss_type, "loss_kwargs": config.loss_kwargs or {}}


def _held_out(dataset: Any) -> str | None:
    """Return what identifies a dataset of tokens: its number of rows, and their SHA-256."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return None
    columns = [name for name in _OF_TOKENS if name in dataset.column_names]
    fingerprint = hashlib.sha256()
    for batch in dataset.select_columns(columns).with_format("arrow").iter(1024):
        fingerprint.update(pl.DataFrame(pl.from_arrow(batch)).write_ndjson().encode())
    return f"{len(dataset):,} held-out rows, SHA-256 {fingerprint.hexdigest()}"
