"""The model card of a language model: loss, exact metrics, cost, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_rece.card import Card, citations, loss_text, metrics_table
from hf_rece.version import __version__

_USE = {
    "peft": """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```""",
    "transformers": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```""",
}


def language_model_card(
    repo_id: str,
    library: str,
    loss: Mapping[str, Any],
    figures: Mapping[str, float],
    base_model: str | None,
) -> Card:
    """Return the card of a trained language model or adapter.

    Args:
        repo_id: Hub id, or name of the folder that the model is saved in.
        library: "transformers" or "peft".
        loss: loss_type and its knobs.
        figures: exact metrics on held-out text, by name, with _before and _after; cost.
        base_model: Hub id of what was fine-tuned; a local path is left out.
    """
    public = base_model if base_model and not Path(base_model).exists() else None
    perplexity = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="held-out text",
        metric_type="perplexity",
        metric_value=round(figures["perplexity_after"], 4),
    )
    loss_type = str(loss["loss_type"])
    knobs = {knob: value for knob, value in loss.items() if knob != "loss_type"}
    times = {when: _figures(figures, f"_{when}") for when in ("before", "after")}
    columns = {when: found for when, found in times.items() if found}
    sections = {
        "": f"Trained with the loss {loss_text(loss_type, knobs)} of hf_rece {__version__}, "
        f"without logits. It is a model of {library} like any other.",
        "Use": _USE[library].format(name=repo_id),
        "Evaluation": "Held-out text, exact over the whole vocabulary:\n\n"
        + metrics_table(columns)
        + f"\n\n{figures['tokens_per_second']:,.0f} tokens/s, peak memory "
        f"{figures['peak_mib']:,.0f} MiB.",
        "Papers": citations([loss_type]),
    }
    return Card(
        name=repo_id.rpartition("/")[2],
        library=library,
        sections={heading: text for heading, text in sections.items() if text},
        tags=("hf_rece", f"loss:{loss_type}"),
        results=[perplexity],
        metadata={"base_model": public, "pipeline_tag": "text-generation"},
    )


def _figures(figures: Mapping[str, float], suffix: str) -> dict[str, float]:
    """Return the figures whose names end in `suffix`, by the rest of their names."""
    return {
        name.removesuffix(suffix): value for name, value in figures.items() if name.endswith(suffix)
    }
