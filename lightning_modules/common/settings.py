"""Dataclass settings from plain containers and back, so that checkpoints hold nothing but dicts."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any]) -> T:
    """Make the dataclass `cls` from nested plain dicts; missing keys take their defaults.

    Args:
        cls: a dataclass whose nested sections are dataclasses too.
        data: plain containers, as `plain` returns them.

    Raises:
        ValueError: a key that `cls` does not have, named with its section.
    """
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - names)
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {sorted(names)}")
    values = {}
    for key, value in data.items():
        section = _dataclass_in(hints[key])
        values[key] = build(section, value) if section and isinstance(value, Mapping) else value
    return cls(**values)


def plain(settings: Any) -> dict[str, Any]:
    """Return the nested plain dict of a dataclass instance."""
    return dataclasses.asdict(settings)


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type hint holds, also inside an Optional."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)  # type: ignore[return-value]
