"""Checks of settings, each one sentence that begins with the setting's name."""

import math
from typing import Any


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse settings below `least`, and numbers that are not finite.

    Raises:
        ValueError: the first of `names` that is out of range.
    """
    within(config, least, math.inf, *names)


def positive(config: Any, *names: str) -> None:
    """Refuse settings that are not positive finite numbers.

    Raises:
        ValueError: the first of `names` that is not.
    """
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Refuse settings outside [low, high]; with high infinite, inside [low, inf).

    Raises:
        ValueError: the first of `names` that is out of range.
    """
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {limits}, got {value}")


def multiple(name: str, value: int, factor: int) -> None:
    """Refuse a number that `factor` does not divide.

    Raises:
        ValueError: it does not; names the nearest that fits.
    """
    if value % factor:
        near = max(1, round(value / factor)) * factor
        raise ValueError(f"{name} must be a multiple of {factor}, got {value} (near: {near})")
