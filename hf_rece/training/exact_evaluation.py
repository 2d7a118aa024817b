"""Evaluation of a language model without logits: exact loss, perplexity, accuracy, entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from hf_rece.errors import ArgumentError
from hf_rece.head import find_head
from hf_rece.training.reporting import Reporting

# What is summed over the tokens of a row of the batch.
_SUMMED = ("loss", "entropy", "mean_token_accuracy")


def refuse_logits(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse what would ask a model without logits for them.

    Args:
        args: training arguments.
        given: what else a Trainer is made with, by name.

    Raises:
        ArgumentError: for label smoothing, Liger's own head, preprocess_logits_for_metrics and
            compute_loss_func.
    """
    wanting = [name for name in ("label_smoothing_factor", "use_liger_kernel") if vars(args)[name]]
    wanting += [
        name
        for name in ("preprocess_logits_for_metrics", "compute_loss_func")
        if given.get(name) is not None
    ]
    for name in wanting:
        raise ArgumentError(
            name,
            getattr(args, name, "given"),
            "there are no logits",
            "Leave it out; compute_metrics gets predicted ids and ranks",
        )


class ExactEvaluation(Reporting):
    """Trainer that evaluates a model whose head is replaced, exactly and without logits.

    Evaluation reports, over all labelled tokens of the dataset, each once: loss, the exact
    cross-entropy in nats; perplexity, its exponential; entropy in nats; mean_token_accuracy. These
    are right with uneven batches and in several processes.

    A compute_metrics of the user gets an EvalPrediction with predictions = (predicted_ids,
    label_ranks), each (rows, T) int64, and label_ids (rows, T) aligned with them: position t holds
    the label that position t predicts, -100 for none. No shift is left to do. predict returns the
    same predictions.
    """

    _totals: np.ndarray | None = None
    _user_metrics: Callable[..., dict[str, float]] | None = None
    _predicting = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers.Trainer does, after an evaluation too."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size > 1 and not sharded and self.model_wrapped is self.model:
            # Evaluating first marks the bare model as prepared. Accelerate would then not wrap it,
            # and each process would go on alone, without an error.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def take_over_metrics(self) -> None:
        """Compute the exact metrics, and the user's after them."""
        self._user_metrics = self.compute_metrics
        self.compute_metrics = self._token_metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return a batch's mean loss, (sums of each row, ids and ranks if wanted), its labels."""
        if find_head(self.accelerator.unwrap_model(model)) is None or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        wants_ids = self._predicting or self._user_metrics is not None
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self.token_output(model, inputs, wants_ids)
        labels = output.aligned_labels
        summed = [output.token_losses, output.entropy, output.is_top1, labels != -100]
        sums = torch.stack([values.double().sum(1) for values in summed], dim=1)
        found = (output.predicted_ids, output.label_ranks) if wants_ids else ()
        return output.loss.detach(), (sums, *found), labels

    def token_output(self, model: nn.Module, inputs: dict[str, Any], wants_ids: bool) -> Any:
        """Return a batch's output with fields (rows, T) about its tokens."""
        return model(
            **inputs,
            output_logits=False,
            output_token_statistics=True,
            output_predictions=wants_ids,
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as Trainer does; sums of tokens are gathered even where only losses are."""
        if find_head(self.accelerator.unwrap_model(self.model)) is None:
            return super().evaluation_loop(*args, **kwargs)
        names = ("dataloader", "description", "prediction_loss_only")
        given = dict(zip(names, args, strict=False)) | kwargs
        output = super().evaluation_loop(**{**given, "prediction_loss_only": False})
        found: Any = output.predictions
        return output._replace(predictions=cast("Any", found[1:] or None if found else None))

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Return predictions (predicted_ids, label_ranks), aligned label_ids and metrics."""
        self._predicting = True
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._predicting = False

    def _token_metrics(
        self, prediction: EvalPrediction, compute_result: bool = True
    ) -> dict[str, float]:
        sums, *found = (np.asarray(_on_cpu(part)) for part in prediction.predictions)
        self._totals = sums.sum(0) + (0 if self._totals is None else self._totals)
        metrics: dict[str, float] = {}
        if self._user_metrics is not None:
            of_ids = EvalPrediction(
                predictions=cast("Any", tuple(found)),
                label_ids=_on_cpu(prediction.label_ids),
                inputs=prediction.inputs,
                losses=prediction.losses,
            )
            batched = {"compute_result": compute_result} if self.args.batch_eval_metrics else {}
            metrics = self._user_metrics(of_ids, **batched) or {}
        if not compute_result:
            return metrics
        *totals, count = self._totals
        self._totals = None
        means = {
            name: float(total / max(count, 1)) for name, total in zip(_SUMMED, totals, strict=True)
        }
        perplexity = math.exp(means["loss"]) if means["loss"] < 700 else math.inf
        return {**means, "perplexity": perplexity, **metrics}


def _on_cpu(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
