"""The perceptual network of scenes: LPIPS's form, sensitive to what scenes are made of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.scene_drawing import Scene, draw_scene, place
from data.scenes import scenes
from eval import perceptual
from eval.classifier_config import WEIGHTS, ClassifierConfig
from lightning_modules.common.perceptual import load_lpips


def test_training_is_reproducible_and_learns() -> None:
    config = ClassifierConfig(batch_size=16, lr=2e-3)
    one, two = (perceptual.train_lpips(config, 3).state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    weights = [v for k, v in one.items() if k.startswith("lpips.lin")]
    assert len(weights) == 5 and all(torch.equal(w, torch.full_like(w, 0.2)) for w in weights)


def test_the_file_is_in_lpips_layout(tmp_path: Path, capsys) -> None:
    perceptual.main(["--out", str(tmp_path), "--steps", "1"])
    assert "fully right" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.safetensors")
    assert path.name == "lpips-32px-2objects.safetensors"
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lpips = load_lpips(path)
    assert torch.equal(lpips(x, x), torch.zeros(2)) and (lpips(x, -x) > 0).all()


def test_the_shipped_network_sees_attributes() -> None:
    """Another colour or shape is farther than a change of all pixels by as much in square."""
    lpips = load_lpips(WEIGHTS / "lpips-32px-2objects.safetensors")
    rng = np.random.default_rng(0)
    nearer = []
    for sample in scenes("val", 40):
        scene = Scene.from_attributes(sample["attributes"])
        thing = scene.things[0]
        shape = "square" if thing.shape == "circle" else "circle"
        other = replace(scene, things=(replace(thing, shape=shape), *scene.things[1:]))
        centres = place(scene, rng)
        a, b = (
            torch.from_numpy(draw_scene(s, centres, 32)).permute(2, 0, 1)[None] / 127.5 - 1
            for s in (scene, other)
        )
        size = (a - b).square().mean().sqrt()
        brighter = (a + size).clamp(-1, 1)
        nearer.append(float(lpips(a, brighter)) < float(lpips(a, b)))
    assert np.mean(nearer) > 0.9
