"""`hf-rece`: train, evaluate and recommend from the shell, each a function of the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hf_rece.errors import ArgumentError, DataError, HfReceError
from hf_rece.losses.budget import MEMORY_BUDGET
from hf_rece.losses.planning import LossPlan, human_bytes, human_flops, plan_losses
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.settings import FOREIGN, reason_of
from hf_rece.serving.export import export_encoder
from hf_rece.serving.jobs import (
    ExportArguments,
    IndexArguments,
    RecommendArguments,
    build_index,
    recommend_as_asked,
)
from hf_rece.training.args import LargeVocabTrainingArguments, RecommenderTrainingArguments
from hf_rece.training.compare import compare_runs
from hf_rece.training.comparison_output import (
    CompareArguments,
    show_comparison,
    write_comparison,
)
from hf_rece.training.pretrain import NewModelArguments, TextArguments, show_run
from hf_rece.training.pretrain import pretrain as pretrain_model
from hf_rece.training.run import (
    DataArguments,
    ModelArguments,
    PrepareArguments,
    evaluate_recommender,
    load_splits,
    prepare_as_asked,
    show_metrics,
    show_recommendations,
    train_recommender,
)
from hf_rece.training.sparsity import SparsityArguments
from hf_rece.training.trainer import RecommenderTrainer

USAGE = """usage: hf-rece COMMAND [--flag value ...] [CONFIG.yaml]

  train      train a recommender on a log, or on an embedded synthetic one
  prepare    turn a log larger than memory into a folder that train and evaluate read
  evaluate   rank the full catalogue for the test users of a log
  recommend  recommend next items for histories, or for a Parquet file of users
  index      build an approximate index of a recommender's items (needs hf_rece[ann])
  export     write a recommender's encoder as .pt2 or .onnx (needs hf_rece[onnx])
  pretrain   train a language model from scratch
  finetune   fine-tune a language model, whole or by an adapter (needs hf_rece[trl], Python 3.11)
  compare    tabulate and plot finished runs: hf-rece compare RUN ... [--output comparison.png]
  plan       print what every loss would cost at a shape: memory, operations, candidates
  demo       serve a page that recommends, and plans losses (needs hf_rece[demo])

hf-rece COMMAND --help lists the flags; a YAML file may hold them instead, and flags override it."""


@dataclass(repr=False)
class TrainDefaults(RecommenderTrainingArguments):
    """Training arguments with defaults that suit a first run on a CPU."""

    output_dir: str | None = field(
        default="recommender", metadata={"help": "Folder of the checkpoints and the final model."}
    )
    num_train_epochs: float = field(default=15.0, metadata={"help": "Passes over the users."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Users a step."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Users at once."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=50, metadata={"help": "Steps, or a share below 1."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Return to the best checkpoint."}
    )
    metric_for_best_model: str | None = field(
        default="eval_ndcg@10", metadata={"help": "What makes a checkpoint the best."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the loss."})


@dataclass(repr=False)
class PretrainDefaults(LargeVocabTrainingArguments):
    """Training arguments with defaults that suit a first language model."""

    output_dir: str | None = field(
        default="language_model", metadata={"help": "Folder of the checkpoints and the model."}
    )
    loss_type: str | None = field(default="stratified", metadata={"help": "Training loss."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the text."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share below 1."})


@dataclass
class EvaluateArguments:
    """Which model to evaluate."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a saved recommender."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Users at once."})


@dataclass
class PlanArguments:
    """The shape to plan for."""

    classes: int = field(metadata={"help": "Classes: items, or words of the vocabulary."})
    tokens: int = field(metadata={"help": "Tokens a step that carry a label."})
    width: int = field(metadata={"help": "Width of the hidden states."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(
        default="cpu", metadata={"help": "cpu or cuda: decides the size of a tile."}
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)
    losses: list[str] = field(
        default_factory=list, metadata={"help": "Losses to show. All unless given."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON in place of a table."})


def train(words: Sequence[str] | None = None) -> None:
    """Train a recommender; print its test metrics beside a baseline's, and some recommendations."""
    types = (DataArguments, ModelArguments, TrainDefaults, SparsityArguments)
    data, model, training, sparsity = parse(types, words, "train")
    run = train_recommender(data, model, training, sparsity)
    console = Console(quiet=training.process_index > 0)
    columns = {"most popular": run.baseline, str(run.model.config.loss_type): run.metrics}
    show_metrics(columns, console)
    show_recommendations(run, console=console)
    console.print(f"Model saved in {training.output_dir}")


def prepare(words: Sequence[str] | None = None) -> None:
    """Turn a log that need not fit into memory into sequences on disk."""
    data, where = parse((DataArguments, PrepareArguments), words, "prepare")
    prepared = prepare_as_asked(data, where)
    console = Console()
    console.print(prepared.description, highlight=False)
    console.print(f"Prepared in {where.output_dir}: hf-rece train --train_file {where.output_dir}")


def evaluate(words: Sequence[str] | None = None) -> None:
    """Print the test metrics of a saved recommender on a log."""
    data, which = parse((DataArguments, EvaluateArguments), words, "evaluate")
    model = RecommenderModel.from_pretrained(which.model_name_or_path)
    _, splits = load_splits(data, model.tokenizer)
    with TemporaryDirectory() as folder:  # Trainer makes its folder even where nothing is saved
        training = RecommenderTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=which.per_device_eval_batch_size,
            max_length=model.config.longest_history or RecommenderTrainingArguments.max_length,
        )
        metrics = evaluate_recommender(RecommenderTrainer(model, training), splits)
    show_metrics({"model": metrics})


def recommend(words: Sequence[str] | None = None) -> None:
    """Print the best next items of each history, or write them for a file of users."""
    (arguments,) = parse((RecommendArguments,), words, "recommend")
    recommend_as_asked(arguments)


def index(words: Sequence[str] | None = None) -> None:
    """Build an index of a model's items, print its recall, and save it beside the model."""
    (arguments,) = parse((IndexArguments,), words, "index")
    build_index(arguments)


def export(words: Sequence[str] | None = None) -> None:
    """Write the encoder of a model."""
    (arguments,) = parse((ExportArguments,), words, "export")
    export_encoder(RecommenderModel.from_pretrained(arguments.model_name_or_path), arguments.output)
    Console().print(f"Encoder saved in {arguments.output}")


def pretrain(words: Sequence[str] | None = None) -> None:
    """Train a language model from scratch; print its exact perplexity before and after."""
    text, model, training = parse(
        (TextArguments, NewModelArguments, PretrainDefaults), words, "pretrain"
    )
    console = Console(quiet=training.process_index > 0)
    show_run(pretrain_model(text, model, training), console)
    console.print(f"Model saved in {training.output_dir}")


def finetune(words: Sequence[str] | None = None) -> None:
    """Fine-tune a language model; print its exact perplexity before and after."""
    try:
        from trl.trainer.model_config import ModelConfig

        from hf_rece.training import finetune as room
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "finetune",
            error.name,
            "not installed",
            'Install it: pip install "hf_rece[trl]" (Python 3.11)',
        ) from None
    types = (room.FinetuneDataArguments, ModelConfig, room.FinetuneDefaults)
    data, model, training = parse(types, words, "finetune")
    console = Console(quiet=training.process_index > 0)
    show_run(room.finetune(data, model, training), console)
    console.print(f"Saved in {training.output_dir}")


def plan(words: Sequence[str] | None = None) -> None:
    """Print what every loss would cost at a shape, beside dense cross-entropy."""
    (arguments,) = parse((PlanArguments,), words, "plan")
    plans = plan_losses(
        arguments.tokens,
        arguments.classes,
        arguments.width,
        dtype=arguments.dtype,
        device=arguments.device,
        memory_budget=arguments.memory_budget,
        losses=arguments.losses or None,
    )
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(each) for each in plans], indent=1) + "\n")
    else:
        Console().print(_table_of_plans(plans, arguments))


def compare(words: Sequence[str] | None = None) -> None:
    """Print finished runs side by side; plot them, or write them as data."""
    runs = ("runs", "Folders that a training wrote, globs of them, or Hub ids.")
    arguments, more = parse((CompareArguments,), words, "compare", positional=runs)
    comparison = compare_runs(more.runs, arguments.metric)
    show_comparison(comparison)
    if arguments.output is not None:
        write_comparison(comparison, arguments.output)
        Console().print(f"Written to {arguments.output}", markup=False)


def demo(words: Sequence[str] | None = None) -> None:
    """Serve a page to look at: a model's recommendations, and the plan of the losses."""
    try:
        from hf_rece.serving import demo as room
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "demo", error.name, "not installed", 'Install it: pip install "hf_rece[demo]"'
        ) from None
    (arguments,) = parse((room.DemoArguments,), words, "demo")
    room.serve_demo(arguments)


def _table_of_plans(plans: Sequence[LossPlan], arguments: PlanArguments) -> Table:
    shape = f"N={arguments.tokens:,}, C={arguments.classes:,}, D={arguments.width}"
    table = Table(
        title=f"Loss + backward, {shape}, {arguments.dtype}, {arguments.device}",
        caption="memory: above hidden states and table; classes: that a token is scored against; "
        "below memory and operations: their ratio to dense",
    )
    for name in ("loss", "knobs", "memory", "operations", "classes"):
        table.add_column(name, justify="left" if name in ("loss", "knobs") else "right")
    for each in plans:
        knobs = [f"{name}={value}" for name, value in each.knobs.items() if type(value) is int]
        if each.tile_bytes:
            knobs.append(f"tile_bytes={human_bytes(each.tile_bytes)}")
        table.add_row(
            each.loss,
            "\n".join(knobs),
            f"{human_bytes(each.bytes)}\n{each.bytes_over_dense:.3g}",
            f"{human_flops(each.flops)}\n{each.flops_over_dense:.3g}",
            f"{each.candidates:,}",
        )
    return table


def parse(
    types: tuple[type, ...],
    words: Sequence[str] | None,
    command: str,
    positional: tuple[str, str] | None = None,
) -> tuple[Any, ...]:
    """Return one object of each dataclass from flags and an optional YAML file.

    Args:
        types: dataclasses.
        words: command line without the program's name; sys.argv's if None.
        command: shown in the help.
        positional: name and help of words without a flag, one or more; a Namespace at the end of
            what is returned holds them.

    Raises:
        ArgumentError: for two YAML files, a key that no dataclass has, or a setting that is
            refused.
        DataError: for a YAML file that cannot be read.
    """
    words = list(sys.argv[1:] if words is None else words)
    parser: Any = HfArgumentParser(types, prog=f"hf-rece {command}")  # type: ignore[arg-type]
    if positional is not None:
        name, explanation = positional
        parser.add_argument(name, nargs="+", help=explanation)
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise ArgumentError("config", files, "more than one file", "Pass one of them")
    if files:
        words = [word for word in words if word not in files and word != "--config"]
        settings = _read_yaml(files[0])
        known = {item.name for each in types for item in fields(each)}
        unknown = sorted(set(settings) - known, key=str)
        if unknown:
            raise ArgumentError(
                "config", unknown, "no such settings", f"hf-rece {command} --help lists them"
            )
        parser.set_defaults(**settings)
    try:
        return tuple(parser.parse_args_into_dataclasses(words))
    except HfReceError:
        raise
    except FOREIGN as error:  # transformers' own settings
        raise ArgumentError(
            "settings",
            files or words,
            reason_of(error),
            f"hf-rece {command} --help says what each setting takes",
        ) from error


def _read_yaml(path: str) -> dict[str, Any]:
    text = _read(path)
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        # Not the error itself, which shows the line: there may be a token in it.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", "it holds control characters")
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise DataError(
            path, f"not YAML: {problem}{where}", "Write one setting a line, name: value"
        ) from None
    if not isinstance(settings, dict):
        raise DataError(path, "not a mapping", "Write one setting a line, name: value")
    return settings


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise DataError(path, "no such file", "Check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 text: {error}", "Save it as UTF-8") from None


COMMANDS = {
    "train": train,
    "prepare": prepare,
    "evaluate": evaluate,
    "recommend": recommend,
    "index": index,
    "export": export,
    "pretrain": pretrain,
    "finetune": finetune,
    "compare": compare,
    "plan": plan,
    "demo": demo,
}


def main() -> None:
    """Run `hf-rece COMMAND`; errors of the package are printed without a traceback."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        asked = command in ("-h", "--help")
        Console(stderr=not asked).print(USAGE, highlight=False, markup=False)
        sys.exit(0 if asked else 2)
    try:
        COMMANDS[command](sys.argv[2:])
    except HfReceError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
