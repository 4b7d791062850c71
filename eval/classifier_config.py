"""The settings of the network that reads scenes, and where its files are; light to import."""

from dataclasses import dataclass
from pathlib import Path

from data.scene_drawing import BACKGROUNDS, COLORS, LAYOUTS, SHAPES, SIZES

WEIGHTS = Path(__file__).parent / "weights"
# what files of the classifier call it; renaming the shipped one would change its hash, which
# stands beside every score
KIND = "judge"


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of a classifier and of its training."""

    resolution: int = 32
    """Width and height of the pictures that it learns from."""
    max_objects: int = 2
    """Most things in a scene, 2 to 4."""
    width: int = 32
    """Channels of the first layer."""
    features: int = 64
    """Numbers in the feature space of fd_scenes."""
    steps: int = 2500
    """Training steps."""
    batch_size: int = 128
    """Pictures in a step."""
    lr: float = 3e-3
    """Highest learning rate of the one-cycle schedule."""
    seed: int = 0
    """Seed of the scenes, the broken pictures and the weights."""

    @property
    def input_size(self) -> int:
        """Width and height that pictures are averaged down to before they are read."""
        return 32 if self.resolution < 64 else 64

    @property
    def heads(self) -> list[tuple[str, ...]]:
        """The options of every head: layout, background, then color, shape, size of each slot.

        Every head has one more option, its last: none of these.
        """
        layouts = tuple(k for k, centres in LAYOUTS.items() if len(centres) <= self.max_objects)
        slot = [tuple(COLORS), tuple(SHAPES), tuple(SIZES)]
        return [layouts, tuple(BACKGROUNDS), *slot * self.max_objects]


def weight_name(kind: str, config: ClassifierConfig) -> str:
    """Return the file name of weights for this kind of picture."""
    return f"{kind}-{config.resolution}px-{config.max_objects}objects.safetensors"


def shipped_weights(kind: str, config: ClassifierConfig) -> Path | None:
    """Return the file of weights that ships for this kind of picture, if one does."""
    path = WEIGHTS / weight_name(kind, config)
    return path if path.is_file() else None
