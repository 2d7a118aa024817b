"""PEFT's wrappers of an output layer as OutputRows; imported only where PEFT is in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from hf_rece.embeddings.adapted_rows import (
    ReplacedRows,
    ScaledRows,
    SideBySideRows,
    low_rank_row_norms,
)
from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import DenseRows

Reader = Callable[[nn.Module, Tensor], OutputTerms]


def peft_rows(layer: nn.Module, hidden: Tensor, read: Reader) -> OutputTerms:
    """Return what a layer wrapped by PEFT computes of `hidden`, see as_rows.

    Args:
        layer: a module of PEFT's.
        hidden: (..., D).
        read: as_rows, for what the wrapper wraps.

    Raises:
        ArgumentError: for a wrapper, or a variant of LoRA, that is not known here.
    """
    if isinstance(layer, ModulesToSaveWrapper):
        active = [] if layer.disable_adapters else layer.active_adapters
        # As PEFT's own forward: an adapter that saved no copy of this layer leaves it as it was.
        copied = active and all(name in layer.modules_to_save for name in active)
        return read(layer.modules_to_save[active[0]] if copied else layer.original_module, hidden)
    if isinstance(layer, TrainableTokensWrapper):
        return _trainable_tokens(layer.token_adapter, hidden, read)
    if isinstance(layer, TrainableTokensLayer):
        return _trainable_tokens(layer, hidden, read)
    if type(layer).forward is LoraLinear.forward:
        return _lora(layer, hidden, read)
    raise ArgumentError(
        "output layer",
        f"{type(layer).__module__}.{type(layer).__qualname__}",
        "this adapter is not understood on an output layer",
        "Use LoRA, DoRA, modules_to_save or trainable_token_indices there; any adapter may sit on "
        "other layers",
    )


def _is_bypassed(layer: Any) -> bool:
    """Return whether the wrapped layer alone makes the logits, as PEFT's own forward decides."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    return bool(layer.disable_adapters or layer.merged)


def _lora(layer: Any, hidden: Tensor, read: Reader) -> OutputTerms:
    terms = read(layer.base_layer, hidden)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if _is_bypassed(layer) or not active:
        return terms
    for name in active:
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        variant = layer.lora_variant.get(name)
        if variant is not None and (type(variant) is not DoraLinearVariant or len(active) > 1):
            raise ArgumentError(
                "output layer",
                type(variant).__name__,
                "not understood on an output layer"
                + (", beside other adapters" if len(active) > 1 else ""),
                "Use plain LoRA there, or one DoRA adapter",
            )
        dropout = layer.lora_dropout[name]
        if variant is not None and layer.training and not isinstance(dropout, nn.Identity):
            raise ArgumentError(
                "lora_dropout",
                getattr(dropout, "p", dropout),
                "DoRA on the output layer drops inputs of the base layer too, which rows cannot do",
                "Set lora_dropout=0.0, or leave the output layer out of target_modules",
            )
        scaling = layer.scaling[name]
        states = hidden.to(lora_a.weight.dtype)
        extra = lora_a(dropout(states)) * scaling
        rows = SideBySideRows(terms.rows, DenseRows(lora_b.weight))
        bias = terms.bias
        if lora_b.bias is not None:
            bias = lora_b.bias * scaling if bias is None else bias + lora_b.bias * scaling
        terms = terms._replace(
            hidden=torch.cat([terms.hidden, extra.to(terms.hidden.dtype)], dim=-1),
            rows=rows if variant is None else _dora_rows(layer, name, rows),
            bias=bias,
        )
    return terms


def _dora_rows(layer: Any, name: str, rows: SideBySideRows) -> ScaledRows:
    """Return m_j / ||(W + s B A)_j|| times the rows; the norm counts as a constant.

    Reference:
        Liu et al., 2024, arXiv 2402.09353, section 4.3.
    """
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    norms = low_rank_row_norms(rows.left, lora_b, layer.scaling[name] * lora_a)
    magnitude = layer.lora_magnitude_vector[name].weight
    return ScaledRows(rows, magnitude / norms.to(magnitude.dtype))


def _trainable_tokens(layer: Any, hidden: Tensor, read: Reader) -> OutputTerms:
    terms = read(layer.base_layer, hidden)
    if _is_bypassed(layer):
        return terms
    for name in layer.active_adapters:
        delta = layer.trainable_tokens_delta[name]
        replaced = torch.tensor(layer.token_indices[name], device=delta.device)
        order = replaced.argsort()
        rows = ReplacedRows(terms.rows, replaced[order], delta[order])
        # PEFT leaves the bias of such a layer out of its logits.
        terms = terms._replace(rows=rows, bias=None)
    return terms
