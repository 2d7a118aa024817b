"""Measure extra peak memory of loss + backward, each in a fresh process; prints MiB as JSON.

    python -m tests.losses.peaks '[["rece", {"n_rounds": 2}, 4096, 100000, 64], ...]'

Memory as in recipes/benchmarks/losses.py: inputs and zeroed gradients are touched, the peak counter
is reset, and the peak resident size is read, less the size before. A run on 64 tokens has loaded
the code. The processes are forked from one that has loaded torch and computed nothing.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_rece.losses import build_loss

# glibc raises these as a process runs, and then keeps up to several tiles of what was freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def inputs(n_tokens, n_classes, width, dtype="float32"):
    dtype = getattr(torch, dtype)
    hidden = torch.randn(n_tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(n_classes, width).mul_(0.1).to(dtype).requires_grad_()
    for tensor in (hidden, weight):
        tensor.grad = torch.ones_like(tensor).zero_()  # ones first: zeros alone are not touched
    return hidden, weight, torch.randint(n_classes, (n_tokens,))


def run(name, knobs, tensors):
    hidden, weight, labels = tensors
    if name == "dense":
        loss = F.cross_entropy(hidden @ weight.T, labels)
    else:
        loss = build_loss(name, **knobs)(hidden, weight, labels)
    loss.backward()


def measure(name, knobs, n_tokens, n_classes, width, dtype="float32"):
    torch.manual_seed(0)
    few = {key: value for key, value in knobs.items() if key != "memory_budget"}
    run(name, few, inputs(64, 512, width, dtype))
    tensors = inputs(n_tokens, n_classes, width, dtype)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(name, knobs, tensors)
    return resident_mib("VmHWM") - before


def in_fresh_process(case):
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(write, json.dumps(measure(*case)).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(process, 0)
    found = os.read(read, 100)
    os.close(read)
    return json.loads(found) if status == 0 else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([in_fresh_process(case) for case in json.loads(sys.argv[1])]))
