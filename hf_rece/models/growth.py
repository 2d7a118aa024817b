"""Growing catalogues: new items for a recommender that is trained already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rece.data.co_occurrence import co_occurring_items
from hf_rece.data.item_tokenizer import Item, ItemTokenizer
from hf_rece.embeddings.growth import (
    Neighbours,
    fill_dense_rows,
    grow_table,
    grown_identity,
    grown_settings,
)
from hf_rece.embeddings.table_head import TableHead
from hf_rece.errors import ArgumentError
from hf_rece.models.item_tables import COMPRESSED
from hf_rece.models.publishing import PublishedRecommender
from hf_rece.models.recommender_config import RecommenderConfig

# Known items that a new item resembles: a list of them, or their weights.
SimilarItems = Sequence[Item] | Mapping[Item, float]


class GrowingCatalogue(PublishedRecommender):
    """Base of recommenders that take new items."""

    config: RecommenderConfig
    backbone: Any
    item_head: nn.Module
    tokenizer: ItemTokenizer | None

    @torch.no_grad()
    def add_items(
        self,
        items: Sequence[Item],
        *,
        neighbours: Mapping[Item, SimilarItems] | None = None,
        histories: Iterable[Sequence[Item]] | None = None,
        seed: int = 0,
    ) -> None:
        """Make new items known: to the tokenizer, the item table and the output rows, in place.

        Rows of known items stay bit for bit as they were, and so do the parameters of compressed
        tables. A new row starts at the weighted mean of its neighbours' rows, or at the mean of all
        items' rows where it has none, and a little noise. In tables with codes or signatures, new
        items share those of their neighbours in part.

        The parameters of a dense table are new tensors afterwards: make a new optimiser, as a new
        Trainer does. Items that the tokenizer was given just before (tokenizer.add_items) are
        taken too.

        Args:
            items: new item ids.
            neighbours: new item -> known items that it resembles, or known item -> weight.
            histories: in place of neighbours, lists of item ids in order of time, in which new
                items stand beside known ones.
            seed: of noise and draws.

        Raises:
            ArgumentError: naming items that repeat or are known; if the model has no tokenizer,
                both neighbours and histories are given, a neighbour is itself new, or a compressed
                table has no free codes.
            DataError: naming neighbours that are unknown.

        Example:
            >>> from hf_rece import RecommenderConfig, RecommenderModel
            >>> model = RecommenderModel(RecommenderConfig(vocab_size=3))
            >>> model.tokenizer = ItemTokenizer(items=["a", "b"])
            >>> model.add_items(["c"], neighbours={"c": ["a"]})
            >>> model.config.vocab_size, model.tokenizer.items
            (4, ['a', 'b', 'c'])
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ArgumentError(
                "tokenizer", None, "the model has none", "Set model.tokenizer = ItemTokenizer(...)"
            )
        known_to_tokenizer = self._added_before(tokenizer, items)
        if not known_to_tokenizer:
            tokenizer.check_new_items(items)
        items = list(items)
        if neighbours is not None and histories is not None:
            raise ArgumentError(
                "histories", "given", "neighbours are given too", "Pass one of them"
            )
        similar: Mapping[Item, SimilarItems] = neighbours or {}
        if histories is not None:
            similar = _known_only(co_occurring_items(histories, items), tokenizer)
        first = len(tokenizer) - (len(items) if known_to_tokenizer else 0)
        as_ids = _as_ids(tokenizer, items, similar)
        self._grow(max(self.config.vocab_size, first + len(items)), first, as_ids, seed)
        if not known_to_tokenizer:
            tokenizer.add_items(items)

    def resize_token_embeddings(  # type: ignore[override]
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resize as PreTrainedModel does; a compressed table only grows, as add_items grows it.

        Args:
            new_num_tokens: rows wanted; None for as many as there are.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: of a dense table, draw new rows like the old ones.

        Raises:
            ArgumentError: for fewer rows of a compressed table, or more than its codes can number.
        """
        self._refuse_cut()
        table = self.get_input_embeddings()
        if not isinstance(table, COMPRESSED):
            super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self._note_size(self.config.vocab_size)
            return self.get_input_embeddings()
        n_rows, multiple = new_num_tokens or table.n_rows, pad_to_multiple_of or 1
        n_rows += -n_rows % multiple
        if n_rows < table.n_rows:
            raise ArgumentError(
                "new_num_tokens",
                new_num_tokens,
                f"{type(table).__name__} has {table.n_rows} rows and cannot shrink",
                "Pass more, or make a new model",
            )
        n_new = n_rows - table.n_rows
        self._grow(n_rows, table.n_rows, [{} for _ in range(n_new)], seed=0)
        return table

    def _refuse_cut(self) -> None:
        if self.vocab_shards is not None:
            raise ArgumentError(
                "model",
                f"vocabulary cut over {self.vocab_shards.world_size} processes",
                "only a whole one grows",
                "Save it, load it in one process, and grow it there",
            )

    def _added_before(self, tokenizer: ItemTokenizer, items: Sequence[Item]) -> bool:
        """Return whether `items` are those that the tokenizer has and the model has no rows for."""
        n_rows = self.config.vocab_size
        if len(tokenizer) <= n_rows:
            return False
        if tokenizer.items[n_rows - 1 :] == list(items):
            return True
        raise ArgumentError(
            "items",
            items[:5],
            f"the tokenizer has {len(tokenizer) - n_rows} items that the model has no rows for, "
            "and these are others",
            "Pass model.tokenizer.items[model.config.vocab_size - 1:] first",
        )

    def _grow(self, n_rows: int, first: int, neighbours: Neighbours, seed: int) -> None:
        """Grow table, output rows and biases; whatever may fail fails before anything changes."""
        self._refuse_cut()
        table, head = self.get_input_embeddings(), self.item_head
        n_before = self.config.vocab_size
        if isinstance(table, COMPRESSED):
            tables: list[nn.Module] = [table]
            if isinstance(head, TableHead) and head.own_table is not None:
                tables.append(head.own_table)
            identities = [grown_identity(t, n_rows, first, neighbours, seed) for t in tables]
            for each, identity in zip(tables, identities, strict=True):
                grow_table(each, n_rows, identity)
            self.config.item_embedding = grown_settings(self.config.item_embedding or {}, table)
        elif type(table) is nn.Embedding and type(head) is nn.Linear:
            if n_rows > n_before:
                super().resize_token_embeddings(n_rows, mean_resizing=False)
        else:
            raise ArgumentError(
                "model",
                (type(table).__name__, type(head).__name__),
                "input and output layer are wrapped, by an adapter perhaps",
                "Merge or unload it first, and wrap the model anew",
            )
        self._note_size(n_rows)
        self._fill(first, neighbours, seed)

    def _fill(self, first: int, neighbours: Neighbours, seed: int) -> None:
        """Set the new rows of what is dense: the tables or nothing, and biases."""
        table, head = self.get_input_embeddings(), self.item_head
        bias = head.bias
        if isinstance(head, TableHead) and isinstance(bias, Tensor):
            grown = F.pad(bias, (0, self.config.vocab_size - len(bias)))
            head.bias = bias = nn.Parameter(grown, requires_grad=bias.requires_grad)
        weights = {id(m.weight): m.weight for m in (table, head) if hasattr(m, "weight")}
        for place, tensor in enumerate((*weights.values(), bias)):
            if isinstance(tensor, Tensor):
                generator = torch.Generator().manual_seed(seed + place)
                fill_dense_rows(tensor, first, neighbours, generator)

    def _note_size(self, n_rows: int) -> None:
        """Make configurations and masks say what the number of rows is."""
        for config in (self.config, self.config.backbone, self.backbone.config):
            config.vocab_size = n_rows  # type: ignore[union-attr]
        if hasattr(self.backbone, "vocab_size"):
            self.backbone.vocab_size = n_rows
        parameters = dict(self.named_parameters(remove_duplicate=False))
        for name, mask in self.weight_masks.items():
            n_new = len(parameters[name]) - len(mask)
            if n_new > 0:  # new rows are active as a whole
                rows = mask.new_ones((n_new, *mask.shape[1:]))
                self.weight_masks[name] = torch.cat([mask, rows])


def _known_only(
    similar: Mapping[Item, Mapping[Item, float]], tokenizer: ItemTokenizer
) -> dict[Item, SimilarItems]:
    """Leave out neighbours that are in a log and not in the catalogue."""
    return {
        item: {other: of_item[other] for other in tokenizer.known_items(of_item)}
        for item, of_item in similar.items()
    }


def _as_ids(
    tokenizer: ItemTokenizer, items: list[Item], similar: Mapping[Item, SimilarItems]
) -> list[dict[int, float]]:
    """Return, for each item, token id -> weight of its neighbours.

    Raises:
        ArgumentError: for neighbours of other items than `items`, weights that are not positive, or
            a neighbour among `items`.
        DataError: naming neighbours that are unknown.
    """
    new = set(items)
    if others := [item for item in similar if item not in new]:
        raise ArgumentError(
            "neighbours", others[:5], "are not among the new items", "Pass new item -> known items"
        )
    found = []
    for item in items:
        of_item = similar.get(item, ())
        if isinstance(of_item, (str, int)):
            raise ArgumentError(
                "neighbours", {item: of_item}, "one item, not a list of them", "Pass a list"
            )
        weights = of_item if isinstance(of_item, Mapping) else dict.fromkeys(of_item, 1.0)
        if new.intersection(weights) or any(weight <= 0 for weight in weights.values()):
            raise ArgumentError(
                "neighbours",
                {item: of_item},
                "a neighbour is itself new, or its weight is not positive",
                "Pass known items, with positive weights",
            )
        ids = tokenizer.convert_items_to_ids(weights)
        found.append(dict(zip(ids, map(float, weights.values()), strict=True)))
    return found
