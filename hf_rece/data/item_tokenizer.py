"""Items are tokens: a Hugging Face tokenizer whose words are the items of a log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from transformers import BatchEncoding
from transformers.tokenization_python import PythonBackend

from hf_rece.data.interactions import ITEM
from hf_rece.errors import ArgumentError, DataError
from hf_rece.files import write_text

Item = int | str
PAD_ID = 0


class ItemTokenizer(PythonBackend):
    """Turns histories of items into token ids, and token ids back into the user's own item ids.

    [PAD] is token 0 and the only special token; items are tokens 1 to C, in the given order. Made
    from a log, they are ordered by falling popularity, which is what log-uniform sampling expects.

    Args:
        items: distinct item ids, all integers or all strings, of any characters.
        items_file: JSON file that holds them, instead.
        padding_side: "right" or "left".
        model_max_length: longest history that `truncation=True` keeps, the most recent items.

    Raises:
        ArgumentError: if items repeat, mix integers and strings, or are not given at all.
        DataError: if items_file holds no JSON list.
    """

    vocab_files_names = {"items_file": "items.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "right"

    def __init__(
        self,
        items: Sequence[Item] | None = None,
        items_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        if items is None:
            if items_file is None:
                raise ArgumentError(
                    "items", None, "no items, and no items.json to read", "Pass the log's items"
                )
            items = _read_items(items_file)
        self.items: list[Item] = list(items)
        _check_items(self.items)
        kwargs["pad_token"] = self._free_pad_token()
        kwargs.setdefault("truncation_side", "left")
        super().__init__(**kwargs)

    @classmethod
    def from_interactions(cls, interactions: pl.DataFrame, **kwargs: Any) -> ItemTokenizer:
        """Return the tokenizer of a log's items, most popular first, ties by item id."""
        counts = interactions.group_by(ITEM).len().sort(["len", ITEM], descending=[True, False])
        return cls(items=counts[ITEM].to_list(), **kwargs)

    @cached_property
    def _id_of(self) -> dict[Item, int]:
        return {item: token for token, item in enumerate(self.items, start=1)}

    def _free_pad_token(self) -> str:
        """Return [PAD], or another name where an item is called that."""
        pad_token = "[PAD]"
        while pad_token in self._id_of:
            pad_token += "_"
        return pad_token

    # ------------------------------------------------------------------------------- items and ids

    def add_items(self, items: Sequence[Item]) -> int:
        """Add new items behind those that are there, whose token ids stay; return how many.

        A model needs rows for them: RecommenderModel.add_items grows tokenizer and model together.

        Raises:
            ArgumentError: naming items that repeat or are already known, or of another type.
        """
        self.check_new_items(items)
        first = len(self)
        self.items.extend(items)
        self._id_of.update({item: token for token, item in enumerate(items, start=first)})
        self.pad_token = self._free_pad_token()
        return len(items)

    def check_new_items(self, items: Sequence[Item]) -> None:
        """Raise ArgumentError unless `items` are distinct, new, and of the type of those here."""
        if isinstance(items, (str, int)):
            raise ArgumentError("items", items, "one item, not a list of them", "Pass [item]")
        known = [item for item in items if item in self._id_of]
        counts = Counter(items)
        repeated = [item for item, count in counts.items() if count > 1]
        for wrong, problem in ((known, "already in the vocabulary"), (repeated, "given twice")):
            if wrong:
                raise ArgumentError(
                    "items", wrong[:5], f"{len(wrong)} items are {problem}", "Leave them out"
                )
        _check_items([*self.items[:1], *items])

    def item_table(self) -> pl.DataFrame:
        """Return columns item_id and token_id, to encode a whole log by a join."""
        ids = pl.arange(1, len(self.items) + 1, dtype=pl.Int64, eager=True)
        return pl.DataFrame({ITEM: self.items, "token_id": ids})

    def known_items(self, items: Iterable[Item]) -> list[Item]:
        """Return the items that are in the vocabulary, in order."""
        return [item for item in items if item in self._id_of]

    def convert_items_to_ids(self, items: Iterable[Item]) -> list[int]:
        """Return the token ids of items.

        Raises:
            DataError: naming items that are not in the vocabulary.
        """
        items = list(items)
        unknown = list(dict.fromkeys(item for item in items if item not in self._id_of))
        if unknown:
            shown = ", ".join(repr(item) for item in unknown[:5])
            raise DataError(
                "items",
                f"{len(unknown)} not in the vocabulary of {len(self.items)}: {shown}",
                "Leave them out, or pass them as the type they have in the log "
                f"({type(self.items[0]).__name__ if self.items else 'none'})",
            )
        return [self._id_of[item] for item in items]

    def convert_ids_to_items(self, ids: Iterable[int]) -> list[Item]:
        """Return the items of token ids.

        Raises:
            DataError: for padding or an id outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        wrong = [token for token in ids if not 1 <= token <= len(self.items)]
        if wrong:
            raise DataError(
                f"token ids {wrong[:5]}", "no items", f"Pass ids from 1 to {len(self.items)}"
            )
        return [self.items[token - 1] for token in ids]

    def __call__(
        self,
        histories: Sequence[Item] | Sequence[Sequence[Item]],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode one history, a list of items, or a list of histories.

        Args:
            histories: items in order of time.
            padding: True or "longest" pads to the longest history, "max_length" to max_length.
            truncation: keep the max_length most recent items.
            max_length: see padding and truncation; model_max_length if None.
            return_tensors: "pt" or "np".
            **kwargs: passed to `pad`.

        Returns:
            input_ids and attention_mask.

        Raises:
            DataError: naming items that are not in the vocabulary.
        """
        single = not len(histories) or isinstance(histories[0], (int, str, np.integer))
        rows: Any = [histories] if single else histories
        limit = max_length if max_length is not None else self.model_max_length
        encoded = [self.convert_items_to_ids(row) for row in rows]
        if truncation:
            encoded = [row[max(len(row) - limit, 0) :] for row in encoded]
        batch: dict[str, Any] = {
            "input_ids": encoded,
            "attention_mask": [[1] * len(row) for row in encoded],
        }
        if single and return_tensors is None:
            batch = {name: values[0] for name, values in batch.items()}
        return self.pad(
            batch,
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            return_tensors=return_tensors,
            **kwargs,
        )

    # ------------------------------------------------------------------- what transformers asks for

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the items and [PAD]."""
        return len(self.items) + 1

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id; items that are integers as decimal strings."""
        vocab = {str(item): token for item, token in self._id_of.items()}
        return {self.pad_token: PAD_ID, **vocab}

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        if special_tokens and all(str(token) == str(self.pad_token) for token in new_tokens):
            return 0
        raise ArgumentError(
            "new_tokens",
            [str(token) for token in new_tokens],
            "the vocabulary is the log's items",
            "Add items with add_items, of the model where there is one",
        )

    def _convert_token_to_id(self, token: str) -> int:
        if token == self.pad_token:
            return PAD_ID
        as_item: Item = int(token) if self.items and isinstance(self.items[0], int) else token
        return self.convert_items_to_ids([as_item])[0]

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self._convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index == PAD_ID:
            return str(self.pad_token)
        return str(self.convert_ids_to_items([index])[0])

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return token strings; items that are integers as decimal strings."""
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        return [
            self._convert_id_to_token(int(token))
            for token in ids
            if not (skip_special_tokens and int(token) == PAD_ID)
        ]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write items.json, a list in order of token id."""
        name = self.vocab_files_names["items_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        write_text(path, json.dumps(self.items, ensure_ascii=False))
        return (str(path),)


def _read_items(path: str | Path) -> list[Item]:
    try:
        items = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        items = None
    if not isinstance(items, list):
        raise DataError(
            Path(path).name, "no JSON list of items", "Copy it again, or save the tokenizer again"
        )
    return items


def _check_items(items: list[Item]) -> None:
    if not (all(type(i) is int for i in items) or all(type(i) is str for i in items)):
        raise ArgumentError(
            "items",
            sorted({type(item).__name__ for item in items}),
            "item ids are all integers or all strings",
            "Convert them to one type",
        )
    if len(set(items)) != len(items):
        raise ArgumentError(
            "items", f"{len(items)} items", f"only {len(set(items))} are distinct", "Drop repeats"
        )
