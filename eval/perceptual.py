"""A small network in LPIPS's form for scenes: the perceptual loss of the smallest scale.

The trunk has VGG16's layers at a fraction of its widths and learns to read the attributes of
scenes; every stage counts alike, and so does every channel, since nobody has rated distances of
scenes. A score with it is called lpips_scenes, never LPIPS. Make the shipped weights anew:

    python -m eval.perceptual --out eval/weights
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.classifier_config import ClassifierConfig, weight_name
from eval.classifier_data import fresh_scenes, sound_sample, to_tensor, wear
from eval.classifier_network import descend, encode, save_half, shrink
from lightning_modules.common.perceptual import LPIPS

WIDTHS = (8, 16, 32, 32, 32)
STEPS = 1500


class Reader(nn.Module):
    """The trunk of `LPIPS` with a linear head per attribute, which is dropped after training."""

    def __init__(self, config: ClassifierConfig, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.lpips = LPIPS(widths).requires_grad_(True)
        self.sizes = [len(options) + 1 for options in config.heads]
        side = config.input_size // 16
        self.head = nn.Linear(widths[-1] * side * side, sum(self.sizes))
        for layer in self.lpips.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for i, width in enumerate(widths):
            # unit vectors differ by at most 2 in square, so the distance is at most 2
            weight: Tensor = getattr(self.lpips, f"lin{i}").model[1].weight
            nn.init.constant_(weight, 1 / len(widths)).requires_grad_(False)
            assert weight.shape[1] == width

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map pictures [B, 3, S, S] in [0, 1] to the logits of every head."""
        last = self.lpips.features(2 * images - 1)[-1]  # [B, c, S/16, S/16]
        return list(self.head(last.flatten(1)).split(self.sizes, 1))


def train_lpips(config: ClassifierConfig, steps: int = STEPS) -> Reader:
    """Train the reader on fresh, worn scenes of `config`, whose batch size, rate and seed hold."""
    rng = np.random.default_rng([config.seed, 0x1B1B5])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        reader = Reader(config)

    def loss(step: int) -> Tensor:
        pairs = [sound_sample(config, rng) for _ in range(config.batch_size)]
        images = shrink(to_tensor([image for image, _ in pairs]), config.input_size)
        labels = torch.tensor([label for _, label in pairs])  # [B, heads]
        rows = zip(reader(wear(images, generator)), labels.T, strict=True)
        return sum((F.cross_entropy(logits, want) for logits, want in rows), torch.zeros(()))

    weights = [p for p in reader.parameters() if p.requires_grad]
    descend("perceptual", loss, weights, config.lr, steps, most=1.0)
    return reader.eval()


@torch.no_grad()
def reading_accuracy(reader: Reader, config: ClassifierConfig, count: int = 1000) -> float:
    """Return the share of fresh scenes that the reader reads fully right."""
    images, attributes, _ = fresh_scenes(count, config)
    logits = reader(shrink(images, config.input_size))
    read = torch.stack([row.argmax(1) for row in logits], dim=1)
    truth = torch.tensor([encode(a, config) for a in attributes])
    return float((read == truth).all(dim=1).double().mean())


def main(arguments: list[str] | None = None) -> None:
    """Train the network, write it in LPIPS's layout and say how well it reads."""
    parser = argparse.ArgumentParser(prog="python -m eval.perceptual", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    config = ClassifierConfig(batch_size=64, lr=2e-3, seed=a.seed)
    reader = train_lpips(config, a.steps)
    path = a.out / weight_name("lpips", config)
    command = f"python -m eval.perceptual --out {a.out} --steps {a.steps} --seed {a.seed}"
    save_half(path, reader.lpips, {"lpips_scenes": asdict(config), "command": command})
    accuracy = reading_accuracy(reader, config)
    print(f"{path}: the trunk reads {accuracy:.2%} of fresh scenes fully right")


if __name__ == "__main__":
    main()
