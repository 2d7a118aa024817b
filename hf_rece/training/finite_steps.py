"""Steps whose loss or gradients are not finite: stopped at, or skipped, by all processes alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_rece.errors import NonfiniteError
from hf_rece.losses.watching import all_finite, watch_states
from hf_rece.training.args import LargeVocabTrainingArguments

logger = logging.get_logger(__name__)

SKIPPED = "skipped_steps"
_SHOWN = 3


class FiniteSteps(Trainer):
    """Trainer that makes no step with a loss or gradients that are NaN or infinite.

    With args.nonfinite_loss="stop", all processes raise one NonfiniteError before the weights
    change. With "skip", the step leaves weights and moments as they are, is counted like any other
    by the schedule, and adds to skipped_steps in the log; where weights themselves are not finite,
    no later step could be better, and training stops all the same.

    Losses, hidden states and gradients are looked at where they are; what was found is fetched
    once an optimiser step, with one all-reduce of three numbers. In float16 the gradient scaler
    skips steps whose scaled gradients overflow: these are no error, and are not counted.
    """

    args: LargeVocabTrainingArguments
    _finite: Tensor | None = None  # (2,) bool: losses, hidden states
    _gradients: Tensor | None = None  # (P,) bool

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make forward and backward of a micro-batch, and note whether all was finite."""
        with watch_states() as watch:
            loss: Tensor = super().training_step(*args, **kwargs)
        finite = all_finite(loss.detach())
        states = finite if watch.finite is None else watch.finite.to(finite.device)
        both = torch.stack([finite, states])
        self._finite = both if self._finite is None else self._finite & both
        if self.accelerator.sync_gradients:  # before clipping, which by NaN leaves NaN everywhere
            self._gradients = finite_gradients(cast("nn.Module", self.model).parameters())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm if self._is_finite(norm) else self._refuse(model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the number of skipped steps beside the loss."""
        if "loss" in logs and self.skipped_steps:
            logs[SKIPPED] = self.skipped_steps
        super().log(logs, *args, **kwargs)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the run began, before it was last resumed too."""
        counts = (entry[SKIPPED] for entry in reversed(self.state.log_history) if SKIPPED in entry)
        return int(next(counts, 0))

    def _is_finite(self, norm: Any) -> bool:
        """Return whether all that was noted in this step is finite, in all processes."""
        found = torch.ones(3, device=self.args.device)
        if self._finite is not None:
            found[:2] = self._finite
        # The scaler of float16 raises its scale until gradients overflow.
        if self.accelerator.scaler is None and norm is not None:
            found[2] = torch.as_tensor(_whole(norm)).isfinite()
        self._finite = None
        n_finite = self.accelerator.reduce(found, "sum").tolist()
        self._n_bad = [round(self.args.world_size - n) for n in n_finite]
        return not any(self._n_bad)

    def _refuse(self, model: nn.Module) -> None:
        """Skip the step, or raise NonfiniteError."""
        step = self.state.global_step + 1
        weights = [n for n, w in model.named_parameters() if not bool(all_finite(_own(w.detach())))]
        broken = self.accelerator.reduce(
            torch.tensor([float(bool(weights))], device=self.args.device), "sum"
        )
        problem = self._problem(model, weights, is_elsewhere=bool(broken))
        if self.args.nonfinite_loss == "skip" and not bool(broken):
            self.state.log_history.append({"step": step, SKIPPED: self.skipped_steps + 1})
            logger.warning(f"Step {step} is skipped: {problem}.")
            model.zero_grad()  # an optimizer leaves alone what has no gradient
            return
        raise NonfiniteError(
            step,
            problem,
            "Go on from a checkpoint before it: with a lower learning_rate or max_grad_norm, bf16 "
            'in place of fp16, or nonfinite_loss="skip" if it is one bad batch',
        )

    def _problem(self, model: nn.Module, weights: list[str], *, is_elsewhere: bool) -> str:
        losses, states, _ = self._n_bad
        n_processes = self.args.world_size
        if weights:
            return f"the weights {_shown(weights)} are not finite"
        if is_elsewhere:  # of a vocabulary, or a model, that is cut
            return "weights that other processes hold are not finite"
        if losses or states:
            where = f" in {states or losses} of {n_processes} processes" if n_processes > 1 else ""
            if states:
                return f"the hidden states that the loss reads are not finite{where}; weights are"
            return f"the loss is not finite{where}; its hidden states and the weights are"
        names = [name for name, weight in model.named_parameters() if weight.grad is not None]
        finite = [] if self._gradients is None else self._gradients.tolist()
        bad = [name for name, is_finite in zip(names, finite, strict=False) if not is_finite]
        if not bad:
            return "the norm of all gradients is not finite; each is"
        return f"the gradients of {_shown(bad)} are not finite; the loss is"


def finite_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return whether each gradient that is there is finite; of a shard, its own part.

    Args:
        parameters: of a model; their gradients may be sparse.
    """
    found = []
    for parameter in parameters:
        if parameter.grad is not None:
            own = _own(parameter.grad)
            found.append(all_finite(own._values() if own.is_sparse else own))
    return torch.stack([each.to(found[0].device) for each in found]) if found else torch.ones(0)


def _own(tensor: Any) -> Any:
    """Return what this process has of a tensor that FSDP2 may have cut."""
    return getattr(tensor, "_local_tensor", tensor)


def _whole(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
