"""Batches of histories: padded, with labels that are already the next items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_rece.data.item_tokenizer import PAD_ID
from hf_rece.data.splits import HISTORY, TARGET
from hf_rece.errors import ArgumentError, DataError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class SequenceCollator:
    """Pads rows of a split to the longest of the batch.

    Rows without target_id are for training: labels[t] is the item after input_ids[t]. Rows with
    target_id are for evaluation: the last position alone has a label, and seen_ids holds the
    distinct items of the whole history, those beyond max_length too, without the target.

    Args:
        max_length: longest input; the most recent items are kept.
        padding_side: "right" or "left".

    Raises:
        ArgumentError: if max_length < 1 or padding_side is neither.
    """

    max_length: int
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ArgumentError(
                "max_length", self.max_length, "no room for an item", "Pass 1 or more"
            )
        if self.padding_side not in ("right", "left"):
            raise ArgumentError(
                "padding_side", self.padding_side, "no such side", "Pass right or left"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return int64 input_ids, attention_mask, labels (B, T) and seen_ids (B, S), -1 padded.

        Raises:
            DataError: if a row for evaluation has no history.
        """
        if TARGET in rows[0]:
            return self._evaluation_batch(rows)
        sequences = [np.asarray(row[HISTORY])[-self.max_length - 1 :] for row in rows]
        return self._batch([s[:-1] for s in sequences], [s[1:] for s in sequences])

    def _evaluation_batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        histories = [np.asarray(row[HISTORY]) for row in rows]
        if min(map(len, histories)) == 0:
            raise DataError(
                HISTORY, "a row has no history, so nothing to predict from", "Drop such rows"
            )
        inputs = [history[-self.max_length :] for history in histories]
        labels = [np.full(len(i), IGNORE_INDEX) for i in inputs]
        for label, row in zip(labels, rows, strict=True):
            label[-1] = row[TARGET]
        seen = [
            np.setdiff1d(history, row[TARGET]) for history, row in zip(histories, rows, strict=True)
        ]
        return {**self._batch(inputs, labels), "seen_ids": self._pad(seen, -1)}

    def _batch(self, inputs: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Tensor]:
        ones = [np.ones(len(i), dtype=np.int64) for i in inputs]
        return {
            "input_ids": self._pad(inputs, PAD_ID),
            "attention_mask": self._pad(ones, 0),
            "labels": self._pad(labels, IGNORE_INDEX),
        }

    def _pad(self, rows: list[np.ndarray], value: int) -> Tensor:
        length = max(max(len(row) for row in rows), 1)
        padded = np.full((len(rows), length), value, dtype=np.int64)
        for i, row in enumerate(rows):
            if self.padding_side == "right":
                padded[i, : len(row)] = row
            else:
                padded[i, length - len(row) :] = row
        return torch.from_numpy(padded)
