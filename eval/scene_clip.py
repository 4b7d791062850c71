"""A small open_clip model of scenes and their captions, for clip_scenes."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import file_hash
from data.scene_captions import caption, caption_in_part, parse
from data.scene_drawing import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    place,
    sample_scene,
)
from eval.classifier_config import ClassifierConfig
from eval.classifier_data import IGNORE, fresh_scenes, to_tensor, wear
from eval.classifier_network import (
    FREE,
    descend,
    encode,
    encode_asked,
    find_weights,
    save_half,
    shrink,
)
from lightning_modules.common.checkpoint import load_strict, load_weights

# every word of data/scene_captions.py; a dozen tokens where bytes would need ninety
WORDS = (
    *(*COLORS, *SHAPES, *SIZES, *BACKGROUNDS),
    *"a above and background below left of on over picture right the them to under".split(),
)
IN_PART = 0.3  # share of the captions in part in the later training, more than generators see
PAD, UNKNOWN, FIRST = 0, 1, 2
END = FIRST + len(WORDS)  # open_clip pools the text at its largest id: the end token


@dataclass(frozen=True)
class ClipConfig:
    """Settings of the CLIP of scenes and of its training."""

    resolution: int = 32
    """Width and height of the pictures that it learns from."""
    max_objects: int = 2
    """Most things in a scene, 2 to 4."""
    embed_dim: int = 64
    """Numbers in the shared space."""
    width: int = 64
    """Channels of both towers."""
    image_layers: int = 3
    """Transformer blocks of the image tower."""
    text_layers: int = 3
    """Transformer blocks of the text tower."""
    steps: int = 2500
    """Training steps."""
    batch_size: int = 64
    """Pairs in a step; half of them differ from the other half in one respect."""
    lr: float = 2e-3
    """Highest learning rate of the one-cycle schedule."""
    seed: int = 0
    """Seed of the scenes and the weights."""

    @property
    def pictures(self) -> ClassifierConfig:
        """The classifier's settings for the same kind of pictures."""
        return ClassifierConfig(self.resolution, self.max_objects)

    @property
    def context(self) -> int:
        """Longest text in words, end token included."""
        return 24 if self.max_objects == 2 else 40


class SceneClip(nn.Module):
    """Pictures and texts to one space.

    Attributes:
        name: what scored: settings and hash of the weights, stored beside every score.
    """

    def __init__(self, config: ClipConfig, name: str = "untrained clip") -> None:
        super().__init__()
        self.config, self.name = config, name
        size, context = config.pictures.input_size, config.context
        tower = {"width": config.width, "mlp_ratio": 4.0}
        vision = {"layers": config.image_layers, "head_width": 16}
        vision |= {"image_size": size, "patch_size": size // 8}
        text = {"layers": config.text_layers, "heads": config.width // 16}
        text |= {"context_length": context, "vocab_size": END + 1, "no_causal_mask": True}
        self.clip = open_clip.model.CLIP(
            config.embed_dim, vision_cfg=tower | vision, text_cfg=tower | text
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Map pictures [B, 3, S, S] in [0, 1] to unit vectors [B, E]."""
        return self.clip.encode_image(2 * images - 1, normalize=True)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Map texts to unit vectors [B, E]."""
        tokens = tokenize(texts, self.config.context).to(self.clip.logit_scale.device)
        return self.clip.encode_text(tokens, normalize=True)

    @torch.inference_mode()
    def cosine(self, images: Tensor, texts: list[str], batch_size: int = 256) -> Tensor:
        """Return the cosine of each picture with its own text.

        Args:
            images: [N, 3, H, W] uint8, any size.
            texts: N captions.
            batch_size: pairs at once; without influence on the result.

        Returns:
            [N] float32 on the CPU.

        Raises:
            ValueError: pictures and texts differ in number.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} pictures and {len(texts)} captions do not pair up")
        device, cosines = self.clip.logit_scale.device, []
        for first in range(0, len(texts), batch_size):
            part = slice(first, first + batch_size)
            pixels = shrink(images[part].to(device), self.config.pictures.input_size)
            pair = self.encode_images(pixels) * self.encode_texts(texts[part])
            cosines.append(pair.sum(dim=1).float().cpu())
        return torch.cat(cosines)


def tokenize(texts: list[str], context: int) -> Tensor:
    """Return word tokens [B, context] int64: words, the end token, zeros; cut to the context.

    Case and punctuation do not count; a word that no caption of scenes has is `UNKNOWN`.
    """
    tokens = torch.full((len(texts), context), PAD)
    for row, text in zip(tokens, texts, strict=True):
        words = re.findall(r"\w+", text.lower())[: context - 1]
        ids = [FIRST + WORDS.index(w) if w in WORDS else UNKNOWN for w in words] + [END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def variant(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene that differs in one respect: two things swapped, or one attribute changed."""
    things = list(scene.things)
    if rng.random() < 0.4 and things[0] != things[1]:
        things[0], things[1] = things[1], things[0]
        return replace(scene, things=tuple(things))
    tables = {"color": COLORS, "shape": SHAPES, "size": SIZES}
    which, key = int(rng.integers(len(things))), str(rng.choice(list(tables)))
    others = [o for o in tables[key] if o != getattr(things[which], key)]
    things[which] = replace(things[which], **{key: str(rng.choice(others))})
    return replace(scene, things=tuple(things))


def training_caption(scene: Scene, rng: np.random.Generator, back: float) -> str:
    """Return a caption; with two things a share `back` of them names the second thing first.

    With both orders equally frequent a small text tower never finds out which thing is where:
    it would have to learn the order of mention and the word for it at once (an exclusive or).
    """
    if scene.layout not in ("row", "column"):
        return caption(scene, rng)
    wanted = rng.random() < back
    while True:
        text = caption(scene, rng)
        if wanted == (not {"right", "below", "under"}.isdisjoint(text.split())):
            return text


def text_labels(text: str, config: ClassifierConfig) -> list[int]:
    """Return the labels that a caption alone tells, `IGNORE` where it does not."""
    labels = encode_asked(parse(text), config)
    told = 2 if labels[0] == FREE else len(labels)  # without a layout no thing has a place
    return [IGNORE if n >= told or label == FREE else label for n, label in enumerate(labels)]


def train_clip(config: ClipConfig) -> SceneClip:
    """Train both towers on fresh pairs.

    The loss is CLIP's (2103.00020, figure 3) plus the cross-entropy of one linear layer, shared by
    pictures and texts and dropped afterwards, that reads the attributes off the embeddings: it
    brings small towers there in minutes. The result depends on `config` alone (on one machine).
    """
    rng = np.random.default_rng([config.seed, 0xC11F])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = SceneClip(config)
        sizes = [len(o) + 1 for o in config.pictures.heads]
        reader = nn.Linear(config.embed_dim, sum(sizes))
    own = torch.arange(config.batch_size)

    def total_loss(step: int) -> Tensor:
        half = [sample_scene(rng, config.max_objects) for _ in range(config.batch_size // 2)]
        shown = half + [variant(scene, rng) for scene in half]
        drawn = [draw_scene(s, place(s, rng), config.resolution) for s in shown]
        pixels = shrink(to_tensor(drawn), config.pictures.input_size)
        late = step >= 0.6 * config.steps  # the hard part comes when the easy one is learned
        if late:
            pixels = wear(pixels, generator)
        truth = torch.tensor([encode(asdict(s), config.pictures) for s in shown])
        images = model.encode_images(pixels)  # [B, E]
        captions = [training_caption(s, rng, 0.5 if late else 0.2) for s in shown]
        if late:
            captions = [
                caption_in_part(s, rng) if rng.random() < IN_PART else text
                for s, text in zip(shown, captions, strict=True)
            ]
        told = torch.tensor([text_labels(text, config.pictures) for text in captions])
        texts = model.encode_texts(captions)
        logits = model.clip.logit_scale.exp().clamp(max=50) * images @ texts.T  # [B, B]
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        for embedding, known in ((images, truth), (texts, told)):
            # unit vectors are scaled up so that a linear reader can be sure of itself
            read = reader(8 * embedding).split(sizes, 1)
            for row, column in zip(read, known.T, strict=True):
                loss = loss + F.cross_entropy(row, column, ignore_index=IGNORE) / 2
        return loss

    weights = [*model.parameters(), *reader.parameters()]
    descend("clip", total_loss, weights, config.lr, config.steps, most=1.0)
    return model.eval()


@torch.inference_mode()
def retrieval_accuracy(model: SceneClip, count: int = 1000, among: int = 100) -> float:
    """Return the share of fresh pictures whose own caption is the closest of `among` captions."""
    images, _, captions = fresh_scenes(count, model.config.pictures, seed=765_432)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = shrink(images[order], model.config.pictures.input_size)
    hits = []
    for first in range(0, len(order) - among + 1, among):
        part = slice(first, first + among)
        texts = model.encode_texts([captions[i] for i in order[part]])
        best = (model.encode_images(pixels[part]) @ texts.T).argmax(dim=1)  # [among]
        hits.append(best == torch.arange(among))
    return float(torch.cat(hits).double().mean())


def load_clip(resolution: int = 32, max_objects: int = 2, folder: Path | None = None) -> SceneClip:
    """Return the CLIP of this kind of picture: shipped, or trained once in `folder`."""
    config = ClipConfig(resolution=resolution, max_objects=max_objects)

    def train(path: Path) -> None:
        save_clip(train_clip(config), path)

    return read_clip(find_weights("clip", config.pictures, folder, train))


def save_clip(model: SceneClip, path: Path, command: str = "") -> None:
    """Write a model with its settings and the command that makes it."""
    save_half(path, model, {"clip": asdict(model.config), "command": command})


def read_clip(path: Path) -> SceneClip:
    """Read what `save_clip` wrote."""
    state, config = load_weights(path)
    settings = ClipConfig(**config["clip"])
    name = (
        f"scene CLIP (open_clip, width {settings.width}), {settings.resolution} px, "
        f"{settings.max_objects} objects, seed {settings.seed}, sha256 {file_hash(path)[:12]}"
    )
    model = SceneClip(settings, name)
    load_strict(model, {k: v.float() for k, v in state.items()}, str(path))
    return model.eval()
