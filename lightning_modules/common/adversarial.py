"""The discriminator of autoencoders and its losses (Esser et al. 2021, section 3.1).

Names and arithmetic follow taming/modules/losses/vqperceptual.py where that file does what it
says; the departures are stated where they are.
"""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_modules.common.config import AdversarialConfig


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

    It has `layers` strided convolutions, the first of `width` channels; with ActNorm in place of
    BatchNorm they have a bias.
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


DISC_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def disc_factor(config: AdversarialConfig, batches_seen: int) -> float:
    """Return the factor on both adversarial losses: 0 until disc_start batches were seen."""
    if not config.adversarial or batches_seen < config.disc_start:
        return 0.0
    return config.disc_factor


def adaptive_weight(
    nll: Tensor, g_loss: Tensor, last_layer: Tensor, config: AdversarialConfig
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
    loss: Tensor,
    nll: Tensor,
    fake_logits: Tensor,
    last_layer: Tensor,
    config: AdversarialConfig,
    factor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss + d_weight * factor * g_loss, g_loss = -mean D(xr), and both parts.

    Equation 6 of Esser et al. `loss` is all but the adversarial term, nll the reconstruction loss
    alone, `fake_logits` are D(xr) with graph; last_layer as of `adaptive_weight`, factor of
    `disc_factor`.
    """
    g_loss = -fake_logits.float().mean()
    d_weight = adaptive_weight(nll, g_loss, last_layer, config)
    return loss + d_weight * factor * g_loss, {"g_loss": g_loss, "d_weight": d_weight}
