"""LPIPS beyond the golden cases."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.common.perceptual import LPIPS, load_lpips, read_lpips, unit_length

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
        assert read_lpips(path)[1] == WIDTHS
        copy = load_lpips(path)
        assert all(torch.equal(copy.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match=r"net\.slice1\.0\.weight"):
        read_lpips(folder / "vgg.pth")


def test_full_size_lpips_has_the_published_shapes() -> None:
    with torch.device("meta"):
        net = LPIPS()
    trunk = sum(p.numel() for p in net.net.parameters())
    assert trunk == 14_714_688  # the convolutions of VGG16
    assert sum(p.numel() for p in net.parameters()) - trunk == 64 + 128 + 256 + 512 + 512
