"""Kill whatever writes, from preparing to recommending, at random moments, and look for harm.

    python recipes/benchmarks/kills.py                           # all jobs
    python recipes/benchmarks/kills.py --only prepare streaming  # keeps what is known of the others

Every job is forked from a process that has imported all it needs, and killed by SIGKILL at a
moment drawn at random; then what lies on the disk is compared, bit for bit, with what a run that
nobody disturbed wrote. Training and preparing go on where they stopped until they end; samples are
told by their contents in the log of every step. Of a run of two processes both are killed at once,
or one, and the other within a second. Writes results/kills.json.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from environment import environment
from killing import kill_preparing, kill_writing
from killing_training import RUNS, kill_training
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results" / "kills.json"
KILLS = {
    "save_pretrained": 30, "index": 15, "recommend": 15, "export": 8, "prepare": 60,
    "training": 140, "streaming": 20, "processes": 60,
}  # fmt: skip


def kill_job(folder: Path, job: str, n_kills: int, draw: random.Random) -> dict[str, Any]:
    if job in RUNS:
        return kill_training(folder, n_kills, draw, RUNS[job])
    folder.mkdir()
    if job == "prepare":
        return kill_preparing(folder, n_kills, draw)
    return kill_writing(folder, job, n_kills, draw)


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
