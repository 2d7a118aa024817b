"""Min-hash signatures of items: a few bytes that tell how alike the sets of their users are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pandas.util import hash_array
from torch import Tensor

from hf_rece.data.interactions import ITEM, USER
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import HISTORY
from hf_rece.embeddings.mixing import mix, mixed
from hf_rece.errors import ArgumentError, DataError

KEY_BITS = 16
MOST_KEYS = 8  # running minima of 32 bits: 32 bytes an item
_BATCH_ROWS = 2**18

# Token ids (n,) int64 and hashed users (n,) uint64 of n interactions.
Batch = tuple[NDArray[np.int64], NDArray[np.uint64]]


def min_hash_signatures(
    batches: Iterable[Batch], n_rows: int, *, n_keys: int = 8, seed: int = 0
) -> Tensor:
    """Return each item's signature: n_keys min-hashes of the set of users in which it occurs.

    A key of two items is equal with probability J, the Jaccard similarity of their sets (plus
    2^-16 by chance). Items that do not occur get keys hashed from their ids. So does one key of
    every item but the first of several whose keys all agree, by equal sets or, with probability
    J^n_keys, by chance: they would be one item otherwise.

    Args:
        batches: interactions in pieces, from split_batches or parquet_batches; read once.
        n_rows: C, padding and other special tokens included.
        n_keys: keys of an item, 1 to 8.
        seed: of the hash functions.

    Returns:
        (C, n_keys) int16.

    Raises:
        ArgumentError: if n_keys is out of range, or an id is not below n_rows.

    Memory:
        4 n_keys bytes an item, at most 32, and one batch.
    """
    if not 1 <= n_keys <= MOST_KEYS:
        raise ArgumentError(
            "n_keys", n_keys, "no size of a signature", f"Pass 1 to {MOST_KEYS} keys"
        )
    smallest = np.full((n_keys, n_rows), 2**32 - 1, dtype=np.uint32)
    seeds = mixed(seed, "users", n_keys)
    for ids, users in batches:
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_rows:
            raise ArgumentError(
                "batches",
                (int(ids.min()), int(ids.max())),
                f"smallest and largest id, but there are {n_rows} rows",
                "Pass the ids of the table's tokenizer",
            )
        for of_key, key_seed in zip(smallest, seeds, strict=True):
            hashed = (mix(users ^ key_seed) >> np.uint64(32)).astype(np.uint32)
            np.minimum.at(of_key, ids, hashed)
    keys = np.empty((n_rows, n_keys), dtype=np.int16)
    for column, of_key in enumerate(smallest):
        # Equal minima give equal keys; the odd factor spreads small minima over 16 bits.
        spread = (of_key * np.uint32(0x9E3779B1)) >> np.uint32(32 - KEY_BITS)
        keys[:, column] = spread.astype(np.uint16).view(np.int16)
    cold = (smallest == 2**32 - 1).all(0).nonzero()[0]
    keys[cold] = own_keys(cold, n_keys, seed)
    return torch.from_numpy(_set_apart(keys, seed))


def own_keys(ids: NDArray[np.int64], n_keys: int, seed: int) -> NDArray[np.int16]:
    """Return keys (n, n_keys) that are hashes of the ids (n,): unlike those of any other id."""
    keys = np.empty((len(ids), n_keys), dtype=np.int16)
    for column, key_seed in enumerate(mixed(seed, "own", n_keys)):
        hashed = mix(ids.astype(np.uint64) ^ key_seed) >> np.uint64(64 - KEY_BITS)
        keys[:, column] = hashed.astype(np.uint16).view(np.int16)
    return keys


def split_batches(train: Dataset) -> Iterator[Batch]:
    """Yield the interactions of the train part of a split, each sequence a user.

    Args:
        train: has item_ids, as leave_one_out_split and temporal_split return it.
    """
    first = 0
    for table in train.with_format("arrow").iter(2**16):
        histories = table[HISTORY].combine_chunks()
        lengths = np.diff(histories.offsets.to_numpy())
        ids = histories.flatten().to_numpy().astype(np.int64)
        users = np.repeat(np.arange(first, first + len(lengths), dtype=np.uint64), lengths)
        first += len(lengths)
        yield ids, mix(users)


def parquet_batches(
    source: str | Path | Sequence[str],
    tokenizer: ItemTokenizer,
    *,
    user_column: str = USER,
    item_column: str = ITEM,
) -> Iterator[Batch]:
    """Yield the interactions of a Parquet log in one pass, without reading it whole.

    Pass training interactions only: signatures of a whole log would tell of held-out items.

    Args:
        source: a file, a folder, or files.
        tokenizer: knows every item of the log.
        user_column: the log's column of user ids.
        item_column: the log's column of item ids.

    Raises:
        DataError: for a log that cannot be read, has no such columns, nulls, or items that the
            tokenizer does not know.
    """
    try:
        log = pa.dataset.dataset(source, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(str(source), f"not a Parquet log: {error}", "Check the path") from error
    missing = {user_column, item_column} - set(log.schema.names)
    if missing:
        raise DataError(
            Path(str(source)).name,
            f"there is no column {', '.join(sorted(missing))} among {', '.join(log.schema.names)}",
            "Pass user_column and item_column",
        )
    vocabulary = tokenizer.item_table()
    for piece in log.to_batches(columns=[user_column, item_column], batch_size=_BATCH_ROWS):
        frame = pl.DataFrame(pl.from_arrow(piece))
        yield _token_ids(frame[item_column], vocabulary), _hashed(frame[user_column])


def _token_ids(items: pl.Series, vocabulary: pl.DataFrame) -> NDArray[np.int64]:
    dtype = vocabulary.schema[ITEM]
    frame = items.cast(dtype, strict=False).alias(ITEM).to_frame()
    ids = frame.join(vocabulary, on=ITEM, how="left", maintain_order="left")["token_id"]
    unknown = items.filter(ids.is_null())
    if len(unknown):
        shown = ", ".join(map(repr, unknown.unique(maintain_order=True)[:5]))
        raise DataError(
            f"column {items.name!r}",
            f"{len(unknown)} items are not the tokenizer's: {shown}",
            "Pass the log that the tokenizer was made from, or leave these items out",
        )
    return ids.to_numpy()


def _hashed(users: pl.Series) -> NDArray[np.uint64]:
    if users.is_null().any():
        raise DataError(
            f"column {users.name!r}", f"{users.is_null().sum()} users are null", "Drop these rows"
        )
    if users.dtype.is_unsigned_integer():
        return mix(users.cast(pl.UInt64).to_numpy())
    if users.dtype.is_integer():
        return mix(users.cast(pl.Int64).to_numpy().view(np.uint64))
    hashed: NDArray[np.uint64] = hash_array(users.cast(pl.String).to_numpy().astype(object))
    return hashed


def _set_apart(keys: NDArray[np.int16], seed: int) -> NDArray[np.int16]:
    """Give a key of its own to every row but the first of those with equal signatures."""
    folded = np.zeros(len(keys), dtype=np.uint64)
    for column in keys.T:
        folded = mix(folded ^ column.astype(np.uint64))
    rows = (~pl.Series(folded).is_first_distinct()).to_numpy().nonzero()[0]
    columns = rows % keys.shape[1]
    keys[rows, columns] = own_keys(rows, keys.shape[1], seed)[np.arange(len(rows)), columns]
    return keys
