"""memory_budget: how it is written, and how it picks a tile and the largest candidate sets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hf_rece.errors import ArgumentError
from hf_rece.losses.estimates import SMALLEST_TILE_BYTES, Estimate, Shape, exact_flops
from hf_rece.ops.plan import resolve_tile_bytes

Config = TypeVar("Config")

MEMORY_BUDGET = {
    "help": "Most that loss and backward may take above hidden states and table, the gradients of "
    "the two included: bytes, or text such as 2GiB. It picks the size of a tile and every "
    "candidate knob that is None. None: no budget."
}
_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")},
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")},
}
_BY_LOWER_CASE = {unit.lower(): unit for unit in _UNITS}
# Larger tiles are faster up to the device's default, more candidates are better: a tile gets this
# share of what is left, candidates the rest. Each byte of a tile is several at the peak: at most
# Shape.tile_factor, up to 8.5, or 6.3 in the search for a plan.
# Gathered pairs take longer than those of the exact loss.
_SHARE_OF_EXACT = 8
_TILE_SHARE, _TILE_SHARE_ALONE = 1 / 10, 1 / 6.3


@dataclass(frozen=True)
class Levels(Generic[Config]):
    """Ever larger candidate sets of one loss, each given by a configuration with all knobs set.

    Args:
        top: number of the last level; the first is 0. More levels take more memory.
        config: configuration of a level.
        estimate: cost of a configuration at a tile of so many bytes.
        default_tiles: the loss's own default tile, in those of the device.
    """

    top: int
    config: Callable[[int], Config]
    estimate: Callable[[Config, int], Estimate]
    default_tiles: int = 1


@dataclass(frozen=True)
class Choice(Generic[Config]):
    """What a loss runs with.

    Args:
        config: every knob set.
        tile_bytes: bytes of a tile.
        estimate: its cost.
    """

    config: Config
    tile_bytes: int
    estimate: Estimate


def parse_bytes(memory_budget: int | str) -> tuple[int, str]:
    """Return the bytes that `memory_budget` stands for, and its unit.

    Args:
        memory_budget: bytes, or a number and one of B, KB, MB, GB, TB (powers of 1000), KiB, MiB,
            GiB, TiB (powers of 1024), in any case.

    Raises:
        ArgumentError: if it is neither, or not positive.

    Example:
        >>> parse_bytes("1.5 GiB")
        (1610612736, 'GiB')
    """
    text = "" if isinstance(memory_budget, bool) else str(memory_budget)
    if not isinstance(memory_budget, int | str):
        text = ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _BY_LOWER_CASE.get((found[2] or "B").lower()) if found else None
    n_bytes = math.floor(float(found[1]) * _UNITS[unit]) if found and unit else 0
    if unit is None or n_bytes < 1:
        raise ArgumentError(
            "memory_budget",
            memory_budget,
            "not an amount of memory",
            f"Pass bytes, or a number and one of {', '.join(_UNITS)}, such as '2GiB'; or None",
        )
    return n_bytes, unit


def check_budget(memory_budget: int | str | None) -> None:
    """Raise ArgumentError unless `memory_budget` is None or an amount of memory."""
    if memory_budget is not None:
        parse_bytes(memory_budget)


def choose(
    levels: Levels[Config],
    default: Config,
    shape: Shape,
    memory_budget: int | str | None,
    tile_bytes: int | None,
) -> Choice[Config]:
    """Return the configuration and tile that a loss runs with.

    Without a budget these are `default` and the device's tile. With one, tile_bytes is 1 MiB
    and a tenth of what the smallest candidate sets leave (more, where no knob is left to choose),
    at most the device's default, and candidate sets are the largest that fit beside it and cost no
    more operations than an eighth of exact cross-entropy, or than `default` where that is more:
    beyond, the exact loss is the better use of time. A `tile_bytes` that is given is kept. Depends
    on nothing but the arguments, and a larger budget never gives fewer candidates.

    Args:
        levels: the candidate sets to choose from.
        default: configuration without a budget, every knob set.
        shape: of the problem.
        memory_budget: see parse_bytes; None for none.
        tile_bytes: as the caller gave it.

    Raises:
        ArgumentError: if not even the smallest candidate sets and tile fit.
    """
    largest = levels.default_tiles * resolve_tile_bytes(None, shape.device)
    if memory_budget is None:
        tile = largest if tile_bytes is None else resolve_tile_bytes(tile_bytes, shape.device)
        return Choice(default, tile, levels.estimate(default, tile))
    budget, unit = parse_bytes(memory_budget)
    tile = (
        SMALLEST_TILE_BYTES if tile_bytes is None else resolve_tile_bytes(tile_bytes, shape.device)
    )
    floor = levels.estimate(levels.config(0), tile).bound
    if floor > budget:
        raise _too_small(memory_budget, floor, unit, shape)
    if tile_bytes is None:
        share = _TILE_SHARE if levels.top else min(_TILE_SHARE_ALONE, 1 / shape.tile_factor)
        tile = min(largest, tile + int((budget - floor) * share))

    most = max(exact_flops(shape) // _SHARE_OF_EXACT, levels.estimate(default, tile).flops)

    def cost(level: int) -> Estimate:
        return levels.estimate(levels.config(level), tile)

    top = _last(lambda level: cost(level).flops <= most, levels.top)
    config = levels.config(_last(lambda level: cost(level).bound <= budget, top))
    return Choice(config, tile, levels.estimate(config, tile))


def _last(holds: Callable[[int], bool], top: int) -> int:
    """Return the last level up to `top` for which `holds`, which 0 does and then ever fewer do."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _too_small(memory_budget: int | str, floor: int, unit: str, shape: Shape) -> ArgumentError:
    # Rounded up, so that the amount that is named is enough.
    shown = math.ceil(floor / _UNITS[unit] * 100) / 100 if unit != "B" else floor
    enough = f"'{shown}{unit}'" if isinstance(memory_budget, str) else f"{shown}"
    gradients = shape.gradient_bytes / _UNITS[unit]
    return ArgumentError(
        "memory_budget",
        memory_budget,
        f"{shape.n_tokens} tokens, {shape.n_classes} classes and width {shape.width} need at least "
        f"{shown} {unit}, of which the gradients take {gradients:.2f} {unit}",
        f"Pass memory_budget={enough} or more, fewer tokens a step, or None for no budget",
    )
