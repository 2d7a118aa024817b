"""From hidden states and an output layer straight to the loss, adapters on the layer included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_rece.embeddings.as_rows import as_rows
from hf_rece.errors import ArgumentError
from hf_rece.head.shaping import UNSHAPED, Shaping
from hf_rece.losses import Loss, LossConfig, build_loss, cross_entropy_loss
from hf_rece.ops.stream import TokenStatistics
from hf_rece.ops.topk import label_rank, streamed_topk

# A model sets these itself, by its labels, its reduction and what it does to its logits.
_SET_BY_MODEL = (
    "bias", "ignore_index", "reduction", "num_items_in_batch", "logit_scale", "logit_softcap",
    "statistics",
)  # fmt: skip


class LargeVocabHead:
    """The loss of an output layer, without its logits.

    Args:
        loss: a name in LOSSES, or a config object.
        **knobs: of the loss, and shared options (excluded_ids, tile_bytes, backend, generator).

    Raises:
        ArgumentError: for an unknown loss or knob, or one that the model sets itself.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 100)
        >>> hidden, labels = torch.randn(2, 5, 8), torch.randint(100, (2, 5))
        >>> LargeVocabHead("rece", n_rounds=4).losses(layer, hidden, labels).shape
        torch.Size([2, 5])
    """

    def __init__(self, loss: str | LossConfig = "cross_entropy", **knobs: Any) -> None:
        taken = sorted(set(knobs).intersection(_SET_BY_MODEL))
        if taken:
            raise ArgumentError(
                "loss knobs", taken, "the model and its labels decide them", "Leave them out"
            )
        self.loss: Loss = build_loss(loss, **knobs)

    def __repr__(self) -> str:
        return f"LargeVocabHead({self.loss.to_dict()})"

    def losses(
        self,
        layer: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        shaping: Shaping = UNSHAPED,
        statistics: TokenStatistics | None = None,
    ) -> Tensor:
        """Return the training loss of each token, 0 where there is no label.

        Args:
            layer: output layer, plain or wrapped by PEFT.
            hidden: (..., D).
            labels: (...) int64, aligned; -100 for none.
            shaping: what the model does to its logits.
            statistics: filled on the way, unless None.

        Raises:
            ArgumentError: as as_rows and the loss.
        """
        return _losses(self.loss, layer, hidden, labels, shaping, statistics)


def exact_losses(
    layer: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shaping: Shaping = UNSHAPED,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """Return the exact cross-entropy of each token, 0 where there is no label.

    Arguments and errors are those of LargeVocabHead.losses.
    """
    return _losses(cross_entropy_loss, layer, hidden, labels, shaping, statistics)


@torch.no_grad()
def predictions(
    layer: nn.Module, hidden: Tensor, labels: Tensor, shaping: Shaping = UNSHAPED
) -> tuple[Tensor, Tensor]:
    """Return the best class of each position, and the rank of each label.

    Args:
        layer: output layer, plain or wrapped by PEFT.
        hidden: (..., D).
        labels: (...) int64, aligned; -100 for none.
        shaping: what the model does to its logits; a negative scale turns their order around.

    Returns:
        predicted_ids: (...) int64, -100 where there is no label.
        label_ranks: (...) int64 from 1, half of the ties counted as above; -100 without a label.
    """
    terms = as_rows(layer, hidden)
    labelled = labels != -100
    states, targets = terms.hidden[labelled], labels[labelled]
    rows, bias = terms.rows, terms.bias
    if shaping.scale < 0:
        states, bias = -states, None if bias is None else -bias
    predicted, ranks = labels.clone(), labels.clone()
    if len(targets):
        predicted[labelled] = streamed_topk(states, rows, 1, bias=bias)[1][:, 0]
        greater, tied = label_rank(states, rows, targets, bias=bias)
        ranks[labelled] = 1 + greater + tied // 2
    return predicted, ranks


def _losses(
    loss: Loss | Callable[..., Tensor],
    layer: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shaping: Shaping,
    statistics: TokenStatistics | None,
) -> Tensor:
    terms = as_rows(layer, hidden)
    return loss(
        terms.hidden,
        terms.rows,
        labels,
        bias=terms.bias,
        reduction="none",
        logit_scale=shaping.scale,
        logit_softcap=shaping.softcap,
        statistics=statistics,
    )
