"""What a model does to its logits after the output layer: a scale, a softcap, or an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_rece.errors import ArgumentError

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Configurations spell a division "logits_scaling"; this one multiplies by it.
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
# And this one divides the hidden states, before the output layer.
SCALES_HIDDEN_STATES = ("minicpm3",)


class Operation(NamedTuple):
    """One scalar operation on logits: mul, div, add, sub, neg or tanh, and its number."""

    name: str
    number: float = 1.0


class Shaping(NamedTuple):
    """logit = softcap(scale * (<h, w> + b)), softcap(z) = c tanh(z / c).

    Args:
        scale: multiplies every logit.
        softcap: c, None for no cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def is_close(self, other: Shaping) -> bool:
        """Return whether both make the same logits, up to rounding."""
        caps = (self.softcap or math.inf, other.softcap or math.inf)
        return math.isclose(self.scale, other.scale, rel_tol=1e-5) and (
            caps[0] == caps[1] or math.isclose(*caps, rel_tol=1e-5)
        )


UNSHAPED = Shaping()


def shaping_of_config(config: PreTrainedConfig) -> Shaping:
    """Return what the configuration's known names say; the first training step checks it."""
    text = config.get_text_config()
    scale = _first(text, SCALES)
    scales_logits = text.model_type not in SCALES_HIDDEN_STATES
    if scale is None and scales_logits and getattr(text, "logits_scaling", None) is not None:
        multiplies = text.model_type in MULTIPLIES_BY_LOGITS_SCALING
        scale = text.logits_scaling if multiplies else 1 / text.logits_scaling
    softcap = _first(text, SOFTCAPS)
    return Shaping(1.0 if scale is None else float(scale), float(softcap) if softcap else None)


def shaping_of_operations(operations: Sequence[Operation], model: str) -> Shaping:
    """Return the scale and softcap that the recorded operations amount to.

    Args:
        operations: in the order in which the model applied them.
        model: its class, for the message.

    Raises:
        ArgumentError: if they are anything else; names the operation.
    """
    scale, cap, shifted = 1.0, None, False
    for operation in operations:
        name, number = operation
        factor = {"mul": number, "div": 1 / number if number else math.nan, "neg": -1.0}.get(name)
        if factor is not None and cap is None:
            scale *= factor
        elif factor is not None:
            cap = cap * factor  # type: ignore[operator]
        elif name in ("add", "sub"):
            shifted = True  # the same for every class: no part of a softmax
        elif name == "tanh" and cap is None and not shifted:
            cap = 1.0
        else:
            raise not_understood(model, name)
    if cap is None:
        return Shaping(scale)
    if not cap > 0:
        raise not_understood(model, f"tanh times {cap}")
    return Shaping(scale * cap, cap)


def not_understood(model: str, operation: str) -> ArgumentError:
    """Return the error for a model that does `operation` to its logits."""
    return ArgumentError(
        "model",
        model,
        f"it applies {operation!r} to its logits, which no output loss here can reproduce",
        "Train it with its own loss: restore_output_head(model)",
    )


def _first(config: Any, names: Sequence[str]) -> Any:
    return next(
        (value for name in names if (value := getattr(config, name, None)) is not None), None
    )
