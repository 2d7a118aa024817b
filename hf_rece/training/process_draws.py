"""Random plans of several processes: the same directions, draws of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from hf_rece.ops.lsh import shared_directions


class ProcessDraws(Trainer):
    """Trainer whose processes hash by the same directions, and draw everything else by themselves.

    Directions of RECE, the stratified loss and SCE without mix follow from args.seed, the step and
    its micro-batch: processes with as many tokens have the same. Negatives, random blocks, mixtures
    and dropout are each process's own: with the same ones, more processes would see no more
    classes. So the random losses of several processes are estimates of what one would have
    estimated, and not the same numbers.

    Processes that share a vocabulary make one plan together, each group of them its own, and one
    process draws as ever.
    """

    _drawn = (-1, 0)  # step, and micro-batches of it

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.args.process_index and kwargs["epoch"] == kwargs["epochs_trained"]:
            torch.manual_seed(self.args.seed + self.args.process_index)
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make forward and backward of a micro-batch."""
        shards = getattr(self, "vocab_shards", None)
        if self.args.world_size == 1 or (shards is not None and shards.data_size == 1):
            loss: Tensor = super().training_step(*args, **kwargs)
            return loss
        step, before = self.state.global_step, self._drawn
        self._drawn = step, before[1] + 1 if before[0] == step else 0
        entropy = np.random.SeedSequence((self.args.seed, *self._drawn))
        with shared_directions(int(entropy.generate_state(1, np.uint64)[0])):
            loss = super().training_step(*args, **kwargs)
        return loss
