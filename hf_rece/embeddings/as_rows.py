"""Read a model's output layer as OutputRows: plain, adapted, or refused by name."""

from __future__ import annotations

from torch import Tensor, nn

from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.embeddings.sharded import ShardedLinear
from hf_rece.embeddings.table_head import TableHead
from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import DenseRows


def as_rows(layer: nn.Module, hidden: Tensor) -> OutputTerms:
    """Return what `layer` computes of `hidden`, without computing it.

    Covers nn.Linear, nn.Embedding as a tied output, TableHead, and PEFT's LoRA, DoRA,
    modules_to_save and trainable tokens on them. Parameters without a gradient stay without one.

    Args:
        layer: output layer of C classes.
        hidden: (..., D).

    Raises:
        ArgumentError: for a layer whose logits cannot be had exactly from rows; names it.
    """
    if any(base.__module__.startswith("peft.") for base in type(layer).__mro__):
        # PEFT is optional; whoever holds one of its layers has it.
        from hf_rece.embeddings.peft_rows import peft_rows

        return peft_rows(layer, hidden, as_rows)
    if isinstance(layer, (TableHead, ShardedLinear)):
        return OutputTerms(hidden, layer.rows, layer.bias)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise ArgumentError(
            "output layer",
            type(layer).__name__,
            f"its weight is quantised ({weight.dtype})",
            "Leave the output layer out of the quantisation, for bitsandbytes with "
            "llm_int8_skip_modules=['lm_head']; the other layers may be quantised",
        )
    plain = type(layer).forward in (nn.Linear.forward, nn.Embedding.forward)
    if not plain or not isinstance(weight, Tensor):
        raise ArgumentError(
            "output layer",
            f"{type(layer).__module__}.{type(layer).__qualname__}",
            "how it makes logits is not known here",
            "Use an nn.Linear, or pass OutputRows to a loss function yourself",
        )
    return OutputTerms(hidden, DenseRows(weight), getattr(layer, "bias", None))
