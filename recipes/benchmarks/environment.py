"""What a benchmark's JSON says of the machine and the versions it ran with."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def environment() -> dict[str, object]:
    """Return the command, the commit, the versions and the kind of machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "command": " ".join(Path(word).name for word in sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "hf_rece")},
        "device": "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Return the processor's vendor name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
