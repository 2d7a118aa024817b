"""Reading logs."""

import json
from datetime import date

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.errors import ArgumentError, DataError

ROWS = {"who": ["b", "a", "a"], "what": [7, 9, 8], "when": [5, 2, 1]}
COLUMNS = {"user_column": "who", "item_column": "what", "time_column": "when"}
SORTED = {"user_id": ["a", "a", "b"], "item_id": [8, 9, 7], "timestamp": [1, 2, 5]}


IN_MEMORY = {
    "polars": lambda: pl.DataFrame(ROWS),
    "lazy": lambda: pl.LazyFrame(ROWS),
    "pandas": lambda: pd.DataFrame(ROWS),
    "pyarrow": lambda: pa.table(ROWS),
    "batches": lambda: pa.table(ROWS).to_reader(),
    "datasets": lambda: Dataset.from_dict(ROWS).with_format("numpy"),
    "streamed": lambda: Dataset.from_dict(ROWS).to_iterable_dataset(num_shards=2),
    "generated": lambda: IterableDataset.from_generator(
        lambda: iter(pl.DataFrame(ROWS).to_dicts())
    ),
    "split": lambda: DatasetDict(train=Dataset.from_dict(ROWS)),
}


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet", *IN_MEMORY])
def source(request, tmp_path):
    frame = pl.DataFrame(ROWS)
    path = tmp_path / f"log.{request.param}"
    if request.param in IN_MEMORY:
        return IN_MEMORY[request.param]()
    if request.param == "parquet":
        frame.write_parquet(path)
    elif request.param == "jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path, separator="," if request.param == "csv" else "\t")
    return str(path)


def test_every_source_gives_the_same_sorted_table(source):
    assert load_interactions(source, **COLUMNS).to_dict(as_series=False) == SORTED


def test_a_glob_reads_all_files(tmp_path):
    for i in range(2):
        pl.DataFrame({**ROWS, "who": [f"u{i}"] * 3}).write_parquet(tmp_path / f"{i}.parquet")
    assert len(load_interactions(str(tmp_path / "*.parquet"), **COLUMNS)) == 6


def test_a_list_of_files_is_one_log(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "b.parquet"]
    pl.DataFrame(ROWS).write_csv(paths[0])
    pl.DataFrame({**ROWS, "stars": [1, 2, 3]}).select(pl.all().reverse()).write_parquet(paths[1])
    assert len(load_interactions(paths, **COLUMNS)) == 6


def test_parts_of_different_names_are_one_log():
    parts = [pd.DataFrame(SORTED), pa.table({"uid": ["a"], "movieId": [4], "date": [3]})]
    parts[1] = parts[1].rename_columns(["user", "movieId", "date"])
    assert load_interactions(parts)["item_id"].to_list() == [8, 9, 4, 7]


def test_parts_of_different_types_do_not_make_a_log(tmp_path):
    pl.DataFrame(SORTED).write_parquet(tmp_path / "a.parquet")
    for change in ({"timestamp": [date(2024, 1, 1)] * 3}, {"item_id": [[7], [8], [9]]}):
        pl.DataFrame({**SORTED, **change}).write_parquet(tmp_path / "b.parquet")
        with pytest.raises(DataError, match=r"a\.parquet, b\.parquet: the parts do not fit"):
            load_interactions([tmp_path / "a.parquet", tmp_path / "b.parquet"])


LOG = {"user_id": [2, 1], "item_id": [5, 6], "timestamp": [10, 20]}
NAMES = {
    "RecTools": ("user_id", "item_id", "weight", "datetime"),
    "RePlay": ("query_id", "item_id", "rating", "timestamp"),
    "RePlay, older": ("user_id", "item_id", "relevance", "timestamp"),
    "RecBole": ("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
    "RecBole sessions": ("session_id:token", "item_id:token", "n:float", "timestamp:float"),
    "MovieLens": ("userId", "movieId", "rating", "timestamp"),
    "Amazon Reviews": ("reviewerID", "asin", "overall", "unixReviewTime"),
    "Amazon Reviews 2023": ("user_id", "parent_asin", "rating", "timestamp"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_columns_that_nobody_names_are_recognised(names):
    values = [LOG["user_id"], LOG["item_id"], [0.5, 1.0], LOG["timestamp"]]
    log = load_interactions(pl.DataFrame(dict(zip(names, values, strict=True))))
    assert log.to_dict(as_series=False) == {name: col[::-1] for name, col in LOG.items()}


def test_a_frame_of_rectools_keeps_its_times():
    times = pd.to_datetime(["2024-01-02", "2024-01-01"])
    frame = pd.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "weight": 1.0, "datetime": times})
    log = load_interactions(frame)
    assert log["timestamp"].to_list() == [1704067200000000, 1704153600000000]  # microseconds
    assert log["item_id"].to_list() == [6, 5]


def test_an_atomic_file_of_recbole_is_a_log(tmp_path):
    path = tmp_path / "ml.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t7\t3\t881\n")
    log = load_interactions(path)
    assert log.to_dict(as_series=False) == {"user_id": [1], "item_id": [7], "timestamp": [881]}
    assert load_interactions(path, user_column="item_id")["user_id"].to_list() == [7]


def test_a_text_file_may_have_another_separator(tmp_path):
    path = tmp_path / "ml.dat"
    path.write_text("user|item|time\n1|7|881\n")
    assert load_interactions(path, separator="|")["item_id"].to_list() == [7]
    (tmp_path / "log.csv").write_text("user;item;time\n1;7;881\n")
    with pytest.raises(DataError, match=r"the columns are user;item;time.*or pass.*separator"):
        load_interactions(tmp_path / "log.csv")
    with pytest.raises(ArgumentError, match="separator='::': not one character"):
        load_interactions(path, separator="::")


def test_names_that_are_given_win():
    frame = pl.DataFrame({**LOG, "movie_id": [8, 9], "user": ["a", "b"]})
    log = load_interactions(frame, user_column="user", item_column="movie_id")
    assert log.select("user_id", "item_id").rows() == [("a", 8), ("b", 9)]


def test_our_own_names_come_before_those_of_others():
    frame = pl.DataFrame({"session_id": [3, 3], "date": [0, 0], **LOG})
    assert load_interactions(frame)["user_id"].to_list() == [1, 2]


def test_columns_that_could_both_be_meant_are_asked_about():
    frame = pl.DataFrame({"userId": [1], "asin": ["a"], "parent_asin": ["b"], "when": [0]})
    with pytest.raises(DataError) as error:
        load_interactions(frame)
    assert str(error.value) == (
        "the DataFrame: asin and parent_asin could each be the item column; no time column; the "
        "columns are userId, asin, parent_asin, when. "
        "Name the right one with item_column, time_column."
    )


def test_only_columns_of_a_log_are_read(tmp_path):
    mixed = pd.DataFrame({**ROWS, "review": [1, "two", object()]})
    assert len(load_interactions(mixed, **COLUMNS)) == 3
    fails = pl.col("who").map_elements(lambda who: 1 / 0, return_dtype=pl.Float64).alias("review")
    assert len(load_interactions(pl.LazyFrame(ROWS).with_columns(fails), **COLUMNS)) == 3


def test_ids_of_two_kinds_in_one_column_are_refused():
    frame = pd.DataFrame({**ROWS, "what": [1, "two", 3]})
    with pytest.raises(DataError, match="the DataFrame: not a readable table"):
        load_interactions(frame, **COLUMNS)


def test_a_split_that_is_not_there_is_named():
    parts = DatasetDict(train=Dataset.from_dict(ROWS), test=Dataset.from_dict(ROWS))
    with pytest.raises(ArgumentError, match=r"split='dev': no such split.*train, test"):
        load_interactions(parts, split="dev")


@pytest.mark.parametrize("rows", [[], [{"user_id": 1, "item_id": 2, "timestamp": 3}]])
def test_a_stream_may_end_at_once(rows):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    if rows:
        assert len(load_interactions(stream)) == 1
        stream = stream.filter(lambda row: row["user_id"] > 1)
    with pytest.raises(DataError, match="the dataset: the log is empty"):
        load_interactions(stream)


def test_ids_of_a_csv_that_differ_only_in_leading_zeros_stay_apart(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n1,007,1\n1,7,2\n2,+7,3\n")
    log = load_interactions(path)
    assert log["item_id"].to_list() == ["007", "7", "+7"]
    assert log["user_id"].dtype == pl.Int64


def test_nanosecond_times_as_text_keep_every_digit():
    times = ["1700000000000000002", "1700000000000000001"]
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": times})
    assert load_interactions(frame)["timestamp"].to_list() == sorted(map(int, times))


def test_times_in_different_zones_sort_by_instant():
    times = ["2024-01-01T01:00:00+00:00", "2024-01-01T02:00:00+02:00"]
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": times})
    assert load_interactions(frame)["item_id"].to_list() == [2, 1]


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
        ({"when": ["1", "nan", "2"]}, "column 'when'.*ISO 8601"),
        ({"when": [True, False, True]}, "column 'when'.*ISO 8601"),
        ({"what": [1.5, 2.0, 3.0]}, "column 'what'.*neither integers nor strings"),
        ({"what": [2.0**53, 2.0, 3.0]}, "column 'what'.*neither integers nor strings"),
        ({"what": [1e300, float("inf"), 3.0]}, "column 'what'.*neither integers nor strings"),
        ({"what": [7, 2**63, -8]}, f"column 'what': integers from -8 to {2**63} do not fit"),
        ({"when": [7, 2**63, -8]}, f"column 'when': integers from -8 to {2**63} do not fit"),
    ],
)
def test_bad_values_are_named(change, message):
    rows = {name: [] for name in ROWS} if change == {"who": []} else {**ROWS, **change}
    wide = {name: pl.Int128 for name, values in rows.items() if 2**63 in values}
    with pytest.raises(DataError, match=message):
        load_interactions(pl.DataFrame(rows, schema_overrides=wide), **COLUMNS)


def test_wide_integers_that_fit_are_of_64_bits():
    wide = pl.DataFrame(ROWS).with_columns(pl.col("what", "when").cast(pl.Int128))
    found = load_interactions(wide, **COLUMNS)
    assert found.to_dict(as_series=False) == SORTED
    assert found.schema["item_id"] == found.schema["timestamp"] == pl.Int64


@pytest.mark.parametrize("mixed", [["", 0, 0], [0, "", None], [b"", "", 1.5]])
def test_a_pandas_column_of_several_types_is_refused(mixed):
    with pytest.raises(DataError, match=r"the DataFrame: not a readable table"):
        load_interactions(pd.DataFrame({**ROWS, "when": mixed}), **COLUMNS)


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(DataError, match=r"no column 'thing'.*who, what, when.*item_column"):
        load_interactions(pl.DataFrame(ROWS), **{**COLUMNS, "item_column": "thing"})


@pytest.mark.parametrize("name", ["no.csv", "no*.parquet", "/no/where", "notes.docx"])
def test_a_missing_file_is_named_without_its_folder(name, tmp_path):
    with pytest.raises(DataError) as error:
        load_interactions(str(tmp_path / name))
    assert str(error.value).startswith(name.rsplit("/", 1)[-1] + ": ")
    assert str(tmp_path) not in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(DataError, match=r"log\.csv: the file is empty"):
        load_interactions(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [("log.parquet", b"hello" * 100), ("log.csv", "user,item,time\né,1,1\n".encode("latin1"))],
)
def test_a_file_that_is_no_table_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: not a readable table"):
        load_interactions(tmp_path / name)


def test_a_folder_without_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match="no Parquet file is in this folder"):
        load_interactions(tmp_path)


def test_a_hub_id_goes_to_the_hub_with_its_split(monkeypatch):
    def load(name, split):
        assert (name, split) == ("someone/log-1.0", "all")
        return Dataset.from_dict(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load)
    log = load_interactions("someone/log-1.0", split="all", **COLUMNS)
    assert log.to_dict(as_series=False) == SORTED


@pytest.mark.parametrize("problem", [ConnectionError("offline"), ValueError("Unknown split")])
def test_a_hub_dataset_that_cannot_be_read_is_named(monkeypatch, problem):
    def load(name, split):
        raise problem

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match=rf"someone/log: neither a file.*{problem}.*split"):
        load_interactions("someone/log")


def test_a_dataset_that_fails_while_it_is_read_is_named():
    def rows():
        yield {"user_id": 1, "item_id": 2, "timestamp": 3}
        raise DatasetGenerationError("damaged")

    with pytest.raises(DataError, match="the dataset: not a readable table: damaged"):
        load_interactions(IterableDataset.from_generator(rows))


def test_types_of_json_lines_are_kept(tmp_path):
    rows = (
        {"user_id": "7", "item_id": 1, "timestamp": "2024-05-31"},
        {"user_id": "a", "item_id": 2, "timestamp": "2024-06-01"},
    )
    (tmp_path / "log.json").write_text("\n".join(map(json.dumps, rows)))
    read = load_interactions(tmp_path / "log.json")
    assert read["user_id"].to_list() == ["7", "a"]
    assert read["item_id"].to_list() == [1, 2]


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
