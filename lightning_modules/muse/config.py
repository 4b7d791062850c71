"""Every setting of Muse and the sizes of its networks (arXiv 2301.00704; huggingface/amused).

Sizes of Tables 4 and 6 are the paper's. What the paper leaves open (heads, norms, dropout, tying,
block size) is a setting whose default is ours.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lightning_modules.common.checks import (
    at_least,
    below_one,
    multiple,
    positive,
    require,
    within,
)
from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.interfaces import Geometry
from lightning_modules.samplers.settings import SamplerConfig, check_normalised, check_sampler

POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "sqrt": 0.5}
SCHEDULES = ("cosine", *POWERS, "exp", "log", "arccos")
Counting = Literal["strict", "maskgit", "halton", "halton_confidence", "lucidrains"]
Order = Literal["confidence", "random", "halton", "critic"]
Confidence = Literal["logp", "tempered", "logit"]


@dataclass
class ModelConfig:
    """Base transformer (section 2.3); defaults: the 3B of Table 4, 3,267,737,600 parameters."""

    num_codes: int = 8192
    """Number of codes of the tokenizer; the mask is one id more."""
    hidden: int = 2048
    """Width of the residual stream."""
    mlp: int = 8192
    """Width inside the MLP."""
    mlp_type: Literal["linear", "conv"] = "linear"
    """linear: two layers on every token. conv: two 3x3 convolutions on the token grid, as some
    VQ-Diffusions have them: not in the paper, but small networks learn shapes in far fewer steps.
    """
    layers: int = 48
    """Blocks of self-attention, cross-attention and MLP."""
    heads: int = 16
    """Attention heads (not published)."""
    max_side: int = 16
    """Longest side of the token grid that has positions."""
    positions: Literal["factorised", "flat"] = "factorised"
    """Learned 2D positions: a row's plus a column's vector, or one vector per cell."""
    text_width: int = 4096
    """Width of the text encoder's states (4096 is T5-XXL)."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm in front of each part, or after its sum with the residual (MaskGIT's BERT)."""
    qk_norm: bool = False
    """Normalise queries and keys of every head, with a learned gain per dimension."""
    dropout: float = 0.1
    """Dropout of the embeddings, the attention and after every part (MaskGIT's value)."""
    null_text: Literal["masked", "learned", "empty"] = "masked"
    """Dropped caption: no text key at all (section 2.7), one learned vector, or that of ''."""
    head_mlp: bool = True
    """A layer, GELU and LayerNorm in front of the output table ("an MLP", section 2.3)."""
    tied_head: bool = False
    """The output table is that of the input embeddings."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_codes", "hidden", "mlp", "layers", "heads", "max_side", "text_width")
        odd = f"heads must divide hidden, got {self.heads} heads for width {self.hidden}"
        require(self.hidden % self.heads == 0, odd)
        below_one(self, "dropout")

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return 1


@dataclass
class SuperResConfig(ModelConfig):
    """Super-resolution network (section 2.4); defaults: Table 6, 768,913,408 parameters."""

    hidden: int = 1024
    """Width of the residual stream, also of the low-res encoder."""
    mlp: int = 4096
    """Width inside the MLP, also of the low-res encoder."""
    layers: int = 32
    """Blocks over the high-res tokens."""
    heads: int = 16
    """Attention heads (not published); even, as half of them are local."""
    max_side: int = 64
    """Longest side of the high-res token grid."""
    low_num_codes: int = 8192
    """Number of codes of the low-res tokenizer."""
    low_layers: int = 16
    """Self-attention blocks of the low-res encoder."""
    low_max_side: int = 16
    """Longest side of the low-res token grid."""
    block: int = 8
    """Side of the local blocks of the multi-axis attention (not published)."""
    place_low: bool = False
    """Also add the encoded low-res tokens to the high-res ones at their places, besides attending
    to them: not in the paper, but learned in far fewer steps."""
    drop_low: bool = False
    """Hide the low-res tokens where the text is dropped; section 2.7 speaks of the text only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "low_num_codes", "low_max_side", "block")
        at_least(self, 0, "low_layers")
        require(self.heads % 2 == 0, f"heads must be even, got {self.heads}")
        if self.drop_low:
            placed = "drop_low must be false with place_low=true, which shows them at every place"
            require(not self.place_low, placed)
            left = f"drop_low needs null_text=learned, got {self.null_text}: something must be left"
            require(self.null_text == "learned", left)

    @property
    def grid_multiple(self) -> int:
        """What height and width of the high-res token grid must be multiples of."""
        return self.block


@dataclass
class UViTConfig:
    """aMUSEd's U-ViT by the names of its config.json; defaults: amused-256."""

    hidden_size: int = 1024
    """Width of the transformer."""
    num_hidden_layers: int = 22
    """Blocks of the transformer."""
    num_attention_heads: int = 16
    """Heads of the transformer."""
    intermediate_size: int = 2816
    """Width inside the transformer's gated MLP."""
    in_channels: int = 768
    """Width of a token's embedding and of the features in front of the output table."""
    block_out_channels: int = 768
    """Width of the convolutional blocks on both sides of the transformer."""
    block_num_heads: int = 12
    """Heads of the convolutional blocks' attention to the text."""
    num_res_blocks: int = 3
    """Convolutional blocks on each side."""
    downsample: bool = False
    """Halve the grid in front of the first blocks and double it after the last (amused-512)."""
    vocab_size: int = 8256
    """Rows of the input table; the last is the mask."""
    codebook_size: int = 8192
    """Number of codes of the tokenizer."""
    encoder_hidden_size: int = 768
    """Width of the text states."""
    cond_embed_dim: int = 768
    """Width of the pooled text vector."""
    micro_cond_encode_dim: int = 256
    """Width of the sinusoidal embedding of each micro-condition."""
    micro_cond_embed_dim: int = 1280
    """Width of all of them together (five: width, height, two of the crop, aesthetic score)."""
    layer_norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    hidden_dropout: float = 0.0
    """Dropout after the parts of the transformer and of the convolutional blocks."""
    attention_dropout: float = 0.0
    """Dropout after the convolutional blocks' attention to the text."""

    def __post_init__(self) -> None:
        blocks = {"num_attention_heads": "hidden_size", "block_num_heads": "block_out_channels"}
        sizes = ("intermediate_size", "in_channels", "codebook_size", "encoder_hidden_size")
        more = ("num_hidden_layers", "num_res_blocks", "cond_embed_dim", "micro_cond_embed_dim")
        at_least(self, 1, *blocks, *blocks.values(), *sizes, *more)
        for heads, width in blocks.items():
            count, size = getattr(self, heads), getattr(self, width)
            require(size % count == 0, f"{heads} must divide {width} ({size}), got {count}")
        codes, vocab, encode = self.codebook_size, self.vocab_size, self.micro_cond_encode_dim
        require(vocab > codes, f"vocab_size must be above codebook_size ({codes}), got {vocab}")
        require(encode >= 2 and encode % 2 == 0, "micro_cond_encode_dim must be even, at least 2")
        multiple("micro_cond_embed_dim", self.micro_cond_embed_dim, encode)
        below_one(self, "hidden_dropout", "attention_dropout")

    @property
    def num_codes(self) -> int:
        """Number of codes of the tokenizer."""
        return self.codebook_size

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return 2 if self.downsample else 1


# 3b and superres: Tables 4 and 6. The paper names a 632M base and a 268M super-resolution net for
# CC3M and gives no shapes: 632m (626,154,496) and 268m (268,169,216) are ours. aMUSEd's networks
# are the released ones (603,537,664 and 608,257,792 parameters).
MODELS: dict[str, ModelConfig] = {
    "3b": ModelConfig(),
    "632m": ModelConfig(hidden=1024, mlp=4096, layers=36),
}
SUPERRES_MODELS: dict[str, SuperResConfig] = {
    "3b": SuperResConfig(),
    "268m": SuperResConfig(hidden=768, mlp=3072, layers=20, low_layers=8, heads=12),
}
UVIT_MODELS: dict[str, UViTConfig] = {
    "amused-256": UViTConfig(),
    "amused-512": UViTConfig(downsample=True),
}


@dataclass
class CriticConfig:
    """Token-Critic (arXiv 2209.04439): a second net that tells sampled tokens from real ones."""

    layers: int = 0
    """Blocks of the critic, whose other sizes are the base's; 0 trains none."""
    weight: float = 1.0
    """Weight of its loss beside the generator's; the two networks share no parameters."""

    def __post_init__(self) -> None:
        at_least(self, 0, "layers")
        positive(self, "weight")


@dataclass
class ObjectiveConfig:
    """Masking, loss and how often a caption is hidden in training."""

    mask_law: str = "cosine"
    """Masked share r = schedule(u), u uniform: cosine is the paper's density 2/(pi sqrt(1-r^2));
    linear, square, cubic, sqrt, exp, log, arccos, or pow<p> such as pow2.5, 1 - u^p.
    """
    min_rate: float = 0.0
    """Least masked share (MaskGIT's released settings have 0.5)."""
    rectangle: float = 0.0
    """Share of samples whose masked tokens form a rectangle (aMUSEd-512: 0.15)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy over the codes."""
    reduction: Literal["tokens", "samples"] = "tokens"
    """Mean over all masked tokens of the batch, or per sample first (MaskGIT)."""
    visible_weight: float = 0.0
    """Loss weight of a token that is not masked; 0 leaves them out."""
    visible_law: Literal["constant", "rate"] = "constant"
    """rate: the weight rises from visible_weight at r = 0 to 1 at r = 1 (open-muse: 0.3)."""
    text_drop: float = 0.1
    """Share of training captions that are hidden (section 2.7)."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "min_rate", "rectangle", "visible_weight", "text_drop")
        below_one(self, "label_smoothing")
        check_schedule("mask_law", self.mask_law)

    def check_sampler(self, sampler: SamplerConfig, at: str, critic: bool = False) -> None:
        """Check that a network that was trained so fits a sampler, the setting `at`."""
        untrained = "" if self.visible_weight > 0 else "objective.visible_weight=0"
        own = {"untrained": untrained, "critic": critic, "at": at}
        check_sampler(sampler, masks=True, replaces=False, **own)  # type: ignore[arg-type]


@dataclass
class DecodeConfig:
    """Every setting of parallel decoding (section 2.8; MaskGIT) in which the references differ."""

    ALIASES: ClassVar[dict[str, tuple[str, ...]]] = {"guidance": ("guidance_end",)}

    steps: int = 12
    """Number of decoding steps."""
    schedule: str = "cosine"
    """Share of tokens that is still masked at ratio r of the steps: any of objective.mask_law."""
    counting: Counting = "strict"
    """strict: every step opens a token, and none is drawn twice; others as their code counts."""
    order: Order = "confidence"
    """Which tokens open first: the surest, random ones, a Halton sequence, or a critic's choice."""
    frozen: bool = True
    """Tokens that were opened stay; false masks the least sure of all decoded ones again."""
    confidence: Confidence = "logp"
    """log p of the drawn token; log p at the token temperature (tempered); or its raw logit."""
    choice_temperature: float = 4.5
    """Factor of the Gumbel noise on the confidence, at the first step."""
    choice_end: float = 0.0
    """Factor of the Gumbel noise on the confidence, at the last step."""
    choice_law: Literal["ratio", "linspace", "compound"] = "ratio"
    """Towards choice_end: by (s+1)/T, by s/(T-1), or multiplied by 1-(s+1)/T at every step."""
    temperature_start: float = 1.0
    """Temperature of the token draw at the first step; 0 takes the likeliest."""
    temperature_end: float = 1.0
    """Temperature of the token draw at the last step (linear in between)."""
    tie_temperatures: bool = False
    """Draw tokens at the temperature of the choice, as 1d-tokenizer and MUSE-Pytorch do."""
    top_k: int | None = None
    """Draw among so many of the likeliest codes; null is all."""
    guidance_start: float = 1.0
    """Guidance scale s of the first step, u + s (c - u); the paper's t is s - 1; 1 is none."""
    guidance_end: float = 4.0
    """Guidance scale of the last step; equal to guidance_start it is constant. sampling.guidance
    is another name of it."""
    guidance_law: Literal["linspace", "ratio", "cosine"] = "linspace"
    """From start to end: linear by s/(T-1), linear by s/T, or cosine by (s/T)^guidance_power."""
    guidance_power: float = 1.0
    """Exponent of the cosine law."""
    guidance_first: float = 0.0
    """Share of the steps before which there is no guidance."""
    guidance_last: float = 1.0
    """Share of the steps after which there is no guidance."""
    guidance_normalised: bool = True
    """sampler=posterior: false lets the guided law's sum scale how fast masks open."""
    halton_roll: bool = True
    """Shift the Halton order over the grid by a random offset per image (sampler.roll=grid)."""
    first_step: int = 0
    """Skip this many steps: the loop then starts from given tokens, masked as they would be."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Another way of sampling than the paper's loop."""

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        at_least(self, 1, "steps", "top_k")
        at_least(self, 0, "choice_temperature", "choice_end")
        at_least(self, 0, "temperature_start", "temperature_end")
        within(self, 0, self.steps - 1, "first_step")
        positive(self, "guidance_power")
        within(self, 0, 1, "guidance_first", "guidance_last")
        check_normalised(self.guidance_normalised, self.sampler)
        once = f"frozen must be true with order={self.order}, which opens every token once"
        require(self.frozen or self.order in ("confidence", "critic"), once)


@dataclass
class EditConfig:
    """Editing without a mask (section 3.3): tokens are drawn again and again under the new text."""

    iterations: int = 50
    """How often a share of the tokens is drawn again; the paper shows 100 and likes 50 to 75."""
    share: float = 0.08
    """Share of the tokens drawn at once."""
    top_k: int | None = 3
    """Draw among so many of the likeliest codes; null is all."""
    guidance: float = 4.0
    """Guidance scale."""
    temperature: float = 1.0
    """Temperature of the draw; 0 takes the likeliest."""

    def __post_init__(self) -> None:
        at_least(self, 0, "iterations", "temperature")
        require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")
        at_least(self, 1, "top_k")


@dataclass
class SamplingConfig(DecodeConfig):
    """How the base decodes, the super-resolution stage on top of it, and edits without a mask."""

    superres: DecodeConfig = field(default_factory=lambda: DecodeConfig(steps=8))
    """Decoding of the super-resolution stage."""
    edit: EditConfig = field(default_factory=EditConfig)
    """Editing without a mask."""


@dataclass
class SuperResStage:
    """The super-resolution stage (section 2.4): its own network, trained on top of the base."""

    enabled: bool = False
    """Train it and draw pictures with it; false draws the base's."""
    factor: int = 2
    """Pixels of its pictures per pixel of the base's, along a side."""
    low: Literal["real", "predicted"] = "real"
    """Low-res tokens in training: the picture's, or with some masked and predicted by the base."""
    low_rate: float = 0.5
    """predicted: largest share of low-res tokens that the base predicts in one step."""
    tokenizer: str | None = None
    """File of its own tokenizer; null takes the base's."""
    model: SuperResConfig = field(default_factory=SuperResConfig)
    """Sizes of the network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Masking and loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    def __post_init__(self) -> None:
        at_least(self, 2, "factor")
        require(0 < self.low_rate <= 1, f"low_rate must be in (0, 1], got {self.low_rate}")

    def check(self, low: Geometry, text: TextConfig) -> None:
        """Check that the network fits the text encoder and the base's tokens.

        With tokenizer=null the high-res tokens are of their kind.
        """
        at, model, side = "superres.model", self.model, max(low.grid)
        low.check_codes(f"{at}.low_num_codes", model.low_num_codes)
        _longest(f"{at}.low_max_side", model.low_max_side, side)
        _width(f"{at}.text_width", model.text_width, text)
        if self.tokenizer is None:
            height, width = low.grid
            grid = (height * self.factor, width * self.factor)
            self.check_high(dataclasses.replace(low, grid=grid))

    def check_high(self, high: Geometry) -> None:
        """Check that the network fits the high-res tokens."""
        high.check_codes("superres.model.num_codes", self.model.num_codes)
        _longest("superres.model.max_side", self.model.max_side, max(high.grid))
        high.check_multiple(self.model.grid_multiple)


@dataclass
class MuseConfig:
    """Everything that makes a Muse: networks, text encoder, objective, optimizer, sampling."""

    network: Literal["muse", "uvit"] = "muse"
    """muse is the paper's transformer (section model); uvit is aMUSEd's (section uvit)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the base transformer."""
    uvit: UViTConfig = field(default_factory=UViTConfig)
    """Sizes of aMUSEd's U-ViT."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Masking and loss."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Token-Critic beside the base."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Decoding loop."""
    superres: SuperResStage = field(default_factory=SuperResStage)
    """Super-resolution stage."""

    def check_fit(self, first: Geometry) -> None:
        """Check that the sections fit each other, the text encoder and the first stage."""
        text, uvit = self.text, self.network == "uvit"
        if uvit:
            first.check_codes("uvit.codebook_size", self.uvit.codebook_size)
            first.check_multiple(self.uvit.grid_multiple)
            require(
                text.name == "bytes" or (text.name == "clip" and text.projected),
                "network=uvit needs states and a pooled vector of a text: add text.name=clip and "
                "text.projected=true, or text.name=bytes",
            )
            alone = "critic.layers must be 0 with network=uvit: the critic is of model"
            require(self.critic.layers == 0, alone)
            _width("uvit.encoder_hidden_size", self.uvit.encoder_hidden_size, text)
            _width("uvit.cond_embed_dim", self.uvit.cond_embed_dim, text)
        else:
            first.check_codes("model.num_codes", self.model.num_codes)
            first.check_multiple(self.model.grid_multiple)
            _width("model.text_width", self.model.text_width, text)
            _longest("model.max_side", self.model.max_side, max(first.grid))
        if self.superres.enabled:
            self.superres.check(first, text)

    def check_sampling(self, sampling: SamplingConfig, first: Geometry) -> None:
        """Check that the stages can be sampled in this way."""
        critic = self.critic.layers > 0
        self.objective.check_sampler(sampling.sampler, "sampling.sampler", critic)
        if self.superres.enabled:
            at = "sampling.superres.sampler"
            self.superres.objective.check_sampler(sampling.superres.sampler, at)


def exponent(schedule: str) -> float:
    """Return p of the schedule 1 - r^p.

    Raises:
        ValueError: it has none, or one that is not positive and finite.
    """
    power = POWERS.get(schedule)
    if power is None and re.fullmatch(r"pow(\d+\.?\d*|\.\d+)", schedule, re.ASCII):
        power = float(schedule.removeprefix("pow"))
    if power is None or not 0 < power < math.inf:
        raise ValueError(f"{schedule!r} is no pow<p> with a positive number p, as in pow2.5")
    return power


def check_schedule(name: str, schedule: str) -> None:
    """Refuse a mask schedule that is neither one of SCHEDULES nor pow<p>."""
    if schedule in SCHEDULES:
        return
    try:
        exponent(schedule)
    except ValueError as error:
        names = ", ".join(SCHEDULES)
        raise ValueError(f"{name} must be one of {names} or pow<p>: {error}") from error


def _width(name: str, width: int, text: TextConfig) -> None:
    odd = f"{name} must be text.width ({text.width}) with text.name=bytes, got {width}"
    require(text.name != "bytes" or width == text.width, odd)


def _longest(name: str, longest: int, side: int) -> None:
    require(longest >= side, f"{name} must be at least the token grid's {side}, got {longest}")


AMUSED = SamplingConfig(
    steps=12,
    counting="maskgit",
    choice_temperature=2.0,
    choice_law="linspace",
    guidance_start=10.0,
    guidance_end=10.0,
)
# The combinations of the references. The paper gives steps, schedule, frozen tokens and rising
# guidance; its temperatures and final guidance are not published: MaskGIT's and 4 stand for them.
# maskgit: google-research/maskgit. amused: diffusers' AmusedScheduler and pipeline. open_muse: its
# generate2, whose guidance rises from nothing. halton: valeoai/Halton-MaskGIT.
PRESETS = {
    "paper": SamplingConfig(steps=24, guidance_end=4.0),
    "maskgit": SamplingConfig(steps=12, counting="maskgit", guidance_end=1.0),
    "amused": AMUSED,
    "open_muse": dataclasses.replace(AMUSED, guidance_start=0.0, guidance_end=8.0),
    "halton": SamplingConfig(
        steps=32,
        schedule="arccos",
        counting="halton",
        order="halton",
        choice_temperature=0.0,
        guidance_start=1.5,
        guidance_end=1.5,
    ),
}
