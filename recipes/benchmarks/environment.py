"""What a benchmark's JSON says of the machine and the versions it ran with."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PEERS = ("trl", "triton", "liger_kernel", "cut_cross_entropy")


def environment(device: str = "cpu") -> dict[str, object]:
    """Return the command, the commit, the versions and the kind of machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    machine = {
        "command": " ".join(Path(word).name for word in sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions(),
        "device": device,
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    return machine


def versions() -> dict[str, str]:
    """Return the versions of what every benchmark needs, and of the peers that are installed."""
    found = {name: version(name) for name in ("torch", "transformers", "hf_rece")}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's vendor name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
