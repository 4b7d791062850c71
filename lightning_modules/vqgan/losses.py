"""Reconstruction, perceptual and adversarial losses of VQGAN (Esser et al. 2021, section 3.1).

Names and arithmetic follow taming/modules/losses/vqperceptual.py where that file does what it
says; the departures are stated where they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_modules.vqgan.config import ObjectiveConfig

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
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False
        )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] in [-1, 1] to the five activations [B, c_i, H/2^i, W/2^i]."""
        h = (images.float() - self.shift) / self.scale
        activations = []
        for stage in self.net.children():
            h = stage(h)
            activations.append(h)
        return activations

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


class ActNorm(nn.Module):
    """Per-channel shift and scale that normalise the first training batch (Glow, section 3.1)."""

    initialized: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, c, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to the same shape."""
        if self.training and not self.initialized:
            self._initialise(x)
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        rows = x.detach().float().transpose(0, 1).flatten(1)  # [c, B*H*W]
        self.loc.copy_(-rows.mean(1).view_as(self.loc))
        self.scale.copy_(1 / (rows.std(1).view_as(self.scale) + 1e-6))
        self.initialized.fill_(1)
        if dist.is_available() and dist.is_initialized():
            # parameters are only equal across ranks as long as nobody sets them alone
            dist.broadcast(self.loc.data, 0)
            dist.broadcast(self.scale.data, 0)


class NLayerDiscriminator(nn.Module):
    """PatchGAN: one logit per overlapping patch (Isola et al. 2017, section 3.2.2).

    Args:
        in_channels: channels of an image.
        width: channels of the first convolution.
        layers: strided convolutions.
        use_actnorm: ActNorm instead of BatchNorm; the convolutions then have a bias.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 64, layers: int = 3, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        c = width
        for n in range(1, layers + 1):
            c_in, c = c, width * min(2**n, 8)
            stride = 2 if n < layers else 1
            norm = ActNorm(c) if use_actnorm else nn.BatchNorm2d(c)
            body += [nn.Conv2d(c_in, c, 4, stride, 1, bias=use_actnorm), norm, nn.LeakyReLU(0.2)]
        body.append(nn.Conv2d(c, 1, 4, 1, 1))
        self.main = nn.Sequential(*body)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, 1, h, w]; real is positive."""
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return (mean relu(1 - D(x)) + mean relu(1 + D(xr))) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return (mean softplus(-D(x)) + mean softplus(D(xr))) / 2."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_loss,
    "vanilla": vanilla_loss,
}

PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
}


def disc_factor(config: ObjectiveConfig, batches_seen: int) -> float:
    """Return the factor on both adversarial losses: 0 until disc_start batches were seen."""
    if not config.adversarial or batches_seen < config.disc_start:
        return 0.0
    return config.disc_factor


def reconstruction_loss(
    images: Tensor, reconstructions: Tensor, config: ObjectiveConfig, lpips: LPIPS | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pixel_weight * |x - xr| + perceptual_weight * LPIPS(x, xr), and its two parts.

    Args:
        images: x [B, 3, H, W] in [-1, 1].
        reconstructions: xr, the same shape.
        config: norm and weights.
        lpips: None leaves the perceptual term out.

    Returns:
        The scalar ("nll" of the reference) and {"rec", "perceptual"} without weights, detached.
    """
    x, xr = images.float(), reconstructions.float()
    pixel = PIXEL_LOSSES[config.pixel_loss](xr, x)
    loss, parts = config.pixel_weight * pixel, {"rec": pixel.detach()}
    if lpips is not None and config.perceptual_weight:
        perceptual = lpips(x, xr).mean()
        loss = loss + config.perceptual_weight * perceptual
        parts["perceptual"] = perceptual.detach()
    return loss, parts


def adaptive_weight(
    nll: Tensor, g_loss: Tensor, last_layer: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Return disc_weight * clamp(|d nll / dW| / (|d g_loss / dW| + 1e-4), 0, adaptive_max).

    Equation 7 of Esser et al.; the norms are those of the local batch, so ranks differ, as in the
    reference.

    Args:
        nll: reconstruction loss, scalar with graph.
        g_loss: the generator's adversarial loss, scalar with graph.
        last_layer: W, the weight of the decoder's last convolution.
        config: disc_weight, adaptive_max; adaptive_weight=False returns disc_weight.
    """
    if not config.adaptive_weight:
        return torch.tensor(config.disc_weight, device=nll.device)
    (nll_grad,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    ratio = nll_grad.float().norm() / (g_grad.float().norm() + 1e-4)
    return ratio.clamp(0, config.adaptive_max).detach() * config.disc_weight


def generator_loss(
    nll: Tensor,
    codebook_loss: Tensor,
    config: ObjectiveConfig,
    *,
    factor: float = 0.0,
    fake_logits: Tensor | None = None,
    last_layer: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return nll + d_weight * factor * g_loss + codebook_weight * codebook_loss (equation 6).

    Args:
        nll: reconstruction loss.
        codebook_loss: the quantizer's loss.
        config: the weights.
        factor: of `disc_factor`; at 0 the adversarial part is not computed.
        fake_logits: D(xr) with graph; g_loss = -mean.
        last_layer: see `adaptive_weight`.

    Returns:
        The scalar and {"g_loss", "d_weight"} where they were computed, detached.
    """
    loss = nll + config.codebook_weight * codebook_loss
    if factor == 0 or fake_logits is None or last_layer is None:
        return loss, {}
    g_loss = -fake_logits.float().mean()
    d_weight = adaptive_weight(nll, g_loss, last_layer, config)
    return loss + d_weight * factor * g_loss, {"g_loss": g_loss.detach(), "d_weight": d_weight}


def unit_length(h: Tensor) -> Tensor:
    """Scale [B, c, H, W] to unit length over channels.

    The reference's h / (|h| + 1e-10) has a NaN gradient at h = 0; the small term inside the root
    makes it finite and is too small to change a float32 value.
    """
    norm = (h.square().sum(1, keepdim=True) + 1e-20).sqrt()
    return h / (norm + 1e-10)
