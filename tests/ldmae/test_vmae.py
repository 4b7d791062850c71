"""The masked autoencoder beyond the golden cases, and its released files."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.common.checkpoint import load_foreign
from lightning_modules.common.config import ConvConfig
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.config import ViTConfig
from lightning_modules.ldmae.conv import ConvAutoencoder
from lightning_modules.ldmae.convert import convert_vmae
from lightning_modules.ldmae.losses import patch_errors, visible_and_masked
from lightning_modules.ldmae.vmae import (
    HEADS,
    VMAE,
    masking,
    patchify,
    resize_table,
    resize_tables,
    sincos_table,
    unpatchify,
)


def sizes(**changes: Any) -> ViTConfig:
    small = {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
    }
    return ViTConfig(**(small | changes))


def network(seed: int = 0, **changes: Any) -> VMAE:
    torch.manual_seed(seed)
    return VMAE(sizes(**changes), 3)


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        vmae, sd3 = VMAE(ViTConfig(), 16), ConvAutoencoder(ConvConfig(), 16, True)
    assert sum(p.numel() for p in vmae.parameters()) == 11_191_604
    assert sum(p.numel() for p in vmae.parameters() if p.requires_grad) == 10_798_388
    assert sum(p.numel() for p in sd3.parameters()) == 83_819_683
    assert vmae.moments(torch.zeros(1, 3, 256, 256, device="meta")).shape == (1, 32, 32, 32)
    assert sd3.moments(torch.zeros(1, 3, 256, 256, device="meta")).shape == (1, 32, 32, 32)


@given(patches=st.integers(2, 40), ratio=st.floats(0, 0.99), seed=st.integers(0, 2**32 - 1))
def test_masking_hides_the_patches_of_most_noise(patches: int, ratio: float, seed: int) -> None:
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    keep = int(patches * (1 - ratio))
    if keep == 0:
        with pytest.raises(ValueError, match="hides all"):
            masking(noise, ratio)
        return
    found = masking(noise, ratio)
    assert found.visible == keep
    assert torch.equal(found.mask.sum(1), torch.full((3,), float(patches - keep)))
    assert torch.equal(noise.gather(1, found.shuffle).gather(1, found.restore), noise)
    for row, mask in zip(noise, found.mask, strict=True):
        if keep < patches:
            assert row[mask == 0].max() <= row[mask == 1].min()


def test_hidden_patches_reach_neither_latents_nor_the_visible_loss() -> None:
    net = network().eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    hidden = masking(torch.rand(2, 16), 0.5)
    patches = patchify(images, 4)
    patches[hidden.mask.bool()] = torch.rand(16, 48)
    other = unpatchify(patches, (4, 4), 4)
    assert not torch.equal(other, images)
    one, two = net.encode_tokens(images, hidden), net.encode_tokens(other, hidden)
    assert one.shape == (2, 8, 6)
    assert torch.equal(one, two)
    assert not torch.equal(net.moments(images), net.moments(other))

    made = net.decode_tokens(one[..., :3], (4, 4), hidden)
    losses = [visible_and_masked(patch_errors(made, x, 4), hidden.mask) for x in (images, other)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_a_hidden_patch_is_decoded_from_the_mask_token_at_its_place() -> None:
    net = network().eval()
    z = torch.randn(1, 8, 3)
    hidden = masking(torch.rand(1, 16), 0.5)
    everything = torch.zeros(1, 16, 16)
    embedded = net.decoder_embed(net.from_latent(z))
    everything[0, hidden.mask[0] == 1] = net.mask_token[0, 0].detach()
    seen = torch.arange(16)[hidden.mask[0] == 0]
    order = hidden.shuffle[0, :8]
    for place, position in enumerate(order):
        assert position in seen
        everything[0, position] = embedded[0, place].detach()
    x = everything + net.decoder_pos_embed
    for block in net.decoder_blocks:
        x = block(x)
    expected = net.decoder_pred(net.decoder_norm(x), (4, 4))
    torch.testing.assert_close(net.decode_tokens(z, (4, 4), hidden), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("down_nonlinear", [False, True])
def test_all_heads_take_images_of_other_sizes(head: str, down_nonlinear: bool) -> None:
    net = network(head=head, down_nonlinear=down_nonlinear).eval()
    images = torch.rand(2, 3, 8, 24)
    moments = net.moments(images)
    assert moments.shape == (2, 6, 2, 6)
    assert net.decode(moments[:, :3]).shape == images.shape


def test_tables_are_resized_like_an_image() -> None:
    table = sincos_table(8, 4)
    assert resize_table(table, (4, 4)) is table
    resized = resize_table(table, (2, 8)).view(2, 8, 8)
    square = table.view(4, 4, 8)
    # halving rows averages pairs, doubling columns lies between neighbours
    torch.testing.assert_close(resized[0, 0], square[:2, 0].mean(0))
    between = 0.75 * square[:2, 0].mean(0) + 0.25 * square[:2, 1].mean(0)
    torch.testing.assert_close(resized[0, 1], between)

    state = resize_tables(network().state_dict(), sizes(image_size=32))
    larger = network(image_size=32)
    larger.load_state_dict(state)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(larger.moments(images), network().moments(images))


def released(tmp_path: Path, **changes: Any) -> tuple[Path, VMAE]:
    """A file as the released training script writes it."""
    net = network(**changes)
    with torch.no_grad():
        net.pos_embed.add_(0.1)  # a file's tables are its own
    perceptual = {"perceptual_loss.net.slice1.0.weight": torch.zeros(2)}
    content = {
        "model": net.state_dict() | perceptual,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 90,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(mask_ratio=0.25, fixed_std=0.001),
    }
    torch.save(content, tmp_path / "vmae.pth")
    return tmp_path / "vmae.pth", net


def test_a_released_file_is_read_safely_and_strictly(tmp_path: Path) -> None:
    path, net = released(tmp_path)
    hints = {"num_heads": 2, "decoder_num_heads": 4}
    with pytest.raises(Exception, match="Namespace"):
        torch.load(path, weights_only=True)
    stats = {"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 2.0)}
    state = load_foreign(path)
    module = AutoencoderModule.from_export(*convert_vmae(state, hints, stats))
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(module.moments(images)[:, :3], net.moments(images)[:, :3])
    assert torch.equal(module.network.pos_embed, net.pos_embed)
    assert torch.equal(module.encode(images), (net.moments(images)[:, :3] - 0.5) / 2)
    assert module.config.vit == sizes()

    del state["mask_token"]  # as in files of the inference class
    assert not AutoencoderModule.from_export(*convert_vmae(state, hints)).network.mask_token.any()
    with pytest.raises(ValueError, match=r"1 left over, first 'cls_token'"):
        convert_vmae(state | {"cls_token": torch.zeros(1, 1, 8)}, hints)
    with pytest.raises(ValueError, match="std of 3 channels"):
        convert_vmae(state, hints, {"mean": torch.zeros(3), "std": torch.ones(4)})
    missing = {k: v for k, v in state.items() if k != "blocks.1.norm1.weight"}
    with pytest.raises(ValueError, match=r"1 missing, first 'blocks\.1\.norm1\.weight'"):
        convert_vmae(missing, hints)
    with pytest.raises(ValueError, match=r"lacks patch_embed\.proj\.weight"):
        convert_vmae({"x": torch.zeros(1)}, hints)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 10}, "embed_dim must be a multiple of 4 and of num_heads"),
        ({"decoder_num_heads": 3}, r"decoder_num_heads \(3\), got 16"),
        ({"image_size": 18}, "image_size must be a multiple of patch_size"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_impossible_sizes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes(**changes)
