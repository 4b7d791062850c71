"""Inception features against clean-fid's own, its resizing against golden numbers."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from torchvision.models import inception_v3

from eval.extractors import InceptionRows
from eval.frechet import FeatureStats, frechet_distance
from eval.inception import (
    clean_resize,
    inception_score,
    load_script,
    pytorch_resize,
    score_inception,
    tensorflow_resize,
)
from eval.rows import Measured
from tests.tiny_networks import Inception, inception_file, randomised


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_file(tmp_path_factory.mktemp("inception"))


@pytest.mark.golden
def test_golden_resize(golden: Callable) -> None:
    case = golden("evaluation/resize")
    side = case.config["output_size"][0]
    for name in ("up", "down"):
        image = case.io[f"{name}.image"]
        pixels = image.permute(2, 0, 1)[None].float()
        found = {"tf1": tensorflow_resize(pixels, side)[0]}
        for mode, resize in (("clean", clean_resize), ("legacy_pytorch", pytorch_resize)):
            found[mode] = resize(image.permute(2, 0, 1).numpy())
            theirs = build_resizer(mode)(image.numpy()).transpose(2, 0, 1)
            torch.testing.assert_close(found[mode], torch.from_numpy(theirs), rtol=0, atol=1e-4)
        for mode, made in found.items():
            near = case.tolerance[mode]["atol"]
            torch.testing.assert_close(
                made[:, ::7, ::7], case.io[f"{name}.{mode}"], rtol=0, atol=near
            )
            total, sums = case.io[f"{name}.{mode}.sum"], case.tolerance["sums"]["rtol"]
            torch.testing.assert_close(made.double().sum((1, 2)), total, rtol=sums, atol=0)
            if mode != "tf1":
                row = made[:, 150, :40]
                torch.testing.assert_close(row, case.io[f"{name}.{mode}.row150"], rtol=0, atol=near)


def picture_folder(folder: Path, count: int, sizes: list[tuple[int, int]], seed: int) -> list[Path]:
    rng, paths = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for i in range(count):
        w, h = sizes[i % len(sizes)]
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        path = folder / f"{i:03d}.png"
        Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def images(paths: list[Path]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_features_and_distance_are_clean_fids_own(mode: str, weights: Path, tmp_path: Path) -> None:
    """On two folders; the distance is taken in 24 of the 2,048 features, whose root is quick."""
    network = InceptionV3W(str(weights.parent), download=False, resize_inside=mode != "clean")
    sizes = [(64, 48), (320, 310)] if mode == "clean" else [(64, 48)]
    measure = InceptionRows.of(weights, mode).load("cpu", folder=tmp_path)
    theirs, ours = [], []
    for name, seed in (("made", 0), ("x.zips/real", 1)):  # clean-fid takes .zip for an archive
        paths = picture_folder(tmp_path / name, 30, sizes, seed)
        plain = tmp_path / f"plain{seed}"
        plain.mkdir()
        for path in paths:
            (plain / path.name).write_bytes(path.read_bytes())
        found = cleanfid.get_folder_features(
            str(plain), network, num_workers=0, batch_size=7, device="cpu", mode=mode, verbose=False
        )
        rows = measure(images(paths), [], 0)
        (row,) = rows.rows.values()
        assert row.dtype == np.float32 and row.shape == (30, 2048)
        np.testing.assert_allclose(row, found, rtol=1e-5, atol=1e-6)
        theirs.append(found[:, :24])
        ours.append(FeatureStats.of(row[:, :24]))
    expected = cleanfid.fid_from_feats(*theirs)
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3


def test_pictures_of_several_sizes_stay_in_their_order(weights: Path, tmp_path: Path) -> None:
    """One by one, and all at once, in the mode in which the network resizes."""
    paths = picture_folder(tmp_path / "p", 6, [(40, 30), (64, 64), (30, 40)], 2)
    measure = InceptionRows.of(weights, "legacy_tensorflow").load("cpu", folder=tmp_path)
    together = measure(images(paths), [], 0).rows["features.inception_tf"]
    for row, image in zip(together, images(paths), strict=True):
        alone = measure([image], [], 0).rows["features.inception_tf"]
        np.testing.assert_allclose(row, alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "end"), [("clean", "inception"), ("legacy_tensorflow", "inception_tf")]
)
def test_spatial_features_and_classes(mode: str, end: str, weights: Path, tmp_path: Path) -> None:
    (image,) = images(picture_folder(tmp_path / "p", 1, [(50, 64)], 3))
    measure = InceptionRows.of(weights, mode, spatial=True, classes=True).load(
        "cpu", folder=tmp_path
    )
    rows = measure([image], [], 0).rows
    assert {k: v.shape for k, v in rows.items()} == {
        f"features.{end}": (1, 2048),
        f"spatial.{end}": (1, 2023),
        f"probabilities.{end}": (1, 1008),
    }
    script = load_script(weights, "cpu")
    if mode == "clean":
        resized = build_resizer("clean")(image.permute(1, 2, 0).numpy())
        x = torch.from_numpy(resized.transpose(2, 0, 1))[None]
    else:
        x = tensorflow_resize(image[None].float())
        expected = script(image[None], no_output_bias=True).detach()  # resized by the network
        np.testing.assert_allclose(rows[f"probabilities.{end}"], expected, rtol=1e-4, atol=1e-7)
    layers = dict(script.layers.named_children())
    y = layers["mixed_5"](layers["conv"]((x - 128) / 128))
    y = layers["mixed_6"].conv(y)[0, :7].detach()  # [7, 17, 17], kept with channels last
    np.testing.assert_allclose(
        rows[f"spatial.{end}"][0].reshape(17, 17, 7).transpose(2, 0, 1), y, rtol=1e-4, atol=1e-5
    )


def test_the_networks_resize_is_tensorflows() -> None:
    """What the TorchScript file does inside, and what sFID does outside."""
    image = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 255
    seen: list[torch.Tensor] = []
    network = randomised(Inception(16))
    network.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(image, return_features=True)
    torch.testing.assert_close((tensorflow_resize(image) - 128) / 128, seen[0], rtol=0, atol=1e-4)


def test_pytorch_fids_network_needs_its_own_file(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features only"):
        InceptionRows(weights, "legacy_pytorch", classes=True).load("cpu", folder=tmp_path)
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"other.pth is no Inception of pytorch-fid"):
        InceptionRows(other, "legacy_pytorch").load("cpu", folder=tmp_path)
    with pytest.raises(ValueError, match=r"other.pth is no TorchScript Inception"):
        InceptionRows(other).load("cpu", folder=tmp_path)


def test_pytorch_fids_network_is_clean_fids_own(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(state, tmp_path / "pt.pth")
    (image,) = images(picture_folder(tmp_path / "p", 1, [(50, 64)], 4))
    made = InceptionRows.of(tmp_path / "pt.pth", "legacy_pytorch").load("cpu", folder=tmp_path)
    row = made([image], [], 0).rows["features.inception_pt"]
    with patch.object(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state):
        network = inception_pytorch.InceptionV3([3], resize_input=False).eval()
    pixels = build_resizer("legacy_pytorch")(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    expected = network(torch.from_numpy(pixels)[None] / 255)[0].flatten(1)
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_inception_score_has_known_ends() -> None:
    sure = torch.eye(10).repeat(30, 1)  # all classes, each picture sure: as many as classes
    assert inception_score(sure)[0] == pytest.approx(10)
    vague = torch.full((300, 10), 0.1)
    assert inception_score(vague) == pytest.approx((1.0, 0.0), abs=1e-6)
    one = torch.eye(10)[:1].repeat(300, 1)  # sure, and always of the same class
    assert inception_score(one)[0] == pytest.approx(1)


def test_inception_score_is_the_mean_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.inception.SPLIT", 50)
    draws = torch.randn(120, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(4))
    parts = []
    for part in (order[:50], order[50:100], order[100:]):
        p = draws[part].double()
        parts.append((p * (p / p.mean(0)).log()).sum(1).mean().exp())
    assert inception_score(draws, 4)[0] == pytest.approx(float(np.mean(parts)))
    made = Measured(
        {"probabilities.inception": draws.numpy()}, models={"probabilities.inception": "m"}
    )
    scores, verdicts = score_inception(made, [], None, prefix="eval", resamples=5, seed=4)
    score = scores["eval/inception_score"]
    assert score["value"] == pytest.approx(float(np.mean(parts))) and len(verdicts) == 120
    assert score["low"] < score["value"] < score["high"] and score["split"] == 50
    with pytest.raises(ValueError, match="no class probabilities"):
        score_inception(Measured({"index": np.zeros(3)}), [], None, prefix="eval")
