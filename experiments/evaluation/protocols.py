"""Published protocols: what of them is known, and what is taken where nothing is."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.settings import pick

FILE = Path(__file__).parents[2] / "eval" / "protocols.yaml"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Protocol:
    """How a paper's numbers were made."""

    name: str
    about: str
    known: Mapping[str, Any]
    """Setting -> value, or `UNKNOWN`."""
    instead: Mapping[str, Any]
    """Values in the place of unknown ones."""

    def value(self, setting: str) -> Any:
        """Return what is known, else what is taken instead, else None."""
        value = self.known.get(setting)
        return self.instead.get(setting) if value == UNKNOWN else value

    def told(self) -> list[str]:
        """Return what a person should know of it, line by line."""
        lines = [f"protocol {self.name}: {self.about}"]
        for setting, value in self.known.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            taken = self.instead.get(setting)
            taken = ", ".join(taken) if isinstance(taken, list) else taken
            shown = f"unknown, {taken} is taken" if value == UNKNOWN and taken else shown
            lines.append(f"      {setting}: {shown}")
        return lines


@cache
def protocols() -> dict[str, Protocol]:
    """Return all by name."""
    content: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    found = {}
    for name, told in content.items():
        known = {k: v for k, v in told.items() if k not in ("about", "instead")}
        found[name] = Protocol(name, told["about"], known, told.get("instead", {}))
    return found


def protocol(name: str | None) -> Protocol | None:
    """Return a protocol by name, none without.

    Raises:
        ConfigError: there is none of that name.
    """
    return None if name is None else protocols()[pick("--protocol", name, [*protocols()])]
