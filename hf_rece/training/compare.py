"""Finished runs side by side: what differs, what comes out, and where they do not compare."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import polars as pl

from hf_rece.errors import ArgumentError, DataError
from hf_rece.training.runs import Run, load_run

_METRICS = ("ndcg@10", "perplexity", "loss")
_DIGEST = re.compile(r"(SHA-256 [0-9a-f]{8})[0-9a-f]+")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        runs: best first.
        metric: that they are compared by.
        part: of the data that it was measured on: "test" or "validation".
        table: a row a run: run, evaluated_on where it differs, each setting that differs, the
            metric, of_best (its ratio to the best on the same data), seconds, peak_mib.
        common: settings that are the same for all runs, and evaluated_on likewise.
        warnings: why values do not compare, or are missing.
    """

    runs: Sequence[Run]
    metric: str
    part: str
    table: pl.DataFrame
    common: Mapping[str, Any]
    warnings: Sequence[str]


def compare_runs(
    sources: str | Path | Sequence[str | Path], metric: str | None = None
) -> Comparison:
    """Compare finished runs by a metric of the final models, and by what they cost.

    Args:
        sources: folders that hf-rece, a trainer of ours or any Trainer trained in; globs of them;
            Hub ids.
        metric: name without prefix, such as recall@20. None for the first of ndcg@10, perplexity
            and loss that most runs have. Of test where as many runs have it as of validation.

    Raises:
        ArgumentError: if there are no sources, or no run has the metric.
        DataError: for a run without a record, see load_run.

    Example:
        >>> compare_runs("runs/*").table  # doctest: +SKIP
    """
    runs = _named([load_run(source) for source in _expanded(sources)])
    metric, part = _metric_and_part(runs, metric)
    sign = 1 if is_lower_better(metric) else -1

    def place(run: Run) -> tuple[bool, float]:
        value = run.metrics[part].get(metric, math.nan)
        return math.isnan(value), 0 if math.isnan(value) else sign * value

    runs = sorted(runs, key=place)
    best: dict[str | None, float] = {}
    for run in runs:
        if metric in run.metrics[part]:
            best.setdefault(run.evaluated_on, run.metrics[part][metric])
    settings = [{"evaluated_on": run.evaluated_on, **run.settings} for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1]
    rows = []
    for run, known in zip(runs, settings, strict=True):
        value, top = run.metrics[part].get(metric), best.get(run.evaluated_on)
        row = {"run": run.name} | {name: known.get(name) for name in differing}
        row |= {metric: value, "of_best": value / top if value is not None and top else None}
        rows.append(row | {"seconds": run.seconds, "peak_mib": run.peak_mib})
    return Comparison(
        runs=runs,
        metric=metric,
        part=part,
        table=pl.DataFrame(rows, infer_schema_length=None, strict=False),
        common={n: v for n, v in settings[0].items() if n not in differing and v is not None},
        warnings=_warnings(runs, metric, part),
    )


def is_lower_better(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return metric.endswith(("loss", "perplexity", "entropy"))


def data_letters(runs: Sequence[Run]) -> dict[str, str]:
    """Return a letter for each of the data that runs were evaluated on."""
    data = dict.fromkeys(run.evaluated_on for run in runs if run.evaluated_on is not None)
    return {each: chr(ord("A") + i) for i, each in enumerate(data)}


def short_digest(data: str) -> str:
    """Return a description of data with the first digits of its SHA-256."""
    return _DIGEST.sub(r"\1", data)


def _expanded(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the sources, each once, with what globs stand for in their place."""
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found = []
    for source in map(str, given):
        matches = [source] if Path(source).exists() else sorted(glob(source, recursive=True))
        if not matches and any(sign in source for sign in "*?["):
            raise DataError(source, "no folder matches", "Check the pattern")
        found += matches or [source]
    if not found:
        raise ArgumentError("runs", given, "there are none", "Pass folders, globs or Hub ids")
    return list(dict.fromkeys(found))


def _named(runs: Sequence[Run]) -> list[Run]:
    """Return runs with names as short as tell them apart."""
    places = [Path(run.name) for run in runs]
    parts = [(place.resolve() if place.is_dir() else place).parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return list(runs)


def _metric_and_part(runs: Sequence[Run], metric: str | None) -> tuple[str, str]:
    known = {
        (name, part): sum(name in run.metrics[part] for run in runs)
        for run in runs
        for part in ("test", "validation")
        for name in run.metrics[part]
    }
    wanted = [metric.removeprefix("eval_")] if metric else list(_METRICS)
    candidates = [(n, p) for n in wanted for p in ("test", "validation") if (n, p) in known]
    if not candidates:
        names = ", ".join(sorted({name for name, _ in known})) or "none: evaluate the runs"
        raise ArgumentError("metric", metric, "no run has it", f"Known metrics: {names}")
    return max(candidates, key=known.__getitem__)


def _warnings(runs: Sequence[Run], metric: str, part: str) -> list[str]:
    found = []
    letters = data_letters(runs)
    if len(letters) > 1:
        which = "; ".join(f"{letter} = {short_digest(data)}" for data, letter in letters.items())
        found.append(
            "the runs were evaluated on different data or splits, and their metrics do not "
            f"compare: {which}"
        )
    unknown = [run.name for run in runs if run.evaluated_on is None]
    if unknown and len(runs) > 1:
        found.append(
            f"what {', '.join(unknown)} was evaluated on is not recorded: see for yourself that "
            "the metrics compare"
        )
    found += [
        f"{run.name} has no {metric} of {part}" for run in runs if metric not in run.metrics[part]
    ]
    return found
