"""Allow-lists, deny-lists, and the vectors of users and items."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.recommendation import Recommendation, recommendations_frame
from tests.models.test_growth import ITEMS, NEW, TABLES, make

every_table = pytest.mark.parametrize("table", TABLES)


def names(answer):
    return [found.item for found in answer]


def test_a_model_whose_states_are_not_finite_answers_nothing():
    model = make()
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(torch.nan)
    for ask in (model.recommend, model.user_vectors):
        with pytest.raises(DataError, match="states are NaN or infinite"):
            ask([ITEMS[:2]])


def test_denied_items_are_not_recommended():
    model = make()
    (free,) = model.recommend([ITEMS[:2]], k=5)
    (answer,) = model.recommend([ITEMS[:2]], k=3, denied_items=names(free)[:2])
    assert answer == free[2:]


def test_denied_items_win_over_allowed_ones():
    (answer,) = make().recommend(
        [["item 1"]], k=9, allowed_items=["item 2", "item 3"], denied_items=["item 3"]
    )
    assert names(answer) == ["item 2"]


def test_nothing_is_left_when_all_allowed_items_are_denied():
    assert make().recommend([["item 1"]], allowed_items=["item 2"], denied_items=["item 2"]) == [[]]


def test_unknown_denied_items_are_named_at_the_caller():
    with pytest.warns(UserWarning, match="1 items are not in the vocabulary.*'gone'") as caught:
        make().recommend([["item 1"]], denied_items=["gone"])
    assert caught[0].filename == __file__


def test_one_denied_item_must_be_a_list():
    with pytest.raises(ArgumentError, match=r"denied_items='item 1'.*Pass \[item\]"):
        make().recommend([["item 1"]], denied_items="item 1")


@every_table
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_inner_products_of_user_and_item_vectors(table, tied):
    model = make(table, tie_word_embeddings=tied, output_bias=True)
    histories = [ITEMS[:3], ITEMS[7:8]]
    users, items = model.user_vectors(histories), model.item_vectors()
    scores = users @ items.T + model.item_head.bias[1:]
    for row, answer in zip(
        scores, model.recommend(histories, k=29, filter_seen=False), strict=True
    ):
        best = row.sort(descending=True)
        assert names(answer) == [ITEMS[i] for i in best.indices]
        assert [f.score for f in answer] == pytest.approx(best.values.tolist(), abs=1e-6)


@every_table
def test_item_vectors_come_whole_chosen_or_in_pieces(table):
    model = make(table)
    every = model.item_vectors()
    assert torch.equal(model.item_vectors(["item 5", "item 0"]), every[[5, 0]])
    pieces = list(model.iter_item_vectors(items_at_once=10))
    assert [len(items) for items, _ in pieces] == [10, 10, 9]
    assert [item for items, _ in pieces for item in items] == ITEMS
    assert torch.equal(torch.cat([vectors for _, vectors in pieces]), every)


def test_a_history_without_a_known_item_has_no_vector():
    with pytest.warns(UserWarning, match="'x'"):
        vectors = make().user_vectors([["item 1"], ["x"], []], batch_size=1)
    assert np.isnan(vectors.numpy()).all(1).tolist() == [False, True, True]


def test_vectors_of_a_peft_head_give_its_scores():
    peft = pytest.importorskip("peft")
    model = make(tie_word_embeddings=False)
    layer = peft.tuners.lora.Linear(
        model.item_head, "default", peft.LoraConfig(r=2, init_lora_weights=False), r=2
    )
    model.item_head = layer
    (answer,) = model.recommend([["item 1"]], k=3)
    scores = model.item_vectors(names(answer)) @ model.user_vectors([["item 1"]])[0]
    assert scores.tolist() == pytest.approx([f.score for f in answer], abs=1e-6)


def test_rows_to_spare_have_no_vectors():
    assert len(make(vocab_size=40).item_vectors()) == len(ITEMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.user_vectors([["item 1"]], batch_size=0), "batch_size=0"),
        (lambda model: next(model.iter_item_vectors(items_at_once=0)), "items_at_once=0"),
        (lambda model: model.item_vectors(NEW), "'new a'"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises((ArgumentError, DataError), match=message):
        call(make())


@pytest.mark.parametrize("container", [list, np.array, pl.Series, pd.Series])
def test_recommendations_are_a_table_with_the_columns_of_rectools(container):
    answers = [[Recommendation("x", 2.5), Recommendation("y", 1.0)], [], [Recommendation("x", 0.0)]]
    frame = recommendations_frame(container([7, 8, 9]), answers)
    assert frame.columns == ["user_id", "item_id", "score", "rank"]
    assert frame.rows() == [(7, "x", 2.5, 1), (7, "y", 1.0, 2), (9, "x", 0.0, 1)]


def test_no_recommendations_are_an_empty_table():
    frame = recommendations_frame(["a"], [[]])
    assert (len(frame), frame["user_id"].dtype, frame["rank"].dtype) == (0, pl.String, pl.Int64)


def test_recommendations_need_a_user_for_each_answer():
    with pytest.raises(ArgumentError, match="users='2 users': there are 1 answers"):
        recommendations_frame(["a", "b"], [[]])


@pytest.mark.parametrize("histories", [[[["item 1"]]], [[{"item": 1}]], [None]])
def test_histories_of_what_is_no_item_are_named(histories):
    with pytest.raises(DataError, match="histories: not lists of item ids"):
        make().recommend(histories)
