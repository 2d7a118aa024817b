"""Trainers whose model may have a vocabulary that is cut over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_rece.embeddings.sharded import ShardedLayer
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.sharded_checkpoint import (
    ConsolidatedReader,
    sharded_parameters,
    weight_files,
    write_consolidated,
)
from hf_rece.ops.shards import VocabShards

# Beside optimizer.pt, which holds the state of all other parameters.
MOMENTS_NAME = "optimizer_of_vocabulary.safetensors"
# They treat each number by itself: a row gets the same step whoever holds the others.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")


class VocabParallel(Trainer):
    """Trainer of a model whose vocabulary may be cut over processes, and of any other as ever.

    Rows, their gradients and their optimizer state stay on the process that holds them; all other
    parameters are those of DistributedDataParallel over all processes. With
    args.vocab_parallel_size, several groups of processes hold the rows, and average their gradients
    at the last micro-batch of a step. Gradients are clipped by their norm over all processes.
    Checkpoints are whole: they resume on any number of processes, cut in any way or not.
    """

    @property
    def vocab_shards(self) -> VocabShards | None:
        """How the model's vocabulary is cut; None for not."""
        return getattr(self.model, "vocab_shards", None)

    @property
    def _bare_model(self) -> Any:
        return self.model

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make forward and backward of a micro-batch."""
        for layer in self._bare_model.modules() if self.vocab_shards is not None else ():
            if isinstance(layer, ShardedLayer):
                layer.averages_gradients = self.accelerator.sync_gradients
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.vocab_shards is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self._clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.vocab_shards is not None and grad_norm is None:
            grad_norm = self._clip(torch.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clip(self, max_norm: float) -> Tensor:
        cut = list(sharded_parameters(self._bare_model).values())
        ids = {id(parameter) for parameter in cut}
        whole = [p for p in self._bare_model.parameters() if id(p) not in ids]
        return clip_cut_gradients(whole, cut, self.vocab_shards, max_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.vocab_shards is not None and not self.args.should_save:
            self._bare_model.save_pretrained(output_dir or "")  # sends its rows, writes nothing
        super()._save(output_dir, state_dict)
        if self.vocab_shards is not None:
            self.accelerator.wait_for_everyone()  # all may read the files now

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.vocab_shards is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._bare_model.load_weights(
                resume_from_checkpoint, weight_files(resume_from_checkpoint, {})
            )

    def _load_best_model(self) -> None:
        if self.vocab_shards is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.vocab_shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = _bare(self.optimizer)
        names = {id(p): name for name, p in sharded_parameters(self._bare_model).items()}
        moments = {
            f"{names[id(parameter)]}.{key}": value
            for parameter in parameters_of(optimizer)
            if id(parameter) in names
            for key, value in optimizer.state.get(parameter, {}).items()
            if _is_moment(value, parameter)
        }
        write_consolidated(Path(output_dir) / MOMENTS_NAME, {}, moments, self.vocab_shards)
        with _without_moments(optimizer, set(names)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / MOMENTS_NAME
        if self.vocab_shards is None and not path.exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = _bare(self.optimizer)

        def fit(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return self._own_moments(optimizer, state_dict, path)

        hook = optimizer.register_load_state_dict_pre_hook(fit)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            hook.remove()

    def _own_moments(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], path: Path
    ) -> dict[str, Any]:
        """Return a saved state with the moments of this process's rows.

        Args:
            optimizer: that is about to load it.
            state_dict: of all parameters, but for moments that are in the file.
            path: of the moments of a vocabulary that was cut; no file where it was whole.
        """
        model, shards = self._bare_model, self.vocab_shards
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        cut = set() if shards is None else {id(p) for p in sharded_parameters(model).values()}
        files = [path] if path.exists() else []
        states = dict(state_dict["state"])
        with ConsolidatedReader(path.parent.name, files) as reader:
            for index, parameter in enumerate(parameters_of(optimizer)):
                own = shards if id(parameter) in cut else None
                state = dict(states.get(index, {}))
                if own is not None:
                    state = {
                        key: own.cut(value) if isinstance(value, Tensor) else value
                        for key, value in state.items()
                    }
                prefix = f"{names[id(parameter)]}."
                for name in reader.names:
                    key = name.removeprefix(prefix)
                    if key != name and "." not in key:
                        state[key] = torch.empty_like(parameter)
                        reader.read_into(state[key], name, own)
                if state:
                    states[index] = state
        return {**state_dict, "state": states}


def cut_as_asked(model: Any, args: Any) -> None:
    """Cut the vocabulary of a model over processes, if the arguments say so; works in place.

    Raises:
        ArgumentError: for a model that is no RecommenderModel, or cannot be cut; with FSDP,
            DeepSpeed, and fp16, whose scaler looks at each process alone; with an optimizer, such
            as adafactor, whose step for a row depends on other rows.
    """
    if getattr(args, "vocab_parallel", False):
        if not isinstance(model, RecommenderModel):
            raise ArgumentError(
                "vocab_parallel", True, f"{type(model).__name__} cannot be cut", "Leave it out"
            )
        model.cut_vocabulary(getattr(args, "vocab_parallel_size", None))
    if getattr(model, "vocab_shards", None) is None:
        return
    for name in ("fsdp", "deepspeed", "fp16"):
        if getattr(args, name, None):
            raise ArgumentError(
                name,
                getattr(args, name),
                "does not go with a vocabulary that is cut over processes",
                "Train with DDP, in float32 or bf16, or leave vocab_parallel out",
            )
    optim = getattr(args, "optim", OPTIMIZERS[0])
    if optim not in OPTIMIZERS:
        raise ArgumentError(
            "optim",
            str(getattr(optim, "value", optim)),
            "does not go with a vocabulary that is cut over processes: it would take other steps",
            f"Pass one of {', '.join(OPTIMIZERS)}",
        )


@torch.no_grad()
def clip_cut_gradients(
    whole: Iterable[nn.Parameter],
    cut: Iterable[nn.Parameter],
    shards: VocabShards | None,
    max_norm: float,
) -> Tensor:
    """Scale gradients to a joint norm of max_norm at most; return the norm. Collective.

    Args:
        whole: parameters whose gradients are the same in all processes.
        cut: parameters of which each process has its own rows.
        shards: how they are cut; None for not.
        max_norm: of all gradients together.
    """
    own = [p.grad for p in cut if p.grad is not None]
    gradients = [p.grad for p in whole if p.grad is not None]
    # Where there are none, of rows that are frozen, torch's norm is on the CPU.
    device = next((gradient.device for gradient in gradients + own), None)
    squared, of_whole = (
        torch.nn.utils.get_total_norm(part).square().to(device) for part in (own, gradients)
    )
    if shards is not None:
        squared = shards.sum(squared)
    norm = (of_whole + squared).sqrt()
    # 1e-6 as in torch: a norm of 0 is no division by 0.
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*gradients, *own):
        gradient.mul_(shrink)
    return norm


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return an optimizer's parameters in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside the one of Accelerate, whose hooks work."""
    bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


@contextmanager
def _without_moments(optimizer: torch.optim.Optimizer, ids: set[int]) -> Iterator[None]:
    """Let state_dict() leave out the moments of these parameters, given by id()."""

    def strip(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = dict(state_dict["state"])
        for index, parameter in enumerate(parameters_of(optimizer)):
            if id(parameter) in ids and index in states:
                states[index] = {
                    key: value
                    for key, value in states[index].items()
                    if not _is_moment(value, parameter)
                }
        return {**state_dict, "state": states}

    hook = optimizer.register_state_dict_post_hook(strip)
    try:
        yield
    finally:
        hook.remove()
