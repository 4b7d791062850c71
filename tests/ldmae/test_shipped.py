"""The VMAE that ships with the project: small, and what it makes of scenes is read right."""

import torch
from eval.judge import load_judge
from eval.judge_data import fresh_scenes
from eval.judge_network import JudgeConfig, encode

from experiments import stages
from lightning_modules.registry import load_first_stage

FILE = stages.SHIPPED["autoencoder"] / "tiny.safetensors"


def test_the_shipped_vmae_keeps_what_scenes_show() -> None:
    assert FILE.stat().st_size <= 1_500_000
    vmae = load_first_stage(FILE, paper="autoencoder")
    images, shown, _ = fresh_scenes(200, JudgeConfig(), seed=8)
    with torch.no_grad():
        latents = vmae.encode(images.float() / 127.5 - 1)
        made = ((vmae.decode(latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    # normalised by the statistics in the file: what diffusion takes for its noise's scale
    assert latents.shape == (200, 8, 8, 8)
    spread = latents.std(dim=(0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(8), atol=0.1, rtol=0)
    read, _ = load_judge().read(made)
    truth = torch.tensor([encode(s, JudgeConfig()) for s in shown])
    assert (read == truth).all(1).float().mean() >= 0.97
