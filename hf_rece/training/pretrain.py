"""Train a language model from a configuration, a tokenizer and text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from hf_rece.data.text import load_text, token_blocks
from hf_rece.errors import ArgumentError, DataError
from hf_rece.files import write_text
from hf_rece.models.settings import refused_code
from hf_rece.training.args import LargeVocabTrainingArguments, json_object
from hf_rece.training.publishing import LanguageModelFacts, readme_of_somebody
from hf_rece.training.reporting import peak_mib
from hf_rece.training.trainer import LargeVocabTrainer


@dataclass
class TextArguments:
    """Which text to train on, and which to hold out."""

    train_file: list[str] = field(
        default_factory=list, metadata={"help": "Files: .txt, .jsonl, .json, .csv or .parquet."}
    )
    validation_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Files to evaluate on. None: 1/20 of the blocks is held out."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id of a dataset, in place of train_file."}
    )
    text_column: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Columns of a row, joined by a line break."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens a training sequence."})


@dataclass
class NewModelArguments:
    """Which model to make."""

    model_type: str = field(
        default="llama", metadata={"help": "Architecture: llama, qwen3, gpt2 and so on."}
    )
    config_overrides: str = field(
        default="{}", metadata={"help": "Its configuration as JSON: '{\"hidden_size\": 320}'."}
    )
    tokenizer: str = field(
        default="", metadata={"help": "Folder or Hub id of a tokenizer, or a tokenizer.json file."}
    )


@dataclass(frozen=True)
class LanguageModelRun:
    """What training a language model leaves.

    Args:
        trainer: with the trained model.
        before: exact evaluation before training; empty with DeepSpeed.
        after: exact evaluation after training.
        tokens_per_second: input tokens trained on, a second.
        peak_mib: largest memory of the accelerator, or of the process on a CPU.
    """

    trainer: Any
    before: dict[str, float]
    after: dict[str, float]
    tokens_per_second: float
    peak_mib: float


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder, a Hub id, or a tokenizer.json file.

    Args:
        source: where it is.
        trust_remote_code: run code that comes with it.

    Raises:
        ArgumentError: if `source` is empty, or needs code that is not to be run.
        DataError: for a file that is missing.
    """
    if not source:
        raise ArgumentError("tokenizer", source, "none is named", "Pass a folder, Hub id or file")
    if not source.endswith(".json"):
        with refused_code("tokenizer", source):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not Path(source).is_file():
        raise DataError(source, "no such file", "Check the path")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
    if tokenizer.eos_token is None and "<|endoftext|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def new_language_model(arguments: NewModelArguments, vocab_size: int) -> Any:
    """Return a causal LM with random weights.

    Raises:
        ArgumentError: for an unknown architecture, or overrides that are no JSON object.
    """
    if arguments.model_type not in CONFIG_MAPPING:
        raise ArgumentError(
            "model_type", arguments.model_type, "no such architecture", "Pass llama, qwen3, gpt2"
        )
    overrides = json_object("config_overrides", arguments.config_overrides)
    config = CONFIG_MAPPING[arguments.model_type](**{"vocab_size": vocab_size, **overrides})
    return AutoModelForCausalLM.from_config(config)


def pretrain(
    text: TextArguments, model: NewModelArguments, training: LargeVocabTrainingArguments
) -> LanguageModelRun:
    """Train from scratch, evaluate before and after, save model and tokenizer in output_dir.

    Raises:
        ArgumentError: for arguments that do not fit together.
        DataError: for text that cannot be used.
    """
    set_seed(training.seed)
    tokenizer = load_tokenizer(model.tokenizer)
    documents = load_text(
        text.train_file, dataset_name=text.dataset_name, text_columns=text.text_column
    )
    blocks = token_blocks(documents, tokenizer, text.block_size)
    if text.validation_file:
        held_out = load_text(text.validation_file, text_columns=text.text_column)
        train, evaluation = blocks, token_blocks(held_out, tokenizer, text.block_size)
    else:
        parts = blocks.train_test_split(test_size=1 / 20, seed=training.seed)
        train, evaluation = parts["train"], parts["test"]
    trainer = LargeVocabTrainer(
        new_language_model(model, len(tokenizer)),
        training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    return run_training(trainer, tokens_a_step=text.block_size)


def run_training(
    trainer: Any, tokens_a_step: float | None = None, base_model: str | None = None
) -> LanguageModelRun:
    """Evaluate, train, evaluate, save with metrics.json and a card; return what came out.

    Args:
        trainer: LargeVocabTrainer or LargeVocabSFTTrainer.
        tokens_a_step: tokens a training sequence, if all are equally long; else counted.
        base_model: Hub id or folder of what is fine-tuned.
    """
    readme = readme_of_somebody(trainer.args.output_dir)
    # DeepSpeed cuts a model anew for training: it cannot have been evaluated before.
    before = {} if trainer.is_deepspeed_enabled else trainer.evaluate()
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    after = trainer.evaluate()
    seconds = result.metrics["train_runtime"]
    tokens = (
        trainer.state.num_input_tokens_seen
        if tokens_a_step is None
        else result.metrics["train_samples_per_second"] * seconds * tokens_a_step
    )
    run = LanguageModelRun(trainer, before, after, tokens / seconds, peak_mib())
    figures = summary(run)
    trainer.language_model_facts = LanguageModelFacts(figures, base_model, readme)
    trainer.save_model()
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_text(path, json.dumps(figures, indent=1) + "\n")
        if "perplexity_after" in figures:
            trainer.create_model_card()
    return run


def summary(run: LanguageModelRun) -> dict[str, float]:
    """Return the figures of a run by name."""
    exact = {
        f"{name}_{when}": values[f"eval_{name}"]
        for when, values in (("before", run.before), ("after", run.after))
        for name in ("perplexity", "loss", "mean_token_accuracy", "entropy")
        if f"eval_{name}" in values
    }
    return {**exact, "tokens_per_second": run.tokens_per_second, "peak_mib": run.peak_mib}


def show_run(run: LanguageModelRun, console: Console | None = None) -> None:
    """Print the exact metrics before and after training, speed and memory."""
    table = Table(title="Held-out text, exact over the whole vocabulary")
    for name in ("metric", "before", "after"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    figures = summary(run)
    for name in ("perplexity", "loss", "mean_token_accuracy", "entropy"):
        if f"{name}_after" in figures:
            pair = (figures.get(f"{name}_{when}") for when in ("before", "after"))
            table.add_row(name, *("" if value is None else f"{value:,.4f}" for value in pair))
    console = console or Console()
    console.print(table)
    console.print(f"{run.tokens_per_second:,.0f} tokens/s, peak memory {run.peak_mib:,.0f} MiB")
