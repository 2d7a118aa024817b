"""Try every property of tests/fuzz on many random cases, and note how many it held for.

    python recipes/benchmarks/fuzz.py                      # 20,000 cases each, 40 minutes at most
    python recipes/benchmarks/fuzz.py --cases 500 --only losses

Each file of properties runs in a process of its own, on one thread. A property that fails is shown
with the smallest case that makes it fail, and noted. Writes results/fuzz.json after each file.
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
RESULT = Path(__file__).parent / "results" / "fuzz.json"


class Counter:
    """A plugin of pytest: what became of each property, and in how many cases it was tried."""

    def __init__(self) -> None:
        self.properties: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a property that has been tried."""
        from tests.fuzz.cases import TRIED

        if report.when != "call":
            return
        for name in TRIED.keys() - self.properties.keys():
            self.properties[name] = {
                "cases": TRIED[name],
                "outcome": report.outcome,
                "seconds": round(report.duration),
            }


def run_file(path: Path) -> None:
    """Run the properties of a file in this process; print the counts as the last line."""
    import pytest

    counter = Counter()
    options = ["-q", "-n0", "--timeout=0", "-p", "no:cacheprovider", "--tb=short", str(path)]
    pytest.main(options, plugins=[counter])
    print(json.dumps(counter.properties))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=40, help="at most, for a property")
    parser.add_argument("--only", nargs="*", help="files by name, such as losses")
    parser.add_argument("--file", type=Path, help="run this one here and print JSON")
    args = parser.parse_args()
    if args.file:
        run_file(args.file)
        return
    files = sorted((ROOT / "tests" / "fuzz").glob("test_*.py"))
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
            check=True,
        )
        print(done.stdout)
        counts = json.loads(done.stdout.splitlines()[-1])
        found = json.loads(RESULT.read_text())["files"] if RESULT.exists() else {}
        found[name] = counts
        record = {**environment(), "cases_asked": args.cases, "minutes_at_most": args.minutes}
        RESULT.write_text(json.dumps({**record, "files": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
