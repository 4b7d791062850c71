"""Inception-v3 as clean-fid runs it: pool3, spatial features, classes; and Inception Score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid import inception_pytorch
from PIL import Image
from torch import Tensor

from eval.interval import Score, Scored, Z
from eval.metric import Metric
from eval.networks import (
    Images,
    content_of,
    exact,
    in_threads,
    load_torchscript,
    of_one_size,
)
from eval.rows import Asked, Measure, Measured
from eval.spaces import INCEPTION
from lightning_modules.common.checkpoint import load_foreign

Mode = Literal["clean", "legacy_tensorflow", "legacy_pytorch"]
SPACE_OF: dict[Mode, str] = {
    "clean": "inception",
    "legacy_tensorflow": "inception_tf",
    "legacy_pytorch": "inception_pt",
}
SIDE = 299
SPATIAL = 7  # channels of mixed_6's first convolution that sFID looks at
SPLIT = 5000  # pictures whose Inception Score is averaged, as in ADM's evaluator
SHOWN = {
    space.named("inception_score"): Metric(
        f"Inception Score{space.suffix.replace('_', ' ').upper()}",
        f"mean over parts of 5,000 pictures, {space.what}",
        better="higher",
    )
    for space in INCEPTION.values()
}


def inception_measure(
    path: Path, mode: Mode, device: torch.device | str, *, spatial: bool, classes: bool
) -> Measure:
    """Return what makes the rows of `InceptionRows`, whose fields these are.

    Raises:
        ValueError: a file that is no such network, or extras that the mode cannot give.
    """
    if mode == "legacy_pytorch" and (spatial or classes):
        raise ValueError("mode legacy_pytorch gives pool3 features only")
    space = INCEPTION[SPACE_OF[mode]]
    model = f"{space.what} ({content_of(path)})"
    run = pytorch_runner(path, device) if mode == "legacy_pytorch" else None
    script: Any = None if run is not None else load_script(path, device)

    def measure(images: Images, asked: Asked, first: int) -> Measured:
        rows: dict[str, Tensor] = {}
        with exact():
            if run is not None:
                rows[space.rows] = run(torch.stack(in_threads(pytorch_resize, images)).to(device))
            elif mode == "clean":
                pixels = torch.stack(in_threads(clean_resize, images)).to(
                    device
                )  # [B, 3, 299, 299]
                found = script_layers((pixels - 128) / 128, script, spatial)
                rows = dict(zip((space.rows, space.spatial), found, strict=False))
            else:
                rows = tensorflow_rows(images, script, spatial, device, space.rows, space.spatial)
            if classes:
                logits = rows[space.rows] @ script.output.weight.T  # [B, 1008]
                rows[space.probabilities] = logits.softmax(dim=1)
        kept = {name: value.float().cpu().numpy() for name, value in rows.items()}
        return Measured(kept, models=dict.fromkeys(kept, model))

    return measure


def clean_resize(image: np.ndarray) -> Tensor:
    """Resize a picture [3, H, W] uint8 as clean-fid does in mode clean: [3, 299, 299] float32.

    Pillow's bicubic, which is antialiased, of each channel as float32; cut off at 0 and 255, not
    rounded.
    """
    made = np.empty((3, SIDE, SIDE), np.float32)
    for k, channel in enumerate(image):
        whole = Image.fromarray(channel.astype(np.float32))
        small = whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        np.clip(np.asarray(small), 0, 255, out=made[k])
    return torch.from_numpy(made)


def pytorch_resize(image: np.ndarray) -> Tensor:
    """Resize a picture [3, H, W] uint8 as pytorch-fid does: bilinear, without antialias."""
    pixels = torch.from_numpy(image)[None].float()
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def load_script(path: Path, device: torch.device | str) -> Any:
    """Load the TorchScript network whose `layers` end in pool3 and whose `output` are classes.

    Raises:
        ValueError: the file is none.
    """
    try:
        script = load_torchscript(path, device).eval()
        _ = script.layers, script.output.weight
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no TorchScript Inception with layers and output, as "
            "inception-2015-12-05.pt is"
        ) from error
    return script


def script_layers(x: Tensor, script: Any, spatial: bool) -> tuple[Tensor, ...]:
    """Run the layers one by one.

    Args:
        x: [B, 3, 299, 299] in [-1, 1].
        script: of `load_script`.
        spatial: also return what mixed_6's first convolution gives.

    Returns:
        pool3 [B, 2048], and spatial [B, 17 * 17 * 7], channels last as in ADM's evaluator.
    """
    if not spatial:
        return (script.layers(x).flatten(1),)
    between = None
    for name, layer in script.layers.named_children():
        if name == "mixed_6":
            between = layer.conv(x)[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = layer(x)
    if between is None:
        raise ValueError("the Inception file has no layer mixed_6, so there is no sFID")
    return x.flatten(1), between


def tensorflow_rows(
    images: Images,
    script: Any,
    spatial: bool,
    device: torch.device | str,
    pool: str,
    between: str,
) -> dict[str, Tensor]:
    """Return the rows of mode legacy_tensorflow: the network resizes, pictures of one size."""
    rows: dict[str, Tensor] = {}
    for places, batch in of_one_size(images):
        pixels = batch.to(device).float()
        found = {pool: script(pixels, return_features=True).flatten(1)}
        if spatial:
            x = (tensorflow_resize(pixels) - 128) / 128
            found[between] = script_layers(x, script, spatial)[1]
        for name, values in found.items():
            rows.setdefault(name, values.new_empty(len(images), values.shape[1]))[places] = values
    return rows


def tensorflow_resize(images: Tensor, side: int = SIDE) -> Tensor:
    """Resize as TensorFlow 1 does: bilinear from place i * H / side, without antialias.

    Args:
        images: [B, 3, H, W] float.
        side: height and width of the result.

    Returns:
        [B, 3, side, side].
    """

    def lines(length: int) -> tuple[Tensor, Tensor, Tensor]:
        # places in float32, as TensorFlow has them: far to the right they are off by 1e-4 pixels
        place = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side)
        low = place.floor().long()
        share = (place - low).to(images)
        return low.to(images.device), (low + 1).clamp(max=length - 1).to(images.device), share

    top, bottom, down = lines(images.shape[2])
    left, right, along = lines(images.shape[3])
    rows = images[:, :, top] + (images[:, :, bottom] - images[:, :, top]) * down[:, None]
    return rows[..., left] + (rows[..., right] - rows[..., left]) * along


def pytorch_runner(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Return pytorch-fid's network as clean-fid has it: [B, 3, 299, 299] in [0, 255] to pool3."""
    state = load_foreign(path)
    # clean-fid downloads the file itself, without a checksum
    with (
        patch.object(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
        except RuntimeError as error:
            raise ValueError(f"{path} is no Inception of pytorch-fid") from error
    network = network.eval().to(device)
    return lambda pixels: network(pixels / 255)[0].flatten(1)


def inception_score(probabilities: Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the Inception Score and the standard error of its logarithm.

    exp of the mean KL divergence of p(y|x) from its mean over the part (Salimans et al.,
    1606.03498, section 4), averaged over parts of 5,000 pictures in a seeded order.

    Args:
        probabilities: [N, 1008] of the classes.
        seed: of the order.
    """
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    scores, gains = [], []
    for part in order.split(SPLIT):
        p = probabilities[part].double()
        gain = torch.xlogy(p, p).sum(dim=1) - p @ p.mean(dim=0).clamp(min=1e-300).log()  # [n]
        scores.append(gain.mean().exp())
        gains.append(gain)
    all_gains = torch.cat(gains)
    error = float(all_gains.std()) / len(all_gains) ** 0.5
    return float(torch.stack(scores).mean()), error


def score_inception(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by the Inception Score, see `eval.scorers.Scorer`.

    Args:
        made: rows "probabilities..." of `InceptionRows` with `classes`.
        asked: not looked at.
        reference: not looked at.
        prefix: put before the names.
        what: "seed" orders the pictures.

    Returns:
        scores: `prefix`/inception_score (or _tf).
        verdicts: empty ones.

    Raises:
        ValueError: no such rows, or fewer than 2 pictures.
    """
    scores: dict[str, Score] = {}
    about = {k: v for k, v in what.items() if k not in ("resamples", "seed")}
    for space in INCEPTION.values():
        if space.probabilities not in made.rows:
            continue
        rows = torch.from_numpy(made.rows[space.probabilities])
        if len(rows) < 2:
            raise ValueError(f"an Inception Score needs at least 2 pictures, got {len(rows)}")
        value, error = inception_score(rows, what.get("seed", 0))
        ends = {k: value * float(np.exp(s * Z * error)) for k, s in (("low", -1), ("high", 1))}
        own = {"model": made.models[space.probabilities], "split": min(len(rows), SPLIT)}
        name = f"{prefix}/{space.named('inception_score')}"
        scores[name] = {"value": value, **ends, "n": len(rows), **own, **about}
    if not scores:
        raise ValueError("there are no class probabilities; measure with InceptionRows(classes)")
    return scores, [{} for _ in range(len(made))]
