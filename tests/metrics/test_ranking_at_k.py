"""The evaluate metric, loaded by path and without a network."""

import subprocess
import sys

import pytest

from hf_rece.metrics.ranking import ranking_metrics
from hf_rece.metrics.ranking_at_k import metric_path

GREATER, TIED = [0, 2, 10, 0, 7], [0, 0, 0, 19, 1]

# evaluate imports heavy and noisy modules: it runs apart.
SCRIPT = """
import sys, evaluate
path, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if process < 0:
    metric = evaluate.load(path, cache_dir=folder)
    rows = [([0, 2], [0, 0]), ([10, 0, 7], [0, 19, 1])]
else:
    shared = {"num_process": 2, "process_id": process, "experiment_id": "x"}
    metric = evaluate.load(path, cache_dir=folder, **shared)
    rows = [([0, 2, 10, 0], [0, 0, 0, 19])] if process == 0 else [([7], [1])]
for predictions, references in rows:
    metric.add_batch(predictions=predictions, references=references)
print(metric.compute(ks=[10], **eval(sys.argv[4])))
"""


def start(process, folder, path=None, **options):
    command = [sys.executable, "-c", SCRIPT, path or metric_path(), str(process), str(folder)]
    command.append(repr(options))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("path", [metric_path(), metric_path() + "/ranking_at_k.py"])
def test_loads_offline_by_folder_and_by_file(path, tmp_path):
    coverage = {"topk_ids": [list(range(10))] * 5, "n_items": 20}
    output, _ = start(-1, tmp_path, path, **coverage).communicate(timeout=120)
    wanted = ranking_metrics(GREATER, TIED, ks=[10], **coverage)
    assert wanted["coverage@10"] == 0.5
    assert eval(output.splitlines()[-1]) == pytest.approx(wanted)


def test_two_processes_with_uneven_shares_agree_with_one(tmp_path):
    processes = [start(i, tmp_path) for i in (0, 1)]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert eval(first.splitlines()[-1]) == pytest.approx(ranking_metrics(GREATER, TIED, ks=[10]))
    assert second.splitlines()[-1] == "None"
