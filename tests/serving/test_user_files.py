"""Files of users."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_rece import ItemTokenizer
from hf_rece.errors import ArgumentError, DataError, WriteError
from hf_rece.serving.user_files import ScoredUsers, recommend_parquet
from tests.models.test_growth import ITEMS, make

HISTORIES = [ITEMS[i : i + 1 + i % 5] for i in range(20)]


def write(path, histories, users=None, **columns):
    users = [f"user {i}" for i in range(len(histories))] if users is None else users
    pq.write_table(pa.table({"user_id": users, "item_ids": histories, **columns}), path)
    return path


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_user_gets_what_recommend_answers(batch_size, tmp_path):
    model = make()
    users = write(tmp_path / "users.parquet", HISTORIES)
    output = tmp_path / "recs.parquet"
    done = recommend_parquet(model, users, output, k=4, batch_size=batch_size, progress=False)
    assert done == ScoredUsers(n_users=20, n_answered=20, n_recommendations=80, n_unknown=0)
    table = pq.read_table(output)
    assert table.column_names == ["user_id", "rank", "item_id", "score"]
    rows = table.to_pylist()
    answers = model.recommend(HISTORIES, k=4)
    for i, answer in enumerate(answers):
        mine = rows[4 * i : 4 * i + 4]
        assert {row["user_id"] for row in mine} == {f"user {i}"}
        assert [row["rank"] for row in mine] == [1, 2, 3, 4]
        assert [row["item_id"] for row in mine] == [found.item for found in answer]
        assert [row["score"] for row in mine] == pytest.approx([f.score for f in answer], abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recs.parquet", "users.parquet"]
    assert output.stat().st_mode & 0o777 == users.stat().st_mode & 0o777


def test_integers_stay_integers(tmp_path):
    model = make()
    model.tokenizer = ItemTokenizer(items=list(range(100, 129)))
    users = write(tmp_path / "u.parquet", pa.array([[101], [105]]), pa.array([7, 8], pa.uint32()))
    recommend_parquet(model, users, tmp_path / "r.parquet", k=2, progress=False)
    schema = pq.read_schema(tmp_path / "r.parquet")
    assert schema.field("user_id").type == pa.uint32()
    assert schema.field("item_id").type == pa.int64()


def test_unknown_items_are_counted_and_users_without_others_left_out(tmp_path):
    users = write(tmp_path / "u.parquet", [["item 1", "x"], ["y"], None, [], ["item 2"]])
    done = recommend_parquet(make(), users, tmp_path / "r.parquet", k=3, progress=False)
    assert done == ScoredUsers(n_users=5, n_answered=2, n_recommendations=6, n_unknown=2)
    found = pq.read_table(tmp_path / "r.parquet")["user_id"].unique().to_pylist()
    assert found == ["user 0", "user 4"]


def test_limits_are_those_of_recommend(tmp_path):
    users = write(tmp_path / "u.parquet", HISTORIES)
    limits = {"filter_seen": False, "allowed_items": ITEMS[:9], "denied_items": ITEMS[:2]}
    recommend_parquet(make(), users, tmp_path / "r.parquet", progress=False, **limits)
    assert set(pq.read_table(tmp_path / "r.parquet")["item_id"].to_pylist()) == set(ITEMS[2:9])


def test_columns_may_have_other_names(tmp_path):
    table = pa.table({"who": [1], "took": [["item 3"]]})
    pq.write_table(table, tmp_path / "u.parquet")
    columns = {"user_column": "who", "history_column": "took"}
    recommend_parquet(make(), tmp_path / "u.parquet", tmp_path / "r.parquet", **columns)
    assert pq.read_schema(tmp_path / "r.parquet").names[0] == "who"


def test_a_bar_is_shown_on_stderr(tmp_path, capsys):
    users = write(tmp_path / "u.parquet", HISTORIES)
    recommend_parquet(make(), users, tmp_path / "r.parquet")
    shown = capsys.readouterr()
    assert "20/20" in shown.err
    assert shown.out == ""


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path):
    model, output = make(), tmp_path / "r.parquet"
    users = write(tmp_path / "u.parquet", HISTORIES)
    output.write_text("before")
    answer, calls = model.recommend, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("half way")
        return answer(*args, **kwargs)

    model.recommend = fails
    with pytest.raises(RuntimeError, match="half way"):
        recommend_parquet(model, users, output, batch_size=5, progress=False)
    assert output.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.parquet", "u.parquet"]


def test_an_empty_file_gives_an_empty_one(tmp_path):
    users = write(
        tmp_path / "u.parquet", pa.array([], pa.list_(pa.string())), pa.array([], "int64")
    )
    recommend_parquet(make(), users, tmp_path / "r.parquet", progress=False)
    assert pq.read_table(tmp_path / "r.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("histories", "knobs", "message"),
    [
        ([[1]], {}, r"column 'item_ids': it holds list<.*int64>.*items are string"),
        (["item 1"], {}, "it holds string.*one row a user"),
        ([["item 1"]], {"user_column": "who"}, "no column who; the columns are user_id, item_ids"),
        ([["item 1"]], {"k": 0}, "k=0"),
    ],
)
def test_bad_files_are_named(histories, knobs, message, tmp_path):
    users = write(tmp_path / "u.parquet", histories)
    with pytest.raises((DataError, ArgumentError), match=message):
        recommend_parquet(make(), users, tmp_path / "r.parquet", progress=False, **knobs)
    assert not (tmp_path / "r.parquet").exists()


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.parquet: not a Parquet file"):
        recommend_parquet(make(), tmp_path / "no.parquet", tmp_path / "r.parquet")
    users = write(tmp_path / "u.parquet", HISTORIES)
    with pytest.raises(WriteError, match=r"cannot be written \(No such file"):
        recommend_parquet(make(), users, tmp_path / "no folder" / "r.parquet")
