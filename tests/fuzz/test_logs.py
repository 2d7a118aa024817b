"""A log is read right, whatever it is written in, or refused by an error of this package."""

import tempfile
from pathlib import Path

import datasets
import pandas as pd
import polars as pl
from hypothesis import strategies as st

from hf_rece.data.collator import SequenceCollator
from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split, temporal_split
from hf_rece.errors import DataError, HfReceError
from tests.fuzz import logs
from tests.fuzz.cases import cases

FORMATS = ("csv", "tsv", "jsonl", "parquet", "polars", "pandas", "dataset")


@st.composite
def written(draw):
    """A log, and the format it is written in."""
    log = draw(logs.rows())
    options = {
        "line_end": draw(st.sampled_from(["\n", "\r\n"])),
        "bom": draw(st.booleans()),
    }
    return log, draw(st.sampled_from(FORMATS)), options, draw(st.integers(1, 12))


def source_of(log, kind, options, folder):
    path = folder / f"log.{kind}"
    if kind in ("csv", "tsv"):
        path.write_bytes(logs.to_csv(log, "," if kind == "csv" else "\t", **options))
        return path
    if kind in ("parquet", "jsonl"):
        path.write_bytes(logs.to_parquet(log) if kind == "parquet" else logs.to_json_lines(log))
        return path
    columns = dict(zip(logs.COLUMNS, log, strict=True))
    if kind == "polars":
        return pl.DataFrame(columns)
    return pd.DataFrame(columns) if kind == "pandas" else datasets.Dataset.from_dict(columns)


def rows_of(part):
    frame = part.to_polars()
    return sorted(frame.select(c for c in frame.columns).rows())


def as_tuples(rows):
    return sorted((row[0], *row[1:]) for row in rows)


@cases(50, written())
def test_a_log_means_the_same_in_every_format(case):
    log, kind, options, max_length = case
    with tempfile.TemporaryDirectory() as folder:
        interactions = load_interactions(source_of(log, kind, options, Path(folder)))
    table = logs.meaning(log, is_text=kind in ("csv", "tsv"))
    assert interactions.rows() == table
    tokenizer = ItemTokenizer.from_interactions(interactions)
    assert {item: token for token, item in enumerate(tokenizer.items, 1)} == logs.tokens_of(table)
    for split, wanted in (
        (leave_one_out_split, logs.leave_one_out(table)),
        (lambda *a: temporal_split(*a, quantile=0.6), logs.temporal(table, 0.6)),
    ):
        try:
            found = split(interactions, tokenizer)
        except DataError:
            assert wanted is None
            continue
        assert wanted is not None
        for name, rows in wanted.items():
            assert rows_of(found[name]) == rows
        check_batches(found, max_length)


def check_batches(splits, max_length):
    collator = SequenceCollator(max_length)
    train = collator(list(splits["train"]))
    for row, inputs, labels in zip(
        splits["train"], train["input_ids"].tolist(), train["labels"].tolist(), strict=True
    ):
        kept = row["item_ids"][-max_length - 1 :]
        padding = len(inputs) - len(kept) + 1
        assert inputs == kept[:-1] + [0] * padding
        assert labels == kept[1:] + [-100] * padding
    test = collator(list(splits["test"]))
    for row, inputs, labels, seen in zip(
        splits["test"],
        test["input_ids"].tolist(),
        test["labels"].tolist(),
        test["seen_ids"].tolist(),
        strict=True,
    ):
        kept = row["item_ids"][-max_length:]
        assert inputs == kept + [0] * (len(inputs) - len(kept))
        assert [label for label in labels if label != -100] == [row["target_id"]]
        assert labels[len(kept) - 1] == row["target_id"]
        assert {item for item in seen if item >= 0} == {*row["item_ids"]} - {row["target_id"]}


# ---------------------------------------------------------------------------------- broken files

junk = st.sampled_from(
    [
        *(b"\xff", b"\xc3", b"\0", b'"', b"'", b",", b"\t", b"\n", b"\r", b"\r\n", b"\xef\xbb\xbf"),
        *(
            b"nan",
            b"inf",
            b"-inf",
            b"1e999",
            b"99999999999999999999999",
            b"null",
            b"",
            b"1.5",
            b"-",
        ),
        *(b"2024-05-31T12:00:00+02:00", b"0001-01-01", b"9999999-12-31", b"2024-13-45"),
    ]
)


@st.composite
def mutations(draw, size):
    """What is done to bytes: (place, bytes to drop, bytes to put there)."""
    place = draw(st.integers(0, size))
    return place, draw(st.sampled_from([0, 0, 1, 2, 7, 10**6])), draw(junk | st.binary(max_size=3))


@st.composite
def broken(draw):
    log = draw(logs.rows())
    kind = draw(st.sampled_from(["csv", "tsv", "parquet", "inter", "jsonl"]))
    if kind == "parquet":
        whole = logs.to_parquet(log)
    elif kind == "jsonl":
        whole = logs.to_json_lines(log)
    else:
        line_end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
        whole = logs.to_csv(log, "," if kind == "csv" else "\t", line_end, draw(st.booleans()))
    for _ in range(draw(st.integers(1, 4))):
        place, drop, put = draw(mutations(len(whole)))
        whole = whole[:place] + put + whole[place + drop :]
    return whole, kind


def pass_through(interactions):
    """What training does with a log, up to its first batch."""
    assert interactions.columns == list(logs.COLUMNS)
    assert sum(interactions.null_count().row(0)) == 0
    assert interactions["user_id"].is_sorted()
    tokenizer = ItemTokenizer.from_interactions(interactions)
    assert len(tokenizer.items) == interactions["item_id"].n_unique()
    for split in (leave_one_out_split, temporal_split):
        try:
            splits = split(interactions, tokenizer)
        except HfReceError:
            continue
        for part in splits.values():
            batch = SequenceCollator(5)(list(part))
            assert int(batch["input_ids"].max()) <= len(tokenizer.items)


@cases(60, broken())
def test_a_broken_file_is_read_or_refused_by_name(case):
    whole, kind = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{kind}"
        path.write_bytes(whole)
        try:
            interactions = load_interactions(path)
        except HfReceError as refused:
            message = str(refused)
        else:
            message = None
    if message is None:
        pass_through(interactions)
    else:
        assert message.startswith("log.")
        assert folder not in message


# ---------------------------------------------------------------------------------- odd columns

values = {
    "integers": st.integers(-(2**63), 2**63 - 1),
    "unsigned": st.integers(0, 2**64 - 1),
    "huge": st.integers(-(2**100), 2**100),
    "floats": st.floats(),
    "whole floats": st.integers(-(2**53), 2**53).map(float),
    "words": st.text(max_size=3),
    "flags": st.booleans(),
    "bytes": st.binary(max_size=3),
    "dates": st.datetimes(),
    "days": st.dates(),
    "times of day": st.times(),
    "spans": st.timedeltas(),
    "decimals": st.decimals(allow_nan=False, allow_infinity=False, places=2, max_value=10**9),
    "lists": st.lists(st.integers(0, 3), max_size=2),
    "nothing": st.none(),
    "mixed": st.integers(0, 9) | st.text(max_size=2) | st.floats() | st.none(),
}


@st.composite
def columns(draw):
    """Three columns of any kind, now and then with a null in it, in one of two kinds of frames."""
    n_rows = draw(st.integers(0, 8))
    found = {}
    for column in logs.COLUMNS:
        kind = draw(st.sampled_from(list(values)) | st.sampled_from(["integers", "words"]))
        value = values[kind]
        if draw(st.sampled_from([False, False, False, True])):
            value |= st.none()
        found[column] = draw(st.lists(value, min_size=n_rows, max_size=n_rows))
    return found, draw(st.sampled_from(["polars", "pandas"]))


@cases(60, columns())
def test_columns_of_any_type_are_read_or_refused_by_name(case):
    found, kind = case
    try:
        frame = pl.DataFrame(found, strict=False) if kind == "polars" else pd.DataFrame(found)
    except (pl.exceptions.PolarsError, TypeError, OverflowError, ValueError):
        return  # no frame can hold them
    try:
        interactions = load_interactions(frame)
    except HfReceError:
        return
    pass_through(interactions)
