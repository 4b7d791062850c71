"""What generators, the cache and the scores may ask of a tokenizer or an autoencoder."""

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Images to a small grid and back: of tokens, or of latents that a continuous autoencoder has.

    A codec of tokens is a `Tokenizer` and has `num_codes`; a continuous one has no such attribute.
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


class Tokenizer(Protocol):
    """Images to a grid of codes and back."""

    @property
    def num_codes(self) -> int:
        """Number of codes K."""
        ...

    @property
    def factor(self) -> int:
        """Pixels per token along a side."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to tokens [B, H/factor, W/factor] int64."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, h, w] int64 to images [B, 3, h*factor, w*factor] in [-1, 1]."""
        ...

    def codebook(self) -> Tensor:
        """Return the code vectors [num_codes, c]."""
        ...
