"""Checks of the losses' knobs and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rece.errors import ArgumentError
from hf_rece.losses.watching import current_watch
from hf_rece.ops.rows import OutputRows
from hf_rece.ops.shards import ShardedRows


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(
            name, value, f"not an integer of at least {least}", f"Pass {least} or more"
        )


def check_between(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raise ArgumentError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ArgumentError(
            name, value, f"not an integer from {least} to {most}", "Pass one in that range"
        )


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "neither True nor False", "Pass one of them")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(name, value, "no such choice", f"Pass one of {', '.join(choices)}")


def check_shapes(hidden: Tensor, rows: OutputRows, labels: Tensor, bias: Tensor | None) -> None:
    """Raise ArgumentError unless hidden states, rows, labels and bias fit together."""
    if not hidden.is_floating_point() or hidden.dim() < 2:
        raise ArgumentError(
            "hidden",
            (tuple(hidden.shape), hidden.dtype),
            "hidden states are floating point vectors",
            "Pass a tensor of shape (N, D) or (B, T, D)",
        )
    if hidden.shape[-1] != rows.width:
        raise ArgumentError(
            "hidden",
            tuple(hidden.shape),
            f"the output rows are {rows.width} wide",
            f"Pass hidden states whose last dimension is {rows.width}",
        )
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
        raise ArgumentError(
            "labels",
            (tuple(labels.shape), labels.dtype),
            f"hidden has shape {tuple(hidden.shape)}",
            f"Pass integer labels of shape {tuple(hidden.shape[:-1])}",
        )
    n_rows = rows.shards.n_local if isinstance(rows, ShardedRows) else rows.n_rows
    if bias is not None and bias.shape != (n_rows,):
        raise ArgumentError(
            "bias",
            tuple(bias.shape),
            f"there are {n_rows} classes",
            f"Pass a bias of shape ({n_rows},), or None",
        )


def checked_ids(
    ids: Tensor | list[int] | tuple[int, ...] | None, n_classes: int, device: torch.device
) -> Tensor | None:
    """Return distinct class ids as a tensor, None for none.

    Raises:
        ArgumentError: if one is out of range, or every class is among them.
    """
    if ids is None or len(ids) == 0:
        return None
    excluded: Tensor = torch.unique(torch.as_tensor(ids, dtype=torch.long, device=device))
    if int(excluded[0]) < 0 or int(excluded[-1]) >= n_classes:
        raise ArgumentError(
            "excluded_ids",
            excluded.tolist()[:5],
            f"there are {n_classes} classes",
            f"Pass class ids from 0 to {n_classes - 1}",
        )
    if len(excluded) == n_classes:
        raise ArgumentError(
            "excluded_ids", n_classes, "every class is excluded", "Leave classes to score"
        )
    return excluded


def check_values(
    states: Tensor, labels: Tensor, n_classes: int, excluded: Tensor | None, ignore_index: int
) -> None:
    """Raise ArgumentError for labels out of range or excluded, and for NaN states.

    Args:
        states: (N, D).
        labels: (N,), without ignored ones.
        n_classes: C.
        excluded: (E,) ids, or None.
        ignore_index: named in messages.
    """
    if len(labels) == 0:
        return
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise ArgumentError(
            "labels",
            torch.unique(outside).tolist()[:5],
            f"there are {n_classes} classes",
            f"Pass labels from 0 to {n_classes - 1}, or ignore_index={ignore_index} for tokens "
            "without a label",
        )
    if excluded is not None:
        clash = labels[torch.isin(labels, excluded)]
        if len(clash):
            raise ArgumentError(
                "labels",
                torch.unique(clash).tolist()[:5],
                "these classes are in excluded_ids",
                f"Set them to ignore_index={ignore_index}, or take them out of excluded_ids",
            )
    watch = current_watch()
    if watch is not None:
        watch.note(states)
    elif bool(torch.isnan(states).any()):
        raise ArgumentError(
            "hidden",
            "NaN",
            f"{int(torch.isnan(states).any(1).sum())} of {len(states)} labelled tokens hold NaN",
            "Look for the layer that made it: torch.autograd.set_detect_anomaly(True), a lower "
            "learning rate, or a float32 or bfloat16 model instead of float16",
        )
