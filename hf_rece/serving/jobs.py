"""The jobs of `hf-rece` that serve a trained recommender, as functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.recommendation import Recommendation
from hf_rece.models.recommender import RecommenderModel
from hf_rece.serving.item_index import ItemIndex
from hf_rece.serving.user_files import recommend_parquet


@dataclass
class RecommendArguments:
    """What to recommend, and with which model."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a saved recommender."})
    history: list[str] = field(
        default_factory=list, metadata={"help": "One history: item ids in order of time."}
    )
    histories_file: str | None = field(
        default=None, metadata={"help": "JSON lines, each a list of item ids, in place of history."}
    )
    users: str | None = field(
        default=None, metadata={"help": "Parquet file of users and histories, in place of history."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Parquet file of the recommendations to users."}
    )
    user_column: str = field(default="user_id", metadata={"help": "Column of users."})
    history_column: str = field(
        default="item_ids", metadata={"help": "Column of histories: lists of item ids."}
    )
    k: int = field(default=10, metadata={"help": "Items to recommend."})
    keep_seen: bool = field(default=False, metadata={"help": "Recommend items of the history too."})
    allowed_items: list[str] = field(
        default_factory=list, metadata={"help": "Recommend only these items."}
    )
    denied_items: list[str] = field(
        default_factory=list, metadata={"help": "Recommend none of these items."}
    )
    use_index: bool = field(
        default=False, metadata={"help": "Search the index saved beside the model (hf-rece index)."}
    )

    def __post_init__(self) -> None:
        if sum(map(bool, (self.history, self.histories_file, self.users))) != 1:
            raise ArgumentError(
                "history",
                self.history,
                "needs exactly one source",
                "Pass history, histories_file or users",
            )
        if bool(self.users) != bool(self.output):
            raise ArgumentError(
                "output", self.output, "goes with users, and users with it", "Pass both"
            )


@dataclass
class IndexArguments:
    """Which model to index, and how."""

    model_name_or_path: str = field(metadata={"help": "Folder of a saved recommender."})
    factory: str | None = field(
        default=None, metadata={"help": "Index in faiss's notation; chosen by size if left out."}
    )
    target_recall: float = field(default=0.95, metadata={"help": "recall@10 to reach."})
    histories_file: str | None = field(
        default=None, metadata={"help": "JSON lines of histories to measure recall on."}
    )


@dataclass
class ExportArguments:
    """Which model to export, and where to."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a saved recommender."})
    output: str = field(
        default="encoder.pt2", metadata={"help": "File that ends with .pt2 or .onnx."}
    )


def recommend_as_asked(arguments: RecommendArguments) -> None:
    """Print the best next items of each history, or write them for a file of users."""
    model = RecommenderModel.from_pretrained(arguments.model_name_or_path)
    limits: dict[str, Any] = {
        "filter_seen": not arguments.keep_seen,
        "denied_items": _as_items(model, arguments.denied_items),
        "index": ItemIndex.load(arguments.model_name_or_path) if arguments.use_index else None,
    }
    if arguments.allowed_items:
        limits["allowed_items"] = _as_items(model, arguments.allowed_items)
    if arguments.users and arguments.output:
        columns = {name: getattr(arguments, name) for name in ("user_column", "history_column")}
        done = recommend_parquet(
            model, arguments.users, arguments.output, k=arguments.k, **columns, **limits
        )
        Console().print(
            f"{done.n_recommendations:,} recommendations to {done.n_answered:,} of "
            f"{done.n_users:,} users; {done.n_unknown:,} unknown items left out of histories",
            highlight=False,
        )
        return
    histories: list[list[Any]] = [_as_items(model, arguments.history)]
    if arguments.histories_file:
        histories = read_histories(arguments.histories_file)
    _show(histories, model.recommend(histories, arguments.k, **limits))


def build_index(arguments: IndexArguments) -> None:
    """Build an index of a model's items, print its recall, and save it beside the model."""
    file = arguments.histories_file
    built = ItemIndex.build(
        RecommenderModel.from_pretrained(arguments.model_name_or_path),
        histories=read_histories(file) if file else None,
        factory=arguments.factory,
        target_recall=arguments.target_recall,
    )
    built.save(arguments.model_name_or_path)


def read_histories(path: str) -> list[list[Any]]:
    """Return the histories of a file of JSON lines.

    Raises:
        DataError: naming the file, or the line that is not a list of item ids.
    """
    histories = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            history = json.loads(line)
        except (ValueError, RecursionError):
            history = None
        if not isinstance(history, list) or any(isinstance(item, list | dict) for item in history):
            raise DataError(
                f"{path}, line {number}",
                "not a JSON list of item ids",
                'Write a history as ["item", "item"]',
            )
        histories.append(history)
    return histories


def _show(histories: list[list[Any]], answers: list[list[Recommendation]]) -> None:
    table = Table(title="Recommendations")
    for name in ("history", "rank", "item", "score"):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left")
    for history, answer in zip(histories, answers, strict=True):
        for rank, found in enumerate(answer, start=1):
            shown = " ".join(map(str, history[-4:])) if rank == 1 else ""
            table.add_row(shown, str(rank), str(found.item), f"{found.score:.3f}")
    Console().print(table)


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise DataError(path, "no such file", "Check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 ({error.reason})", "Save it as UTF-8") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "Check the path") from None


def _as_items(model: RecommenderModel, words: Sequence[str]) -> list[Any]:
    """Return words as items of the model: integers, where its items are."""
    if model.tokenizer is not None and isinstance(model.tokenizer.items[0], int):
        # What is no integer is no item of this model; recommend says so.
        return [_as_integer(word) for word in words]
    return list(words)


def _as_integer(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word
