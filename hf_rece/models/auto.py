"""Make transformers' Auto classes know the models and the tokenizer of hf_rece."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoTokenizer

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig, SASRecModel
from hf_rece.models.sparse_checkpoint import register_sparse_checkpoints


def register_auto_classes() -> None:
    """Register models, tokenizer and sparse checkpoints; doing so again changes nothing."""
    for config, model in ((SASRecConfig, SASRecModel), (RecommenderConfig, RecommenderModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoTokenizer.register(RecommenderConfig, slow_tokenizer_class=ItemTokenizer, exist_ok=True)
    register_sparse_checkpoints(RecommenderConfig.model_type)
