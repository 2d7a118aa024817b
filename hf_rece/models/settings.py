"""Settings that cannot be used, refused by name and by errors of this package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_rece.errors import ArgumentError, HfReceError

# What transformers raises over settings of the wrong type or value, wherever it first needs them.
FOREIGN = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    StrictDataclassError,
)  # fmt: skip

# Anything else may name a repository of kernels, whose code transformers would fetch and run.
_IMPLEMENTATIONS = {
    "attn_implementation": (
        "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention",
    ),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}  # fmt: skip
_FLAGS = ("output_hidden_states", "output_attentions")
_Config = TypeVar("_Config", bound=type[PreTrainedConfig])


@contextmanager
def clear_settings_errors(argument: str, value: object) -> Iterator[None]:
    """Turn whatever transformers raises over settings into one message.

    Args:
        argument: that has the settings.
        value: what to show of it.

    Raises:
        ArgumentError: in place of it.
    """
    try:
        yield
    except (HfReceError, torch.OutOfMemoryError):
        raise
    except (*FOREIGN, ImportError, RuntimeError) as error:
        raise ArgumentError(
            argument, value, f"its settings cannot be used ({reason_of(error)})", "Change them"
        ) from error


@contextmanager
def refused_code(argument: str, source: str) -> Iterator[None]:
    """Turn what transformers raises over code in a repository, which it does not run.

    Args:
        argument: that names the repository.
        source: folder or Hub id.

    Raises:
        ArgumentError: in place of it.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ArgumentError(
            argument,
            source,
            "it needs code that comes with it, which is not run",
            "Use another, or finetune with trust_remote_code if you have read that code",
        ) from error


def reason_of(error: Exception) -> str:
    """Return what an error of transformers says, on one line of at most 200 characters."""
    words = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").rstrip(". ")
    return words if len(words) <= 200 else f"{words[:200]}..."


def refuses_by_name(config_class: _Config) -> _Config:
    """Let a configuration refuse settings by ArgumentError: a decorator, above all others."""
    init: Callable[..., None] = config_class.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        with clear_settings_errors("config", config_class.model_type):
            init(self, *args, **settings)
            check_settings(self)

    config_class.__init__ = __init__  # type: ignore[method-assign]
    return config_class


def check_settings(config: PreTrainedConfig) -> None:
    """Check settings that transformers takes as they come, those of inner configurations too.

    Raises:
        ArgumentError: for an implementation that is not built in, as it may be code from elsewhere,
            for a flag that is none, and for NaN.
    """
    for name, built_in in _IMPLEMENTATIONS.items():
        value = getattr(config, f"_{name}", None)
        if value is not None and value not in built_in:
            raise ArgumentError(
                name,
                value,
                "not built in, and might be code from elsewhere",
                f"Pass one of {', '.join(built_in)}",
            )
    for name in _FLAGS:
        value = getattr(config, name, None)
        if not isinstance(value, bool | None):
            raise ArgumentError(name, value, "no flag", "Pass true or false")
    for name, value in vars(config).items():
        if isinstance(value, float) and math.isnan(value):
            raise ArgumentError(name, value, "not a number", "Pass one")
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            check_settings(inner)
