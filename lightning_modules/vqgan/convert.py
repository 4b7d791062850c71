"""Foreign tokenizer checkpoints to ours; the only place that knows foreign names.

Our own names are those of taming (encoder.*, decoder.*, quant_conv.*, post_quant_conv.*,
quantize.*) and of Paella's f4 network (in_block.*, down_blocks.*, up_blocks.*, out_block.*,
quantize.*), so that most keys stay as they are. Sizes are read from the shapes.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_foreign, load_tensor
from lightning_modules.common.foreign import (
    Converted,
    Hints,
    State,
    check_types,
    count,
    fitted,
    read_settings,
    read_suite,
    section,
    shape,
    typed,
)
from lightning_modules.common.settings import plain
from lightning_modules.vqgan.config import ModelConfig
from lightning_modules.vqgan.module import VQGANModule
from lightning_modules.vqgan.network import NETWORKS
from lightning_modules.vqgan.quantizer import map_from_counts, used_from_map

TAMING_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
PAELLA_PARTS = ("in_block.", "down_blocks.", "up_blocks.", "out_block.", "vquantizer.")

# what shapes do not say and a reference's settings do
HINTS = frozenset(
    "resolution unit_range norm_groups dropout beta legacy_beta scale_factor kl_weight temperature "
    "temperature_end temperature_batches straight_through sample_tokens quantizer unknown_code "
    "unknown_id".split()
)


def read(source: Path, hints: Mapping[str, Any], aside: Path | Tensor | None = None) -> Converted:
    """Read a tokenizer of this suite or an official one, as `VQGANModule.from_export` takes it.

    Args:
        source: file, or diffusers folder with its config.json.
        hints: settings that a user gave, by dotted keys (model.X).
        aside: file with the new id of every code, or [K] how often each occurs: those that do are
            kept.
    """
    found = read_suite(source, "vqgan")
    if found is not None:
        state, config = VQGANModule.from_export(*found).export()
    else:
        known = read_settings(source / "config.json")
        state, config = convert(load_foreign(source), {**known, **section(hints, "model")})
    if aside is None:
        return state, config
    ids = map_from_counts(aside) if isinstance(aside, Tensor) else load_tensor(aside)
    return renumbered(state, config, ids)


def renumbered(state: State, config: dict[str, Any], ids: Tensor) -> Converted:
    """Give a tokenizer's codes new ids [K]; those that share id 0 are no longer told apart."""
    model = config["model"]
    if model["used_codes"]:
        raise ValueError(f"the tokenizer keeps {model['used_codes']} of its codes already")
    if ids.dtype != torch.int64 or ids.shape != (model["num_codes"],) or int(ids.min()) < 0:
        raise ValueError(
            f"the new ids must be {model['num_codes']} whole numbers of at least 0, "
            f"got {ids.dtype} of shape {list(ids.shape)}"
        )
    if int(ids.max()) >= len(ids):
        raise ValueError(f"the new ids must be below {len(ids)}, got {int(ids.max())}")
    used = used_from_map(ids)
    kept = {"used_codes": len(used), "unknown_code": "id", "unknown_id": 0}
    renamed = {**state, "quantize.used": used}
    return VQGANModule.from_export(renamed, {**config, "model": {**model, **kept}}).export()


def convert(state: Mapping[str, Tensor], hints: Hints = None) -> Converted:
    """Turn a tokenizer checkpoint of any known layout into our tensors and settings.

    Known: taming and LDM (nearest code and Gumbel, also inside a transformer's checkpoint under
    first_stage_model.* or a VQ-Diffusion's under content_codec.*), Paella's vqgan_f4, and
    diffusers' VQModel and PaellaVQModel.

    Args:
        state: foreign tensors, as `load_foreign` returns them.
        hints: what shapes do not say: our setting names, a reference's ddconfig, or a diffusers
            config.json; names that say nothing new are ignored.

    Returns:
        The state and {"paper", "model"} that `VQGANModule.from_export` takes.
    """
    state = section(state, "first_stage_model") or state
    keys = state.keys()
    if any(k.startswith("content_codec.") for k in keys):
        return taming(_vq_diffusion(state), hints)
    if "vquantizer.embedding.weight" in keys or "vquantizer.codebook.weight" in keys:
        return paella(state, hints)
    if any(k.startswith("encoder.down_blocks.") for k in keys):
        return diffusers_vqmodel(state, hints)
    if any(k.startswith("encoder.down.") for k in keys):
        return taming(state, hints)
    raise ValueError(
        "the checkpoint has no known tokenizer layout (taming, LDM, Paella, diffusers); "
        f"its first key is {next(iter(keys), None)!r}"
    )


def taming(state: Mapping[str, Tensor], hints: Hints = None) -> Converted:
    """Convert the VQModel or GumbelVQ of CompVis/taming-transformers and latent-diffusion.

    loss.* and the EMA copies model_ema.* are dropped. Both repositories trained the nearest code
    with the legacy beta, and their Gumbel encoder draws; hints may say otherwise.
    """
    own = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    _only(own, TAMING_PARTS, "a taming checkpoint")
    first, in_channels = shape(own, "encoder.conv_in.weight", 4)[:2]
    levels = count(own, "encoder.down", 1)
    blocks = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    widths = [shape(own, block, 4)[0] for block in blocks]
    # diffusers takes any widths; taming's are multiples of the first
    ch = first if all(w % first == 0 for w in widths) else math.gcd(*widths)
    given = _hints(hints)
    resolution = given.get("resolution", 256)
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in own]
    gumbel = "quantize.embed.weight" in own
    codes = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    middle = "encoder.mid.attn_1.q.weight" in own
    values = {
        "network": "taming",
        "num_codes": shape(own, codes, 2)[0],
        "in_channels": in_channels,
        "ch": ch,
        "ch_mult": [w // ch for w in widths],
        "ch_first": first if first != ch else 0,
        "num_res_blocks": count(own, "encoder.down.0.block", 1),
        "attn_resolutions": [resolution // 2**i for i in attention],
        "attn_type": "vanilla" if middle else "none",
        "z_channels": shape(own, "encoder.conv_out.weight", 4)[0],
        "embed_dim": shape(own, "quant_conv.weight", 4)[0],
        "resolution": resolution,
        "quantizer": "gumbel" if gumbel else "nearest",
        "legacy_beta": not gumbel,
        "sample_tokens": gumbel,
        "used_codes": own["quantize.used"].numel() if "quantize.used" in own else 0,
    }
    return _finish(own, values | given, "the taming checkpoint")


def paella(state: Mapping[str, Tensor], hints: Hints = None) -> Converted:
    """Convert Paella's vqgan_f4.pt, open-muse's copies, or diffusers' PaellaVQModel."""
    _only(state, PAELLA_PARTS, "a Paella tokenizer")
    codes = re.compile(r"^vquantizer\.(codebook|embedding)\.")
    own = {codes.sub("quantize.embedding.", k): v for k, v in state.items()}
    latent = [k for k in own if re.fullmatch(r"down_blocks\.\d+\.0\.weight", k)]
    # blocks come as one per level and one convolution between levels, then the latent projection
    if not latent:
        raise ValueError("the checkpoint lacks down_blocks.N.0.weight, which makes the latents")
    levels = (int(latent[0].split(".")[1]) + 1) // 2
    num_codes, c_latent = shape(own, "quantize.embedding.weight", 2)
    values = {
        "network": "paella",
        "num_codes": num_codes,
        "in_channels": shape(own, "in_block.1.weight", 4)[1] // 4,
        "levels": levels,
        "bottleneck_blocks": count(own, "up_blocks", 1) - 1 - 2 * (levels - 1),
        "c_hidden": shape(own, "up_blocks.0.0.weight", 4)[0],
        "c_latent": c_latent,
        "scale_factor": 0.3764,
    }
    return _finish(own, values | _hints(hints), "the Paella tokenizer")


def diffusers_vqmodel(state: Mapping[str, Tensor], hints: Hints = None) -> Converted:
    """Convert diffusers' VQModel (or an older one, whose attention has other names)."""
    levels = count(state, "encoder.down_blocks", 1)
    own = {}
    for key, value in state.items():
        new = _diffusers_key(key, levels)
        if re.search(r"\.(q|k|v|proj_out)\.weight$", new) and value.ndim == 2:
            value = value[:, :, None, None]  # a matrix there, a 1x1 convolution here
        own[new] = value
    return taming(own, hints)


def _vq_diffusion(state: Mapping[str, Tensor]) -> State:
    """Pick the tokenizer out of a VQ-Diffusion checkpoint, by taming's names.

    Encoder and decoder carry the same quantizer. ITHQ's codes are a buffer beside their running
    statistics, which only training needs.
    """
    own: State = {}
    for key, value in section(state, "content_codec").items():
        new = re.sub(r"^(enc|dec)\.", "", key)
        if new in own and not torch.equal(own[new], value):
            raise ValueError(f"encoder and decoder have another {new}")
        own[new] = value
    if "quantize.embedding" in own:
        own["quantize.embedding.weight"] = own.pop("quantize.embedding")
        for name in ("cluster_size", "embedding_avg"):
            own.pop(f"quantize.{name}", None)
    return own


def _finish(own: State, values: Mapping[str, Any], what: str) -> Converted:
    """Check the tensors against the network that the settings describe."""
    model = typed(ModelConfig, values)
    own = fitted(lambda: NETWORKS[model.network](model), own, what)
    used = own.get("quantize.used")
    if used is not None and not bool(((used >= 0) & (used < model.num_codes)).all()):
        raise ValueError(f"quantize.used must name codes from 0 to {model.num_codes - 1}")
    return own, {"paper": "vqgan", "model": plain(model)}


def _hints(hints: Hints) -> dict[str, Any]:
    """Take the settings out of what a caller knows, under our names."""
    flat = dict(hints or {})
    inner = flat.get("ddconfig") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"ddconfig must be a mapping, got {inner!r}")
    flat |= inner
    own = {k: v for k, v in flat.items() if k in HINTS and v is not None}
    if "norm_num_groups" in flat:
        own["norm_groups"] = flat["norm_num_groups"]
    # of diffusers' VQModels only aMUSEd's says the first, and open-muse's class is the second
    if flat.get("lookup_from_codebook") or flat.get("_class_name") == "VQGANModel":
        own.setdefault("unit_range", True)
    unknown = flat.get("unknown_index")
    if isinstance(unknown, int):
        own |= {"unknown_code": "id", "unknown_id": unknown}
    elif unknown is not None:
        own["unknown_code"] = unknown
    check_types(ModelConfig, own)
    return own


def _only(state: Mapping[str, Tensor], parts: tuple[str, ...], what: str) -> None:
    strange = sorted(k for k in state if not k.startswith(parts))
    if strange:
        raise ValueError(f"{what} has no key {strange[0]!r} ({len(strange)} left over)")


_DIFFUSERS = (
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.", ".down."),
)


def _diffusers_key(key: str, levels: int) -> str:
    for pattern, name in _DIFFUSERS:
        key = re.sub(pattern, name, key)
    # diffusers counts decoder levels in the order of execution, taming by resolution
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", key)
