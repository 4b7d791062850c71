"""CLIP scores against golden numbers; files of other layouts; conventions that are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from eval.clip import (
    SCALES,
    captions,
    clip_score,
    image_transform,
    load_clip,
    score_clip,
    score_preference,
    unit,
)
from eval.extractors import ClipRows
from eval.rows import Measured
from lightning_modules.common.checkpoint import load_strict
from tests.tiny_networks import clip_file, randomised


def golden_network(case: Any, tag: str) -> Any:
    config = dict(case.config[tag])
    network = open_clip.model.CLIP(
        config["embed_dim"], config["vision_cfg"], config["text_cfg"], config["quick_gelu"]
    )
    own = {k.removeprefix(f"{tag}."): v for k, v in case.weights.items() if k.startswith(f"{tag}.")}
    load_strict(network, own, tag)
    return network.eval()


@pytest.mark.golden
def test_golden_clip_score(golden: Callable) -> None:
    case = golden("evaluation/clip_score")
    near = case.tolerance["float"]
    for tag in case.config:
        network = golden_network(case, tag)
        io = {k.removeprefix(f"{tag}."): v for k, v in case.io.items() if k.startswith(f"{tag}.")}
        count = sum(k.startswith("image_") and k != "image_features" for k in io)
        prepare = image_transform(network, "resize first")
        pixels = torch.stack(
            [prepare(io[f"image_{i}"].permute(2, 0, 1).numpy()) for i in range(count)]
        )
        torch.testing.assert_close(
            pixels, io["pixel_values"], rtol=0, atol=case.tolerance["pixel_values"]["atol"]
        )
        with torch.no_grad():
            shown, said = network.encode_image(pixels), network.encode_text(io["tokens"])
        torch.testing.assert_close(shown, io["image_features"], **near)
        torch.testing.assert_close(said, io["text_features"], **near)
        similarity = unit(shown) @ unit(said).T  # [N, M]
        torch.testing.assert_close(similarity, io["similarity"], **near)
        cosine = similarity.diagonal()
        torch.testing.assert_close(cosine, io["cosine"], **near)
        scales = {"raw cosine": "mean_cosine", "100 cosine": "score_100"}
        scales["2.5 max(cosine, 0)"] = "score_hessel"
        for scale, name in scales.items():
            assert clip_score(cosine, scale) == pytest.approx(
                float(io[name]), rel=near["rtol"], abs=100 * near["atol"]
            )
        logits = network.logit_scale.exp() * similarity
        torch.testing.assert_close(logits, io["logits_per_image"], rtol=1e-3, atol=1e-3)
        first = (similarity.argmax(1) == torch.arange(count)).float().mean()
        assert float(first) == pytest.approx(float(io["r_precision_top1"]))


def test_the_conventions_differ_where_a_cosine_is_negative() -> None:
    cosine = torch.tensor([0.4, -0.2])
    assert {s: clip_score(cosine, s) for s in SCALES} == pytest.approx(
        {"raw cosine": 0.1, "2.5 max(cosine, 0)": 0.5, "100 cosine": 10}
    )
    assert clip_score(-cosine.abs(), "100 cosine") == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return clip_file(tmp_path_factory.mktemp("clip"), "tiny-for-clip")


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, 40, 50), np.uint8)) for _ in range(4)]


ASKED = [{"caption": f" a thing {i}\n"} for i in range(4)]


def measured(pictures: list[torch.Tensor], extractor: Any) -> Measured:
    return extractor.load("cpu", folder=Path("unused"))(pictures, ASKED, 0)


def test_rows_are_the_cosines_with_the_captions(tiny: tuple[str, Path], pictures: Any) -> None:
    made = measured(pictures, ClipRows(*tiny, features=True))
    network = load_clip(*tiny)
    prepare = open_clip.image_transform(32, is_train=False)
    pixels = [prepare(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures]
    with torch.no_grad():
        shown = network.encode_image(torch.stack(pixels), normalize=True)
        tokens = open_clip.tokenize([f"a thing {i}" for i in range(4)])
        said = network.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(made.rows["features.clip"], shown, atol=1e-6)
    np.testing.assert_allclose(made.rows["cosine.clip"], (shown * said).sum(1), atol=1e-6)
    score = score_clip(made, ASKED, made, prefix="eval", resamples=9, seed=0)[0]
    assert list(score) == ["eval/clip_score", "eval/clip_score_real"]
    one = score["eval/clip_score"]
    assert one["low"] <= one["value"] <= one["high"] and one["scale"] == "raw cosine"
    assert tiny[0] in one["model"] and "sha256" in one["model"] and "no prefix" in one["model"]
    assert one["scales"]["100 cosine"] == pytest.approx(max(100 * one["value"], 0))


def test_a_prefix_is_part_of_the_caption_and_of_the_name(tiny: Any, pictures: Any) -> None:
    plain, prefixed = (
        measured(pictures, ClipRows(*tiny, prefix=p)) for p in ("", "A photo depicts ")
    )
    assert not np.allclose(plain.rows["cosine.clip"], prefixed.rows["cosine.clip"])
    assert "'A photo depicts '" in prefixed.models["cosine.clip"]
    assert captions([{"prompt": "x", "caption": "y"}, {"caption": " y "}], "p ") == ["p x", "p y"]
    with pytest.raises(ValueError, match="picture 1 has no caption"):
        captions([{"caption": "a"}, {"label": 3}])


def test_preferences_have_their_own_scales(tiny: Any, pictures: Any) -> None:
    kinds = [ClipRows(*tiny, kind=kind) for kind in ("clip", "hpsv2", "pickscore")]
    parts = [measured(pictures, kind) for kind in kinds]
    made = Measured(
        {k: v for part in parts for k, v in part.rows.items()},
        models={k: v for part in parts for k, v in part.models.items()},
    )
    cosine = made.rows["cosine.clip"]
    np.testing.assert_array_equal(made.rows["preference.hpsv2"], cosine)
    scale = float(load_clip(*tiny).logit_scale.exp())
    np.testing.assert_allclose(made.rows["preference.pickscore"], scale * cosine, rtol=1e-6)
    scores = score_preference(made, ASKED, None, prefix="eval", resamples=9, seed=0)[0]
    assert list(scores) == ["eval/hpsv2", "eval/pickscore"]
    assert scores["eval/pickscore"]["scale"] == "logit scale x cosine"
    with pytest.raises(ValueError, match="no preferences"):
        score_preference(Measured({"index": np.zeros(1)}), [], None, prefix="eval")
    with pytest.raises(ValueError, match="no cosines"):
        score_clip(Measured({"index": np.zeros(1)}), [], None, prefix="eval")


def test_the_centre_is_cut_first_or_last(tiny: Any) -> None:
    """An edge column of the largest centre square, whose offset is rounded down or to even."""
    network = load_clip(*tiny)
    ramp = np.broadcast_to(np.arange(0, 51, dtype=np.uint8) * 5, (3, 32, 51))
    first, last = (
        image_transform(network, crop)(np.ascontiguousarray(ramp))
        for crop in ("crop first", "resize first")
    )
    mean, std = (
        torch.tensor(v)[:, None] for v in (network.visual.image_mean, network.visual.image_std)
    )
    left = [float((x[:, 0, 0] * std[:, 0] + mean[:, 0])[0] * 255 / 5) for x in (first, last)]
    assert left == pytest.approx([9, 10], abs=1e-3)  # (51 - 32) / 2 = 9.5
    padded = image_transform(network, "pad")(np.full((3, 32, 64), 200, np.uint8))
    padded = padded * std[..., None] + mean[..., None]
    assert float(padded[:, :8].abs().max()) < 1e-6 and float(padded[:, 8:24].min()) > 0.7


def test_files_of_transformers_are_read(tmp_path: Path, tiny: Any) -> None:
    side = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    side |= {"num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 12}
    vision = {**side, "image_size": 32, "patch_size": 8}
    text = {**side, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    with torch.random.fork_rng():
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    randomised(model, 5).save_pretrained(tmp_path / "hf")
    network = load_clip(tiny[0], tmp_path / "hf")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.tokenize(["a red cat", "two"])
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixels)
        shown, said = network.encode_image(pixels, True), network.encode_text(tokens, True)
    torch.testing.assert_close(shown, out.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said, out.text_embeds, rtol=1e-4, atol=1e-5)


def test_files_of_openai_are_torchscript(tmp_path: Path, tiny: Any) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    network, wrapped = load_clip(*tiny), Wrapped()
    for name, value in network.state_dict().items():
        place: Any = wrapped
        *path, last = name.split(".")
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, torch.nn.Module())
            place = getattr(place, step)
        place.register_parameter(last, torch.nn.Parameter(value.half(), requires_grad=False))
    torch.jit.script(wrapped).save(tmp_path / "ViT.pt")
    again = load_clip(tiny[0], tmp_path / "ViT.pt")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name].half().float())


def test_an_unknown_model_or_file_is_named(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(ValueError, match="no model 'nothing'"):
        load_clip("nothing", tiny[1])
    with pytest.raises(ValueError, match="does not fit"):
        load_clip("ViT-B-32", tiny[1])
    with pytest.raises(ValueError, match=r"ViT-X y are not known here .*ViT-H-14 laion2b"):
        ClipRows.of("ViT-X", "y")
    given = ClipRows.of("ViT-L-14", "openai", tiny[1])
    assert given.model == "ViT-L-14-quickgelu"  # OpenAI's weights need it
