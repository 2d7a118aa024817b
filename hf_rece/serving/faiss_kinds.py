"""The kinds of faiss's indices that are served; needs the extra `ann`."""

from __future__ import annotations

import math
from typing import Any

from hf_rece.errors import ArgumentError

_FLAT_BELOW = 100_000  # items: a scan of fewer is about as fast


def import_faiss() -> Any:
    """Return the module.

    Raises:
        ArgumentError: if it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError:
        raise ArgumentError(
            "index", "faiss", "not installed", 'Install it: pip install "hf_rece[ann]"'
        ) from None
    return faiss


def default_factory(n_items: int) -> str:
    """Return the index, in faiss's notation, that suits a catalogue of that size."""
    if n_items < _FLAT_BELOW:
        return "Flat"
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(n_items)))},SQ8"


def is_served(index: Any) -> bool:
    """Return whether searches know how to set the effort of this kind of index."""
    return isinstance(
        index, (import_faiss().IndexIVF, import_faiss().IndexHNSW, import_faiss().IndexFlat)
    )


def empty_index(factory: str, width: int) -> Any:
    """Return a new index of vectors of that width.

    Raises:
        ArgumentError: if faiss has no such index, or it is not served.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ArgumentError(
            "factory", factory, str(error).splitlines()[-1], "Pass IVF4096,SQ8 or HNSW32"
        ) from None
    if not is_served(index):
        raise ArgumentError(
            "factory",
            factory,
            f"makes {type(index).__name__}, which is not served here",
            "Pass IVF4096,SQ8 or HNSW32",
        )
    return index


def most_effort(index: Any) -> int:
    """Return the effort at which the index finds all that it can; 0 where there is no choice."""
    faiss = import_faiss()
    if isinstance(index, faiss.IndexIVF):
        return int(index.nlist)
    return 4096 if isinstance(index, faiss.IndexHNSW) else 0
