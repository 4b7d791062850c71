"""The embedded captioned data: scenes by split, exact by seed.

A tenth of all combinations of attributes, chosen by a hash, never occurs in training and forms the
split `heldout`, so that composition can be scored. A share of the training captions says only a
part of what its picture shows. The captions of val and heldout say everything, so that a score of
them counts every attribute of every picture; those in part are a split of their own, in which each
caption is asked REPEATS times, so that it shows too whether what was left free varies.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from data.scene_captions import caption, caption_in_part, complete, parse
from data.scene_drawing import SIZES, Scene, draw_scene, place, sample_scene

# a split's number seeds its samples: new ones are appended. The references are fresh draws by the
# rules of val and heldout, which scores compare pictures with whose captions nobody was asked for
SPLITS = ("train", "val", "heldout", "reference", "heldout_reference", "partial")
IN_PART = 0.15  # share of the training captions that leave something out
REPEATS = 4  # samples of `partial` in a row that share a caption


def is_heldout(scene: Scene) -> bool:
    """Return whether the combination of all attributes is one of the tenth kept from training."""
    name = f"{[str(t) for t in scene.things]} {scene.layout} {scene.background}"
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 10 == 0


def scenes(
    split: str, count: int, *, seed: int = 0, resolution: int = 32, max_objects: int = 2
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a split; sample i depends on (seed, split, i) alone.

    Args:
        split: train, val or reference (combinations seen in training), heldout or
            heldout_reference (combinations never seen), or partial (captions in part; the
            pictures of a caption differ in what it leaves out).
        count: number of samples.
        seed: seed of the whole data set.
        resolution: width and height in pixels.
        max_objects: most things in a scene, 2 to 4.

    Yields:
        {"key": str, "image": uint8 [H, W, 3], "caption": str, "attributes": plain dict with
        things (color, shape, size, centre and half width in pixels), layout and background}. The
        attributes are those of the picture, also where the caption does not ask for them.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have the splits {', '.join(SPLITS)}, not {split!r}")
    number, heldout = SPLITS.index(split), split.startswith("heldout")

    def draw(how: Callable[[], Scene]) -> Scene:
        scene = how()
        while is_heldout(scene) != heldout:
            scene = how()
        return scene

    for index in range(count):
        rng = np.random.default_rng([seed, number, index])
        if split == "partial":
            own = np.random.default_rng([seed, number, index // REPEATS, REPEATS])
            text = caption_in_part(draw(partial(sample_scene, own, max_objects)), own)
            scene = draw(partial(complete, parse(text), rng, max_objects))
            centres = place(scene, rng)
        else:
            scene = draw(partial(sample_scene, rng, max_objects))
            centres = place(scene, rng)
            in_part = split == "train" and rng.random() < IN_PART
            text = (caption_in_part if in_part else caption)(scene, rng)
        attributes = asdict(scene)
        for thing, centre in zip(attributes["things"], centres, strict=True):
            thing["centre"] = [round(float(c) * resolution, 3) for c in centre]
            thing["half"] = SIZES[thing["size"]] * resolution
        yield {
            "key": f"{number}{index:08d}",
            "image": draw_scene(scene, centres, resolution),
            "caption": text,
            "attributes": {**attributes, "things": list(attributes["things"])},
        }
