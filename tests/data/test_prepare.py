"""A log prepared on disk: the sequences of the way in memory, whatever happens on the way."""

import errno
import json
import os
import random
import shutil
import signal
import time
from hashlib import sha256
from multiprocessing import get_context

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from hf_rece import files as files_of_rece
from hf_rece.data import survey
from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import open_prepared
from hf_rece.data.splits import leave_one_out_split, temporal_split
from hf_rece.data.survey import read_batches
from hf_rece.data.synthetic import generate_interactions
from hf_rece.errors import ArgumentError, DataError, WriteError

COLUMNS = ["user_id", "item_id", "timestamp"]
WRITERS = {".parquet": "write_parquet", ".csv": "write_csv", ".jsonl": "write_ndjson"}


@pytest.fixture(scope="module")
def log():
    """300 users in order of time, as a shop would write it down."""
    return generate_interactions(300, 90).sort("timestamp", maintain_order=True)


@pytest.fixture
def files(log, tmp_path):
    """The log as files, the first rows in the first."""
    return write(log, tmp_path / "log", 4)


def write(log, folder, n_files, ending=".parquet"):
    folder.mkdir()
    rows = -(-len(log) // n_files)
    for i, part in enumerate(log.iter_slices(rows)):
        path = folder / f"{i}{ending}"
        getattr(part, WRITERS[ending])(path)
    return str(folder / f"*{ending}")


def content(split):
    return {r["user_id"]: ([*r["item_ids"]], r.get("target_id")) for r in split}


def assert_same(prepared, source, split="leave_one_out", minima=(3, 1), **columns):
    log = k_core_filter(
        load_interactions(source, **columns),
        min_user_interactions=minima[0],
        min_item_interactions=minima[1],
    )
    tokenizer = ItemTokenizer.from_interactions(log)
    function = leave_one_out_split if split == "leave_one_out" else temporal_split
    splits = function(log, tokenizer)
    assert prepared.tokenizer.items == tokenizer.items
    for name in splits:
        assert content(prepared.split(name)) == content(splits[name])
        assert prepared.split(name).column_names == splits[name].column_names
        assert prepared.manifest["splits"][name]["rows"] == len(splits[name])
        assert prepared.manifest["splits"][name]["interactions"] == sum(
            len(row["item_ids"]) for row in splits[name]
        )
    facts = ("users", "items", "interactions")
    wanted = log["user_id"].n_unique(), log["item_id"].n_unique(), len(log)
    assert tuple(prepared.manifest[name] for name in facts) == wanted
    prepared.check()


def hashes(folder):
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------- the same as in memory


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
@pytest.mark.parametrize("minima", [(3, 1), (0, 0), (8, 25)], ids=str)
def test_sequences_are_those_of_the_way_in_memory(files, split, minima, tmp_path):
    prepared = prepare_log(
        files,
        tmp_path / "out",
        split=split,
        min_user_interactions=minima[0],
        min_item_interactions=minima[1],
        n_shards=3,
    )
    assert_same(prepared, files, split, minima)


@pytest.mark.parametrize(
    "times",
    [
        pl.col("timestamp"),
        pl.col("timestamp") + 0.5,
        pl.from_epoch("timestamp"),
        pl.from_epoch("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%S"),
    ],
    ids=["integers", "floats", "datetimes", "ISO 8601"],
)
@pytest.mark.parametrize("ending", WRITERS)
def test_columns_of_any_name_and_type_are_read(log, times, ending, tmp_path):
    log = log.select(
        pl.col("user_id").str.slice(1).cast(pl.Int32).alias("customer"),
        pl.col("item_id").str.slice(1).cast(pl.Int64).alias("product"),
        times.alias("bought_at"),
        pl.lit("x").alias("other"),
    )
    source = write(log, tmp_path / "log", 3, ending)
    columns = {"user_column": "customer", "item_column": "product", "time_column": "bought_at"}
    prepared = prepare_log(source, tmp_path / "out", n_shards=2, split="temporal", **columns)
    assert_same(prepared, source, "temporal", **columns)
    assert isinstance(prepared.split("train")[0]["user_id"], int)


def test_ids_are_integers_only_if_all_files_write_them_so(log, tmp_path):
    digits = log.with_columns(pl.col("item_id").str.slice(1).cast(pl.Int64).cast(pl.String))
    digits[-1, "item_id"] = "007"
    source = write(digits, tmp_path / "log", 3, ".csv")
    prepared = prepare_log(source, tmp_path / "out")
    assert_same(prepared, source)
    assert all(isinstance(item, str) for item in prepared.tokenizer.items)


def test_interactions_at_one_time_keep_the_order_of_the_files(tmp_path):
    rows = {"user_id": [1, 2] * 6, "item_id": [9, 3, 7, 1, 8, 2, 4, 4, 6, 5, 5, 6]}
    source = write(pl.DataFrame(rows).with_columns(timestamp=0), tmp_path / "log", 4)
    prepared = prepare_log(source, tmp_path / "out")
    assert_same(prepared, source)


def test_pieces_and_units_change_nothing(files, tmp_path, monkeypatch):
    wanted = hashes(prepare_log(files, tmp_path / "a", n_shards=3, split="temporal").path)
    monkeypatch.setattr("hf_rece.data.survey._BATCH_ROWS", 100)
    monkeypatch.setattr("hf_rece.data.partition._CHUNK_ROWS", 300)
    monkeypatch.setattr("hf_rece.data.partition._UNIT_ROWS", 1000)
    assert hashes(prepare_log(files, tmp_path / "b", n_shards=3, split="temporal").path) == wanted


def test_a_folder_and_a_list_of_files_are_read(files, log, tmp_path):
    folder = tmp_path / "log"
    wanted = prepare_log(files, tmp_path / "a").manifest["splits"]
    assert prepare_log(folder, tmp_path / "b").manifest["splits"] == wanted
    names = sorted(folder.iterdir())
    assert prepare_log(names, tmp_path / "c").manifest["splits"] == wanted


def test_datasets_reads_the_splits(prepared, tmp_path):
    from datasets import load_dataset

    for name in ("train", "test"):
        files = str(prepared.path / "data" / f"{name}-*")
        found = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path), split="train")
        assert content(found) == content(prepared.split(name))


def test_the_shard_of_a_user_is_a_checksum_of_the_id(prepared):
    from zlib import crc32

    for group in prepared.split("train").groups:
        shard = int(group.path.name.split("-")[1])
        for user in group.read()["user_id"].to_pylist():
            assert crc32(user.encode()) % 7 == shard


# ------------------------------------------------------------------------------------ restarts


def test_a_finished_log_is_left_as_it_is(files, tmp_path):
    first = prepare_log(files, tmp_path / "out", n_shards=2)
    wanted, before = hashes(first.path), {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    again = prepare_log(files, tmp_path / "out", n_shards=2)
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    prepare_log(files, tmp_path / "out", n_shards=2, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} != before
    assert hashes(first.path) == wanted


def test_nothing_is_done_twice_after_a_stop(files, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rece.data.partition._UNIT_ROWS", 1000)
    wanted = hashes(prepare_log(files, tmp_path / "whole", n_shards=2).path)
    read = []

    def stop_at_the_third(file, survey):
        read.append(file.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return read_batches(file, survey)

    monkeypatch.setattr("hf_rece.data.partition.read_batches", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_log(files, tmp_path / "out", n_shards=2)
    with pytest.raises(DataError, match="its preparation has not finished"):
        open_prepared(tmp_path / "out")
    assert hashes(prepare_log(files, tmp_path / "out", n_shards=2).path) == wanted
    assert read == ["0.parquet", "1.parquet", "2.parquet", "2.parquet", "3.parquet"]


def test_unfinished_work_of_other_settings_is_thrown_away(files, tmp_path, monkeypatch):
    wanted = hashes(prepare_log(files, tmp_path / "whole", n_shards=3).path)
    with monkeypatch.context() as patch:
        patch.setattr("hf_rece.data.prepare.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_log(files, tmp_path / "out", n_shards=2, split="temporal")
    assert hashes(prepare_log(files, tmp_path / "out", n_shards=3).path) == wanted


def test_a_log_that_has_changed_is_not_taken_for_the_prepared_one(files, log, tmp_path):
    prepare_log(files, tmp_path / "out")
    log.head(500).write_parquet(tmp_path / "log" / "0.parquet")
    with pytest.raises(
        DataError, match=r"prepared with other files. Pass another output_dir, or o"
    ):
        prepare_log(files, tmp_path / "out")
    assert_same(prepare_log(files, tmp_path / "out", overwrite=True), files)


def test_other_settings_are_refused(files, tmp_path):
    before = hashes(prepare_log(files, tmp_path / "out").path)
    with pytest.raises(DataError, match="with other min_item_interactions, n_shards"):
        prepare_log(files, tmp_path / "out", min_item_interactions=2, n_shards=9)
    assert hashes(tmp_path / "out") == before


def test_two_at_once_are_refused(files, tmp_path):
    unfinished = tmp_path / "out" / "unfinished"
    unfinished.mkdir(parents=True)
    with (
        FileLock(unfinished / "lock"),
        pytest.raises(DataError, match="another process is preparing it"),
    ):
        prepare_log(files, tmp_path / "out")
    assert_same(prepare_log(files, tmp_path / "out"), files)


ASKED_FOR = {"n_shards": 20, "split": "temporal"}


def kill_and_go_on(source, folder, n_kills, seed):
    """Prepare a log over and over, killed at random moments, and then to the end.

    The killing does not end before one of them left work to go on with.
    """
    context, draw = get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["hf_rece.data.prepare"])
    times, killed, left = [], 0, set()
    while killed < n_kills or not left:
        process = context.Process(target=prepare_log, args=(source, folder), kwargs=ASKED_FOR)
        process.start()
        start = time.perf_counter()
        process.join(draw.uniform(0, 1.2 * max(times)) if times else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        pieces = {path.name for path in folder.rglob("*-0*")} if folder.exists() else set()
        if (folder / "prepared.json").exists():
            times.append(time.perf_counter() - start)
            open_prepared(folder).check()
            shutil.rmtree(folder)
        else:
            left |= {name for name in pieces if not name.startswith("_unfinished")}
    prepare_log(source, folder, **ASKED_FOR)


def test_kills_leave_the_same_files(files, tmp_path):
    wanted = hashes(prepare_log(files, tmp_path / "whole", **ASKED_FOR).path)
    kill_and_go_on(files, tmp_path / "out", 3, seed=0)
    assert hashes(tmp_path / "out") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_leave_the_same_files(seed, tmp_path):
    source = write(generate_interactions(20_000, 2000, seed=seed), tmp_path / "log", 12)
    wanted = hashes(prepare_log(source, tmp_path / "whole", **ASKED_FOR).path)
    kill_and_go_on(source, tmp_path / "out", 6, seed)
    assert hashes(tmp_path / "out") == wanted


# ------------------------------------------------------------------------------------- bad input


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no-\*\.parquet: no such file"):
        prepare_log(str(tmp_path / "no-*.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"2\.parquet: not a readable"),
        (lambda path: path.write_bytes(b""), r"2\.parquet: "),
        (lambda path: zero(path, 400), r"2\.parquet: "),
        (lambda path: drop(path, "item_id"), r"2\.parquet: no item column; the columns are user"),
        (lambda path: change(path, user_id=None), r"2\.parquet, column 'user_id': (\d+) of \1 va"),
        (lambda path: change(path, timestamp=True), r"2\.parquet, column 'timestamp': values such"),
        (lambda path: change(path, item_id=0.5), r"2\.parquet, column 'item_id': ids of type Fl"),
    ],
    ids=["cut", "empty", "overwritten", "no column", "nulls", "times", "ids"],
)
def test_a_file_that_cannot_be_used_is_named(files, damage, message, tmp_path):
    damage(tmp_path / "log" / "2.parquet")
    with pytest.raises(DataError, match=message):
        prepare_log(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_which_rows_are_missing_is_named(files, tmp_path, monkeypatch):
    def all_but_the_last_of_it(file):
        yield from (batch.head(-1) for batch in raw_batches(file))

    raw_batches = survey._raw_batches
    monkeypatch.setattr(survey, "_raw_batches", all_but_the_last_of_it)
    with pytest.raises(DataError, match=r"0\.parquet: damaged: ([\d,]+) of its [\d,]+ rows can be"):
        prepare_log(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def zero(path, n_bytes):
    data = bytearray(path.read_bytes())
    data[100 : 100 + n_bytes] = bytes(n_bytes)
    path.write_bytes(data)


def drop(path, column):
    pl.read_parquet(path).drop(column).write_parquet(path)


def change(path, **values):
    pl.read_parquet(path).with_columns(**values).write_parquet(path)


def test_dates_and_numbers_do_not_mix(files, tmp_path):
    change(tmp_path / "log" / "1.parquet", timestamp=pl.datetime(2024, 1, 1))
    with pytest.raises(DataError, match=r"1\.parquet, 0\.parquet: times are dates in one"):
        prepare_log(files, tmp_path / "out")


def test_an_empty_log_is_refused(log, tmp_path):
    log.clear().write_csv(tmp_path / "log.csv")
    with pytest.raises(DataError, match=r"log\.csv: the log is empty"):
        prepare_log(tmp_path / "log.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_user_interactions": 10_000}, "no user with 10000 and item with 1 interactions"),
        ({"n_shards": 3, "min_user_interactions": 0}, "the leave-one-out split leaves no sequence"),
    ],
)
def test_a_log_of_which_nothing_remains_is_refused(files, settings, message, tmp_path):
    if "n_shards" in settings:  # users with one interaction each
        for i in range(4):
            change(
                tmp_path / "log" / f"{i}.parquet", user_id=pl.format(f"{i} {{}}", pl.row_index())
            )
    with pytest.raises(DataError, match=message):
        prepare_log(files, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_item_interactions": -1}, "min_item_interactions=-1"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"n_shards": 0}, "n_shards=0"),
        ({"split": "random"}, "split='random'"),
    ],
)
def test_bad_settings_are_named(files, settings, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        prepare_log(files, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(files, tmp_path):
    with pytest.raises(DataError, match="not empty, and not a prepared log"):
        prepare_log(files, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("at", [1, 4, 9, 12])
def test_a_full_disk_is_named_and_work_goes_on_when_there_is_space(
    files, at, tmp_path, monkeypatch
):
    wanted = hashes(prepare_log(files, tmp_path / "whole", n_shards=2).path)
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_of_rece.os, "fsync", full)
        with pytest.raises(WriteError, match="No space left on device"):
            prepare_log(files, tmp_path / "out", n_shards=2)
    assert not list((tmp_path / "out").rglob("_unfinished*"))
    assert hashes(prepare_log(files, tmp_path / "out", n_shards=2).path) == wanted


# --------------------------------------------------------------------------------- damaged later


def test_a_shard_that_was_cut_or_is_missing_is_named(files, tmp_path):
    prepared = prepare_log(files, tmp_path / "out")
    shard = next((tmp_path / "out" / "data").glob("train-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: \d+ bytes of \d+"):
        prepared.split("train")
    shard.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: not a Parquet file"):
        prepared.split("train")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: not what was written"):
        prepared.check()
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: missing"):
        prepared.split("train")


def test_a_folder_that_is_no_prepared_log_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no prepared\.json in it"):
        open_prepared(tmp_path)


def test_a_later_format_is_refused(files, tmp_path):
    prepared = prepare_log(files, tmp_path / "out")
    path = prepared.path / "prepared.json"
    path.write_text(json.dumps({**prepared.manifest, "format": 2}))
    with pytest.raises(DataError, match="format 2, and this version reads 1"):
        open_prepared(prepared.path)


def put(manifest, value, *path):
    for key in path[:-1]:
        manifest = manifest[key]
    manifest[path[-1]] = value


FIRST_SHARD = ("splits", "test", "shards", 0)


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        ("x", ("splits",), "it has no usable splits"),
        (None, ("description",), "it has no usable description"),
        ([], ("splits", "train"), "train has no usable rows, interactions, shards"),
        (3, ("splits", "train", "shards"), "train has no usable shards"),
        ("x", FIRST_SHARD, "a shard of test has no usable file, rows, bytes, sha256"),
        ("9", (*FIRST_SHARD, "bytes"), "a shard of test has no usable bytes"),
        ("../items.json", (*FIRST_SHARD, "file"), r"a file elsewhere \('../items.json'\)"),
        ("/etc/passwd", (*FIRST_SHARD, "file"), "a file elsewhere"),
        ("a\0b", (*FIRST_SHARD, "file"), "a file elsewhere"),
    ],
)
def test_a_damaged_manifest_is_named(value, path, message, prepared, tmp_path):
    manifest = json.loads(json.dumps(prepared.manifest))
    put(manifest, value, *path)
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=rf"prepared\.json: damaged, or written by hand: .*{message}"
    ):
        open_prepared(tmp_path)


@pytest.mark.parametrize("text", ['{"format": 1, "spl', "", "[]", "3", "{}", "[" * 100_000, "\0"])
def test_a_manifest_that_was_cut_is_named(text, tmp_path):
    (tmp_path / "prepared.json").write_text(text)
    with pytest.raises(DataError, match=r"prepared\.json: .*Copy it again"):
        open_prepared(tmp_path)


def test_shards_of_other_rows_or_columns_are_named(prepared, tmp_path):
    shutil.copytree(prepared.path, tmp_path, dirs_exist_ok=True)
    manifest = json.loads(json.dumps(prepared.manifest))
    put(manifest, 10**6, *FIRST_SHARD, "rows")
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="other rows or columns"):
        open_prepared(tmp_path).split("test")


@pytest.mark.parametrize(
    ("column", "kind"), [("item_ids", pa.list_(pa.float64())), ("target_id", pa.string())]
)
def test_shards_of_other_types_are_named(column, kind, prepared, tmp_path):
    shutil.copytree(prepared.path, tmp_path, dirs_exist_ok=True)
    manifest = json.loads(json.dumps(prepared.manifest))
    shard = manifest["splits"]["test"]["shards"][0]
    path = tmp_path / "data" / shard["file"]
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, table[column].cast(kind)), path)
    shard["bytes"] = path.stat().st_size
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"{shard['file']}: {column} holds .*, not "):
        open_prepared(tmp_path).split("test")


def test_a_damaged_tokenizer_of_a_prepared_log_is_named(prepared, tmp_path):
    shutil.copytree(prepared.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        _ = open_prepared(tmp_path).tokenizer
