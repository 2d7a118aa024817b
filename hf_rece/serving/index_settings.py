"""What is kept beside an index of items, and read back with care."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class IndexSettings:
    """What is kept beside an index.

    Args:
        factory: the index in faiss's own notation.
        effort: lists probed of an IVF index, or efSearch of HNSW; 0 for a scan.
        oversampling: candidates fetched for each item wanted, then scored exactly.
        recall: share of the exact top k that was found.
        recall_k: the k of recall.
        n_rows: C of the model.
        norms: of a few item vectors, by which an index of other weights is told.
    """

    factory: str
    effort: int
    oversampling: int
    recall: float
    recall_k: int
    n_rows: int
    norms: list[float]


def read_settings(path: Path) -> IndexSettings:
    """Return the settings that a JSON file holds.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not JSON.
        TypeError: for settings that are missing, unknown or of another type; names one.
    """
    settings = IndexSettings(**json.loads(path.read_text("utf-8")))
    least = {"effort": 0, "oversampling": 0, "recall_k": 1, "n_rows": 2}
    for name, value in vars(settings).items():
        if name in least:
            is_good = _is_whole(value) and least[name] <= value < 2**31
        elif name == "norms":
            is_good = isinstance(value, list) and all(map(_is_number, value))
        else:
            is_good = isinstance(value, str) if name == "factory" else _is_number(value)
        if not is_good:
            raise TypeError(f"{path.name}: {name} is {value!r}")
    return settings


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)
