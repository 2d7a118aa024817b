"""What the recommender's page shows, without a browser."""

import html
import re

import pytest

pytest.importorskip("gradio")

from hf_rece.serving.catalogue import Catalogue
from hf_rece.serving.recommender_page import (
    add_first_match,
    add_item,
    remove_item,
    show_history,
    show_matches,
    show_recommendations,
)
from tests.serving.shop import HOSTILE, shop

MODEL = shop()
CATALOGUE = Catalogue.of(MODEL.tokenizer.items, {"tool 1": "Hammer", "tool 2": "<i>Saw</i>"})
TOOL = len(HOSTILE)  # place of tool 0


def text(page):
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_matches_say_how_many_there_are():
    assert "The first 10 of 58 items." in text(show_matches(CATALOGUE, ""))
    assert "1 item matches." in text(show_matches(CATALOGUE, "hammer"))
    assert "No item matches." in text(show_matches(CATALOGUE, "nothing of the kind"))


def test_a_large_catalogue_stays_where_it_is():
    catalogue = Catalogue.of(list(range(100_000)))
    assert len(show_matches(catalogue, "")) < 5_000


def test_the_history_is_shown_in_its_order():
    shown = text(show_history(CATALOGUE, [TOOL + 1, TOOL + 5, TOOL + 1]))
    assert re.findall(r"Hammer|tool 5", shown) == ["Hammer", "tool 5", "Hammer"]


def test_recommendations_are_those_of_the_model():
    shown = show_recommendations(MODEL, CATALOGUE, [TOOL, TOOL + 3], 5, True)
    (answers,) = MODEL.recommend([["tool 0", "tool 3"]], 5)
    names = [CATALOGUE.name(MODEL.tokenizer.items.index(answer.item)) for answer in answers]
    assert [html.unescape(n) for n in re.findall(r'"wide">(.*?)<span', shown)] == names
    for answer in answers:
        assert f"{answer.score:.3f}" in shown


def test_items_of_the_history_are_left_out_only_if_asked():
    (best, *_), *_ = MODEL.recommend([["tool 0"]], 1, filter_seen=False)
    place = MODEL.tokenizer.items.index(best.item)
    everything = len(CATALOGUE)
    kept = show_recommendations(MODEL, CATALOGUE, [place], everything, False)
    left_out = show_recommendations(MODEL, CATALOGUE, [place], everything, True)
    assert f'data-place="{place}"' in kept
    assert f'data-place="{place}"' not in left_out


def test_an_empty_history_is_told_what_to_do():
    assert "Add an item" in show_recommendations(MODEL, CATALOGUE, [], 10, True)


def test_a_history_of_all_items_leaves_none():
    everything = list(range(len(CATALOGUE)))
    assert "No item is left" in show_recommendations(MODEL, CATALOGUE, everything, 10, True)


def test_names_are_text_wherever_they_are_shown():
    places = [*range(len(HOSTILE)), TOOL + 2]
    matches = "".join(show_matches(CATALOGUE, CATALOGUE.name(place)) for place in places)
    answers = show_recommendations(MODEL, CATALOGUE, [TOOL], len(CATALOGUE), True)
    for page in (matches, show_history(CATALOGUE, places), answers):
        assert not re.search(r"<(img|script|svg|b|i)\b|</style", page)
        for place in places:
            assert CATALOGUE.name(place) in text(page)
        assert len(re.findall(r'data-place="', page)) == len(re.findall("<button ", page))


def test_items_are_added_at_the_end():
    assert add_item(CATALOGUE, [4], "7") == [4, 7]


@pytest.mark.parametrize("place", ["58", "-1", "", "x", "1.5", None, [1]])
def test_what_is_no_item_is_not_added(place):
    assert add_item(CATALOGUE, [4], place) == [4]


def test_one_of_equal_items_is_removed():
    assert remove_item([3, 5, 3], "2", "3") == [3, 5]


def test_a_second_click_on_what_is_gone_removes_nothing():
    once = remove_item([3, 5], "0", "3")
    assert remove_item(once, "0", "3") == once == [5]


def test_enter_adds_the_first_match_and_empties_the_box():
    assert add_first_match(CATALOGUE, [4], "hammer") == ([4, TOOL + 1], "")


@pytest.mark.parametrize("words", ["", "  ", "nothing of the kind"])
def test_enter_without_a_match_changes_nothing(words):
    assert add_first_match(CATALOGUE, [4], words) == ([4], words)
