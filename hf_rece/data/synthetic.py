"""A synthetic log with the structure of real ones: popularity, interests, transitions, time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hf_rece.data.interactions import ITEM, TIME, USER
from hf_rece.errors import ArgumentError

_SECONDS_A_YEAR = 365 * 24 * 3600


def generate_interactions(
    n_users: int = 6000,
    n_items: int = 4000,
    *,
    mean_length: float = 12.0,
    n_interests: int = 40,
    interests_per_user: int = 3,
    follow_probability: float = 0.6,
    popularity_exponent: float = 1.0,
    seed: int = 0,
) -> pl.DataFrame:
    """Return a random log in the form that load_interactions returns.

    Each interest is a set of items with Zipf popularity. A user has a few interests and a start in
    time; in each step, the user with probability follow_probability takes one of the few successors
    of the last item, else a popular item of one of the interests. So the last items tell much about
    the next.

    Args:
        n_users: users.
        n_items: items; unpopular ones may not occur.
        mean_length: mean interactions a user, at least 3; lengths are geometric above 3.
        n_interests: interests, at most n_items.
        interests_per_user: interests of a user.
        follow_probability: 0 to 1, how often a step depends on the last item.
        popularity_exponent: exponent of Zipf's law; 0 makes items of an interest equally popular.
        seed: of all random draws: one seed gives one log.

    Returns:
        user_id ("U000017") and item_id ("B000345") strings, timestamp in unix seconds, int64;
        sorted by user and time.

    Raises:
        ArgumentError: for counts below 1, or shares out of range.
    """
    _check(
        n_users=n_users,
        n_items=n_items,
        n_interests=n_interests,
        interests_per_user=interests_per_user,
    )
    if not 0 <= follow_probability <= 1:
        raise ArgumentError(
            "follow_probability", follow_probability, "no probability", "Pass a number from 0 to 1"
        )
    if mean_length < 3:
        raise ArgumentError("mean_length", mean_length, "too short to split", "Pass 3 or more")
    random = np.random.default_rng(seed)
    catalogue = _Catalogue.draw(random, n_items, min(n_interests, n_items), popularity_exponent)
    lengths = 2 + random.geometric(1 / (mean_length - 2), n_users)
    # Interests are of unequal popularity too, by Zipf's law.
    uniform = random.random((n_users, interests_per_user))
    interests = ((len(catalogue.first) + 1) ** uniform).astype(np.int64) - 1
    items = _walk(random, catalogue, interests, int(lengths.max()), follow_probability)
    times = _times(random, items.shape)
    inside = np.arange(items.shape[1]) < lengths[:, None]  # (n_users, longest)
    users = np.broadcast_to(np.arange(n_users)[:, None], items.shape)
    return pl.DataFrame({USER: users[inside], ITEM: items[inside], TIME: times[inside]}).select(
        pl.format("U{}", pl.col(USER).cast(pl.String).str.zfill(6)).alias(USER),
        pl.format("B{}", pl.col(ITEM).cast(pl.String).str.zfill(6)).alias(ITEM),
        TIME,
    )


@dataclass(frozen=True)
class _Catalogue:
    """Items numbered so that each interest is a run of consecutive numbers.

    Args:
        name: (n_items,) the public number of each item.
        first: (n_interests,) first item of each interest.
        size: (n_interests,) items of each interest.
        successors: (n_items, 4) items that tend to come next.
        exponent: of Zipf's law.
    """

    name: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]
    successors: NDArray[np.int64]
    exponent: float

    @classmethod
    def draw(
        cls, random: np.random.Generator, n_items: int, n_interests: int, exponent: float
    ) -> _Catalogue:
        bounds = np.linspace(0, n_items, n_interests + 1).astype(np.int64)
        first, size = bounds[:-1], np.diff(bounds)
        names = random.permutation(n_items)
        catalogue = cls(names, first, size, np.empty((n_items, 4), dtype=np.int64), exponent)
        interest = np.repeat(np.arange(n_interests), size)
        for column in range(4):
            catalogue.successors[:, column] = catalogue.popular(random, interest)
        return catalogue

    def popular(
        self, random: np.random.Generator, interest: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return one item of each interest, drawn by popularity."""
        uniform, size = random.random(interest.shape), self.size[interest]
        # Inverse of the distribution function of a continuous power law on [1, size + 1].
        if self.exponent == 1:
            rank = (size + 1.0) ** uniform
        else:
            power = 1 - self.exponent
            rank = (1 + uniform * ((size + 1.0) ** power - 1)) ** (1 / power)
        return self.first[interest] + np.minimum(rank.astype(np.int64) - 1, size - 1)


def _walk(
    random: np.random.Generator,
    catalogue: _Catalogue,
    interests: NDArray[np.int64],
    n_steps: int,
    follow_probability: float,
) -> NDArray[np.int64]:
    """Return (n_users, n_steps) public item numbers."""
    n_users, per_user = interests.shape
    rows = np.arange(n_users)
    items = np.empty((n_users, n_steps), dtype=np.int64)
    current = catalogue.popular(random, interests[:, 0])
    for step in range(n_steps):
        items[:, step] = current
        interest = interests[rows, random.integers(per_user, size=n_users)]
        fresh = catalogue.popular(random, interest)
        # The first successor is the likeliest.
        choice = np.minimum(random.geometric(0.6, n_users) - 1, catalogue.successors.shape[1] - 1)
        follow = random.random(n_users) < follow_probability
        current = np.where(follow, catalogue.successors[current, choice], fresh)
    return catalogue.name[items]


def _times(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return unix seconds: users start over a year and come back in bursts."""
    start = random.integers(_SECONDS_A_YEAR, size=(shape[0], 1))
    hours_between = random.exponential(1.0, shape) + np.where(
        random.random(shape) < 0.3, random.exponential(200.0, shape), 0.0
    )
    return 1_600_000_000 + start + (hours_between.cumsum(1) * 3600).astype(np.int64)


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ArgumentError(name, count, "less than one", "Pass 1 or more")
