"""The main job as functions: train a recommender on a log, evaluate it, show what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import polars as pl
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, EarlyStoppingCallback, PreTrainedConfig, set_seed

from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import PreparedLog, is_prepared, open_prepared
from hf_rece.data.splits import HISTORY, TARGET, leave_one_out_split, temporal_split
from hf_rece.data.stream import SequenceStream
from hf_rece.data.synthetic import generate_interactions
from hf_rece.embeddings.item_table import item_table_settings
from hf_rece.errors import ArgumentError, DataError
from hf_rece.files import write_text
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments, json_object
from hf_rece.training.sparsity import SparsityArguments
from hf_rece.training.trainer import RecommenderTrainer, most_popular_metrics

Metrics = dict[str, float]
_USERS_FOR_CODES = 1_000_000


@dataclass
class DataArguments:
    """Where the log is, and how it is split."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "CSV, TSV, .inter or Parquet log, or a folder that hf-rece prepare made, which "
            "is filtered and split already. None: an embedded log."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id of a dataset that holds a log."}
    )
    user_column: str | None = field(
        default=None, metadata={"help": "The log's column of user ids. None: recognised."}
    )
    item_column: str | None = field(
        default=None, metadata={"help": "The log's column of item ids. None: recognised."}
    )
    time_column: str | None = field(
        default=None, metadata={"help": "The log's column of times. None: recognised."}
    )
    separator: str | None = field(
        default=None, metadata={"help": "Character between columns. None: that of the ending."}
    )
    min_user_interactions: int = field(
        default=3, metadata={"help": "Drop users with fewer interactions."}
    )
    min_item_interactions: int = field(
        default=1, metadata={"help": "Drop items with fewer interactions."}
    )
    split: Literal["leave_one_out", "temporal"] = field(
        default="leave_one_out", metadata={"help": "How test and validation are held out."}
    )
    test_quantile: float = field(
        default=0.95, metadata={"help": "temporal: users active after this quantile are held out."}
    )
    eval_users: int | None = field(
        default=None,
        metadata={
            "help": "Users of a prepared log to validate and to test on; a fair sample. None: all."
        },
    )

    def __post_init__(self) -> None:
        if self.train_file and self.dataset_name:
            raise ArgumentError(
                "dataset_name", self.dataset_name, "train_file is given too", "Pass one of them"
            )


@dataclass
class PrepareArguments:
    """Where a prepared log goes."""

    output_dir: str = field(metadata={"help": "Folder: new, empty or a prepared log."})
    n_shards: int | None = field(
        default=None,
        metadata={"help": "Files a split; more take less memory. None: by the size of the log."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a log prepared with other files or settings."}
    )


@dataclass
class ModelArguments:
    """The backbone, made from scratch."""

    backbone: str = field(
        default="sasrec",
        metadata={
            "help": "sasrec, or the model_type of any decoder: gpt2, llama, qwen3 and so on."
        },
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of states and item vectors."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Transformer blocks."})
    num_attention_heads: int = field(default=2, metadata={"help": "Attention heads."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the SASRec backbone."})
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "Score items by their input embeddings."}
    )
    item_embedding: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Item table as JSON, such as \'{"type": "compositional", "compression": 4}\'; '
            "type is dense, compositional or lma."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.item_embedding, str):  # from the command line
            self.item_embedding = json_object("item_embedding", self.item_embedding)
        item_table_settings(self.item_embedding)


@dataclass(frozen=True)
class TrainedRun:
    """What train_recommender leaves.

    Args:
        model: the trained recommender, with its tokenizer.
        metrics: test metrics of the model.
        baseline: test metrics of recommending the most popular items.
        splits: the data.
    """

    model: RecommenderModel
    metrics: Metrics
    baseline: Metrics
    splits: Mapping[str, Any]


def prepare_as_asked(data: DataArguments, where: PrepareArguments) -> PreparedLog:
    """Prepare the log of the arguments, and show how far it is on stderr.

    Raises:
        ArgumentError: without train_file, or as prepare_log.
        DataError: as prepare_log.
    """
    if data.train_file is None:
        raise ArgumentError("train_file", None, "no log", "Pass files: 'logs/*.parquet'")
    return prepare_log(
        data.train_file,
        where.output_dir,
        user_column=data.user_column,
        item_column=data.item_column,
        time_column=data.time_column,
        separator=data.separator,
        min_user_interactions=data.min_user_interactions,
        min_item_interactions=data.min_item_interactions,
        split=data.split,
        quantile=data.test_quantile,
        n_shards=where.n_shards,
        overwrite=where.overwrite,
        progress=True,
    )


def load_splits(
    data: DataArguments, tokenizer: ItemTokenizer | None = None
) -> tuple[ItemTokenizer, Mapping[str, Any]]:
    """Read the log, filter it, split it; or open a prepared one, whose train split is a stream.

    Args:
        data: which log, and how to split it.
        tokenizer: of a model trained before; made from the log if None.

    Raises:
        DataError: for a log that cannot be used, or has items that the tokenizer does not know.
    """
    if data.train_file is not None and is_prepared(data.train_file):
        return _open_splits(data.train_file, data.eval_users, tokenizer)
    interactions = _load(data)
    if tokenizer is None:
        tokenizer = ItemTokenizer.from_interactions(interactions)
    if data.split == "leave_one_out":
        return tokenizer, leave_one_out_split(interactions, tokenizer)
    return tokenizer, temporal_split(interactions, tokenizer, quantile=data.test_quantile)


def train_recommender(
    data: DataArguments,
    model_arguments: ModelArguments,
    training: RecommenderTrainingArguments,
    sparsity: SparsityArguments | None = None,
) -> TrainedRun:
    """Train, choose the best checkpoint, test, and save model, tokenizer, metrics and a card.

    Args:
        data: which log, and how to split it.
        model_arguments: the backbone.
        training: arguments of the trainer.
        sparsity: dynamic sparse learning; None for none.

    Raises:
        ArgumentError: for arguments that do not fit together.
        DataError: for a log that cannot be used.
    """
    set_seed(training.seed)
    callbacks = [] if sparsity is None else sparsity.callbacks()
    tokenizer, splits = load_splits(data)
    if isinstance(splits["train"], SequenceStream):
        splits["train"].shuffle = training.train_sampling_strategy != "sequential"
        splits["train"].seed = training.seed if training.data_seed is None else training.data_seed
    config = RecommenderConfig(
        backbone=_backbone(model_arguments, training.max_length),
        vocab_size=len(tokenizer),
        tie_word_embeddings=model_arguments.tie_word_embeddings,
        item_embedding=cast("dict[str, Any] | None", model_arguments.item_embedding),
    )
    model = RecommenderModel(
        config,
        vocab_parallel=training.vocab_parallel,
        vocab_parallel_size=training.vocab_parallel_size,
    )
    if model_arguments.item_embedding is not None:
        model.learn_item_tables(_in_memory(splits["train"]))
    model.tokenizer = tokenizer
    if training.load_best_model_at_end and training.metric_for_best_model is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=5))
        training.restore_callback_states_from_checkpoint = True  # its count of epochs
    trainer = RecommenderTrainer(
        model,
        training,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.remove_callback(EarlyStoppingCallback)  # it would look for its metric in the test
    metrics = evaluate_recommender(trainer, splits)
    baseline = most_popular_metrics(
        splits["train"],
        splits["test"],
        len(tokenizer) - 1,
        ks=training.ranking_ks,
        filter_seen=training.filter_seen,
    )
    trainer.record_metrics("most popular, test", baseline)
    if data.dataset_name and not Path(data.dataset_name).exists():
        trainer.record(dataset=data.dataset_name)
    if trainer.is_world_process_zero():
        record = {"test": metrics, "most_popular": baseline}
        path = Path(str(training.output_dir)) / "metrics.json"
        write_text(path, json.dumps(record, indent=1) + "\n")
    trainer.save_model()  # which may push
    return TrainedRun(model, metrics, baseline, splits)


def evaluate_recommender(trainer: RecommenderTrainer, splits: Mapping[str, Any]) -> Metrics:
    """Return loss and ranking metrics on the test part."""
    raw = trainer.evaluate(splits["test"], metric_key_prefix="test")
    wanted = {name.removeprefix("test_"): value for name, value in raw.items()}
    return {name: value for name, value in wanted.items() if "@" in name or name == "loss"}


def show_metrics(columns: dict[str, Metrics], console: Console | None = None) -> None:
    """Print a table of metrics, a column for each entry."""
    table = Table(title="Test: full catalogue, exact loss")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in max(columns.values(), key=len):
        cells = [f"{values[metric]:.4f}" if metric in values else "" for values in columns.values()]
        table.add_row(metric, *cells)
    (console or Console()).print(table)


def show_recommendations(
    run: TrainedRun, n_users: int = 3, k: int = 5, console: Console | None = None
) -> None:
    """Print what the model recommends to a few test users, beside what they took next.

    All processes ask the model, which may be cut over them.
    """
    tokenizer = run.model.tokenizer
    if tokenizer is None:
        raise ArgumentError("model.tokenizer", None, "the model has none", "Set model.tokenizer")
    rows = [run.splits["test"][i] for i in range(min(n_users, len(run.splits["test"])))]
    histories = [tokenizer.convert_ids_to_items(row[HISTORY]) for row in rows]
    table = Table(title="Recommendations to test users")
    for name in ("user", "last items", f"top {k}", "took next"):
        table.add_column(name)
    answers = run.model.recommend(histories, k=k)
    for row, history, answer in zip(rows, histories, answers, strict=True):
        table.add_row(
            str(row["user_id"]),
            " ".join(str(item) for item in history[-4:]),
            " ".join(str(found.item) for found in answer),
            str(tokenizer.convert_ids_to_items([row[TARGET]])[0]),
        )
    (console or Console()).print(table)


def _open_splits(
    folder: str, eval_users: int | None, tokenizer: ItemTokenizer | None
) -> tuple[ItemTokenizer, Mapping[str, Any]]:
    """Return the tokenizer and the splits of a prepared log."""
    prepared = open_prepared(folder)
    if tokenizer is not None and tokenizer.items != prepared.tokenizer.items:
        raise DataError(
            folder,
            "its items are not those of the model, or in another order",
            "Pass the prepared log that the model was trained on, or the log itself",
        )
    splits: dict[str, Any] = {"train": SequenceStream(prepared.split("train"))}
    for name in ("validation", "test"):
        split = prepared.split(name)
        splits[name] = split if eval_users is None else split.head(eval_users)
    return prepared.tokenizer, splits


def _in_memory(train: Dataset | SequenceStream) -> Dataset:
    """Return training rows to learn codes of: of a stream as many as a large sample has."""
    if not isinstance(train, SequenceStream):
        return train
    return train.split.head(_USERS_FOR_CODES).in_memory()


def _load(data: DataArguments) -> pl.DataFrame:
    source = data.train_file or data.dataset_name
    if source is None:
        interactions = generate_interactions()
    else:
        interactions = load_interactions(
            source,
            user_column=data.user_column,
            item_column=data.item_column,
            time_column=data.time_column,
            separator=data.separator,
        )
    return k_core_filter(
        interactions,
        min_user_interactions=data.min_user_interactions,
        min_item_interactions=data.min_item_interactions,
    )


def _backbone(arguments: ModelArguments, max_length: int) -> PreTrainedConfig:
    shape: dict[str, Any] = {
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.num_attention_heads,
        "max_position_embeddings": max_length,
    }
    if arguments.backbone == "sasrec":
        return SASRecConfig(**shape, dropout=arguments.dropout)
    if arguments.backbone not in CONFIG_MAPPING:
        raise ArgumentError(
            "backbone", arguments.backbone, "no such model_type", "Pass sasrec, gpt2, llama, qwen3"
        )
    config_class = CONFIG_MAPPING[arguments.backbone]
    known = set(config_class.__dataclass_fields__)
    if "intermediate_size" in known:
        shape["intermediate_size"] = 4 * arguments.hidden_size
    if "num_key_value_heads" in known:
        shape["num_key_value_heads"] = arguments.num_attention_heads
    if "head_dim" in known:
        shape["head_dim"] = arguments.hidden_size // arguments.num_attention_heads
    return config_class(**shape)
