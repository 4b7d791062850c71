"""Every setting of VQ-Diffusion, and the published sizes (arXiv 2111.14822)."""

from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_modules.common.checks import at_least, below_one, require, within
from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.interfaces import Geometry
from lightning_modules.samplers.settings import SamplerConfig, check_sampler

LEAST_REPLACED = 0.999  # mask rates above leave too few wrong tokens to learn from


@dataclass
class ModelConfig:
    """The denoiser; defaults: the text model B of MSCOCO and CUB-200 (388,780,871 parameters)."""

    condition: Literal["text", "class", "none"] = "text"
    """text: self- and cross-attention; class: its own AdaLN in front of the MLP; none."""
    num_codes: int = 2887
    """Number of codes K of the tokenizer; index K is the mask token."""
    n_layer: int = 19
    """Number of blocks."""
    n_embd: int = 1024
    """Width of the residual stream."""
    n_head: int = 16
    """Attention heads; must divide n_embd."""
    mlp_type: Literal["fc", "conv_mlp"] = "fc"
    """fc: two linear layers per token; conv_mlp: two 3x3 convolutions on the token grid."""
    mlp_hidden_times: int = 4
    """Width inside the MLP as a multiple of n_embd."""
    block_activate: Literal["GELU", "GELU2"] = "GELU2"
    """GELU is the exact one, GELU2 is x * sigmoid(1.702 x)."""
    spatial_size: list[int] = field(default_factory=lambda: [32, 32])
    """Rows and columns of the position tables; token i takes i // columns and i % columns."""
    pos_emb_type: Literal["embedding", "parameter"] = "embedding"
    """embedding: position tables start at random; parameter: at zero."""
    timestep_type: Literal["adalayernorm", "adalayernorm_abs"] = "adalayernorm"
    """AdaLN of the timestep by a table with one row per step, or (abs) by a sinusoid."""
    diffusion_steps: int = 100
    """Number of timesteps T; t lies in 0..T-1."""
    condition_dim: int = 512
    """text: width of the text encoder's token vectors."""
    class_number: int = 1000
    """class: rows of the class tables; a label beyond them means their mean (zero-shot null)."""
    class_type: Literal["adalayernorm", "adainsnorm"] = "adalayernorm"
    """class: norm that the class modulates, LayerNorm or InstanceNorm over the tokens."""
    attn_dropout: float = 0.0
    """Dropout of attention probabilities."""
    dropout: float = 0.0
    """Dropout behind attention and MLP."""
    causal: bool = False
    """VQ-AR, the papers' autoregressive baseline: a token sees those before it in raster order."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass instead of keeping it (released for model L)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_codes", "n_layer", "n_head", "mlp_hidden_times")
        at_least(self, 1, "diffusion_steps", "condition_dim", "class_number")
        heads, width, sides = self.n_head, self.n_embd, self.spatial_size
        require(
            width >= 4 and width % heads == 0,
            f"n_head must divide n_embd, which is at least 4, got {heads} heads for width {width}",
        )
        odd = f"n_embd must be even with timestep_type=adalayernorm_abs, got {width}"
        require(self.timestep_type != "adalayernorm_abs" or width % 2 == 0, odd)
        two = f"spatial_size must be two numbers of at least 1, got {sides}"
        require(len(sides) == 2 and min(sides) >= 1, two)
        below_one(self, "attn_dropout", "dropout")
        if self.causal and self.condition == "class":
            sees = "class_type must be adalayernorm with causal: an InstanceNorm sees all tokens"
            require(self.class_type != "adainsnorm", sees)


# The published sizes, counted from the released code. S: Table 3 of arXiv 2111.14822 (no config of
# it was released; its number of heads is unknown). B, L (ITHQ), ImageNet and FFHQ: configs/*.yaml.
# Parameters: 35,936,647; 388,780,871; 1,359,274,624; 518,025,678; 411,185,664. The papers count in
# units of 2^20 and 2^30 (34M, 370M, 1.27B). The two models of 16x16 tokens have position tables of
# 32x32 all the same, of which they use the first 8 rows.
IMAGENET = ModelConfig(
    condition="class", n_layer=24, n_embd=512, num_codes=974, mlp_type="conv_mlp"
)
MODELS = {
    "s": ModelConfig(n_layer=18, n_embd=192, mlp_type="conv_mlp", mlp_hidden_times=2),
    "b": ModelConfig(),
    "l": ModelConfig(n_layer=36, n_embd=1408, num_codes=4096, checkpoint_blocks=True),
    "imagenet": IMAGENET,
    "imagenet_null": replace(IMAGENET, class_number=1001),  # Improved VQ-Diffusion: its last row
    "ffhq": ModelConfig(
        condition="none", n_layer=20, n_embd=512, num_codes=1024, mlp_type="conv_mlp"
    ),
}


@dataclass
class ScheduleConfig:
    """The noise; the number of its steps is model.diffusion_steps."""

    mask_rate: float = 0.99999
    """Share of masks at the last step; the other tokens are replaced by random ones."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "mask_rate")


@dataclass
class ObjectiveConfig:
    """The loss; defaults are those of the released text models."""

    auxiliary_weight: float = 5e-4
    """Weight lambda of the cross entropy of the clean tokens beside the bound."""
    adaptive_auxiliary: bool = True
    """Multiply lambda by 2 - t / T, as all released configs do (not in the paper)."""
    mask_weight: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Weight of masked and of other positions."""
    times: Literal["importance", "uniform"] = "importance"
    """Draw t by the size of its losses so far, or uniformly."""

    def __post_init__(self) -> None:
        at_least(self, 0, "auxiliary_weight")
        two = f"mask_weight must be two numbers of at least 0, got {self.mask_weight}"
        require(len(self.mask_weight) == 2 and min(self.mask_weight) >= 0, two)


@dataclass
class SamplingConfig:
    """Every setting of the sampling loop."""

    steps: int = 100
    """Network calls; fewer than model.diffusion_steps take strides."""
    rule: Literal["exact", "released"] = "exact"
    """exact: strides of the paper. released: its "timeN" of the largest N that needs all steps."""
    truncation: float = 0.86
    """Truncation rate: draw from the likeliest codes that sum to it; 1 keeps all."""
    first_step: int = 0
    """Skip this many steps: the loop then starts from given tokens with that step's noise."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Another way of sampling than the paper's loop."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        require(0 < self.truncation <= 1, f"truncation must be in (0, 1], got {self.truncation}")
        within(self, 0, self.steps - 1, "first_step")


@dataclass
class VQDiffusionConfig:
    """Everything that makes a VQ-Diffusion."""

    classes: list[str] = field(default_factory=list)
    """model.condition=class: names by label, for prompts that ask by name; empty: by number."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the denoiser; causal makes it the autoregressive baseline VQ-AR."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder, for model.condition=text."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling loop."""

    @property
    def num_classes(self) -> int:
        """Number of classes that can be asked for, with model.condition=class."""
        return self.model.class_number

    def check_fit(self, first: Geometry) -> None:
        """Check that the sections fit each other and the first stage."""
        model, text = self.model, self.text
        first.check_codes("model.num_codes", model.num_codes)
        if model.condition == "text" and text.name == "bytes":
            must = f"model.condition_dim must be text.width ({text.width}) with text.name=bytes"
            require(model.condition_dim == text.width, f"{must}, got {model.condition_dim}")
        if model.condition == "class":
            number, names = self.num_classes, len(self.classes)
            wanted = f"classes must name all {number} classes or none, got {names} names"
            require(names in (0, number), wanted)
        (height, width), (rows, columns) = first.grid, model.spatial_size
        require(
            rows * columns >= height * width,
            f"model.spatial_size must have places for {height}x{width} tokens, "
            f"got {model.spatial_size}",
        )

    def check_sampling(self, sampling: SamplingConfig, first: Geometry) -> None:
        """Check that this model can be sampled in this way."""
        most = (
            f"sampling.steps must be at most model.diffusion_steps ({self.model.diffusion_steps})"
        )
        require(sampling.steps <= self.model.diffusion_steps, f"{most}, got {sampling.steps}")
        other = f"sampling.sampler must be own with model.causal, got {sampling.sampler.name}"
        require(sampling.sampler.own or not self.model.causal, other)
        rate = self.schedule.mask_rate
        masks, replaces = rate > 0.5, rate < LEAST_REPLACED
        check_sampler(sampling.sampler, masks=masks, replaces=replaces)


# The paper lets the share of masks rise to 0.9 and that of replaced tokens to 0.1. The released
# code masks nearly all tokens and replaces one in a million; no config field of it says so.
SCHEDULES = {"paper": ScheduleConfig(mask_rate=0.9), "released": ScheduleConfig()}

# lambda and its factor differ: the paper has a constant 5e-4, the ImageNet and FFHQ configs 1e-3.
OBJECTIVES = {
    "paper": ObjectiveConfig(adaptive_auxiliary=False),
    "released": ObjectiveConfig(),
    "released_class": ObjectiveConfig(auxiliary_weight=1e-3),
}

# Fast inference of the paper (stride 4) and of the released code ("time4"), beside all 100 steps.
PRESETS = {
    "paper": SamplingConfig(),
    "paper_fast": SamplingConfig(steps=25),
    "released": SamplingConfig(),
    "released_fast": SamplingConfig(rule="released", steps=26),
}
