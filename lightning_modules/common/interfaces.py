"""The grid that generators, the cache and the scores see of a first stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_modules.common.checks import multiple, require


@dataclass(frozen=True)
class Geometry:
    """The grid that a first stage makes of the data's pictures."""

    grid: tuple[int, int]
    """Height and width in tokens."""
    num_codes: int | None = None
    """Codes of a tokenizer; None of an autoencoder."""
    channels: int | None = None
    """Channels of an autoencoder's latents; None of a tokenizer."""
    factor: int = 1
    """Pixels per token along a side."""

    @classmethod
    def of(
        cls, resolution: int, factor: int, num_codes: int | None = None, channels: int | None = None
    ) -> Geometry:
        """Return that of square pictures, whose resolution the factor must divide."""
        multiple("data.resolution", resolution, factor)
        side = resolution // factor
        return cls((side, side), num_codes, channels, factor)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Return that of a generator's plain settings."""
        height, width = config["grid"]
        return cls((height, width), config.get("num_codes"), config.get("channels"))

    def check_codes(self, name: str, number: int) -> None:
        """Check the setting `name`: how many codes a network knows."""
        fits = self.num_codes in (None, number)
        require(fits, f"{name} must be the tokenizer's {self.num_codes} codes, got {number}")

    def check_multiple(self, of: int) -> None:
        """Check that `of` divides the grid; the message speaks of the pictures' resolution."""
        for side in self.grid:
            multiple("data.resolution", side * self.factor, self.factor * of)
