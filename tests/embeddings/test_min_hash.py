import numpy as np
import polars as pl
import pytest
import torch

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.data.synthetic import generate_interactions
from hf_rece.embeddings.min_hash import (
    min_hash_signatures,
    own_keys,
    parquet_batches,
    split_batches,
)
from hf_rece.embeddings.mixing import mix
from hf_rece.errors import ArgumentError, DataError


def batch(pairs):
    ids, users = np.array(pairs).T
    return ids, mix(users.astype(np.uint64))


@pytest.fixture
def log():
    return generate_interactions(n_users=300, n_items=80)


def test_equal_keys_estimate_the_jaccard_similarity():
    random = np.random.default_rng(0)
    sets = [random.choice(60, 30, replace=False) for _ in range(40)]
    pairs = [(item, user) for item, users in enumerate(sets) for user in users]
    keys = torch.cat([min_hash_signatures([batch(pairs)], 40, seed=s) for s in range(40)], dim=1)
    for other in range(1, 40):
        true = len(set(sets[0]) & set(sets[other])) / len(set(sets[0]) | set(sets[other]))
        estimate = float((keys[0] == keys[other]).float().mean())
        assert estimate == pytest.approx(true, abs=4 * np.sqrt(0.25 / 320))


def test_pieces_in_any_order_give_the_same_signatures(log):
    tokenizer = ItemTokenizer.from_interactions(log)
    (whole,) = split_batches(leave_one_out_split(log, tokenizer)["train"])
    pieces = [(whole[0][start::7], whole[1][start::7]) for start in range(7)]
    expected = min_hash_signatures([whole], len(tokenizer))
    assert torch.equal(min_hash_signatures(reversed(pieces), len(tokenizer)), expected)


def test_repeated_interactions_change_nothing():
    pairs = [(0, 1), (1, 1), (1, 2), (2, 5)]
    assert torch.equal(
        min_hash_signatures([batch(pairs * 3)], 3), min_hash_signatures([batch(pairs)], 3)
    )


def test_items_that_do_not_occur_have_keys_of_their_own():
    signatures = min_hash_signatures([batch([(1, 1)])], 3, n_keys=4)
    own = torch.from_numpy(own_keys(np.arange(3), 4, 0))
    assert torch.equal(signatures[[0, 2]], own[[0, 2]])
    assert not torch.equal(signatures[1], own[1])


def test_items_with_the_same_users_stay_apart_by_one_key():
    pairs = [(item, user) for item in range(5) for user in range(10)]
    signatures = min_hash_signatures([batch(pairs)], 5, n_keys=8)
    assert len(torch.unique(signatures, dim=0)) == 5
    assert [(row != signatures[0]).sum().item() for row in signatures] == [0, 1, 1, 1, 1]


def test_a_parquet_log_is_read_in_pieces(log, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rece.embeddings.min_hash._BATCH_ROWS", 500)
    tokenizer = ItemTokenizer.from_interactions(log)
    log.rename({"user_id": "who", "item_id": "what"}).write_parquet(tmp_path / "log.parquet")
    names = {"user_column": "who", "item_column": "what"}
    batches = list(parquet_batches(tmp_path / "log.parquet", tokenizer, **names))
    assert max(len(ids) for ids, _ in batches) <= 500
    ids = np.concatenate([ids for ids, _ in batches])
    assert ids.tolist() == tokenizer.convert_items_to_ids(log["item_id"])
    assert len(np.unique(np.concatenate([users for _, users in batches]))) == 300


def test_integer_users_and_string_users_are_both_read(tmp_path):
    for users in (["a", "b", "a"], [1, -2, 1], [2**64 - 1, 5, 2**64 - 1]):
        log = pl.DataFrame({"user_id": users, "item_id": ["x", "x", "y"]})
        log.write_parquet(tmp_path / "log.parquet")
        ((ids, hashed),) = parquet_batches(tmp_path / "log.parquet", ItemTokenizer(["x", "y"]))
        assert ids.tolist() == [1, 1, 2]
        assert hashed[0] == hashed[2] != hashed[1]


def test_items_that_are_not_the_tokenizers_are_named(log, tmp_path):
    log.write_parquet(tmp_path / "log.parquet")
    tokenizer = ItemTokenizer(sorted(set(log["item_id"]))[1:])
    with pytest.raises(DataError, match=r"not the tokenizer's: 'B000000'"):
        list(parquet_batches(tmp_path / "log.parquet", tokenizer))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user": [1], "item_id": ["x"]}, "no column user_id among user, item_id"),
        ({"user_id": [None, 1], "item_id": ["x", "x"]}, "1 users are null"),
    ],
)
def test_unusable_logs_are_refused(frame, message, tmp_path):
    pl.DataFrame(frame).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=message):
        list(parquet_batches(tmp_path / "log.parquet", ItemTokenizer(["x"])))


def test_what_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "log.parquet").write_text("user,item\n")
    with pytest.raises(DataError, match="not a Parquet log"):
        list(parquet_batches(tmp_path / "log.parquet", ItemTokenizer(["x"])))


def test_ids_beyond_the_table_are_refused():
    with pytest.raises(ArgumentError, match=r"batches=\(0, 3\).*3 rows"):
        min_hash_signatures([batch([(0, 1), (3, 1)])], 3)


def test_only_so_many_keys_are_kept():
    with pytest.raises(ArgumentError, match="n_keys=9"):
        min_hash_signatures([], 3, n_keys=9)
