"""Classes cut over processes: who holds which rows, and the collectives that this takes.

Each function below that says "collective" is called by all processes of the group, and exchanges a
number of messages that depends on no data: a process without a token calls it like any other.

Where there are more processes than hold a vocabulary together, several groups hold it, each the
whole, as a DeviceMesh ("data", "vocab") arranges them:

    vocab:     0         1         2         3
    data: 0    rank 0    rank 1    rank 2    rank 3     tokens meet the classes of their own row
          1    rank 4    rank 5    rank 6    rank 7     gradients are averaged over a column
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from hf_rece.errors import ArgumentError
from hf_rece.ops import messages
from hf_rece.ops.rows import OutputRows, accumulation_dtype


@dataclass(frozen=True)
class VocabShards:
    """C classes in one contiguous shard a process; shard sizes differ by one at most.

    Args:
        n_classes: C.
        rank: of this process in the group.
        world_size: processes of the group, which hold all classes together.
        group: process group; None for the default one, and for a process on its own.
        data_rank: of this process among those that hold the same classes in other groups.
        data_size: number of groups, each of which holds all classes.
        data_group: process group of those that hold the same classes; None for no others.
    """

    n_classes: int
    rank: int = 0
    world_size: int = 1
    group: Any = None
    data_rank: int = 0
    data_size: int = 1
    data_group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabShards:
        return self  # a process group cannot be copied

    @property
    def is_main(self) -> bool:
        """Whether this process is the first of all: the one that writes."""
        return self.rank == self.data_rank == 0

    @property
    def first(self) -> int:
        """The first class of this process."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """One past the last class of this process."""
        return self.bounds[self.rank + 1]

    @property
    def n_local(self) -> int:
        """The number of classes of this process."""
        return self.stop - self.first

    @property
    def bounds(self) -> list[int]:
        """The first class of each process, and C."""
        return [rank * self.n_classes // self.world_size for rank in range(self.world_size + 1)]

    @property
    def sizes(self) -> list[int]:
        """The number of classes of each process."""
        return [stop - first for first, stop in pairwise(self.bounds)]

    def owners(self, ids: Tensor) -> Tensor:
        """Return the rank that holds each class id."""
        return ((ids + 1) * self.world_size - 1) // self.n_classes

    def is_local(self, ids: Tensor) -> Tensor:
        """Return whether this process holds each class id."""
        return (ids >= self.first) & (ids < self.stop)

    def localise(self, ids: Tensor, outside: int) -> Tensor:
        """Return class ids as rows of this process's shard, those of other processes as given."""
        return (ids - self.first).masked_fill_(~self.is_local(ids), outside)

    def cut(self, values: Tensor) -> Tensor:
        """Return this process's rows of values that have a row for each class; others as given."""
        if values.dim() == 0 or len(values) != self.n_classes:
            return values
        return values[self.first : self.stop].clone()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of values over the processes, in place. Collective."""
        if self.world_size > 1:
            messages.reduce_all(values, "sum", self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of the processes' values, in place. Collective."""
        if self.world_size > 1:
            messages.reduce_all(values, "max", self.group)
        return values

    def join(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the values (sum of sizes, ...) of all processes, in order of rank. Collective.

        Args:
            values: (own size, ...).
            sizes: of each process, known to all.
        """
        longest = max(sizes)
        if self.world_size == 1 or longest == 0:
            return values
        width = values.shape[1:].numel()
        padded = values.new_empty(longest, width)
        padded[: len(values)] = values.reshape(len(values), width)
        pieces = messages.gather_all(padded, self.world_size, self.group)
        joined = torch.cat([piece[:n] for piece, n in zip(pieces, sizes, strict=True)])
        return joined.view(-1, *values.shape[1:])

    def exchange(self, values: Tensor, n_sent: Sequence[int], n_received: Sequence[int]) -> Tensor:
        """Return the rows that the others send to this process, by rank. Collective.

        Args:
            values: (sum of n_sent, ...), rows for the first process, for the second, and so on.
            n_sent: rows for each process.
            n_received: rows of each process.
        """
        return messages.exchange(values, n_sent, n_received, self.group)

    def take_from_first(self, values: Tensor) -> Tensor:
        """Return the first process's values, in place. Collective."""
        if self.world_size > 1:
            messages.take_from_first(values, self.group)
        return values

    def take_from_main(self, values: Tensor) -> Tensor:
        """Return the values of the first process of all groups, in place. Collective in all."""
        if self.data_size > 1:
            messages.take_from_first(values, self.data_group)
        return self.take_from_first(values)

    def average_over_data(self, values: Tensor) -> Tensor:
        """Return the mean of values over the groups, in place. Collective in all groups."""
        if self.data_size > 1:
            messages.reduce_all(values, "sum", self.data_group).div_(self.data_size)
        return values

    def wait_for_all(self) -> None:
        """Return when all processes of all groups have called this. Collective in all."""
        if self.world_size > 1:
            messages.wait_for_all(self.group)
        if self.data_size > 1:
            messages.wait_for_all(self.data_group)

    def share_tokens(
        self, *counts: int, device: torch.device, error: ArgumentError | None = None
    ) -> SharedTokens:
        """Return who brings how many tokens. Collective.

        Args:
            *counts: this process's number of tokens, and other numbers to tell the others.
            device: of the message.
            error: what is wrong in this process, and is raised in all: else they would wait for it.

        Raises:
            ArgumentError: the error of a process; in others it names the process.
        """
        text = str(error or "").encode()
        own = torch.tensor([[*counts, len(text)]], device=device)
        told = self.join(own, [1] * self.world_size).tolist()
        lengths = [of_process.pop() for of_process in told]
        if any(lengths):
            texts = self.join(torch.tensor(list(text), dtype=torch.uint8, device=device), lengths)
            rank = next(rank for rank, length in enumerate(lengths) if length)
            first = bytes(texts[: lengths[rank]].tolist()).decode().rstrip(".")
            raise error or ArgumentError("process", rank, first, "Correct it there")
        return SharedTokens(told, self)


def shard_classes(n_classes: int, group: Any = None) -> VocabShards:
    """Return how C classes are cut over a process group.

    Args:
        n_classes: C.
        group: process group, or a DeviceMesh as vocab_mesh returns it, whose rows hold all classes
            each; None for all processes, or for this one where there are no others.

    Raises:
        ArgumentError: if there are fewer classes than processes.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return VocabShards(n_classes)
    data: Any = (0, 1, None)
    if isinstance(group, DeviceMesh):
        columns = group.get_group("data")
        data = columns.rank(), columns.size(), columns
        group = group.get_group("vocab")
    world_size = distributed.get_world_size(group)
    if n_classes < world_size:
        raise ArgumentError(
            "n_classes", n_classes, f"cannot be cut over {world_size} processes", "Use fewer"
        )
    return VocabShards(n_classes, distributed.get_rank(group), world_size, group, *data)


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of all processes, in the order of ranks.

    Args:
        counts: for each process its number of tokens, and what else it told.
        shards: whose processes these are.
    """

    counts: list[list[int]]
    shards: VocabShards

    @property
    def sizes(self) -> list[int]:
        """The number of tokens of each process."""
        return [counts[0] for counts in self.counts]

    @property
    def own(self) -> slice:
        """Where this process's tokens are among those of all."""
        first = self.before(0)
        return slice(first, first + self.sizes[self.shards.rank])

    def before(self, which: int) -> int:
        """Return the sum over the processes before this one of a number that was told."""
        return sum(counts[which] for counts in self.counts[: self.shards.rank])

    def total(self, which: int) -> int:
        """Return the sum over all processes of a number that was told."""
        return sum(counts[which] for counts in self.counts)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (N, ...) of all tokens. Collective, and so is its backward.

        The gradient of own values is the sum over the processes of theirs.

        Args:
            values: (own tokens, ...).
        """
        if self.shards.world_size == 1 or self.total(0) == 0:
            return values
        gathered: Tensor = _Gather.apply(values, self)
        return gathered


class _Gather(torch.autograd.Function):
    """Values of all processes; backward, each process gets the sum of its own tokens' parts."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: SharedTokens) -> Tensor:
        ctx.tokens = tokens
        return tokens.shards.join(values, tokens.sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shards, sizes = ctx.tokens.shards, ctx.tokens.sizes
        n_own = sizes[shards.rank]
        parts = shards.exchange(grad, sizes, [n_own] * shards.world_size)
        # Added up here, in a wide type and always in the same order.
        wide = accumulation_dtype(grad.dtype)
        of_processes = parts.view(shards.world_size, n_own, *grad.shape[1:])
        return of_processes.sum(0, dtype=wide).to(grad.dtype), None


@dataclass(frozen=True)
class ShardedRows:
    """Output rows of which each process holds a shard; reading and adding are collective.

    The losses read none of these rows: each process scores the tokens of all against its own shard,
    see hf_rece.ops.vocab_parallel. `rows` and `add_grad` serve the input lookup. Where several
    groups hold all classes each, gradients are means over a group, for average_over_data to join.

    Args:
        local: this process's rows, classes `shards.first` to `shards.stop`.
        shards: how the classes are cut.
    """

    local: OutputRows
    shards: VocabShards

    @property
    def n_rows(self) -> int:
        """C, the number of classes of all processes."""
        return self.shards.n_classes

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.local.width

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of this process's rows."""
        return self.local.tensors()

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D) of class ids (K,), this process's own question. Collective.

        Raises:
            ArgumentError: in all processes, if an id of one of them is out of range.
        """
        if self.shards.world_size == 1:
            return self.local.rows(ids)
        questions = _Questions.ask(self._ids(ids), self.shards)
        return questions.answer(self.local.rows(questions.asked))

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the mean over the processes of their rows' gradients, as DDP would. Collective.

        Each process brings ids (K,) and grad (K, D) of its own.
        """
        if self.shards.world_size == 1:
            self.local.add_grad(grads, ids, grad)
            return
        questions = _Questions.ask(self._ids(ids), self.shards)
        received = questions.send(grad / self.shards.world_size)
        self.local.add_grad(grads, questions.asked, received)

    def _ids(self, ids: Tensor | slice) -> Tensor:
        if isinstance(ids, Tensor):
            return ids
        every = range(*ids.indices(self.n_rows))
        device = self.tensors()[0].device
        return torch.arange(every.start, every.stop, every.step, device=device)


@dataclass(frozen=True)
class _Questions:
    """Who asks whom for which rows.

    Args:
        order: (K,) own ids, sorted by the process that holds them.
        n_asking: for each process, ids that this one asks it for.
        n_asked: for each process, ids that it asks this one for.
        asked: (sum of n_asked,) rows of the own shard that others ask for, by rank.
        shards: how the classes are cut.
    """

    order: Tensor
    n_asking: list[int]
    n_asked: list[int]
    asked: Tensor
    shards: VocabShards

    @classmethod
    def ask(cls, ids: Tensor, shards: VocabShards) -> _Questions:
        """Tell each process what is asked of it. Collective."""
        outside = (ids < 0) | (ids >= shards.n_classes)
        owners = shards.owners(ids).clamp_(0, shards.world_size - 1)
        counts = torch.bincount(owners, minlength=shards.world_size)
        # An id that is nobody's: all are told, so that none waits for an answer.
        counts = torch.where(outside.any(), -1, counts)
        one_each = [1] * shards.world_size
        told = shards.exchange(counts, one_each, one_each)
        n_asking, n_asked = counts.tolist(), told.tolist()
        if min(*n_asking, *n_asked) < 0:
            raise ArgumentError(
                "input_ids",
                torch.unique(ids[outside]).tolist()[:5],
                f"ids of one process are out of range: the table has {shards.n_classes} rows",
                f"Pass ids from 0 to {shards.n_classes - 1}, or make a larger table",
            )
        order = owners.argsort(stable=True)
        asked = shards.exchange(ids[order], n_asking, n_asked)
        return cls(order, n_asking, n_asked, asked - shards.first, shards)

    def answer(self, rows: Tensor) -> Tensor:
        """Return rows (K, D) of the own ids, for the rows that others asked for. Collective."""
        received = self.shards.exchange(rows, self.n_asked, self.n_asking)
        return torch.empty_like(received).index_copy_(0, self.order, received)

    def send(self, grad: Tensor) -> Tensor:
        """Return what others bring to the rows they asked for, for grad (K, D). Collective."""
        return self.shards.exchange(grad[self.order], self.n_asking, self.n_asked)
