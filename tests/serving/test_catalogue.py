"""Names of items: how they are found, and how titles are read."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rece.errors import DataError
from hf_rece.serving.catalogue import Catalogue, read_titles

DRILLS = Catalogue.of(["B1", "B2", "B3"], {"B1": "Cordless Drill", "B3": "Drill bit, steel"})


def names(catalogue, text, limit=10):
    places, total = catalogue.find(text, limit)
    return [catalogue.name(place) for place in places], total


def test_an_item_goes_by_its_title_and_id_or_by_its_id_alone():
    assert names(DRILLS, "") == (["Cordless Drill (B1)", "B2", "Drill bit, steel (B3)"], 3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("drill", ["Drill bit, steel (B3)", "Cordless Drill (B1)"]),  # what begins so is first
        ("DRILL co", ["Cordless Drill (B1)"]),
        ("  steel  ", ["Drill bit, steel (B3)"]),
        ("b2", ["B2"]),
        (".*", []),
    ],
)
def test_every_word_is_looked_for_in_any_case_and_order(text, found):
    assert names(DRILLS, text) == (found, len(found))


def test_no_more_than_asked_for_are_returned_but_all_are_counted():
    catalogue = Catalogue.of(list(range(1000)))
    assert catalogue.find("9", 3) == ([9, 90, 91], 271)


def test_an_empty_catalogue_finds_nothing():
    assert Catalogue.of([]).find("x", 5) == ([], 0)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=20, unique=True), st.text(max_size=3))
def test_find_is_a_search_for_every_word(items, text):
    places, total = Catalogue.of(items).find(text, 100)
    words = text.casefold().split()
    assert sorted(places) == [
        place for place, item in enumerate(items) if all(word in item.casefold() for word in words)
    ]
    assert total == len(places)


@pytest.mark.parametrize("name", ["titles.csv", "titles.tsv", "titles.parquet"])
def test_titles_are_read_by_the_type_of_the_models_items(name, tmp_path):
    path = tmp_path / name
    table = pl.DataFrame({"title": ["Drill ", "Saw", None, "Gone"], "item_id": [7, 8, 9, 10]})
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    assert read_titles(path, [7, 8, 9]) == {7: "Drill", 8: "Saw"}
    assert read_titles(path, ["7", "8", "9"]) == {"7": "Drill", "8": "Saw"}


def test_ids_with_leading_zeros_stay_as_they_are(tmp_path):
    path = tmp_path / "titles.csv"
    path.write_text("item_id,title\n007,Bond\n7,Seven\n")
    assert read_titles(path, ["007"]) == {"007": "Bond"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.csv", None, "no such file"),
        ("a.csv", "item_id,name\n1,x\n", "no column title; the columns are item_id, name"),
        ("a.csv", "item_id,title\n5,x\n", "no title for any item"),
        ("a.parquet", "text", "not a readable table"),
        ("a.csv", "", "not a readable table"),
    ],
)
def test_what_is_wrong_with_titles_is_named(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        read_titles(tmp_path / name, [1])
