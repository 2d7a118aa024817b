"""Run recipes as `accelerate launch` does, in several processes, and tell what came of them.

As a script: launched.py JOBS FOLDER [fsdp | deepspeed] runs the recipes of a JSON file one after
another, in one start of all processes, and leaves what each process found in FOLDER.
"""

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from transformers import Trainer

from tests.fsdp_on_cpu import enable, start_anew

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = ROOT / "recipes" / "accelerate"


def findings(recipe, words):
    """Run a recipe in this process, one of several or alone; return what its trainer found.

    Returns:
        world_size; wrapper, the class around the model; history of (loss, grad_norm); evaluations
        by name, in order; ranks of labels after training; weights, the sum of each parameter's own
        part.
    """
    trained = []
    train = Trainer.train

    def noting_train(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        trained.append((self, type(self.model_wrapped).__name__))
        return result

    script = str(ROOT / "recipes" / recipe)
    with patch.object(Trainer, "train", noting_train), patch.object(sys, "argv", [script, *words]):
        runpy.run_path(script, run_name="__main__")
    ((trainer, wrapper),) = trained
    log = trainer.state.log_history
    predicted = trainer.predict(trainer.eval_dataset).predictions
    return {
        "world_size": trainer.args.world_size,
        "wrapper": wrapper,
        "history": [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry],
        "evaluations": [exact(entry) for entry in log if exact(entry)],
        "ranks": [part.tolist() for part in predicted[:2]],
        "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
    }


def exact(entry):
    """Return the metrics of an evaluation that do not depend on the machine."""
    other = ("runtime", "per_second", "preparation_time", "num_tokens")
    prefixes = ("eval_", "test_")
    return {n: v for n, v in entry.items() if n.startswith(prefixes) and not n.endswith(other)}


def launch(jobs, n_processes, folder, config="ddp.yaml", *options):
    """Return for each process what `findings` returns of each job, by the job's name.

    Args:
        jobs: by name, a recipe and its words.
        n_processes: processes to start.
        folder: empty.
        config: in recipes/accelerate; None for torchrun, without Accelerate's own launcher.
        options: of this script.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = [str(Path(__file__)), str(folder / "jobs.json"), str(folder), *options]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }  # fmt: skip
    if config is None:
        # Told to use the CPU, Accelerate takes DDP in DeepSpeed's place.
        command = [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n_processes),
            *script,
        ]
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        command = [
            "accelerate.commands.launch", "--config_file", str(ACCELERATE / config),
            "--num_processes", str(n_processes), "--main_process_port", "0", *script,
        ]  # fmt: skip
        # Without GPUs Accelerate starts one process unless it is told to use the CPU.
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(n_processes)]


def main():
    jobs, folder, *options = sys.argv[1:]
    if "fsdp" in options:
        enable()
    if "deepspeed" in options:
        import deepspeed

        # As Accelerate does where there are GPUs, before any model is made.
        deepspeed.init_distributed("gloo")
    found = {}
    for name, (recipe, words) in json.loads(Path(jobs).read_text()).items():
        start_anew()
        found[name] = findings(recipe, words)
    Path(folder, os.environ["RANK"]).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
