"""Run a test's function in two processes that talk to each other."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed
sys.path.insert(0, {root!r})
from {module} import findings
found = findings({folder!r}, 2)
Path({folder!r}, os.environ["RANK"] + ".json").write_text(json.dumps(found))
torch.distributed.barrier()  # neither process leaves while the other still talks to it
torch.distributed.destroy_process_group()
"""


def findings_of_two_processes(module, folder):
    """Return what `findings(folder, 2)` of a test module returns in each of two processes."""
    root = str(Path(__file__).resolve().parents[1])
    script = Path(folder) / "script.py"
    script.write_text(SCRIPT.format(root=root, module=module, folder=str(folder)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]
