"""Codes that mean something: items that occur together get digits in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    seed: int = 0,
) -> Tensor:
    """Return a code for each item, made from who took what; no code twice.

    A truncated SVD of the (users x items) matrix gives each item a vector. "quantile" cuts each of
    k components into parts with equally many items; "kmeans" cuts the vector into k parts and
    clusters the items by each.

    Args:
        train: has item_ids, as leave_one_out_split and temporal_split return it.
        n_rows: C, padding and other special tokens included.
        radices: number of values of each of the k digits.
        quantiser: "quantile" or "kmeans".
        seed: of the SVD, the clusters and the noise that parts equal vectors.

    Returns:
        (C, k) int64.

    Raises:
        ArgumentError: for an unknown quantiser, or more digits than the log has users or items.

    Reference:
        Petrov and Macdonald, 2024 (RecJPQ), arXiv 2312.06165, for SVD and quantiles.
    """
    if quantiser not in get_args(Quantiser):
        raise ArgumentError("quantiser", quantiser, "no such quantiser", "Pass quantile or kmeans")
    per_digit = 1 if quantiser == "quantile" else _COLUMNS_A_CLUSTERING
    vectors = item_vectors(train, n_rows, len(radices) * per_digit, seed=seed)
    if quantiser == "quantile":
        codes = _quantile_codes(vectors, radices)
    else:
        codes = _kmeans_codes(vectors, radices, seed)
    return distinct_codes(torch.from_numpy(codes), radices, seed=seed)


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

    histories = train.with_format("numpy")[HISTORY]
    lengths = np.array([len(history) for history in histories])
    if n_components >= min(len(lengths), n_rows):
        raise ArgumentError(
            "radices",
            n_components,
            f"components wanted of {len(lengths)} users and {n_rows} items",
            "Pass fewer radices, or a larger log",
        )
    ids = np.concatenate(list(histories))
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


def distinct_codes(codes: Tensor, radices: Sequence[int], *, seed: int = 0) -> Tensor:
    """Return codes (C, k) in which all but the first of equal ones are changed, so that none is.

    The last digit is drawn anew; where its values are all taken, all digits are.

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
    for _ in range(_DRAWS):
        rows = _repeated(codes, radices)
        codes[rows, -1] = torch.randint(radices[-1], (len(rows),), generator=generator)
    rows = _repeated(codes, radices)
    if n_codes <= _FEW_CODES * len(codes):
        numbers = torch.arange(n_codes)
        free = numbers[~torch.isin(numbers, code_numbers(codes, radices))]
        drawn = free[torch.randperm(len(free), generator=generator)[: len(rows)]]
        codes[rows] = torch.stack(mixed_radix_digits(drawn, radices), dim=1)
    while len(rows := _repeated(codes, radices)):  # of many codes, most are free
        for column, radix in enumerate(radices):
            codes[rows, column] = torch.randint(radix, (len(rows),), generator=generator)
    check_codes(codes, radices)
    return codes


_DRAWS, _FEW_CODES = 8, 16


def _repeated(codes: Tensor, radices: Sequence[int]) -> Tensor:
    """Return the ids whose code an earlier id has."""
    number = code_numbers(codes, radices)
    order = number.argsort(stable=True)
    return order[1:][number[order[1:]] == number[order[:-1]]]


def _quantile_codes(vectors: NDArray[np.float32], radices: Sequence[int]) -> NDArray[np.int64]:
    n_rows = len(vectors)
    ranks = vectors.argsort(0, kind="stable").argsort(0, kind="stable")
    return ranks * np.array(radices, dtype=np.int64) // n_rows


def _kmeans_codes(
    vectors: NDArray[np.float32], radices: Sequence[int], seed: int
) -> NDArray[np.int64]:
    from sklearn.cluster import MiniBatchKMeans

    # Components by turns: each digit gets its share of the strong ones.
    parts = [vectors[:, j :: len(radices)] for j in range(len(radices))]
    columns = []
    for part, radix in zip(parts, radices, strict=True):
        clusters = MiniBatchKMeans(
            min(radix, len(part)), random_state=seed, n_init=1, batch_size=4096, max_iter=50
        )
        columns.append(clusters.fit_predict(part).astype(np.int64))
    return np.stack(columns, axis=1)
