"""The VMAE that ships with the project: small, and what it makes of scenes is read right."""

from pathlib import Path

import torch

from eval.classifier import load_classifier
from eval.classifier_data import fresh_scenes
from eval.classifier_network import ClassifierConfig, encode
from lightning_modules import ldmae
from lightning_modules.registry import load_first_stage

FILE = Path(ldmae.__file__).parent / "shipped" / "tiny.safetensors"


def test_the_shipped_vmae_keeps_what_scenes_show() -> None:
    assert FILE.stat().st_size <= 1_500_000
    vmae = load_first_stage(FILE, paper="autoencoder")
    images, shown, _ = fresh_scenes(200, ClassifierConfig(), seed=8)
    with torch.no_grad():
        latents = vmae.encode(images.float() / 127.5 - 1)
        made = ((vmae.decode(latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    # normalised by the statistics in the file: what diffusion takes for its noise's scale
    assert latents.shape == (200, 8, 8, 8)
    spread = latents.std(dim=(0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(8), atol=0.1, rtol=0)
    read, _ = load_classifier().read(made)
    truth = torch.tensor([encode(s, ClassifierConfig()) for s in shown])
    assert (read == truth).all(1).float().mean() >= 0.97
