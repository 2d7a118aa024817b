"""The Triton kernels compile for GPUs that are not there, and fit into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.backends.nvidia", reason="this Triton does not compile for NVIDIA")

ROOT = Path(__file__).resolve().parents[2]


def compiled(capability, *cases):
    """Return what each launch of the cases takes; a process of its own does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", str(capability), *cases],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(launches):
    assert launches
    for launch in launches:
        assert launch["shared"] <= launch["limit"], launch
        # A few bounds and marks may go, more where a plan has every option; accumulators may not.
        assert launch["spilt"] <= (1024 if launch["case"].startswith("everything") else 400), launch
        # Products on tensor cores, loads ahead of them.
        if "float32" not in launch["case"]:
            assert {"tcgen05.mma", "wgmma", "mma.sync"} & {*launch["instructions"]}, launch


def test_recommenders_and_language_models():
    launches = compiled(90, "exhaustive:bfloat16:64", "exhaustive:bfloat16:2048")
    check(launches)
    kernels = [launch["kernel"] for launch in launches]
    assert kernels == [
        "forward_kernel", "hidden_kernel", "rows_kernel", "forward_kernel", "wide_kernel",
    ]  # fmt: skip
    assert all("cp.async" in launch["instructions"] for launch in launches)


def test_wider_than_the_table_of_blocks():
    check(compiled(90, "exhaustive:bfloat16:5000"))


def test_every_option_at_once():
    check(compiled(80, "everything:float16:50"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("plan", ["exhaustive", "everything", "maximum", "sum"])
def test_every_plan_width_and_dtype(plan, capability):
    half = [f"{plan}:bfloat16:{width}" for width in (1, 64, 100, 256, 2048, 5120)]
    single = [f"{plan}:float32:{width}{how}" for width in (64, 128, 1024) for how in ("", ":tf32")]
    more = [f"{plan}:float16:100", f"{plan}:bfloat16:2048:deterministic"]
    check(compiled(capability, *half, *single, *more))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("plan", ["exhaustive", "everything"])
def test_rows_that_are_rounded_as_they_are_read(plan, capability):
    check(
        compiled(
            capability,
            *(f"{plan}:float32:{width}:autocast" for width in (64, 128, 256, 2048)),
            f"{plan}:float32:2048:autocast:deterministic",
        )
    )
