"""Range checks of the losses' knobs."""

from __future__ import annotations

from hf_rece.errors import ArgumentError


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(
            name, value, f"not an integer of at least {least}", f"Pass {least} or more"
        )


def check_between(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raise ArgumentError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ArgumentError(
            name, value, f"not an integer from {least} to {most}", "Pass one in that range"
        )


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "neither True nor False", "Pass one of them")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(name, value, "no such choice", f"Pass one of {', '.join(choices)}")
