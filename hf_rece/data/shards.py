"""The histories of a bucket as shards of training, validation and test rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hf_rece.data.interactions import USER
from hf_rece.data.kept import Kept, column, kept_places
from hf_rece.data.partition import CODES, TIMES, Advance, Buckets
from hf_rece.data.prepared import SPLITS, shard_path
from hf_rece.data.splits import HISTORY, TARGET
from hf_rece.files import complete_file

_ROWS_A_GROUP = 1 << 13


@dataclass(frozen=True)
class Histories:
    """Histories as token ids, one after another.

    Args:
        users: (users,) ids.
        tokens: (interactions,) int32.
        starts: (users,) int64, where each begins.
        lengths: (users,) int64.
        is_late: (users,) bool, active after the point of a temporal split; None for leave-one-out.
    """

    users: pa.Array
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    is_late: NDArray[np.bool_] | None

    def splits(self) -> dict[str, pa.Table]:
        """Return the rows of train, validation and test, as leave_one_out_split or temporal_split.

        Users stay in their order.
        """
        held_out = self.lengths >= 3
        if self.is_late is None:
            in_training = np.where(held_out, self.lengths - 2, self.lengths)
        else:
            held_out &= self.is_late
            in_training = np.where(self.is_late, 0, self.lengths)
        (users,) = np.nonzero(held_out)
        return {
            "train": self._beginnings(np.nonzero(in_training >= 2)[0], in_training),
            "validation": self._with_target(users, self.lengths - 2),
            "test": self._with_target(users, self.lengths - 1),
        }

    def _beginnings(self, users: NDArray[np.int64], lengths: NDArray[np.int64]) -> pa.Table:
        """Return user_id and item_ids, the first items of some users, lengths (users,)."""
        lengths = lengths[users]
        ends = np.append(0, lengths.cumsum())
        places = np.arange(ends[-1]) + np.repeat(self.starts[users] - ends[:-1], lengths)
        histories = pa.ListArray.from_arrays(ends.astype(np.int32), self.tokens[places])
        return pa.table({USER: self.users.take(pa.array(users)), HISTORY: histories})

    def _with_target(self, users: NDArray[np.int64], lengths: NDArray[np.int64]) -> pa.Table:
        targets = self.tokens[(self.starts + lengths)[users]]
        return self._beginnings(users, lengths).append_column(TARGET, pa.array(targets))


def write_shards(
    folder: Path, buckets: Buckets, kept: Kept, min_user: int, advance: Advance
) -> None:
    """Write the shards of all buckets, and leave out those that are there.

    Args:
        folder: of the prepared log.
        buckets: grouped.
        kept: what is kept of them.
        min_user: fewest interactions of a user that stays.
        advance: told 1 for each bucket.

    Raises:
        WriteError: as complete_file.
    """
    tokens = kept.tokens
    for bucket in range(buckets.n_buckets):
        paths = [shard_path(folder, name, bucket, buckets.n_buckets) for name in SPLITS]
        if not all(path.exists() for path in paths):
            histories = _histories(buckets, bucket, kept, tokens, min_user)
            write_splits(folder, bucket, buckets.n_buckets, histories)
        advance(1)


def write_splits(folder: Path, shard: int, n_shards: int, histories: Histories) -> None:
    """Write the train, validation and test rows of a shard.

    Args:
        folder: of the prepared log.
        shard: from 0.
        n_shards: of each split.
        histories: of the shard's users, in ascending order.

    Raises:
        WriteError: as complete_file.
    """
    for name, table in histories.splits().items():
        with complete_file(shard_path(folder, name, shard, n_shards)) as file:
            pq.write_table(
                table, file, row_group_size=_ROWS_A_GROUP, compression="zstd", use_dictionary=False
            )


def _histories(
    buckets: Buckets, bucket: int, kept: Kept, tokens: NDArray[np.int32], min_user: int
) -> Histories:
    """Return what is kept of a bucket."""
    table = buckets.read(bucket, [USER, CODES, *([TIMES] if kept.point is not None else [])])
    codes = column(table, CODES)
    places, lengths = kept_places(codes, kept.counts > 0, min_user)
    is_late = None
    if kept.point is not None:
        times = column(table, TIMES).values.to_numpy()[places]
        last = lengths.cumsum() - 1  # -1 for users before the first who has any: never late
        is_late = np.append(times, kept.point)[last] > kept.point
    return Histories(
        users=table[USER].combine_chunks(),
        tokens=tokens[codes.values.to_numpy()[places]],
        starts=np.append(0, lengths.cumsum())[:-1],
        lengths=lengths,
        is_late=is_late,
    )
