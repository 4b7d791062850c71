"""The judge of scenes: trained once, shipped for 32 px and two objects.

Make the shipped weights (judge and CLIP) anew:

    python -m eval.judge --out eval/weights
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock

from eval import scene_clip
from eval.judge_data import IGNORE, broken_sample, fresh_scenes, sound_sample, to_tensor, wear
from eval.judge_network import (
    WEIGHTS,
    Judge,
    JudgeConfig,
    read_judge,
    report_step,
    save_judge,
    shrink,
    weight_name,
)


def train_judge(config: JudgeConfig, *, quiet: bool = False) -> Judge:
    """Train a judge on fresh scenes, three quarters sound and one quarter broken.

    Args:
        config: the settings; the result depends on them alone (on one machine).
        quiet: print no progress.

    Returns:
        The judge, in eval mode.
    """
    rng = np.random.default_rng([config.seed, 0x1D6E])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = Judge(config)
    optimizer = torch.optim.AdamW(judge.parameters(), config.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    start = time.monotonic()
    for step in range(config.steps):
        pairs = [(broken_sample if rng.random() < 0.25 else sound_sample)(config, rng)
                 for _ in range(config.batch_size)]  # fmt: skip
        images = shrink(to_tensor([image for image, _ in pairs]), config.input_size)
        labels = torch.tensor([label for _, label in pairs])  # [B, heads]
        logits, _ = judge(wear(images, generator))
        loss = sum(
            (F.cross_entropy(row, column, ignore_index=IGNORE)
             for row, column in zip(logits, labels.T, strict=True)), torch.zeros(())
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if not quiet:
            report_step("judge", step, config.steps, loss.item(), start)
    return judge.eval()


@torch.no_grad()
def judge_accuracy(judge: Judge, count: int = 2000) -> float:
    """Return the share of fresh scenes that the judge reads fully right."""
    images, attributes, _ = fresh_scenes(count, judge.config)
    truth = torch.tensor([judge.encode(a) for a in attributes])
    return float((judge.read(images)[0] == truth).all(dim=1).double().mean())


def load_judge(resolution: int = 32, max_objects: int = 2, folder: Path | None = None) -> Judge:
    """Return the judge of pictures of this kind: the shipped one, or one trained once.

    Args:
        resolution: width and height of the pictures.
        max_objects: most things in a scene, 2 to 4.
        folder: where a judge that is not shipped is kept; it is trained (minutes) on first use,
            by one process at a time. None keeps it in memory only.

    Returns:
        The judge in eval mode on the CPU.
    """
    config = JudgeConfig(resolution=resolution, max_objects=max_objects)
    shipped = WEIGHTS / weight_name("judge", config)
    if shipped.is_file():
        return read_judge(shipped)
    if folder is None:
        return train_judge(config)
    path = Path(folder) / weight_name("judge", config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            save_judge(train_judge(config), path)
    return read_judge(path)


def main(arguments: list[str] | None = None) -> None:
    """Train judge and CLIP, write them and say how well they read."""
    parser = argparse.ArgumentParser(prog="python -m eval.judge", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--only", choices=("judge", "clip"), help="make one of the two")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--max-objects", type=int, default=2)
    parser.add_argument("--steps", type=int, help="training steps, default those of the settings")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    config = JudgeConfig(a.resolution, a.max_objects, seed=a.seed)
    steps = a.steps or config.steps
    command = (
        f"python -m eval.judge --out {a.out} --resolution {a.resolution} "
        f"--max-objects {a.max_objects} --seed {a.seed}"
    )
    if a.only != "clip":
        config = JudgeConfig(a.resolution, a.max_objects, steps=steps, seed=a.seed)
        path = a.out / weight_name("judge", config)
        save_judge(train_judge(config), path, f"{command} --only judge --steps {steps}")
        share = judge_accuracy(read_judge(path))
        print(f"{path}: reads {share:.2%} of fresh scenes fully right")
    if a.only != "judge":
        clip_config = scene_clip.ClipConfig(a.resolution, a.max_objects, seed=a.seed)
        clip_steps = a.steps or clip_config.steps
        clip_config = replace(clip_config, steps=clip_steps)
        path = a.out / weight_name("clip", config)
        model = scene_clip.train_clip(clip_config)
        scene_clip.save_clip(model, path, f"{command} --only clip --steps {clip_steps}")
        share = scene_clip.retrieval_accuracy(scene_clip.read_clip(path))
        print(f"{path}: finds the own caption among 100 for {share:.2%} of fresh pictures")


if __name__ == "__main__":
    main()
