"""Trainer whose loss never builds logits, and whose evaluation ranks the full catalogue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import EvalPrediction

from hf_rece.data.collator import SequenceCollator
from hf_rece.data.prepared import PreparedSplit
from hf_rece.data.splits import HISTORY, TARGET
from hf_rece.data.stream import SequenceStream
from hf_rece.errors import ArgumentError
from hf_rece.head import find_head, replace_output_head
from hf_rece.head.replace import change_head_loss
from hf_rece.metrics.ranking import ranking_metrics
from hf_rece.training.args import LargeVocabTrainingArguments, RecommenderTrainingArguments
from hf_rece.training.checkpoints import WholeCheckpoints
from hf_rece.training.exact_evaluation import ExactEvaluation, refuse_logits
from hf_rece.training.finite_steps import FiniteSteps
from hf_rece.training.process_draws import ProcessDraws
from hf_rece.training.record import RecordedRun
from hf_rece.training.sample_order import SampleOrder
from hf_rece.training.sharded_models import ShardedModels
from hf_rece.training.sparse_gradients import SparseGradients
from hf_rece.training.streaming import StreamedTraining
from hf_rece.training.vocab_parallel import VocabParallel, cut_as_asked


class LargeVocabTrainer(
    WholeCheckpoints,
    SampleOrder,
    FiniteSteps,
    ProcessDraws,
    SparseGradients,
    ShardedModels,
    ExactEvaluation,
):
    """Trainer that sets the training loss by name, for recommenders and language models.

    A RecommenderModel keeps the loss in its configuration. Of any other model the output layer is
    replaced in place (replace_output_head), adapters and PEFT models included; it stays replaced
    after training, which changes neither generate nor what is saved. Without args.loss_type, a
    model keeps the head that it has.

    Evaluation is always by exact cross-entropy, whatever the training loss: values compare across
    losses and their knobs. See ExactEvaluation for what it reports of language models.

    Args:
        model: RecommenderModel, or a causal or masked LM of transformers or PEFT.
        args: LargeVocabTrainingArguments.
        **kwargs: passed to transformers.Trainer.

    Raises:
        ArgumentError: as replace_output_head and refuse_logits.
    """

    args: LargeVocabTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: LargeVocabTrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None and args is not None:
            set_loss(model, args)
        if args is not None and model is not None and find_head(model) is not None:
            refuse_logits(args, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        if find_head(cast("nn.Module", self.model)) is not None:
            self.take_over_metrics()

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a fresh model from model_init, with the loss of the arguments."""
        model = super().call_model_init(trial)
        set_loss(model, self.args)
        return model


def set_loss(model: nn.Module, args: LargeVocabTrainingArguments) -> None:
    """Make `model` train by the loss that `args` name, if they name one; works in place.

    A memory budget without a loss is that of the loss which the model has.

    Raises:
        ArgumentError: as replace_output_head.
    """
    loss, knobs = args.loss_of_head, args.loss_knobs
    config: Any = getattr(model, "config", None)
    if loss is None:
        if not knobs:
            return
        loss, knobs = _own_loss(model, knobs)
    if hasattr(config, "loss_kwargs"):
        config.loss_type, config.loss_kwargs = loss, knobs or None
        return
    # What prepared the model in the meantime stays around the head that is there.
    set_head = replace_output_head if find_head(model) is None else change_head_loss
    set_head(model, loss, **knobs)


def _own_loss(model: nn.Module, knobs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the loss that `model` has, with its own knobs and these."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "loss_kwargs"):
        return config.loss_type, {**(config.loss_kwargs or {}), **knobs}
    head = find_head(model)
    own = {"loss_type": "cross_entropy"} if head is None else head.loss.to_dict()
    return own.pop("loss_type"), {**own, **knobs}


class RecommenderTrainer(StreamedTraining, VocabParallel, RecordedRun, LargeVocabTrainer):
    """Trains a RecommenderModel on sequences and ranks the full catalogue for evaluation.

    Datasets are those of leave_one_out_split and temporal_split, or of a prepared log: a
    SequenceStream to train on, and its splits to evaluate on. Evaluation reports the exact loss
    and ndcg@k, hr@k, recall@k, mrr@k, coverage@k, which serve as metric_for_best_model
    (eval_ndcg@10). Predictions are (items above the target, items tied with it, top-k ids, exact
    loss), a row for each user in the order of the dataset: no (users x catalogue) matrix is ever
    made.

    Data, cost and metrics of the run are kept in the model's configuration and shown by its card.

    With args.vocab_parallel, item vectors are cut over the processes that train together, see
    VocabParallel; save_model, evaluate and predict are then called by all of them.

    Args:
        model: RecommenderModel.
        args: RecommenderTrainingArguments.
        **kwargs: passed to transformers.Trainer. data_collator defaults to SequenceCollator,
            processing_class to the model's tokenizer.

    Raises:
        ArgumentError: as LargeVocabTrainer and refuse_logits, or if an evaluation dataset has no
            target_id.
    """

    args: RecommenderTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: RecommenderTrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = RecommenderTrainingArguments(output_dir="recommender")
        longest = getattr(getattr(model, "config", None), "longest_history", None)
        if longest is not None and args.max_length > longest:
            raise ArgumentError(
                "max_length",
                args.max_length,
                f"the model reads {longest} items at most",
                f"Pass {longest} or less, or a model with more positions",
            )
        refuse_logits(args, {})
        kwargs.setdefault("data_collator", SequenceCollator(args.max_length))
        own = kwargs.get("compute_metrics")
        kwargs["compute_metrics"] = self._ranking_metrics if own is None else _with_loss(own)
        kwargs.setdefault("processing_class", getattr(model, "tokenizer", None))
        train = kwargs.get("train_dataset")
        if args.train_sampling_strategy == "group_by_length" and isinstance(train, Dataset):
            kwargs["train_dataset"] = _with_lengths(train, args.length_column_name)
        if model is not None:
            cut_as_asked(model, args)
        super().__init__(model=model, args=args, **kwargs)
        # Trainer looks for labels among the model's arguments, which its wrappers may hide.
        self.label_names = ["labels"]

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a fresh model from model_init, with the loss of the arguments, cut as they say."""
        model = super().call_model_init(trial)
        cut_as_asked(model, self.args)
        return model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _check_size(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the evaluation batches.

        Raises:
            ArgumentError: if the dataset has no target_id.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, Mapping):
            dataset = self.eval_dataset[eval_dataset]
        _check_targets("eval_dataset", dataset)
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, Dataset):
            eval_dataset = _with_lengths(dataset, self.args.length_column_name)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of predict, in the order of the dataset.

        Raises:
            ArgumentError: if the dataset has no target_id.
        """
        _check_targets("test_dataset", test_dataset)
        strategy = self.args.train_sampling_strategy
        self.args.train_sampling_strategy = "sequential"  # grouping would reorder the predictions
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, but never by the loss alone: its mean would be of batches."""
        names = ("dataloader", "description", "prediction_loss_only")
        given = dict(zip(names, args, strict=False)) | kwargs
        return super().evaluation_loop(**{**given, "prediction_loss_only": False})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return a batch's mean exact loss, its predictions as documented above, its targets."""
        inputs = self._prepare_inputs(inputs)
        if not self.args.filter_seen:
            inputs = {name: value for name, value in inputs.items() if name != "seen_ids"}
        rank_k = None if prediction_loss_only else max(self.args.ranking_ks)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, rank_k=rank_k)
        loss = output.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        labels = inputs["labels"]
        targets = labels[labels != -100]
        predictions = output.greater, output.tied, output.topk_ids, output.losses
        return loss, predictions, targets

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        greater, tied, topk_ids, losses = cast("Any", prediction.predictions)
        config = cast("Any", self.accelerator.unwrap_model(self.model)).config
        n_items = config.vocab_size - (config.pad_token_id is not None)
        metrics = ranking_metrics(
            greater, tied, ks=self.args.ranking_ks, topk_ids=topk_ids, n_items=n_items
        )
        # Trainer's own mean of batch means counts the rows that fill up the last batch of several
        # processes; this one, which takes its place, does not.
        return metrics | {"loss": float(losses.mean())}


def _with_loss(own: Callable[[EvalPrediction], dict[str, float]]) -> Callable[..., Any]:
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        losses = cast("Any", prediction.predictions)[3]
        return {"loss": float(np.mean(losses)), **own(prediction)}

    return metrics


def most_popular_metrics(
    train: Dataset | SequenceStream,
    evaluation: Dataset | PreparedSplit,
    n_items: int,
    *,
    ks: list[int],
    filter_seen: bool = True,
) -> dict[str, float]:
    """Return the ranking metrics of recommending the most popular items to everyone.

    Args:
        train: the train part of a split; counts its items.
        evaluation: the validation or test part.
        n_items: items in the catalogue; token ids run from 1 to n_items.
        ks: cut-offs.
        filter_seen: leave items of the history out of the ranking.
    """
    popularity = _item_counts(train, n_items)
    by_popularity = np.sort(popularity)
    best_first = np.argsort(-popularity, kind="stable") + 1
    greater, tied, topk_ids = [], [], []
    for row in evaluation:
        target = row[TARGET]
        seen = np.setdiff1d(row[HISTORY], target) if filter_seen else np.empty(0, dtype=np.int64)
        own, of_seen = popularity[target - 1], popularity[seen - 1]
        not_above = np.searchsorted(by_popularity, own, side="right")
        below = np.searchsorted(by_popularity, own, side="left")
        greater.append(n_items - not_above - int((of_seen > own).sum()))
        tied.append(not_above - below - 1 - int((of_seen == own).sum()))
        head = best_first[: max(ks) + len(seen)]
        topk_ids.append(head[~np.isin(head, seen)][: max(ks)])
    padded = np.full((len(topk_ids), max(ks)), -1)
    for i, ids in enumerate(topk_ids):
        padded[i, : len(ids)] = ids
    return ranking_metrics(
        np.array(greater), np.array(tied), ks=ks, topk_ids=padded, n_items=n_items
    )


def _item_counts(train: Dataset | SequenceStream, n_items: int) -> NDArray[np.int64]:
    """Return how often each item occurs (n_items,)."""
    if not isinstance(train, SequenceStream):
        histories = train.with_format("numpy")[HISTORY]
        return np.bincount(np.concatenate(list(histories)), minlength=n_items + 1)[1:]
    counts = np.zeros(n_items + 1, dtype=np.int64)
    for part in train.split.histories():
        counts += np.bincount(part.flatten().to_numpy(), minlength=n_items + 1)
    return counts[1:]


def _check_size(checkpoint: str, model: Any) -> None:
    """Raise ArgumentError if the checkpoint is of a catalogue of another size."""
    path = Path(checkpoint) / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    saved = config.get("vocab_size") if isinstance(config, dict) else None
    own = getattr(getattr(model, "config", None), "vocab_size", None)
    if None not in (saved, own) and saved != own:
        raise ArgumentError(
            "resume_from_checkpoint",
            Path(checkpoint).name,
            f"it holds weights and optimizer state for {saved} rows of items, and the model has "
            f"{own}",
            "Load the weights with from_pretrained, add_items, and train without resuming",
        )


def _check_targets(argument: str, dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and TARGET not in columns:
        raise ArgumentError(
            argument,
            columns,
            f"there is no column {TARGET!r} to rank",
            "Pass the validation or test part of a split",
        )


def _with_lengths(dataset: Dataset, column: str) -> Dataset:
    if column in dataset.column_names:
        return dataset
    lengths = [len(history) for history in dataset.with_format("numpy")[HISTORY]]
    return dataset.add_column(column, lengths)
