"""A run folder with a generator of random weights, which draws in no time."""

from pathlib import Path

import torch

from data.files import file_hash, write_json
from lightning_modules.common.checkpoint import save_weights
from lightning_modules.paella.module import PaellaModule
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from lightning_modules.vqgan.module import VQGANModule
from tests.tiny_generators import BY_CLASS

TOKENIZER = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
    "embed_dim": 4,
    "num_codes": 12,
    "norm_groups": 4,
}
MODEL = {
    "c_in": 8,
    "c_out": 8,
    "num_labels": 12,
    "c_r": 8,
    "patch_size": 1,
    "c_cond": 8,
    "c_hidden": [8, 8],
    "nhead": [-1, 2],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "clip_embd": 0,
    "clip_image": False,
    "byt5_embd": 8,
    "dropout": 0.0,
}
TEXT = {"name": "bytes", "width": 8, "layers": 1, "buckets": 64}
SAMPLING = {"steps": 3, "guidance_start": 3.0, "guidance_end": 3.0}


def write(folder: Path, classes: int = 0, side: int = 16) -> Path:
    """Write the files of a run folder for side x side tokens of 2x2 pixels.

    It is a Paella's, with a number of classes a VQ-Diffusion's.
    """
    torch.manual_seed(0)
    tokenizer = VQGANModule({"model": TOKENIZER, "objective": {"disc_weight": 0.0}})
    config = {"seed": 0, "grid": [side, side], "num_codes": 12, "text": TEXT}
    generator: PaellaModule | VQDiffusionModule
    sampling = SAMPLING
    if classes:
        model = {**BY_CLASS, "class_number": classes, "spatial_size": [side, side]}
        generator = VQDiffusionModule({**config, "paper": "vq_diffusion", "model": model})
        sampling = {"steps": 2}
    else:
        generator = PaellaModule({**config, "paper": "paella", "model": MODEL})
    for parameter in [*tokenizer.parameters(), *generator.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    file = folder / "tokenizer.safetensors"
    save_weights(file, *tokenizer.export())
    save_weights(folder / "checkpoint.safetensors", *generator.export())
    first_stage = {"file": file.name, "sha256": file_hash(file)}
    write_json(folder / "checkpoint.json", {"first_stage": first_stage, "sampling": sampling})
    return folder
