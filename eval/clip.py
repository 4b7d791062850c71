"""CLIP: the cosine of picture and caption, image embeddings, and preference scores."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.interval import Score, Scored, mean_score
from eval.metric import Metric
from eval.networks import Images, content_of, exact, in_threads, load_torchscript
from eval.rows import Asked, Measure, Measured
from eval.spaces import SPACES
from lightning_modules.common.checkpoint import load_foreign, load_strict

Crop = Literal["resize first", "crop first", "pad"]
COSINE = "cosine.clip"
HESSEL = 2.5  # of CLIPScore
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "raw cosine": lambda cosine: cosine,
    "2.5 max(cosine, 0)": lambda cosine: HESSEL * cosine.clamp(min=0),
    "100 cosine": lambda cosine: 100 * cosine,
}
PREFERENCES = {"hpsv2": "raw cosine", "pickscore": "logit scale x cosine"}
SHOWN = {
    "clip_score": Metric("CLIP score", "cosine of picture and caption", better="higher"),
    "hpsv2": Metric("HPSv2", "human preference score, a cosine", better="higher"),
    "pickscore": Metric("PickScore", "human preference score", better="higher"),
    "clip_score_real": Metric("CLIP score, real", "the same for real pictures"),
}
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's files


def clip_measure(
    model: str,
    path: Path,
    device: torch.device | str,
    *,
    kind: str,
    features: bool,
    texts: bool,
    prefix: str,
    crop: Crop,
) -> Measure:
    """Return what makes the rows of `ClipRows`, whose fields these are."""
    import open_clip

    network = load_clip(model, path).to(device)
    tokenize = open_clip.get_tokenizer(model)
    name = f"{kind}: open_clip {model} ({content_of(path)})"
    prepare = image_transform(network, crop)
    row = f"preference.{kind}" if kind in PREFERENCES else COSINE
    said = f", prefix {prefix!r}" if prefix else ", no prefix"

    def measure(images: Images, asked: Asked, first: int) -> Measured:
        rows, models = {}, {}
        with exact():
            pixels = torch.stack(in_threads(prepare, images)).to(device)
            shown = unit(network.encode_image(pixels))  # [B, E]
            if features:
                rows[SPACES["clip"].rows], models[SPACES["clip"].rows] = shown, name
            if texts:
                said_of = unit(network.encode_text(tokenize(captions(asked, prefix)).to(device)))
                cosine = (shown * said_of).sum(dim=1)  # [B]
                scale = network.logit_scale.exp() if kind == "pickscore" else 1.0
                rows[row], models[row] = scale * cosine, name + said
        return Measured({k: v.float().cpu().numpy() for k, v in rows.items()}, models=models)

    return measure


def captions(asked: Asked, prefix: str = "") -> list[str]:
    """Return what was asked of each picture as text, its spaces at the ends removed.

    Raises:
        ValueError: a picture of which no text is known.
    """
    found = []
    for place, one in enumerate(asked):
        text = one.get("prompt", one.get("caption"))
        if text is None:
            raise ValueError(f"picture {place} has no caption, so it has no CLIP score")
        found.append(prefix + text.strip())
    return found


def unit(rows: Tensor) -> Tensor:
    """Scale rows [n, d] to unit length, float32."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def image_transform(network: Any, crop: Crop) -> Callable[[np.ndarray], Tensor]:
    """Return what prepares a picture [3, H, W] uint8 for a model of open_clip: [3, S, S].

    Args:
        network: the model.
        crop: "resize first" = open_clip's own: the short side is resized, the centre cut (offsets
            rounded); "crop first" = CMMD's: the largest centre square (offsets rounded down) is
            resized; "pad" = HPSv2's: the long side is resized, the rest is black. Square pictures
            do not tell them apart.
    """
    import open_clip

    visual = network.visual
    side = visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    fit = "longest" if crop == "pad" else "shortest"
    transform = open_clip.image_transform(side, is_train=False, mean=mean, std=std, resize_mode=fit)

    def prepare(image: np.ndarray) -> Tensor:
        if crop == "crop first":
            height, width = image.shape[1:]
            least = min(height, width)
            top, left = (height - least) // 2, (width - least) // 2
            image = image[:, top : top + least, left : left + least]
        return transform(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))

    return prepare


def load_clip(model: str, path: Path) -> Any:
    """Build a model of open_clip from a file in its own, OpenAI's or transformers' layout.

    Raises:
        ValueError: open_clip has no such model, or the file is of another one.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}; its list_models() names all")
    state = openai_state(path) if is_script(path) else load_foreign(path)
    if any(key.startswith("vision_model.") for key in state):
        state = open_clip_state(state)
    with torch.random.fork_rng(devices=[]):
        network = open_clip.create_model(model)
    load_strict(network, {k: v.float() for k, v in state.items()}, str(path))
    return network.eval().requires_grad_(False)


def is_script(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, as OpenAI's CLIP models are."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def openai_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model of OpenAI, which is not run."""
    state = load_torchscript(path, "cpu").state_dict()
    return {k: v for k, v in state.items() if k not in NOT_WEIGHTS}


PARTS = {  # of transformers -> of open_clip
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
}
INSIDE = {  # of a layer
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a CLIPModel of transformers the names of open_clip."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids") or ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        if key in ("text_projection.weight", "visual_projection.weight"):
            key, value = "text_projection" if key.startswith("t") else "visual.proj", value.T
        for old, new in PARTS.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        for old, new in INSIDE.items():
            key = key.replace(f".{old}.", f".{new}.")
        found[key] = value
    return found


def clip_score(cosine: Tensor, scale: str = "raw cosine") -> float:
    """Return the mean of cosines [N] under a convention of `SCALES`.

    "2.5 max(cosine, 0)" is CLIPScore (Hessel et al., 2104.08718, section 3); "100 cosine" that of
    torchmetrics, where the mean, not each picture, is cut off at 0.
    """
    mean = float(SCALES[scale](cosine.double()).mean())
    return max(mean, 0.0) if scale == "100 cosine" else mean


def score_clip(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by the mean raw cosine with their captions, see `eval.scorers.Scorer`.

    Args:
        made: rows "cosine.clip" of `ClipRows` with `texts`.
        asked: not looked at.
        reference: such rows of real pictures with their own captions, or nothing.
        prefix, what: see there.

    Returns:
        scores: `prefix`/clip_score with "model", "scale" and the same numbers in the other
            conventions; with a reference /clip_score_real.
        verdicts: empty ones.

    Raises:
        ValueError: no such rows.
    """
    if COSINE not in made.rows:
        raise ValueError("there are no cosines of pictures and captions; measure with ClipRows")
    scores: dict[str, Score] = {}
    for name, one in (("clip_score", made), ("clip_score_real", reference)):
        if one is not None and COSINE in one.rows:
            cosine = torch.from_numpy(one.rows[COSINE])
            others = {scale: clip_score(cosine, scale) for scale in SCALES}
            own = {"model": one.models[COSINE], "scale": "raw cosine", "scales": others}
            scores[f"{prefix}/{name}"] = mean_score(cosine, **{**own, **what})
    return scores, [{} for _ in range(len(made))]


def score_preference(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by what a model of human preferences says of them and their captions.

    Args:
        made: rows "preference..." of `ClipRows`.
        asked: not looked at.
        reference: not looked at.
        prefix, what: see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/hpsv2 and /pickscore, those that were measured.
        verdicts: empty ones.

    Raises:
        ValueError: none was.
    """
    scores = {
        f"{prefix}/{kind}": mean_score(
            made.rows[f"preference.{kind}"],
            **{"model": made.models[f"preference.{kind}"], "scale": scale, **what},
        )
        for kind, scale in PREFERENCES.items()
        if f"preference.{kind}" in made.rows
    }
    if not scores:
        raise ValueError("there are no preferences; measure with ClipRows of hpsv2 or pickscore")
    return scores, [{} for _ in range(len(made))]
