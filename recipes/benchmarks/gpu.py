"""Measure everything that wants a GPU, and run the tests marked gpu: one command.

    python recipes/benchmarks/gpu.py              # both rows, the grid, language models, tests
    python recipes/benchmarks/gpu.py --quick      # the two rows and the tests

Prints each table and, at the end, what must hold beside what was measured; writes the results of
losses.py and llm.py, and results/gpu.json.
"""

import argparse
import json
import subprocess
import sys
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


def run(*words: str) -> str:
    """Run a command of this interpreter and return what it printed; it may fail."""
    print("python", " ".join(words), flush=True)
    done = subprocess.run(
        [sys.executable, *words], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    return done.stdout


def script(name: str, *words: str) -> str:
    return run(str(HERE / name), *words, "--device", "cuda")


def row_of(shape: tuple[int, int, int]) -> dict[str, Any]:
    name = "losses_{}_{}_{}_cuda_bfloat16.json".format(*shape)
    return json.loads((RESULTS / name).read_text())["losses"]


def verdicts() -> list[dict[str, Any]]:
    """Return, for each thing that must hold, the quotient and whether it holds."""
    found = []
    for shape, name, beside, field, at_most in MUST:
        measured, other = row_of(shape)[name], row_of(shape)[beside]
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
    for shape in (RECOMMENDER, LANGUAGE_MODEL):
        sizes = zip(("--tokens", "--classes", "--width"), map(str, shape), strict=True)
        words = [word for pair in sizes for word in pair]
        script("losses.py", *words, "--repeats", args.repeats)
    tests = run("-m", "pytest", "-m", "gpu", "-q", "--timeout", "900")
    record = {
        **environment("cuda"),
        "must": verdicts(),
        "tests": plain(tests.strip().splitlines()[-1]),
    }
    (RESULTS / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    if not args.quick:
        limits = ("--repeats", args.repeats, "--timeout", args.timeout)
        script("losses.py", "--grid", "recommender", "language_model", *limits)
        models = ("qwen3_0.6b", "small_qwen3")
        script("llm.py", "--models", *models, "--batch", "8", "--length", "2048")
    show(record["must"])


if __name__ == "__main__":
    main()
