"""Rows for new items: of dense weights, of codes, of signatures. What was there stays as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_rece.embeddings.codes import distinct_codes
from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.digits import narrowest, widened
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.embeddings.min_hash import own_keys
from hf_rece.embeddings.mixing import mix
from hf_rece.errors import ArgumentError

# For each new row, the ids of known rows that it resembles, with positive weights; may be empty.
Neighbours = Sequence[Mapping[int, float]]

# A share of the rows' standard deviation: parts new rows of equal neighbours, and moves none far.
_NOISE = 0.1


@torch.no_grad()
def fill_dense_rows(
    weight: Tensor, first: int, neighbours: Neighbours, generator: torch.Generator
) -> None:
    """Set the rows from `first` on to the mean of their neighbours and a little noise, in place.

    Rows without neighbours get the mean of all rows of items.

    Args:
        weight: (C, D), or the output biases (C,); row 0 is padding.
        first: number of the first new row.
        neighbours: one entry for each new row, ids below `first`.
        generator: of the noise, on the CPU.
    """
    items = weight[1:first].float()
    if len(items) == 0:
        return  # nothing to learn from: the rows keep their initial values
    mean, deviation = items.mean(0), items.std(0, correction=0)
    for row, of_row in enumerate(neighbours, start=first):
        centre = mean
        if of_row:
            shares = torch.tensor(list(of_row.values()), device=weight.device)
            rows = weight[torch.tensor(list(of_row), device=weight.device)].float()
            centre = (shares / shares.sum()) @ rows
        noise = torch.randn(weight.shape[1:], generator=generator).to(weight.device)
        weight[row] = (centre + _NOISE * deviation * noise).to(weight.dtype)


def grown_identity(
    table: nn.Module, n_rows: int, first: int, neighbours: Neighbours, seed: int
) -> Tensor | None:
    """Return the codes or signatures of a larger compressed table; the table stays as it is.

    A new row takes each digit, or key, from one of its neighbours, drawn by weight; codes that are
    taken are then changed, and one key is the item's own. Without neighbours, codes are drawn from
    the free ones, and keys are hashes of the id.

    Args:
        table: CompositionalEmbedding or LMAEmbedding of C rows.
        n_rows: rows of the larger table, at least C.
        first: number of the first new row, at most C.
        neighbours: one entry for each new row, ids below `first`.
        seed: of the draws.

    Returns:
        (n_rows, k), or None where rows follow from the id alone.

    Raises:
        ArgumentError: if the table's digits cannot number n_rows ids, or neighbours are given for a
            table whose rows follow from the id alone.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(table, LMAEmbedding):
        if table.signatures is None:
            _refuse_neighbours(table, neighbours)
            return None
        return _grown_signatures(table, n_rows, first, neighbours, generator)
    if not isinstance(table, CompositionalEmbedding):
        raise ArgumentError(
            "item table",
            type(table).__name__,
            "how it grows is not known here",
            "Merge or unload adapters first",
        )
    n_codes = math.prod(table.radices)
    if n_codes < n_rows:
        raise ArgumentError(
            "items",
            n_rows - table.n_rows,
            f"new rows wanted, but the radices {table.radices} number {n_codes} rows and "
            f"{table.n_rows} are taken",
            "Add fewer items, or make a new model with larger radices or less compression",
        )
    if table.codes is None:
        _refuse_neighbours(table, neighbours)
        return None
    return _grown_codes(table, n_rows, first, neighbours, generator)


def grow_table(table: nn.Module, n_rows: int, identity: Tensor | None) -> None:
    """Give a compressed table more rows, in place; its parameters stay as they are.

    Args:
        table: CompositionalEmbedding or LMAEmbedding.
        n_rows: rows afterwards.
        identity: as grown_identity returns it.
    """
    table.num_embeddings = n_rows  # type: ignore[assignment]
    if isinstance(table, CompositionalEmbedding) and table.codes is not None:
        table.codes = identity
    elif isinstance(table, LMAEmbedding) and table.signatures is not None:
        table.signatures = identity


def grown_settings(item_embedding: Mapping[str, Any], table: nn.Module) -> dict[str, Any]:
    """Return a configuration's item_embedding for a grown table: its size no longer follows C."""
    settings = {name: value for name, value in item_embedding.items() if name != "compression"}
    if isinstance(table, CompositionalEmbedding):
        return {**settings, "radices": list(table.radices)}
    return {**settings, "n_cells": table.n_cells} if isinstance(table, LMAEmbedding) else settings


def _refuse_neighbours(table: nn.Module, neighbours: Neighbours) -> None:
    if any(neighbours):
        raise ArgumentError(
            "neighbours",
            sum(map(bool, neighbours)),
            f"items have some, but in this {type(table).__name__} a row follows from the id alone",
            "Leave neighbours and histories out",
        )


def _grown_codes(
    table: CompositionalEmbedding,
    n_rows: int,
    first: int,
    neighbours: Neighbours,
    generator: torch.Generator,
) -> Tensor:
    """Return codes (n_rows, k) in their narrowest type, on the table's device."""
    codes = widened(table.codes).cpu()  # type: ignore[arg-type]
    radices = torch.tensor(table.radices)
    draws = torch.rand(n_rows - first, len(radices), generator=generator, dtype=torch.float64)
    grown = torch.cat([codes[:first], (draws * radices).long()])
    taken = set(_folded(codes[:first])) if any(neighbours) else set()
    for row, of_row in enumerate(neighbours, start=first):
        if of_row:
            drawn = _drawn_columns(codes, of_row, generator)
            grown[row] = _free_code_near(drawn, table.radices, taken, generator)
            taken.update(_folded(grown[row : row + 1]))
    seed = int(torch.randint(2**31, (), generator=generator))
    distinct = distinct_codes(grown, table.radices, seed=seed)
    return distinct.to(narrowest(table.radices)).to(table.factors.device)


def _free_code_near(
    code: Tensor, radices: Sequence[int], taken: set[int], generator: torch.Generator
) -> Tensor:
    """Return a free code (k,) that differs from `code` in one digit at most.

    Where all such are taken, `code` comes back.
    """
    if _folded(code.unsqueeze(0))[0] not in taken:
        return code
    for column in torch.randperm(len(radices), generator=generator).tolist():
        near = code.repeat(radices[column], 1)
        near[:, column] = torch.randperm(radices[column], generator=generator)
        free = [i for i, folded in enumerate(_folded(near)) if folded not in taken]
        if free:
            return near[free[0]]
    return code


def _folded(codes: Tensor) -> list[int]:
    """Return a hash of 64 bits for each code; a false alarm only passes over a free code."""
    folded = np.zeros(len(codes), dtype=np.uint64)
    for column in codes.T:
        folded = mix(folded ^ column.numpy().astype(np.uint64))
    return folded.tolist()


def _grown_signatures(
    table: LMAEmbedding,
    n_rows: int,
    first: int,
    neighbours: Neighbours,
    generator: torch.Generator,
) -> Tensor:
    """Return signatures (n_rows, n_keys) int16, on the table's device."""
    old: Tensor = table.signatures.cpu()  # type: ignore[union-attr]
    ids = np.arange(first, n_rows)
    new = torch.from_numpy(own_keys(ids, table.n_keys, table.seed))
    for row, of_row in zip(new, neighbours, strict=False):
        if of_row:
            own_place = int(torch.randint(table.n_keys, (), generator=generator))
            own = row[own_place].clone()
            row.copy_(_drawn_columns(old, of_row, generator))
            row[own_place] = own  # unlike every other item, and mostly like its neighbours
    return torch.cat([old[:first], new]).to(table.memory.device)


def _drawn_columns(rows: Tensor, of_row: Mapping[int, float], generator: torch.Generator) -> Tensor:
    """Return (k,): each column from one of the neighbours among `rows` (C, k), drawn by weight."""
    shares = torch.tensor(list(of_row.values()), dtype=torch.float64)
    chosen = torch.multinomial(shares, rows.shape[1], replacement=True, generator=generator)
    ids = torch.tensor(list(of_row))[chosen]
    return rows[ids, torch.arange(rows.shape[1])]
