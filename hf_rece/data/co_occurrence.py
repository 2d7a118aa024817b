"""Which known items a new item stands near in a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from hf_rece.data.item_tokenizer import Item


def co_occurring_items(
    histories: Iterable[Sequence[Item]],
    items: Iterable[Item],
    *,
    n_neighbours: int = 10,
    window: int = 5,
) -> dict[Item, dict[Item, float]]:
    """Return, for each of `items`, the other items that stand nearest to it, with their weights.

    Every occurrence within `window` places adds 1 / distance; the sum is divided by the square root
    of how often the other item occurs, so that popular items are not near to everything.

    Args:
        histories: lists of item ids in order of time; read once.
        items: items whose neighbours are wanted; none of them is a neighbour.
        n_neighbours: neighbours of an item at most.
        window: places that are looked at on either side.

    Returns:
        Item -> neighbour -> weight, largest first; an item that does not occur has no neighbours.

    Example:
        >>> co_occurring_items([["a", "new"], ["a", "b"]], ["new"])
        {'new': {'a': 0.7071067811865475}}
    """
    near: dict[Item, Counter[Item]] = {item: Counter() for item in items}
    occurrences: Counter[Item] = Counter()
    for history in histories:
        occurrences.update(history)
        for place, item in enumerate(history):
            if item not in near:
                continue
            first = max(place - window, 0)
            for other_place, other in enumerate(history[first : place + window + 1], start=first):
                if other not in near:
                    near[item][other] += 1 / abs(other_place - place)  # type: ignore[assignment]
    found = {}
    for item, counts in near.items():
        weights = {other: n / occurrences[other] ** 0.5 for other, n in counts.items()}
        best = sorted(weights, key=lambda other: -weights[other])[:n_neighbours]
        found[item] = {other: weights[other] for other in best}
    return found
