"""A recommender whose vocabulary is cut over processes: made so, or cut afterwards."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.embeddings.sharded import (
    ShardedEmbedding,
    ShardedLayer,
    ShardedLinear,
    draw_rows,
)
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.ops.shards import ShardedRows, VocabShards, shard_classes
from hf_rece.ops.topk import label_rank, streamed_topk
from hf_rece.ops.vocab_mesh import vocab_mesh


def shards_of_processes(
    config: RecommenderConfig, vocab_parallel_size: int | None = None
) -> VocabShards | None:
    """Return how the vocabulary is cut over processes; None where one holds all of it.

    Collective: makes process groups of its own, whose messages no other's can delay.

    Args:
        config: of the model.
        vocab_parallel_size: processes that hold the vocabulary together, neighbours by rank; None
            for all. Any number, where there is one process.

    Raises:
        ArgumentError: for a compressed table, row-sparse gradients, fewer rows than processes, or a
            size that does not divide the number of processes.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    n_processes = distributed.get_world_size()
    if 1 in (n_processes, vocab_parallel_size):
        return None
    if (config.item_embedding or {}).get("type", "dense") != "dense":
        raise ArgumentError(
            "vocab_parallel", True, "compressed tables are not cut: they are small", "Leave it out"
        )
    if config.sparse_grad:
        raise ArgumentError(
            "sparse_grad", True, "rows that are cut have dense gradients", "Leave it out"
        )
    if vocab_parallel_size in (None, n_processes):
        return shard_classes(config.vocab_size, distributed.new_group())
    return shard_classes(config.vocab_size, vocab_mesh(vocab_parallel_size))


def sharded_layers(
    config: RecommenderConfig, shards: VocabShards
) -> tuple[ShardedEmbedding, ShardedLinear]:
    """Return a new input table and output layer, whose rows are still to be filled."""
    head = ShardedLinear(shards, config.hidden_size, bias=config.output_bias)
    return ShardedEmbedding(shards, config.hidden_size), head


def initialise_sharded(layer: ShardedLayer, std: float, *, tied: bool) -> None:
    """Draw the rows of a new sharded layer. Collective.

    Args:
        layer: ShardedEmbedding or ShardedLinear.
        std: standard deviation of the rows.
        tied: the output layer's rows are the input table's.
    """
    if isinstance(layer, ShardedEmbedding) or not tied:
        draw_rows(layer.weight, layer.shards, std)


def keep_own_rows(
    table: nn.Module, head: nn.Module, layers: tuple[ShardedEmbedding, ShardedLinear]
) -> None:
    """Copy this process's rows of whole layers into sharded ones.

    Raises:
        ArgumentError: for layers that are not plain.
    """
    if type(table) is not nn.Embedding or type(head) is not nn.Linear:
        raise ArgumentError(
            "vocab_parallel",
            (type(table).__name__, type(head).__name__),
            "input and output layer are wrapped, by an adapter perhaps",
            "Merge or unload it first",
        )
    shards = layers[0].shards
    for whole, sharded in zip((table, head), layers, strict=True):
        for name, parameter in sharded.named_parameters():
            rows = whole.get_parameter(name)
            parameter.data = rows.detach()[shards.first : shards.stop].clone()
            parameter.requires_grad_(rows.requires_grad)
    if table.weight is head.weight:
        layers[1].weight = layers[0].weight


def rank_of_own(
    terms: OutputTerms,
    targets: Tensor,
    k: int,
    excluded: Tensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what label_rank and streamed_topk return of this process's own states. Collective.

    Args:
        terms: of states (N, D), over ShardedRows.
        targets: (N,) int64.
        k: best classes wanted.
        excluded: (E,) class ids, or None, the same in all processes.
        seen: (N, S) class ids padded with -1; None in all processes or in none.

    Returns:
        greater (N,), tied (N,), ids (N, k).
    """
    rows, width = terms.rows, 0 if seen is None else seen.shape[1]
    if not isinstance(rows, ShardedRows):
        raise TypeError(f"{type(rows).__name__} is whole")
    shared = rows.shards.share_tokens(len(targets), width, device=targets.device)
    if seen is not None:
        widest = max(counts[1] for counts in shared.counts)
        seen = shared.gather(F.pad(seen, (0, widest - width), value=-1))
    if shared.total(0) == 0:
        none = targets.new_empty(0)
        return none, none, none.view(0, k)
    hidden, targets = shared.gather(terms.hidden), shared.gather(targets)
    search: Any = {"bias": terms.bias, "excluded_ids": excluded, "seen_ids": seen}
    greater, tied = label_rank(hidden, rows, targets, **search)
    ids = streamed_topk(hidden, rows, k, **search)[1]
    return greater[shared.own], tied[shared.own], ids[shared.own]


def check_same_question(shards: VocabShards | None, device: torch.device, **question: Any) -> None:
    """Raise ArgumentError in all processes of a group unless all ask the same. Collective.

    Args:
        shards: how the vocabulary is cut; None for not.
        device: of the messages.
        **question: arguments by name; the first one is named in the message.
    """
    if shards is None:
        return
    checksum = zlib.crc32(repr(question).encode())
    told = shards.share_tokens(checksum, device=device)
    if len(set(told.sizes)) > 1:
        name, value = next(iter(question.items()))
        size = len(value) if hasattr(value, "__len__") else value
        raise ArgumentError(
            name,
            size,
            "processes ask for different things, and each holds a part of the answer",
            "Pass the same arguments in every process",
        )
