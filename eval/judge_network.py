"""The network that reads every attribute of a picture of a scene, and its files."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.scenes import BACKGROUNDS, COLORS, LAYOUTS, SHAPES, SIZES
from lightning_modules.common.checkpoint import file_hash, load_strict, load_weights, save_weights

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of a judge and of its training."""

    resolution: int = 32
    """Width and height of the pictures that it learns from."""
    max_objects: int = 2
    """Most things in a scene, 2 to 4."""
    width: int = 32
    """Channels of the first layer."""
    features: int = 64
    """Numbers in the feature space of fd/scenes."""
    steps: int = 2500
    """Training steps."""
    batch_size: int = 128
    """Pictures in a step."""
    lr: float = 3e-3
    """Highest learning rate of the one-cycle schedule."""
    seed: int = 0
    """Seed of the scenes, the damages and the weights."""

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


class Judge(nn.Module):
    """Pictures of scenes to the labels of all their attributes.

    Attributes:
        name: what judged: settings and hash of the weights, stored beside every score.
    """

    def __init__(self, config: JudgeConfig, name: str = "untrained judge") -> None:
        super().__init__()
        self.config, self.name = config, name
        w, patch = config.width, config.input_size // 16

        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        self.body = nn.Sequential(
            nn.Conv2d(3, w, 2 * patch, patch, patch // 2, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),  # [B, w, 16, 16]
            *block(w, 2 * w, 1),
            *block(2 * w, 3 * w, 2),  # [B, 3w, 8, 8]
            *block(3 * w, 3 * w, 1),
            *block(3 * w, 2 * w, 2),  # [B, 2w, 4, 4]
            nn.Flatten(),
            nn.Linear(32 * w, config.features),
            nn.ReLU(),
        )
        self.head = nn.Linear(config.features, sum(len(o) + 1 for o in config.heads))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Map pictures [B, 3, S, S] in [0, 1] to the logits of every head and the features [B, F].

        S is the config's input_size.
        """
        features = self.body(2 * images - 1)
        return list(self.head(features).split([len(o) + 1 for o in self.config.heads], 1)), features

    @torch.inference_mode()
    def read(self, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Read pictures.

        Args:
            images: [N, 3, H, W] uint8, any size; averaged down to the judge's own.
            batch_size: pictures at once; without influence on the result.

        Returns:
            labels [N, 2 + 3 max_objects] int64 in the order of `JudgeConfig.heads` (`decode` names
            them), and features [N, F] float32, both on the CPU.

        Raises:
            ValueError: pictures of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"the judge reads uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        device, labels, features = next(self.parameters()).device, [], []
        for part in images.split(batch_size):
            small = shrink(part.to(device), self.config.input_size)
            logits, found = self(small)
            labels.append(torch.stack([row.argmax(1) for row in logits], 1).cpu())
            features.append(found.float().cpu())
        return torch.cat(labels), torch.cat(features)

    def encode(self, attributes: dict[str, Any]) -> list[int]:
        """Return the labels of a scene's true attributes, in the order of `JudgeConfig.heads`.

        Raises:
            ValueError: an attribute that no head knows, or too many things.
        """
        return encode(attributes, self.config)

    def decode(self, labels: list[int]) -> dict[str, Any]:
        """Return the attributes that labels stand for; None where the judge saw none of its own.

        Slots without any attribute are left out.
        """
        heads = self.config.heads
        named = [o[i] if i < len(o) else None for o, i in zip(heads, labels, strict=True)]
        slots = [named[i : i + 3] for i in range(2, len(named), 3)]
        things = [dict(zip(("color", "shape", "size"), s, strict=True)) for s in slots if any(s)]
        return {"things": things, "layout": named[0], "background": named[1]}


def shrink(images: Tensor, size: int) -> Tensor:
    """Average uint8 pictures [B, 3, H, W] to size x size in [0, 1]; smaller ones grow."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    if min(images.shape[-2:]) < size:
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return F.interpolate(images, (size, size), mode="area")


def encode(attributes: dict[str, Any], config: JudgeConfig) -> list[int]:
    """Return the labels of a scene's attributes in the order of `config.heads`.

    Args:
        attributes: things (in reading order), layout and background; None = none of the options.
        config: whose heads.

    Raises:
        ValueError: an attribute that no head knows, or too many things.
    """
    things = attributes["things"]
    if len(things) > config.max_objects:
        raise ValueError(f"the judge reads at most {config.max_objects} things, got {len(things)}")
    values = [attributes["layout"], attributes["background"]]
    values += [t[k] for t in things for k in ("color", "shape", "size")]
    values += [None] * (len(config.heads) - len(values))
    for options, value in zip(config.heads, values, strict=True):
        if value is not None and value not in options:
            raise ValueError(f"the judge does not know {value!r}; it knows {', '.join(options)}")
    return [len(o) if v is None else o.index(v) for o, v in zip(config.heads, values, strict=True)]


def weight_name(kind: str, config: JudgeConfig) -> str:
    """Return the file name of weights for this kind of picture."""
    return f"{kind}-{config.resolution}px-{config.max_objects}objects.safetensors"


def save_judge(judge: Judge, path: Path, command: str = "") -> None:
    """Write a judge, half precision, with its settings and the command that makes it."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_weights(path, state, {"judge": asdict(judge.config), "command": command})


def read_judge(path: Path) -> Judge:
    """Read what `save_judge` wrote."""
    state, config = load_weights(path)
    settings = JudgeConfig(**config["judge"])
    name = (
        f"scene judge, {settings.resolution} px, {settings.max_objects} objects, "
        f"seed {settings.seed}, sha256 {file_hash(path)[:12]}"
    )
    judge = Judge(settings, name)
    load_strict(judge, {k: v.float() if v.is_floating_point() else v for k, v in state.items()},
                str(path))  # fmt: skip
    return judge.eval()


def report_step(what: str, step: int, steps: int, loss: float, start: float) -> None:
    """Print loss and time left, now and then."""
    if (step + 1) % max(1, steps // 40) == 0:
        left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
        print(f"{what}: step {step + 1}/{steps}, loss {loss:.4f}, {left:.0f} s left", flush=True)
