"""Every setting of VQ-Diffusion, and the published sizes (arXiv 2111.14822)."""

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
        for name in ("num_codes", "n_layer", "n_head", "mlp_hidden_times", "diffusion_steps",
                     "condition_dim", "class_number"):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.n_embd >= 4 and self.n_embd % self.n_head == 0,
            f"n_head must divide n_embd, which is at least 4, got {self.n_head} heads for width "
            f"{self.n_embd}",
        )
        _require(
            self.timestep_type == "adalayernorm" or self.n_embd % 2 == 0,
            f"n_embd must be even with timestep_type=adalayernorm_abs, got {self.n_embd}",
        )
        _require(
            len(self.spatial_size) == 2 and min(self.spatial_size) >= 1,
            f"spatial_size must be two numbers of at least 1, got {self.spatial_size}",
        )
        for name in ("attn_dropout", "dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        _require(
            not (self.causal and self.condition == "class" and self.class_type == "adainsnorm"),
            "class_type must be adalayernorm with causal: an InstanceNorm sees all tokens",
        )


# The published sizes, counted from the released code. S: Table 3 of arXiv 2111.14822 (no config of
# it was released; its number of heads is unknown). B, L (ITHQ), ImageNet and FFHQ: configs/*.yaml.
# Parameters: 35,936,647; 388,780,871; 1,359,274,624; 518,025,678; 411,185,664. The papers count in
# units of 2^20 and 2^30 (34M, 370M, 1.27B). The two models of 16x16 tokens have position tables of
# 32x32 all the same, of which they use the first 8 rows.
MODELS = {
    "s": ModelConfig(n_layer=18, n_embd=192, mlp_type="conv_mlp", mlp_hidden_times=2),
    "b": ModelConfig(),
    "l": ModelConfig(n_layer=36, n_embd=1408, num_codes=4096, checkpoint_blocks=True),
    "imagenet": ModelConfig(
        condition="class", n_layer=24, n_embd=512, num_codes=974, mlp_type="conv_mlp"
    ),
    "ffhq": ModelConfig(
        condition="none", n_layer=20, n_embd=512, num_codes=1024, mlp_type="conv_mlp"
    ),
}
