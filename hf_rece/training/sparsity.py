"""Dynamic sparse learning: training with a fixed number of active weights that moves about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_rece.errors import ArgumentError
from hf_rece.models.sparse_checkpoint import SparseCheckpoints, holds
from hf_rece.training.masks import SMALLEST_SHARE, magnitude_masks, move_weights, random_mask
from hf_rece.training.sparse_gradients import has_sparse_gradients

Start = Literal["random", "magnitude"]

# Trainer saves and restores the optimizer's state whole, wherever the checkpoint lies: what a run
# needs to go on travels under this key, beside the moments that it clears.
STATE_KEY = "dynamic_sparsity"

logger = logging.get_logger(__name__)


class DynamicSparsityCallback(TrainerCallback):
    """Train with a fixed share of active weights; all others are 0 at every step.

    Every update_interval optimizer steps, the active weights of smallest magnitude are dropped, and
    as many are grown, starting at 0, where the gradient summed up since the last update is largest.
    The share that moves falls from initial_ratio to final_ratio as a cosine over the run. The last
    update leaves what it grows a whole interval to learn. Optimizer moments of dropped and grown
    weights are cleared where they have the shape of the weight, as those of Adam.

    Why a sum of gradients: a sampled loss or SCE reaches few rows at a time, and one batch would
    grow only the rows that it happens to hold. The sum rather than the sum of magnitudes: over T
    steps a direction that persists grows as T, noise as sqrt(T), so that rows which are often but
    aimlessly pushed do not outbid rare rows that are always pushed the same way.

    Of a RecommenderModel, save_model and the checkpoints store active values and a bitmask. Any
    other model is saved dense, as ever. Resuming gives the weights of an uninterrupted run, bit for
    bit: masks and summed gradients lie with the state of the optimizer. A run starts from the masks
    that the model is known to have (a RecommenderModel loaded from a sparse checkpoint, a second
    train() of one trainer), if they fit the densities.

    It saves disk, not training memory or time: weights, gradients and moments stay dense, and masks
    and summed gradients add 6 bytes a weight, in memory and in optimizer.pt of a checkpoint (none
    with save_only_model). Clipping sees the norm of the dense gradient. Weights
    sharded over processes (FSDP, DeepSpeed) are refused; under DDP all processes decide alike.

    Args:
        density: share of active weights, in (0, 1]. A number is for every linear layer and the
            input and output embeddings. A dictionary is from patterns of parameter names
            (fnmatch; the first that matches counts) to shares; the rest stays dense. Norms, biases,
            position embeddings and frozen weights are always dense. Tied weights are one.
        redistribute: fix the number of active weights in total instead of for each tensor: weights
            and gradients are compared across tensors, so that density may move between them. Each
            tensor keeps a tenth of what it started with at least.
        update_interval: optimizer steps between updates.
        initial_ratio: share of the active weights that the first updates move.
        final_ratio: the same at the end of the run.
        start: which weights are active at first: "random", for a model from scratch, or those of
            largest "magnitude", for a model that has been trained.

    Raises:
        ArgumentError: if a knob is out of range, a pattern matches no weight, the model has nothing
            to make sparse, or a run is resumed without its masks or with other densities.

    Reference:
        Wang, Sui, Wu, Zheng, Xiong 2024, arXiv 2402.02855, section 4. Deviations: gradients are
        summed between updates instead of taken from one batch; moments are cleared; exactly as many
        weights are dropped as planned, ties or not; norms, biases and positions stay dense.
    """

    def __init__(
        self,
        density: float | Mapping[str, float] = 0.5,
        *,
        redistribute: bool = False,
        update_interval: int = 100,
        initial_ratio: float = 0.5,
        final_ratio: float = 0.005,
        start: Start = "random",
    ) -> None:
        for share in density.values() if isinstance(density, Mapping) else [density]:
            if not 0 < share <= 1:
                raise ArgumentError(
                    "density", density, "not a share of weights", "Pass shares above 0, up to 1"
                )
        if update_interval < 1:
            raise ArgumentError(
                "update_interval", update_interval, "no number of steps", "Pass 1 or more"
            )
        for name, ratio in (("initial_ratio", initial_ratio), ("final_ratio", final_ratio)):
            if not 0 <= ratio <= 1:
                raise ArgumentError(name, ratio, "not a share", "Pass a share from 0 to 1")
        if start not in get_args(Start):
            raise ArgumentError("start", start, "unknown", f"Pass one of {get_args(Start)}")
        self.density, self.redistribute, self.update_interval = (
            density,
            redistribute,
            update_interval,
        )
        self.initial_ratio, self.final_ratio, self.start = initial_ratio, final_ratio, start
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}  # bool, True where active
        self.gradients: dict[str, Tensor] = {}  # float32, summed since the last update
        self.ever_active: dict[str, Tensor] = {}  # bool
        self._n_active: dict[str, int] = {}  # at the start

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse, before any work, what cannot be trained sparse."""
        for name in ("fsdp", "deepspeed", "vocab_parallel"):
            if getattr(args, name, None):
                raise ArgumentError(
                    name,
                    getattr(args, name),
                    "masks need whole weights in each process",
                    "Train with DDP, or leave DynamicSparsityCallback out",
                )
        if has_sparse_gradients(kwargs["model"]):
            raise ArgumentError(
                "sparse_grad",
                True,
                "weights grow where gradients summed over all rows are largest",
                "Leave it out of loss_kwargs, or leave DynamicSparsityCallback out",
            )
        if kwargs["model"] is not None:
            sparse_weights(kwargs["model"], self.density)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the masks, or take up those of the checkpoint, and zero all other weights."""
        model, saved = kwargs["model"], {}
        chosen = sparse_weights(model, self.density)
        known = self.masks
        self.weights = {name: weight for name, (weight, _) in chosen.items()}
        self._n_active = {
            name: max(1, round(share * weight.numel())) for name, (weight, share) in chosen.items()
        }
        if isinstance(model, SparseCheckpoints):
            known = model.weight_masks
        if state.global_step > 0:
            saved = kwargs["optimizer"].state.get(STATE_KEY, {})
            known = saved.get("masks", known)
            self._check_resumed(known, state.global_step)
        elif not self._fit(known):
            known = self._first_masks(args.seed)
        self.masks = {name: known[name].to(weight.device) for name, weight in self.weights.items()}
        ever_active = saved.get("ever_active", self.masks)
        gradients = saved.get("gradients", {})
        for name, weight in self.weights.items():
            self.ever_active[name] = ever_active[name].to(weight.device, copy=True)
            zeros = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            self.gradients[name] = gradients.get(name, zeros).to(weight.device)
        if isinstance(model, SparseCheckpoints):
            model.weight_masks = self.masks
        self._zero_inactive()
        if state.max_steps < 2 * self.update_interval:
            logger.warning(
                f"No weight will move: {state.max_steps} steps with update_interval="
                f"{self.update_interval}. Pass {max(state.max_steps // 4, 1)} or less."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum up the gradients, then hide those of inactive weights from the optimizer."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                # A step that overflowed in float16 is skipped by the optimizer too.
                finite = weight.grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                self.gradients[name] += finite
                weight.grad.masked_fill_(~self.masks[name], 0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero inactive weights, whatever the optimizer did to them."""
        self._zero_inactive()
        # Not before a step: optimizers take an empty state for a sign to make their own.
        kwargs["optimizer"].state[STATE_KEY] = {
            "masks": self.masks,
            "gradients": self.gradients,
            "ever_active": self.ever_active,
        }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move weights where an update is due, and clear their moments."""
        step, interval = state.global_step, self.update_interval
        if step % interval or step + interval > state.max_steps:
            return
        ratio = cosine_ratio(step / state.max_steps, self.initial_ratio, self.final_ratio)
        for names in self._budgets():
            floors = dict.fromkeys(names, 0)
            if self.redistribute:
                floors = {n: max(1, int(SMALLEST_SHARE * self._n_active[n])) for n in names}
            weights, masks, gradients = (
                {name: tensors[name] for name in names}
                for tensors in (self.weights, self.masks, self.gradients)
            )
            moved = move_weights(weights, masks, gradients, ratio, floors)
            for name in names:
                clear_moments(kwargs["optimizer"], self.weights[name], moved[name])
                self.ever_active[name] |= self.masks[name]
                self.gradients[name].zero_()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write density and the share of weights that were ever active into the history."""
        if "loss" in kwargs.get("logs", {}):
            state.log_history[-1].update(self.shares())

    def shares(self) -> dict[str, float]:
        """Return the density, and the share of weights that were ever active; none if not yet."""
        n_weights = sum(weight.numel() for weight in self.weights.values())
        kinds = {"density": self.masks, "ever_active": self.ever_active} if self.masks else {}
        return {
            name: sum(int(mask.sum()) for mask in masks.values()) / n_weights
            for name, masks in kinds.items()
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the masks those of the best model where it was loaded."""
        if self._fit(self.masks):
            return  # also where the best model came with its masks
        # A dense checkpoint does not tell which of its zeros had just been grown; as they have
        # learned nothing yet, any zero is as good.
        for names in self._budgets():
            n_active = sum(self._n_active[name] for name in names)
            weights = {name: self.weights[name] for name in names}
            self.masks.update(magnitude_masks(weights, n_active))

    def _budgets(self) -> list[list[str]]:
        """Return the names of weights that share one number of active weights."""
        return [list(self.weights)] if self.redistribute else [[name] for name in self.weights]

    def _first_masks(self, seed: int) -> dict[str, Tensor]:
        if self.start == "magnitude":
            found = [magnitude_masks({n: w}, self._n_active[n]) for n, w in self.weights.items()]
            return {name: mask for masks in found for name, mask in masks.items()}
        generator = torch.Generator().manual_seed(seed)  # the same in all processes
        return {
            name: random_mask(weight.shape, self._n_active[name], generator)
            for name, weight in self.weights.items()
        }

    def _fit(self, masks: Mapping[str, Tensor]) -> bool:
        """Return whether `masks` are of these weights and densities."""
        if not all(n in masks and holds(masks[n], w) for n, w in self.weights.items()):
            return False
        return all(
            sum(int(masks[name].sum()) - self._n_active[name] for name in names) == 0
            for names in self._budgets()
        )

    def _check_resumed(self, masks: Mapping[str, Tensor], step: int) -> None:
        if not masks:
            raise ArgumentError(
                "resume_from_checkpoint",
                f"checkpoint-{step}",
                "the run that saved it had no DynamicSparsityCallback, or its masks are gone",
                "Start a new run from its weights, with start='magnitude'",
            )
        if not self._fit(masks):
            raise ArgumentError(
                "density",
                self.density,
                f"checkpoint-{step} was trained with another one, or with another redistribute",
                "Resume with those of the run that saved it",
            )

    @torch.no_grad()
    def _zero_inactive(self) -> None:
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0)


def sparse_weights(
    model: nn.Module, density: float | Mapping[str, float]
) -> dict[str, tuple[nn.Parameter, float]]:
    """Return the weights of `model` that `density` makes sparse, by name, with their densities.

    Args:
        model: its linear layers, and its input and output embeddings, can be sparse.
        density: as DynamicSparsityCallback takes it.

    Raises:
        ArgumentError: if there are no such weights, or a pattern matches none of them.
    """
    tables = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    names: dict[int, list[str]] = {}  # a tied weight has several
    weights: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear | Conv1D) or any(module is t for t in tables)
        if linear and isinstance(weight, nn.Parameter) and weight.requires_grad:
            names.setdefault(id(weight), []).append(f"{path}.weight")
            weights[id(weight)] = weight
    patterns = dict(density) if isinstance(density, Mapping) else {"*": density}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for known in names.values() for name in known):
            candidates = ", ".join(known[0] for known in names.values())
            raise ArgumentError(
                "density",
                density,
                f"{pattern!r} matches no trained weight of a linear layer or embedding table",
                f"Name some of: {candidates}" if candidates else "Unfreeze some of them",
            )
    chosen: dict[str, tuple[nn.Parameter, float]] = {}
    for key, known in names.items():
        shares = [s for p, s in patterns.items() if any(fnmatchcase(name, p) for name in known)]
        if shares:
            chosen[known[0]] = weights[key], shares[0]
    return chosen


def cosine_ratio(progress: float, initial_ratio: float, final_ratio: float) -> float:
    """Return the share of weights to move after a share `progress` of the run."""
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return final_ratio + (initial_ratio - final_ratio) * cosine


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, weight: nn.Parameter, moved: Tensor) -> None:
    """Zero what `optimizer` remembers of the weights that `moved` marks; in place.

    Args:
        optimizer: any; state that has not the shape of the weight, or is quantized, is left alone.
        weight: one of its parameters.
        moved: bool, of the shape of the weight.
    """
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
            value.masked_fill_(moved, 0)


@dataclass
class SparsityArguments:
    """Dynamic sparse learning on the command line."""

    density: float | None = field(
        default=None,
        metadata={"help": "Share of weights that are active, such as 0.1. None: all of them."},
    )
    density_update_interval: int = field(
        default=100, metadata={"help": "Steps between updates of which weights are active."}
    )
    density_initial_ratio: float = field(
        default=0.5, metadata={"help": "Share of the active weights that the first updates move."}
    )
    density_pattern: str = field(
        default="*",
        metadata={"help": "Names of the weights to make sparse, such as '*embed_tokens.weight'."},
    )
    redistribute_density: bool = field(
        default=False, metadata={"help": "Let density move between tables and blocks."}
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that these arguments ask for, if any.

        Raises:
            ArgumentError: as DynamicSparsityCallback.
        """
        if self.density is None:
            return []
        return [
            DynamicSparsityCallback(
                {self.density_pattern: self.density},
                initial_ratio=self.density_initial_ratio,
                redistribute=self.redistribute_density,
                update_interval=self.density_update_interval,
            )
        ]
