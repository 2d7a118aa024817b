"""Run a test's function in several processes that talk to each other."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed

COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single", "broadcast")
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed
sys.path.insert(0, {root!r})
from {module} import findings
found = findings({folder!r}, 2)
Path({folder!r}, os.environ["RANK"] + ".json").write_text(json.dumps(found))
torch.distributed.barrier()  # neither process leaves while the other still talks to it
torch.distributed.destroy_process_group()
"""


def findings_of_two_processes(module, folder):
    """Return what `findings(folder, 2)` of a test module returns in each of two processes."""
    root = str(Path(__file__).resolve().parents[1])
    script = Path(folder) / "script.py"
    script.write_text(SCRIPT.format(root=root, module=module, folder=str(folder)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]


def in_processes(function, world_size, *arguments):
    """Return what `function(rank, *arguments)` returns in each of some processes that talk.

    They are forked from a server that has imported the package already: they start in no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_rece", "hf_rece.training.trainer"])
    with TemporaryDirectory() as folder:
        started = [
            context.Process(
                target=_in_process, args=(rank, world_size, folder, function, arguments)
            )
            for rank in range(world_size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(200)
        codes = [process.exitcode for process in started]
        assert codes == [0] * world_size, f"exit codes {codes}, tracebacks in stderr"
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _in_process(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    # Read by Accelerate; the group is there already, so that nobody meets at the address.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        timeout=timedelta(seconds=100),
        world_size=world_size,
        rank=rank,
    )
    assert distributed.get_world_size() == world_size
    # Plain pickle: by the queues of torch, a tensor would be a handle that dies with its process.
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(rank, *arguments)))
    distributed.barrier()
    distributed.destroy_process_group()


def record_messages():
    """Return a list to which each collective is added from now on: name, shape, bytes of a row.

    Of an exchange, the shape is (rows sent to each process, rows received of each process).
    """
    sent = []
    for name in COLLECTIVES:
        original = getattr(distributed, name)

        def send(*args, name=name, original=original, **kwargs):
            values = args[name in ("all_gather", "all_to_all_single")]
            shape = tuple(values.shape)
            if name == "all_to_all_single":
                shape = tuple(args[3]), tuple(args[2])
            sent.append((name, shape, values.element_size() * values.shape[1:].numel()))
            return original(*args, **kwargs)

        setattr(distributed, name, send)
    return sent


def assert_messages_fit(of_processes):
    """Check that all processes of a group send the same messages, of shapes that fit together."""
    for of_all in zip(*of_processes, strict=True):
        names, shapes, row_bytes = zip(*of_all, strict=True)
        assert len(set(names)) == len(set(row_bytes)) == 1, of_all
        if names[0] == "all_to_all_single":
            for i, (n_sent, _) in enumerate(shapes):
                assert list(n_sent) == [n_received[i] for _, n_received in shapes]
        else:
            assert len(set(shapes)) == 1, of_all
