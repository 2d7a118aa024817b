"""Steps that were measured on CPUs, and the processor whose speeds explain them.

python recipes/benchmarks/scale.py      # holds the simulator against these
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scale_model import Case, Device, cost_of
from scipy.optimize import nnls

from hf_rece.losses import LOSSES

RESULTS = Path(__file__).parent / "results"
# Speeds are fitted to the first and held against the second.
FITTED = (
    "losses_4096_100000_64",
    "tables_4096_100000_64",
    "tables_4096_10000000_64_sparse_grad",
)
HELD_OUT = (
    "losses_25600_1000000_64",
    "losses_2048_151936_896",
    "tables_4096_10000000_64",
    "sharding",  # memory only
)


def measured(files: Iterable[str]) -> list[tuple[str, Case, dict[str, Any]]]:
    """Return the steps that losses.py, tables.py and sharding.py measured on a CPU.

    Returns:
        File, case, and figures: extra_peak_mib, and seconds but for sharding.py.
    """
    found: list[tuple[str, Case, dict[str, Any]]] = []
    for name in files:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if name.startswith("losses"):
            sizes = record["shape"]
            case = Case(sizes["classes"], sizes["width"], sizes["tokens"], device="cpu")
            rows = {
                replace(case, loss=loss, updates=False): row
                for loss, row in record["losses"].items()
                if loss in LOSSES or loss == "dense"
            }
        elif name == "sharding":
            rows = dict(_shard_rows(record))
        else:
            rows = dict(_table_rows(record))
        found += [(name, case, row) for case, row in rows.items() if "extra_peak_mib" in row]
    return found


def _shard_rows(record: dict[str, Any]) -> Iterable[tuple[Case, dict[str, Any]]]:
    n_tokens, n_items, width = record["shape"]
    for key, row in record["runs"].items():
        loss, ranks = key.split(", ")
        tokens, table = n_tokens // int(ranks), "dense"
        yield Case(n_items, width, tokens, int(ranks), loss, table, "vocab_parallel", "cpu"), row


def _table_rows(record: dict[str, Any]) -> Iterable[tuple[Case, dict[str, Any]]]:
    n_tokens, n_items, width = record["shape"]
    names = {"dense": "dense", "dense, sparse_grad": "sparse_grad", "codes": "compositional"}
    for key, row in record["runs"].items():
        loss, table = key.split(", ", 1)
        table = {**names, "lma": "lma"}.get(table)
        if table is not None:
            case = Case(n_items, width, n_tokens, loss=loss, table=table, device="cpu")
            yield case, row


def fitted(steps: Iterable[tuple[Case, float]]) -> Device:
    """Return the processor whose speeds explain the seconds of these steps best, in ratio."""
    names = ("products", "streams", "gathers", "lookups")
    rows, wanted = [], []
    for case, took in steps:
        work = cost_of(case).work
        rows.append([work[name] / took for name in names] + [1 / took])
        wanted.append(1.0)
    scale = np.abs(rows).max(0)
    slowness = nnls(np.array(rows) / scale, np.array(wanted))[0] / scale
    rates = [1 / slow if slow else float("inf") for slow in slowness[:-1]]
    return Device(0.0, *rates, launch=float(slowness[-1]))
