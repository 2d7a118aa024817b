"""From hidden states and an output layer straight to the loss, adapters on the layer included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_rece.embeddings.as_rows import as_rows
from hf_rece.errors import ArgumentError
from hf_rece.head.shaping import Shaping
from hf_rece.losses import Loss, LossConfig, build_loss, cross_entropy_loss

# A model sets these itself, by its labels, its reduction and what it does to its logits.
_SET_BY_MODEL = (
    "bias", "ignore_index", "reduction", "num_items_in_batch", "logit_scale", "logit_softcap",
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
        shaping: Shaping = Shaping(),  # noqa: B008
    ) -> Tensor:
        """Return the training loss of each token, 0 where there is no label.

        Args:
            layer: output layer, plain or wrapped by PEFT.
            hidden: (..., D).
            labels: (...) int64, aligned; -100 for none.
            shaping: what the model does to its logits.

        Raises:
            ArgumentError: as as_rows and the loss.
        """
        terms = as_rows(layer, hidden)
        return self.loss(
            terms.hidden,
            terms.rows,
            labels,
            bias=terms.bias,
            reduction="none",
            logit_scale=shaping.scale,
            logit_softcap=shaping.softcap,
        )


def exact_losses(
    layer: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shaping: Shaping = Shaping(),  # noqa: B008
) -> Tensor:
    """Return the exact cross-entropy of each token, 0 where there is no label.

    Arguments and errors are those of LargeVocabHead.losses.
    """
    terms = as_rows(layer, hidden)
    return cross_entropy_loss(
        terms.hidden,
        terms.rows,
        labels,
        bias=terms.bias,
        reduction="none",
        logit_scale=shaping.scale,
        logit_softcap=shaping.softcap,
    )
