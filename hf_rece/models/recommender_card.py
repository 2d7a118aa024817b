"""The model card of a recommender, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult

from hf_rece.card import Card, citations, loss_text, metrics_table
from hf_rece.data.item_tokenizer import Item
from hf_rece.errors import DataError, HfReceError
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig

# Values of these losses cannot be compared with a cross-entropy, nor across their knobs.
_NO_LIKELIHOOD = ("rece", "sce", "sampled_softmax", "bce", "gbce")
_TASK = "sequential-recommendation"


def recommender_card(
    config: RecommenderConfig, repo_id: str, items: Sequence[Item], tags: Sequence[str] = ()
) -> Card:
    """Return the card of a recommender.

    Args:
        config: of the model; its training_run is what is known of the training.
        repo_id: Hub id, or name of the folder that the model is saved in.
        items: the user's own ids of the items, for an example; none if not known.
        tags: more tags.

    Raises:
        DataError: for a training_run of another form than trainers write.
    """
    try:
        return _card(config, repo_id, items, tags)
    except HfReceError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(
            "training_run", f"damaged, or written by hand ({error})", "Set it to None"
        ) from error


def _card(
    config: RecommenderConfig, repo_id: str, items: Sequence[Item], tags: Sequence[str]
) -> Card:
    run = config.training_run or {}
    metadata = {"datasets": [run["dataset"]]} if run.get("dataset") else {}
    sections = {
        "": _summary(config),
        "Use": _use(repo_id, items),
        "Training": "\n".join(f"- {fact}." for fact in _training(config, run)),
        "Evaluation": _evaluation(run),
        "Limits": "\n".join(f"- {limit}." for limit in _limits(config)),
        "Papers": citations(_papers(config, run)),
    }
    return Card(
        name=repo_id.rpartition("/")[2],
        library="hf_rece",
        sections={heading: text for heading, text in sections.items() if text},
        tags=("hf_rece", _TASK, f"loss:{config.loss_type}", *tags),
        results=list(_results(run)),
        metadata=metadata,
    )


def _n_items(config: RecommenderConfig) -> int:
    return config.vocab_size - (config.pad_token_id is not None)


def _summary(config: RecommenderConfig) -> str:
    backbone: Any = config.backbone
    kind = "SASRec" if isinstance(backbone, SASRecConfig) else backbone.model_type
    layers = getattr(backbone, "num_hidden_layers", None)
    depth = "" if layers is None else f" of {layers} layers"
    return (
        f"Recommends the next items of a history: a {kind} backbone{depth}, width "
        f"{config.hidden_size}, over {_n_items(config):,} items. "
        "It needs the Python package hf_rece: `pip install hf_rece`."
    )


def _use(repo_id: str, items: Sequence[Item]) -> str:
    load = f"model = RecommenderModel.from_pretrained({json.dumps(repo_id)})"
    lines = ["from hf_rece import RecommenderModel", "", load]
    if items:
        history = ", ".join(json.dumps(item, ensure_ascii=False) for item in items[:2])
        lines.append(f"print(model.recommend([[{history}]], k=3))  # histories in order of time")
    return "\n".join(["```python", *lines, "```"])


def _training(config: RecommenderConfig, run: dict[str, Any]) -> Iterator[str]:
    yield f"Loss: {loss_text(config.loss_type, config.loss_kwargs or {})}"
    if config.item_embedding is not None:
        yield f"Item table: `{json.dumps(config.item_embedding, sort_keys=True)}`"
    if "density" in run:
        yield f"Dynamic sparse learning: {run['density']:.0%} of the weights it thins are active"
    if "data" in run:
        yield f"Data: {run['data']}"
    if "sequences" in run:
        yield (
            f"{run['sequences']:,} training sequences, the {run['max_length']} most recent items "
            f"of each; epochs: {run['epochs']:.4g}, steps: {run['steps']:,}"
        )
    if "seconds" in run:
        yield (
            f"{run['seconds']:,.0f} seconds on {run['device']}, evaluations included; peak memory "
            f"{run['peak_mib']:,.0f} MiB"
        )


def _evaluation(run: dict[str, Any]) -> str:
    if not run.get("metrics"):
        return ""
    seen = "items of the history left out" if run.get("filter_seen") else "seen items included"
    return (
        f"Ranking over the full catalogue, {seen}; `loss` is the exact cross-entropy in nats.\n\n"
        + metrics_table(_metrics(run))
    )


def _metrics(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics by part of the data, both in the order of reading."""
    found = run.get("metrics", {})
    parts = sorted(found, key=lambda part: (part != "validation", part != "test", part))
    return {part: dict(sorted(found[part].items(), key=_place)) for part in parts}


def _place(metric: tuple[str, float]) -> tuple[bool, str, int]:
    name, _, k = metric[0].partition("@")
    return name != "loss", name, int(k or 0)


def _limits(config: RecommenderConfig) -> Iterator[str]:
    yield (
        "It knows the items of `items.json` and no others; unknown items of a history are left out"
    )
    if config.longest_history is not None:
        yield f"It reads the {config.longest_history} most recent items of a history"
    yield (
        "It repeats what its log shows, popularity and gaps included; offline metrics on held-out "
        "interactions do not tell how users take to its recommendations"
    )
    yield "Scores order the items of one history; they are no probabilities"
    if config.loss_type in _NO_LIKELIHOOD:
        yield "Values of its training loss are no likelihoods; the loss of the evaluation is exact"


def _papers(config: RecommenderConfig, run: dict[str, Any]) -> Iterator[str]:
    if isinstance(config.backbone, SASRecConfig) or config.loss_type == "bce":
        yield "sasrec"
    yield config.loss_type
    table = config.item_embedding or {}
    yield table.get("type", "dense")
    if table.get("type") == "compositional" and table.get("codes", "quantile") == "quantile":
        yield "codes"
    if "density" in run:
        yield "sparsity"


def _results(run: dict[str, Any]) -> Iterator[EvalResult]:
    for split in ("validation", "test"):
        for metric, value in _metrics(run).get(split, {}).items():
            yield EvalResult(
                task_type=_TASK,
                task_name="Sequential recommendation",
                dataset_type=run.get("dataset") or "interactions",
                dataset_name=run.get("dataset") or "a log of interactions",
                dataset_split=split,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
