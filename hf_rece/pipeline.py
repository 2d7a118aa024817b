"""`pipeline("sequential-recommendation")`: histories in, items in the user's own ids out."""

from __future__ import annotations

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel

TASK = "sequential-recommendation"
_BATCH_SIZE = 256


class SequentialRecommendationPipeline(Pipeline):
    """Recommends the next items of histories.

        recommender = pipeline("sequential-recommendation", model="folder or Hub id")
        recommender([["B001", "B007"], ["B042"]], top_k=10)

    One history gives one list of {"item": id, "score": logit}, best first; a list, a Dataset or a
    generator of histories gives as many, `batch_size` (256) at once.

    Args:
        model: RecommenderModel, with its tokenizer.
        tokenizer: in place of the model's own.
        **kwargs: of transformers.Pipeline, and of a call: top_k (10), filter_seen (True),
            allowed_items, denied_items and index, as RecommenderModel.recommend has them.
    """

    _load_tokenizer = False  # type: ignore[assignment]  # the model brings its own
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    model: RecommenderModel

    def __init__(self, model: RecommenderModel, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = model.tokenizer
        else:
            model.tokenizer = kwargs["tokenizer"]
        # A scan of the catalogue serves a batch as fast as one history.
        kwargs.setdefault("batch_size", _BATCH_SIZE)
        super().__init__(model, *args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the recommendations of one history, or of each of several."""
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                return []
            # transformers takes a list for several inputs: one history must not look like them.
            inputs = tuple(inputs) if _is_one(inputs) else list(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self, top_k: int | None = None, **limits: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ("filter_seen", "allowed_items", "denied_items", "index")
        if unknown := sorted(set(limits) - set(known)):
            raise ArgumentError(
                "pipeline", unknown, f"{TASK} takes none such", f"Pass top_k, {', '.join(known)}"
            )
        knobs = limits if top_k is None else {**limits, "k": top_k}
        return {}, knobs, {}

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        """Return the history as it is: the model encodes a batch of them at once."""
        return {"histories": list(input_)}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, Any], **parameters: Any
    ) -> dict[str, Any]:
        histories = input_tensors["histories"]
        single = _is_one(histories)
        answers = self.model.recommend([histories] if single else histories, **parameters)
        found = [[{"item": f.item, "score": f.score} for f in answer] for answer in answers]
        return {"answers": found[0] if single else found}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, Any]]:
        """Return the answer to one history."""
        answer: list[dict[str, Any]] = model_outputs["answers"]
        return answer


def _is_one(histories: Any) -> bool:
    return all(isinstance(item, (str, int)) for item in histories)


def register_pipeline() -> None:
    """Make transformers' pipeline know the task; doing so again changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=SequentialRecommendationPipeline,
            pt_model=RecommenderModel,
            type="text",
        )
