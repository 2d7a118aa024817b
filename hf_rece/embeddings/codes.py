"""Codes that mean something: items that occur together get digits in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Literal, get_args

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from hf_rece.data.splits import HISTORY
from hf_rece.embeddings.digits import check_codes, code_numbers
from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import mixed_radix_digits

Quantiser = Literal["quantile", "kmeans"]


def codes_from_log(
    train: Dataset,
    n_rows: int,
    radices: Sequence[int],
    *,
    quantiser: Quantiser = "quantile",
    popularity_exponent: float = 2.0,
    seed: int = 0,
) -> Tensor:
    """Return a code for each item, made from who took what; no code twice.

    A truncated SVD of the (users x items) matrix gives each item a vector. "quantile" cuts each of
    k components into parts; "kmeans" cuts the vector into k pieces and clusters the items by each.

    An item's room is a share of each digit's values, in proportion to its count of interactions to
    the power popularity_exponent, one value at most. The most popular items thus have values of
    their own, and the rest share those that are left by twos or by dozens: a rare item that shared
    values with a popular one would hardly be heard in their gradients.

    Args:
        train: has item_ids, as leave_one_out_split and temporal_split return it.
        n_rows: C, padding and other special tokens included.
        radices: number of values of each of the k digits.
        quantiser: "quantile" or "kmeans".
        popularity_exponent: 0 gives every item equal room.
        seed: of the SVD, the clusters and the noise that parts equal vectors.

    Returns:
        (C, k) int64.

    Raises:
        ArgumentError: for an unknown quantiser, or more digits than the log has users or items.

    Reference:
        Petrov and Macdonald, 2024 (RecJPQ), arXiv 2312.06165, for SVD and quantiles. Differs by the
        room of popular items.
    """
    if quantiser not in get_args(Quantiser):
        raise ArgumentError("quantiser", quantiser, "no such quantiser", "Pass quantile or kmeans")
    n_digits = len(radices)
    per_digit = 1 if quantiser == "quantile" else _COLUMNS_A_CLUSTERING
    vectors = item_vectors(train, n_rows, n_digits * per_digit, seed=seed)
    counts = np.bincount(_flat_ids(train), minlength=n_rows)
    columns, lowest = [], []
    for j, radix in enumerate(radices):
        room = _room(np.maximum(counts, 1.0) ** popularity_exponent, radix)
        alone = np.flatnonzero(room >= 1)
        rest = np.flatnonzero(room < 1)
        column = np.empty(n_rows, dtype=np.int64)
        column[alone] = np.arange(len(alone))
        # Components by turns: each digit gets its share of the strong ones.
        piece, n_values = vectors[rest, j::n_digits], radix - len(alone)
        if len(rest):
            quantise = _quantiles if quantiser == "quantile" else _clusters
            column[rest] = len(alone) + quantise(piece, room[rest], n_values, seed)
        columns.append(column)
        lowest.append(min(len(alone), radix - 1))
    codes = torch.from_numpy(np.stack(columns, axis=1))
    return distinct_codes(codes, radices, lowest=lowest, seed=seed)


_COLUMNS_A_CLUSTERING = 4


def item_vectors(
    train: Dataset, n_rows: int, n_components: int, *, seed: int = 0
) -> NDArray[np.float32]:
    """Return (C, n_components) item vectors by truncated SVD of the (users x items) matrix.

    Rows are scaled by 1 / sqrt(length), so that long histories do not outweigh the others. Items
    that do not occur get noise.

    Raises:
        ArgumentError: if the log has fewer users or items than components, or more items than rows.
    """
    from scipy.sparse import csr_matrix  # heavy, and only codes from a log need it
    from sklearn.decomposition import TruncatedSVD

    lengths = np.array([len(history) for history in train.with_format("numpy")[HISTORY]])
    if n_components >= min(len(lengths), n_rows):
        raise ArgumentError(
            "radices",
            n_components,
            f"components wanted of {len(lengths)} users and {n_rows} items",
            "Pass fewer radices, or a larger log",
        )
    ids = _flat_ids(train)
    if ids.max() >= n_rows:
        raise ArgumentError(
            "train",
            int(ids.max()),
            f"largest item id, but there are {n_rows} rows",
            "Pass the log of the table's own tokenizer",
        )
    users = np.repeat(np.arange(len(lengths)), lengths)
    values = np.repeat(1 / np.sqrt(lengths), lengths).astype(np.float32)
    matrix = csr_matrix((values, (users, ids)), shape=(len(lengths), n_rows))
    svd = TruncatedSVD(n_components, random_state=seed).fit(matrix)
    vectors = (svd.components_ * svd.singular_values_[:, None]).T.astype(np.float32)
    # Noise far below the data parts what the data cannot.
    noise = np.random.default_rng(seed).standard_normal(vectors.shape).astype(np.float32)
    return vectors + 1e-5 * vectors.std(0) * noise  # type: ignore[no-any-return]


def distinct_codes(
    codes: Tensor, radices: Sequence[int], *, lowest: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """Return codes (C, k) in which all but the first of equal ones are changed, so that none is.

    The last digit is drawn anew; where its values are all taken, all digits are.

    Args:
        codes: (C, k) integers.
        radices: number of values of each digit.
        lowest: smallest digits that are drawn, where there are enough codes of such; None for 0.
        seed: of the draws.

    Raises:
        ArgumentError: if the radices cannot number C ids, or a digit is out of range.
    """
    n_codes = math.prod(radices)
    if n_codes < len(codes):
        raise ArgumentError(
            "radices", list(radices), f"they cannot number {len(codes)} ids", "Pass larger ones"
        )
    codes = codes.long().clone()
    generator = torch.Generator().manual_seed(seed)
    low = list(lowest or [0] * len(radices))
    n_inside = int((codes >= torch.tensor(low)).all(1).sum())
    if math.prod(radix - first for radix, first in zip(radices, low, strict=True)) < n_inside:
        low = [0] * len(radices)
    for _ in range(_DRAWS):
        rows = _repeated(codes, radices)
        codes[rows, -1] = torch.randint(low[-1], radices[-1], (len(rows),), generator=generator)
    rows = _repeated(codes, radices)
    if n_codes <= _FEW_CODES * len(codes):
        numbers = torch.arange(n_codes)
        free = numbers[~torch.isin(numbers, code_numbers(codes, radices))]
        free = free[torch.randperm(len(free), generator=generator)]
        digits = torch.stack(mixed_radix_digits(free, radices), dim=1)
        preferred = (digits >= torch.tensor(low)).all(1).int()
        codes[rows] = digits[preferred.argsort(descending=True, stable=True)[: len(rows)]]
    draws = count()
    while len(rows := _repeated(codes, radices)):  # of many codes, most are free
        if next(draws) == _DRAWS:
            low = [0] * len(radices)
        for column, radix in enumerate(radices):
            drawn = torch.randint(low[column], radix, (len(rows),), generator=generator)
            codes[rows, column] = drawn
    check_codes(codes, radices)
    return codes


_DRAWS, _FEW_CODES = 8, 16


def _repeated(codes: Tensor, radices: Sequence[int]) -> Tensor:
    """Return the ids whose code an earlier id has."""
    number = code_numbers(codes, radices)
    order = number.argsort(stable=True)
    return order[1:][number[order[1:]] == number[order[:-1]]]


def _flat_ids(train: Dataset) -> NDArray[np.int64]:
    return np.concatenate(list(train.with_format("numpy")[HISTORY])).astype(np.int64)


def _room(weights: NDArray[np.float64], n_values: int) -> NDArray[np.float64]:
    """Return min(1, c * weight) (C,) with the c for which they add up to n_values, or less."""
    if n_values >= len(weights):
        return np.ones_like(weights)
    falling = np.sort(weights)[::-1]
    rest = falling.sum() - np.concatenate([[0.0], falling.cumsum()[:-1]])
    # With the n largest at 1, the others share n_values - n: the first n for which none exceeds 1.
    scale = (n_values - np.arange(n_values)) / rest[:n_values]
    n_alone = int(np.argmax(scale * falling[:n_values] < 1))
    room: NDArray[np.float64] = np.minimum(1.0, scale[n_alone] * weights)
    return room


def _quantiles(
    vectors: NDArray[np.float32], room: NDArray[np.float64], n_values: int, seed: int
) -> NDArray[np.int64]:
    """Return values (n,) below n_values, cut along a component (n, 1) by the items' room."""
    order = vectors[:, 0].argsort(kind="stable")
    filled = room[order].cumsum()
    middle = (filled - room[order] / 2) / filled[-1]
    values = np.empty(len(order), dtype=np.int64)
    values[order] = np.minimum((middle * n_values).astype(np.int64), n_values - 1)
    return values


def _clusters(
    vectors: NDArray[np.float32], room: NDArray[np.float64], n_values: int, seed: int
) -> NDArray[np.int64]:
    """Return cluster numbers (n,) below n_values of vectors (n, d), weighted by their room."""
    from sklearn.cluster import MiniBatchKMeans

    clusters = MiniBatchKMeans(
        min(n_values, len(vectors)), random_state=seed, n_init=1, batch_size=4096, max_iter=50
    )
    return clusters.fit_predict(vectors, sample_weight=room).astype(np.int64)  # type: ignore[no-any-return]
