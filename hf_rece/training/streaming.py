"""Training on a stream: each process its part, resumed where a checkpoint was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_rece.data.prepared import Row
from hf_rece.data.stream import SequenceStream
from hf_rece.errors import ArgumentError

Batch = dict[str, Tensor]


class StreamedBatches(IterableDataset[Batch]):
    """The batches of a stream, of which workers make one in turn.

    Args:
        stream: the part of this process.
        collator: makes a batch of rows.
        batch_size: rows of a batch; the last one of an epoch may have fewer.
        drop_last: leave that one out.
    """

    def __init__(
        self,
        stream: SequenceStream,
        collator: Callable[[list[Row]], Batch],
        batch_size: int,
        drop_last: bool,
    ) -> None:
        self.stream, self.batch_size = stream, batch_size
        self._collator, self._drop_last = collator, drop_last
        # Epoch and number of batches to leave empty, where workers that stay see it.
        self._trained = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        whole, rest = divmod(len(self.stream), self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the rows hangs on, besides the number of processes."""
        return {
            "data": self.stream.info.description,
            "shuffle": self.stream.shuffle,
            "seed": self.stream.seed,
            "buffer_size": self.stream.buffer_size,
            "batch_size": self.batch_size,
        }

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch from the next iteration on."""
        self.stream.set_epoch(epoch)

    def leave_empty(self, epoch: int, batches: int) -> None:
        """Yield nothing for the first batches of an epoch, which a loader is going to skip.

        Accelerate skips batches of a stream by drawing them; so no row is read for them.
        """
        self._trained.copy_(torch.tensor([epoch, batches]))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, trained = self._trained.tolist()
        order = self.stream.order()
        for batch in range(first, len(self), step):
            if epoch == self.stream.epoch and batch < trained:
                yield {}
                continue
            start = batch * self.batch_size
            end = min(start + self.batch_size, len(self.stream))
            yield self._collator([order[place] for place in range(start, end)])


class StreamProgress(TrainerCallback, ExportableState):
    """Tells a stream where training resumes, and checkpoints what the order of its rows hangs on.

    Args:
        order: settings of the stream, of processes and of batches, by name.
    """

    def __init__(self, order: dict[str, Any] | None = None) -> None:
        self.order = order or {}

    def state(self) -> dict[str, Any]:
        """Return what is written into trainer_state.json."""
        return {"args": {"order": self.order}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the batches empty that the checkpoint has been trained on.

        Raises:
            ArgumentError: if its rows came in another order.
        """
        batches = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if not isinstance(batches, StreamedBatches):
            return
        before = state.stateful_callbacks.get(type(self).__name__, {}).get("args", {})
        self.order = {**batches.order, "world_size": args.world_size}
        if args.ignore_data_skip:
            return
        if state.global_step:
            _check_order(before.get("order", {}), self.order)
        steps = max(-(-len(batches) // args.gradient_accumulation_steps), 1)
        epoch, step = divmod(state.global_step, steps)
        batches.leave_empty(epoch, step * args.gradient_accumulation_steps)


def _check_order(before: dict[str, Any], now: dict[str, Any]) -> None:
    other = [name for name, value in now.items() if before.get(name) != value]
    if other:
        shown = ", ".join(f"{name} {before.get(name)!r}" for name in other)
        raise ArgumentError(
            "resume_from_checkpoint",
            {name: now[name] for name in other},
            f"the rows of the epoch came in another order, with {shown}: some would be left out, "
            "and others come twice",
            "Resume with the same, or with ignore_data_skip from the beginning of the epoch",
        )


class StreamedTraining(Trainer):
    """Trainer that takes streams as train_dataset.

    Of a SequenceStream every process reads its own part, and every worker makes its own batches.
    Other streams are shared out by Accelerate, a shard or a batch to each process.

    Raises:
        ArgumentError: for a train_sampling_strategy that needs to know all rows.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        sharing = getattr(args, "accelerator_config", None)
        if isinstance(kwargs.get("train_dataset"), IterableDataset) and sharing is not None:
            # Or process 0 would join the batches of all, which differ in length, to send them out.
            sharing.dispatch_batches = bool(sharing.dispatch_batches)
        super().__init__(model=model, args=args, **kwargs)
        if not isinstance(self.train_dataset, SequenceStream):
            return
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise ArgumentError(
                "train_sampling_strategy",
                strategy,
                "a stream has an order of its own",
                "Leave it out, or load the log into memory",
            )
        self.add_callback(StreamProgress())

    def get_train_dataloader(self) -> Any:
        """Return the training batches of this process."""
        if not isinstance(self.train_dataset, SequenceStream):
            return super().get_train_dataloader()
        args = self.args
        part = self.train_dataset.split_by_node(args.process_index, args.world_size)
        collator = cast("Callable[[list[Row]], Batch]", self.data_collator)
        batches = StreamedBatches(part, collator, self._train_batch_size, args.dataloader_drop_last)
        loader: DataLoader[Batch] = DataLoader(
            batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def num_examples(self, dataloader: Any) -> int:
        """Return the rows of an epoch, over all processes."""
        batches = getattr(dataloader, "dataset", None)
        if isinstance(batches, StreamedBatches):
            return len(batches.stream.split)
        return super().num_examples(dataloader)


def _as_it_is(batch: Any) -> Any:
    return batch
