"""What a classifier learns from: sound scenes, broken ones, and the wear of pictures."""

from dataclasses import asdict, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.scene_drawing import (
    BACKGROUNDS,
    COLORS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
    place,
    sample_scene,
)
from data.scenes import scenes
from eval.classifier_config import ClassifierConfig
from eval.classifier_network import encode

IGNORE = -100  # a label that the loss passes over


def draw_sample(config: ClassifierConfig, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Draw a training sample: a quarter of them are broken."""
    return (broken_sample if rng.random() < 0.25 else sound_sample)(config, rng)


def sound_sample(
    config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw a scene of any split: its picture [H, W, 3] uint8 and its labels."""
    scene = sample_scene(rng, config.max_objects)
    image = draw_scene(scene, place(scene, rng), config.resolution)
    return image, encode(asdict(scene), config)


def broken_sample(
    config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw a picture that is no proper scene, and labels that say so: they teach not to guess."""
    kind = str(rng.choice(["mixed", "mixed", "patched", "miscounted", "disordered"]))
    scene = sample_scene(rng, config.max_objects)
    return BROKEN[kind](scene, place(scene, rng), config, rng)


def mixed(
    scene: Scene, centres: np.ndarray, config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw things that are half another thing, or blended with it; none where the two differ."""
    size, tables = config.resolution, (COLORS, SHAPES, SIZES)
    change = [rng.random(3) < 0.4 for _ in scene.things]
    new = [[str(rng.choice(list(table))) for table in tables] for _ in scene.things]
    things = tuple(
        Thing(*(b if c else a for a, b, c in zip(asdict(t).values(), n, m, strict=True)))
        for t, n, m in zip(scene.things, new, change, strict=True)
    )
    second = replace(scene, things=things)
    image, other = (draw_scene(s, centres, size) for s in (scene, second))
    cut = rng.integers(3)
    if cut == 2:
        image = np.rint(0.5 * image + 0.5 * other).astype(np.uint8)
    else:  # through the middle of every thing: the centre nearest to a pixel decides
        rows, columns = np.indices((size, size))
        gap = [np.hypot(columns - c[0] * size, rows - c[1] * size) for c in centres]
        middle = centres[np.argmin(gap, axis=0)] * size  # [H, W, 2]
        keep = columns < middle[..., 0] if cut else rows < middle[..., 1]
        image = np.where(keep[..., None], image, other)
    labels = [encode(asdict(s), config) for s in (scene, second)]
    return image, [
        a if a == b else len(options) for a, b, options in zip(*labels, config.heads, strict=True)
    ]


def patched(
    scene: Scene, centres: np.ndarray, config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw a background that changes in the middle: the background is none."""
    others = [b for b in BACKGROUNDS if b != scene.background]
    image = draw_scene(scene, centres, config.resolution)
    other = draw_scene(
        replace(scene, background=str(rng.choice(others))), centres, config.resolution
    )
    half = np.arange(config.resolution) < config.resolution / 2
    image = np.where(half[:, None, None] if rng.random() < 0.5 else half[:, None], image, other)
    labels = encode(asdict(scene), config)
    return image, [labels[0], len(BACKGROUNDS), *labels[2:]]


def miscounted(
    scene: Scene, centres: np.ndarray, config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw one thing too few, or more than the classifier knows: the layout is none."""
    left_out = int(rng.integers(len(centres)))
    labels = encode(asdict(scene), config)
    if rng.random() < 0.5 and config.max_objects < 4:
        layout = str(rng.choice([k for k, c in LAYOUTS.items() if len(c) > config.max_objects]))
        things = tuple(sample_scene(rng).things[0] for _ in LAYOUTS[layout])
        scene = Scene(things, layout, scene.background)
        centres = place(scene, rng)
    else:
        scene = replace(scene, things=scene.things[:left_out] + scene.things[left_out + 1 :])
        centres = np.delete(centres, left_out, axis=0)
    image = draw_scene(scene, centres, config.resolution)
    return image, [len(config.heads[0]), labels[1]] + [IGNORE] * (len(labels) - 2)


def disordered(
    scene: Scene, centres: np.ndarray, config: ClassifierConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw a scene whose 4 x 4 patches changed places: the layout is none."""
    step = config.resolution // 4
    image = draw_scene(scene, centres, config.resolution)  # rows that no patch holds stay
    whole = image[: 4 * step, : 4 * step].reshape(4, step, 4, step, 3)
    tiles = whole.swapaxes(1, 2).reshape(16, step, step, 3)
    tiles = tiles[rng.permutation(16)].reshape(4, 4, step, step, 3).swapaxes(1, 2)
    image[: 4 * step, : 4 * step] = tiles.reshape(4 * step, 4 * step, 3)
    return image, [len(config.heads[0])] + [IGNORE] * (len(config.heads) - 1)


BROKEN = {f.__name__: f for f in (mixed, patched, miscounted, disordered)}


def wear(images: Tensor, generator: torch.Generator) -> Tensor:
    """Wear pictures [B, 3, S, S] in [0, 1] slightly, as tokenizers and JPEG do.

    Shift by a pixel, blur, washed-out chroma, offsets of 4x4 blocks, noise, gain and offset of
    each channel; about half of the pictures keep each of these.
    """
    b, _, h, w = images.shape

    def strength(most: float) -> Tensor:
        draws = torch.rand(2, b, 1, 1, 1, generator=generator)
        return most * draws[0] * (draws[1] < 0.5)

    def normal(channels: int, step: int = 1) -> Tensor:
        return torch.randn(b, channels, h // step, w // step, generator=generator)

    dx, dy = torch.randint(0, 3, (2,), generator=generator).tolist()
    images = F.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, dy : dy + h, dx : dx + w]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + strength(0.8) * (blurred - images)
    luma = images.mean(dim=1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(images - luma, 2), scale_factor=2)
    images = images + strength(1.0) * (luma + chroma - images)
    images = images + strength(0.1) * F.interpolate(normal(3, 4), scale_factor=4)
    images = images + strength(0.1) * normal(3)
    gain = 1 + strength(0.08) * torch.randn(b, 3, 1, 1, generator=generator)
    return (gain * images + strength(0.05)).clamp(0, 1)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Stack pictures [H, W, 3] uint8 to [N, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def fresh_scenes(
    count: int, config: ClassifierConfig, seed: int = 987_654
) -> tuple[Tensor, list[dict], list[str]]:
    """Return pictures [N, 3, H, W] uint8, attributes and captions, half val and half heldout."""
    size, most = config.resolution, config.max_objects
    halves = [
        scenes(split, count // 2, seed=seed, resolution=size, max_objects=most)
        for split in ("val", "heldout")
    ]
    samples = list(chain(*halves))
    images = to_tensor([s["image"] for s in samples])
    return images, [s["attributes"] for s in samples], [s["caption"] for s in samples]
