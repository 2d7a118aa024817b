"""A recommender over any Hugging Face decoder: items are its tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.embeddings.as_rows import as_rows
from hf_rece.embeddings.gathered import call_gathered
from hf_rece.embeddings.item_table import learn_item_table
from hf_rece.embeddings.sharded import ShardedLayer
from hf_rece.embeddings.table_head import TableHead
from hf_rece.losses import build_loss, cross_entropy_loss
from hf_rece.models.backbone import make_backbone, name_of_embeddings
from hf_rece.models.item_tables import COMPRESSED, initialise_table, item_tables
from hf_rece.models.recommendation import RecommenderOutput
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.recommending import Recommending
from hf_rece.models.settings import clear_settings_errors
from hf_rece.models.vocab_parallel import (
    initialise_sharded,
    keep_own_rows,
    rank_of_own,
    sharded_layers,
    shards_of_processes,
)
from hf_rece.ops.shards import ShardedRows
from hf_rece.ops.topk import label_rank, streamed_topk

# Knobs that change what the model's probabilities are, rather than how they are estimated.
LOGIT_SHAPING = ("logit_scale", "logit_softcap")


class RecommenderModel(Recommending):
    """Next-item recommender: a decoder whose tokens are items, trained without logits.

    Labels are aligned: labels[t] is the item after input_ids[t]; nothing is shifted.

    Args:
        config: RecommenderConfig.
        vocab_parallel: cut the vocabulary over processes, see cut_vocabulary; each makes its own
            rows alone.
        vocab_parallel_size: processes that hold the vocabulary together, which implies
            vocab_parallel; None for all.

    Example:
        >>> config = RecommenderConfig(vocab_size=50, loss_type="rece")
        >>> model = RecommenderModel(config)
        >>> ids = torch.randint(1, 50, (2, 7))
        >>> model(input_ids=ids, labels=ids).loss.shape
        torch.Size([])
    """

    config: RecommenderConfig
    config_class = RecommenderConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: RecommenderConfig,
        *,
        vocab_parallel: bool = False,
        vocab_parallel_size: int | None = None,
    ) -> None:
        with clear_settings_errors("config", config.model_type):
            super().__init__(config)
        if vocab_parallel or vocab_parallel_size is not None:
            self.vocab_shards = shards_of_processes(config, vocab_parallel_size)
        tables: Any = item_tables(config)
        if self.vocab_shards is not None:
            tables = sharded_layers(config, self.vocab_shards)
        self.backbone = make_backbone(config.backbone, own_table=tables is None)
        if tables is None:
            self.item_head: nn.Module = nn.Linear(
                config.hidden_size, config.vocab_size, bias=config.output_bias
            )
        else:
            table, self.item_head = tables
            self.backbone.set_input_embeddings(table)
        if not isinstance(self.item_head, TableHead):
            self._tied_weights_keys = {
                "item_head.weight": f"backbone.{name_of_embeddings(self.backbone)}.weight"
            }
            if config.tie_word_embeddings:
                self._keys_to_ignore_on_save = {"item_head.weight"}
        self.tokenizer: ItemTokenizer | None = None
        self._reduced_elsewhere: list[str] = []
        self.post_init()

    @torch.no_grad()
    def cut_vocabulary(self, vocab_parallel_size: int | None = None) -> None:
        """Cut a whole vocabulary over processes, in place: each keeps its own rows. Collective.

        The same model in all processes. RecommenderModel(config, vocab_parallel=True) never makes
        the whole. Does nothing where the vocabulary is cut already, or there is one process.

        Args:
            vocab_parallel_size: processes that hold the vocabulary together, neighbours by rank,
                such as those of one machine: tokens travel among them alone, and gradients are
                averaged over all such groups. None for all processes.

        Raises:
            ArgumentError: for a compressed table, row-sparse gradients, an output layer with an
                adapter, fewer rows than processes, or a size that does not divide their number.
        """
        if self.vocab_shards is not None:
            return
        shards = shards_of_processes(self.config, vocab_parallel_size)
        if shards is None:
            return
        table, head = self.get_input_embeddings(), self.item_head
        layers = sharded_layers(self.config, shards)
        keep_own_rows(table, head, layers)
        self.backbone.set_input_embeddings(layers[0])
        self.item_head, self.vocab_shards = layers[1], shards

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config.backbone, "initializer_range", 0.02)
        if isinstance(module, ShardedLayer):
            initialise_sharded(module, std, tied=self.config.tie_word_embeddings)
        elif isinstance(module, COMPRESSED):
            initialise_table(module, std)
        elif module is self.item_head:
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module.bias, Tensor):
                init.zeros_(module.bias)
        else:
            self.backbone._init_weights(module)

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint has filled; the backbone does not know its new table."""
        super().initialize_weights()
        if isinstance(self.get_input_embeddings(), (*COMPRESSED, ShardedLayer)):
            self._init_weights(self.get_input_embeddings())

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Codes and signatures: every process has them, and DDP cannot send int16. Own rows."""
        return [
            *(name for name, _ in self.named_buffers() if name.endswith((".codes", ".signatures"))),
            *self.names_of_own_rows(),
            *self._reduced_elsewhere,
        ]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        self._reduced_elsewhere = names

    def learn_item_tables(self, train: Dataset, *, seed: int = 0) -> None:
        """Give new compressed tables the codes or signatures of a training log, before training.

        Does nothing for dense tables, and for those whose codes are the ids' own or given.

        Args:
            train: the train part of a split.
            seed: of the codes.

        Raises:
            ArgumentError: if the log is too small for the codes, or has ids beyond the table.
        """
        learn_item_table(self.get_input_embeddings(), self.config.item_embedding, train, seed=seed)
        if isinstance(self.item_head, TableHead) and self.item_head.own_table is not None:
            table = self.item_head.own_table
            learn_item_table(table, self.config.item_embedding, train, seed=seed)

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's item embeddings."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's item embeddings, and a compressed table tied to them."""
        self.backbone.set_input_embeddings(value)
        if isinstance(self.item_head, TableHead) and self.item_head.own_table is None:
            self.item_head.tied_table = (value,)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output rows' layer."""
        return self.item_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output rows' layer."""
        self.item_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        seen_ids: Tensor | None = None,
        rank_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_logits: bool = False,
        **kwargs: Any,
    ) -> RecommenderOutput:
        """Return the loss, or hidden states where there are no labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 at items and 0 at padding.
            labels: (B, T) int64, the item after each position, -100 for none.
            seen_ids: (B, S) int64 padded with -1: items that do not compete in the ranks of that
                row.
            rank_k: in evaluation, rank the labels and return the rank_k best items.
            num_items_in_batch: labels in all micro-batches of the optimiser step.
            output_logits: also return logits (B, T, C): the tensor that this package avoids.
            **kwargs: passed to the backbone.

        Raises:
            ArgumentError: for labels out of range, and whatever the loss raises.
        """
        self._prepare_table()
        if attention_mask is not None and self._counts_padding(attention_mask):
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            kwargs.setdefault("position_ids", positions)
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        ).last_hidden_state
        logits = self.item_head(hidden) if output_logits else None
        if labels is None:
            return RecommenderOutput(last_hidden_state=hidden, logits=logits)
        row, position = (labels != -100).nonzero().unbind(1)
        states, targets = hidden[row, position], labels[row, position]
        if self.training:
            loss = self._training_loss(hidden, labels, states, targets, num_items_in_batch)
            return RecommenderOutput(loss=loss, logits=logits)
        output = self._exact(states, targets, None if seen_ids is None else seen_ids[row], rank_k)
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        output.loss, output.logits = output.losses.sum() / count, logits  # type: ignore[union-attr]
        return output

    def _exact(
        self, states: Tensor, targets: Tensor, seen: Tensor | None, rank_k: int | None
    ) -> RecommenderOutput:
        """Return the exact losses of targets (N,) and, with rank_k, their ranks."""
        excluded = self._excluded()
        shaping = {n: v for n, v in (self.config.loss_kwargs or {}).items() if n in LOGIT_SHAPING}

        def compute(states: Tensor) -> tuple[Tensor, ...]:
            terms = as_rows(self.item_head, states)
            losses = cross_entropy_loss(
                terms.hidden,
                terms.rows,
                targets,
                bias=terms.bias,
                excluded_ids=excluded,
                reduction="none",
                **shaping,
            )
            if rank_k is None:
                return (losses,)
            if isinstance(terms.rows, ShardedRows):
                return losses, *rank_of_own(terms, targets, rank_k, excluded, seen)
            search: Any = {"bias": terms.bias, "excluded_ids": excluded, "seen_ids": seen}
            greater, tied = label_rank(terms.hidden, terms.rows, targets, **search)
            best = streamed_topk(terms.hidden, terms.rows, rank_k, **search)[1]
            return losses, greater, tied, best

        losses, *ranks = call_gathered(self.item_head, compute, states)
        greater, tied, best = ranks or (None, None, None)
        return RecommenderOutput(losses=losses, greater=greater, tied=tied, topk_ids=best)

    def _prepare_table(self) -> None:
        table = self.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            table.sparse = self.config.sparse_grad
        elif isinstance(self.item_head, TableHead) and self.item_head.own_table is None:
            self.item_head.tied_table = (table,)  # a replica of this model has a table of its own

    def _counts_padding(self, attention_mask: Tensor) -> bool:
        """Return whether the backbone would count the padding on the left as positions."""
        takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        return takes_positions and bool((attention_mask[:, 0] == 0).any())

    def _training_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        states: Tensor,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        knobs = dict(self.config.loss_kwargs or {})
        padding, more = self._excluded(), knobs.pop("excluded_ids", None)
        both = [
            torch.as_tensor(ids, device=self.device) for ids in (padding, more) if ids is not None
        ]
        excluded = torch.cat(both) if both else None
        loss = build_loss(self.config.loss_type, **knobs, excluded_ids=excluded)
        if getattr(loss.config, "shared_by", None) == "sequence":
            states, targets = hidden, labels  # these negatives need to know the sequences

        def compute(states: Tensor) -> Tensor:
            terms = as_rows(self.item_head, states)
            return loss(
                terms.hidden,
                terms.rows,
                targets,
                bias=terms.bias,
                num_items_in_batch=num_items_in_batch,
            )

        return call_gathered(self.item_head, compute, states)

    def _excluded(self) -> Tensor | None:
        """Return padding, which is never recommended."""
        pad = self.config.pad_token_id
        return None if pad is None else torch.tensor([pad], device=self.device)
