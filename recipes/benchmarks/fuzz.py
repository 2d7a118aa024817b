"""Try every property of tests/fuzz on many random cases, and note how many it held for.

    python recipes/benchmarks/fuzz.py                      # 20,000 cases each, 40 minutes at most
    python recipes/benchmarks/fuzz.py --cases 500 --only losses

Each file of properties runs in a process of its own, on one thread. A property that fails is shown
with the smallest case that makes it fail, and noted. Writes results/fuzz.json after each file,
where what is known of the other files stays, and exits with 1 if a property failed, or ended
before its cases and its time.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import environment

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "fuzz"
RESULT = Path(__file__).parent / "results" / "fuzz.json"


class Counter:
    """A plugin of pytest: what became of each property, and in how many cases it was tried."""

    def __init__(self) -> None:
        self.properties: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a property that has been tried."""
        from tests.fuzz.cases import OUT_OF_TIME, TRIED

        if report.when != "call":
            return
        for name in TRIED.keys() - self.properties.keys():
            self.properties[name] = {
                "cases": TRIED[name],
                "outcome": report.outcome,
                "seconds": round(report.duration),
                "out_of_time": name in OUT_OF_TIME,
            }


def run_file(path: Path) -> int:
    """Run the properties of a file in this process; print the counts as the last line.

    Returns:
        The exit status of pytest, which knows of failures outside properties too.
    """
    import pytest

    counter = Counter()
    options = ["-q", "-n0", "--timeout=0", "-p", "no:cacheprovider", "--tb=short", str(path)]
    status = pytest.main(options, plugins=[counter])
    print(json.dumps(counter.properties))
    return int(status)


def problems_of(properties: dict[str, dict[str, Any]], cases: int) -> list[str]:
    """Return what is wrong with the outcomes of a file's properties, in words."""
    problems = [] if properties else ["no property was tried"]
    for name, found in properties.items():
        if found["outcome"] != "passed":
            problems.append(f"{name}: {found['outcome']}")
        elif found["cases"] < cases and not found["out_of_time"]:
            problems.append(f"{name}: {found['cases']} cases of {cases}")
    return problems


def last_line(output: str) -> dict[str, dict[str, Any]]:
    """Return the counts that run_file printed; none if it did not get so far."""
    try:
        counts = json.loads((output.splitlines() or [""])[-1])
    except json.JSONDecodeError:
        counts = None
    return counts if isinstance(counts, dict) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument(
        "--minutes", type=float, default=40, help="of the processor at most, for a property"
    )
    parser.add_argument("--only", nargs="*", help="files by name, such as losses")
    parser.add_argument("--file", type=Path, help="run this one here and print JSON")
    args = parser.parse_args()
    if args.file:
        sys.exit(run_file(args.file))
    problems = []
    files = sorted(FOLDER.glob("test_*.py"))
    settings = {"FUZZ_CASES": str(args.cases), "FUZZ_MINUTES": str(args.minutes)}
    for file in files:
        name = file.stem.removeprefix("test_")
        if args.only and name not in args.only:
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--file", str(file)],
            cwd=ROOT,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout)
        counts = last_line(done.stdout)
        found_here = problems_of(counts, args.cases)
        if done.returncode and not found_here:
            found_here = [f"pytest ended with {done.returncode}"]
        problems += [f"{file.name}: {problem}" for problem in found_here]
        found = json.loads(RESULT.read_text())["files"] if RESULT.exists() else {}
        here = environment()
        found[name] = {"commit": here["commit"], "properties": counts}
        record = {**here, "cases_asked": args.cases, "minutes_at_most": args.minutes}
        RESULT.write_text(json.dumps({**record, "files": found}, indent=1) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
