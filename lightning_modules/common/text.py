"""Text encoders: captions in, a Condition out. Frozen ones stay outside every state dict."""

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from lightning_modules.common.checkpoint import load_foreign, load_strict
from lightning_modules.common.config import TextConfig


@dataclass
class Condition:
    """What a generator is conditioned on."""

    tokens: Tensor
    """[B, L, D] float, one vector per text token."""
    mask: Tensor | None = None
    """[B, L] bool, True where a token is real; None where all are attended."""
    pooled: Tensor | None = None
    """[B, P] float, one text vector per caption, or None."""
    image: Tensor | None = None
    """[B, P] float, one image vector per sample, or None."""

    def rows(self) -> list[Tensor]:
        """Return the vectors [L, D] of every caption, without padding that is masked."""
        masks = [slice(None)] * len(self.tokens) if self.mask is None else list(self.mask)
        return [tokens[mask] for tokens, mask in zip(self.tokens, masks, strict=True)]


@lru_cache(maxsize=100_000)
def ngram_ids(word: str, buckets: int) -> tuple[int, ...]:
    """Hash a word's byte n-grams, n = 3 to 6, and the whole word into table rows.

    The bag of n-grams with word borders `<` and `>` is that of fastText (Bojanowski et al. 2017,
    section 3.2), taken over UTF-8 bytes.

    Args:
        word: any non-empty text without spaces.
        buckets: number of rows; ids lie in 0..buckets-1.
    """
    data = b"<" + word.encode(errors="replace") + b">"  # JSON may hold half a surrogate pair
    grams = {data} | {data[i : i + n] for n in range(3, 7) for i in range(len(data) - n + 1)}
    return tuple(sorted(zlib.crc32(gram) % buckets for gram in grams))


class ByteEncoder(nn.Module):
    """A small text encoder over bytes, trained together with the generator.

    A word is the mean of the embeddings of its hashed byte n-grams; a bidirectional GRU relates
    the words, which learns who stands left of whom from far fewer captions than attention does.
    No vocabulary and no files are needed, and an unseen word shares the n-grams of its relatives.
    The empty caption is one learned token.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        # row `buckets` is the empty caption
        self.ngrams = nn.EmbeddingBag(config.buckets + 1, config.width, mode="mean")
        self.gru = nn.GRU(
            config.width, config.width // 2, config.layers, batch_first=True, bidirectional=True
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions to tokens [B, L, width], L the longest, with mask and mean [B, width]."""
        empty = ((self.config.buckets,),)
        words = [
            [ngram_ids(w, self.config.buckets) for w in self.split(c)] or empty for c in captions
        ]
        lengths = torch.tensor([len(w) for w in words])
        flat = [ids for caption in words for ids in caption]
        offsets = torch.tensor([0] + [len(ids) for ids in flat[:-1]], device=device).cumsum(0)
        ids = torch.tensor([i for ids in flat for i in ids], device=device)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)  # [B, L]
        bags = self.ngrams(ids, offsets)  # [words, D]
        x = bags.new_zeros(*mask.shape, self.width)  # [B, L, D]
        x[mask] = bags
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        related, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        tokens = self.norm(x + related)
        share = mask / mask.sum(1, keepdim=True)  # of a word in its caption's mean
        return Condition(tokens, mask, (tokens * share[..., None]).sum(1))

    def split(self, caption: str) -> list[str]:
        """Split a caption at spaces and around punctuation, cut to max_length words."""
        spaced = "".join(c if c.isalnum() or c in "-'_" else f" {c} " for c in caption.lower())
        return spaced.split()[: self.config.max_length]


class KnownStates:
    """What a frozen encoder made of some captions before, and of the empty one.

    Args:
        captions: C texts.
        states: [T, D], the vectors of all captions and of the empty one, one behind the other.
        lengths: [C + 1], vectors of each.
        pooled: [C + 1, P], where the encoder has pooled vectors.
    """

    def __init__(
        self, captions: Sequence[str], states: Tensor, lengths: Tensor, pooled: Tensor | None = None
    ) -> None:
        # the empty one comes first, should a caption be empty too: both are the same
        self.places = {"": len(captions), **{text: i for i, text in enumerate(captions)}}
        self.rows = states.split(lengths.tolist())
        self.pooled = pooled

    def holds(self, captions: Sequence[str]) -> bool:
        """Say whether all captions are known."""
        return all(caption in self.places for caption in captions)

    def condition(self, captions: Sequence[str], masked: bool) -> Condition:
        """Return what the encoder would, in float32; `masked` with a mask of what is padding."""
        places = [self.places[caption] for caption in captions]
        rows = [self.rows[place] for place in places]
        tokens = pad_sequence([row.float() for row in rows], batch_first=True)  # [B, L, D]
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B, L]
        pooled = None if self.pooled is None else self.pooled[places].float()
        return Condition(tokens, mask if masked else None, pooled)


class FrozenEncoder(ABC):
    """A frozen model that is loaded at its first use, and not for captions whose states are known.

    A plain object, so that no generator that holds one has its weights in the state dict. Outside
    of training it remembers what it was asked last: several stages draw for the same captions, and
    guidance asks for the empty one with every batch.
    """

    REMEMBERED: ClassVar[int] = 3
    """Lists of captions: the asked ones, the empty one, and those to blend with or to avoid."""
    masked: ClassVar[bool] = False
    """Whether captions of different lengths are padded, and the padding is masked."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.known: KnownStates | None = None
        self._model: Any = None
        self._latest: dict[tuple[torch.device, tuple[str, ...]], Condition] = {}

    def __call__(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions, or return what is known of them."""
        if self.known is not None and self.known.holds(captions):
            return self.known.condition(captions, self.masked)
        if torch.is_grad_enabled():
            return self.encode(captions, device)
        asked = (device, tuple(captions))
        found = self._latest.pop(asked, None)
        self._latest[asked] = self.encode(captions, device) if found is None else found
        if len(self._latest) > self.REMEMBERED:
            del self._latest[next(iter(self._latest))]  # the one that was asked longest ago
        return self._latest[asked]

    @abstractmethod
    def encode(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions."""

    @abstractmethod
    def _load(self, device: torch.device) -> Any:
        """Make the model; ValueError names the setting that it cannot be made from."""

    def model(self, device: torch.device) -> Any:
        """Return the model on a device."""
        if self._model is None:
            # making a model draws; a resumed run makes it elsewhere
            with torch.random.fork_rng(devices=[]):
                self.use(self._load(device), device)
        return self._model

    def use(self, model: Any, device: torch.device) -> None:
        """Take a model that is there already."""
        self._latest.clear()
        self._model = model.eval().requires_grad_(False).to(device)


class OpenClipEncoder(FrozenEncoder):
    """Pooled text and image vectors of an open_clip model, not normalised.

    Images are resized to the square without a crop, as Paella's released code does (dome272/Paella:
    src_distributed).
    """

    def _load(self, device: torch.device) -> Any:
        import open_clip

        silenced = logging.root.manager.disable
        logging.disable(logging.ERROR)  # open_clip also logs what it raises
        try:
            model = open_clip.create_model(self.config.clip, self.config.clip_pretrained)
            self._tokenizer = open_clip.get_tokenizer(self.config.clip)
            return model
        except RuntimeError as error:
            raise ValueError(
                f"text.clip={self.config.clip} with text.clip_pretrained="
                f"{self.config.clip_pretrained} is no model of open_clip whose weights lie here or "
                "can be reached; download them and name the file"
            ) from error
        finally:
            logging.disable(silenced)

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions to pooled vectors [B, P] float32, also given as one token [B, 1, P]."""
        model = self.model(device)
        pooled = model.encode_text(self._tokenizer(captions).to(device)).float()
        return Condition(pooled[:, None], None, pooled)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to image vectors [B, P] float32."""
        model = self.model(images.device)
        size = model.visual.image_size  # an int or (height, width)
        size = size if isinstance(size, tuple) else (size, size)
        resized = nn.functional.interpolate(
            images, size=size, mode="bicubic", antialias=True, align_corners=False
        )
        mean, std = (
            torch.tensor(v, device=images.device).view(1, 3, 1, 1)
            for v in (model.visual.image_mean, model.visual.image_std)
        )
        return model.encode_image(((resized + 1) / 2 - mean) / std).float()


class T5Encoder(FrozenEncoder):
    """Hidden states of a T5 encoder (Muse: T5-XXL)."""

    masked = True
    usual = "google/t5-v1_1-xxl"

    def _load(self, device: torch.device) -> Any:
        from transformers import T5EncoderModel

        path, dtype = self.config.path, torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self._tokenizer = self._make_tokenizer(path)
            return T5EncoderModel.from_pretrained(path, dtype=dtype)
        except OSError as error:
            raise ValueError(
                f"text.path={path} is neither a folder with a T5 encoder nor "
                f"a hub name that can be reached; download {self.usual} and name its folder"
            ) from error

    def _make_tokenizer(self, path: str) -> Any:
        from transformers import T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(path)
        # without a vocabulary transformers makes one up, of the special tokens alone
        if tokenizer.unk_token_id in tokenizer("a").input_ids:
            raise ValueError(
                f"text.path={path} has no vocabulary; put the tokenizer.json or spiece.model of "
                f"{self.usual} beside the encoder"
            )
        return tokenizer

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions to hidden states [B, L, D] float32, L the longest."""
        t5 = self.model(device)
        batch = self._tokenizer(
            captions,
            padding="longest",
            truncation=True,
            max_length=self.config.max_length,
            return_tensors="pt",
        ).to(device)
        # the released code of Paella encodes and attends padding; hiding it equals encoding one
        # by one
        hide = self.config.mask_padding
        attention = batch["attention_mask"] if hide else torch.ones_like(batch["input_ids"])
        hidden = t5(input_ids=batch["input_ids"], attention_mask=attention).last_hidden_state
        return Condition(hidden.float(), attention.bool() if hide else None)


class ByT5Encoder(T5Encoder):
    """ByT5 hidden states with pooled open_clip vectors (Paella v3)."""

    usual = "google/byt5-xl"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._clip = OpenClipEncoder(config) if config.clip is not None else None

    def _make_tokenizer(self, path: str) -> Any:
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer()  # bytes need no vocabulary

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions to hidden states [B, L, D] and pooled vectors [B, P], float32."""
        states = super().encode(captions, device)
        if self._clip is not None:
            states.pooled = self._clip(captions, device).pooled
        return states

    def encode_images(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to CLIP image vectors [B, P].

        Raises:
            ValueError: the settings name no CLIP model.
        """
        if self._clip is None:
            raise ValueError("image vectors need text.clip; it is null in this checkpoint")
        return self._clip.encode_images(images)


CLIP_END = 49407


def clip_token_ids(captions: list[str], length: int, pad_id: int = 0) -> Tensor:
    """Tokenize as OpenAI's CLIP does: lower case, byte pairs, start 49406, end 49407.

    Args:
        captions: B texts; one that is too long is cut and keeps the end token.
        length: tokens per row, start and end among them.
        pad_id: what stands behind the end token.

    Returns:
        [B, length] int64.
    """
    import open_clip

    ids = open_clip.tokenize(captions, context_length=length)
    padding = (ids == CLIP_END).flip(1).cumsum(1).flip(1) == 0  # no end token here or further on
    return ids.masked_fill(padding, pad_id)


def openai_clip_text(state: Mapping[str, Tensor]) -> Any:
    """Build the text transformer of transformers from OpenAI's tensors.

    Args:
        state: token_embedding.weight, positional_embedding, transformer.resblocks.*, ln_final.*
            and text_projection; others (the image side) are ignored.

    Returns:
        A CLIPTextModelWithProjection in float32, with heads 64 wide and QuickGELU.

    Raises:
        ValueError: a tensor is missing, left over among the layers, or of wrong shape.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    rest = {k: v.float() for k, v in state.items() if v.is_floating_point()}
    layers = len({k.split(".")[2] for k in rest if k.startswith("transformer.resblocks.")})
    try:
        tokens, positions = rest.pop("token_embedding.weight"), rest.pop("positional_embedding")
        own = {
            "text_model.embeddings.token_embedding.weight": tokens,
            "text_model.embeddings.position_embedding.weight": positions,
            "text_projection.weight": rest.pop("text_projection").T,
        }
        for kind in ("weight", "bias"):
            own[f"text_model.final_layer_norm.{kind}"] = rest.pop(f"ln_final.{kind}")
            for i in range(layers):
                layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
                joint = rest.pop(f"{block}.attn.in_proj_{kind}")
                for name, part in zip("qkv", joint.chunk(3), strict=True):
                    own[f"{layer}.self_attn.{name}_proj.{kind}"] = part
                for ours, theirs in _OPENAI_LAYER.items():
                    own[f"{layer}.{ours}.{kind}"] = rest.pop(f"{block}.{theirs}.{kind}")
    except KeyError as error:
        raise ValueError(f"these are no weights of OpenAI's CLIP: there is no {error}") from error
    strange = sorted(k for k in rest if k.startswith("transformer."))
    if strange:
        raise ValueError(f"OpenAI's CLIP has no {strange[0]!r} ({len(strange)} left over)")
    width = tokens.shape[1]
    config = CLIPTextConfig(
        vocab_size=tokens.shape[0],
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=own["text_projection.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=positions.shape[0],
    )
    model = CLIPTextModelWithProjection(config)
    load_strict(model, own, "OpenAI's CLIP")
    return model


_OPENAI_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class ClipTextEncoder(FrozenEncoder):
    """Hidden states of a CLIP text transformer, padding included.

    VQ-Diffusion: the last hidden states behind the final norm, without the projection, each token
    divided by its L2 norm. Texts are padded to the model's length and nothing is masked.
    """

    def _load(self, device: torch.device) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        path = self.config.path
        projected = self.config.projected
        try:
            if Path(path).is_file():
                model = openai_clip_text(load_foreign(path))
                return model if projected else model.text_model
            kind = CLIPTextModelWithProjection if projected else CLIPTextModel
            return kind.from_pretrained(path, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text.path={path} is neither a folder with a CLIP text model, nor a file of "
                "OpenAI's weights, nor a hub name that can be reached; download "
                f"openai/clip-vit-base-patch32 and name its folder ({str(error).splitlines()[0]})"
            ) from error

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device) -> Condition:
        """Encode captions to tokens [B, L, D] float32, L the model's length, and pooled [B, P]."""
        length = self.model(device).config.max_position_embeddings
        return self.states(clip_token_ids(captions, length, self.config.pad_id).to(device))

    @torch.no_grad()
    def states(self, ids: Tensor) -> Condition:
        """Encode token ids [B, L] as `encode` does captions."""
        place, model = self.config.hidden_state, self.model(ids.device)
        found = model(input_ids=ids, output_hidden_states=place != -1)
        tokens = found.last_hidden_state if place == -1 else found.hidden_states[place]
        if self.config.unit_norm:
            tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        return Condition(tokens, None, found.text_embeds if self.config.projected else None)


TEXT_ENCODERS = {
    "bytes": ByteEncoder,
    "byt5": ByT5Encoder,
    "t5": T5Encoder,
    "open_clip": OpenClipEncoder,
    "clip": ClipTextEncoder,
}
