"""Items as tokens."""

import time

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithPadding

import hf_rece  # noqa: F401 - registers the tokenizer
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.errors import ArgumentError, DataError

STRANGE = ["", " ", "a b", "\n", '"', "[PAD]", "ünï", "日本", "0", "-1", "\x00", "a,b", "</s>"]


def round_trip(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_of_any_characters_come_back(tmp_path):
    tokenizer = round_trip(ItemTokenizer(items=STRANGE), tmp_path)
    ids = tokenizer(STRANGE)["input_ids"]
    assert sorted(ids) == list(range(1, len(STRANGE) + 1))
    assert tokenizer.convert_ids_to_items(ids) == STRANGE


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), unique=True, min_size=1))
def test_any_strings_round_trip(items):
    tokenizer = ItemTokenizer(items=items)
    assert tokenizer.convert_ids_to_items(tokenizer.convert_items_to_ids(items)) == items
    assert tokenizer.pad_token_id == 0
    assert tokenizer.pad_token not in items


def test_integers_stay_integers(tmp_path):
    tokenizer = round_trip(ItemTokenizer(items=[30, 10, 20]), tmp_path)
    assert tokenizer.convert_ids_to_items([1, 2, 3]) == [30, 10, 20]
    assert type(tokenizer) is ItemTokenizer


def test_token_ids_are_popularity_ranks():
    log = pl.DataFrame({"item_id": ["b", "d", "c", "c", "a", "b", "c"]})
    assert ItemTokenizer.from_interactions(log).items == ["c", "b", "a", "d"]


def test_a_batch_is_padded_and_truncated_to_the_most_recent():
    tokenizer = ItemTokenizer(items=["a", "b", "c"])
    batch = tokenizer(
        [["a", "b", "c"], ["c"]], padding=True, truncation=True, max_length=2, return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], torch.tensor([[2, 3], [3, 0]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1], [1, 0]]))


def test_truncation_to_nothing_keeps_nothing():
    assert ItemTokenizer(items=["a"])(["a"], truncation=True, max_length=0)["input_ids"] == []


@pytest.mark.parametrize("container", [list, tuple, np.array, pl.Series])
def test_histories_come_in_any_sequence(container):
    batch = ItemTokenizer(items=[5, 6])([container([6, 5]), container([5])])
    assert batch["input_ids"] == [[2, 1], [1]]


def test_collators_of_transformers_pad_with_it():
    tokenizer = ItemTokenizer(items=[5, 6], padding_side="left")
    batch = DataCollatorWithPadding(tokenizer)([{"input_ids": [1]}, {"input_ids": [1, 2]}])
    assert batch["input_ids"].tolist() == [[0, 1], [1, 2]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_settings_come_back_with_the_items(tmp_path):
    tokenizer = ItemTokenizer(items=["[PAD]"], padding_side="left", model_max_length=7)
    loaded = round_trip(tokenizer, tmp_path)
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 7)
    assert (loaded.pad_token, loaded.pad_token_id) == (tokenizer.pad_token, 0)


def test_a_folder_without_items_is_refused(tmp_path):
    ItemTokenizer(items=["a"]).save_pretrained(tmp_path)
    (tmp_path / "items.json").unlink()
    with pytest.raises(ArgumentError, match=r"no items\.json"):
        ItemTokenizer.from_pretrained(tmp_path)


def test_padding_may_go_left():
    tokenizer = ItemTokenizer(items=["a", "b", "c"], padding_side="left")
    batch = tokenizer([["a", "b"], ["c"]], padding=True)
    assert batch["input_ids"] == [[1, 2], [0, 3]]


def test_length_counts_padding():
    tokenizer = ItemTokenizer(items=["a", "b"])
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 3


def test_unknown_items_are_named():
    with pytest.raises(DataError, match=r"2 not in the vocabulary of 1: 'x', 'y'"):
        ItemTokenizer(items=["a"]).convert_items_to_ids(["a", "x", "y", "x"])


def test_an_id_of_another_type_is_unknown():
    with pytest.raises(DataError, match=r"'7'.*type they have in the log \(int\)"):
        ItemTokenizer(items=[7])(["7"])


def test_padding_is_no_item():
    with pytest.raises(DataError, match=r"token ids \[0\]"):
        ItemTokenizer(items=["a"]).convert_ids_to_items([1, 0])


@pytest.mark.parametrize("items", [["a", "a"], ["a", 1]])
def test_items_are_distinct_and_of_one_type(items):
    with pytest.raises(ArgumentError, match="items"):
        ItemTokenizer(items=items)


def test_tokens_cannot_be_added():
    with pytest.raises(ArgumentError, match=r"new_tokens=\['new'\]"):
        ItemTokenizer(items=["a"]).add_tokens(["new"])


def test_a_million_items_save_and_load_in_ten_seconds(tmp_path):
    tokenizer = ItemTokenizer(items=[f"B{i:09d}" for i in range(1_000_000)])
    start = time.perf_counter()
    loaded = round_trip(tokenizer, tmp_path)
    assert loaded.convert_items_to_ids(["B000999999"]) == [1_000_000]
    assert time.perf_counter() - start < 10
