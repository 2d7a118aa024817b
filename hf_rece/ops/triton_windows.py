"""A grid as the Triton kernels take it: windows, blocks and precision of their launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.products import operand_dtype
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.stream_torch import Scores
from hf_rece.ops.triton_tile import Inputs, Pairs, read

Kind = Literal["forward", "hidden", "rows", "wide"]
Operands = Literal["half", "tf32", "ieee"]

# Pairs to skip, up to which they are compared without a loop, which would stall the loads.
_UNROLLED_SKIPS = 8
# A program should have something to do, and a device several programs for each of its cores.
_BLOCKS_A_SPLIT, _PROGRAMS_A_CORE = 8, 8
_ROOMY = 160 * 2**10


@dataclass(frozen=True)
class Window:
    """Some groups of a grid and some of their columns, and the rows of these classes.

    Args:
        groups: slice of the groups.
        columns: slice of the columns.
        rows: (C, D) if `by_place` is False, else (window's groups * columns, D).
        by_place: whether `rows` are the window's, in order.
    """

    groups: slice
    columns: slice
    rows: Tensor
    by_place: bool

    @property
    def n_groups(self) -> int:
        """Return the number of groups."""
        return len(range(self.groups.start, self.groups.stop))

    @property
    def n_columns(self) -> int:
        """Return the number of columns."""
        return len(range(self.columns.start, self.columns.stop))


@dataclass(frozen=True)
class Work:
    """A grid, ready for the kernels.

    Args:
        scores: how a logit is made.
        plan: of the grid.
        grid: as planned.
        pairs: the whole grid.
        n_skips: pairs to skip of a token, at most.
    """

    scores: Scores
    plan: Plan
    grid: Grid
    pairs: Pairs
    n_skips: int

    @property
    def is_dense(self) -> bool:
        """Whether the kernels read and add to the rows where they lie."""
        rows = self.scores.rows
        # Not a subclass: it may answer rows() by something else.
        return type(rows) is DenseRows and rows.weight.stride(1) == 1

    def windows(self, scratch: int) -> Iterator[Window]:
        """Yield windows whose rows, with `scratch` bytes each, fit into a tile."""
        n_groups, m = len(self.grid.tokens), self.pairs.m
        step_g, step_m = n_groups, m
        if scratch:
            fitting = max(1, self.plan.tile_bytes // scratch)
            step_g = max(1, fitting // m)
            step_m = m if fitting >= m else max(64, fitting)
        for g in range(0, n_groups, step_g):
            groups = slice(g, min(g + step_g, n_groups))
            for c in range(0, m, step_m):
                yield self._window(groups, slice(c, min(c + step_m, m)))

    def _window(self, groups: slice, columns: slice) -> Window:
        rows = self.scores.rows
        if self.is_dense and self.grid.classes is not None:
            (weight,) = rows.tensors()
            return Window(groups, columns, weight, by_place=False)
        ids = self.ids(groups, columns)
        return Window(groups, columns, _rowwise(rows.rows(ids)), by_place=True)

    def ids(self, groups: slice, columns: slice) -> Tensor | slice:
        """Return the classes of a window's rows, in order; padding is read as the last class."""
        classes = self.grid.classes
        if classes is None:
            return columns
        flat = classes[groups, columns].reshape(-1).long()
        return flat.clamp(max=self.plan.n_classes - 1)

    def arguments(self, window: Window) -> tuple[Inputs, Pairs]:
        """Return what every kernel is told of a window."""
        scores = self.scores
        hidden = _rowwise(scores.hidden)
        inputs = Inputs(
            hidden=hidden,
            rows=window.rows,
            bias=scores.bias,
            hidden_stride=hidden.stride(0),
            rows_stride=window.rows.stride(0),
            n_tokens=self.plan.n_tokens,
            n_classes=self.plan.n_classes,
            width=scores.rows.width,
            scale=float(scores.scale),
            softcap=None if scores.softcap is None else float(scores.softcap),
        )
        pairs = self.pairs._replace(
            first_group=window.groups.start,
            first_column=window.columns.start,
            n_columns=window.n_columns,
        )
        return inputs, pairs

    def operands(self, window: Window) -> torch.dtype:
        """Return the dtype of a product's operands."""
        scores = self.scores
        return operand_dtype(scores.hidden.dtype, window.rows.dtype, scores.autocast)

    def constants(self, window: Window) -> dict[str, Any]:
        """Return the constants of compilation that every kernel takes."""
        return {
            "SUM": self.plan.merge == "sum",
            "SKIPS": self.n_skips if self.n_skips <= _UNROLLED_SKIPS else -1,
            "EARLIER": len(self.grid.earlier),
            "BY_PLACE": window.by_place,
            **product_options(self.operands(window)),
        }


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def works_of(scores: Scores, plan: Plan) -> Iterator[tuple[int, Work]]:
    """Yield each grid that has pairs, with the number of its first group."""
    first_number = 0
    for grid in plan.grids if plan.n_tokens else ():
        n_groups, n = grid.tokens.shape
        m = plan.n_classes if grid.classes is None else grid.classes.shape[1]
        if n_groups * n * m:
            skip = _skip_table(grid, n_groups, n)
            n_skips = 0 if skip is None else len(skip)
            yield first_number, Work(scores, plan, grid, _pairs(plan, grid, skip), n_skips)
        first_number += n_groups


def _pairs(plan: Plan, grid: Grid, skip: Tensor | None) -> Pairs:
    n_groups, n = grid.tokens.shape
    m = plan.n_classes if grid.classes is None else grid.classes.shape[1]
    blocked = None
    if grid.blocked is not None:
        blocked = torch.zeros(plan.n_classes, dtype=torch.int8, device=grid.tokens.device)
        blocked.index_fill_(0, grid.blocked, 1)
    own = grid.own_labels
    return Pairs(
        tokens=grid.tokens.contiguous(),
        classes=None if grid.classes is None else grid.classes.contiguous(),
        used=None,
        token_log_weight=_contiguous(grid.token_log_weight),
        class_log_weight=_contiguous(grid.class_log_weight),
        own_labels=None if own is None else own.to(torch.int32),
        blocked=blocked,
        skip=skip,
        token_chunks=tuple(chunks.token_chunks for chunks in grid.earlier),
        class_chunks=tuple(chunks.class_chunks for chunks in grid.earlier),
        reach=tuple(chunks.reach for chunks in grid.earlier),
        n_skips=0 if skip is None else len(skip),
        n_groups=n_groups,
        n=n,
        m=m,
        first_group=0,
        first_column=0,
        n_columns=m,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _skip_table(grid: Grid, n_groups: int, n: int) -> Tensor | None:
    """Return (n_skips, G * n) int32: the columns that each token skips, filled up with -1."""
    if grid.skip is None or len(grid.skip) == 0:
        return None
    group, token, column = grid.skip.unbind(1)
    if grid.skips_once:
        table = column.new_full((1, n_groups * n), -1, dtype=torch.int32)
        table[0, group * n + token] = column.to(torch.int32)
        return table
    places, order = (group * n + token).sort(stable=True)
    n_pairs = places.new_zeros(n_groups * n).index_add_(0, places, torch.ones_like(places))
    rank = torch.arange(len(places), device=places.device) - (n_pairs.cumsum(0) - n_pairs)[places]
    # A power of two: kernels are compiled for few lengths.
    n_skips = 1 << (int(n_pairs.max()) - 1).bit_length()
    table = column.new_full((n_skips, n_groups * n), -1, dtype=torch.int32)
    table[rank, places] = column[order].to(torch.int32)
    return table


# ---------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a launch.

    Args:
        tokens: of a block.
        classes: of a block.
        width: columns of D of a block.
        n_warps: of a program.
        n_stages: blocks on their way.
    """

    tokens: int
    classes: int
    width: int
    n_warps: int
    n_stages: int

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """Return the constants of a launch."""
        return {
            "BLOCK_N": self.tokens,
            "BLOCK_M": self.classes,
            "BLOCK_D": self.width,
            "EVEN": inputs.width % self.width == 0,
            "UNIT": inputs.unit,
            "num_warps": self.n_warps,
            "num_stages": self.n_stages,
            "enable_fp_fusion": True,
        }


# (kernel, operands): widest D -> blocks; the last entry serves every D. They fit into 99 KiB of
# shared memory; those of _ON_ROOMY_DEVICES, tried first, into 160 KiB. Hardly a register
# spills; tests/ops/test_triton_compiles.py looks.
_Table = dict[tuple[Kind, Operands], dict[int, Blocks]]
_BLOCKS: _Table = {
    ("forward", "half"): {
        64: Blocks(128, 128, 64, 8, 3),
        128: Blocks(128, 64, 128, 8, 3),
        256: Blocks(64, 64, 256, 4, 2),
        4096: Blocks(128, 128, 64, 8, 3),
    },
    ("hidden", "half"): {
        64: Blocks(128, 64, 64, 8, 3),
        128: Blocks(128, 64, 128, 8, 2),
        4096: Blocks(64, 64, 256, 8, 2),
    },
    ("rows", "half"): {
        64: Blocks(64, 128, 64, 8, 3),
        128: Blocks(64, 128, 128, 8, 2),
        4096: Blocks(64, 64, 256, 8, 2),
    },
    ("wide", "half"): {4096: Blocks(128, 128, 32, 8, 3)},
    ("forward", "tf32"): {4096: Blocks(128, 128, 32, 8, 3)},
    ("hidden", "tf32"): {64: Blocks(64, 64, 64, 4, 2), 4096: Blocks(64, 32, 128, 4, 2)},
    ("rows", "tf32"): {64: Blocks(64, 64, 64, 4, 2), 4096: Blocks(32, 64, 128, 4, 2)},
    ("wide", "tf32"): {4096: Blocks(64, 64, 32, 4, 3)},
    ("forward", "ieee"): {4096: Blocks(64, 64, 32, 4, 3)},
    ("hidden", "ieee"): {64: Blocks(64, 32, 64, 8, 2), 4096: Blocks(32, 32, 128, 8, 2)},
    ("rows", "ieee"): {64: Blocks(32, 64, 64, 8, 2), 4096: Blocks(16, 32, 128, 8, 2)},
    ("wide", "ieee"): {4096: Blocks(64, 64, 32, 8, 2)},
}
_ON_ROOMY_DEVICES: _Table = {
    ("forward", "half"): {4096: Blocks(128, 256, 64, 8, 3)},
    ("wide", "half"): {4096: Blocks(128, 128, 64, 8, 2)},
}

# Rows that are rounded as they are read take twice the room on their way.
_OF_ROUNDED_ROWS: _Table = {("hidden", "half"): {4096: Blocks(64, 32, 256, 8, 2)}}


def blocks_of(kind: Kind, inputs: Inputs, pairs: Pairs, operands: torch.dtype) -> Blocks:
    """Return the blocks of a launch, no larger than what there is, nor smaller than 16."""
    _, shared_memory = _device(inputs.hidden.device)
    key = kind, _operands(operands)
    table = _BLOCKS[key]
    if shared_memory >= _ROOMY:
        table = {**table, **_ON_ROOMY_DEVICES.get(key, {})}
    if inputs.rows.element_size() > operands.itemsize:
        table = {**table, **_OF_ROUNDED_ROWS.get(key, {})}
    # Wider than all: the last walks the width in pieces, whatever it is.
    fitting = (blocks for widest, blocks in table.items() if widest >= inputs.width)
    found = next(fitting, [*table.values()][-1])
    return Blocks(
        _fit(found.tokens, pairs.n),
        _fit(found.classes, pairs.n_columns),
        _fit(found.width, inputs.width),
        found.n_warps,
        found.n_stages,
    )


def _operands(dtype: torch.dtype) -> Operands:
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if _tf32_is_allowed() else "ieee"


def _fit(block: int, length: int) -> int:
    # A side of a product is a power of two, and at least 16.
    return max(16, min(block, 1 << (length - 1).bit_length()))


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Return a device's cores and the shared memory of each, in bytes."""
    if device.type != "cuda":
        return 1, 0  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    # In torch's stubs only since later versions than those supported.
    shared_memory: int = getattr(properties, "shared_memory_per_block_optin", 0)
    return properties.multi_processor_count, shared_memory


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter, which takes tensors on a CPU."""
    return not isinstance(read, triton.JITFunction)


def n_splits(n_programs: int, n_blocks: int, device: torch.device) -> int:
    """Return into how many programs to split each walk of `n_blocks` blocks."""
    n_cores, _ = _device(device)
    wanted = n_cores * _PROGRAMS_A_CORE // max(1, n_programs)
    return max(1, min(wanted, n_blocks // _BLOCKS_A_SPLIT))


def product_options(dtype: torch.dtype) -> dict[str, Any]:
    """Return operands and precision of products, as constants of compilation."""
    if is_interpreted() and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter multiplies the bits of bfloat16 as integers
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {"DOT": names[dtype], "PRECISION": "tf32" if _tf32_is_allowed() else "ieee"}


def _tf32_is_allowed() -> bool:
    settings = torch.backends.cuda.matmul
    # Where both exist, asking by the old name raises if the new one was used.
    chosen = getattr(settings, "fp32_precision", None)
    return bool(settings.allow_tf32) if chosen is None else chosen == "tf32"
