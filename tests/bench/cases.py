"""The networks of the benches with random weights: a guided call, our loop and the released one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.common.places import Picked
from lightning_modules.ldmae import process as ldmae_process
from lightning_modules.ldmae.config import DIT_MODELS, DIT_SAMPLING, DiTConfig
from lightning_modules.ldmae.network import DiT
from lightning_modules.muse import process as muse_process
from lightning_modules.muse.config import UViTConfig
from lightning_modules.muse.uvit import UViT
from lightning_modules.paella import process as paella_process
from lightning_modules.paella.config import ModelConfig as PaellaSizes
from lightning_modules.paella.config import SamplingConfig as PaellaSampling
from lightning_modules.paella.network import Paella
from lightning_modules.vq_diffusion import process as vqd_process
from lightning_modules.vq_diffusion.config import MODELS as VQD_MODELS
from lightning_modules.vq_diffusion.config import ModelConfig as VQDSizes
from lightning_modules.vq_diffusion.config import ScheduleConfig
from lightning_modules.vq_diffusion.network import Denoiser
from tests.bench import ldmae, muse, paella, plain_muse, plain_paella, plain_vq_diffusion
from tests.tiny_generators import DIT, PAELLA, UVIT, VQD

SCALE = 3.0
SHARES = [SCALE, 1 - SCALE]


class Case(NamedTuple):
    """A network with what it is called with, for B pictures."""

    network: nn.Module
    call: Callable[[], Tensor]
    """One guided call, up to the logits or the velocity."""
    loop: Callable[[int, Picked], Tensor]
    """Our loop of so many guided steps, conditions prepared before."""
    plain: Callable[[int], object]
    """The loop as released, whose tensors are made on the default device."""


def random_network(network: nn.Module) -> nn.Module:
    """Draw what begins as zeros, so that nothing is trivial."""
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network.eval().requires_grad_()


def on(device: str, noise: dict[str, Tensor]) -> dict[str, Any]:
    """Bring noise to a device."""
    return {name: tensor.to(device) for name, tensor in noise.items()}


def paella_case(size: str, device: str, batch: int) -> Case:
    """Paella as in its bench, 64x64 tokens; micro 4x4."""
    config = PaellaSizes(**PAELLA) if size == "micro" else paella.CONFIG
    network: Any = random_network(Paella(config)).to(device)
    side, length = (4, 5) if size == "micro" else (paella.GRID[0], 60)
    given: list[dict[str, Any]] = [
        {"byt5": torch.randn(batch, n, config.byt5_embd, device=device)} for n in (length, 1)
    ]
    for part in given if config.clip_embd else []:
        part["clip"] = torch.randn(batch, config.clip_embd, device=device)
    sides = [network.prepare(*network.condition(**part)) for part in given]
    x = torch.randint(config.num_labels, (batch, side, side), device=device)
    t = torch.full((1,), 0.5, device=device)

    def loop(steps: int, places: Picked) -> Tensor:
        grid, codes = (side, side), config.num_labels
        noise = paella_process.sample_noise(range(batch), steps, steps - 1, grid, codes)
        return paella_process.sample(
            network.predictor(*sides),
            network.head,
            **on(device, noise),
            **paella_process.loop_settings(PaellaSampling(steps=steps)),
            draw=places.draw,
            places=places,
        )

    copy: list[Any] = []

    def plain(steps: int) -> object:
        if not copy:
            copy.append(plain_paella.PlainPaella(config).to(device).eval())
        return plain_paella.plain_sample(
            copy[0], *given, x, None, steps=steps, temperature=(0.7, 0.3), guidance=(8.0, 8.0)
        )

    def call() -> Tensor:
        return network.head(network.mixed_rows(x, t, sides, SHARES))

    return Case(network, call, loop, plain)


def vq_diffusion_case(size: str, device: str, batch: int) -> Case:
    """VQ-Diffusion S as in its bench, 32x32 tokens; micro 4x4."""
    config = VQDSizes(**VQD) if size == "micro" else VQD_MODELS["s"]
    network: Any = random_network(Denoiser(config)).to(device)
    texts = torch.randn(2, batch, 77, config.condition_dim, device=device)
    sides = [network.prepare(text) for text in texts]
    side = 4 if size == "micro" else 32
    rate = ScheduleConfig().mask_rate
    schedule = vqd_process.mask_schedule(config.diffusion_steps, config.num_codes, rate)
    x = torch.randint(config.num_codes, (batch, side, side), device=device)
    t = torch.full((1,), 5, device=device)

    def loop(steps: int, places: Picked) -> Tensor:
        noise = vqd_process.sample_noise(range(batch), steps, (side, side))
        del noise["start"]
        return vqd_process.sample(
            lambda x, t, keep: network.mixed_rows(x, t, sides, SHARES, keep),
            network.head,
            x=torch.full_like(x, config.num_codes),
            steps=vqd_process.exact_steps(schedule, steps),
            truncation=0.86,
            draw=places.draw,
            places=places,
            **on(device, noise),
        )

    copy: list[Any] = []

    def plain(steps: int) -> object:
        if not copy:
            copy.append(plain_vq_diffusion.PlainDenoiser(config).to(device).eval())
        walk = [*(step.t for step in vqd_process.exact_steps(schedule, steps)), -1]
        return plain_vq_diffusion.plain_sample(
            copy[0], *texts, walk, guidance=SCALE, truncation=0.86
        )

    def call() -> Tensor:
        return network.head(network.mixed_rows(x, t, sides, SHARES))

    return Case(network, call, loop, plain)


def muse_case(size: str, device: str, batch: int, config: UViTConfig | None = None) -> Case:
    """Muse's U-ViT as in its bench, 16x16 tokens; micro 4x4."""
    config = config or (UViTConfig(**UVIT) if size == "micro" else muse.CONFIG)
    network: Any = random_network(UViT(config)).to(device)
    side = 4 if size == "micro" else muse.SIDE
    micro = torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]], device=device).expand(batch, -1)
    given = [
        {
            "text": torch.randn(batch, 77, config.encoder_hidden_size, device=device),
            "pooled": torch.randn(batch, config.cond_embed_dim, device=device),
            "micro": micro,
        }
        for _ in range(2)
    ]
    sides = [network.prepare(**part) for part in given]
    x = torch.randint(config.codebook_size, (batch, side, side), device=device)

    def loop(steps: int, places: Picked) -> Tensor:
        unknown = torch.full((batch,), side * side)
        settings = muse_process.loop_settings(muse.settings(steps), unknown)
        settings["counts"] = settings["counts"].to(device)
        noise = muse_process.sample_noise(range(batch), steps, (side, side))

        def predict(x: Tensor, scale: Any, keep: Tensor | None) -> Tensor:
            return network.mixed_rows(x, sides, [scale, 1 - scale], keep)

        return muse_process.decode(
            predict,
            network.head,
            start=torch.full_like(x, network.mask_id),
            mask_id=network.mask_id,
            draw=places.draw,
            places=places,
            **on(device, noise),
            **settings,
        )

    copy: list[Any] = []

    def plain(steps: int) -> object:
        if not copy:
            copy.append(plain_muse.PlainUViT(config).to(device).eval())
        start = torch.full_like(x, network.mask_id)
        scale, heat = muse.GUIDANCE, muse.TEMPERATURE
        return plain_muse.plain_sample(
            copy[0], *given, start, steps=steps, guidance=scale, temperature=heat
        )

    def call() -> Tensor:
        return network.head(network.mixed_rows(x, sides, SHARES))

    return Case(network, call, loop, plain)


def ldmae_case(size: str, device: str, batch: int) -> Case:
    """LightningDiT-B/1 as in LDMAE's bench, 16x16 latents; micro 4x4."""
    config = replace(DIT_MODELS["paper"], input_size=16)
    if size == "micro":
        config = DiTConfig(**{**DIT, "text_width": 0})
    network: Any = random_network(DiT(config)).to(device)
    labels = [torch.full((batch,), n, device=device) for n in (1, config.num_classes)]
    sides = {
        name: network.label_side(label) for name, label in zip(("own", "null"), labels, strict=True)
    }
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x, t = torch.randn(shape, device=device), torch.full((1,), 0.5, device=device)
    settings = DIT_SAMPLING["released"]

    def loop(steps: int, places: Picked) -> Tensor:
        times = ldmae_process.time_grid(steps, settings.timestep_shift)
        interval = (settings.guidance_start, settings.guidance_end)
        velocity = ldmae_process.guided(
            lambda x, t, names: network(x, t.to(x), [sides[name] for name in names]),
            settings.guidance,
            min(settings.guidance_channels or config.in_channels, config.in_channels),
            interval,
        )
        inside = ldmae_process.insides(settings.guidance, interval, times)
        return ldmae_process.integrate(velocity, x, times, inside=inside, places=places)

    def plain(steps: int) -> object:
        return ldmae.textbook_loop(network, x, labels[0], replace(settings, steps=steps))

    def call() -> Tensor:
        return network(x, t, [sides["own"], sides["null"]])

    return Case(network, call, loop, plain)


CASES: dict[str, Callable[[str, str, int], Case]] = {
    "Paella": paella_case,
    "VQ-Diffusion S": vq_diffusion_case,
    "Muse U-ViT": muse_case,
    "LDMAE B/1": ldmae_case,
}
