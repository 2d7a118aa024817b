"""Text files as documents, documents as blocks of tokens."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_rece.data.text import load_text, token_blocks
from hf_rece.errors import ArgumentError, DataError


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["<end>", "<unk>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", model_max_length=3
    )


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\n")
    assert load_text([str(tmp_path / "book.txt")]) == ["one\ntwo\n"]


def test_rows_are_documents_with_their_columns_joined(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}"}) + "\n" for i in range(2)))
    assert load_text([str(file)], text_columns=["q", "a"]) == ["q0\na0", "q1\na1"]


def test_documents_are_joined_by_the_end_token_and_cut(tokenizer):
    blocks = token_blocks(["a b", "c", "a a a"], tokenizer, 4)
    assert blocks["input_ids"] == [[2, 3, 0, 4], [0, 2, 2, 2]]
    assert blocks["labels"] == blocks["input_ids"]


def test_too_little_text_is_named(tokenizer):
    with pytest.raises(DataError, match="3 tokens fill no block of 8"):
        token_blocks(["a b"], tokenizer, 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("table.xlsx", "x", "unknown kind"),
        ("rows.jsonl", '{"q": "x"}\n', "no column text"),
        ("empty.txt", "", "there is no text"),
        ("bytes.txt", b"\xff", "not a readable table: .utf-8. codec"),
        ("rows.json", b'{"text": "\xff"}\n', "not a readable table"),
        ("cut.parquet", b"PAR1abc", "not a readable table"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_text([str(tmp_path / name)])


@pytest.mark.parametrize("sources", [{}, {"files": ["a.txt"], "dataset_name": "user/set"}])
def test_exactly_one_source_is_asked_for(sources):
    with pytest.raises(ArgumentError, match="exactly one source"):
        load_text(**sources)
