"""Kill training, saving, indexing, exporting and recommending at random moments, and look for harm.

    python recipes/benchmarks/kills.py

Every job is forked from a process that has imported all it needs, and killed by SIGKILL at a
moment drawn at random; then what lies on the disk is compared, bit for bit, with what a run that
nobody disturbed wrote. Training goes on from its newest checkpoint until it ends; samples are told
by their contents in the log of every step. Writes results/kills.json.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from environment import environment
from killing import JOBS, N_ITEMS, JobFailedError, forked, kill_writing, make_model
from safetensors.torch import load_file
from transformers.utils import logging

from hf_rece import RecommenderTrainer, RecommenderTrainingArguments

RESULTS = Path(__file__).parent / "results" / "kills.json"
N_USERS, N_STEPS, BATCH = 240, 40, 8
COUNTS = (
    "kills",
    "runs",
    "runs_not_bit_equal",
    "runs_that_could_not_go_on",
    "checkpoints",
    "corrupt",
    "samples",
    "runs_with_samples_lost_or_repeated",
)
KILLS = {"save_pretrained": 30, "index": 15, "recommend": 15, "export": 8}
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "stratified": {"n_hard": 32, "n_random": 32},
    "sampled_softmax": {"n_negatives": 64, "sparse_grad": True},
}


class LoggingTrainer(RecommenderTrainer):
    """Trainer that writes a line for each micro-batch: its step, and its samples."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Log, then train as ever."""
        rows = [hashlib.md5(row.numpy().tobytes()).hexdigest()[:8] for row in inputs["input_ids"]]
        with (Path(str(self.args.output_dir)).with_suffix(".log")).open("a") as file:
            file.write(json.dumps([self.state.global_step + 1, os.getpid(), rows]) + "\n")
        return super().training_step(model, inputs, *args, **kwargs)


def train(folder: Path, loss: str, keep: int | None = 2) -> None:
    draw = np.random.default_rng(0)
    histories = draw.integers(1, N_ITEMS, (N_USERS, 12)).tolist()
    arguments = RecommenderTrainingArguments(
        output_dir=str(folder),
        max_length=12,
        max_steps=N_STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=keep,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    data = Dataset.from_dict({"item_ids": histories})
    trainer = LoggingTrainer(make_model(0, loss, **LOSSES[loss]), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    trainer.save_model()


def digest(folder: Path) -> str:
    """Return a digest of all numbers in a checkpoint, its optimizer's and generators' too."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if (folder / name).exists() or folder.name.startswith("checkpoint"):
            with torch.serialization.safe_globals(NUMPY):
                found.update(repr(as_bytes(torch.load(folder / name, weights_only=True))).encode())
    found.update((folder / "items.json").read_bytes())
    return found.hexdigest()


NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def as_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_bytes(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(each) for each in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def samples(folder: Path) -> dict[int, list[list[str]]]:
    """Return the micro-batches of each step, as the last attempt at it saw them."""
    attempts: dict[int, dict[int, list[list[str]]]] = {}
    for line in folder.with_suffix(".log").read_text().splitlines():
        step, process, rows = json.loads(line)
        attempts.setdefault(step, {}).setdefault(process, []).append(rows)
    return {step: list(processes.values())[-1] for step, processes in attempts.items()}


def kill_training(folder: Path, n_kills: int, draw: random.Random) -> dict[str, Any]:
    found = dict.fromkeys(COUNTS, 0)
    wanted, number = {}, 0
    for loss in LOSSES:
        calm = folder / f"calm-{loss}"
        started = time.perf_counter()
        forked(partial(train, calm, loss, keep=None))
        seconds = time.perf_counter() - started
        steps = {path.name: digest(path) for path in calm.glob("checkpoint-*")}
        wanted[loss] = (steps, digest(calm), samples(calm), seconds)
    while found["kills"] < n_kills:
        loss = list(LOSSES)[number % len(LOSSES)]
        run, number = folder / f"run-{number}", number + 1
        steps, final, seen, seconds = wanted[loss]
        try:
            while not forked(partial(train, run, loss), draw.uniform(0, seconds / 2)):
                found["kills"] += 1
                for path in run.glob("checkpoint-*"):
                    found["checkpoints"] += 1
                    found["corrupt"] += not is_as(path, steps.get(path.name, ""))
        except JobFailedError:
            found["runs_that_could_not_go_on"] += 1
            continue
        found["runs"] += 1
        found["runs_not_bit_equal"] += not is_as(run, final)
        own = samples(run)
        found["samples"] += sum(len(rows) for batches in own.values() for rows in batches)
        found["runs_with_samples_lost_or_repeated"] += own != seen
    return found


def is_as(folder: Path, wanted: str) -> bool:
    """Return whether a checkpoint can be read, and holds what it should."""
    try:
        return digest(folder) == wanted
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        print(f"{folder.name}: {error}")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=int, default=140, help="kills of training")
    parser.add_argument("--share", type=float, default=1.0, help="of the kills of other jobs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads of OpenMP do not outlive a fork
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record: dict[str, Any] = {
            job: kill_writing(folder, job, max(1, round(args.share * KILLS[job])), draw)
            for job in JOBS
        }
        record["training"] = kill_training(folder, args.training, draw)
    record["kills"] = sum(found["kills"] for found in record.values())
    record["environment"] = environment()
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
