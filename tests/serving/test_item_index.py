"""The approximate index beside exact search."""

import numpy as np
import pytest
import torch

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.errors import ArgumentError, DataError
from hf_rece.serving.faiss_kinds import default_factory
from hf_rece.serving.item_index import INDEX_FILE, ItemIndex

pytest.importorskip("faiss")

N_ITEMS = 3000
TABLES = {
    "dense": None,
    "codes": {"type": "compositional", "compression": 4, "n_codes": 4},
    "lma": {"type": "lma", "compression": 4},
}
HISTORIES = [[f"i{j}" for j in np.random.default_rng(i).integers(0, N_ITEMS, 5)] for i in range(40)]


def make(table="dense", bias=False, vocab_size=N_ITEMS + 1):
    torch.manual_seed(0)
    config = RecommenderConfig(
        backbone=SASRecConfig(hidden_size=16, max_position_embeddings=20),
        vocab_size=vocab_size,
        item_embedding=TABLES[table],
        output_bias=bias,
    )
    model = RecommenderModel(config).eval()
    model.tokenizer = ItemTokenizer(items=[f"i{j}" for j in range(N_ITEMS)])
    if bias:
        torch.nn.init.normal_(model.item_head.bias, std=0.1)
    return model


def names(answers):
    return [[found.item for found in answer] for answer in answers]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "HNSW16"])
def test_at_full_effort_the_answers_are_the_exact_ones(table, bias, factory):
    model = make(table, bias)
    index = ItemIndex.build(model, factory=factory, target_recall=1.01)
    assert index.settings.recall > 0.98
    limits = [
        {},
        {"filter_seen": False},
        {"denied_items": [f"i{j}" for j in range(0, N_ITEMS, 2)]},
        {"allowed_items": [f"i{j}" for j in range(0, N_ITEMS, 50)]},
    ]
    for limit in limits:
        exact = model.recommend(HISTORIES, k=7, **limit)
        found = model.recommend(HISTORIES, k=7, index=index, **limit)
        same = [a == b for a, b in zip(names(exact), names(found), strict=True)]
        assert np.mean(same) > 0.9
        for one, other in zip(exact, found, strict=True):
            scores = {f.item: f.score for f in one}
            for f in other:
                assert f.score == pytest.approx(scores.get(f.item, f.score), abs=1e-5)


def test_recall_is_printed_kept_and_reached(capsys):
    index = ItemIndex.build(make(), factory="IVF64,SQ8", target_recall=0.9)
    assert f"recall@10 {index.settings.recall:.3f} against exact search" in capsys.readouterr().out
    assert index.settings.recall > 0.85
    assert 1 < index.settings.effort < 64


def test_histories_of_users_measure_recall():
    index = ItemIndex.build(make(), histories=HISTORIES, factory="IVF8,Flat", k=3)
    assert index.settings.recall_k == 3


def test_seen_and_denied_items_never_come_back():
    model = make()
    index = ItemIndex.build(model, factory="IVF8,Flat", target_recall=0.1)
    free = names(model.recommend(HISTORIES, k=20, index=index))
    assert not any(set(h) & set(answer) for h, answer in zip(HISTORIES, free, strict=True))
    denied = sorted({item for answer in free for item in answer[:5]})
    answers = names(model.recommend(HISTORIES, k=20, index=index, denied_items=denied))
    assert not {item for answer in answers for item in answer} & set(denied)
    assert {len(answer) for answer in answers} == {20}


def test_fewer_items_come_back_where_fewer_are_allowed():
    model = make()
    index = ItemIndex.build(model)
    answers = model.recommend([["i1"]], k=5, index=index, allowed_items=["i1", "i2", "i3"])
    assert set(names(answers)[0]) == {"i2", "i3"}
    assert model.recommend([["i1"]], index=index, allowed_items=["i1"]) == [[]]


def test_rows_to_spare_are_not_found():
    model = make(vocab_size=N_ITEMS + 100)
    index = ItemIndex.build(model)
    assert len(model.recommend([["i1"]], k=9999, index=index)[0]) == N_ITEMS - 1


def test_is_saved_beside_the_model(tmp_path):
    model = make(bias=True)
    model.save_pretrained(tmp_path)
    index = ItemIndex.build(model, factory="IVF16,SQ8")
    index.save(tmp_path)
    again, loaded = ItemIndex.load(tmp_path), RecommenderModel.from_pretrained(tmp_path)
    assert again.settings == index.settings
    assert loaded.recommend(HISTORIES, index=again) == model.recommend(HISTORIES, index=index)


def test_an_index_of_other_weights_is_refused():
    model = make()
    index = ItemIndex.build(model)
    with torch.no_grad():
        model.item_head.weight.mul_(1.5)
    with pytest.raises(ArgumentError, match="made of other item vectors"):
        model.recommend(HISTORIES, index=index)
    model = make()
    model.add_items(["new"])
    with pytest.raises(ArgumentError, match=r"3001 rows.*with 3002"):
        model.recommend(HISTORIES, index=index)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(DataError, match=r"No such file.*hf-rece index"):
        ItemIndex.load(tmp_path)
    ItemIndex.build(make()).save(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match="index in"):
        ItemIndex.load(tmp_path)


@pytest.mark.parametrize("factory", ["IFV16", "PCA8,Flat"])
def test_an_index_that_is_not_served_is_named(factory):
    with pytest.raises(ArgumentError, match=f"factory='{factory}'"):
        ItemIndex.build(make(), factory=factory)


def test_without_faiss_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ArgumentError, match=r'pip install "hf_rece\[ann\]"'):
        ItemIndex.build(make())


def test_large_catalogues_get_an_inverted_file():
    assert default_factory(1_000_000) == "IVF4096,SQ8"
    assert default_factory(1000) == "Flat"
