"""What a step costs: time and memory, on a GPU, or on a CPU in a fresh process.

    python recipes/benchmarks/losses.py     # and tables.py, training.py, llm.py measure with this

What could not be measured is {"not_run": why}, and stays in the table.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]
MIB = 2**20


def resident_mib(field: str) -> float:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def training_row(epochs: list[float], steps: list[float], before: float) -> Row:
    """Return what a training took: called when it ends, for its peak is that of the process.

    Args:
        epochs: seconds of each epoch.
        steps: seconds of each step.
        before: MiB that were resident before the first.
    """
    return {
        "epoch_seconds": [round(seconds, 3) for seconds in epochs],
        "seconds_per_epoch": round(median(epochs), 3),
        "seconds_per_step": round(median(steps), 5),
        "steps": len(steps),
        "peak_mib": round(resident_mib("VmHWM"), 1),
        "before_training_mib": round(before, 1),
    }


def timed(step: Callable[[], torch.Tensor]) -> float:
    """Return the seconds of one step, until the GPU is done with it."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def cost(step: Callable[[], torch.Tensor], device: str, repeats: int) -> Row:
    """Return the extra peak memory of a step, and the least and the median of its seconds.

    On a CPU the first step is the one whose memory counts: later ones find pages that it left. On a
    GPU it is the third, after kernels have been compiled and tuned.
    """
    if device == "cuda":
        step(), step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() / MIB
        torch.cuda.reset_peak_memory_stats()
        first = timed(step)
        peak = torch.cuda.max_memory_allocated() / MIB
    else:
        before = resident_mib("VmRSS")
        forget_peak()
        first = timed(step)
        peak = resident_mib("VmHWM")
    times = [timed(step) for _ in range(repeats)] or [first]
    return {
        "extra_peak_mib": round(peak - before, 1),
        "peak_mib": round(peak, 1),
        "seconds": min(times),
        "median_seconds": median(times),
    }


def in_fresh_process(
    words: list[str], timeout: float | None = None, python: str = sys.executable
) -> Row:
    """Run a script and return the JSON of its last line, or why there is none."""
    try:
        done = subprocess.run(
            [python, *words], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"not_run": f"took more than {timeout:.0f} s"}
    except OSError as error:
        return {"not_run": plain(str(error.strerror))}
    if done.returncode < 0:
        return {"not_run": f"ended by signal {-done.returncode}: out of memory?"}
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no output"]
    return {"not_run": plain(lines[-1])} if done.returncode else json.loads(lines[-1])


def plain(text: str) -> str:
    """Return a message without the paths of this machine."""
    return " ".join(Path(word).name if "/" in word else word for word in text.split())[:160]


def fold(passes: list[Row]) -> Row:
    """Return the median memory and the least time of several runs, or why one did not run."""
    for row in passes:
        if "not_run" in row:
            return row
    least = {name: min(row[name] for row in passes) for name in ("seconds", "median_seconds")}
    middle = {name: median(row[name] for row in passes) for name in ("extra_peak_mib", "peak_mib")}
    return {**passes[0], **middle, **least}


def available_bytes(device: str) -> int:
    """Return the memory that a process could still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if "MemAvailable" in line).split()[1])


def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Return what a plain matrix product reaches here."""
    side = 8192 if device == "cuda" else 1024
    left, right = torch.randn(2, side, side, dtype=dtype, device=device).unbind()
    seconds = min(timed(lambda: left @ right) for _ in range(5))
    return 2 * side**3 / seconds
