"""Kill whatever writes, from preparing to recommending, at random moments, and look for harm.

    python recipes/benchmarks/kills.py                           # all jobs
    python recipes/benchmarks/kills.py --only prepare streaming  # keeps what is known of the others

Every job is forked from a process that has imported all it needs, and killed by SIGKILL at a
moment drawn at random; then what lies on the disk is compared, bit for bit, with what a run that
nobody disturbed wrote. Training and preparing go on where they stopped until they end; samples are
told by their contents in the log of every step. Writes results/kills.json.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from environment import environment
from killing import (
    N_ITEMS,
    JobFailedError,
    forked,
    kill_preparing,
    kill_writing,
    make_model,
)
from safetensors.torch import load_file
from transformers.utils import logging

from hf_rece import RecommenderTrainer, RecommenderTrainingArguments
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import open_prepared
from hf_rece.data.stream import SequenceStream
from hf_rece.data.synthetic import generate_interactions

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
KILLS = {
    "save_pretrained": 30, "index": 15, "recommend": 15, "export": 8, "prepare": 60,
    "training": 140, "streaming": 20,
}  # fmt: skip
STREAMED = "streamed"
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


def sequences(folder: Path, kind: str) -> Dataset | SequenceStream:
    """Return what a run trains on: sequences in memory, or streamed from a prepared log."""
    if kind == STREAMED:
        return SequenceStream(open_prepared(folder.parent / "log").split("train"), buffer_size=100)
    draw = np.random.default_rng(0)
    histories = draw.integers(1, N_ITEMS, (N_USERS, 12)).tolist()
    return Dataset.from_dict({"item_ids": histories})


def prepare(folder: Path) -> None:
    log = generate_interactions(N_USERS, N_ITEMS)
    log.write_parquet(folder / "log.parquet")
    prepare_log(folder / "log.parquet", folder / "log", n_shards=4)


def train(folder: Path, kind: str, keep: int | None = 2) -> None:
    loss = "cross_entropy" if kind == STREAMED else kind
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
    model, data = make_model(0, loss, **LOSSES[loss]), sequences(folder, kind)
    trainer = LoggingTrainer(model, arguments, train_dataset=data)
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


def kill_training(
    folder: Path, n_kills: int, draw: random.Random, kinds: Sequence[str]
) -> dict[str, Any]:
    folder.mkdir()
    if STREAMED in kinds:
        forked(partial(prepare, folder))
    found = dict.fromkeys(COUNTS, 0)
    wanted, number = {}, 0
    for kind in kinds:
        calm = folder / f"calm-{kind}"
        started = time.perf_counter()
        forked(partial(train, calm, kind, keep=None))
        seconds = time.perf_counter() - started
        steps = {path.name: digest(path) for path in calm.glob("checkpoint-*")}
        wanted[kind] = (steps, digest(calm), samples(calm), seconds)
    while found["kills"] < n_kills:
        kind = kinds[number % len(kinds)]
        run, number = folder / f"run-{number}", number + 1
        steps, final, seen, seconds = wanted[kind]
        try:
            while not forked(partial(train, run, kind), draw.uniform(0, seconds / 2)):
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


def kill_job(folder: Path, job: str, n_kills: int, draw: random.Random) -> dict[str, Any]:
    if job in ("training", "streaming"):
        kinds = list(LOSSES) if job == "training" else [STREAMED]
        return kill_training(folder, n_kills, draw, kinds)
    folder.mkdir()
    if job == "prepare":
        return kill_preparing(folder, n_kills, draw)
    return kill_writing(folder, job, n_kills, draw)


def is_as(folder: Path, wanted: str) -> bool:
    """Return whether a checkpoint can be read, and holds what it should."""
    try:
        return digest(folder) == wanted
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        print(f"{folder.name}: {error}")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=KILLS, default=list(KILLS), help="jobs")
    parser.add_argument("--share", type=float, default=1.0, help="of the kills of each job")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads of OpenMP do not outlive a fork
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for job in args.only:
            print(job, flush=True)
            n_kills = max(1, round(args.share * KILLS[job]))
            record[job] = kill_job(Path(name) / job, job, n_kills, draw)
            record[job]["commit"] = environment()["commit"]
    found = {job: record[job] for job in KILLS if job in record}
    total = sum(each["kills"] for each in found.values())
    record = {**found, "kills": total, "environment": environment()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
