"""DINOv2: the released layout and that of transformers are one network."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from eval.dino import SIDE, dino_state, load_dino, ready, resized_positions
from eval.extractors import DinoRows
from tests.tiny_networks import randomised


@pytest.fixture(scope="module")
def network() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE, patch_size=14
    )
    with torch.random.fork_rng():
        return randomised(Dinov2Model(config))


def released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of facebookresearch/dinov2."""
    renames = {
        r"^embeddings\.cls_token": "cls_token",
        r"^embeddings\.mask_token": "mask_token",
        r"^embeddings\.position_embeddings": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
        r"^layernorm": "norm",
        r"^encoder\.layer\.": "blocks.",
        r"\.attention\.output\.dense": ".attn.proj",
        r"\.layer_scale(\d)\.lambda1": r".ls\1.gamma",
    }
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if re.search(r"\.(key|value)\.(weight|bias)$", key):
            continue
        if ".query." in key:
            value = torch.cat([state[key.replace("query", n)] for n in ("query", "key", "value")])
            key = key.replace("attention.attention.query", "attn.qkv")
        for pattern, new in renames.items():
            key = re.sub(pattern, new, key)
        found[key] = value
    return found


def test_the_released_file_and_a_folder_of_transformers_agree(
    network: Dinov2Model, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    file = tmp_path / "dinov2.pth"
    torch.save(released(state), file)
    assert dino_state(released(state)).keys() == state.keys()
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 60), np.uint8)) for _ in range(2)]
    rows = []
    for path in (file, tmp_path / "hf"):
        found = DinoRows.of(path).load("cpu", folder=tmp_path)(images, [], 0)
        rows.append(found.rows["features.dinov2"])
        assert path.name in found.models["features.dinov2"]
    np.testing.assert_array_equal(*rows)
    pixels = torch.stack([ready(x.numpy()) for x in images])
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(rows[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_of_another_grid_are_resized_with_the_released_offset() -> None:
    """Place i reads (i + 0.5) * old / (new + 0.1) - 0.5 by a cubic with a = -0.75."""
    old, new = 6, 4
    draws = torch.randn(1, 1 + old * old, 2, generator=torch.Generator().manual_seed(0))
    found = resized_positions(draws, new)
    assert torch.equal(found[:, 0], draws[:, 0]) and found.shape == (1, 1 + new * new, 2)
    assert torch.equal(resized_positions(draws, old), draws)

    def weights(i: int) -> np.ndarray:
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        row, base = np.zeros(old), int(np.floor(place))
        for tap in range(base - 1, base + 3):
            x = abs(place - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            row[min(max(tap, 0), old - 1)] += near if x <= 1 else far
        return row

    one = np.stack([weights(i) for i in range(new)])  # [new, old]
    grid = draws[0, 1:].reshape(old, old, 2).numpy()
    expected = np.einsum("ai,bj,ijd->abd", one, one, grid)
    np.testing.assert_allclose(found[0, 1:].reshape(new, new, 2), expected, atol=1e-5)


def test_weights_for_larger_pictures_are_accepted(network: Dinov2Model, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    state = released(load_file(tmp_path / "model.safetensors"))
    del state["mask_token"]  # of training only
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 64)  # of 518 px
    torch.save(state, tmp_path / "large.pth")
    loaded = load_dino(tmp_path / "large.pth")
    assert loaded.embeddings.position_embeddings.shape == (1, 257, 64)


def test_other_weights_are_named(network: Dinov2Model, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no DINOv2"):
        load_dino(tmp_path / "other.pth")
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth is no DINOv2: 1 tensors.*layernorm\.bias"):
        load_dino(tmp_path / "part.pth")
