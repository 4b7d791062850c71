"""Checks of settings, each one sentence that begins with the setting's name.

A setting that is None is left out; every check raises ValueError for the first one that fails.
"""

import math
from typing import Any


def require(condition: bool, message: str) -> None:
    """Refuse settings that do not fit each other."""
    if not condition:
        raise ValueError(message)


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse settings below `least`, and numbers that are not finite."""
    within(config, least, math.inf, *names)


def positive(config: Any, *names: str) -> None:
    """Refuse settings that are not positive finite numbers."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 < value < math.inf, f"{name} must be positive, got {value}")


def within(config: Any, low: float, high: float, *names: str, called: str = "") -> None:
    """Refuse settings outside [low, high], where high may be `called` by what it follows from."""
    top = f"{called} ({high})" if called else f"{high}"
    limits = f"at least {low}" if high == math.inf else f"from {low} to {top}"
    for name in names:
        value = getattr(config, name)
        fits = value is None or (low <= value <= high and math.isfinite(value))
        require(fits, f"{name} must be {limits}, got {value}")


def below_one(config: Any, *names: str) -> None:
    """Refuse settings outside [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 <= value < 1, f"{name} must be in [0, 1), got {value}")


def multiple(name: str, value: int, factor: int) -> None:
    """Refuse a number that `factor` does not divide; name the nearest that fits."""
    if value % factor:
        near = max(1, round(value / factor)) * factor
        raise ValueError(f"{name} must be a multiple of {factor}, got {value} (near: {near})")
