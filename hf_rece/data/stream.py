"""Training rows from disk in a new order each epoch: each once, and from any place on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from hf_rece.data.prepared import PreparedSplit, Row, Rows
from hf_rece.errors import ArgumentError


class SequenceStream(IterableDataset[Row]):
    """Streams the rows of a split, shuffled anew each epoch.

    The order is a function of seed, epoch and number of processes: row groups, 8192 users each, are
    put in random order and cut in equal parts, one a process; each part is shuffled in windows of
    buffer_size rows. So any place of an epoch is reached at once, and nothing but a window is in
    memory. Each row comes once an epoch; where the rows do not divide by the processes, at most as
    many as there are processes come twice, for all processes do the same number of steps.

    RecommenderTrainer splits a stream over its processes and workers, sets its epoch, and resumes
    it where a checkpoint was written. In loops of your own: split_by_node, set_epoch and, with any
    DataLoader (workers take rows in turn), state_dict and load_state_dict.

    Args:
        split: usually the train split of a prepared log.
        shuffle: False for the order on the disk.
        seed: of the order.
        buffer_size: rows that are shuffled with each other and held in memory.

    Raises:
        ArgumentError: if buffer_size < 1.
    """

    def __init__(
        self,
        split: PreparedSplit,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer_size: int = 1 << 16,
    ) -> None:
        if buffer_size < 1:
            raise ArgumentError("buffer_size", buffer_size, "holds no row", "Pass 1 or more")
        self.split, self.shuffle, self.seed, self.buffer_size = split, shuffle, seed, buffer_size
        self._rank, self._world_size = 0, 1
        # Where workers that stay from epoch to epoch see it.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._progress: dict[str, int] = {}
        self._resume: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the rows that this process gets in an epoch."""
        return -(-len(self.split) // self._world_size)

    @property
    def info(self) -> DatasetInfo:
        """What datasets.Dataset has under this name: the description."""
        return self.split.info

    @property
    def epoch(self) -> int:
        """The epoch whose order is next."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch from the next iteration on."""
        self._epoch.fill_(epoch)

    def split_by_node(self, rank: int, world_size: int) -> SequenceStream:
        """Return the part of one of several processes.

        Raises:
            ArgumentError: if there is no such process.
        """
        if not 0 <= rank < world_size:
            raise ArgumentError("rank", rank, f"there are {world_size}", "Pass one from 0 on")
        part = copy.copy(self)
        part._epoch = self._epoch.clone().share_memory_()
        part._rank, part._world_size = rank, world_size
        return part

    def order(self) -> EpochOrder:
        """Return the rows of this process in the order of the epoch."""
        return EpochOrder(self, self.epoch, self._rank * len(self.split) // self._world_size)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        index, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, self._resume = self._first_of(index, step), {}
        order = self.order()
        self._progress = self._state(first, step)
        for position in range(first, len(self), step):
            self._progress = self._state(position + step, step)
            yield order[position]

    def state_dict(self) -> dict[str, int]:
        """Return where the iteration stands in this process, or in this worker.

        After the last row it stands at the end of the epoch, until another one is set.
        """
        for state in (self._resume, self._progress):
            if state.get("epoch") == self.epoch:
                return {"step": 1, **state}
        return self._state(0, 1)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on, in the next iteration, where the state was taken.

        Args:
            state: of state_dict, or {"epoch": e, "position": rows to leave out}.
        """
        self.set_epoch(state["epoch"])
        self._resume = dict(state)

    def _state(self, position: int, step: int) -> dict[str, int]:
        return {"epoch": self.epoch, "position": position, "step": step}

    def _first_of(self, index: int, step: int) -> int:
        """Return the first row of a worker."""
        if self._resume.get("epoch") != self.epoch:
            return index
        of_worker = self._resume.get("step", 1)
        if of_worker == 1:  # one state for all workers: they share what is left
            return self._resume["position"] + index
        if of_worker != step:
            raise ArgumentError(
                "num_workers", step, f"the state is of {of_worker} workers", f"Pass {of_worker}"
            )
        return self._resume["position"]


class EpochOrder:
    """The rows of one process in the order of an epoch; meant to be read from front to back.

    Args:
        stream: whose rows.
        epoch: whose order.
        first: place in the order of all processes where this one begins.
    """

    def __init__(self, stream: SequenceStream, epoch: int, first: int) -> None:
        self._stream, self._epoch, self._first = stream, epoch, first
        groups = stream.split.groups
        # The same for all processes, which share the groups.
        self._groups = [groups[i] for i in self._shuffled(len(groups), 0)]
        self._ends = np.cumsum([group.rows for group in self._groups])
        self._window: tuple[int, Rows, NDArray[np.int64]] | None = None
        self._last: tuple[int, pa.Table] | None = None

    def __getitem__(self, position: int) -> Row:
        start = position - position % self._stream.buffer_size
        if self._window is None or self._window[0] != start:
            rows, first = (
                min(self._stream.buffer_size, len(self._stream) - start),
                self._first + start,
            )
            self._window = start, self._read(first, rows), self._shuffled(rows, 1 + first)
        _, found, order = self._window
        return found[order[position - start]]

    def _shuffled(self, n: int, what: int) -> NDArray[np.int64]:
        """Return the numbers below n in an order of its own for this epoch and `what`."""
        if not self._stream.shuffle:
            return np.arange(n)
        return np.random.default_rng([self._stream.seed, self._epoch, what]).permutation(n)

    def _read(self, start: int, rows: int) -> Rows:
        """Return some rows of the order before they are shuffled."""
        tables, place = [], int(np.searchsorted(self._ends, start, side="right"))
        while rows > 0:
            group = self._groups[place]
            skipped = start - (int(self._ends[place]) - group.rows)
            if self._last is None or self._last[0] != place:
                self._last = place, group.read()
            tables.append(self._last[1][skipped : skipped + rows])
            rows, start, place = rows - len(tables[-1]), start + len(tables[-1]), place + 1
        return Rows(pa.concat_tables(tables).combine_chunks())
