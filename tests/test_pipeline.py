"""The pipeline of transformers."""

import pytest
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_rece import RecommenderModel
from hf_rece.errors import ArgumentError
from hf_rece.pipeline import register_pipeline
from tests.models.test_growth import ITEMS, make

HISTORIES = [ITEMS[:3], ITEMS[7:8], ITEMS[4:20]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make().save_pretrained(folder)
    return folder


def expected(folder, **limits):
    answers = RecommenderModel.from_pretrained(folder).recommend(HISTORIES, k=4, **limits)
    return [
        [{"item": f.item, "score": pytest.approx(f.score, abs=1e-6)} for f in a] for a in answers
    ]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_answers_as_recommend_does(saved, batch_size):
    knobs = {} if batch_size is None else {"batch_size": batch_size}
    recommender = pipeline("sequential-recommendation", model=str(saved), **knobs)
    assert recommender(HISTORIES, top_k=4) == expected(saved)
    assert recommender(tuple(map(tuple, HISTORIES)), top_k=4) == expected(saved)


def test_one_history_gives_one_answer(saved):
    recommender = pipeline("sequential-recommendation", model=str(saved), top_k=4)
    assert recommender(HISTORIES[0]) == expected(saved)[0]
    assert recommender(HISTORIES[:1]) == expected(saved)[:1]


def test_limits_are_those_of_recommend(saved):
    limits = {"filter_seen": False, "allowed_items": ITEMS[:9], "denied_items": ITEMS[:2]}
    recommender = pipeline("sequential-recommendation", model=str(saved), denied_items=ITEMS[:2])
    assert recommender(HISTORIES, top_k=4, **limits) == expected(saved, **limits)


def test_generators_and_datasets_are_streamed(saved):
    recommender = pipeline("sequential-recommendation", model=str(saved), top_k=4, batch_size=2)
    assert list(recommender(history for history in HISTORIES)) == expected(saved)
    rows = KeyDataset(Dataset.from_dict({"history": HISTORIES}), "history")
    assert list(recommender(rows)) == expected(saved)


def test_empty_histories_have_empty_answers(saved):
    recommender = pipeline("sequential-recommendation", model=str(saved), top_k=4)
    assert recommender([]) == []
    assert recommender([[], HISTORIES[0]]) == [[], expected(saved)[0]]


def test_takes_a_model_and_another_tokenizer():
    model, tokenizer = make(), make().tokenizer
    model.tokenizer = None
    recommender = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer)
    assert len(recommender(ITEMS[:1])) == 10


def test_an_unknown_argument_is_named(saved):
    recommender = pipeline("sequential-recommendation", model=str(saved))
    with pytest.raises(ArgumentError, match=r"pipeline=\['topk'\].*top_k"):
        recommender(ITEMS[:1], topk=3)


def test_registering_again_changes_nothing():
    register_pipeline()
