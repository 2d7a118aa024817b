"""Train one Llama from scratch with each loss for equal steps; print exact validation perplexity.

    python recipes/benchmarks/language_model.py --tokenizer gpt2_tokenizer.json \
        --train_file wikitext2_test.txt tiny_shakespeare.txt gsm8k_train.jsonl \
        --validation_file wikitext2_valid.txt gsm8k_test.jsonl --steps 400

10 million backbone parameters (D=320, 8 layers), 50,257 tokens tied to the input, 1,024 tokens a
step. Each training runs in a fresh process and adds one line to results/language_model.jsonl;
lines that are there already are not run again. `--table` only prints what is there. Speed and
memory want a machine that does nothing else, and few steps:

    python recipes/benchmarks/language_model.py ... --steps 20 --validation_blocks 16 \
        --results language_model_speed.jsonl
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
from environment import environment
from rich.console import Console
from rich.table import Table
from transformers import default_data_collator, set_seed

from hf_rece.data.text import load_text, token_blocks
from hf_rece.training.args import LargeVocabTrainingArguments
from hf_rece.training.pretrain import (
    NewModelArguments,
    load_tokenizer,
    new_language_model,
    run_training,
    summary,
)
from hf_rece.training.trainer import LargeVocabTrainer

RESULTS = Path(__file__).parent / "results"
LOSSES = {
    "dense": None,
    "cross_entropy": {"loss_type": "cross_entropy"},
    "stratified": {"loss_type": "stratified"},
    "rece": {"loss_type": "rece"},
    "sce": {"loss_type": "sce"},
    "sampled_softmax": {"loss_type": "sampled_softmax", "n_negatives": 512},
}
MODEL = {
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "tie_word_embeddings": True,
}
COLUMNS = ("question", "answer")


def documents(files: list[str]) -> list[str]:
    found = []
    for file in files:
        columns = COLUMNS if file.endswith(".jsonl") else ("text",)
        found += load_text([file], text_columns=columns)
    return found


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, object]:
    tokenizer = load_tokenizer(args.tokenizer)
    train_blocks = token_blocks(documents(args.train_file), tokenizer, 128)
    held_out = token_blocks(documents(args.validation_file), tokenizer, 128)
    held_out = held_out.shuffle(seed=0).select(range(args.validation_blocks))
    set_seed(seed)
    overrides = {**MODEL, "max_position_embeddings": 128}
    model = new_language_model(
        NewModelArguments(config_overrides=json.dumps(overrides)), len(tokenizer)
    )
    knobs = dict(LOSSES[name] or {})
    with tempfile.TemporaryDirectory() as folder:
        arguments = LargeVocabTrainingArguments(
            output_dir=folder,
            loss_type=knobs.pop("loss_type", None),
            loss_kwargs=knobs or None,
            seed=seed,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.1,
            adam_beta2=0.95,
            save_strategy="no",
            logging_steps=50,
            prediction_loss_only=True,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = LargeVocabTrainer(
            model,
            arguments,
            train_dataset=train_blocks,
            eval_dataset=held_out,
            data_collator=default_data_collator,
        )
        run = run_training(trainer, tokens_a_step=128)
        if args.save_model:
            trainer.model.save_pretrained(args.save_model)
    backbone = sum(p.numel() for p in model.model.layers.parameters())
    return {
        "loss": name,
        "knobs": knobs,
        "seed": seed,
        "steps": args.steps,
        "tokens_a_step": 1024,
        "backbone_parameters": backbone,
        "train_loss": [
            round(entry["loss"], 4) for entry in run.trainer.state.log_history if "loss" in entry
        ],
        **{key: round(value, 5) for key, value in summary(run).items()},
        **environment(),
    }


def show(results: Path) -> None:
    runs = pl.read_ndjson(results, infer_schema_length=None)
    runs = runs.with_columns(perplexity=pl.col("loss_after").exp())
    exact = runs.filter(pl.col("loss") == "cross_entropy")["perplexity"].mean()
    table = Table(title="Llama from scratch, exact validation perplexity")
    for name in ("loss", "seed", "steps", "perplexity", "of exact", "accuracy", "tokens/s", "MiB"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for row in runs.sort("perplexity").iter_rows(named=True):
        accuracy = row.get("mean_token_accuracy_after")
        table.add_row(
            row["loss"], str(row["seed"]), str(row["steps"]), f"{row['perplexity']:.1f}",
            f"{row['perplexity'] / exact:.3f}" if exact else "",
            "" if accuracy is None else f"{accuracy:.4f}",
            f"{row['tokens_per_second']:.0f}", f"{row['peak_mib']:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--train_file", nargs="*", default=[])
    parser.add_argument("--validation_file", nargs="*", default=[])
    parser.add_argument("--validation_blocks", type=int, default=400)
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save_model", help="folder for the trained model of a single run")
    parser.add_argument("--one", action="store_true", help="train in this process and print JSON")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--results", default="language_model.jsonl", help="file in results/")
    args = parser.parse_args()
    results = RESULTS / args.results
    if args.one:
        print(json.dumps(train(args, args.losses[0], args.seeds[0])))
        return
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    keys = {(run["loss"], run["seed"], run["steps"]) for run in done}
    for seed in args.seeds if not args.table else []:
        for loss in args.losses:
            if (loss, seed, args.steps) in keys:
                continue
            command = [sys.executable, __file__, "--one", "--losses", loss, "--seeds", str(seed)]
            for name in ("tokenizer", "train_file", "validation_file", "validation_blocks"):
                value = getattr(args, name)
                command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
            command += ["--steps", str(args.steps)]
            if args.save_model:
                command += ["--save_model", args.save_model]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            with results.open("a") as file:
                file.write(line.splitlines()[-1] + "\n")
            print(line.splitlines()[-1], flush=True)
    show(results)


if __name__ == "__main__":
    main()
