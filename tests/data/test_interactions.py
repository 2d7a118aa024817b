"""Reading logs."""

import pandas as pd
import polars as pl
import pytest
from datasets import Dataset

from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.errors import ArgumentError, DataError

ROWS = {"who": ["b", "a", "a"], "what": [7, 9, 8], "when": [5, 2, 1]}
COLUMNS = {"user_column": "who", "item_column": "what", "time_column": "when"}
SORTED = {"user_id": ["a", "a", "b"], "item_id": [8, 9, 7], "timestamp": [1, 2, 5]}


@pytest.fixture(params=["csv", "tsv", "parquet", "polars", "pandas", "datasets"])
def source(request, tmp_path):
    frame = pl.DataFrame(ROWS)
    path = tmp_path / f"log.{request.param}"
    if request.param == "csv":
        frame.write_csv(path)
    elif request.param == "tsv":
        frame.write_csv(path, separator="\t")
    elif request.param == "parquet":
        frame.write_parquet(path)
    else:
        return {
            "polars": frame,
            "pandas": pd.DataFrame(ROWS),
            "datasets": Dataset.from_dict(ROWS),
        }[request.param]
    return str(path)


def test_every_source_gives_the_same_sorted_table(source):
    assert load_interactions(source, **COLUMNS).to_dict(as_series=False) == SORTED


def test_a_glob_reads_all_files(tmp_path):
    for i in range(2):
        pl.DataFrame({**ROWS, "who": [f"u{i}"] * 3}).write_parquet(tmp_path / f"{i}.parquet")
    assert len(load_interactions(str(tmp_path / "*.parquet"), **COLUMNS)) == 6


def test_equal_times_keep_the_order_of_the_source():
    frame = pl.DataFrame({"user_id": [1] * 50, "item_id": range(50), "timestamp": [0] * 50})
    assert load_interactions(frame)["item_id"].to_list() == list(range(50))


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-02T00:00:00", "2024-01-01T00:00:00"],
        ["2024-01-02 00:00:00", "2024-01-01 00:00:00"],
        ["10", "9"],
        [10.5, 9.5],
    ],
)
def test_times_of_many_kinds_sort_by_time(times):
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": times})
    assert load_interactions(frame)["item_id"].to_list() == [2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"who": []}, "log is empty"),
        ({"what": [7, None, 8]}, r"column 'what': 1 of 3 values are missing, the first in row 1"),
        ({"when": [5.0, float("nan"), 1.0]}, "column 'when': 1 of 3 values are missing"),
        ({"when": ["now", "then", "x"]}, "column 'when'.*ISO 8601"),
        ({"what": [1.5, 2.0, 3.0]}, "column 'what'.*neither integers nor strings"),
    ],
)
def test_bad_values_are_named(change, message):
    rows = {name: [] for name in ROWS} if change == {"who": []} else {**ROWS, **change}
    with pytest.raises(DataError, match=message):
        load_interactions(pl.DataFrame(rows), **COLUMNS)


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(DataError, match=r"no column 'item_id'.*who, what, when.*item_column"):
        load_interactions(pl.DataFrame(ROWS), user_column="who", time_column="when")


@pytest.mark.parametrize("name", ["no.csv", "/no/where", "notes.docx"])
def test_a_missing_file_is_named_without_its_folder(name, tmp_path):
    with pytest.raises(DataError, match=name.rsplit("/", 1)[-1]):
        load_interactions(str(tmp_path / name))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(DataError, match=r"log\.csv: the file is empty"):
        load_interactions(tmp_path / "log.csv")


def test_an_object_that_is_no_log_is_refused():
    with pytest.raises(DataError, match="type int"):
        load_interactions(3)


def test_k_core_repeats_until_both_minima_hold():
    # Dropping item 9 leaves user c with one interaction, whose drop leaves item 3 with one.
    frame = pl.DataFrame(
        {
            "user_id": ["a", "a", "b", "b", "c", "c", "d", "d"],
            "item_id": [1, 2, 1, 2, 3, 9, 3, 1],
            "timestamp": range(8),
        }
    )
    kept = k_core_filter(frame, min_user_interactions=2, min_item_interactions=2)
    assert sorted(set(kept["user_id"])) == ["a", "b"]
    assert sorted(set(kept["item_id"])) == [1, 2]


def test_k_core_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="Lower min_user_interactions"):
        k_core_filter(load_interactions(pl.DataFrame(ROWS), **COLUMNS))


def test_k_core_needs_sane_minima():
    with pytest.raises(ArgumentError, match="min_user_interactions=-1"):
        k_core_filter(pl.DataFrame(SORTED), min_user_interactions=-1)
