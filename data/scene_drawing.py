"""What a scene is, and how it is drawn: coloured shapes on a plain background, anti-aliased.

A scene has two to four things. Two stand in a row or in a column, three as two above one or one
above two, four as two above two. Every thing has one of 6 colours, 3 shapes and 2 sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
JITTER = 1  # whole steps of 1/32 that a centre may be off in x and in y; neighbours never touch


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
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "Scene":
        """Read a scene back from the attributes that a sample's JSON holds."""
        named = [{k: t[k] for k in ("color", "shape", "size")} for t in attributes["things"]]
        return cls(tuple(Thing(**t) for t in named), attributes["layout"], attributes["background"])


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
