"""What of a log is kept: the k-core of its users and items, and the point in time of its split."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_rece.data.partition import CODES, TIMES, Advance, Buckets
from hf_rece.errors import DataError
from hf_rece.files import complete_file, write_text

Stage = Callable[[str, int], AbstractContextManager[Advance]]
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Minima:
    """How rare users and items may be.

    Args:
        user: fewest interactions of a user that stays.
        item: fewest interactions of an item that stays.
    """

    user: int
    item: int


@dataclass(frozen=True)
class Kept:
    """What of a log is kept.

    Args:
        counts: (items of the log,) int64, interactions of each that are kept; 0 for items that are
            not.
        users: users that are kept.
        point: time after which users are held out by a temporal split; None if it is none.
    """

    counts: NDArray[np.int64]
    users: int
    point: float | None

    @property
    def interactions(self) -> int:
        """Interactions that are kept."""
        return int(self.counts.sum())

    @property
    def by_popularity(self) -> NDArray[np.int64]:
        """Codes of the items that are kept, most popular first, ties by item id."""
        order = np.argsort(-self.counts, kind="stable")
        return order[: np.count_nonzero(self.counts)]

    @property
    def tokens(self) -> NDArray[np.int32]:
        """(items of the log,) token ids, as ItemTokenizer.from_interactions gives them; else 0."""
        tokens = np.zeros(len(self.counts), dtype=np.int32)
        tokens[self.by_popularity] = np.arange(1, np.count_nonzero(self.counts) + 1)
        return tokens


def find_kept(buckets: Buckets, minima: Minima, quantile: float | None, stage: Stage) -> Kept:
    """Return what is kept of a log, from the working folder if it has been found before.

    As k_core_filter, users and items are dropped until all that remain meet both minima: a pass
    over the histories for each round.

    Args:
        buckets: grouped.
        minima: of users and items.
        quantile: of a temporal split; None for none.
        stage: shows the progress of a pass.

    Raises:
        DataError: if nothing is kept.
        WriteError: as complete_file.
    """
    path = buckets.folder / "kept.npy"
    facts = path.with_suffix(".json")
    if not facts.exists():
        kept = _find(buckets, minima, quantile, stage)
        with complete_file(path) as file:
            np.save(file, kept.counts)
        write_text(facts, json.dumps({"users": kept.users, "point": kept.point}))
    return Kept(np.load(path, allow_pickle=False), **json.loads(facts.read_text("utf-8")))


def kept_places(
    histories: pa.ListArray, is_kept: NDArray[np.bool_], min_user: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which interactions are kept (interactions,), and how many of each user (users,).

    Args:
        histories: item codes.
        is_kept: (items of the log,).
        min_user: users who keep fewer interactions keep none.
    """
    offsets = histories.offsets.to_numpy()
    places = is_kept[histories.values.to_numpy()]
    lengths = np.diff(np.append(0, np.cumsum(places))[offsets])
    is_rare = lengths < min_user
    places &= ~np.repeat(is_rare, np.diff(offsets))
    lengths[is_rare] = 0
    return places, lengths


def _find(buckets: Buckets, minima: Minima, quantile: float | None, stage: Stage) -> Kept:
    is_kept = np.ones(len(buckets.items), dtype=np.bool_)
    for round_ in itertools.count(1):
        with stage(f"filtering, pass {round_}", buckets.n_buckets) as advance:
            counts, users = _counts(buckets, is_kept, minima.user, advance)
        is_kept = counts >= max(minima.item, 1)
        if not ((counts > 0) & ~is_kept).any():
            break
    if users == 0:
        raise DataError(
            "the log",
            f"no user with {minima.user} and item with {minima.item} interactions remains",
            "Lower min_user_interactions or min_item_interactions",
        )
    if quantile is None:
        return Kept(counts, users, None)
    # As polars does with interpolation="lower".
    place = int((int(counts.sum()) - 1) * quantile)
    with stage("finding the point in time", 4 * buckets.n_buckets) as advance:
        point = value_at(lambda: _times(buckets, is_kept, minima.user, advance), place)
    return Kept(counts, users, point)


def _counts(
    buckets: Buckets, is_kept: NDArray[np.bool_], min_user: int, advance: Advance
) -> tuple[NDArray[np.int64], int]:
    """Return the kept interactions of each item (items,), and the number of kept users."""
    counts, users = np.zeros(len(is_kept), dtype=np.int64), 0
    for bucket in range(buckets.n_buckets):
        histories = column(buckets.read(bucket, [CODES]), CODES)
        places, lengths = kept_places(histories, is_kept, min_user)
        counts += np.bincount(histories.values.to_numpy()[places], minlength=len(counts))
        users += int(np.count_nonzero(lengths))
        advance(1)
    return counts, users


def _times(
    buckets: Buckets, is_kept: NDArray[np.bool_], min_user: int, advance: Advance
) -> Iterator[NDArray[Any]]:
    for bucket in range(buckets.n_buckets):
        table = buckets.read(bucket, [CODES, TIMES])
        places, _ = kept_places(column(table, CODES), is_kept, min_user)
        yield column(table, TIMES).values.to_numpy()[places]
        advance(1)


def value_at(parts: Callable[[], Iterator[NDArray[Any]]], place: int) -> float:
    """Return the value at a place of the sorted values, 16 of its 64 bits a pass.

    Args:
        parts: yields the values, all int64 or all float64, and again when called again.
        place: from 0.
    """
    prefix, dtype = 0, np.dtype(np.int64)
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for values in parts():
            dtype, keys = values.dtype, _ordered(values)
            if shift < 48:
                keys = keys[keys >> np.uint64(shift + 16) == prefix]
            digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        digit = int(np.searchsorted(counts.cumsum(), place, side="right"))
        place -= int(counts[:digit].sum())
        prefix = prefix << 16 | digit
    bits = np.array([prefix], dtype=np.uint64)
    if dtype == np.int64:
        return int((bits ^ _SIGN).view(np.int64)[0])
    return float(np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float64)[0])


def _ordered(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Return integers without sign in the order of the values."""
    bits = values.view(np.uint64)
    if values.dtype == np.int64:
        return bits ^ _SIGN
    return np.where(bits & _SIGN, ~bits, bits ^ _SIGN)


def column(table: pa.Table, name: str) -> pa.ListArray:
    """Return a column of lists in one piece."""
    return table[name].combine_chunks()
