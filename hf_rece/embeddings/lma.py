"""Semantically constrained memory allocation: items that occur together share memory cells."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from hf_rece.embeddings.min_hash import KEY_BITS, MOST_KEYS, own_keys
from hf_rece.embeddings.mixing import mixed
from hf_rece.errors import ArgumentError
from hf_rece.ops.lookup import lookup


class LMAEmbedding(nn.Module):
    """A table of C rows of width D in one flat memory; both input lookup and output rows.

        row(v)[i] = memory[hash_i(n_hashes keys of v's signature)]

    A signature holds n_keys min-hashes of the set of users in which v occurs. Two items whose sets
    have Jaccard similarity J share a cell at each of the D places with probability
    J^n_hashes - (n_hashes / n_keys) J^n_keys (of items whose keys all agree, one key is set apart),
    and by chance with probability 1 / n_cells. Addresses are computed on the fly: only signatures
    and memory are kept.

    Without signatures, every place hashes the id itself: plain hashing, no item like another.

    Args:
        num_embeddings: C.
        embedding_dim: D.
        n_cells: floats of memory.
        compression: in place of n_cells, how many times fewer floats than the C x D of a dense
            table.
        signatures: (C, n_keys) int16 from hf_rece.embeddings.min_hash, or None.
        n_keys: in place of signatures, makes a table in which every item is cold (its keys are
            hashes of its id) until set_signatures; 0 for plain hashing.
        n_hashes: keys that an address depends on; 1 to n_keys. More make only very similar items
            share.
        seed: of the hash functions; part of the model.
        std: standard deviation of the cells at the start.

    Raises:
        ArgumentError: for not exactly one of n_cells and compression, no cells, or signatures that
            do not fit.

    Memory:
        n_cells floats, and 2 bytes for each key of an item.

    Reference:
        Desai, Pan, Sun, Chou, Shrivastava, 2021, arXiv 2103.06124. Differs: the published program
        keeps a (C, D) int64 table of addresses; here 2 n_keys bytes an item and universal hashing
        (multiply and add, high bits) on the fly.

    Example:
        >>> table = LMAEmbedding(1000, 8, compression=10)
        >>> table(torch.tensor([[3, 999]])).shape
        torch.Size([1, 2, 8])
    """

    signatures: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        n_cells: int | None = None,
        compression: float | None = None,
        signatures: Tensor | None = None,
        n_keys: int = 0,
        n_hashes: int = 2,
        seed: int = 0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.n_cells = resolve_cells(num_embeddings, embedding_dim, n_cells, compression)
        self.seed = seed
        if not 0 <= n_keys <= MOST_KEYS:
            raise ArgumentError(
                "n_keys", n_keys, f"signatures have 1 to {MOST_KEYS} keys", "Pass 0 for none"
            )
        own = signatures is None
        if signatures is not None:
            _check_signatures(signatures, num_embeddings)
            n_keys = signatures.shape[1]
        elif n_keys:
            signatures = torch.empty(num_embeddings, n_keys, dtype=torch.int16)
        self.n_keys = n_keys
        if n_keys and not 1 <= n_hashes <= n_keys:
            raise ArgumentError(
                "n_hashes", n_hashes, f"a signature has {n_keys} keys", f"Pass 1 to {n_keys}"
            )
        self.n_hashes = n_hashes if n_keys else 1
        self.register_buffer("signatures", signatures)
        self.memory = nn.Parameter(torch.empty(self.n_cells))
        self.reset_parameters(std)
        if own:
            self.reset_identity()

    def reset_parameters(self, std: float) -> None:
        """Draw the memory anew, normal with standard deviation `std`."""
        nn.init.normal_(self.memory, std=std)

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Make every item cold, where there are signatures."""
        if self.signatures is not None and not self.signatures.is_meta:
            keys = own_keys(np.arange(self.num_embeddings), self.n_keys, self.seed)
            self.signatures.copy_(torch.from_numpy(keys))

    def factor_std(self, std: float) -> float:
        """Return the standard deviation of the cells that gives rows `std`: the same."""
        return std

    @torch.no_grad()
    def set_signatures(self, signatures: Tensor) -> None:
        """Replace the signatures of a table that was made with some, before training.

        Raises:
            ArgumentError: if the table has none, or they do not fit.
        """
        if self.signatures is None:
            raise ArgumentError(
                "signatures", "a tensor", "this table hashes ids", "Make the table with n_keys"
            )
        _check_signatures(signatures, self.num_embeddings, self.n_keys)
        self.signatures.copy_(signatures)

    @property
    def n_rows(self) -> int:
        """C, the number of classes."""
        return self.num_embeddings

    @property
    def width(self) -> int:
        """D, the width of a row."""
        return self.embedding_dim

    def tensors(self) -> tuple[Tensor, ...]:
        """Return `(memory,)`."""
        return (self.memory,)

    def cells(self, ids: Tensor | slice) -> Tensor:
        """Return the addresses (K, D) int64 in memory of rows `ids`."""
        shape = (self.n_keys, self.n_hashes, self.embedding_dim, self.seed)
        choices, factors, offsets = _hash_functions(*shape, self.memory.device)
        if self.signatures is not None:
            # Whole numbers below 2^53: exact in float64, whose products are the fastest sums.
            numbers = (self.signatures[ids].double() @ choices).long()
        elif isinstance(ids, slice):
            numbers = torch.arange(ids.start, ids.stop, device=self.memory.device).unsqueeze(1)
        else:
            numbers = ids.unsqueeze(1)
        # The high bits of such a sum are 2-universal; their share of 2^31 is that of the memory.
        total = torch.addcmul(offsets, numbers, factors)
        return total.bitwise_right_shift_(33).bitwise_and_(2**31 - 1).mul_(self.n_cells) >> 31

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows (K, D)."""
        cells = self.cells(ids)
        return self.memory.index_select(0, cells.view(-1)).view(cells.shape)

    def add_grad(self, grads: tuple[Tensor | None, ...], ids: Tensor | slice, grad: Tensor) -> None:
        """Add the gradient (K, D) of rows `ids` to the memory's buffer, by one scatter-add."""
        (buffer,) = grads
        if buffer is not None:
            buffer.scatter_add_(0, self.cells(ids).view(-1), grad.reshape(-1).to(buffer.dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return rows (..., D) for ids (...) int64."""
        return lookup(self, input_ids)

    def extra_repr(self) -> str:
        """Say how much is kept of what."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, n_cells={self.n_cells}, "
            f"n_keys={self.n_keys}, n_hashes={self.n_hashes}, seed={self.seed}"
        )


def resolve_cells(n_rows: int, width: int, n_cells: int | None, compression: float | None) -> int:
    """Return the floats of memory.

    Raises:
        ArgumentError: unless exactly one of n_cells and compression is given, and leaves cells.
    """
    if (n_cells is None) == (compression is None):
        raise ArgumentError(
            "compression", compression, f"n_cells is {n_cells}", "Pass exactly one of them"
        )
    if compression is not None:
        n_cells = round(n_rows * width / compression) if compression >= 1 else 0
    if n_cells is None or not 1 <= n_cells < 2**31:
        name, value = ("n_cells", n_cells) if compression is None else ("compression", compression)
        raise ArgumentError(
            name, value, f"a memory of {n_cells} cells", "Ask for 1 to 2**31 - 1 cells"
        )
    return n_cells


@lru_cache(maxsize=32)
def _hash_functions(
    n_keys: int, n_hashes: int, width: int, seed: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return choices (n_keys, D) float64, factors (D,) and offsets (D,) int64 of the D places.

    A place's number is the sum of its n_hashes keys, each times a choice of 34 bits; its address
    comes of the number times the factor plus the offset. Not buffers: they follow from the seed, on
    whatever device a loaded model comes to lie.
    """
    rank = mixed(seed, "columns", n_keys, width).argsort(0, kind="stable").argsort(0)
    weights = (mixed(seed, "choices", n_keys, width) >> np.uint64(30)) | np.uint64(1)
    choices = np.where(rank < n_hashes, weights, 0).astype(np.float64)
    # Odd: no number is multiplied away.
    factors = (mixed(seed, "factors", width) | np.uint64(1)).view(np.int64)
    offsets = mixed(seed, "offsets", width).view(np.int64)
    return tuple(torch.from_numpy(a).to(device) for a in (choices, factors, offsets))


def _check_signatures(signatures: Tensor, n_rows: int, n_keys: int | None = None) -> None:
    wrong_keys = signatures.dim() != 2 or n_keys not in (None, signatures.shape[1])
    if wrong_keys or len(signatures) != n_rows or signatures.dtype != torch.int16:
        raise ArgumentError(
            "signatures",
            (tuple(signatures.shape), signatures.dtype),
            f"there are {n_rows} ids and keys of {KEY_BITS} bits",
            f"Pass int16 of shape ({n_rows}, {n_keys or 'n_keys'}) from min_hash_signatures",
        )
