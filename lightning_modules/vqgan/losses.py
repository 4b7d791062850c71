"""The reconstruction loss of VQGAN's autoencoder (Esser et al. 2021, section 3.1).

Names and arithmetic follow taming/modules/losses/vqperceptual.py where that file does what it
says.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from lightning_modules.common.perceptual import LPIPS
from lightning_modules.vqgan.config import ObjectiveConfig

PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


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
