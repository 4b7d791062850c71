"""What Improved VQ-Diffusion sets besides VQ-Diffusion's own settings (arXiv 2205.16007)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lightning_modules.common.checks import at_least, require, within
from lightning_modules.common.interfaces import Geometry
from lightning_modules.samplers.settings import SamplerConfig, check_normalised
from lightning_modules.vq_diffusion import config as plain


@dataclass
class NullConfig:
    """The other side of the guidance, and how often training shows it."""

    name: Literal["learned", "empty"] = "learned"
    """learned: a parameter (class models: the last row of their tables). empty: the encoded empty
    caption (class models: the mean of all classes), which also a model knows that was never
    trained with it."""
    length: int = 77
    """learned: number of text tokens; a length of the text encoder's output is the released one."""
    drop: float = 0.1
    """Share of training conditions that the null takes the place of."""

    def __post_init__(self) -> None:
        at_least(self, 1, "length")
        within(self, 0, 1, "drop")


@dataclass
class InitConfig:
    """Where the training starts."""

    ckpt: str | None = None
    """Run folder or checkpoint of a VQ-Diffusion to fine-tune; null starts from scratch."""
    train: bool = True
    """false takes ckpt as it is: guidance and purity without training (null_condition=empty)."""

    def __post_init__(self) -> None:
        require(self.train or self.ckpt is not None, "train must be true without ckpt, got false")

    @property
    def file(self) -> Path | None:
        """The checkpoint, of a run folder that which lies in it."""
        path = None if self.ckpt is None else Path(self.ckpt)
        return path / "checkpoint.safetensors" if path and path.is_dir() else path


@dataclass
class SamplingConfig(plain.SamplingConfig):
    """Every setting of the sampling loop."""

    truncation: float = 1.0
    """Truncation rate: draw from the likeliest codes that sum to it; 1 keeps all."""
    guidance: float = 3.0
    """Guidance scale s of the released code: log p_null + s (log p - log p_null); 1 is none."""
    guidance_law: Literal["constant", "up", "down"] = "constant"
    """The scale along the way: constant, from 1 up to it, or from it down to 1."""
    guidance_first: float = 0.0
    """Share of the way before which there is no guidance."""
    guidance_last: float = 1.0
    """Share of the way after which there is no guidance."""
    guidance_normalised: bool = True
    """sampler=posterior: false lets the guided law's sum scale how fast masks open."""
    order: Literal["diffusion", "random", "purity"] = "purity"
    """Which masks open: any (the posterior of VQ-Diffusion), or a fixed number per call, at random
    or by purity, the probability of the likeliest code."""
    purity_weight: float = 1.0
    """order=purity: r; a code is drawn of p to the power of 1 + r purity, 0 of p itself."""
    purity: Literal["largest", "raw"] = "largest"
    """order=purity: divided by the picture's largest, as released, or as it is (Algorithm 2)."""
    reveal: Literal["schedule", "released", "constant"] = "schedule"
    """order=random and purity: so many tokens as the noise schedule reveals in `steps` calls, by
    the released tables (1024 tokens), or tokens_per_call in each, at times that each picture's
    share of masks chooses anew."""
    tokens_per_call: int | None = None
    """order=random and purity: largest number of tokens that one call reveals; null is no limit."""
    compare: bool = True
    """Also draw and score each picture of a run as VQ-Diffusion does, in as many steps."""
    compare_truncation: float = 0.86
    """compare: truncation rate of these pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "purity_weight")
        within(self, 0, 1, "guidance_first", "guidance_last")
        at_least(self, 1, "tokens_per_call")
        check_normalised(self.guidance_normalised, self.sampler)
        rate, order, rule = self.compare_truncation, self.order, self.rule
        require(0 < rate <= 1, f"compare_truncation must be in (0, 1], got {rate}")
        unset = "tokens_per_call must be set with reveal=constant, got null"
        require(self.reveal != "constant" or self.tokens_per_call is not None, unset)
        exact = f"rule must be exact with order={order}, got {rule}"
        require(rule != "released" or order == "diffusion", exact)

    def plain(self) -> "SamplingConfig":
        """Return those of VQ-Diffusion's own loop, with which `compare` samples the weights."""
        opened: Any = {"order": "diffusion", "reveal": "schedule", "tokens_per_call": None}
        opened |= {"sampler": SamplerConfig(), "guidance_normalised": True}
        return replace(self, guidance=1.0, truncation=self.compare_truncation, **opened)


# n_sample of the released code: tokens revealed at time t; entry 0 is not used
RELEASED_TOKENS = 1024
RELEASED_TABLES = {
    100: [1, 10] + [11, 10, 10] * 32 + [11, 11],
    50: [10] + [21, 20] * 24 + [30],
    25: [21] + [41] * 23 + [60],
    10: [69] + [102] * 8 + [139],
}
RELEASED_SLOW_TABLE = [1, 6] + [11, 10, 10] * 32 + [11, 15]  # T = 100, at most 10 tokens per call


def check_released(tokens: int, steps: int) -> None:
    """Check that the released code has a table for so many tokens and training steps."""
    require(
        tokens == RELEASED_TOKENS and steps in RELEASED_TABLES,
        f"sampling.reveal=released knows {RELEASED_TOKENS} tokens and {sorted(RELEASED_TABLES)} "
        f"steps, not {tokens} tokens and {steps} steps; take reveal=schedule",
    )


@dataclass
class ImprovedVQDConfig(plain.VQDiffusionConfig):
    """Everything that makes an Improved VQ-Diffusion."""

    null_condition: NullConfig = field(default_factory=NullConfig)
    """The other side of the guidance."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where the training starts."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling loop."""

    @property
    def num_classes(self) -> int:
        """Number of classes that can be asked for; a learned null is one more."""
        return self.model.class_number - (self.null_condition.name == "learned")

    def check_sampling(self, sampling: Any, first: Geometry) -> None:
        """Check that this model can be sampled in this way."""
        super().check_sampling(sampling, first)
        if sampling.order != "diffusion" and sampling.reveal == "released":
            check_released(first.grid[0] * first.grid[1], self.model.diffusion_steps)


# The paper (Algorithm 2) reveals z tokens per call at the time whose share of masks is nearest, and
# takes the purity as it is; the released code walks through all times with tables, and divides the
# purity by the picture's largest. Scales are those of the released code (the paper's s + 1).
PRESETS = {
    "paper": SamplingConfig(reveal="constant", tokens_per_call=8, purity="raw"),
    "released": SamplingConfig(reveal="released"),
    "guidance": SamplingConfig(order="diffusion"),
    "purity": SamplingConfig(guidance=1.0, truncation=0.86, reveal="released"),
    "high_quality": SamplingConfig(
        guidance=1.0, truncation=0.86, order="random", reveal="released", tokens_per_call=5
    ),
    "plain": SamplingConfig(guidance=1.0, truncation=0.86, order="diffusion"),
}
