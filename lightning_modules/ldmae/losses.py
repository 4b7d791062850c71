"""Posterior arithmetic and the losses of the autoencoders (arXiv 2507.09984, section 4)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_modules.ldmae.vmae import patchify

LOGVAR_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Split [..., 2C, ...] into mean and log variance, the latter clamped to [-30, 20]."""
    mean, logvar = moments.chunk(2, dim)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def draw_latents(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + exp(logvar / 2) * noise, all of one shape."""
    return torch.addcmul(mean, (0.5 * logvar).exp(), noise)


def variance_kl(logvar: Tensor, fixed_std: float | None = None) -> Tensor:
    """L_reg: the KL of N(mean, var) from N(mean, s^2); it leaves the mean free.

    0.5 (var / s^2 - 1 - logvar + 2 ln s), elementwise; s = 1 where fixed_std is None.
    """
    if fixed_std is None:
        return 0.5 * (logvar.exp() - 1 - logvar)
    return 0.5 * (logvar.exp() / fixed_std**2 - 1 - logvar + 2 * math.log(fixed_std))


def normal_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """The KL of N(mean, var) from N(0, 1), elementwise (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def patch_errors(
    prediction: Tensor, images: Tensor, side: int, norm: str = "l2", norm_pix: bool = False
) -> Tensor:
    """Mean error [B, L] of every patch of predictions of images [B, 3, H, W].

    Args:
        side: of a patch, in pixels.
        norm: l2 (squared) or l1.
        norm_pix: compare with each patch at mean 0 and (unbiased) variance 1, as MAE may.
    """
    target = patchify(images, side)
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    difference = patchify(prediction, side) - target
    return (difference.square() if norm == "l2" else difference.abs()).mean(-1)


def visible_and_masked(errors: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """L_R and L_M: mean errors [B, L] over all visible and all hidden (mask = 1) patches.

    Where nothing is hidden mask is None and L_M = 0.
    """
    if mask is None:
        return errors.mean(), errors.new_zeros(())
    seen = 1 - mask
    visible = (errors * seen).sum() / seen.sum()
    return visible, (errors * mask).sum() / mask.sum().clamp_min(1)


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation [C] over latents [B, C, h, w], both float64.

    Raises:
        ValueError: fewer than two values per channel.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for latents in batches:
        rows = latents.detach().cpu().double().transpose(0, 1).flatten(1)  # [C, B h w]
        count += rows.shape[1]
        total, squares = total + rows.sum(1), squares + rows.square().sum(1)
    if count < 2:
        raise ValueError("the latents' statistics need at least two positions")
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1)
    return mean, variance.clamp_min(0).sqrt()
