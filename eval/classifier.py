"""The classifier of scenes: trained once, shipped for 32 px and two objects.

Make the shipped weights (classifier and CLIP) anew:

    python -m eval.classifier --out eval/weights
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.classifier_config import KIND, ClassifierConfig, weight_name
from eval.classifier_data import IGNORE, draw_sample, fresh_scenes, to_tensor, wear
from eval.classifier_network import (
    Classifier,
    descend,
    encode,
    find_weights,
    read_classifier,
    save_classifier,
    shrink,
)


def train_classifier(config: ClassifierConfig) -> Classifier:
    """Train a classifier on fresh scenes, three quarters sound and one quarter broken.

    The result depends on `config` alone (on one machine).
    """
    rng = np.random.default_rng([config.seed, 0x1D6E])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = Classifier(config)

    def loss(step: int) -> Tensor:
        pairs = [draw_sample(config, rng) for _ in range(config.batch_size)]
        images = shrink(to_tensor([image for image, _ in pairs]), config.input_size)
        labels = torch.tensor([label for _, label in pairs])  # [B, heads]
        logits, _ = classifier(wear(images, generator))
        heads = zip(logits, labels.T, strict=True)
        terms = [F.cross_entropy(row, want, ignore_index=IGNORE) for row, want in heads]
        return sum(terms, torch.zeros(()))

    weights = list(classifier.parameters())
    descend("classifier", loss, weights, config.lr, config.steps)
    return classifier.eval()


@torch.no_grad()
def reading_accuracy(classifier: Classifier, count: int = 2000) -> float:
    """Return the share of fresh scenes that the classifier reads fully right."""
    images, attributes, _ = fresh_scenes(count, classifier.config)
    truth = torch.tensor([encode(a, classifier.config) for a in attributes])
    return float((classifier.read(images)[0] == truth).all(dim=1).double().mean())


def load_classifier(
    resolution: int = 32, max_objects: int = 2, folder: Path | None = None
) -> Classifier:
    """Return the classifier of this kind of picture: shipped, or trained once in `folder`."""
    config = ClassifierConfig(resolution, max_objects)

    def train(path: Path) -> None:
        save_classifier(train_classifier(config), path)

    return read_classifier(find_weights(KIND, config, folder, train))


def main(arguments: list[str] | None = None) -> None:
    """Train classifier and CLIP, write them and say how well they read."""
    parser = argparse.ArgumentParser(prog="python -m eval.classifier", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--only", choices=("classifier", "clip"), help="make one of the two")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--max-objects", type=int, default=2)
    parser.add_argument("--steps", type=int, help="training steps, default those of the settings")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    config = ClassifierConfig(a.resolution, a.max_objects, seed=a.seed)
    steps = a.steps or config.steps
    command = (
        f"python -m eval.classifier --out {a.out} --resolution {a.resolution} "
        f"--max-objects {a.max_objects} --seed {a.seed}"
    )
    if a.only != "clip":
        config = ClassifierConfig(a.resolution, a.max_objects, steps=steps, seed=a.seed)
        path = a.out / weight_name(KIND, config)
        save_classifier(
            train_classifier(config), path, f"{command} --only classifier --steps {steps}"
        )
        accuracy = reading_accuracy(read_classifier(path))
        print(f"{path}: reads {accuracy:.2%} of fresh scenes fully right")
    if a.only != "classifier":
        from eval import scene_clip  # seconds of open_clip, which nothing else here takes

        clip_config = scene_clip.ClipConfig(a.resolution, a.max_objects, seed=a.seed)
        clip_steps = a.steps or clip_config.steps
        clip_config = replace(clip_config, steps=clip_steps)
        path = a.out / weight_name("clip", config)
        model = scene_clip.train_clip(clip_config)
        scene_clip.save_clip(model, path, f"{command} --only clip --steps {clip_steps}")
        accuracy = scene_clip.retrieval_accuracy(scene_clip.read_clip(path))
        print(f"{path}: finds the own caption among 100 for {accuracy:.2%} of fresh pictures")


if __name__ == "__main__":
    main()
