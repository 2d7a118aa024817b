"""kernels.cpp, compiled once by the machine's own compiler and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rece.files import sync

# Wider blocks leave the cache, and torch's products of wide vectors hide the calls between them.
MAX_WIDTH = 256
# kTokens, kClasses and kTaskClasses of kernels.cpp.
_TOKENS, _CLASSES, _TASK_CLASSES = 256, 128, 1024
SOURCE = Path(__file__).with_name("kernels.cpp")
# torch's own OpenMP serves the kernels: its threads must not wait beside those of a second one.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
_SECONDS = 120


def serves_shape(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can read matrices of such rows."""
    narrow = device.type == "cpu" and dtype == torch.float32 and 0 < width <= MAX_WIDTH
    return narrow and library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can read these matrices of narrow rows."""
    return all(
        tensor.is_contiguous() and serves_shape(tensor.shape[1], tensor.dtype, tensor.device)
        for tensor in tensors
    )


def block_bytes(width: int, has_softcap: bool) -> int:
    """Return the bytes that stream_backward takes for each thread."""
    # Four copies of the tokens' states or gradients, a block of rows, gradients of a task's rows.
    vectors = 4 * _TOKENS + _CLASSES + _TASK_CLASSES
    return 4 * (vectors * (width + -width % 16) + (2 if has_softcap else 1) * _TOKENS * _CLASSES)


@torch.no_grad()
def nearest(vectors: Tensor, directions: Tensor) -> Tensor:
    """Return (K,) int32, for each vector (K, D) the first direction (B, D) of largest product."""
    found = torch.empty(len(vectors), dtype=torch.int32)
    sizes = [ctypes.c_int64(size) for size in (*vectors.shape, len(directions))]
    threads = ctypes.c_int64(torch.get_num_threads())
    of_vectors, of_directions = sizes[:2], sizes[2]
    whole = (pointer(vectors), *of_vectors, pointer(directions), of_directions)
    call("nearest", *whole, pointer(found), threads)
    return found


@torch.no_grad()
def search(
    queries: Tensor, rows: Tensor, bias: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor] | None:
    """Return what scores above each query's threshold, or None if a query has more than fit.

    Args:
        queries: (Q, D).
        rows: (C, D).
        bias: (C,) float32, added to the scores, or None.
        threshold: (Q, 1).
        capacity: hits a query that there is room for.

    Returns:
        scores: (Q, capacity), -inf behind the last hit.
        ids: (Q, capacity) int64 rows in ascending order, C behind the last hit.
    """
    scores = torch.full((len(queries), capacity), -torch.inf)
    ids = torch.full((len(queries), capacity), len(rows))
    n_hits = torch.empty(len(queries), dtype=torch.int64)
    threshold = threshold.contiguous()
    call(
        "search", pointer(queries), ctypes.c_int64(len(queries)), ctypes.c_int64(queries.shape[1]),
        pointer(rows), ctypes.c_int64(len(rows)), pointer(bias), pointer(threshold),
        ctypes.c_int64(capacity), pointer(n_hits), pointer(scores), pointer(ids),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return None if int(n_hits.max()) > capacity else (scores, ids)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a contiguous tensor's first number."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def call(function: str, *arguments: Any) -> None:
    """Call a kernel of `library()`, which must be there.

    Raises:
        MemoryError: if there was not enough for it; its outputs are of no use.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("there are no kernels: ask serves() first")
    if getattr(kernels, function)(*arguments):
        raise MemoryError(f"not enough memory for {function} of {SOURCE.name}")


def compiler() -> str | None:
    """Return the path of a C++ compiler: $CXX, g++ or c++; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they cannot be had: a warning says why, once.

    Compiling takes some seconds, in the first process that asks; later ones load the file.
    """
    if platform.system() != "Linux" or not torch.backends.openmp.is_available():
        return None
    command = compiler()
    if command is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(command)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # Runtime: no home
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"backend 'native' is left out, as {SOURCE.name} could not be compiled: {detail}",
            stacklevel=2,
        )
        return None


def _compiled(command: str) -> Path:
    """Return the library's path, after compiling it unless this was done before."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_rece"
    version = subprocess.run(
        [command, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True
    ).stdout
    # A home may be shared by machines whose processors differ.
    made_of = (SOURCE.read_text(), *_FLAGS, command, version, _processor())
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:32]
    target = folder / f"kernels-{name}.so"
    if target.exists():
        return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        for words in (
            [*_FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(
                [command, *words], capture_output=True, text=True, timeout=_SECONDS, check=True
            )
        sync(linked)  # what a power cut leaves half written would be taken for the library
        linked.replace(target)
    return target


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))
