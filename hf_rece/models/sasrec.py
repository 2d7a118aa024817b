"""SASRec: a small causal transformer over item sequences (arXiv 1808.09781)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from hf_rece.errors import ArgumentError
from hf_rece.losses.checks import check_between
from hf_rece.models.settings import refuses_by_name
from hf_rece.models.sizes import check_sizes


@refuses_by_name
@strict
class SASRecConfig(PreTrainedConfig):
    """Configuration of SASRecModel.

    Args:
        vocab_size: items and padding.
        hidden_size: D.
        num_hidden_layers: transformer blocks.
        num_attention_heads: heads; divides hidden_size.
        intermediate_size: width of the feed-forward layer; None for 4 hidden_size.
        max_position_embeddings: longest sequence.
        dropout: probability, of embeddings, attention and feed-forward alike.
        hidden_act: "gelu" or "relu".
        norm_first: normalise before each layer and once at the end; otherwise after each layer.
            Before trains stably at the learning rates that huge vocabularies like.
        scale_embeddings: multiply item embeddings by sqrt(hidden_size), as published.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: added to variances.
        pad_token_id: token that fills up sequences.

    Raises:
        ArgumentError: for sizes out of range, or that no model has, if heads do not divide the
            width, or hidden_act is unknown.
    """

    model_type = "hf_rece_sasrec"

    vocab_size: int = 1000
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    max_position_embeddings: int = 50
    dropout: float | int = 0.2
    hidden_act: str = "gelu"
    norm_first: bool = True
    scale_embeddings: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-8
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self)
        super().__post_init__(**kwargs)
        for name, least in _AT_LEAST.items():
            check_between(name, getattr(self, name), least)
        if self.intermediate_size is not None:
            check_between("intermediate_size", self.intermediate_size, 1)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout <= 1:
            raise ArgumentError("dropout", self.dropout, "no probability", "Pass 0 to 1")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ArgumentError(name, value, "no number from 0", "Pass one")
        if self.hidden_size % self.num_attention_heads:
            raise ArgumentError(
                "num_attention_heads",
                self.num_attention_heads,
                f"does not divide hidden_size={self.hidden_size}",
                "Pass a divisor of hidden_size",
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ArgumentError("hidden_act", self.hidden_act, "unknown", "Pass gelu or relu")


_AT_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "max_position_embeddings": 1,
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * scaling  # (B, heads, T, T)
    if attention_mask is None:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = F.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


class SASRecAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, T, D) and, with eager attention, the weights (B, heads, T, T)."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden).view(heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager_attention
        )
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=float(self.config.dropout) if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        output: Tensor = self.o_proj(mixed.reshape(hidden.shape))
        return output, weights


class SASRecLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.norm_first = config.norm_first
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(float(config.dropout))
        self.attention = SASRecAttention(config)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(width, wide)
        self.down_proj = nn.Linear(wide, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return (B, T, D)."""
        if self.norm_first:
            hidden = hidden + self._attend(self.attention_norm(hidden), attention_mask, **kwargs)
            hidden = hidden + self._feed_forward(self.feed_forward_norm(hidden))
        else:
            hidden = self.attention_norm(hidden + self._attend(hidden, attention_mask, **kwargs))
            hidden = self.feed_forward_norm(hidden + self._feed_forward(hidden))
        return hidden

    def _attend(self, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        mixed: Tensor = self.attention(hidden, attention_mask=attention_mask, **kwargs)[0]
        return self.dropout(mixed)  # type: ignore[no-any-return]

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        wide = self.dropout(self.activation(self.up_proj(hidden)))
        return self.dropout(self.down_proj(wide))  # type: ignore[no-any-return]


class SASRecPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of SASRec."""

    config: SASRecConfig
    config_class = SASRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASRecLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SASRecLayer,
        "attentions": SASRecAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class SASRecModel(SASRecPreTrainedModel):
    """The SASRec backbone: item ids in, hidden states out.

    Sequences may be padded on either side: positions count from a sequence's first real item.

    Reference:
        Kang and McAuley, 2018, arXiv 1808.09781. Differs by norm_first (the published program
        normalises the queries only), by a feed-forward layer of 4 D with gelu in place of D with
        relu, and by normal initialisation.
    """

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(float(config.dropout))
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.norm_first
            else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the item embeddings."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the item embeddings."""
        self.embed_tokens = value  # type: ignore[assignment]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Return hidden states (B, T, D).

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 at items and 0 at padding.
            position_ids: (B, T) int64; counted from the attention mask if None.
            inputs_embeds: (B, T, D) in place of input_ids.
            **kwargs: output_hidden_states, output_attentions, arguments of the attention backend.

        Raises:
            ArgumentError: for sequences longer than max_position_embeddings.
        """
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.shape[1] > self.config.max_position_embeddings:
            raise ArgumentError(
                "input_ids",
                tuple(hidden.shape[:2]),
                f"max_position_embeddings is {self.config.max_position_embeddings}",
                "Pass shorter sequences, the most recent items, or a model with more positions",
            )
        if self.config.scale_embeddings:
            hidden = hidden * self.config.hidden_size**0.5
        if attention_mask is not None and _padded_on_the_right(attention_mask):
            # Later padding is never attended to: without a mask, attention takes its fast causal
            # path.
            attention_mask = None
        if position_ids is None:
            position_ids = _positions(hidden, attention_mask)
        hidden = self.dropout(hidden + self.embed_positions(position_ids))
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=causal_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


def _padded_on_the_right(attention_mask: Tensor) -> bool:
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _positions(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
