"""Text files and datasets as blocks of tokens, for language models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_rece.data.log_sources import readable
from hf_rece.errors import ArgumentError, DataError

_READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text(
    files: Sequence[str] = (),
    *,
    dataset_name: str | None = None,
    split: str = "train",
    text_columns: Sequence[str] = ("text",),
) -> list[str]:
    """Return the documents of files or of a Hub dataset.

    Args:
        files: .txt, one document each; .json, .jsonl, .csv or .parquet, one document a row.
        dataset_name: Hub id, in place of files.
        split: of the Hub dataset.
        text_columns: columns of a row, joined by a line break. Plain text has one, "text".

    Raises:
        ArgumentError: for both sources, or none.
        DataError: for a missing file, an unknown ending, one that cannot be read, a missing column
            or no text at all.
    """
    if bool(files) == bool(dataset_name):
        raise ArgumentError(
            "files", list(files), "needs exactly one source", "Pass files or a name"
        )
    if dataset_name is not None:
        with readable(dataset_name):
            rows = load_dataset(dataset_name, split=split)
        documents = _documents(rows, text_columns, dataset_name)
    else:
        documents = list(chain.from_iterable(_read(file, text_columns) for file in files))
    if not any(documents):
        raise DataError(", ".join(files) or str(dataset_name), "there is no text", "Check the file")
    return documents


def token_blocks(documents: Sequence[str], tokenizer: Any, block_size: int) -> Dataset:
    """Return the documents, end to end, cut into blocks of `block_size` tokens.

    Args:
        documents: each is followed by the tokenizer's end-of-sequence token, if it has one.
        tokenizer: of transformers.
        block_size: tokens a block; the last, incomplete block is left out.

    Returns:
        A dataset with input_ids and labels, both of block_size int64.

    Raises:
        DataError: if there are fewer tokens than a block takes.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Tokenizers warn of texts longer than the model reads; here they are cut afterwards.
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable([*ids, *end] for ids in encoded))
    n_blocks = len(tokens) // block_size
    if n_blocks == 0:
        raise DataError(
            "documents", f"{len(tokens)} tokens fill no block of {block_size}", "Pass more text"
        )
    blocks = [tokens[i * block_size : (i + 1) * block_size] for i in range(n_blocks)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def read_rows(file: str) -> Dataset:
    """Return the rows of a file as a dataset; plain text has a row for each line.

    Raises:
        DataError: for a missing file, an unknown ending, or what cannot be read.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(file, "no such file", "Check the path")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(file, "unknown kind of text", f"Pass one of {', '.join(_READERS)}")
    with readable(file):
        rows = load_dataset(reader, data_files=file, split="train")
        rows.data.validate(full=True)  # JSON is taken as it comes, be it UTF-8 or not
    return rows


def _read(file: str, text_columns: Sequence[str]) -> list[str]:
    if file.endswith(".txt") and Path(file).is_file():
        with readable(file):
            return [Path(file).read_text("utf-8")]
    return _documents(read_rows(file), text_columns, file)


def _documents(dataset: Any, text_columns: Sequence[str], source: str) -> list[str]:
    missing = [name for name in text_columns if name not in dataset.column_names]
    if missing:
        raise DataError(
            source,
            f"no column {', '.join(missing)}",
            f"Pass text columns among {', '.join(dataset.column_names)}",
        )
    columns = [dataset[name] for name in text_columns]
    return ["\n".join(map(str, row)) for row in zip(*columns, strict=True)]
