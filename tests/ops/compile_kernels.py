"""Compile the launches of stream_triton for a GPU that need not be there; print what they take.

    python -m tests.ops.compile_kernels 90 exhaustive:bfloat16:64 ...

The interpreter takes code that the compiler refuses, and knows no limit of shared memory.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hf_rece.ops import stream_triton, triton_kernels, triton_windows
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.plans.exhaustive import exhaustive_plan
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.stream_torch import Gradients, Scores

KERNELS = ("forward_kernel", "hidden_kernel", "rows_kernel", "wide_kernel")
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
}  # fmt: skip
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "cp.async")
# Cores, and shared memory that a program may ask for.
DEVICES = {
    80: (108, 163 * 1024),
    86: (82, 99 * 1024),
    90: (132, 227 * 1024),
    100: (148, 227 * 1024),
}


class Recorder:
    """Takes the place of a kernel, and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.kernel, args, constants))


def describe(value, place, signature, constants, attributes):
    """Return the type of an argument as the launcher would specialise it."""
    if isinstance(value, tuple):
        parts = [
            describe(part, (*place, i), signature, constants, attributes)
            for i, part in enumerate(value)
        ]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[place] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[place] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def compile_launch(kernel, args, options, capability):
    flags = {k: options.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name] = "constexpr"
            constants[(i,)] = options[name]
        else:
            signature[name] = describe(args[i], (i,), signature, constants, attributes)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=flags)


def plans(n_tokens, n_classes):
    """A plan with few features, and one with all."""
    labels = torch.zeros(n_tokens, dtype=torch.long)
    n_groups, n, m = 4, 64, 128
    tokens = torch.zeros((n_groups, n), dtype=torch.int32)
    classes = torch.zeros((n_groups, m), dtype=torch.int32)
    chunks = torch.zeros(n_tokens + 1, dtype=torch.int16)
    found = EarlierRound(chunks, torch.zeros(n_classes + 1, dtype=torch.int16), 1)
    everything = Grid(
        tokens, classes,
        skip=torch.tensor([[0, 1, 2]] * 7),
        own_labels=torch.zeros(n_tokens + 1, dtype=torch.long),
        earlier=(found, found),
        token_log_weight=torch.zeros(n_groups, n),
        class_log_weight=torch.zeros(n_groups, m),
    )  # fmt: skip
    bare = Grid(tokens, classes, own_labels=everything.own_labels)
    tile = 2**20
    return {
        "exhaustive": exhaustive_plan(labels, n_classes, excluded_ids=None, tile_bytes=tile),
        "everything": Plan((everything,), "logaddexp", n_tokens, n_classes, tile),
        "maximum": Plan((bare,), "maximum", n_tokens, n_classes, tile),
        "sum": Plan((bare,), "sum", n_tokens, n_classes, tile),
    }


def launches_of(name, dtype, width, autocast=None, n_tokens=256, n_classes=512):
    """Return the launches of a forward and a backward; with every option but for "exhaustive"."""
    plan = plans(n_tokens, n_classes)[name]
    full = name != "exhaustive"
    hidden, weight = (torch.zeros(n, width, dtype=dtype) for n in (n_tokens, n_classes))
    bias = torch.zeros(n_classes) if full else None
    scores = Scores(hidden, DenseRows(weight), bias, 1.0, 30.0 if full else None, autocast)
    into = Gradients(
        torch.zeros(n_tokens, width),
        (torch.zeros(n_classes, width),),
        torch.zeros(n_classes) if full else None,
    )
    launches = []
    for kernel in KERNELS:
        setattr(stream_triton, kernel, Recorder(getattr(triton_kernels, kernel), launches))
    merged, winner, _ = stream_triton.forward(scores, plan, observe=full)
    grad = torch.zeros(n_tokens + 1)
    stream_triton.backward(scores, plan, torch.zeros_like(merged), winner, grad, into)
    return launches


def main():
    capability = int(sys.argv[1])
    triton_windows._device = lambda device: DEVICES[capability]
    for case in sys.argv[2:]:
        name, dtype, width, *options = case.split(":")
        torch.use_deterministic_algorithms("deterministic" in options)
        torch.set_float32_matmul_precision("high" if "tf32" in options else "highest")
        autocast = torch.bfloat16 if "autocast" in options else None
        launches = launches_of(name, getattr(torch, dtype), int(width), autocast)
        for kernel, args, constants in launches:
            compiled = compile_launch(kernel, args, dict(constants), capability)
            print(json.dumps({
                "case": case,
                "kernel": kernel.__name__,
                "blocks": [constants[f"BLOCK_{x}"] for x in "NMD"],
                "shared": compiled.metadata.shared,
                "limit": DEVICES[capability][1],
                "warps": constants["num_warps"],
                **resources(compiled, capability),
            }), flush=True)  # fmt: skip


def resources(compiled, capability):
    """Registers of a thread and bytes spilt, as the assembler says; notable instructions."""
    code = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        target = re.search(r"\.target (\w+)", code).group(1)
        assembler = get_ptxas(capability)
        assembler = getattr(assembler, "path", None) or assembler[0]  # Triton 3.3: a tuple
        command = [assembler, "-v", f"--gpu-name={target}", file.name]
        command += ["-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilt": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
        "instructions": [
            word for word in ("tcgen05.mma", "wgmma", "mma.sync", "cp.async") if word in code
        ],
    }


if __name__ == "__main__":
    main()
