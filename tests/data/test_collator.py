"""Batches of histories."""

import pytest
import torch

from hf_rece.data.collator import SequenceCollator
from hf_rece.errors import ArgumentError, DataError

TRAIN = [{"item_ids": [1, 2, 3, 4]}, {"item_ids": [5, 6]}]
EVALUATION = [
    {"item_ids": [1, 2, 3, 1], "target_id": 9},
    {"item_ids": [7, 8], "target_id": 7},
]


def test_labels_are_the_next_items():
    batch = SequenceCollator(50)(TRAIN)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 4], [6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_most_recent_items_are_kept():
    batch = SequenceCollator(2)(TRAIN)
    assert batch["input_ids"].tolist() == [[2, 3], [5, 0]]
    assert batch["labels"].tolist() == [[3, 4], [6, -100]]


def test_padding_may_go_left():
    batch = SequenceCollator(50, padding_side="left")(TRAIN)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 5]]
    assert batch["labels"].tolist() == [[2, 3, 4], [-100, -100, 6]]


def test_evaluation_labels_the_last_position_alone():
    batch = SequenceCollator(3)(EVALUATION)
    assert batch["input_ids"].tolist() == [[2, 3, 1], [7, 8, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 9], [-100, 7, -100]]


def test_seen_items_are_the_whole_history_without_the_target():
    seen = SequenceCollator(1)(EVALUATION)["seen_ids"]
    assert seen.tolist() == [[1, 2, 3], [8, -1, -1]]
    assert seen.dtype == torch.int64


def test_left_padding_puts_evaluation_labels_last():
    labels = SequenceCollator(3, padding_side="left")(EVALUATION)["labels"]
    assert labels.tolist() == [[-100, -100, 9], [-100, -100, 7]]


def test_an_empty_history_has_nothing_to_predict_from():
    with pytest.raises(DataError, match="no history"):
        SequenceCollator(3)([*EVALUATION, {"item_ids": [], "target_id": 1}])


@pytest.mark.parametrize("arguments", [{"max_length": 0}, {"max_length": 1, "padding_side": "up"}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ArgumentError, match=list(arguments)[-1]):
        SequenceCollator(**arguments)
