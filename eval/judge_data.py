"""What a judge learns from: sound scenes, broken ones, and the wear of pictures."""

from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.scenes import (
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
    scenes,
)
from eval.judge_network import JudgeConfig, encode

IGNORE = -100  # a label that the loss passes over


def sound_sample(config: JudgeConfig, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Draw a scene of any split: its picture [H, W, 3] uint8 and its labels."""
    scene = sample_scene(rng, config.max_objects)
    image = draw_scene(scene, place(scene, rng), config.resolution)
    return image, encode(asdict(scene), config)


def broken_sample(config: JudgeConfig, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Draw a picture that is no proper scene and the labels that say so.

    Half-and-half things (labelled none where the halves differ), a mixed background, a missing
    thing, one too many, or patches in disorder: what an imperfect generator makes. They keep the
    judge from guessing.
    """
    size, kind = config.resolution, rng.choice(["mix", "mix", "background", "count", "disorder"])
    scene = sample_scene(rng, config.max_objects)
    centres = place(scene, rng)
    image = draw_scene(scene, centres, size)
    labels = encode(asdict(scene), config)
    half = np.arange(size) < size / 2
    if kind == "mix":
        change = [rng.random(3) < 0.4 for _ in scene.things]
        new = [Thing(*(str(rng.choice(list(o))) for o in (COLORS, SHAPES, SIZES)))
               for _ in scene.things]  # fmt: skip
        things = tuple(
            Thing(*(b if c else a for a, b, c in zip(astuple(t), astuple(n), m, strict=True)))
            for t, n, m in zip(scene.things, new, change, strict=True)
        )
        other = draw_scene(Scene(things, scene.layout, scene.background), centres, size)
        rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
        cut = rng.integers(3)
        if cut == 2:
            image = np.rint(0.5 * image + 0.5 * other).astype(np.uint8)
        else:  # through the middle of every thing, by its nearest centre
            gap = [np.hypot(columns - c[0] * size, rows - c[1] * size) for c in centres]
            middle = centres[np.argmin(gap, axis=0)] * size  # [H, W, 2]
            keep = (columns < middle[..., 0]) if cut else (rows < middle[..., 1])
            image = np.where(keep[..., None], image, other)
        mixed = encode(asdict(Scene(things, scene.layout, scene.background)), config)
        none = [len(o) for o in config.heads]
        labels = [a if a == b else n for a, b, n in zip(labels, mixed, none, strict=True)]
    elif kind == "background":
        others = [b for b in BACKGROUNDS if b != scene.background]
        other = draw_scene(
            Scene(scene.things, scene.layout, str(rng.choice(others))), centres, size
        )
        image = np.where(half[:, None, None] if rng.random() < 0.5 else half[:, None], image, other)
        labels[1] = len(BACKGROUNDS)
    elif kind == "count":
        left_out = int(rng.integers(len(centres)))
        if rng.random() < 0.5 and config.max_objects < 4:
            layout = str(rng.choice([k for k, c in LAYOUTS.items() if len(c) > config.max_objects]))
            more = tuple(sample_scene(rng).things[0] for _ in LAYOUTS[layout])
            scene = Scene(more, layout, scene.background)
            image = draw_scene(scene, place(scene, rng), size)
        else:
            things = scene.things[:left_out] + scene.things[left_out + 1 :]
            kept = np.delete(centres, left_out, axis=0)
            image = draw_scene(Scene(things, scene.layout, scene.background), kept, size)
        labels = [len(config.heads[0]), labels[1]] + [IGNORE] * (len(labels) - 2)
    else:
        step = size // 4
        tiles = image.reshape(4, step, 4, step, 3).swapaxes(1, 2).reshape(16, step, step, 3)
        tiles = tiles[rng.permutation(16)].reshape(4, 4, step, step, 3).swapaxes(1, 2)
        image = tiles.reshape(size, size, 3)
        labels = [len(config.heads[0])] + [IGNORE] * (len(labels) - 1)
    return image, labels


def astuple(thing: Thing) -> tuple[str, str, str]:
    """Return the attributes of a thing in the order of the heads."""
    return thing.color, thing.shape, thing.size


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
    count: int, config: JudgeConfig, seed: int = 987_654
) -> tuple[Tensor, list[dict], list[str]]:
    """Return pictures [N, 3, H, W] uint8, attributes and captions, half val and half heldout."""
    samples = [
        sample
        for split in ("val", "heldout")
        for sample in scenes(
            split,
            count // 2,
            seed=seed,
            resolution=config.resolution,
            max_objects=config.max_objects,
        )
    ]
    images = to_tensor([s["image"] for s in samples])
    return images, [s["attributes"] for s in samples], [s["caption"] for s in samples]
