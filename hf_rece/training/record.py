"""What is known of a recommender's training, kept in its configuration for the model card."""

from __future__ import annotations

from typing import Any

from hf_rece.card import Card
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_card import recommender_card
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.reporting import Reporting, device_name, n_rows, peak_mib


class RecordedRun(Reporting):
    """Trainer that writes data, cost and metrics of a run into config.training_run.

    They are saved with the model, and its card is made of them. A model of another class than
    RecommenderModel is trained as ever.
    """

    args: RecommenderTrainingArguments

    def run_card(self, repo_id: str) -> Card | None:
        """Return the card of this run; None for the one that Trainer makes."""
        model = self._recommender()
        if model is None:
            return super().run_card(repo_id)
        items = [] if model.tokenizer is None else model.tokenizer.items
        return recommender_card(model.config, repo_id, items, model.model_tags or [])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and record the run."""
        model = self._recommender()
        if model is None:
            return super().train(*args, **kwargs)
        model.config.training_run = data_facts(self.train_dataset)
        result = super().train(*args, **kwargs)
        self.record(
            **data_facts(self.train_dataset),  # model_init may have made another model
            sequences=n_rows(self.train_dataset),
            max_length=self.args.max_length,
            epochs=float(self.state.epoch or 0),
            steps=self.state.global_step,
            seconds=round(result.metrics["train_runtime"], 1),
            device=device_name(),
            peak_mib=round(peak_mib()),
            filter_seen=self.args.filter_seen,
        )
        self.record(density=density_of(self._recommender() or model))
        self.record_metrics("validation", self._validation_of_the_model())
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, and record the metrics.

        Those of eval_dataset are recorded as of validation, and with metric_key_prefix="test" as of
        test; of other datasets nothing is known.
        """
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        dataset = kwargs.get("eval_dataset", args[0] if args else None)
        own = dataset is None or dataset is self.eval_dataset
        part = {"eval": "validation" if own else None, "test": "test"}.get(prefix)
        if part is not None and not self.is_in_train:
            self.record_metrics(part, ranking_part(metrics, prefix))
        return metrics

    def record(self, **facts: Any) -> None:
        """Add facts to those in the model's configuration; None and {} are no facts."""
        model = self._recommender()
        if model is not None:
            known = {name: value for name, value in facts.items() if value not in (None, {})}
            model.config.training_run = {**(model.config.training_run or {}), **known}

    def record_metrics(self, part: str, metrics: dict[str, float]) -> None:
        """Record metrics of a part of the data.

        Args:
            part: "validation", "test", or what else is to stand over the column.
            metrics: by name.
        """
        model = self._recommender()
        if model is not None and metrics:
            before = (model.config.training_run or {}).get("metrics", {})
            self.record(metrics={**before, part: metrics})

    def _recommender(self) -> RecommenderModel | None:
        model = None if self.model is None else self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, RecommenderModel) else None

    def _validation_of_the_model(self) -> dict[str, float]:
        """Return the metrics, logged in training, of the weights that training ended with."""
        state = self.state
        at = state.global_step
        if self.args.load_best_model_at_end and state.best_global_step:
            at = state.best_global_step
        logs = [log for log in state.log_history if log.get("step") == at]
        return ranking_part({name: v for log in logs for name, v in log.items()}, "eval")


def ranking_part(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Return loss and ranking metrics, without the prefix of their names and without the rest."""
    names = {name: name.removeprefix(f"{prefix}_") for name in metrics}
    return {
        short: float(metrics[name])
        for name, short in names.items()
        if name != short and ("@" in short or short == "loss")
    }


def data_facts(train_dataset: Any) -> dict[str, Any]:
    """Return what a dataset of leave_one_out_split or temporal_split says of its log."""
    description = getattr(getattr(train_dataset, "info", None), "description", "")
    return {"data": description} if description else {}


def density_of(model: RecommenderModel) -> float | None:
    """Return the share of active weights among those that are thinned; None if none are."""
    masks = list(model.weight_masks.values())
    if not masks:
        return None
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
