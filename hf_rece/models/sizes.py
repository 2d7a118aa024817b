"""Sizes that a configuration may ask for, checked before memory for them is."""

from __future__ import annotations

from typing import Any

from hf_rece.errors import ArgumentError

# Least and most, far from what any model has. Plans hold class ids in 32 bits.
_SIZES = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "num_hidden_layers": (0, 2**12),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**20),
    "max_position_embeddings": (1, 2**31 - 1),
}


def check_sizes(config: Any) -> None:
    """Check those sizes that a configuration has, under the names that transformers has for them.

    Raises:
        ArgumentError: as check_size.
    """
    for name in _SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            check_size(name, value)


def check_size(name: str, value: int) -> None:
    """Check one size.

    Args:
        name: as in the configurations of transformers.
        value: of it.

    Raises:
        ArgumentError: if it is less or more than any model has.
    """
    least, most = _SIZES[name]
    if not isinstance(value, int) or not least <= value <= most:
        raise ArgumentError(
            name, value, "no model has that", f"Pass a number from {least} to {most:,}"
        )
