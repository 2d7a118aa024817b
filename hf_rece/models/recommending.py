"""What a trained recommender answers: next items, and the vectors of users and items."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_rece.data.item_tokenizer import Item, ItemTokenizer
from hf_rece.embeddings.as_rows import as_rows
from hf_rece.embeddings.gathered import call_gathered
from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.growth import GrowingCatalogue
from hf_rece.models.loading import check_sizes
from hf_rece.models.recommendation import (
    Recommendation,
    known_histories,
    known_ids,
    named_recommendations,
)
from hf_rece.models.vocab_parallel import check_same_question
from hf_rece.ops.topk import streamed_topk

_ITEMS_AT_ONCE = 65_536


class ItemSearch(Protocol):
    """Finds the classes with the largest scores; what `recommend` may use in place of a scan."""

    def search(
        self,
        terms: OutputTerms,
        k: int,
        *,
        excluded_ids: Tensor | None = None,
        seen_ids: Tensor | None = None,
        allowed_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and ids (N, k), as hf_rece.ops.topk.streamed_topk does."""


class Recommending(GrowingCatalogue):
    """Base of recommenders that answer in the user's own item ids."""

    @torch.inference_mode()
    def recommend(
        self,
        histories: Sequence[Sequence[Item]],
        k: int = 10,
        *,
        filter_seen: bool = True,
        allowed_items: Sequence[Item] | None = None,
        denied_items: Sequence[Item] | None = None,
        index: ItemSearch | None = None,
        batch_size: int = 256,
    ) -> list[list[Recommendation]]:
        """Return the k best next items of each history, best first, in the user's own item ids.

        With a vocabulary that is cut over processes, or a model that FSDP2 cuts, all that hold it
        together ask the same and get the same answer; so with user_vectors and item_vectors.

        Items that the model does not know are left out of a history, with one warning that names
        them. A history without a known item gets an empty answer.

        Args:
            histories: lists of item ids in order of time.
            k: items wanted; fewer come back where fewer remain.
            filter_seen: do not recommend items of the history.
            allowed_items: recommend only these.
            denied_items: recommend none of these, such as what is out of stock; they stay in
                histories. Those that the model does not know are left out, with a warning.
            index: search this in place of the whole catalogue: approximate, and faster; see
                hf_rece.serving.item_index.
            batch_size: histories encoded at once.

        Raises:
            ArgumentError: if the model has no tokenizer, k or batch_size < 1, or histories is one
                history rather than a list of them.
            DataError: if an allowed item is unknown, or the model's states are not finite.
        """
        tokenizer = self.own_tokenizer()
        self._ask_together(
            histories=histories,
            limits=(k, filter_seen, allowed_items, denied_items, batch_size),
        )
        _at_least_one(k=k, batch_size=batch_size)
        known = known_histories(tokenizer, histories)
        allowed, denied = self._limits(tokenizer, allowed_items, denied_items)
        answers: list[list[Recommendation]] = [[] for _ in histories]
        with _evaluating(self):
            for places, batch in _batches(known, batch_size):
                limits: Any = {"excluded_ids": denied, "allowed_ids": allowed}
                if filter_seen:
                    limits["seen_ids"] = _padded(tokenizer, batch, self.device)
                search = functools.partial(self._search, k, index, limits)
                states = self._last_states(tokenizer, batch)
                found = call_gathered(self.item_head, search, states)
                for place, scores, ids in zip(places, *(t.tolist() for t in found), strict=True):
                    answers[place] = named_recommendations(tokenizer, scores, ids)
        return answers

    @torch.no_grad()
    def user_vectors(self, histories: Sequence[Sequence[Item]], *, batch_size: int = 256) -> Tensor:
        """Return the state (D,) in which each history leaves the model.

        The score of an item is the inner product of user and item vector, plus the item's bias
        where config.output_bias says so.

        Args:
            histories: lists of item ids in order of time; unknown items are left out, as recommend
                does.
            batch_size: histories encoded at once.

        Returns:
            (N, D), on the model's device; NaN for a history without a known item.

        Raises:
            ArgumentError, DataError: as recommend.
        """
        tokenizer = self.own_tokenizer()
        self._ask_together(histories=histories, batch_size=batch_size)
        _at_least_one(batch_size=batch_size)
        known = known_histories(tokenizer, histories)
        empty = self.output_terms().hidden
        vectors = empty.new_full((len(known), empty.shape[-1]), torch.nan)
        with _evaluating(self):
            for places, batch in _batches(known, batch_size):
                states = self._last_states(tokenizer, batch)
                vectors[places] = self.output_terms(states).hidden
        return vectors

    @torch.no_grad()
    def item_vectors(self, items: Sequence[Item] | None = None) -> Tensor:
        """Return the output rows of items: what a user's vector is multiplied with.

        Rows of compressed tables are made 65,536 at a time: beyond what is returned, memory stays
        bounded. See iter_item_vectors for a catalogue that is too large to be returned.

        Args:
            items: item ids; None for all, in order of tokenizer.items.

        Returns:
            (number of items, D), on the model's device.

        Raises:
            ArgumentError: if the model has no tokenizer.
            DataError: naming items that are unknown.
        """
        tokenizer = self.own_tokenizer()
        self._ask_together(items=items)
        ids = torch.arange(1, len(tokenizer), device=self.device)
        if items is not None:
            ids = torch.tensor(tokenizer.convert_items_to_ids(items), device=self.device)

        def read(no_states: Tensor) -> Tensor:
            rows = self.output_terms(no_states).rows
            vectors = no_states.new_empty(len(ids), rows.width)
            pieces = zip(ids.split(_ITEMS_AT_ONCE), vectors.split(_ITEMS_AT_ONCE), strict=True)
            for part, out in pieces:
                out.copy_(rows.rows(part))
            return vectors

        return call_gathered(self.item_head, read, self._no_states())

    def iter_item_vectors(
        self, *, items_at_once: int = _ITEMS_AT_ONCE
    ) -> Iterator[tuple[list[Item], Tensor]]:
        """Yield the catalogue in pieces: items, and their vectors (items_at_once, D).

        Raises:
            ArgumentError: if the model has no tokenizer, or items_at_once < 1.
        """
        _at_least_one(items_at_once=items_at_once)
        items = self.own_tokenizer().items
        for start in range(0, len(items), items_at_once):
            part = items[start : start + items_at_once]
            yield part, self.item_vectors(part)

    def output_terms(self, states: Tensor | None = None) -> OutputTerms:
        """Return what the output layer computes of states (N, D), as rows; None for no states."""
        return as_rows(self.item_head, self._no_states() if states is None else states)

    def _no_states(self) -> Tensor:
        shape = (0, self.config.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def own_tokenizer(self) -> ItemTokenizer:
        """Return the tokenizer.

        Raises:
            ArgumentError: if the model has none, or one with more items than rows.
        """
        if self.tokenizer is None:
            raise ArgumentError(
                "tokenizer", None, "the model has none", "Set model.tokenizer = ItemTokenizer(...)"
            )
        check_sizes(self.tokenizer, self.config.vocab_size)
        return self.tokenizer

    def _ask_together(self, **question: Any) -> None:
        """Raise ArgumentError if the vocabulary is cut over processes that ask different things."""
        check_same_question(self.vocab_shards, self.device, **question)

    def _limits(
        self,
        tokenizer: ItemTokenizer,
        allowed_items: Sequence[Item] | None,
        denied_items: Sequence[Item] | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the ids of allowed items, None for all, and those that are never returned."""
        denied = known_ids(tokenizer, denied_items or ())
        allowed = None
        if allowed_items is not None:
            wanted = set(tokenizer.convert_items_to_ids(allowed_items)) - denied
            allowed = torch.tensor(sorted(wanted), dtype=torch.long, device=self.device)
            denied = set()
        pad = self.config.pad_token_id
        # Rows without an item are room for items to come.
        spare = range(len(tokenizer), self.config.vocab_size)
        excluded = [*([] if pad is None else [pad]), *sorted(denied), *spare]
        return allowed, torch.tensor(excluded, dtype=torch.long, device=self.device)

    def _search(
        self, k: int, index: ItemSearch | None, limits: dict[str, Any], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return scores and ids (N, k) of the best items at states (N, D)."""
        terms = self.output_terms(states)
        if index is None:
            return streamed_topk(terms.hidden, terms.rows, k, bias=terms.bias, **limits)
        return index.search(terms, k, **limits)

    def _last_states(self, tokenizer: ItemTokenizer, histories: list[list[Item]]) -> Tensor:
        """Return the last state (N, D) of each history."""
        length = self.config.longest_history
        batch = tokenizer(
            histories,
            padding=True,
            truncation=length is not None,
            max_length=length,
            padding_side="right",
            return_tensors="pt",
        ).to(self.device)
        hidden: Tensor = self.backbone(**batch).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        states = hidden[torch.arange(len(hidden), device=hidden.device), last]
        if not states.isfinite().all():
            raise DataError(
                "model",
                "its states are NaN or infinite: training diverged, or weights are damaged",
                "Load an earlier checkpoint",
            )
        return states


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    known: list[list[Item]], batch_size: int
) -> Iterator[tuple[list[int], list[list[Item]]]]:
    """Yield the places of histories that are not empty, and these histories."""
    places = [place for place, history in enumerate(known) if history]
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        yield part, [known[place] for place in part]


def _padded(tokenizer: ItemTokenizer, histories: list[list[Item]], device: torch.device) -> Tensor:
    """Return the token ids (N, S) of histories, padded with -1."""
    rows = [torch.tensor(tokenizer.convert_items_to_ids(history)) for history in histories]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ArgumentError(name, value, "nothing would be answered", "Pass 1 or more")
