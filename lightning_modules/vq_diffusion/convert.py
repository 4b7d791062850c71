"""Official VQ-Diffusion checkpoints -> this suite's networks. Sizes are read from the shapes.

Three layouts: microsoft/VQ-Diffusion's training files (CLIP text transformer, schedule, statistics
of the loss, denoiser, learnable null), the denoiser alone under the same names, and the Hugging
Face folder of microsoft/vq-diffusion-ithq. The tokenizer inside a training file is read by
`vqgan.convert`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common import foreign
from lightning_modules.common.checkpoint import load_entries, load_foreign
from lightning_modules.common.foreign import Foreign, Settings, State
from lightning_modules.common.text import openai_clip_text
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.network import Denoiser
from lightning_modules.vq_diffusion.process import (
    KEEP_FIRST,
    KEEP_LAST,
    MASK_FIRST,
    linear_schedule,
    mask_schedule,
)

CODEC = "content_codec."
NULL = "empty_text_embed"
HF_NULL = "learned_classifier_free_sampling_embeddings"
RELEASED_HEADS = 16
# the schedule as the released code keeps it; alpha is left from an older version of it
SCHEDULE = r"log_((cumprod_)?(at|bt|ct|alpha)|1_min_(cumprod_)?(ct|alpha))"
LAST_MASK = "log_cumprod_ct"
STATISTICS = {"loss_history": "Lt_history", "loss_count": "Lt_count"}
CLIP_PARTS = r"(token_embedding|ln_final|transformer)\.|(positional_embedding|text_projection)$"

# what shapes do not say, by our names, the released configs' and diffusers'
HINTS = {
    **{name: name for name in ("n_head", "block_activate", "class_type", "diffusion_steps")},
    **{name: name for name in ("attn_dropout", "dropout", "checkpoint_blocks")},
    "num_attention_heads": "n_head",
    "diffusion_step": "diffusion_steps",
    "attn_pdrop": "attn_dropout",
    "resid_pdrop": "dropout",
}
# diffusers' names of the denoiser's parts
DIFFUSERS = (
    (r"^latent_image_embedding\.", "content_emb."),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.norm1\.", ".ln1."),
    (r"\.norm2\.", ".ln1_1."),
    (r"\.norm3\.", ".ln2."),
    (r"\.to_k\.", ".key."),
    (r"\.to_q\.", ".query."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.0."),
    (r"\.ff\.net\.2\.", ".mlp.2."),
    (r"^norm_out\.", "to_logits.0."),
    (r"^out\.", "to_logits.1."),
)
HF_ACTIVATIONS = {"geglu-approximate": "GELU2", "gelu": "GELU"}
# of diffusers' scheduler_config.json, with what it means where it is silent
HF_SCHEDULE = {
    "alpha_cum_start": KEEP_FIRST,
    "alpha_cum_end": KEEP_LAST,
    "gamma_cum_start": MASK_FIRST,
    "gamma_cum_end": 0.99999,
}


@dataclass
class Official:
    """What an official checkpoint holds but the tokenizer, by our names, in float32.

    Attributes:
        model: plain settings of `ModelConfig`.
        network: tensors of `Denoiser`.
        null: [L, condition_dim], the learnable null text, or None.
        learnable: whether the model was trained with a learnable null; that of a class model is
            the last row of its class tables.
        mask_rate: probability of the mask after the last step, where the file says it.
        statistics: Lt_history and Lt_count [T] of the importance sampling of t, or empty.
        text: the CLIP text transformer by OpenAI's names, or empty.
    """

    model: dict[str, Any]
    network: State
    null: Tensor | None = None
    learnable: bool = False
    mask_rate: float | None = None
    statistics: State = field(default_factory=dict)
    text: State = field(default_factory=dict)


def read(source: Path, hints: Mapping[str, Any]) -> Foreign:
    """Read a training file, a denoiser alone, or the Hugging Face folder, without a learned null.

    Hints are settings that a user gave, by dotted keys.
    """
    official, found = read_parts(source, hints)
    if official.null is not None:
        raise ValueError("this checkpoint has a learnable null: take --paper improved_vqd")
    return found


def read_parts(source: Path, hints: Mapping[str, Any]) -> tuple[Official, Foreign]:
    """Read what VQ-Diffusion and Improved VQ-Diffusion have in common.

    Raises:
        ValueError: another file, or a schedule that `mask_rate` does not express.
    """
    state, known = load(source)
    found = convert(state, {**known, **foreign.section(hints, "model")})
    model = foreign.typed(ModelConfig, found.model)
    settings: Settings = [(f"model.{k}", v) for k, v in found.model.items()]
    defaults: Settings = []
    scheduler = foreign.read_settings(source / "scheduler" / "scheduler_config.json")
    rate = scheduled_rate(scheduler, model) if scheduler else found.mask_rate
    if rate is not None:
        settings.append(("schedule.mask_rate", rate))
    if model.condition == "text":
        defaults.append(("text.name", "clip"))
        if (source / "text_encoder").is_dir():
            defaults.append(("text.path", str(source / "text_encoder")))
        if (source / "tokenizer").is_dir() and "text.pad_id" not in hints:
            defaults.append(("text.pad_id", foreign.pad_id(source / "tokenizer")))
    own = {f"network.{k}": v for k, v in found.network.items()}
    for ours, theirs in STATISTICS.items():
        value = found.statistics.get(theirs, torch.zeros(model.diffusion_steps))
        own[ours] = foreign.numbers(theirs, value)
    inside = source if source.is_file() and any(k.startswith(CODEC) for k in state) else None
    return found, Foreign(
        "VQ-Diffusion",
        model.num_codes,
        settings,
        defaults,
        own,
        found.text,
        tokenizer=source / "vqvae" if (source / "vqvae").is_dir() else inside,
        side=foreign.trained_side(known),
        places=model.spatial_size[0] * model.spatial_size[1],
    )


def scheduled_rate(scheduler: Mapping[str, Any], model: ModelConfig) -> float:
    """Return the mask_rate that gives the schedule of diffusers' VQDiffusionScheduler.

    Its A and C are linear in t from *_cum_start to *_cum_end, like those of `linear_schedule`.

    Raises:
        ValueError: another scheduler, or one that no mask_rate expresses.
    """
    name = scheduler.get("_class_name", "VQDiffusionScheduler")
    if name != "VQDiffusionScheduler":
        raise ValueError(f"the scheduler must be a VQDiffusionScheduler, got {name}")
    sizes = {"num_vec_classes": model.num_codes + 1, "num_train_timesteps": model.diffusion_steps}
    for key, wanted in sizes.items():
        if scheduler.get(key, wanted) != wanted:
            raise ValueError(f"{key} of the scheduler must be {wanted}, got {scheduler[key]}")
    ends = [scheduler.get(key, default) for key, default in HF_SCHEDULE.items()]
    if not all(type(end) in (int, float) and 0 <= end <= 1 for end in ends):
        raise ValueError(f"{[*HF_SCHEDULE]} of the scheduler must be probabilities, got {ends}")
    keep, mask = (ends[0], ends[1]), (ends[2], ends[3])
    theirs = linear_schedule(model.diffusion_steps, model.num_codes, keep=keep, mask=mask)
    ours = mask_schedule(model.diffusion_steps, model.num_codes, mask[1])
    if not (torch.allclose(theirs.keep, ours.keep) and torch.allclose(theirs.mask, ours.mask)):
        raise ValueError(
            f"the scheduler keeps {keep} and masks {mask}, which no schedule.mask_rate expresses: "
            f"it must keep {(KEEP_FIRST, KEEP_LAST)} and mask from {MASK_FIRST}"
        )
    return mask[1]


def load(path: Path | str) -> tuple[State, dict[str, Any]]:
    """Read the tensors of a checkpoint by their foreign names, and the settings beside them.

    Of a training file the entry `model` counts, with the diffusion part taken from `ema`, as the
    released inference does. Of a Hugging Face folder the transformer and the learned null, with
    the transformer's config.json as settings.
    """
    path = Path(path)
    if (path / "transformer").is_dir():
        state = load_foreign(path / "transformer")
        if (path / HF_NULL).is_dir():
            null = load_foreign(path / HF_NULL)
            state |= {f"{HF_NULL}.{k}": v for k, v in null.items()}
        return state, foreign.read_settings(path / "transformer" / "config.json")
    entries = load_entries(path)
    found = entries.get("model") or entries.get("state_dict") or entries.get("")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found | {f"transformer.{k}": v for k, v in entries.get("ema", {}).items()}, {}


def convert(state: Mapping[str, Tensor], hints: Mapping[str, Any] | None = None) -> Official:
    """Sort an official state dict and infer the denoiser's settings.

    Args:
        state: tensors by their foreign names, as `load` returns them.
        hints: what no shape tells, by our names, the released ones or those of a config.json:
            n_head (default 16), block_activate (default GELU2), class_type, dropouts, and
            diffusion_steps of a bare denoiser with `adalayernorm_abs`. Others are ignored.

    Raises:
        ValueError: an unknown layout, or a key that is missing, left over or of wrong shape.
    """
    rest = {k: v for k, v in state.items() if not k.startswith(CODEC)}
    if any(k.startswith("transformer.transformer.") for k in rest):
        rest = _without(rest, "transformer.")
    prefix = "condition_emb."
    names = [k for k in rest if k.startswith(prefix)]
    text = {k.removeprefix(prefix): foreign.numbers(k, rest.pop(k)) for k in names}
    if text:
        _check_text(text)
    found: dict[str, Any] = {"text": text}
    null: Tensor | None = None
    if any(k.startswith("transformer.content_emb.") for k in rest):
        found["statistics"] = {k: rest.pop(k) for k in STATISTICS.values() if k in rest}
        null = rest.pop(NULL, None)
        if LAST_MASK in rest:
            times = foreign.shape(rest, LAST_MASK, 1)[0] - 1
            if times < 1:
                raise ValueError(f"{LAST_MASK} must have an entry for each time and one more")
            last = rest[LAST_MASK][-2:-1].double()
            found["mask_rate"] = round(float(foreign.numbers(LAST_MASK, last).exp()), 6)
            hints = {"diffusion_steps": times, **(hints or {})}
        schedule = [k for k in rest if re.fullmatch(SCHEDULE, k)]
        rest = _without({k: v for k, v in rest.items() if k not in schedule}, "transformer.")
    elif any(k.startswith("latent_image_embedding.") for k in rest):
        null = rest.pop(f"{HF_NULL}.embeddings", None)
        for pattern, name in DIFFUSERS:
            rest = {re.sub(pattern, name, k): v for k, v in rest.items()}
    if "content_emb.emb.weight" not in rest:
        raise ValueError(
            "this is no VQ-Diffusion checkpoint: it has neither content_emb.emb.weight of the "
            "released code nor latent_image_embedding.emb.weight of Hugging Face; its first key is "
            f"{next(iter(state), None)!r}"
        )
    network = {
        re.sub(r"^(blocks\.\d+)\.attn\.", r"\1.attn1.", k): v
        for k, v in rest.items()
        if not re.fullmatch(r"blocks\.\d+\.attn\d?\.mask", k)  # a buffer that nothing reads
    }
    model = _settings(network, hints or {})
    # diffusers' learnable=false leaves it empty; class models carry one too, which nothing reads
    found["learnable"] = null is not None and null.numel() > 0
    if null is not None and found["learnable"] and model["condition"] == "text":
        width = foreign.shape({NULL: null}, NULL, 2)[1]
        if width != model["condition_dim"]:
            raise ValueError(f"{NULL} must be {model['condition_dim']} wide, got {width}")
        found["null"] = foreign.numbers(NULL, null)
    what = "the VQ-Diffusion checkpoint"
    network = foreign.fitted(lambda: Denoiser(foreign.typed(ModelConfig, model)), network, what)
    return Official(model=model, network=network, **found)


def _settings(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `ModelConfig` that fit the tensors."""
    first = "blocks.0"
    labelled = "class" if f"{first}.ln2.linear.weight" in state else "none"
    condition = "text" if f"{first}.attn2.key.weight" in state else labelled
    num_codes, n_embd = foreign.shape(state, "to_logits.1.weight", 2)
    conv = f"{first}.mlp.conv1.weight" in state
    mlp = ("conv1.weight", 4) if conv else ("0.weight", 2)
    hidden = foreign.shape(state, f"{first}.mlp.{mlp[0]}", mlp[1])[0]
    parameter = "content_emb.height_emb" in state
    tables = ("", 3) if parameter else (".weight", 2)
    names = [f"content_emb.{side}_emb{tables[0]}" for side in ("height", "width")]
    sides = [foreign.shape(state, name, tables[1])[-2] for name in names]
    model: dict[str, Any] = {
        "condition": condition,
        "num_codes": num_codes,
        "n_layer": foreign.count(state, "blocks"),
        "n_embd": n_embd,
        "n_head": RELEASED_HEADS,
        "mlp_type": "conv_mlp" if conv else "fc",
        "mlp_hidden_times": hidden // n_embd,
        "spatial_size": sides,
        "pos_emb_type": "parameter" if parameter else "embedding",
        "timestep_type": "adalayernorm_abs",
    }
    given = {HINTS[k]: v for k, v in hints.items() if k in HINTS and v is not None}
    foreign.check_types(ModelConfig, given)
    model |= given
    if "activation_fn" in hints:
        name, known = hints["activation_fn"], [*HF_ACTIVATIONS]
        if name not in known:
            raise ValueError(f"activation_fn must be one of {known}, got {name!r}")
        model["block_activate"] = HF_ACTIVATIONS[name]
    if f"{first}.ln1.emb.weight" in state:
        model["timestep_type"] = "adalayernorm"
        model["diffusion_steps"] = foreign.shape(state, f"{first}.ln1.emb.weight", 2)[0]
    if condition == "text":
        model["condition_dim"] = foreign.shape(state, f"{first}.attn2.key.weight", 2)[1]
    if condition == "class":
        model["class_number"] = foreign.shape(state, f"{first}.ln2.emb.weight", 2)[0]
    return model


def _check_text(state: State) -> None:
    """Refuse a text encoder that is none of OpenAI's."""
    _none_left([k for k in state if not re.match(CLIP_PARTS, k)], "the text encoder")
    for name in ("token_embedding.weight", "positional_embedding", "text_projection"):
        foreign.shape(state, name, 2)
    try:
        with torch.device("meta"):
            openai_clip_text({k: v.to("meta") for k, v in state.items()})
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the text encoder is none of OpenAI's: {error}") from error


def _none_left(keys: list[str], what: str) -> None:
    if keys:
        raise ValueError(f"{what} has {len(keys)} left over, first {min(keys)!r}")


def _without(state: State, prefix: str) -> State:
    """Drop a prefix that every key must have."""
    _none_left([k for k in state if not k.startswith(prefix)], "the checkpoint")
    return {k.removeprefix(prefix): v for k, v in state.items()}
