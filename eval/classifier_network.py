"""The network that reads every attribute of a picture of a scene, and its files."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from data.files import file_hash
from data.scene_captions import AskedScene
from eval.classifier_config import KIND, ClassifierConfig, shipped_weights, weight_name
from lightning_modules.common.checkpoint import load_strict, load_weights, save_weights

FREE = -1  # the label of what a caption leaves out


class Classifier(nn.Module):
    """Pictures of scenes to the labels of all their attributes.

    Attributes:
        name: what read: settings and hash of the weights, stored beside every score.
    """

    def __init__(self, config: ClassifierConfig, name: str = "untrained classifier") -> None:
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
            images: [N, 3, H, W] uint8, any size; averaged down to the classifier's own.
            batch_size: pictures at once; without influence on the result.

        Returns:
            labels [N, 2 + 3 max_objects] int64 in the order of `ClassifierConfig.heads` (`decode`
            names them), and features [N, F] float32, both on the CPU.

        Raises:
            ValueError: pictures of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"the classifier reads uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        device, labels, features = next(self.parameters()).device, [], []
        for part in images.split(batch_size):
            small = shrink(part.to(device), self.config.input_size)
            logits, found = self(small)
            labels.append(torch.stack([row.argmax(1) for row in logits], 1).cpu())
            features.append(found.float().cpu())
        return torch.cat(labels), torch.cat(features)


def shrink(images: Tensor, size: int) -> Tensor:
    """Average uint8 pictures [B, 3, H, W] to size x size in [0, 1]; smaller ones grow."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    if min(images.shape[-2:]) < size:
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return F.interpolate(images, (size, size), mode="area")


def encode(attributes: Mapping[str, Any], config: ClassifierConfig) -> list[int]:
    """Return the labels of a scene's attributes in the order of `config.heads`.

    Args:
        attributes: things (in reading order), layout and background; None = none of the options.
        config: whose heads.

    Raises:
        ValueError: an attribute that no head knows, or too many things.
    """
    things = attributes["things"]
    if len(things) > config.max_objects:
        raise ValueError(
            f"the classifier reads at most {config.max_objects} things, got {len(things)}"
        )
    values = [attributes["layout"], attributes["background"]]
    values += [t[k] for t in things for k in ("color", "shape", "size")]
    values += [None] * (len(config.heads) - len(values))
    for options, value in zip(config.heads, values, strict=True):
        if value is not None and value not in options:
            raise ValueError(
                f"the classifier does not know {value!r}; it knows {', '.join(options)}"
            )
    return [len(o) if v is None else o.index(v) for o, v in zip(config.heads, values, strict=True)]


def encode_asked(asked: AskedScene, config: ClassifierConfig) -> list[int]:
    """Return labels of what is asked, in the order of `config.heads`, FREE where nothing is.

    Slots past the asked things have the label past the last where a layout is asked, which says how
    many things there are, and are FREE where none is.

    Raises:
        ValueError: an attribute that no head knows, or too many things.
    """
    labels = encode(asdict(asked), config)
    free = [asked.layout is None, asked.background is None]
    free += [v is None for t in asked.things for v in (t.color, t.shape, t.size)]
    free += [asked.layout is None] * (len(labels) - len(free))
    return [FREE if unsaid else label for unsaid, label in zip(free, labels, strict=True)]


def decode(labels: Sequence[int], config: ClassifierConfig) -> dict[str, Any]:
    """Return the attributes that labels stand for; None where the classifier saw none of its own.

    Slots without any attribute are left out.
    """
    heads = config.heads
    named = [o[i] if i < len(o) else None for o, i in zip(heads, labels, strict=True)]
    slots = [named[i : i + 3] for i in range(2, len(named), 3)]
    things = [dict(zip(("color", "shape", "size"), s, strict=True)) for s in slots if any(s)]
    return {"things": things, "layout": named[0], "background": named[1]}


def find_weights(
    kind: str, config: ClassifierConfig, folder: Path | None, train: Callable[[Path], None]
) -> Path:
    """Return the file of weights for this kind of picture: shipped, or trained once and kept.

    Args:
        kind: what the weights are of.
        config: the kind of picture.
        folder: where weights that do not ship are kept; they are trained (minutes) on first use,
            by one process at a time.
        train: trains and writes the file.

    Raises:
        ValueError: weights that do not ship, and no folder.
    """
    shipped = shipped_weights(kind, config)
    if shipped is not None:
        return shipped
    if folder is None:
        raise ValueError(
            f"{weight_name(kind, config)} does not ship; name a folder in which it is trained"
        )
    path = Path(folder) / weight_name(kind, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            train(path)
    return path


def save_half(path: Path, module: nn.Module, settings: dict[str, Any]) -> None:
    """Write a network, half precision, with settings (and the command that makes it)."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_weights(path, state, settings)


def save_classifier(classifier: Classifier, path: Path, command: str = "") -> None:
    """Write a classifier with its settings and the command that makes it."""
    save_half(path, classifier, {KIND: asdict(classifier.config), "command": command})


def read_classifier(path: Path) -> Classifier:
    """Read what `save_classifier` wrote."""
    state, config = load_weights(path)
    settings = ClassifierConfig(**config[KIND])
    name = (
        f"scene classifier, {settings.resolution} px, {settings.max_objects} objects, "
        f"seed {settings.seed}, sha256 {file_hash(path)[:12]}"
    )
    classifier = Classifier(settings, name)
    full = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    load_strict(classifier, full, str(path))
    return classifier.eval()


def descend(
    what: str,
    loss: Callable[[int], Tensor],
    weights: Sequence[nn.Parameter],
    lr: float,
    steps: int,
    *,
    most: float = math.inf,
) -> None:
    """Train with AdamW and a one-cycle schedule.

    Args:
        what: names the training where loss and time left are printed now and then.
        loss: the loss of a step.
        weights: what is trained.
        lr: highest learning rate.
        steps: training steps.
        most: largest norm of the gradient, which is scaled down to it.
    """
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    began = time.monotonic()
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        if most < math.inf:
            nn.utils.clip_grad_norm_(weights, most)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 40) == 0:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            print(
                f"{what}: step {step + 1}/{steps}, loss {value:.4f}, {left:.0f} s left", flush=True
            )
