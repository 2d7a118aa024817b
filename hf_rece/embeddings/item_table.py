"""Which item table a recommender has: its settings by name, and the table made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from datasets import Dataset
from torch import Tensor, distributed, nn

from hf_rece.embeddings.codes import Quantiser, codes_from_log
from hf_rece.embeddings.compositional import CompositionalEmbedding, Operation
from hf_rece.embeddings.lma import LMAEmbedding, resolve_cells
from hf_rece.embeddings.min_hash import min_hash_signatures, split_batches
from hf_rece.errors import ArgumentError
from hf_rece.ops.messages import take_from_first


@dataclass(frozen=True, kw_only=True)
class DenseTable:
    """A row of its own for every item: nn.Embedding."""


@dataclass(frozen=True, kw_only=True)
class CompositionalTable:
    """Settings of a CompositionalEmbedding.

    Args:
        operation: "mult", "add" or "concat".
        compression: how many times fewer parameters than a dense table.
        radices: in place of compression, number of values of each digit.
        codes: where digits come from: "id" (quotient and remainder), "quantile" or "kmeans"
            (from the training log, see codes_from_log), "given" (by set_codes).
        n_codes: digits of an item, where they are not those of its id and radices is None.
    """

    operation: Operation = "concat"
    compression: float | None = None
    radices: tuple[int, ...] | None = None
    codes: Literal["id", "given"] | Quantiser = "quantile"
    n_codes: int = 8

    def __post_init__(self) -> None:
        known = ("id", "given", *get_args(Quantiser))
        if self.codes not in known:
            raise ArgumentError("codes", self.codes, "no such codes", f"Pass {', '.join(known)}")

    def make(self, n_rows: int, width: int) -> CompositionalEmbedding:
        """Return the table; codes that come from elsewhere start as the digits of the id."""
        n_codes = None
        if self.codes != "id":
            n_codes = self.n_codes if self.radices is None else len(self.radices)
        return CompositionalEmbedding(
            n_rows,
            width,
            operation=self.operation,
            radices=self.radices,
            compression=self.compression,
            n_codes=n_codes,
        )


@dataclass(frozen=True, kw_only=True)
class LMATable:
    """Settings of an LMAEmbedding.

    Args:
        compression: how many times fewer floats than a dense table.
        n_cells: in place of compression, floats of memory.
        n_keys: min-hashes kept of an item, 1 to 8; 0 for plain hashing of ids.
        n_hashes: keys that an address depends on.
        seed: of the hash functions.
    """

    compression: float | None = None
    n_cells: int | None = None
    n_keys: int = 8
    n_hashes: int = 2
    seed: int = 0

    def make(self, n_rows: int, width: int) -> LMAEmbedding:
        """Return the table, all its items cold."""
        n_cells = resolve_cells(n_rows, width, self.n_cells, self.compression)
        return LMAEmbedding(
            n_rows,
            width,
            n_cells=n_cells,
            n_keys=self.n_keys,
            n_hashes=self.n_hashes,
            seed=self.seed,
        )


ItemTable = DenseTable | CompositionalTable | LMATable
ITEM_TABLES: dict[str, type[ItemTable]] = {
    "dense": DenseTable,
    "compositional": CompositionalTable,
    "lma": LMATable,
}


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("n_cells", "n_codes", "n_keys", "n_hashes", "seed"), _is_whole),
    "compression": lambda value: _is_whole(value) or isinstance(value, float),
    "radices": lambda value: isinstance(value, tuple) and all(map(_is_whole, value)),
}


def item_table_settings(item_embedding: dict[str, Any] | None) -> ItemTable:
    """Return the settings that a configuration's item_embedding names.

    Args:
        item_embedding: {"type": "dense" | "compositional" | "lma", and settings}; None for dense.

    Raises:
        ArgumentError: for an unknown type or setting.
    """
    settings = dict(item_embedding or {"type": "dense"}) if _is_mapping(item_embedding) else {}
    name = settings.pop("type", None)
    if not isinstance(name, str) or name not in ITEM_TABLES:
        raise ArgumentError(
            "item_embedding",
            item_embedding,
            "names no table",
            f'Pass {{"type": one of {", ".join(ITEM_TABLES)}, ...}}',
        )
    known = [field.name for field in fields(ITEM_TABLES[name])]
    if unknown := sorted(set(settings) - set(known)):
        raise ArgumentError(
            "item_embedding",
            item_embedding,
            f"{name} has no setting {', '.join(unknown)}",
            f"Pass {', '.join(known)}" if known else "Leave it out",
        )
    if isinstance(settings.get("radices"), list):  # JSON has no tuples
        settings["radices"] = tuple(settings["radices"])
    for setting, value in settings.items():
        if value is not None and not _TYPES.get(setting, _is_text)(value):
            raise ArgumentError(
                "item_embedding",
                item_embedding,
                f"{setting} is no {value!r}",
                f"See {ITEM_TABLES[name].__name__} in hf_rece.embeddings.item_table",
            )
    return ITEM_TABLES[name](**settings)


def learn_item_table(
    table: nn.Module, item_embedding: dict[str, Any] | None, train: Dataset, *, seed: int = 0
) -> None:
    """Give a new table the codes or signatures of a training log, before training.

    Args:
        table: made as `item_embedding` says.
        item_embedding: the configuration's.
        train: the train part of a split: nothing of the held-out items is told.
        seed: of the codes.

    Raises:
        ArgumentError: if the log is too small for the codes, or has ids that the table has not.
    """
    if isinstance(table, LMAEmbedding) and table.signatures is not None:
        signatures = min_hash_signatures(
            split_batches(train), table.n_rows, n_keys=table.n_keys, seed=table.seed
        )
        table.set_signatures(_of_first_process(signatures))
    settings = item_table_settings(item_embedding)
    if (
        isinstance(table, CompositionalEmbedding)
        and isinstance(settings, CompositionalTable)
        and settings.codes in ("quantile", "kmeans")
    ):
        quantiser: Any = settings.codes
        codes = codes_from_log(train, table.n_rows, table.radices, quantiser=quantiser, seed=seed)
        table.set_codes(_of_first_process(codes))


def _of_first_process(codes: Tensor) -> Tensor:
    """Return the codes of rank 0: an SVD need not round alike on every machine."""
    if distributed.is_available() and distributed.is_initialized():
        return take_from_first(codes.contiguous(), None)
    return codes
