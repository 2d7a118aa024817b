"""The order of training samples: made by a seed and the epoch, whatever else draws numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class SampleOrder(Trainer):
    """Trainer whose epochs have the same order of samples wherever they are resumed.

    The order depends on args.data_seed, or else args.seed, and on the number of the epoch. Grouping
    by length would draw from the global generator, which a resumed process has in another state:
    samples would be lost, and others seen twice. A run that is resumed from its last step makes no
    more.
    """

    _order: SeededByEpoch | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler  # Accelerate's own, or one that the user made
        self._order = SeededByEpoch(sampler, int(self.args.data_seed or 0))
        return self._order

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
