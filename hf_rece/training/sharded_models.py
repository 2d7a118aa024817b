"""Trainers whose model FSDP or DeepSpeed may cut over processes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_rece.errors import ArgumentError
from hf_rece.training.sparse_gradients import has_sparse_gradients
from hf_rece.training.sparsity import DynamicSparsityCallback

logger = logging.get_logger(__name__)

# Methods of recommenders that read weights outside of forward.
_ANSWERS = ("recommend", "user_vectors", "item_vectors")


class ShardedModels(Trainer):
    """Trainer of a model that FSDP or DeepSpeed cuts over processes, and of any other as ever.

    With FSDP2 it can also evaluate before it trains, and recommenders answer while they are cut:
    recommend, user_vectors and item_vectors are then called by all processes with the same
    arguments.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers.Trainer does.

        Raises:
            ArgumentError: with FSDP or DeepSpeed, for row-sparse gradients, a vocabulary that is
                cut already, and dynamic sparse learning.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self._refuse_what_needs_whole_weights()
        elif self.args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            logger.warning("Accelerate has FSDP on accelerators alone: DDP trains in its place.")
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as transformers.Trainer does, with FSDP2 before training too."""
        if self._is_fsdp2 and not isinstance(self.model, FSDPModule):
            self._keep_losses_wide()
            # Accelerate cuts a model together with its optimizer, never alone.
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
            _answer_while_cut(self.model)
        return super().evaluation_loop(*args, **kwargs)

    @property
    def _is_fsdp2(self) -> bool:
        return self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2

    def _keep_losses_wide(self) -> None:
        """Let a model that computes in half precision return its losses in float32."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_fsdp2:
            self._keep_losses_wide()
        groups = self._groups_of_cut_parameters()
        prepared = super()._prepare_for_training(*args, **kwargs)
        # Accelerate finds parameters again by their addresses, which empty shards have in common.
        of_optimizer = [] if self.optimizer is None else self.optimizer.param_groups
        for group, parameters in zip(of_optimizer, groups, strict=False):
            group["params"] = parameters
        _answer_while_cut(self.model)
        return prepared

    def _groups_of_cut_parameters(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each group, if an evaluation has cut the model before."""
        if self.optimizer is None or not isinstance(self.model, FSDPModule):
            return []
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the last layers whole
        return [list(group["params"]) for group in self.optimizer.param_groups]

    def _refuse_what_needs_whole_weights(self) -> None:
        asked = {
            "sparse_grad": has_sparse_gradients(self.model),
            "vocab_parallel": getattr(self.model, "vocab_shards", None) is not None,
            "DynamicSparsityCallback": any(
                isinstance(callback, DynamicSparsityCallback)
                for callback in self.callback_handler.callbacks
            ),
        }
        by = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
        for name in [name for name, is_asked in asked.items() if is_asked]:
            raise ArgumentError(
                name,
                True,
                f"{by} cuts weights and gradients itself",
                "Leave it out, or train with DDP",
            )
        if self.is_deepspeed_enabled and getattr(self.args, "nonfinite_loss", "stop") == "skip":
            raise ArgumentError(
                "nonfinite_loss", "skip", "DeepSpeed makes the steps by itself", "Pass stop"
            )


def _answer_while_cut(model: Any) -> None:
    """Let a recommender that FSDP2 has cut bring its weights together where it answers."""
    if not isinstance(model, FSDPModule):
        return
    for name in [name for name in _ANSWERS if hasattr(model, name) and name not in vars(model)]:
        register_fsdp_forward_method(model, name)  # type: ignore[arg-type]
        setattr(model, name, torch.no_grad()(getattr(model, name)))
