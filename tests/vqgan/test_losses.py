"""LPIPS, the discriminator and the adaptive weight beyond the golden cases."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.common.adversarial import (
    ActNorm,
    NLayerDiscriminator,
    adaptive_weight,
    disc_factor,
)
from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.perceptual import LPIPS, read_lpips, unit_length
from lightning_modules.vqgan.config import ObjectiveConfig
from lightning_modules.vqgan.losses import generator_loss, reconstruction_loss

WIDTHS = (2, 3, 4, 4, 5)


def lpips() -> LPIPS:
    torch.manual_seed(0)
    net = LPIPS(WIDTHS)
    for i in range(5):
        getattr(net, f"lin{i}").model[1].weight.abs_()
    return net


def test_zero_features_have_a_finite_gradient() -> None:
    net = lpips()
    for parameter in net.net.slice1.parameters():
        parameter.zero_()  # every feature is 0 from here on
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    distance = net(x, torch.rand(1, 3, 32, 32)).sum()
    distance.backward()
    assert torch.isfinite(distance) and x.grad is not None
    assert torch.isfinite(x.grad).all()

    h = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_length(h).sum().backward()
    assert h.grad is not None and torch.isfinite(h.grad).all()
    h = torch.randn(1, 4, 2, 2)
    assert torch.equal(unit_length(h), h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))


def test_a_picture_is_at_distance_zero_from_itself_and_training_mode_is_refused() -> None:
    net = nn.ModuleList([lpips()]).train()[0]
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    x, y = torch.rand(2, 2, 3, 32, 32)
    assert torch.equal(net(x, x), torch.zeros(2))
    assert torch.equal(net(x, y), net(x, y)) and (net(x, y) > 0).all()


def test_lpips_is_float32_under_autocast() -> None:
    net, (x, y) = lpips(), torch.rand(2, 1, 3, 32, 32)
    expected = net(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, y), expected)


def test_lpips_weights_from_every_layout(tmp_path: Path) -> None:
    net = lpips()
    state = net.state_dict()
    lins = {k: v for k, v in state.items() if k.startswith("lin")}
    torchvision = {  # net.slice3.10.weight is features.10.weight there
        f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")
    }
    inside = {f"loss.perceptual_loss.{k}": v for k, v in state.items()}
    inside["loss.perceptual_loss.scaling_layer.shift"] = net.shift
    inside["encoder.conv_in.weight"] = torch.zeros(1)
    duplicates = {f"lins.{k[3]}.{k.split('.', 1)[1]}": v for k, v in lins.items()}
    folder = tmp_path / "both"
    folder.mkdir()
    torch.save(torchvision | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save(lins, folder / "vgg.pth")
    (folder / "README").write_text("not weights")
    torch.save({"state_dict": inside}, tmp_path / "taming.ckpt")
    torch.save(state | duplicates, tmp_path / "joint.pth")

    for path in (folder, tmp_path / "taming.ckpt", tmp_path / "joint.pth"):
        own, widths = read_lpips(path)
        assert widths == WIDTHS
        copy = LPIPS(widths)
        load_strict(copy, own, path.name)
        assert all(torch.equal(copy.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match=r"net\.slice1\.0\.weight"):
        read_lpips(folder / "vgg.pth")


def test_full_size_lpips_has_the_published_shapes() -> None:
    with torch.device("meta"):
        net = LPIPS()
    trunk = sum(p.numel() for p in net.net.parameters())
    assert trunk == 14_714_688  # the convolutions of VGG16
    assert sum(p.numel() for p in net.parameters()) - trunk == 64 + 128 + 256 + 512 + 512


@pytest.mark.parametrize(("layers", "millions", "side"), [(3, 2.77, 30), (2, 0.66, 62)])
def test_discriminator_sizes(layers: int, millions: float, side: int) -> None:
    with torch.device("meta"):
        net = NLayerDiscriminator(layers=layers)
        assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, side, side)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_actnorm_normalises_its_first_training_batch_only() -> None:
    norm, x = ActNorm(3), torch.randn(8, 3, 5, 5) * 4 + 2
    assert torch.equal(norm.eval()(x), x)
    y = norm.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).std(1), torch.ones(3))
    torch.testing.assert_close(norm(2 * x), 2 * y - norm.scale * norm.loc)


def test_adaptive_weight_of_the_scalar_example() -> None:
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    nll, g_loss = 3 * w[0] + 4 * w[1], 0.6 * w[0] + 0.8 * w[1]
    objective = ObjectiveConfig(disc_weight=0.8)
    assert float(adaptive_weight(nll, g_loss, w, objective)) == pytest.approx(3.99960004)
    capped = ObjectiveConfig(disc_weight=0.8, adaptive_max=2.0)
    assert float(adaptive_weight(nll, g_loss, w, capped)) == pytest.approx(1.6)
    fixed = ObjectiveConfig(disc_weight=0.8, adaptive_weight=False)
    assert float(adaptive_weight(nll, g_loss, w, fixed)) == pytest.approx(0.8)
    assert w.grad is None


def test_weights_and_start_of_the_parts() -> None:
    objective = ObjectiveConfig(
        pixel_loss="l2", pixel_weight=4.0, codebook_weight=0.5, disc_start=3, disc_factor=2.0
    )
    assert [disc_factor(objective, n) for n in (0, 2, 3, 4)] == [0, 0, 2, 2]
    x = torch.zeros(1, 3, 2, 2)
    nll, parts = reconstruction_loss(x, x + 0.5, objective, None)
    assert float(nll) == pytest.approx(1.0) and parts.keys() == {"rec"}
    loss, logs = generator_loss(nll, torch.tensor(2.0), objective)
    assert float(loss) == pytest.approx(2.0) and not logs
