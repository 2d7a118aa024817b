"""Measure a training step of the same causal LM under each head, each in a fresh process.

    python recipes/benchmarks/llm.py                                # tiny and small, on a CPU
    python recipes/benchmarks/llm.py --models tiny_llama --repeats 2
    python recipes/benchmarks/llm.py --models qwen3_0.6b --device cuda --batch 8 --length 2048

Models are made here from their configurations with random weights. A step is forward, loss,
backward and fused AdamW. Extra peak: during a step, beside weights and moments, which are there
from the step before. Dense is the model as transformers ships it; TRL's head is its own
add_fused_lm_head, ours is replace_output_head; the other peers get the model's hidden states, the
shifted labels and lm_head.weight. float32 on a CPU, bfloat16 on a GPU.
Writes results/llm_MODEL.json, on a GPU results/llm_MODEL_cuda.json.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, DENSE, LABELS, Shape, reason_not_to_run
from environment import environment
from measuring import Row, cost, flops_per_second, in_fresh_process
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from hf_rece.head import replace_output_head

RESULTS = Path(__file__).parent / "results"
TRL, OURS = "trl", ("cross_entropy", "rece", "sce", "stratified")
HEADS = (DENSE, "torch_default", "torch_chunked", "torch_chunked_256", TRL, "liger", "cce",
         "cce_exact", *OURS)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tiny_llama": {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 256,
                   "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "num_key_value_heads": 4},
    "tiny_qwen3": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 256,
                   "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 64},
    "small_qwen3": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 512,
                    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 64},
    "qwen3_0.6b": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024,
                   "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip


def make(name: str, device: str) -> nn.Module:
    settings = {**MODELS[name], "tie_word_embeddings": True, "use_cache": False}
    set_seed(0)
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_config(config).to(device, dtype).train()


def loss_of(model: nn.Module, head: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the loss of input ids, which are their own labels, one place on."""
    if head == TRL:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        return lambda ids: model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    if head in OURS:
        replace_output_head(model, head)
    if head in (DENSE, *OURS):
        return lambda ids: model(input_ids=ids, labels=ids).loss
    function = CONTENDERS[head].make()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        return function(hidden, model.lm_head.weight, ids[:, 1:].flatten())

    return loss


def measure(args: argparse.Namespace, name: str, head: str) -> Row:
    model = make(name, args.device)
    loss = loss_of(model, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocab_size = model.config.vocab_size
    ids = torch.randint(vocab_size, (args.batch, args.length), device=args.device)
    values = []

    def step(batch: torch.Tensor = ids) -> torch.Tensor:
        value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values.append(float(value.detach()))
        return value

    step(ids[:1, :16])  # makes the moments, and loads the code
    values.clear()
    row = cost(step, args.device, args.repeats)
    size = sum(p.numel() for p in model.parameters())
    return {**row, "loss": round(values[0], 5), "parameters": size}


def reason(args: argparse.Namespace, name: str, head: str, speed: float) -> str | None:
    if head == TRL:
        return None if find_spec("trl") else "not installed: pip install trl"
    width, classes = MODELS[name]["hidden_size"], MODELS[name]["vocab_size"]
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    shape = Shape(args.batch * args.length, classes, width, dtype, args.device)
    return reason_not_to_run(head, shape, speed, args.timeout)


def show(name: str, rows: dict[str, Row], args: argparse.Namespace) -> None:
    title = f"A step of {name}, {args.batch} x {args.length} tokens, {args.device}"
    table = Table(title=title)
    for column in ("head", "extra peak MiB", "seconds", "/ dense", "loss"):
        table.add_column(column, justify="left" if column == "head" else "right")
    dense = rows.get(DENSE, {})
    for head, row in rows.items():
        label = LABELS.get(head, head)
        if "not_run" in row:
            table.add_row(label, row["not_run"], "", "", "")
            continue
        if "seconds" in dense:
            row["time_over_dense"] = round(row["seconds"] / dense["seconds"], 4)
        table.add_row(
            label, f"{row['extra_peak_mib']:,.0f}", f"{row['seconds']:.3f}",
            str(row.get("time_over_dense", "")), f"{row['loss']:.3f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["tiny_llama", "tiny_qwen3", "small_qwen3"]
    parser.add_argument("--models", nargs="*", default=models, choices=MODELS)
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=HEADS, metavar="HEAD")
    for field, value in (("batch", 4), ("length", 256), ("repeats", 3)):
        parser.add_argument(f"--{field}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one head")
    parser.add_argument("--one", action="store_true", help="measure here and print JSON")
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(args, args.models[0], args.heads[0])))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    speed = flops_per_second(args.device, dtype)
    for name in args.models:
        rows = {}
        for head in args.heads:
            words = [__file__, "--one", "--models", name, "--heads", head]
            for field in ("batch", "length", "repeats", "device"):
                words += [f"--{field}", str(getattr(args, field))]
            why = reason(args, name, head, speed)
            rows[head] = {"not_run": why} if why else in_fresh_process(words, args.timeout)
        show(name, rows, args)
        record = {**environment(args.device), "model": name, "settings": MODELS[name],
                  "batch": args.batch, "length": args.length, "heads": rows}  # fmt: skip
        suffix = "_cuda" * (args.device == "cuda")
        path = RESULTS / f"llm_{name}{suffix}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
