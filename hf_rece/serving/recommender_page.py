"""The recommender's page: a history is put together, the next items are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio

from hf_rece.models.recommender import RecommenderModel
from hf_rece.serving.catalogue import Catalogue
from hf_rece.serving.page import fill, panel

_MATCHES = 10
_MOST_RECOMMENDED = 50


def recommender(model: RecommenderModel, catalogue: Catalogue) -> None:
    """Add histories and recommendations to the gradio.Blocks that is being made."""
    history = gradio.State([])
    most = max(2, min(len(catalogue), _MOST_RECOMMENDED))
    few = min(10, most)
    with gradio.Row():
        with gradio.Column(min_width=300):
            search = gradio.Textbox(label=f"Find one of {len(catalogue):,} items")
            matches = panel(show_matches(catalogue, ""))
            chosen = panel(show_history(catalogue, []))
            clear = gradio.Button("Clear the history", size="sm")
        with gradio.Column(min_width=300):
            k = gradio.Slider(1, most, few, step=1, label="Items to recommend", buttons=[])
            filter_seen = gradio.Checkbox(True, label="Leave out items of the history")
            answers = panel(show_recommendations(model, catalogue, [], few, True))

    def pick(places: list[int], event: gradio.EventData) -> list[int]:
        return add_item(catalogue, places, event.place)

    def drop(places: list[int], event: gradio.EventData) -> list[int]:
        return remove_item(places, event.index, event.place)

    def enter(places: list[int], text: str) -> tuple[list[int], str]:
        return add_first_match(catalogue, places, text)

    on: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # Every click counts, one after the other; of what is typed only the last.
    each = {**on, "trigger_mode": "multiple", "concurrency_id": "history"}
    last = {**on, "trigger_mode": "always_last"}
    matches.pick(pick, history, history, **each)
    answers.pick(pick, history, history, **each)
    chosen.pick(drop, history, history, **each)
    clear.click(list, None, history, **each)
    search.submit(enter, [history, search], [history, search], **each)
    search.change(partial(show_matches, catalogue), search, matches, **last)
    history.change(partial(show_history, catalogue), history, chosen, **last)
    recommend = partial(show_recommendations, model, catalogue)
    asked: list[Any] = [history, k, filter_seen]
    gradio.on([control.change for control in asked], recommend, asked, answers, **last)


def add_item(catalogue: Catalogue, places: Sequence[int], place: object) -> list[int]:
    """Return a history with one item more; `place` is what a browser says, and may be anything."""
    number = str(place)
    known = number.isdecimal() and int(number) < len(catalogue)
    return [*places, int(number)] if known else [*places]


def remove_item(places: Sequence[int], index: object, place: object) -> list[int]:
    """Return a history without the item at `index`, if it is still the one at `place`.

    A second click may come before the browser knows of the first.
    """
    gone = (str(index), str(place))
    return [p for i, p in enumerate(places) if (str(i), str(p)) != gone]


def add_first_match(
    catalogue: Catalogue, places: Sequence[int], text: str
) -> tuple[list[int], str]:
    """Return a history with the first match at its end, and no text; or both as they are."""
    found, _ = catalogue.find(text, 1) if text.strip() else ([], 0)
    return [*places, *found], "" if found else text


def show_matches(catalogue: Catalogue, text: str) -> str:
    """Return the first items that match a text, as HTML."""
    found, total = catalogue.find(text, _MATCHES)
    return fill("matches.html", items=_named(catalogue, found), total=total)


def show_history(catalogue: Catalogue, places: Sequence[int]) -> str:
    """Return a history as HTML."""
    return fill("history.html", items=_named(catalogue, places))


def show_recommendations(
    model: RecommenderModel,
    catalogue: Catalogue,
    places: Sequence[int],
    k: int,
    filter_seen: bool,
) -> str:
    """Return the next items of a history as HTML.

    Args:
        model: with its tokenizer.
        catalogue: of the tokenizer's items.
        places: the history, as places of the catalogue in order of time.
        k: items wanted.
        filter_seen: leave out items of the history.
    """
    history = [catalogue.items[place] for place in places]
    (answers,) = model.recommend([history], k, filter_seen=filter_seen)
    tokens = model.own_tokenizer().convert_items_to_ids([answer.item for answer in answers])
    shown = [
        {
            "place": token - 1,  # token 0 is padding
            "name": catalogue.name(token - 1),
            "score": answer.score,
            "percent": 100 * math.exp(answer.score - answers[0].score),
        }
        for token, answer in zip(tokens, answers, strict=True)
    ]
    reason = "No item is left." if history else "Add an item to the history."
    return fill("recommendations.html", answers=shown, reason=reason)


def _named(catalogue: Catalogue, places: Sequence[int]) -> list[tuple[int, str]]:
    return [(place, catalogue.name(place)) for place in places]
