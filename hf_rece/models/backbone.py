"""Which configurations may be the backbone of a recommender, and what becomes of them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_rece.errors import ArgumentError
from hf_rece.models.sasrec import SASRecConfig, SASRecModel
from hf_rece.models.settings import check_settings, clear_settings_errors
from hf_rece.models.sizes import check_sizes

# In transformers' list of causal language models, but their plain forward sees the whole sequence.
_BIDIRECTIONAL = ("cpmant", "flaubert", "xlm", "xlnet")


def as_backbone(
    backbone: dict[str, Any] | PreTrainedConfig | None, vocab_size: int, pad_token_id: int | None
) -> PreTrainedConfig:
    """Return the configuration of a decoder over items; the given one stays as it was.

    Args:
        backbone: configuration, or its dictionary; None for SASRec.
        vocab_size: items and padding.
        pad_token_id: token that fills up sequences.

    Raises:
        ArgumentError: for what is no configuration, an architecture of transformers that is no
            decoder, settings that it cannot use, or sizes that no model has.
    """
    if not isinstance(backbone, dict | PreTrainedConfig | None):
        raise ArgumentError(
            "backbone", backbone, "no configuration", "Pass one, its dictionary, or None for SASRec"
        )
    if isinstance(backbone, dict):
        settings = dict(backbone)
        model_type = settings.pop("model_type", SASRecConfig.model_type)
        known = model_type == SASRecConfig.model_type  # whether or not it is registered
        if not known and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
            raise _no_decoder(model_type)
        with clear_settings_errors("backbone", model_type):
            make = SASRecConfig if known else partial(AutoConfig.for_model, model_type)
            config = make(**settings)
    else:
        config = SASRecConfig() if backbone is None else copy.deepcopy(backbone)
    # Labels are aligned with the inputs: a model that sees later items would read the answer.
    theirs = config.model_type in CONFIG_MAPPING_NAMES
    is_decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    sees_later = config.is_encoder_decoder or config.model_type in _BIDIRECTIONAL
    if theirs and (sees_later or not is_decoder):
        raise _no_decoder(config.model_type)
    check_sizes(config)
    check_settings(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    config.name_or_path = ""  # may be a path of this machine, which nobody else needs to know
    config.vocab_size = vocab_size
    config.pad_token_id = pad_token_id
    config.use_cache = False
    config.bos_token_id = config.eos_token_id = None
    return config


def _no_decoder(model_type: Any) -> ArgumentError:
    return ArgumentError(
        "backbone", model_type, "no decoder", "Pass sasrec, gpt2, llama, qwen3 or alike"
    )


def make_backbone(config: Any, *, own_table: bool) -> PreTrainedModel:
    """Return a new backbone.

    Args:
        config: as as_backbone returns it.
        own_table: with its input embeddings; otherwise with the fewest rows that it can be made of,
            for a table that takes their place.

    Raises:
        ArgumentError: for settings that it cannot be made of.
    """
    vocab_size = config.vocab_size
    if not own_table:
        config.vocab_size = (config.pad_token_id or 0) + 1
    try:
        with clear_settings_errors("backbone", config.model_type):
            if isinstance(config, SASRecConfig):
                return SASRecModel(config)
            model: PreTrainedModel = AutoModel.from_config(config)
            return model
    finally:
        config.vocab_size = vocab_size


def name_of_embeddings(backbone: PreTrainedModel) -> str:
    """Return the name of the module that holds the input embeddings of `backbone`."""
    embeddings = backbone.get_input_embeddings()
    names: dict[int, str] = {id(module): name for name, module in backbone.named_modules()}
    return names[id(embeddings)]
