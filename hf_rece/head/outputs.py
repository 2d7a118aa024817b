"""A model's own output, with what the head notes of each token beside it."""

from __future__ import annotations

import functools
from dataclasses import fields, make_dataclass
from typing import Any, cast

from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_rece.head.carrier import LossCarrier

TOKEN_FIELDS = (
    "aligned_labels", "token_losses", "entropy", "is_top1", "predicted_ids", "label_ranks",
)  # fmt: skip


def without_logits(output: Any, notes: dict[str, Tensor]) -> Any:
    """Return the output of a model whose logits were losses, with None in their place.

    Args:
        output: what the model's forward returned: ModelOutput or tuple.
        notes: tensors by their names in TOKEN_FIELDS, to add to a ModelOutput.
    """
    if not isinstance(output, ModelOutput):
        return tuple(None if isinstance(value, LossCarrier) else value for value in output)
    values = {item.name: getattr(output, item.name) for item in fields(cast("Any", output))}
    kept = {n: None if isinstance(v, LossCarrier) else v for n, v in values.items()}
    if not notes:
        return type(output)(**kept)
    return _with_token_fields(cast("Any", type(output)))(**kept, **notes)


@functools.cache
def _with_token_fields(output_class: Any) -> Any:
    """Return a subclass of `output_class` that also has TOKEN_FIELDS."""
    added = [(name, Tensor | None, None) for name in TOKEN_FIELDS]
    return make_dataclass(
        f"{output_class.__name__}WithTokens",
        added,
        bases=(output_class,),
        namespace={"__module__": __name__},
    )
