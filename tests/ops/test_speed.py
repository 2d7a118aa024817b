"""The bounds of speed.py hold."""

import os
import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).with_name("speed.py")


def test_losses_take_a_few_times_a_plain_product():
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", str(SPEED)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SPEED.parents[2],
        env=alone,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout
