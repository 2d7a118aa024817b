"""Training arguments: transformers' own, and what a loss over a huge vocabulary adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from hf_rece.errors import ArgumentError
from hf_rece.losses import build_loss
from hf_rece.losses.budget import MEMORY_BUDGET, check_budget
from hf_rece.losses.checks import check_at_least, check_choice, check_flag
from hf_rece.models.loading import check_token

NONFINITE_LOSS = ("stop", "skip")


@dataclass(repr=False)  # TrainingArguments' own shows no token
class LargeVocabTrainingArguments(TrainingArguments):
    """TrainingArguments with the training loss.

    With metric_for_best_model="eval_perplexity", lower is better, unless greater_is_better is set.

    Raises:
        ArgumentError: for an unknown loss or knob, knobs without a loss, two memory budgets,
            nonfinite_loss="skip" with DeepSpeed, or a hub_token that cannot be sent.
    """

    loss_type: str | None = field(
        default=None,
        metadata={
            "help": "Training loss: cross_entropy, rece, sce, stratified, sampled_softmax, bce or "
            "gbce. None keeps the loss of the model's configuration."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Knobs of the loss as JSON, such as '{\"n_rounds\": 4}'."}
    )
    memory_budget: int | str | None = field(default=None, metadata=MEMORY_BUDGET)
    nonfinite_loss: str = field(
        default="stop",
        metadata={
            "help": "At a step whose loss or gradients are NaN or infinite: stop, with the cause, "
            "or skip the step and count it as skipped_steps in the log.",
            "choices": NONFINITE_LOSS,
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_kwargs, str):  # from the command line
            self.loss_kwargs = json_object("loss_kwargs", self.loss_kwargs)
        elif not isinstance(self.loss_kwargs, dict | None):
            raise ArgumentError(
                "loss_kwargs", self.loss_kwargs, "no knobs by name", "Pass {knob: value}, or None"
            )
        # Trainer takes every metric for one to maximise, unless its name ends in "loss".
        if self.greater_is_better is None and _is_perplexity(self.metric_for_best_model):
            self.greater_is_better = False
        check_token("hub_token", self.hub_token)
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # Accelerate would take the last seed that anybody set
        # Pinned memory without an accelerator only warns.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.loss_type is None and self.loss_kwargs:
            raise ArgumentError(
                "loss_kwargs", self.loss_kwargs, "knobs of no loss", "Pass loss_type too"
            )
        check_choice("nonfinite_loss", self.nonfinite_loss, NONFINITE_LOSS)
        if self.nonfinite_loss == "stop":
            self.logging_nan_inf_filter = False  # it waits for the device at every micro-batch
        elif self.deepspeed:
            raise ArgumentError(
                "nonfinite_loss",
                self.nonfinite_loss,
                "DeepSpeed makes the steps by itself",
                "Pass stop",
            )
        check_budget(self.memory_budget)
        if self.memory_budget is not None and "memory_budget" in (self.loss_kwargs or {}):
            raise ArgumentError(
                "memory_budget", self.memory_budget, "loss_kwargs has one too", "Pass one of them"
            )
        if self.loss_of_head is not None:
            build_loss(self.loss_of_head, **self.loss_knobs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the Hub's token: Trainer pickles it beside what it publishes."""
        return {**self.__dict__, "hub_token": None}

    @property
    def loss_of_head(self) -> str | None:
        """Name in LOSSES of what the head computes."""
        return self.loss_type

    @property
    def loss_knobs(self) -> dict[str, Any]:
        """Knobs of the loss, its memory budget included."""
        knobs: Any = self.loss_kwargs or {}
        return (
            knobs if self.memory_budget is None else {**knobs, "memory_budget": self.memory_budget}
        )


def _is_perplexity(metric: str | None) -> bool:
    return metric is not None and metric.endswith("perplexity")


def json_object(argument: str, text: str) -> dict[str, Any]:
    """Return the object that `text` writes as JSON.

    Raises:
        ArgumentError: naming `argument`, if it is no JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ArgumentError(argument, text, "not a JSON object", "Pass '{\"knob\": value}'")
    return value


@dataclass(repr=False)
class RecommenderTrainingArguments(LargeVocabTrainingArguments):
    """LargeVocabTrainingArguments with what next-item training and ranking need."""

    max_length: int = field(
        default=50, metadata={"help": "Most recent items of a history that are read."}
    )
    ranking_ks: list[int] = field(
        default_factory=lambda: [5, 10, 20], metadata={"help": "Cut-offs of the ranking metrics."}
    )
    filter_seen: bool = field(
        default=True, metadata={"help": "Leave items of the history out of the ranking."}
    )
    vocab_parallel: bool = field(
        default=False,
        metadata={
            "help": "Cut item vectors, their gradients and optimizer state over the processes: "
            "each holds its own share of the catalogue."
        },
    )
    vocab_parallel_size: int | None = field(
        default=None,
        metadata={
            "help": "How many processes hold the item vectors together, neighbours by rank: those "
            "of one machine, say. Implies vocab_parallel; None for all."
        },
    )
    # The collator reads item_ids and target_id, which are no arguments of the model.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the model does not take."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab_parallel = self.vocab_parallel or self.vocab_parallel_size is not None
        check_flag("filter_seen", self.filter_seen)
        check_at_least("max_length", self.max_length, 1)
        if not isinstance(self.ranking_ks, list | tuple) or not self.ranking_ks:
            raise ArgumentError(
                "ranking_ks", self.ranking_ks, "no cut-offs", "Pass integers such as 5 10 20"
            )
        for k in self.ranking_ks:
            check_at_least("ranking_ks", k, 1)
