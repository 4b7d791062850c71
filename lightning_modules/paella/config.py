"""Every setting of Paella, and the released sizes (arXiv 2211.07292; dome272/Paella)."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from lightning_modules.common.checks import at_least, below_one, multiple, positive, require, within
from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.interfaces import Geometry
from lightning_modules.samplers.settings import SamplerConfig, check_sampler

TimeLaw = Literal["released", "simple", "wuerstchen"]
RenoiseMode = Literal["start", "prev", "rand"]
DrawMode = Literal["multinomial", "argmax", "quant"]


@dataclass
class ModelConfig:
    """Token predictor of 2023 (`Paella`, checkpoint paella_v3.pt); defaults: released size."""

    c_in: int = 256
    """Width of a token's embedding; must equal c_out."""
    c_out: int = 256
    """Width of the features in front of the output table."""
    num_labels: int = 8192
    """Number of codes of the tokenizer."""
    c_r: int = 64
    """Width of the sinusoidal timestep embedding."""
    patch_size: int = 2
    """Side of the square of tokens that is one position of the first level."""
    c_cond: int = 1024
    """Width of the conditioning sequence."""
    c_hidden: list[int] = field(default_factory=lambda: [640, 1280, 1280])
    """Width of each level; the grid is halved between levels."""
    nhead: list[int] = field(default_factory=lambda: [-1, 16, 16])
    """Attention heads of each level; -1 where the level has no attention."""
    blocks: list[int] = field(default_factory=lambda: [6, 16, 6])
    """How often each level repeats its level_config, on the way down and again on the way up."""
    level_config: list[str] = field(default_factory=lambda: ["CT", "CTA", "CTA"])
    """Block types of each level: C convolution, T timestep, A attention, F feed-forward."""
    clip_embd: int = 1024
    """Width of the pooled CLIP embeddings; 0 leaves their mappers out."""
    clip_image: bool = True
    """Whether pooled image embeddings can be a condition (only with clip_embd > 0)."""
    byt5_embd: int = 2560
    """Width of the text encoder's token states (2560 is ByT5-XL)."""
    clip_seq_len: int = 4
    """Conditioning tokens made of one pooled embedding."""
    kernel_size: int = 3
    """Side of the depthwise convolutions; odd."""
    dropout: float = 0.1
    """Dropout in C and F blocks and on attention probabilities."""
    self_attn: bool = True
    """Whether attention also sees the grid's own tokens, not only the condition."""

    def __post_init__(self) -> None:
        levels = len(self.c_hidden)
        require(levels >= 1, "c_hidden must name at least one level")
        require(min(self.c_hidden + self.blocks) >= 1, "c_hidden and blocks must be at least 1")
        for name in ("nhead", "blocks", "level_config"):
            count, wanted = len(getattr(self, name)), f"one entry per level of c_hidden ({levels})"
            require(count == levels, f"{name} must have {wanted}, got {count}")
        widths = (self.c_in, self.c_out)
        require(len({*widths}) == 1, "c_in and c_out must be equal, got {} and {}".format(*widths))
        at_least(self, 1, "c_in", "num_labels", "patch_size", "c_cond", "byt5_embd", "clip_seq_len")
        at_least(self, 4, "c_r")
        at_least(self, 0, "clip_embd")
        require(self.kernel_size % 2 == 1, f"kernel_size must be odd, got {self.kernel_size}")
        below_one(self, "dropout")
        for width, heads, kinds in zip(self.c_hidden, self.nhead, self.level_config, strict=True):
            unknown = set(kinds) - set("CTAF")
            require(not unknown, f"level_config knows the blocks C, T, A and F, got {kinds!r}")
            fits = "A" not in kinds or (heads > 0 and width % heads == 0)
            got = f"got {heads} heads for width {width}"
            require(fits, f"nhead must divide the width of a level with attention, {got}")

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


@dataclass
class V1Config:
    """Token predictor of 2022 (`DenoiseUNet`, checkpoint model_600000.pt)."""

    num_labels: int = 8192
    """Number of codes of the tokenizer."""
    c_hidden: int = 1280
    """Width of the deepest level; each level above has half of the one below."""
    c_clip: int = 1024
    """Width of the pooled CLIP embedding."""
    c_r: int = 64
    """Width of the sinusoidal timestep embedding."""
    down_levels: list[int] = field(default_factory=lambda: [4, 8, 16])
    """Blocks of each level on the way down, finest first."""
    up_levels: list[int] = field(default_factory=lambda: [16, 8, 4])
    """Blocks of each level on the way up, deepest first."""

    def __post_init__(self) -> None:
        down, up = self.down_levels, self.up_levels
        require(len(down) >= 1, "down_levels must name at least one level")
        as_many = f"as many levels as down_levels ({len(down)})"
        require(len(down) == len(up), f"up_levels must have {as_many}, got {len(up)}")
        least = "at least one block per level"
        require(min(down + up) >= 1, f"down_levels and up_levels must have {least}")
        multiple("c_hidden", self.c_hidden, self.grid_multiple)

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return 2 ** (len(self.down_levels) - 1)


@dataclass
class PriorConfig:
    """Diffusion prior from a text embedding to an image embedding (prior_v1.pt)."""

    clip_embd: int = 1024
    """Width of the embeddings."""
    c_hidden: int = 1280
    """Width of the residual stream."""
    c_r: int = 64
    """Width of the sinusoidal timestep embedding."""
    num_blocks: int = 48
    """Residual blocks."""

    def __post_init__(self) -> None:
        at_least(self, 1, "clip_embd", "c_hidden", "num_blocks")
        at_least(self, 4, "c_r")


@dataclass
class PriorSampling:
    """How the prior draws an image embedding; defaults: the released script."""

    steps: int = 60
    """Network calls, each twice where guided."""
    guidance: float = 3.0
    """Weight of the text's prediction against the null condition's; 1 is none."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm draws noise at every step, ddim none."""
    grid: Literal["arroz", "torchtools"] = "arroz"
    """Times of the steps; arroz skips that of full noise."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")


@dataclass
class ObjectiveConfig:
    """Noising, loss and how often a condition is hidden in training."""

    t_law: TimeLaw = "released"
    """Distribution of the noise rate t: released (1-u+0.001, clamped), simple (1-u), or wuerstchen
    (1.08)."""
    eta: float = 0.3
    """Loss weight of an untouched token at t = 0; 1 weighs all tokens alike."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross entropy."""
    text_drop: float = 0.05
    """How often in training the caption is replaced by the empty one."""
    pooled_drop: float = 0.9
    """How often in training the pooled text embedding is that of the empty caption."""
    image_drop: float = 0.9
    """How often in training there is no image embedding."""
    drop_per: Literal["sample", "batch"] = "sample"
    """Draw the three drops per sample, or once per batch as the released code does."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "eta", "text_drop", "pooled_drop", "image_drop")
        below_one(self, "label_smoothing")


@dataclass
class SamplingConfig:
    """Every setting of the sampling loop; defaults are those of the released code."""

    ALIASES: ClassVar[dict[str, tuple[str, ...]]] = {"guidance": ("guidance_start", "guidance_end")}

    steps: int = 12
    """Number of sampling steps."""
    guidance_start: float = 8.0
    """Guidance weight of the first step; 1 is no guidance."""
    guidance_end: float = 8.0
    """Guidance weight of the last step (linear in between); sampling.guidance=4 sets both."""
    guided_steps: int | None = None
    """Guide only the first steps; null guides all."""
    guidance_first: float = 0.0
    """Share of the steps before which there is no guidance."""
    guidance_last: float = 1.0
    """Share of the steps after which there is no guidance."""
    temperature_start: float = 0.7
    """Temperature of the first step."""
    temperature_end: float = 0.3
    """Temperature of the last step (linear in between)."""
    renoise_steps: int | None = None
    """Renoise after each of the first steps; null is all but the last."""
    renoise_mode: RenoiseMode = "start"
    """Renoise with the first tokens (start), this step's input (prev) or fresh tokens (rand)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """linear: t falls linearly (v3). cosine: r rises, rate cos(r pi/2), for the v1 network."""
    t_start: float = 1.0
    """Noise rate before the first step (linear), or 1 - r there (cosine)."""
    t_end: float = 0.0
    """Noise rate after the last step (linear), or 1 - r there (cosine)."""
    first_step: int = 0
    """Skip this many steps: the loop then starts from given tokens, noised to that step's rate."""
    mode: DrawMode = "multinomial"
    """Draw a token, take the likeliest (argmax), or the code nearest to the mean code (quant)."""
    quant_steps: int | None = None
    """With mode quant: draw before this step, take the nearest code from it on; null is from 0."""
    typical_mass: float | None = None
    """Probability mass of the typical filter; null is no filter."""
    typical_min_tokens: int = 1
    """Labels that the typical filter always leaves."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Another way of sampling than the paper's loop."""
    prior: PriorSampling = field(default_factory=PriorSampling)
    """How a prior draws image vectors, where one is asked."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "typical_min_tokens")
        within(self, 0, 1, "guidance_first", "guidance_last")
        positive(self, "temperature_start", "temperature_end")
        optional = ("guided_steps", "renoise_steps", "quant_steps")
        within(self, 0, self.steps, *optional, called="steps")
        within(self, 0, self.steps - 1, "first_step", called="steps - 1")
        within(self, 0, 1, "t_start")
        within(self, 0, self.t_start, "t_end", called="t_start")
        mass = self.typical_mass
        require(mass is None or 0 < mass <= 1, f"typical_mass must be in (0, 1], got {mass}")


@dataclass
class PaellaConfig:
    """Everything that makes a Paella: network, text encoder, objective, optimizer, sampling."""

    network: Literal["v3", "v1"] = "v3"
    """v3 is the model of 2023 (section model); v1 that of 2022 (section v1, pooled CLIP only)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the v3 network."""
    v1: V1Config = field(default_factory=V1Config)
    """Sizes of the v1 network."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Noising and loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling loop."""

    def check_fit(self, first: Geometry) -> None:
        """Check that the sections fit each other and the tokenizer."""
        text, model = self.text, self.model
        if self.network == "v1":
            first.check_codes("v1.num_labels", self.v1.num_labels)
            first.check_multiple(self.v1.grid_multiple)
            message = "network=v1 needs one CLIP vector per caption: add text=open_clip"
            require(text.pooled, message)
            return
        first.check_codes("model.num_labels", model.num_labels)
        first.check_multiple(model.grid_multiple)
        text.check_width("model.byt5_embd", model.byt5_embd)
        require(
            text.pooled or not model.clip_embd,
            f"model.clip_embd must be 0 without a CLIP encoder, got {model.clip_embd} with "
            f"text.name={text.name} and text.clip={text.clip}",
        )

    def check_prior(self, prior: PriorConfig) -> None:
        """Check that this network sees what a prior draws."""
        model = self.model
        require(
            self.network == "v3" and model.clip_image and model.clip_embd == prior.clip_embd,
            f"the prior draws image vectors of length {prior.clip_embd}, which this network, "
            f"network={self.network} with model.clip_image={model.clip_image} and "
            f"model.clip_embd={model.clip_embd}, does not see",
        )

    def check_sampling(self, sampling: SamplingConfig, first: Geometry) -> None:
        """Check that this network can be sampled in this way; messages begin with the setting."""
        wanted = "cosine" if self.network == "v1" else "linear"
        require(
            sampling.schedule == wanted,
            f"sampling.schedule must be {wanted} with network={self.network}, whose time runs the "
            f"other way, got {sampling.schedule}",
        )
        check_sampler(sampling.sampler, masks=False, replaces=True)


# Sizes of the released checkpoints (parameters: 1,008,350,592; 577,995,184; 899,770,624).
MODELS = {"paper": ModelConfig(), "v1": V1Config(), "prior": PriorConfig()}

# The paper has constants for guidance and temperature (Algorithm 1, v2; their values are not
# given there, 8 is the released weight); `released` anneals the temperature. `notebook` and
# `demo` are the public scripts of 2023, `v1` the code of 2022.
NOTEBOOK = SamplingConfig(steps=32, renoise_steps=26, temperature_start=1.2, temperature_end=0.2)
CONSTANT = SamplingConfig(temperature_start=1.0, temperature_end=1.0)
PRESETS = {
    "paper": CONSTANT,
    "released": SamplingConfig(),
    "notebook": NOTEBOOK,
    "demo": replace(NOTEBOOK, guided_steps=20),
    "v1": replace(
        CONSTANT, guidance_start=5.0, guidance_end=5.0, schedule="cosine", typical_mass=0.2
    ),
}
