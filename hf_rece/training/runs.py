"""A finished run, read back from its folder or from the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.hub import cached_file

from hf_rece.errors import DataError, HfReceError
from hf_rece.training.reporting import TRAINING_RUN

_STATE = "trainer_state.json"
_PARTS = {"validation": "eval_", "test": "test_"}
# The shape of a model, in the words of its config.json; settings of an adapter, in those of PEFT.
_SHAPE = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads",
    "n_head", "intermediate_size", "vocab_size", "dropout", "tie_word_embeddings", "item_embedding",
)  # fmt: skip
_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
_FACTS = ("max_length", "sequences", "epochs", "steps", "density", "device")


@dataclass(frozen=True)
class Run:
    """What a run left of itself.

    Args:
        name: folder or Hub id.
        settings: loss_type, its knobs, arguments, shape of the model: what is known, by name.
        evaluated_on: identifies the data and the protocol; None if not recorded.
        metrics: of the final model, by part of the data ("validation", "test") and name.
        curve: what was logged in training: steps, and metrics of validation by name.
        seconds: that training took; None if not recorded.
        peak_mib: largest memory, on a CPU of the process, whatever else it did; None if not
            recorded.
    """

    name: str
    settings: Mapping[str, Any]
    evaluated_on: str | None
    metrics: Mapping[str, Mapping[str, float]]
    curve: Sequence[tuple[int, Mapping[str, float]]]
    seconds: float | None
    peak_mib: float | None


def load_run(source: str | Path) -> Run:
    """Return the run of a folder or of a repository on the Hub.

    Args:
        source: folder that hf-rece, a trainer of ours or any Trainer trained in, or a checkpoint in
            it; or Hub id.

    Raises:
        DataError: if there is no such folder or repository, no record of a run in it, or a damaged
            one.
    """
    files = _files(str(source))
    try:
        return _run(str(source), files)
    except HfReceError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(
            str(source),
            f"its record of a run is damaged, or written by hand ({error})",
            "Train or copy it again",
        ) from error


def _run(source: str, files: Mapping[str, Mapping[str, Any]]) -> Run:
    config, record = files["config.json"], files[TRAINING_RUN]
    of_card = config.get("training_run") or {}
    state = record if "log_history" in record else files[_STATE]
    history = state.get("log_history", [])
    results = files["all_results.json"]  # of Trainer.save_metrics; some scripts add perplexity
    facts = {**record, **of_card}
    metrics = {
        part: {
            **_of_the_model(history, prefix, state.get("best_global_step")),
            **_named({"eval_perplexity": results.get("perplexity"), **results}, prefix),
            **{n: float(v) for n, v in of_card.get("metrics", {}).get(part, {}).items()},
        }
        for part, prefix in _PARTS.items()
    }
    if not any(metrics.values()) and not history:
        raise DataError(
            source,
            f"it holds no record of a run: no {TRAINING_RUN} or {_STATE}, nor metrics in a "
            "recommender's config.json",
            "Pass the output_dir of a training, or save_state() with the Trainer that trained it",
        )
    return Run(
        name=source,
        settings=_settings(files, facts, state),
        evaluated_on=_evaluated_on(facts),
        metrics=metrics,
        curve=[(int(log["step"]), found) for log in history if (found := _named(log, "eval_"))],
        seconds=_number(facts.get("seconds") or _largest([*history, results], "train_runtime")),
        peak_mib=_number(facts.get("peak_mib") or _largest(history, "peak_mib")),
    )


def _files(source: str) -> dict[str, dict[str, Any]]:
    """Return the files that tell of a run, by name; empty ones for those that are not there."""
    names = (TRAINING_RUN, _STATE, "all_results.json", "config.json", "adapter_config.json")
    folder = Path(source)
    if folder.is_dir():
        paths = {name: folder / name for name in names}
        checkpoint = get_last_checkpoint(source)
        if checkpoint is not None and not paths[_STATE].exists():
            paths[_STATE] = Path(checkpoint) / _STATE
        return {name: _json(path) if path.exists() else {} for name, path in paths.items()}
    if folder.exists() or folder.is_absolute() or source.count("/") != 1:
        raise DataError(source, "no such folder", "Check the path")
    try:
        found = {
            name: cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            for name in names
        }
    except OSError as error:
        raise DataError(
            source,
            f"neither a folder nor a repository that can be read: {str(error).splitlines()[0]}",
            "Check the path, or the Hub id and your access",
        ) from None
    return {name: _json(Path(path)) if path else {} for name, path in found.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError(str(path), "not a JSON object", "It is damaged: train or copy it again")
    return content


def _of_the_model(history: Sequence[Any], prefix: str, best: int | None) -> dict[str, float]:
    """Return the metrics of the final model: logged after training, else at its best or last."""
    end = max((i for i, log in enumerate(history) if "train_loss" in log), default=-1)
    found = [(log["step"], _named(log, prefix)) for log in history]
    after = [metrics for _, metrics in found[end + 1 :] if metrics and end >= 0]
    at_best = [metrics for step, metrics in found if metrics and step == best]
    ever = [metrics for _, metrics in found if metrics]
    return (after or at_best or ever or [{}])[-1]


def _named(log: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the metrics of a log by their names without the prefix; cost is no metric."""
    cost = ("runtime", "per_second", "timing")
    return {
        name.removeprefix(prefix): float(value)
        for name, value in log.items()
        if name.startswith(prefix)
        and isinstance(value, (int, float))
        and not any(word in name for word in cost)
    }


def _settings(
    files: Mapping[str, Any], facts: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    config = files["config.json"]
    backbone, adapter = config.get("backbone", {}), files["adapter_config.json"]
    shape = {**backbone, **config, **{n: backbone[n] for n in ("model_type",) if n in backbone}}
    of_loss = {**(config if backbone else {}), **facts}
    known = {
        "loss_type": None if of_loss.get("loss_type") is None else str(of_loss["loss_type"]),
        **(of_loss.get("loss_kwargs") or {}),
        **facts.get("arguments", {"per_device_train_batch_size": state.get("train_batch_size")}),
        "epochs": state.get("epoch"),
        "steps": state.get("global_step"),
        **{name: facts[name] for name in _FACTS if name in facts},
        **{name: shape.get(name) for name in _SHAPE},
        **{name: adapter.get(name) for name in _ADAPTER},
    }
    return {name: _plain(value) for name, value in known.items() if value is not None}


def _plain(value: Any) -> Any:
    fits = not isinstance(value, int) or abs(value) < 2**63  # what a table can hold
    plain = isinstance(value, (str, int, float)) and fits
    return value if plain else json.dumps(value, sort_keys=True)


def _evaluated_on(facts: Mapping[str, Any]) -> str | None:
    data = facts.get("data") or facts.get("evaluated_on")
    if data is None or "filter_seen" not in facts:
        return None if data is None else str(data)
    return f"{data}; seen items {'left out' if facts['filter_seen'] else 'ranked too'}"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _largest(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((log[name] for log in history if log.get(name) is not None), default=None)
