"""Settings that several papers share; light to import."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TextConfig:
    """How captions become vectors."""

    name: Literal["bytes", "byt5", "open_clip"] = "bytes"
    """bytes: trained with the generator; byt5: frozen ByT5 and open_clip; open_clip: it alone."""
    width: int = 128
    """bytes: width of the encoder and of its output vectors."""
    layers: int = 1
    """bytes: layers of the bidirectional GRU."""
    buckets: int = 4096
    """bytes: rows of the table that byte n-grams are hashed into."""
    max_length: int = 64
    """Longest text in tokens (bytes: words; byt5: bytes); the rest is cut."""
    path: str = "google/byt5-xl"
    """byt5: folder or hub name of the T5 encoder."""
    mask_padding: bool = True
    """byt5: hide padding from the generator; false attends to it, as the released code does."""
    clip: str | None = "ViT-H-14"
    """byt5, open_clip: model of the pooled text and image vectors; null leaves them out."""
    clip_pretrained: str = "laion2b_s32b_b79k"
    """byt5, open_clip: tag or weights file of the open_clip model."""

    def __post_init__(self) -> None:
        for name in ("layers", "buckets", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even and at least 2, got {self.width}")


@dataclass
class OptimConfig:
    """Optimizer of a generator."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = True
    """Decay every parameter, as the released code does; false exempts biases and norms."""
    warmup_steps: int = 0
    """Steps of the linear warm-up from 0 (the first step has rate 0, as in the released code)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or cosine to 0 at trainer.max_steps."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 turns it off."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name in ("weight_decay", "warmup_steps", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
