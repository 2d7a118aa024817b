"""Measure everything that wants a GPU, and run the tests marked gpu: one command.

    pip install -c constraints.txt -e ".[dev,benchmarks]"   # beside a torch for your CUDA
    python recipes/benchmarks/gpu.py              # both rows, the grid, language models, tests
    python recipes/benchmarks/gpu.py --quick      # the two rows and the tests

Prints each table and, at the end, what must hold beside what was measured; writes the results of
losses.py and llm.py, results/gpu.json and the plots. Exits with 1 if anything failed or does not
hold.
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from environment import environment
from measuring import plain
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECOMMENDER, LANGUAGE_MODEL = (25_600, 1_000_000, 64), (16_384, 248_320, 2048)
NEEDED = ("pytest", "hypothesis", "xdist", "triton", "liger_kernel", "cut_cross_entropy", "trl")
# (shape, measured, beside, field, at most): "at most" is of the quotient.
MUST = (
    (RECOMMENDER, "cross_entropy", "cce_exact", "extra_peak_mib", 1.0),
    (RECOMMENDER, "cross_entropy", "cce_exact", "seconds", 1.1),
    (RECOMMENDER, "stratified", "cross_entropy", "seconds", 0.2),
    (RECOMMENDER, "rece", "cross_entropy", "seconds", 0.2),
    (LANGUAGE_MODEL, "cross_entropy", "cce_exact", "seconds", 1.0),
    (LANGUAGE_MODEL, "cross_entropy", "cce_exact", "extra_peak_mib", 1.0),
    (LANGUAGE_MODEL, "stratified", "cce_exact", "seconds", 0.4),
    (LANGUAGE_MODEL, "stratified", "cce_exact", "extra_peak_mib", 1.0),
)


def run(*words: str) -> tuple[int, str]:
    """Run a command of this interpreter; return its exit status, and what it printed."""
    print("python", " ".join(words), flush=True)
    done = subprocess.run(
        [sys.executable, *words], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def script(name: str, *words: str) -> str | None:
    """Run a script of this folder on the GPU; return what failed, if it did."""
    status, _ = run(str(HERE / name), *words, "--device", "cuda")
    return f"{name} ended with {status}" if status else None


def path_of(shape: tuple[int, int, int]) -> Path:
    return RESULTS / "losses_{}_{}_{}_cuda_bfloat16.json".format(*shape)


def row_of(shape: tuple[int, int, int]) -> dict[str, Any]:
    path = path_of(shape)
    return json.loads(path.read_text())["losses"] if path.exists() else {}


def verdicts() -> list[dict[str, Any]]:
    """Return, for each thing that must hold, the quotient and whether it holds."""
    found = []
    for shape, name, beside, field, at_most in MUST:
        measured, other = (
            row_of(shape).get(which, {"not_run": "no results"}) for which in (name, beside)
        )
        claim = {"shape": shape, "loss": name, "beside": beside, "field": field, "must": at_most}
        reasons = [row["not_run"] for row in (measured, other) if "not_run" in row]
        if reasons:
            found.append({**claim, "not_run": reasons[0]})
            continue
        quotient = measured[field] / other[field]
        found.append({**claim, "quotient": round(quotient, 4), "holds": quotient <= at_most})
    return found


def show(found: list[dict[str, Any]]) -> None:
    table = Table(title="What must hold on a GPU")
    for name in ("N, C, D", "loss", "beside", "of", "measured", "must be at most", ""):
        table.add_column(name)
    for one in found:
        measured = one.get("not_run") or str(one["quotient"])
        table.add_row(
            "{:,}, {:,}, {}".format(*one["shape"]), one["loss"], one["beside"], one["field"],
            measured, str(one["must"]), {True: "yes", False: "no"}.get(one.get("holds"), "unknown"),
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", default="10")
    parser.add_argument("--timeout", default="120", help="seconds for one contender of the grid")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing was measured")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; see the head of this file")
    failed = []
    for shape in (RECOMMENDER, LANGUAGE_MODEL):
        path_of(shape).unlink(missing_ok=True)  # what is left of another time is no result
        sizes = zip(("--tokens", "--classes", "--width"), map(str, shape), strict=True)
        words = [word for pair in sizes for word in pair]
        failed.append(script("losses.py", *words, "--repeats", args.repeats))
    record = {**environment("cuda"), "must": verdicts(), "tests": "not run"}
    write(record)
    status, printed = run("-m", "pytest", "-n0", "-m", "gpu", "-q", "--timeout", "3600")
    failed.append(f"pytest ended with {status}" if status else None)
    record["tests"] = plain((printed.strip().splitlines() or ["printed nothing"])[-1])
    write(record)
    if not args.quick:
        limits = ("--repeats", args.repeats, "--timeout", args.timeout)
        failed.append(script("losses.py", "--grid", "recommender", "language_model", *limits))
        models = ("qwen3_0.6b", "small_qwen3")
        failed.append(script("llm.py", "--models", *models, "--batch", "8", "--length", "2048"))
    run(str(HERE / "plot.py"))
    show(record["must"])
    if not all(one.get("holds") for one in record["must"]):
        failed.append("something that must hold does not, or was not measured")
    if any(failed):
        sys.exit("\n".join(dict.fromkeys(reason for reason in failed if reason)))


def write(record: dict[str, Any]) -> None:
    (RESULTS / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
