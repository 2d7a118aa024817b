"""The samples of an epoch: in an order made by a seed and the epoch, and each of them once."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class SampleOrder(Trainer):
    """Trainer whose epochs have the same samples, each once, wherever they run or are resumed.

    The order depends on args.data_seed, or else args.seed, and on the number of the epoch. Grouping
    by length would draw from the global generator, which a resumed process has in another state:
    samples would be lost, and others seen twice. A run that is resumed from its last step makes no
    more.

    Several processes need batches of one size, for which Accelerate repeats samples at the end of
    an epoch. Their labels are ignored: the last step is that of one process on the samples left
    over. Rows that a collator joins (padding-free) cannot be told apart, and count again.
    """

    _order: SeededByEpoch | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler  # Accelerate's own, or one that the user made
        self._order = SeededByEpoch(sampler, int(self.args.data_seed or 0))
        return self._order

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        # Asked for each step when its batches are there, before any is trained on.
        if batch_samples:
            self._ignore_repeated(batch_samples[-1])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _ignore_repeated(self, batch: Any) -> None:
        """Ignore the labels of samples that are in the last batch of an epoch a second time."""
        state, sharing = self.accelerator.gradient_state, self.accelerator.dataloader_config
        if self.args.world_size == 1 or not state.end_of_dataloader:
            return
        samples, size = getattr(state.active_dataloader, "dataset", None), self._train_batch_size
        if not isinstance(samples, Sized) or isinstance(samples, IterableDataset):
            return
        if sharing.split_batches or sharing.dispatch_batches:
            return
        n_left = len(samples) % (size * self.args.world_size)
        if n_left == 0 or self.args.dataloader_drop_last:
            return
        # The first process has the first samples of a step, and the last has the repeated ones.
        n_own = max(n_left - self.args.process_index * size, 0)
        for name in ("labels", "shift_labels"):
            if name in batch and len(batch[name]) == size:
                batch[name][n_own:] = -100

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed where all was done but to save the model: Trainer would make one more step.
            self.control.should_training_stop = True
            return
        if self._order is not None:  # Accelerate does not reach it through all that it wraps
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)


class SeededByEpoch(Sampler[int]):
    """Draws as another sampler does, from a generator that is seeded anew in each epoch.

    Args:
        sampler: with an attribute generator.
        seed: of epoch 0; each further epoch adds one.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)
