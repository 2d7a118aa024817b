"""An approximate index over a recommender's items, by faiss; needs the extra `ann`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from hf_rece.data.item_tokenizer import Item
from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.errors import ArgumentError, DataError
from hf_rece.files import complete_files, finish_files, make_folder
from hf_rece.models.recommender import RecommenderModel
from hf_rece.ops.topk import streamed_topk
from hf_rece.serving.faiss_kinds import (
    default_factory,
    empty_index,
    import_faiss,
    is_served,
    most_effort,
)
from hf_rece.serving.index_settings import IndexSettings, read_settings

INDEX_FILE, SETTINGS_FILE = "item_index.faiss", "item_index.json"

_ROWS_AT_ONCE = 65_536
_TRAINING_ROWS_A_LIST = 64
_FAST_WIDTH = 16  # numbers that faiss decodes and subtracts at once
_RANDOM_USERS, _RANDOM_ITEMS = 500, 10
_PROBED_ROWS = 16
_NORM_TOLERANCE = 0.02


class ItemIndex:
    """Finds the best items without scoring all of them; pass it to `recommend(index=...)`.

    The index proposes candidates, which the model then scores exactly: scores are those of
    recommend without an index, and so is what filter_seen, allowed_items and denied_items leave
    out. Only which candidates are found is approximate.

    Make one with ItemIndex.build or ItemIndex.load.

    Args:
        index: of faiss: IVF, HNSW or Flat, over the rows 1 to C - 1.
        settings: see IndexSettings.

    Example:
        index = ItemIndex.build(model)
        index.save("my_model")
        model.recommend(histories, index=ItemIndex.load("my_model"))
    """

    def __init__(self, index: Any, settings: IndexSettings) -> None:
        self.index = index
        self.settings = settings

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: RecommenderModel,
        *,
        histories: Sequence[Sequence[Item]] | None = None,
        factory: str | None = None,
        target_recall: float = 0.95,
        k: int = 10,
        oversampling: int = 10,
        seed: int = 0,
    ) -> ItemIndex:
        """Return an index of the model's items; prints its recall@k against exact search.

        The least effort of a search that reaches target_recall is found on half of the histories;
        the recall that is printed and kept is of the other half.

        Args:
            model: with its tokenizer.
            histories: on which recall is measured, best of real users; None for 500 of ten random
                items each.
            factory: of faiss; None for IVF with 8 bits a number, or a scan of a small catalogue.
            target_recall: recall@k to reach, if any effort does.
            k: of recall.
            oversampling: candidates fetched for each item wanted.
            seed: of random histories, and of the rows that the index is trained on.

        Raises:
            ArgumentError: if faiss is not installed, the model has no tokenizer, no history has a
                known item, or faiss has no such index.

        Memory:
            The index, about D + 8 bytes an item for the default, and 64 training rows a list.
        """
        started = time.perf_counter()
        random = np.random.default_rng(seed)
        terms = _known_users(model, histories, random)
        n_rows = terms.rows.n_rows
        factory = factory or default_factory(n_rows - 1)
        index = _filled(factory, terms, random)
        settings = IndexSettings(factory, 0, oversampling, 1.0, k, n_rows, _norms(terms))
        found = cls(index, settings)._tuned(terms, target_recall)
        Console().print(
            f"{n_rows - 1:,} items, {factory}, effort {found.settings.effort}: "
            f"recall@{k} {found.settings.recall:.3f} against exact search, "
            f"built in {time.perf_counter() - started:.1f} s",
            highlight=False,
        )
        return found

    @torch.no_grad()
    def search(
        self,
        terms: OutputTerms,
        k: int,
        *,
        excluded_ids: Tensor | None = None,
        seen_ids: Tensor | None = None,
        allowed_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and ids (N, k) of the best items found, as streamed_topk does.

        Raises:
            ArgumentError: if the index is of another model, or of other weights of it.
        """
        self._check(terms)
        n_seen = 0 if seen_ids is None else seen_ids.shape[1]
        n_items = terms.rows.n_rows - 1
        n_candidates = min(max(self.settings.oversampling, 1) * k + n_seen, n_items)
        queries = _queries(terms)
        import_faiss().omp_set_num_threads(torch.get_num_threads())
        parameters = self._parameters(_selected(n_items, excluded_ids, allowed_ids))
        _, places = self.index.search(queries, n_candidates, params=parameters)
        ids = torch.from_numpy(places).to(terms.hidden.device) + 1  # (N, n_candidates), 0 for none
        scores = _exact_scores(terms, ids)
        scores[ids == 0] = -torch.inf
        if seen_ids is not None and n_seen:
            scores[_contained(ids, seen_ids)] = -torch.inf
        best, order = scores.topk(min(k, n_candidates), dim=1)
        found = ids.gather(1, order).masked_fill_(best == -torch.inf, -1)
        missing = (0, k - best.shape[1])
        pad = torch.nn.functional.pad
        return pad(best, missing, value=-torch.inf), pad(found, missing, value=-1)

    def save(self, folder: str | Path) -> None:
        """Write the index and its settings into a folder, best that of the model.

        Raises:
            WriteError: if the disk is full or the folder cannot be written.
        """
        text = json.dumps(asdict(self.settings), indent=1) + "\n"
        with complete_files(make_folder(folder), SETTINGS_FILE) as part:
            import_faiss().write_index(self.index, str(part / INDEX_FILE))
            (part / SETTINGS_FILE).write_text(text, "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ItemIndex:
        """Return the index that save wrote.

        Raises:
            DataError: if there is none, or it cannot be read.
            ArgumentError: if faiss is not installed.
        """
        faiss, folder = import_faiss(), Path(folder)
        # An index may say that its lists are in another file, anywhere.
        flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
        finish_files(folder, SETTINGS_FILE)
        try:
            settings = read_settings(folder / SETTINGS_FILE)
            index = faiss.read_index(str(folder / INDEX_FILE), flags)
            if index.ntotal != settings.n_rows - 1 or not is_served(index):
                raise ValueError(f"{INDEX_FILE} and {SETTINGS_FILE} do not belong together")
            return cls(index, settings)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"index in {folder}", reason, "Build one: hf-rece index --model_name_or_path MODEL"
            ) from None

    def _tuned(self, terms: OutputTerms, target_recall: float) -> ItemIndex:
        """Return this index with the least effort that reaches the recall, and its recall."""
        settings = asdict(self.settings)
        k = min(settings.pop("recall_k"), settings["n_rows"] - 1)
        padding = torch.zeros(1, dtype=torch.long, device=terms.hidden.device)
        exact = streamed_topk(terms.hidden, terms.rows, k, bias=terms.bias, excluded_ids=padding)[1]
        tune = torch.arange(len(exact)) % 2 == 0
        measure = ~tune if len(exact) > 1 else tune

        def at(effort: int) -> ItemIndex:
            return ItemIndex(self.index, IndexSettings(**settings | {"effort": effort}, recall_k=k))

        def suffices(effort: int) -> bool:
            return at(effort)._recall(terms, exact, tune, k) >= target_recall

        settings["recall"] = 1.0
        effort, most = min(1, most_effort(self.index)), most_effort(self.index)
        while effort < most and not suffices(effort):
            effort = min(2 * effort, most)
        too_little = effort // 2
        while effort - too_little > max(1, effort // 16):
            middle = (effort + too_little) // 2
            too_little, effort = (too_little, middle) if suffices(middle) else (middle, effort)
        settings["effort"] = effort
        settings["recall"] = round(at(effort)._recall(terms, exact, measure, k), 4)
        return ItemIndex(self.index, IndexSettings(**settings, recall_k=k))

    def _recall(self, terms: OutputTerms, exact: Tensor, chosen: Tensor, k: int) -> float:
        chosen = chosen.to(exact.device)
        found = self.search(OutputTerms(terms.hidden[chosen], terms.rows, terms.bias), k)[1]
        return float(_contained(exact[chosen], found).float().mean())

    def _parameters(self, selector: Any) -> Any:
        faiss, effort = import_faiss(), self.settings.effort
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(self.index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=effort, **chosen)
        if isinstance(self.index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
        return faiss.SearchParameters(**chosen)

    def _check(self, terms: OutputTerms) -> None:
        settings = self.settings
        norms = _norms(terms)
        same = terms.rows.n_rows == settings.n_rows and len(norms) == len(settings.norms)
        same = same and np.allclose(norms, settings.norms, rtol=_NORM_TOLERANCE)
        if not same:
            raise ArgumentError(
                "index",
                f"{settings.factory} of {settings.n_rows} rows",
                f"made of other item vectors than those of this model with {terms.rows.n_rows}",
                "Build it again, after every training: ItemIndex.build(model)",
            )


def _filled(factory: str, terms: OutputTerms, random: np.random.Generator) -> Any:
    """Return a new index, trained on a sample of the rows and filled with all."""
    n_rows = terms.rows.n_rows
    radius = max(float(_with_bias(terms, p).norm(dim=1).max()) for p in _slices(n_rows))
    index = empty_index(factory, _queries(terms).shape[1])
    import_faiss().omp_set_num_threads(torch.get_num_threads())
    if not index.is_trained:
        n_training = min(n_rows - 1, _TRAINING_ROWS_A_LIST * getattr(index, "nlist", 4096))
        sample = np.sort(random.choice(n_rows - 1, n_training, replace=False)) + 1
        ids = torch.from_numpy(sample).to(terms.hidden.device)
        index.train(_vectors(terms, ids, radius))
    for piece in _slices(n_rows):
        index.add(_vectors(terms, piece, radius))
    return index


def _known_users(
    model: RecommenderModel,
    histories: Sequence[Sequence[Item]] | None,
    random: np.random.Generator,
) -> OutputTerms:
    """Return the output layer's terms of the users who have known items."""
    if histories is None:
        tokenizer = model.own_tokenizer()
        tokens = random.integers(1, len(tokenizer), size=(_RANDOM_USERS, _RANDOM_ITEMS))
        histories = [tokenizer.convert_ids_to_items(row) for row in tokens]
    users = model.user_vectors(histories)
    users = users[~users.isnan().any(1)]
    if len(users) == 0:
        raise ArgumentError(
            "histories", len(histories), "none has a known item", "Pass histories of this catalogue"
        )
    return OutputTerms(users, *model.output_terms()[1:])


def _vectors(terms: OutputTerms, ids: Tensor | slice, radius: float) -> NDArray[np.float32]:
    """Return points (K, width) whose distance to a query falls as their score rises.

    The longest row has length `radius`; every other gets what it lacks of that in one more column,
    so that all lie on a sphere, where the nearest point is the one with the largest inner product.
    """
    rows = _with_bias(terms, ids)
    lacking = (radius**2 - rows.square().sum(1, keepdim=True)).clamp_(min=0).sqrt()
    return _points(rows, lacking)


def _queries(terms: OutputTerms) -> NDArray[np.float32]:
    """Return states (N, width), with a one for the bias."""
    hidden = terms.hidden.detach().float()
    if terms.bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
    return _points(hidden, hidden.new_zeros(len(hidden), 1))


def _with_bias(terms: OutputTerms, ids: Tensor | slice) -> Tensor:
    """Return rows (K, D), or (K, D + 1) with the bias in the last column."""
    rows, bias = terms.rows.rows(ids).detach().float(), terms.bias
    return rows if bias is None else torch.cat([rows, bias[ids].detach().float()[:, None]], dim=1)


def _points(columns: Tensor, last: Tensor) -> NDArray[np.float32]:
    """Return both side by side on the CPU, filled up to a width that faiss is fast for."""
    points = torch.cat([columns, last], dim=1)
    points = torch.nn.functional.pad(points, (0, -points.shape[1] % _FAST_WIDTH))
    return np.ascontiguousarray(points.cpu().numpy())


def _slices(n_rows: int) -> Iterator[slice]:
    """Yield the rows from 1 on in pieces."""
    for start in range(1, n_rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, n_rows))


def _exact_scores(terms: OutputTerms, ids: Tensor) -> Tensor:
    """Return the scores (N, m) float32 of candidates (N, m)."""
    rows = terms.rows.rows(ids.view(-1)).float().view(*ids.shape, -1)
    scores = torch.einsum("nd,nmd->nm", terms.hidden.float(), rows)
    return scores if terms.bias is None else scores + terms.bias[ids].float()


def _contained(ids: Tensor, among: Tensor) -> Tensor:
    """Return whether each of ids (N, m) is in the same row of `among` (N, S)."""
    ordered = among.sort(dim=1).values
    place = torch.searchsorted(ordered, ids).clamp_(max=among.shape[1] - 1)
    return ordered.gather(1, place) == ids


def _selected(n_items: int, excluded_ids: Tensor | None, allowed_ids: Tensor | None) -> Any:
    """Return faiss's selector of the items that may be found; None for all."""
    excluded = np.zeros(0, dtype=np.int64) if excluded_ids is None else excluded_ids.cpu().numpy()
    excluded = excluded[excluded > 0]  # padding is not in the index
    if allowed_ids is None and len(excluded) == 0:
        return None
    chosen = np.full(n_items + 1, allowed_ids is None)
    if allowed_ids is not None:
        chosen[allowed_ids.cpu().numpy()] = True
    chosen[excluded] = False
    return import_faiss().IDSelectorBitmap(np.packbits(chosen[1:], bitorder="little"))


def _norms(terms: OutputTerms) -> list[float]:
    """Return the norms of a few rows, spread over the catalogue."""
    n_rows = terms.rows.n_rows
    ids = torch.linspace(1, n_rows - 1, min(_PROBED_ROWS, n_rows - 1)).long()
    norms = terms.rows.rows(ids.to(terms.hidden.device)).float().norm(dim=1)
    return [round(float(norm), 6) for norm in norms]
