"""What generators, the cache and the scores may ask of a first stage, and its measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_modules.common.checks import multiple

if TYPE_CHECKING:
    from torch import Tensor


class FirstStage(Protocol):
    """Images to a small grid and back: of tokens, or of latents that an autoencoder has.

    A tokenizer has `num_codes` and `codebook()`; an autoencoder has `channels`, `moments`,
    `sample_posterior` and `normalise`.
    """

    @property
    def factor(self) -> int:
        """Pixels per token along a side."""
        ...

    def encode(self, images: Tensor, /) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to tokens [B, h, w] or latents [B, C, h, w]."""
        ...

    def decode(self, encoded: Tensor, /) -> Tensor:
        """Map tokens or latents to images [B, 3, h*factor, w*factor] in [-1, 1]."""
        ...


class Tokenizer(FirstStage, Protocol):
    """A first stage of tokens."""

    @property
    def num_codes(self) -> int:
        """Number of codes K."""
        ...

    def codebook(self) -> Tensor:
        """Return the code vectors [num_codes, c]."""
        ...


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
        """Return that of square pictures.

        Raises:
            ValueError: the factor does not divide the resolution.
        """
        multiple("data.resolution", resolution, factor)
        side = resolution // factor
        return cls((side, side), num_codes, channels, factor)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Return that of a generator's plain settings."""
        height, width = config["grid"]
        return cls((height, width), config.get("num_codes"), config.get("channels"))

    def check_codes(self, name: str, number: int) -> None:
        """Check the setting `name`: how many codes a network knows.

        Raises:
            ValueError: another number than the tokenizer has.
        """
        if self.num_codes is not None and number != self.num_codes:
            raise ValueError(f"{name} must be the tokenizer's {self.num_codes} codes, got {number}")

    def check_multiple(self, of: int) -> None:
        """Check that a network can halve the grid as often as it wants to.

        Raises:
            ValueError: `of` does not divide a side; speaks of the pictures' resolution.
        """
        for side in self.grid:
            multiple("data.resolution", side * self.factor, self.factor * of)
