"""Trainers whose model may have row-sparse gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_rece.errors import ArgumentError
from hf_rece.head import find_head
from hf_rece.ops.messages import take_from_first
from hf_rece.ops.shards import shard_classes
from hf_rece.training.row_adam import RowAdamW, clip_gradients

# Of torch's optimisers those that Trainer offers and that take sparse gradients as they are.
_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)


class SparseGradients(Trainer):
    """Trainer that trains a model with row-sparse gradients, and any other as ever.

    In place of AdamW (args.optim "adamw_torch" or "adamw_torch_fused") it takes RowAdamW, which
    updates the rows that a step touched; clipping sees the norm of all gradients together.

    Several processes send each other the rows that they touched, once an optimizer step: DDP would
    want dense gradients of input and output layer, and is left all others.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, one that takes sparse gradients where the model has them.

        Raises:
            ArgumentError: if args.optim names one that does not.
        """
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if has_sparse_gradients(self.model):
            if self.args.world_size > 1:
                self._take_from_ddp()
            if not given:
                self.optimizer_cls_and_kwargs = self._sparse_optimizer()
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make forward and backward of a micro-batch, and join sparse gradients after the last."""
        loss: Tensor = super().training_step(*args, **kwargs)
        sparse = self.args.world_size > 1 and has_sparse_gradients(self.model)
        if sparse and self.accelerator.sync_gradients:
            average_gradients(sparse_parameters(self.model).values())
        return loss

    def _sparse_optimizer(self) -> tuple[Any, dict[str, Any]]:
        chosen, settings = self.get_optimizer_cls_and_kwargs(self.args)
        if chosen is torch.optim.AdamW:
            settings.pop("fused", None)
            return RowAdamW, settings
        if chosen not in _TAKE_SPARSE:
            raise ArgumentError(
                "optim",
                self.args.optim,
                "it takes no sparse gradients",
                "Pass adamw_torch, sgd or adagrad, or leave sparse_grad out of loss_kwargs",
            )
        return chosen, settings

    def _take_from_ddp(self) -> None:
        """Let DDP leave the parameters alone that may have sparse gradients; start from one copy.

        Collective, and to be called before the model is wrapped.
        """
        model = cast("Any", self.model)
        own = sparse_parameters(model)
        for parameter in own.values():
            take_from_first(parameter.data, None)
        left = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        model._ddp_params_and_buffers_to_ignore = sorted(left.union(own))

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


def sparse_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return by name, all names, the trained parameters of a recommender's input and output layer.

    Their gradients may be sparse. Of a language model, these are those of the output layer alone.
    """
    layers = [model.get_output_embeddings()]
    if hasattr(model.config, "sparse_grad"):
        layers.append(model.get_input_embeddings())
    ids = {id(parameter) for layer in layers for parameter in layer.parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in every if id(p) in ids and p.requires_grad}


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient its mean over all processes, as DDP does; sparse ones stay sparse.

    Collective: all processes have the same parameters, in one order, with gradients of one layout.

    Args:
        parameters: a tied one once or several times.
    """
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        gradient = parameter.grad
        if gradient is None:
            continue
        shards = shard_classes(len(gradient))
        if not gradient.is_sparse:
            shards.sum(gradient).div_(shards.world_size)
            continue
        own = gradient.coalesce()
        rows = shards.share_tokens(own.values().shape[0], device=gradient.device)
        ids = shards.join(own.indices()[0], rows.sizes)
        values = shards.join(own.values(), rows.sizes).div_(shards.world_size)
        joined = torch.sparse_coo_tensor(
            ids.unsqueeze(0), values, gradient.shape, check_invariants=False
        )
        parameter.grad = joined.coalesce()
