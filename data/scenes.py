"""The embedded captioned data: scenes of coloured shapes, drawn anti-aliased, exact by seed.

A scene has two to four things on a plain background. Two things stand in a row or in a column,
three as two above one or one above two, four as two above two. Every thing has one of 6 colours,
3 shapes and 2 sizes. A tenth of all combinations, chosen by a hash, never occurs in training and
forms the split `heldout`, so that composition can be scored.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 215),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 4.4 / 32, "large": 6.2 / 32}  # half width as a share of the picture
BACKGROUNDS = {"black": (18, 18, 18), "grey": (128, 128, 128), "white": (240, 240, 240)}

# centres (x, y) of the things in reading order, as shares of the picture
LAYOUTS = {
    "row": ((8 / 32, 16 / 32), (24 / 32, 16 / 32)),
    "column": ((16 / 32, 8 / 32), (16 / 32, 24 / 32)),
    "two above one": ((8 / 32, 8 / 32), (24 / 32, 8 / 32), (16 / 32, 24 / 32)),
    "one above two": ((16 / 32, 8 / 32), (8 / 32, 24 / 32), (24 / 32, 24 / 32)),
    "two above two": ((8 / 32, 8 / 32), (24 / 32, 8 / 32), (8 / 32, 24 / 32), (24 / 32, 24 / 32)),
}
# how a caption relates two things: the first to the second, and the second to the first
RELATIONS = {
    "row": (("left of", "to the left of"), ("right of", "to the right of")),
    "column": (("above", "over"), ("below", "under")),
}
JITTER = 1  # whole steps of 1/32 that a centre may be off in x and in y; neighbours never touch
SWAPPED = 0.25  # share of captions that name the second thing first
# a split's number seeds its samples: new ones are appended. The last two are fresh draws by the
# rules of val and heldout, which scores compare pictures with whose captions nobody was asked for
SPLITS = ("train", "val", "heldout", "reference", "heldout_reference")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    color: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the things in reading order, how they stand, and the background."""

    things: tuple[Thing, ...]
    layout: str
    background: str

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "Scene":
        """Read a scene back from the attributes that a sample's JSON holds."""
        named = [{k: t[k] for k in ("color", "shape", "size")} for t in attributes["things"]]
        return cls(tuple(Thing(**t) for t in named), attributes["layout"], attributes["background"])


def is_heldout(scene: Scene) -> bool:
    """Return whether the combination of all attributes is one of the tenth kept from training."""
    name = f"{[str(t) for t in scene.things]} {scene.layout} {scene.background}"
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 10 == 0


def sample_scene(rng: np.random.Generator, max_objects: int = 2) -> Scene:
    """Draw a scene uniformly over its attributes.

    Args:
        rng: draws the scene.
        max_objects: most things in a scene, 2 to 4; the number is uniform from 2 up to it.

    Raises:
        ValueError: a number of things that no layout holds.
    """
    if not 2 <= max_objects <= 4:
        raise ValueError(f"max_objects must be 2, 3 or 4, got {max_objects}")
    count = int(rng.integers(2, max_objects + 1))
    fitting = [name for name, centres in LAYOUTS.items() if len(centres) == count]

    def pick(options: Any) -> str:
        return str(rng.choice(list(options)))

    things = tuple(Thing(pick(COLORS), pick(SHAPES), pick(SIZES)) for _ in range(count))
    return Scene(things, pick(fitting), pick(BACKGROUNDS))


def place(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return jittered centres [things, 2] as shares of the picture, x to the right, y down."""
    centres = np.array(LAYOUTS[scene.layout])
    jitter = rng.integers(-JITTER, JITTER + 1, centres.shape)
    return centres + jitter / 32


def draw_scene(scene: Scene, centres: np.ndarray, resolution: int = 32) -> np.ndarray:
    """Draw a scene with edges smoothed over one pixel.

    Coverage of a pixel is clip(1/2 - d, 0, 1), d the signed distance of its centre to the shape's
    edge in pixels, negative inside.

    Args:
        scene: what to draw.
        centres: [things, 2] as `place` returns them.
        resolution: width and height in pixels.

    Returns:
        [resolution, resolution, 3] uint8.
    """
    axis = np.arange(resolution) + 0.5
    image = np.full((resolution, resolution, 3), BACKGROUNDS[scene.background], float)
    for thing, centre in zip(scene.things, centres, strict=True):
        x = axis[None, :] - centre[0] * resolution  # [1, W]
        y = axis[:, None] - centre[1] * resolution  # [H, 1]
        distance = edge_distance(thing.shape, x, y, SIZES[thing.size] * resolution)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # [H, W, 1]
        image += coverage * (np.array(COLORS[thing.color]) - image)
    return np.rint(image).astype(np.uint8)


def edge_distance(shape: str, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    """Return the signed distance to the edge of a shape, negative inside.

    Args:
        shape: one of SHAPES.
        x: to the right of its centre, in pixels; broadcasts with `y`.
        y: below its centre.
        half: half width in pixels.
    """
    if shape == "circle":
        return np.hypot(x, y) - half
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * half
    # triangle with its tip up: the base at y = half, the tip at y = -half
    slope = np.hypot(1, 0.5)
    return np.maximum(y - half, (np.abs(x) - 0.5 * (y + half)) / slope)


def scene_masks(
    attributes: dict[str, Any], resolution: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Say what every cell of a grid over a scene shows, by the centre of the cell.

    Args:
        attributes: as a sample holds them, with centre and half width of each thing in pixels.
        resolution: width and height of the picture in pixels.
        side: cells along a side.

    Returns:
        things [side, side] int64, 0 = background, k = thing k of the reading order; and halves
        [side, side] int64, 0 = background, 1 = upper and 2 = lower half of a thing, cut at its
        centre.
    """
    axis = (np.arange(side) + 0.5) * resolution / side
    things = np.zeros((side, side), np.int64)
    halves = np.zeros((side, side), np.int64)
    for number, thing in enumerate(attributes["things"], 1):
        x = axis[None, :] - thing["centre"][0]  # [1, side]
        y = axis[:, None] - thing["centre"][1]  # [side, 1]
        inside = edge_distance(thing["shape"], x, y, thing["half"]) <= 0
        things[inside] = number
        halves = np.where(inside, np.where(y < 0, 1, 2), halves)
    return things, halves


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say what a scene shows, in one of several phrasings.

    Two things are named in either order: "left of" or, less often, "right of", "above" or "below".
    """
    named = [f"a {thing}" for thing in scene.things]
    if scene.layout in RELATIONS:
        forth, back = RELATIONS[scene.layout]
        swap, variant = int(rng.random() < SWAPPED), rng.integers(2)
        first, second = named[swap], named[1 - swap]
        body = f"{first} {(back if swap else forth)[variant]} {second}"
    elif scene.layout == "two above one":
        body = f"{named[0]} left of {named[1]}, and {named[2]} below them"
    elif scene.layout == "one above two":
        body = f"{named[0]} above {named[1]} left of {named[2]}"
    else:
        body = f"{named[0]} left of {named[1]}, above {named[2]} left of {named[3]}"
    templates = (
        f"{body} on a {scene.background} background",
        f"{body}, {scene.background} background",
        f"on a {scene.background} background, {body}",
        f"a picture of {body} on {scene.background}",
    )
    return templates[rng.integers(len(templates))]


def scenes(
    split: str, count: int, *, seed: int = 0, resolution: int = 32, max_objects: int = 2
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a split; sample i depends on (seed, split, i) alone.

    Args:
        split: train, val or reference (combinations seen in training), heldout or
            heldout_reference (combinations never seen).
        count: number of samples.
        seed: seed of the whole data set.
        resolution: width and height in pixels.
        max_objects: most things in a scene, 2 to 4.

    Yields:
        {"key": str, "image": uint8 [H, W, 3], "caption": str, "attributes": plain dict with
        things (color, shape, size, centre and half width in pixels), layout and background}.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have the splits {', '.join(SPLITS)}, not {split!r}")
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = sample_scene(rng, max_objects)
        while is_heldout(scene) != split.startswith("heldout"):
            scene = sample_scene(rng, max_objects)
        centres = place(scene, rng)
        attributes = asdict(scene)
        for thing, centre in zip(attributes["things"], centres, strict=True):
            thing["centre"] = [round(float(c) * resolution, 3) for c in centre]
            thing["half"] = SIZES[thing["size"]] * resolution
        yield {
            "key": f"{SPLITS.index(split)}{index:08d}",
            "image": draw_scene(scene, centres, resolution),
            "caption": caption(scene, rng),
            "attributes": {**attributes, "things": list(attributes["things"])},
        }
