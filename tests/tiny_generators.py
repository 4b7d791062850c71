"""The smallest generators of every paper, and what tests of them need: data, training, float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.request import OnStep, Request
from lightning_modules.common.text import Condition
from lightning_modules.improved_vqd.module import ImprovedVQDModule
from lightning_modules.ldmae.module import LDMAEModule
from lightning_modules.muse.module import MuseModule
from lightning_modules.paella.module import PaellaModule
from lightning_modules.vq_diffusion.module import VQDiffusionModule

K, GRID, CLASSES, CHANNELS = 12, (4, 4), 5, 3
CAPTIONS = ["a red circle", "one large blue square, right", "", "two things"]
LABELS = ["1", "4", "0", "2"]
BATCHES = 3
PAPERS: dict[str, type[GeneratorModule]] = {
    "paella": PaellaModule,
    "vq_diffusion": VQDiffusionModule,
    "improved_vqd": ImprovedVQDModule,
    "muse": MuseModule,
    "ldmae": LDMAEModule,
}

BYTES = {"name": "bytes", "width": 16, "layers": 1, "buckets": 64}
PAELLA = {
    "c_in": 8,
    "c_out": 8,
    "num_labels": K,
    "c_r": 8,
    "patch_size": 1,
    "c_cond": 16,
    "c_hidden": [8, 16],
    "nhead": [-1, 2],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "clip_embd": 0,
    "clip_image": False,
    "byt5_embd": 16,
}
VQD = {
    "num_codes": K,
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "mlp_hidden_times": 2,
    "spatial_size": [4, 4],
    "diffusion_steps": 10,
    "condition_dim": 16,
}
BY_CLASS = {**VQD, "condition": "class", "class_number": CLASSES, "mlp_type": "conv_mlp"}
MUSE = {
    "num_codes": K,
    "hidden": 16,
    "mlp": 32,
    "layers": 2,
    "heads": 2,
    "max_side": 8,
    "text_width": 16,
}
UVIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "in_channels": 8,
    "block_out_channels": 8,
    "block_num_heads": 2,
    "num_res_blocks": 1,
    "vocab_size": K + 2,
    "codebook_size": K,
    "encoder_hidden_size": 16,
    "cond_embed_dim": 16,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
}
DIT = {
    "input_size": 4,
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "text_width": 16,
    "num_classes": CLASSES,
}

SAMPLING: dict[str, dict[str, Any]] = {
    "paella": {"steps": 4, "guidance_start": 3.0, "guidance_end": 2.0},
    "vq_diffusion": {"steps": 4, "truncation": 0.9},
    "improved_vqd": {"steps": 5},
    "muse": {"steps": 4, "guidance_start": 1.0, "guidance_end": 3.0},
    "ldmae": {"steps": 5, "guidance": 3.0, "guidance_channels": None, "timestep_shift": 0.7},
}
MASKS = [
    "confidence",
    "max_p",
    "margin",
    "entropy",
    "random",
    "halton",
    "moment",
    "eb",
    "klass",
    "mdlm",
    "remdm_cap",
    "remdm_rescale",
    "remdm_conf",
    "remdm_loop",
    "posterior",
    "flow",
]
RANDOM = [
    "eb",
    "posterior",
    "gibbs",
    "gidd",
    "flow",
    "renoise_start",
    "renoise_prev",
    "renoise_rand",
]
# what further ways of sampling a checkpoint has, by paper
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "paella": [
        {"mode": "quant", "quant_steps": 2},
        {"mode": "argmax", "renoise_mode": "prev"},
        {"typical_mass": 0.5, "renoise_mode": "rand"},
        *({"sampler": {"name": name}} for name in RANDOM),
    ],
    "vq_diffusion": [
        {"steps": 10, "truncation": 1.0},
        {"steps": 4, "rule": "released"},
        {"steps": 1},
        *({"sampler": {"name": name}} for name in MASKS),
    ],
    "improved_vqd": [
        {"order": "diffusion", "guidance": 2.0, "truncation": 0.8},
        {"order": "diffusion", "rule": "released"},
        {"order": "random", "tokens_per_call": 2, "guidance": 1.0},
        {"reveal": "constant", "tokens_per_call": 3, "purity_weight": 0.5},
        {"order": "diffusion", "guidance_law": "up", "guidance_first": 0.4},
        {"sampler": {"name": "eb", "gamma": 1.0}, "guidance_law": "down"},
    ],
    "muse": [
        {"order": "halton"},
        {"frozen": False},
        *({"sampler": {"name": name}} for name in MASKS),
    ],
    "ldmae": [{"solver": "heun"}, {"solver": "dopri5"}],
}
# kind -> sections; its first word is the paper
KINDS: dict[str, dict[str, Any]] = {
    "paella": {"model": PAELLA},
    "vq_diffusion": {"model": VQD},
    "vq_diffusion class": {"model": BY_CLASS},
    "vq_diffusion none": {
        "model": {**VQD, "condition": "none", "timestep_type": "adalayernorm_abs"}
    },
    "vq_diffusion replacing": {"model": VQD, "schedule": {"mask_rate": 0.9}},
    "vq_diffusion causal": {"model": {**VQD, "causal": True}},
    "improved_vqd": {"model": VQD, "null_condition": {"length": 3}},
    "improved_vqd empty": {"model": VQD, "null_condition": {"name": "empty"}},
    "improved_vqd class": {"model": {**BY_CLASS, "class_number": CLASSES + 1}},
    "improved_vqd mean": {"model": BY_CLASS, "null_condition": {"name": "empty"}},
    "improved_vqd none": {"model": {**VQD, "condition": "none"}},
    "improved_vqd causal": {"model": {**VQD, "causal": True}, "null_condition": {"length": 3}},
    "muse": {"model": MUSE},
    "muse learned": {
        "model": {**MUSE, "null_text": "learned"},
        "objective": {"visible_weight": 1.0},
    },
    "muse critic": {"model": MUSE, "critic": {"layers": 1}},
    "muse uvit": {"network": "uvit", "uvit": UVIT},
    "ldmae": {"model": DIT},
    "ldmae label": {"model": DIT, "condition": "label"},
    "ldmae none": {"model": DIT, "condition": "none", "sampling": {"guidance": 1.0}},
    "ldmae ddpm": {
        "model": DIT,
        "sampling": {"solver": "ddim", "eta": 0.5},
        "objective": {"kind": "ddpm", "train_steps": 50},
    },
}


class Greys(nn.Module):
    """A tokenizer without learning: a picture of 2x2 squares of K greys. Its weight is a trap."""

    num_codes, factor = K, 2

    def __init__(self) -> None:
        super().__init__()
        self.trap = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> Tensor:
        return ((images[:, 0, ::2, ::2] + 1) / 2 * (K - 1)).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        grey = tokens.to(self.trap.dtype) / (K - 1) * 2 - 1
        return grey[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)

    def codebook(self) -> Tensor:
        return torch.linspace(-1, 1, K, dtype=self.trap.dtype)[:, None]


class Squares(nn.Module):
    """An autoencoder without learning: latents are colours of 2x2 squares. Its weight is a trap."""

    channels, factor = CHANNELS, 2

    def __init__(self) -> None:
        super().__init__()
        self.trap = nn.Parameter(torch.zeros(1))

    def moments(self, images: Tensor) -> Tensor:
        means = images[:, :, ::2, ::2]
        return torch.cat([means, torch.full_like(means, -4.0)], dim=1)

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        means, logvars = moments.chunk(2, dim=1)
        return means + (0.5 * logvars).exp() * noise

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * 2 + 0.1

    def encode(self, images: Tensor) -> Tensor:
        return self.normalise(images[:, :, ::2, ::2])

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents - 0.1) / 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def first_stage(paper: str) -> Any:
    """What lies under a paper's generator."""
    return Squares() if paper == "ldmae" else Greys()


def tiny(kind: str, random: float = 0.0, **sections: Any) -> Any:
    """Make the generator of one kind, ready to sample.

    Args:
        kind: one of KINDS.
        random: spread of all weights; 0 keeps the paper's own initialisation, under which many
            networks say the same to everything.
        **sections: what replaces or extends its sections.
    """
    paper = kind.split()[0]
    config: dict[str, Any] = {
        "paper": paper,
        "seed": 5,
        "grid": [*GRID],
        "text": BYTES,
        "sampling": SAMPLING[paper],
        **({"channels": CHANNELS} if paper == "ldmae" else {"num_codes": K}),
    }
    for more in (KINDS[kind], sections):
        for name, section in more.items():
            both = isinstance(section, dict) and name in config
            config[name] = {**config[name], **section} if both else section
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = PAPERS[paper](config)
        for name, p in module.named_parameters():
            # gains around 1 and the null as it is: what they are multiplied with is random
            if random and (p.ndim > 1 or (p.requires_grad and not p.any())) and name != "null":
                nn.init.normal_(p, std=random)
    return module.attach(first_stage(paper)).eval()


def exact(module: Any) -> Any:
    """Put a module of tokens into float64, where another order of summing draws no other one.

    Latents are compared up to float32's precision.
    """
    if isinstance(module.first_stage, Squares):
        return module
    module.double().first_stage.double()
    encode_text = module.encode_text

    def double(captions: Any) -> Condition:
        c = encode_text(captions)
        return Condition(c.tokens.double(), c.mask, None if c.pooled is None else c.pooled.double())

    module.encode_text = double
    return module


def draw(
    module: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: OnStep | None = None,
    changes: Mapping[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """Sample tokens or latents; `more` are fields of the request, `changes` sampling settings."""
    settings = module.settings(changes or {})
    return module.sample_tokens(Request(prompts, seeds, **more), settings, on_step)


def asked(kind: str) -> list[str]:
    """Four prompts that a kind understands."""
    return LABELS if kind.endswith(("class", "mean", "label")) else CAPTIONS


def tokens(kind: str, seed: int = 0, n: int = 4) -> Tensor:
    """What the first stage of a kind could have encoded, [n, h, w] or [n, C, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("ldmae"):
        return torch.randn(n, CHANNELS, *GRID, generator=generator)
    return torch.randint(K, (n, *GRID), generator=generator)


def batch(kind: str = "paella", seed: int = 0, n: int = 4) -> dict[str, Any]:
    """A training batch as a cache of the first stage gives it."""
    x = tokens(kind, seed, n)
    cached = {"moments": torch.cat([x, -torch.ones_like(x)], 1)} if x.ndim == 4 else {"tokens": x}
    label = torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))
    return {**cached, "caption": [CAPTIONS[i % 4] for i in range(n)], "label": label}


def source(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Stop(L.Callback):
    """Ends a training after so many epochs, with the schedule of the whole one."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def fit(module: Any, epochs: int, ckpt: Path | None = None, **options: Any) -> L.Trainer:
    """Train and validate on BATCHES batches of the module's kind."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    paper = module.hparams["config"]["paper"]
    batches: Any = [batch(paper, i) for i in range(BATCHES)]
    loader: Any = DataLoader(batches, batch_size=None)
    trainer.fit(module.train(), loader, loader, ckpt_path=ckpt)
    return trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
