"""Train recommenders and language models with huge output vocabularies, without the logits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import open_prepared
from hf_rece.data.splits import leave_one_out_split, temporal_split
from hf_rece.data.stream import SequenceStream
from hf_rece.data.synthetic import generate_interactions
from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.errors import (
    ArgumentError,
    DataError,
    HfReceError,
    HubError,
    NonfiniteError,
    WriteError,
)
from hf_rece.head import (
    LargeVocabHead,
    find_head,
    replace_output_head,
    restore_output_head,
)
from hf_rece.losses import (
    BCEConfig,
    CrossEntropyConfig,
    GBCEConfig,
    RECEConfig,
    SampledSoftmaxConfig,
    SCEConfig,
    StratifiedConfig,
    bce_loss,
    build_loss,
    cross_entropy_loss,
    gbce_loss,
    rece_loss,
    sampled_softmax_loss,
    sce_loss,
    stratified_loss,
)
from hf_rece.losses.planning import plan_losses
from hf_rece.models.auto import register_auto_classes
from hf_rece.models.recommendation import recommendations_frame
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig, SASRecModel
from hf_rece.pipeline import register_pipeline
from hf_rece.version import __version__

if TYPE_CHECKING:
    from hf_rece.training.args import LargeVocabTrainingArguments, RecommenderTrainingArguments
    from hf_rece.training.compare import compare_runs
    from hf_rece.training.row_adam import RowAdamW
    from hf_rece.training.sft import LargeVocabSFTConfig, LargeVocabSFTTrainer
    from hf_rece.training.sparsity import DynamicSparsityCallback
    from hf_rece.training.trainer import LargeVocabTrainer, RecommenderTrainer

# Training loads accelerate and much else: only those who train pay for it.
_LAZY = {
    "DynamicSparsityCallback": "hf_rece.training.sparsity",
    "LargeVocabSFTConfig": "hf_rece.training.sft",
    "LargeVocabSFTTrainer": "hf_rece.training.sft",
    "LargeVocabTrainer": "hf_rece.training.trainer",
    "LargeVocabTrainingArguments": "hf_rece.training.args",
    "RecommenderTrainer": "hf_rece.training.trainer",
    "RecommenderTrainingArguments": "hf_rece.training.args",
    "RowAdamW": "hf_rece.training.row_adam",
    "compare_runs": "hf_rece.training.compare",
}

__all__ = [
    "ArgumentError",
    "BCEConfig",
    "CompositionalEmbedding",
    "CrossEntropyConfig",
    "DataError",
    "DynamicSparsityCallback",
    "GBCEConfig",
    "HfReceError",
    "HubError",
    "ItemTokenizer",
    "LMAEmbedding",
    "LargeVocabHead",
    "LargeVocabSFTConfig",
    "LargeVocabSFTTrainer",
    "LargeVocabTrainer",
    "LargeVocabTrainingArguments",
    "NonfiniteError",
    "RECEConfig",
    "RecommenderConfig",
    "RecommenderModel",
    "RecommenderTrainer",
    "RecommenderTrainingArguments",
    "RowAdamW",
    "SASRecConfig",
    "SASRecModel",
    "SCEConfig",
    "SampledSoftmaxConfig",
    "SequenceStream",
    "StratifiedConfig",
    "WriteError",
    "__version__",
    "bce_loss",
    "build_loss",
    "compare_runs",
    "cross_entropy_loss",
    "find_head",
    "gbce_loss",
    "generate_interactions",
    "k_core_filter",
    "leave_one_out_split",
    "load_interactions",
    "open_prepared",
    "plan_losses",
    "prepare_log",
    "rece_loss",
    "recommendations_frame",
    "replace_output_head",
    "restore_output_head",
    "sampled_softmax_loss",
    "sce_loss",
    "stratified_loss",
    "temporal_split",
]

register_auto_classes()
register_pipeline()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "trl":
                raise
            needs = f'{name} needs TRL: pip install "hf_rece[trl]" (Python 3.11)'
            raise ImportError(needs) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
