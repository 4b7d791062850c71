"""DINOv2 features, as dgm-eval makes them: bicubic to 224 px, the class token after the norm."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.networks import Images, content_of, exact, in_threads
from eval.rows import Asked, Measure, Measured
from eval.spaces import SPACES
from lightning_modules.common.checkpoint import load_foreign

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = 64  # numbers per head of all sizes of DINOv2
OFFSET = 0.1  # pixels that the released code adds to the size of resized positions
# names of the released file -> names of transformers
NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
)


def dino_measure(path: Path, device: torch.device | str) -> Measure:
    """Return what makes the rows of `DinoRows`."""
    name, network = SPACES["dinov2"].rows, load_dino(path).to(device)
    model = f"DINOv2, class token, 224 px bicubic ({content_of(path)})"

    def measure(images: Images, asked: Asked, first: int) -> Measured:
        with exact():
            pixels = torch.stack(in_threads(ready, images)).to(device)  # [B, 3, 224, 224]
            found = network(pixels).last_hidden_state[:, 0]
        return Measured({name: found.float().cpu().numpy()}, models={name: model})

    return measure


def ready(image: np.ndarray) -> Tensor:
    """Resize a picture [3, H, W] uint8 without a crop and normalise it: [3, 224, 224] float32."""
    whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(small, np.float32).transpose(2, 0, 1)) / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (values - mean) / std


def load_dino(path: Path) -> Any:
    """Build the network from the released file, or from a file or folder of transformers.

    Raises:
        ValueError: other weights.
    """
    from transformers import Dinov2Config, Dinov2Model

    state = dino_state(load_foreign(path))
    try:
        width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
        positions = state["embeddings.position_embeddings"]
    except KeyError as error:
        raise ValueError(f"{path} holds no DINOv2: it has no {error.args[0]}") from error
    layers = {k.split(".")[2] for k in state if k.startswith("encoder.layer.")}
    gated = any(".mlp.weights_in." in k for k in state)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD),
        image_size=SIDE,
        patch_size=patch,
        use_swiglu_ffn=gated,
    )
    state["embeddings.position_embeddings"] = resized_positions(positions, SIDE // patch)
    state.setdefault("embeddings.mask_token", torch.zeros(1, width))  # of training only
    # in memory transformers calls some tensors otherwise than in files
    loaded: Any = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
    )
    network, found = loaded
    wrong = sorted(str(k) for kind in found.values() for k in kind)
    if wrong:
        raise ValueError(f"{path} is no DINOv2: {len(wrong)} tensors do not fit, first {wrong[0]}")
    return network.eval().requires_grad_(False)


def dino_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of the released layout the names of transformers; others stay."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("dinov2.")
        block = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if block:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            for part, own in parts:
                name = f"encoder.layer.{block[1]}.attention.attention.{part}.{block[2]}"
                found[name] = own
            continue
        key = re.sub(r"\.mlp\.w12\.", ".mlp.weights_in.", key)
        key = re.sub(r"\.mlp\.w3\.", ".mlp.weights_out.", key)
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Resize learned positions to another grid, as the released DINOv2 does.

    Bicubic with the scale (side + 0.1) / old side, whose small offset moves every place a little.

    Args:
        positions: [1, 1 + n * n, D], that of the class token first.
        side: height and width of the grid.

    Returns:
        [1, 1 + side * side, D].
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # [1, D, side, side]
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([positions[:, :1].float(), grid], dim=1)
