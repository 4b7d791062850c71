"""LPIPS, the learned perceptual distance, and the files that hold its weights."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.checkpoint import load_foreign, load_strict

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_DEPTHS = (2, 2, 3, 3, 3)


class LPIPS(nn.Module):
    """Learned perceptual distance in VGG16 features (Zhang et al. 2018, equation 1).

    Frozen, always in evaluation mode and always float32. Between relu{1_2, 2_2, 3_3, 4_3, 5_3} of
    both images: unit length over channels, squared difference, non-negative channel weights.

    Args:
        widths: channels of the five stages.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...] = VGG_WIDTHS) -> None:
        super().__init__()
        self.net = nn.Module()
        index, c_in = 0, 3
        for stage, (width, depth) in enumerate(zip(widths, VGG_DEPTHS, strict=True)):
            layers = nn.Sequential()
            if stage > 0:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for _ in range(depth):
                layers.add_module(str(index), nn.Conv2d(c_in, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU())
                index, c_in = index + 2, width
            self.net.add_module(f"slice{stage + 1}", layers)
            lin = nn.Module()
            # the reference's place 0 is a Dropout, which in training made its distance random
            lin.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{stage}", lin)
        shift, scale = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
        for name, value in (("shift", shift), ("scale", scale)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] in [-1, 1] to the five activations [B, c_i, H/2^i, W/2^i]."""
        activations = [(images.float() - self.shift) / self.scale]
        for stage in self.net.children():
            activations.append(stage(activations[-1]))
        return activations[1:]

    def layers(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the weighted squared differences of the five stages, each [B, 1, h_i, w_i]."""
        with torch.autocast(x.device.type, enabled=False):
            return [
                getattr(self, f"lin{i}").model((unit_length(a) - unit_length(b)).square())
                for i, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True))
            ]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance [B] of images x, y [B, 3, H, W] in [-1, 1]."""
        return torch.stack([d.mean((1, 2, 3)) for d in self.layers(x, y)]).sum(0)

    def spatial(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance at each pixel [B, 1, H, W], stages enlarged bilinearly."""
        maps = [
            F.interpolate(d, size=x.shape[-2:], mode="bilinear", align_corners=False)
            for d in self.layers(x, y)
        ]
        return torch.stack(maps).sum(0)


def unit_length(h: Tensor) -> Tensor:
    """Scale [B, c, H, W] to unit length over channels.

    The reference's h / (|h| + 1e-10) has a NaN gradient at h = 0; the small term inside the root
    makes it finite and is too small to change a float32 value.
    """
    norm = (h.square().sum(1, keepdim=True) + 1e-20).sqrt()
    return h / (norm + 1e-10)


def lpips_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Pick the LPIPS weights out of a file of VGG16 and linear weights.

    Accepts the joint layout of taming and the lpips package (net.slice*, lin*), the same inside a
    taming checkpoint (loss.perceptual_loss.*) or under perceptual_loss.*, and torchvision's VGG16
    (features.*) beside lin*.

    Returns:
        The state of `LPIPS` and its widths.

    Raises:
        ValueError: a part is missing.
    """
    inside = {
        k.split("perceptual_loss.", 1)[1]: v for k, v in state.items() if "perceptual_loss." in k
    }
    own = {}
    for key, value in (inside or state).items():
        match = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
        if match:
            stage = sum(int(match[1]) >= start for start in (0, 4, 9, 16, 23))
            key = f"net.slice{stage}.{match[1]}.{match[2]}"
        if re.match(r"net\.slice\d\.|lin\d\.", key):
            own[key] = value
    for part in ("net.slice1.0.weight", "lin0.model.1.weight"):
        if part not in own:
            raise ValueError(
                f"the LPIPS file has no {part}: it must hold both the VGG16 trunk and the linear "
                "weights, or be a folder of two such files"
            )
    widths = tuple(own[f"lin{i}.model.1.weight"].shape[1] for i in range(5))
    return own, widths


def read_lpips(path: Path | str) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Read LPIPS weights from a file, or from all weight files of a folder together."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors") or file == path:
            state |= load_foreign(file)
    return lpips_state(state)


def load_lpips(path: Path | str) -> LPIPS:
    """Make the distance from a file or folder that `read_lpips` reads."""
    state, widths = read_lpips(path)
    lpips = LPIPS(widths)
    load_strict(lpips, state, str(path))
    return lpips
