"""Types of the options that every loss takes: JSON and YAML files hold whatever was typed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) <= torch.finfo(torch.float32).max


def _is_positive(value: Any) -> bool:
    return value is None or (_is_finite(value) and value > 0)


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or (_is_number(value) and math.isfinite(value))


def _are_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point() and value.dtype != torch.bool
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return value is None or (is_list and all(_is_whole(i) and abs(i) < 2**63 for i in value))


# What an option may be, and how to say it.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bias": (lambda value: value is None or isinstance(value, Tensor), "a tensor (C,), or None"),
    "ignore_index": (lambda value: _is_whole(value) and abs(value) < 2**63, "an integer"),
    "excluded_ids": (_are_ids, "a list or tensor of class ids, or None"),
    "num_items_in_batch": (_is_count, "a number of labelled tokens, or None"),
    "logit_scale": (_is_finite, "a finite number; 1.0 for none"),
    "logit_softcap": (_is_positive, "a positive number; None for no cap"),
    "tile_bytes": (
        lambda value: value is None or (_is_whole(value) and value > 0),
        "bytes such as 4 * 2**20, or None",
    ),
    "sparse_grad": (lambda value: isinstance(value, bool), "True or False"),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless each shared option is of the type that the losses read.

    Args:
        options: by name; see hf_rece.losses.options.CommonOptions.
    """
    for name, (is_good, wanted) in _OPTIONS.items():
        if name in options and not is_good(options[name]):
            raise ArgumentError(name, options[name], "cannot be used", f"Pass {wanted}")
