"""Trainers whose model may have row-sparse gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_rece.errors import ArgumentError
from hf_rece.head import find_head
from hf_rece.training.row_adam import RowAdamW, clip_gradients

# Of torch's optimisers those that Trainer offers and that take sparse gradients as they are.
_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)


class SparseGradients(Trainer):
    """Trainer that trains a model with row-sparse gradients, and any other as ever.

    In place of AdamW (args.optim "adamw_torch" or "adamw_torch_fused") it takes RowAdamW, which
    updates the rows that a step touched; clipping sees the norm of all gradients together.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, one that takes sparse gradients where the model has them.

        Raises:
            ArgumentError: if args.optim names one that does not.
        """
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if not given and has_sparse_gradients(self.model):
            chosen, settings = self.get_optimizer_cls_and_kwargs(self.args)
            if chosen is torch.optim.AdamW:
                settings.pop("fused", None)
                chosen = RowAdamW
            elif chosen not in _TAKE_SPARSE:
                raise ArgumentError(
                    "optim",
                    self.args.optim,
                    "it takes no sparse gradients",
                    "Pass adamw_torch, sgd or adagrad, or leave sparse_grad out of loss_kwargs",
                )
            self.optimizer_cls_and_kwargs = (chosen, settings)
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not has_sparse_gradients(self.model):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and has_sparse_gradients(self.model):
            grad_norm = clip_gradients(model.parameters(), torch.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)


def has_sparse_gradients(model: Any) -> bool:
    """Return whether the training loss of `model` was asked for sparse gradients."""
    head = None if model is None else find_head(model)
    if head is not None:
        return bool(head.loss.common.get("sparse_grad", False))
    return bool(getattr(getattr(model, "config", None), "sparse_grad", False))
