"""The model card of a trained language model: loss, exact metrics, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_rece.version import __version__

_PAPERS = {"rece": "2408.02354", "sce": "2409.18721", "gbce": "2308.07192"}
_USE = {
    "peft": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")""",
    "transformers": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")""",
}


def write_card(
    folder: str | Path, loss: dict[str, Any], metrics: dict[str, float], base_model: str | None
) -> None:
    """Write README.md into `folder`.

    Args:
        folder: of a saved model or adapter; its last part names the model.
        loss: loss_type and its knobs.
        metrics: exact metrics on held-out text, by name, with _before and _after.
        base_model: Hub id of what was fine-tuned; a local path is left out.
    """
    folder = Path(folder)
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    public = base_model if base_model and not Path(base_model).exists() else None
    perplexity = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="held-out text",
        metric_type="perplexity",
        metric_value=round(metrics["perplexity_after"], 4),
    )
    data = ModelCardData(
        base_model=public,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["hf_rece", str(loss["loss_type"])],
        model_name=folder.name,
        eval_results=[perplexity],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder.name, library, loss, metrics)}").save(
        folder / "README.md"
    )


def _text(name: str, library: str, loss: dict[str, Any], metrics: dict[str, float]) -> str:
    knobs = {knob: value for knob, value in loss.items() if knob != "loss_type"}
    rows = [
        f"| {metric} | {metrics[f'{metric}_before']:,.4f} | {metrics[f'{metric}_after']:,.4f} |"
        for metric in ("perplexity", "loss", "mean_token_accuracy", "entropy")
        if f"{metric}_after" in metrics
    ]
    paper = _PAPERS.get(str(loss["loss_type"]))
    cited = f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    table = "\n".join(rows)
    return f"""# {name}

Trained with the `{loss["loss_type"]}` loss{cited} of hf_rece {__version__}, without logits; knobs:
`{json.dumps(knobs, default=str)}`.

Held-out text, exact over the whole vocabulary:

| metric | before | after |
|---|--:|--:|
{table}

{metrics["tokens_per_second"]:,.0f} tokens/s, peak memory {metrics["peak_mib"]:,.0f} MiB.

```python
{_USE[library].format(name=name)}
```
"""
