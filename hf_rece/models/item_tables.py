"""The compressed item tables of a recommender."""

from __future__ import annotations

from torch import nn
from transformers import initialization as init

from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.item_table import DenseTable, item_table_settings
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.embeddings.table_head import TableHead
from hf_rece.models.recommender_config import RecommenderConfig

COMPRESSED = (CompositionalEmbedding, LMAEmbedding)


def item_tables(config: RecommenderConfig) -> tuple[nn.Module, TableHead] | None:
    """Return a new compressed input table and the head over it, or over one of its own.

    None where the configuration asks for a dense table.

    Raises:
        ArgumentError: for settings that do not fit the catalogue.
    """
    settings = item_table_settings(config.item_embedding)
    if isinstance(settings, DenseTable):
        return None
    table = settings.make(config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        return table, TableHead(table, bias=config.output_bias, tied=True)
    own = settings.make(config.vocab_size, config.hidden_size)
    return table, TableHead(own, bias=config.output_bias)


def initialise_table(table: CompositionalEmbedding | LMAEmbedding, std: float) -> None:
    """Initialise what no checkpoint has filled of a compressed table.

    Args:
        table: loaded in part, or new.
        std: standard deviation of the rows.
    """
    for parameter in table.parameters():
        init.normal_(parameter, mean=0.0, std=table.factor_std(std))
    for buffer in table.buffers():  # the codes, or the signatures
        if not getattr(buffer, "_is_hf_initialized", False):
            table.reset_identity()
