"""Runs of one process and of several, killed at random moments: what kills.py does to training."""

import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from killing import N_ITEMS, JobFailedError, forked, forked_together, make_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import distributed

from hf_rece import RecommenderTrainer, RecommenderTrainingArguments
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import open_prepared
from hf_rece.data.stream import SequenceStream
from hf_rece.data.synthetic import generate_interactions

N_USERS, N_STEPS, BATCH = 240, 40, 8
# Kills of one run, after which it is taken for one that hangs.
MOST_KILLS = 100
COUNTS = (
    "kills",
    "kills_while_a_checkpoint_is_written",
    "runs",
    "runs_not_bit_equal",
    "runs_that_could_not_go_on",
    "checkpoints",
    "corrupt",
    "samples",
    "runs_with_samples_lost_or_repeated",
)
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "stratified": {"n_hard": 32, "n_random": 32},
    "sampled_softmax": {"n_negatives": 64, "sparse_grad": True},
}


@dataclass(frozen=True)
class Run:
    """What is trained: by a loss, on sequences in memory or a stream, in one process or more."""

    loss: str = "cross_entropy"
    is_streamed: bool = False
    n_processes: int = 1
    vocab_parallel: bool = False


RUNS: dict[str, dict[str, Run]] = {
    "training": {loss: Run(loss) for loss in LOSSES},
    "streaming": {"streamed": Run(is_streamed=True)},
    "processes": {
        "two processes": Run("stratified", n_processes=2),
        "two processes, vocab_parallel": Run("stratified", n_processes=2, vocab_parallel=True),
    },
}


class LoggingTrainer(RecommenderTrainer):
    """Trainer that writes a line for each micro-batch: its step, and its samples.

    While it writes a checkpoint there is a file that says so.
    """

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Log, then train as ever."""
        rows = [hashlib.md5(row.numpy().tobytes()).hexdigest()[:8] for row in inputs["input_ids"]]
        with log_of(Path(str(self.args.output_dir)), self.args.process_index).open("a") as file:
            file.write(json.dumps([self.state.global_step + 1, os.getpid(), rows]) + "\n")
        return super().training_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        mark = Path(str(self.args.output_dir)).with_suffix(f".{self.args.process_index}.saving")
        mark.touch()
        super()._save_checkpoint(*args, **kwargs)
        mark.unlink()


def must_be(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise JobFailedError(f"{name}: {found}, not {wanted}")


def log_of(folder: Path, rank: int) -> Path:
    return folder.with_suffix(f".{rank}.log")


def sequences(folder: Path, run: Run) -> Dataset | SequenceStream:
    """Return what a run trains on: sequences in memory, or streamed from a prepared log."""
    if run.is_streamed:
        return SequenceStream(open_prepared(folder.parent / "log").split("train"), buffer_size=100)
    draw = np.random.default_rng(0)
    histories = draw.integers(1, N_ITEMS, (N_USERS, 12)).tolist()
    return Dataset.from_dict({"item_ids": histories})


def prepare(folder: Path) -> None:
    log = generate_interactions(N_USERS, N_ITEMS)
    log.write_parquet(folder / "log.parquet")
    prepare_log(folder / "log.parquet", folder / "log", n_shards=4)


def train(folder: Path, run: Run, keep: int | None = 2) -> None:
    arguments = RecommenderTrainingArguments(
        output_dir=str(folder),
        max_length=12,
        max_steps=N_STEPS,
        per_device_train_batch_size=BATCH // 2 // run.n_processes,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=keep,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        vocab_parallel=run.vocab_parallel,
    )
    model, data = make_model(0, run.loss, **LOSSES[run.loss]), sequences(folder, run)
    trainer = LoggingTrainer(model, arguments, train_dataset=data)
    n_parts = 1 if trainer.vocab_shards is None else trainer.vocab_shards.world_size
    must_be("processes", trainer.accelerator.num_processes, run.n_processes)
    must_be("parts of the vocabulary", n_parts, run.n_processes if run.vocab_parallel else 1)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    trainer.save_model()


def train_as(rank: int, store: Path, folder: Path, run: Run, keep: int | None = 2) -> None:
    """Train as one of the processes of a run, which meet at a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(run.n_processes), "LOCAL_WORLD_SIZE": str(run.n_processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        timeout=timedelta(seconds=100),
        world_size=run.n_processes,
        rank=rank,
    )
    must_be("processes that met", distributed.get_world_size(), run.n_processes)
    train(folder, run, keep)
    distributed.barrier()
    distributed.destroy_process_group()


def trained(
    folder: Path,
    run: Run,
    keep: int | None = 2,
    seconds: float | None = None,
    ranks: Sequence[int] = (0, 1),
    apart: float = 0.0,
) -> bool:
    """Train in processes of their own; return whether they ended. See forked_together.

    Args:
        folder: of the run.
        run: what is trained.
        keep: checkpoints that are kept.
        seconds: after which the processes are killed.
        ranks: of several processes, in the order in which they are killed.
        apart: seconds between the death of the first one and of the others.
    """
    if run.n_processes == 1:
        return forked(partial(train, folder, run, keep), seconds)
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        jobs = [partial(train_as, rank, store, folder, run, keep) for rank in ranks]
        return forked_together(jobs, seconds, apart)


def digest(folder: Path) -> str:
    """Return a digest of all numbers in a checkpoint, its optimizer's and generators' too."""
    found = hashlib.sha256((folder / "items.json").read_bytes())
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for name, tensor in sorted(load_file(path).items()):
                found.update(f"{path.name} {name}".encode() + tensor.numpy().tobytes())
        elif path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(NUMPY):
                state = as_bytes(torch.load(path, weights_only=True))
            found.update(f"{path.name} {state!r}".encode())
    if folder.name.startswith("checkpoint"):
        state = json.loads((folder / "trainer_state.json").read_text())
        found.update(f"{state['global_step']} {state['epoch']}".encode())
    return found.hexdigest()


NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def as_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_bytes(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(each) for each in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


Samples = dict[int, list[list[list[str]]]]


def samples(folder: Path, n_processes: int) -> Samples:
    """Return the micro-batches of each step and process, as the last attempt at it saw them."""
    found: Samples = {}
    for rank in range(n_processes):
        attempts: dict[int, dict[int, list[list[str]]]] = {}
        for line in log_of(folder, rank).read_text().splitlines():
            step, process, rows = json.loads(line)
            attempts.setdefault(step, {}).setdefault(process, []).append(rows)
        for step, processes in attempts.items():
            found.setdefault(step, []).append(list(processes.values())[-1])
    return found


def flat(seen: Samples) -> list[str]:
    of_processes = (batches for processes in seen.values() for batches in processes)
    return [sample for batches in of_processes for rows in batches for sample in rows]


@dataclass
class Calm:
    """What a run is that nobody disturbs."""

    steps: dict[str, str]
    final: str
    seen: Samples
    seconds: float


def run_calmly(folder: Path, run: Run) -> Calm:
    started = time.perf_counter()
    trained(folder, run, keep=None)
    seconds = time.perf_counter() - started
    steps = {path.name: digest(path) for path in folder.glob("checkpoint-*")}
    calm = Calm(steps, digest(folder), samples(folder, run.n_processes), seconds)
    must_be("checkpoints", len(calm.steps), N_STEPS // 2)
    if not run.is_streamed:
        epoch = flat({step: calm.seen[step] for step in range(1, N_USERS // BATCH + 1)})
        must_be("samples of an epoch", (len(epoch), len(set(epoch))), (N_USERS, N_USERS))
    return calm


def kill_training(
    folder: Path, n_kills: int, draw: random.Random, runs: Mapping[str, Run]
) -> dict[str, Any]:
    """Kill runs and let them go on, until they end; look at what is there after every kill."""
    folder.mkdir()
    if any(run.is_streamed for run in runs.values()):
        forked(partial(prepare, folder))
    found: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "killed": {}, "runs_of": {}}
    calm = {kind: run_calmly(folder / f"calm-{kind}", run) for kind, run in runs.items()}
    number = 0
    while found["kills"] < n_kills:
        kind = list(runs)[number % len(runs)]
        run_folder, number = folder / f"run-{number}", number + 1
        try:
            kill_until_it_ends(run_folder, runs[kind], calm[kind], draw, found)
        except JobFailedError:
            found["runs_that_could_not_go_on"] += 1
            continue
        found["runs"] += 1
        found["runs_of"][kind] = found["runs_of"].get(kind, 0) + 1
        found["runs_not_bit_equal"] += not is_as(run_folder, calm[kind].final)
        seen = samples(run_folder, runs[kind].n_processes)
        found["samples"] += len(flat(seen))
        found["runs_with_samples_lost_or_repeated"] += seen != calm[kind].seen
    return found


def kill_until_it_ends(
    folder: Path, run: Run, calm: Calm, draw: random.Random, found: dict[str, Any]
) -> None:
    """Kill all processes of a run at once, or one, and the others within a second; again."""
    for _ in range(MOST_KILLS):
        seconds, apart = draw.uniform(0, calm.seconds), draw.choice([0.0, draw.uniform(0, 1)])
        ranks = draw.sample(range(run.n_processes), run.n_processes)
        if trained(folder, run, seconds=seconds, ranks=ranks, apart=apart):
            return
        found["kills"] += 1
        who = f"process {ranks[0]} first" if apart and run.n_processes > 1 else "all at once"
        found["killed"][who] = found["killed"].get(who, 0) + 1
        marks = list(folder.parent.glob(f"{folder.name}.*.saving"))
        found["kills_while_a_checkpoint_is_written"] += bool(marks)
        for mark in marks:
            mark.unlink()
        for path in folder.glob("checkpoint-*"):
            found["checkpoints"] += 1
            found["corrupt"] += not is_as(path, calm.steps.get(path.name, ""))
    raise JobFailedError


def is_as(folder: Path, wanted: str) -> bool:
    """Return whether a checkpoint can be read, and holds what it should."""
    try:
        return digest(folder) == wanted
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        print(f"{folder.name}: {error}")
        return False
