"""Configuration of a recommender."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from hf_rece.data.item_tokenizer import PAD_ID
from hf_rece.embeddings.item_table import DenseTable, item_table_settings
from hf_rece.errors import ArgumentError
from hf_rece.losses import build_loss
from hf_rece.losses.checks import check_between
from hf_rece.models.backbone import as_backbone
from hf_rece.models.settings import refuses_by_name
from hf_rece.models.sizes import check_size


@refuses_by_name
@strict
class RecommenderConfig(PreTrainedConfig):
    """Configuration of RecommenderModel.

    Args:
        backbone: configuration of any decoder that AutoModel knows, or its dictionary; copied,
            with vocab_size and the special tokens overwritten. None for SASRec.
        vocab_size: items and padding.
        tie_word_embeddings: score items by their input embeddings; otherwise by rows of their own.
        output_bias: add a learned bias for each item.
        item_embedding: {"type": "dense" | "compositional" | "lma", and its settings}, see
            hf_rece.embeddings.item_table; None for dense.
        loss_type: name of the training loss, see hf_rece.losses.
        loss_kwargs: its knobs. With "sparse_grad", the item embeddings' gradients are sparse too.
        training_run: what the model card says of the training: data, cost, metrics. Written by
            RecommenderTrainer.

    Raises:
        ArgumentError: for a value out of range, an unknown loss, knob, table or setting, a
            reduction other than "mean", a backbone that is no decoder, sizes that no model has, or
            other settings that transformers cannot use.
    """

    model_type = "hf_rece_recommender"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012

    backbone: dict[str, Any] | PreTrainedConfig | None = None
    vocab_size: int = 1000
    tie_word_embeddings: bool = True
    output_bias: bool = False
    item_embedding: dict[str, Any] | None = None
    loss_type: str = "cross_entropy"
    loss_kwargs: dict[str, Any] | None = None
    training_run: dict[str, Any] | None = None
    pad_token_id: int | None = PAD_ID

    def __post_init__(self, **kwargs: Any) -> None:
        check_between("vocab_size", self.vocab_size, 1)
        if self.pad_token_id is not None:
            check_between("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        for name in ("loss_kwargs", "training_run"):
            if not isinstance(getattr(self, name), dict | None):
                raise ArgumentError(
                    name, getattr(self, name), "no dictionary", "Pass one, or None for none"
                )
        check_size("vocab_size", self.vocab_size)
        self.backbone = as_backbone(self.backbone, self.vocab_size, self.pad_token_id)
        table = item_table_settings(self.item_embedding)
        knobs = self.loss_kwargs or {}
        if knobs.get("sparse_grad") and not isinstance(table, DenseTable):
            raise ArgumentError(
                "sparse_grad", True, "compressed tables have dense gradients", "Leave it out"
            )
        build_loss(self.loss_type, **knobs)
        if knobs.get("reduction", "mean") != "mean":
            raise ArgumentError(
                "reduction", knobs["reduction"], "training needs a mean", "Leave it out"
            )
        super().__post_init__(**kwargs)

    @property
    def sparse_grad(self) -> bool:
        """Whether the item table has row-sparse gradients."""
        return bool((self.loss_kwargs or {}).get("sparse_grad", False))

    @property
    def hidden_size(self) -> int:
        """D, the width of the backbone's hidden states."""
        return int(self.backbone.hidden_size)  # type: ignore[union-attr]

    @property
    def longest_history(self) -> int | None:
        """The longest history that the backbone reads, None if it sets no limit."""
        return getattr(self.backbone, "max_position_embeddings", None)
