"""The settings of the data."""

from dataclasses import dataclass, fields
from typing import Literal

from data.corpora import corpora
from data.view import MAX_SKIPPED, Crop, View

EMBEDDED = ("scenes", "digits")  # drawn or shipped


@dataclass
class DataConfig:
    """Which captioned images, and how they become pictures of one size."""

    name: Literal[
        "scenes",
        "digits",
        "shards",
        "laion",
        "cc3m",
        "cc12m",
        "coco2014",
        "coco2017",
        "imagenet",
        "ffhq",
        "celebahq",
        "cub200",
        "oxford102",
        "imagefolder",
        "parquet",
        "cache",
    ] = "scenes"
    """scenes: drawn by the project; digits: handwritten, of scikit-learn; shards: your own; else a
    corpus in data.root (--paper help says how to get it), or a cache that experiments.precompute
    made."""
    path: str | None = None
    """Folder of the cache that data=cache trains on; the other data are those that it was made of.
    """
    root: str | None = None
    """Folder of a corpus, such as data=coco2014 or data=imagefolder."""
    shards: str | None = None
    """Your training shards: folder, glob, range such as path/{00000..00009}.tar, or URL."""
    allow_pipe: bool = False
    """Let data.shards name commands, pipe:COMMAND, whose output is a shard."""
    val_shards: str | None = None
    """Your validation shards; null keeps about 2 % of the training samples, chosen by key (of small
    sets more: about 16 samples, at most half)."""
    resolution: int = 32
    """Width and height in pixels."""
    train_size: int = 20_000
    """Training samples to draw (scenes) or to use at most (digits)."""
    val_size: int = 1_000
    """Validation samples, at most."""
    heldout_size: int = 1_000
    """Scenes of attribute combinations that training never shows."""
    max_objects: int = 2
    """Most things in a scene: 2, 3 or 4."""
    seed: int = 0
    """Seed of the data set itself, not of the training."""
    cache: bool = True
    """Encode the training shards to tokens once; false encodes in every step."""
    crop: Crop = "center"
    """Which square of a training image: the largest in the centre or at random; adm: resized and
    cut as ADM does; dalle: near the centre, as DALL-E and VQ-Diffusion do; resize_*: the short side
    resized by that filter, then the centre. Validation sees the one that draws nothing."""
    crops: int = 1
    """Crops of every training image that a cache keeps, with a random crop."""
    flip: bool = False
    """Mirror half of the training images. Not for captions that say left or right."""
    shuffle_buffer: int = 1_000
    """Training samples of all devices together that are shuffled at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the training process."""
    max_skipped: float = MAX_SKIPPED
    """Share of bad samples (corrupt image, no caption, ...) at which a run stops."""
    min_size: int | None = None
    """Drop images whose original short side has fewer pixels."""
    min_aesthetic: float | None = None
    """Drop images whose aesthetic score is lower or missing."""
    max_pwatermark: float | None = None
    """Drop images whose probability of a watermark is higher or missing."""
    max_punsafe: float | None = None
    """Drop images whose probability of unsafe content is higher or missing."""
    min_caption: int | None = None
    """Drop captions of fewer characters, and images that have no other."""
    max_caption: int | None = None
    """Drop captions of more characters, and images that have no other."""
    caption: str | None = None
    """Caption of images that have none; null leaves these out."""

    def __post_init__(self) -> None:
        if self.name == "cache":
            raise ValueError("path must name the folder of the cache")
        if self.path is not None and not self.cache:
            raise ValueError("cache must be true with path, which names a cache")
        if self.crops > 1 and self.crop not in ("random", "dalle"):
            raise ValueError(f"crops must be 1 with crop={self.crop}: all would be the same")
        if self.shards is not None and self.name in EMBEDDED:
            self.name = "shards"
        if self.name == "shards" and self.shards is None:
            raise ValueError("shards must name your shards when name is shards")
        if self.name in (*EMBEDDED, "shards"):
            if self.root is not None:
                raise ValueError(f"root goes with a corpus, not with {self.name}")
        elif self.root is None and self.shards is None:
            how = corpora()[self.name].how_to_get
            raise ValueError(f"root must name the folder of {self.name}; {how}")
        sizes = {"resolution": 8, "crops": 1, "train_size": 1, "val_size": 1, "heldout_size": 1}
        for name, lowest in {**sizes, "seed": 0, "shuffle_buffer": 0, "workers": 0}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 2 <= self.max_objects <= 4:
            raise ValueError(f"max_objects must be 2, 3 or 4, got {self.max_objects}")
        if not 0 <= self.max_skipped < 1:
            raise ValueError(f"max_skipped must be in [0, 1), got {self.max_skipped}")
        for name in ("min_caption", "max_caption"):
            if (length := getattr(self, name)) is not None and length < 1:
                raise ValueError(f"{name} must be at least 1, got {length}")
        if self.flip and self.name in EMBEDDED:
            raise ValueError(f"flip must be false for {self.name}: mirrored, the caption is wrong")

    def view(self) -> View:
        """Return how samples become pictures, and which are left out."""
        return View(**{field.name: getattr(self, field.name) for field in fields(View)})
