"""The items of a model under the names that people know them by, and how they are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from hf_rece.data.interactions import ITEM
from hf_rece.data.item_tokenizer import Item
from hf_rece.errors import DataError

TITLE = "title"
_COLUMNS = {"name": pl.String, "folded": pl.String}


@dataclass(frozen=True)
class Catalogue:
    """Items and their names; an item goes by its place, from 0.

    Args:
        items: item ids, in the order in which they are offered.
        table: columns name, "title (id)" or the id alone, and folded, the same without case.
    """

    items: Sequence[Item]
    table: pl.DataFrame

    @classmethod
    def of(cls, items: Sequence[Item], titles: Mapping[Item, str] | None = None) -> Catalogue:
        """Return the catalogue of `items`; those without a title go by their id."""
        titles = titles or {}
        names = [f"{titles[item]} ({item})" if item in titles else str(item) for item in items]
        folded = [name.casefold() for name in names]
        return cls(items, pl.DataFrame({"name": names, "folded": folded}, schema=_COLUMNS))

    def __len__(self) -> int:
        return len(self.items)

    def name(self, place: int) -> str:
        """Return the name of the item at a place."""
        return str(self.table["name"][place])

    def find(self, text: str, limit: int) -> tuple[list[int], int]:
        """Return the places of items whose name holds every word of `text`, and how many there are.

        Names that begin with `text` come first, then the catalogue's order; case makes no
        difference. An empty text finds all.

        Args:
            text: words, or parts of words.
            limit: places that are returned at most.
        """
        text = text.casefold().strip()
        holds = [pl.col("folded").str.contains(word, literal=True) for word in text.split()]
        begins = pl.col("folded").str.starts_with(text)
        found = (
            self.table.select("folded")
            .with_row_index("place")
            .filter(pl.all_horizontal(pl.lit(True), *holds))
            .sort(begins, descending=True, maintain_order=True)
        )
        return found["place"].head(limit).to_list(), len(found)


def read_titles(path: str | Path, items: Sequence[Item]) -> dict[Item, str]:
    """Return the titles of a CSV, TSV or Parquet file by item id.

    Args:
        path: file with columns item_id and title.
        items: those of a model; ids of the file are read as their type. Rows of other items, and
            rows without a title, are left out.

    Raises:
        DataError: if the file cannot be read, lacks a column, or has no title for any item.
    """
    table = _read_table(Path(path))
    missing = [column for column in (ITEM, TITLE) if column not in table.columns]
    if missing:
        raise DataError(
            str(path),
            f"there is no column {', '.join(missing)}; the columns are {', '.join(table.columns)}",
            f"Name the columns {ITEM} and {TITLE}",
        )
    whole = bool(items) and isinstance(items[0], int)
    known = pl.DataFrame({ITEM: items}, schema={ITEM: pl.Int64 if whole else pl.String})
    rows = table.select(
        pl.col(ITEM).cast(pl.Int64 if whole else pl.String, strict=False),
        pl.col(TITLE).cast(pl.String).str.strip_chars(),
    )
    rows = rows.filter(pl.col(TITLE) != "").join(known, on=ITEM, how="semi")
    if rows.is_empty():
        raise DataError(
            str(path), "it has no title for any item of the model", "Pass the titles of its items"
        )
    return dict(rows.iter_rows())


def _read_table(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise DataError(str(path), "no such file", "Check the path")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        # As text: guessing types takes 007 for 7.
        separator = "\t" if path.suffix == ".tsv" else ","
        return pl.read_csv(path, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            str(path), f"not a readable table: {error}", "Save it as UTF-8 CSV, or as Parquet"
        ) from error
