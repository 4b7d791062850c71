"""Every setting of LDMAE: latent diffusion on the latents of an autoencoder (arXiv 2507.09984)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_modules.common.checks import at_least, below_one, positive, require, within
from lightning_modules.common.config import (
    AdversarialConfig,
    AdversarialOptimConfig,
    ConvConfig,
    OptimConfig,
    TextConfig,
)
from lightning_modules.common.interfaces import Geometry


def check_patches(name: str, size: int, patch: int) -> None:
    """Refuse a side that is not cut into whole patches."""
    require(size % patch == 0, f"{name} must be a multiple of patch_size ({patch}), got {size}")


def check_heads(name: str, width: int, of: str, heads: int) -> None:
    """Refuse a width that the heads do not divide, or without places for both coordinates."""
    fits = width >= 4 and width % 4 == 0 and width % heads == 0
    require(fits, f"{name} must be a multiple of 4 and of {of} ({heads}), got {width}")


@dataclass
class DiTConfig:
    """Velocity predictor (`LightningDiT`), fields by their released names; defaults: B/1."""

    input_size: int = 32
    """Side of the latent grid."""
    patch_size: int = 1
    """Side of the square of latents that is one position; divides input_size."""
    in_channels: int = 16
    """Channels of a latent; must be the autoencoder's."""
    hidden_size: int = 768
    """Width of the residual stream."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads; divides hidden_size."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part per hidden_size (SwiGLU takes two thirds of it)."""
    num_classes: int = 1000
    """condition=label: rows of the label table without the null label."""
    text_width: int = 0
    """condition=text: width of the text encoder's tokens, which cross-attention sees."""
    class_dropout_prob: float = 0.1
    """Share of training samples whose label or caption is hidden; 0 leaves out the null label."""
    learn_sigma: bool = False
    """Twice as many output channels, the second half unused (a leftover of DiT)."""
    use_qknorm: bool = True
    """Normalise queries and keys of every head before they are rotated."""
    use_swiglu: bool = True
    """SwiGLU feed-forward parts instead of GELU (tanh)."""
    use_rope: bool = True
    """Rotate queries and keys by row and column, besides adding the absolute positions."""
    use_rmsnorm: bool = True
    """RMSNorm with weights instead of LayerNorm without."""
    wo_shift: bool = False
    """Modulate the blocks by scale and gate alone, without a shift."""
    use_checkpoint: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        at_least(self, 1, "input_size", "patch_size", "in_channels", "hidden_size", "depth")
        at_least(self, 1, "num_heads")
        at_least(self, 0, "num_classes", "text_width")
        positive(self, "mlp_ratio")
        within(self, 0, 1, "class_dropout_prob")
        check_patches("input_size", self.input_size, self.patch_size)
        width, heads = self.hidden_size, self.num_heads
        check_heads("hidden_size", width, "num_heads", heads)
        require(
            not self.use_rope or width // heads % 4 == 0,
            "hidden_size must be a multiple of 4 num_heads with use_rope: half of a head rotates "
            f"by the row and half by the column, got {width} and {heads} heads",
        )

    @property
    def grid_multiple(self) -> int:
        """What height and width of the latent grid must be multiples of."""
        return self.patch_size


@dataclass
class DiffusionConfig:
    """What the latent diffusion model learns to predict, and at which times."""

    kind: Literal["flow", "ddpm"] = "flow"
    """flow: velocity of the straight path; ddpm: noise of a variance-preserving chain (LDM)."""
    t_law: Literal["lognormal", "uniform"] = "lognormal"
    """flow: distribution of the time in training; lognormal is the sigmoid of a standard normal."""
    cosine_loss: bool = False
    """flow: add the velocity-direction term, 1 - cosine along the channels."""
    train_steps: int = 1000
    """ddpm: steps of the chain."""
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    """ddpm: betas spaced evenly, or the square roots of betas (LDM)."""
    beta_start: float = 0.00085
    """ddpm: first beta."""
    beta_end: float = 0.012
    """ddpm: last beta."""

    def __post_init__(self) -> None:
        at_least(self, 1, "train_steps")
        first, last = self.beta_start, self.beta_end
        order = "beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1"
        require(0 < first <= last < 1, f"{order}, got {first} and {last}")


@dataclass
class SamplingConfig:
    """Every setting of the sampling loop; defaults are those of the released ImageNet setting."""

    solver: Literal["euler", "heun", "dopri5", "ddim"] = "euler"
    """euler, heun, dopri5 (adaptive) with objective.kind=flow; ddim with ddpm."""
    steps: int = 249
    """Updates of the loop (num_sampling_steps - 1 of the released code); dopri5 has its own."""
    timestep_shift: float = 0.3
    """euler, heun: s of t' = s t / (1 + (s - 1) t), small steps near the noise; 1 is even steps."""
    guidance: float = 10.0
    """Guidance scale; 1 is no guidance."""
    guidance_channels: int | None = 3
    """Guide only the first channels, as the released code does; null guides all."""
    guidance_start: float = 0.1
    """No guidance before this time (0 = noise, 1 = data)."""
    guidance_end: float = 1.0
    """No guidance after this time."""
    atol: float = 1e-6
    """dopri5: absolute error per step that is accepted."""
    rtol: float = 1e-3
    """dopri5: relative error per step that is accepted."""
    eta: float = 0.0
    """ddim: share of fresh noise; 0 is deterministic, 1 is DDPM's ancestral sampling."""
    first_step: int = 0
    """euler, heun, ddim: skip so many steps: start from given latents, noised to that time."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        positive(self, "timestep_shift", "atol", "rtol")
        at_least(self, 1, "guidance_channels")
        within(self, 0, 1, "eta")
        first, last = self.guidance_start, self.guidance_end
        order = "guidance_start and guidance_end must satisfy 0 <= guidance_start <= guidance_end"
        require(0 <= first <= last <= 1, f"{order} <= 1, got {first} and {last}")
        within(self, 0, self.steps - 1, "first_step", called="steps - 1")


@dataclass
class LDMAEConfig:
    """Everything that makes a latent diffusion model on an autoencoder's latents."""

    condition: Literal["text", "label", "none"] = "text"
    """What the pictures are asked for by: captions, class labels, or nothing."""
    classes: list[str] = field(default_factory=list)
    """Names of the labels in order: a prompt asks for the one that it names (or a number)."""
    model: DiTConfig = field(default_factory=lambda: DiTConfig(text_width=TextConfig.width))
    """Sizes of the network."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder, with condition=text."""
    objective: DiffusionConfig = field(default_factory=DiffusionConfig)
    """What is learnt."""
    # LDMAE section 4 and LightningDiT's yaml: constant rate, no decay, no clipping
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(2e-4, [0.9, 0.95], 0.0, clip=0.0, ema=0.9999)
    )
    """Optimizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling loop."""

    def network(self) -> DiTConfig:
        """Return the sizes of the network under this condition.

        Either text_width or num_classes is 0 in them; without a condition there is one label, which
        is never hidden, as in the released CelebA-HQ setting.
        """
        if self.condition == "text":
            return dataclasses.replace(self.model, num_classes=0)
        if self.condition == "label":
            return dataclasses.replace(self.model, text_width=0)
        return dataclasses.replace(self.model, text_width=0, num_classes=1, class_dropout_prob=0.0)

    def check_fit(self, first: Geometry) -> None:
        """Check that the sections fit each other and the autoencoder."""
        m, count, names = self.model, self.model.num_classes, len(self.classes)
        channels, (side, _) = first.channels, first.grid
        require(
            channels in (None, m.in_channels),
            f"model.in_channels must be the autoencoder's {channels} channels, got {m.in_channels}",
        )
        require(
            first.grid == (m.input_size, m.input_size),
            f"model.input_size must be the side of the latents {side}x{side}, got {m.input_size}",
        )
        if self.condition == "text":
            require(m.text_width > 0, "model.text_width must be above 0 with condition=text")
            self.text.check_width("model.text_width", m.text_width)
        if self.condition == "label":
            require(count > 0, "model.num_classes must be above 0 with condition=label")
            wanted = f"classes must name all of model.num_classes ({count}) or none"
            require(names in (0, count), f"{wanted}, got {names}")

    def check_sampling(self, sampling: SamplingConfig, first: Geometry) -> None:
        """Check that this model can be sampled in this way; messages begin with the setting."""
        kind, total, s = self.objective.kind, self.objective.train_steps, sampling
        solvers = {"flow": "euler, heun or dopri5", "ddpm": "ddim"}[kind]
        require(
            (s.solver == "ddim") == (kind == "ddpm"),
            f"sampling.solver must be {solvers} with objective.kind={kind}, got {s.solver}",
        )
        require(
            kind == "flow" or s.steps <= total,
            f"sampling.steps must be at most objective.train_steps ({total}), got {s.steps}",
        )
        for there, what in (
            (self.condition != "none", "with condition=none"),
            (self.model.class_dropout_prob > 0, "without model.class_dropout_prob"),
        ):
            fits = s.guidance == 1 or there
            require(fits, f"sampling.guidance must be 1 {what}, got {s.guidance}")
        require(
            s.first_step == 0 or s.solver != "dopri5",
            f"sampling.first_step must be 0 with sampling.solver=dopri5, got {s.first_step}",
        )


@dataclass
class ViTConfig:
    """Sizes of the masked autoencoder (`MaskedAutoencoderViT`); defaults: VMAE-f8d16."""

    image_size: int = 256
    """Side that the position tables are made for; they are resized for other images."""
    patch_size: int = 8
    """Pixels per latent position along each side."""
    embed_dim: int = 192
    """Width of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    num_heads: int = 12
    """Attention heads of the encoder."""
    decoder_embed_dim: int = 192
    """Width of the decoder."""
    decoder_depth: int = 12
    """Blocks of the decoder."""
    decoder_num_heads: int = 12
    """Attention heads of the decoder."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's perceptron as a multiple of its width."""
    head: Literal["smooth", "conv", "linear"] = "smooth"
    """smooth: linear, then a 3x3 convolution of the image; conv: 2x2 over tokens; linear: alone."""
    down_nonlinear: bool = False
    """Two layers around the latent instead of one."""

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size", "patch_size", "depth", "num_heads", "decoder_depth")
        at_least(self, 1, "decoder_num_heads")
        positive(self, "mlp_ratio")
        check_patches("image_size", self.image_size, self.patch_size)
        check_heads("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        width, heads = self.decoder_embed_dim, self.decoder_num_heads
        check_heads("decoder_embed_dim", width, "decoder_num_heads", heads)


@dataclass
class AutoencoderObjective(AdversarialConfig):
    """The losses, each switched off by weight 0; what belongs to some kinds says so.

    L = L_R + lambda_M L_M + lambda_P L_P + lambda_reg L_reg for vmae; the others have no L_M.
    """

    mask_ratio: float = 0.6
    """vmae: share of the patches hidden from the encoder; 0 encodes the whole image."""
    pixel_loss: Literal["l1", "l2"] = "l2"
    """Norm of all pixel differences."""
    visible_weight: float = 1.0
    """Weight of L_R, the reconstruction of what the encoder saw."""
    masked_weight: float = 1.0
    """vmae: lambda_M of L_M, the prediction of hidden patches."""
    perceptual_weight: float = 1.0
    """vmae, sdvae: lambda_P of L_P, LPIPS of the whole image; without lpips_path it is off."""
    lpips_path: str | None = None
    """File of VGG16 and LPIPS weights, a checkpoint that holds them, or a folder of both; shipped
    is a small network of scenes in that form (eval/perceptual.py)."""
    kl_weight: float | None = None
    """lambda_reg of L_reg per latent position; null: vmae 2e-6, vae 1e-4, sdvae 5e-9."""
    fixed_std: float | None = None
    """vmae: standard deviation that L_reg pulls to; null is 1."""
    norm_pix_loss: bool = False
    """vmae: compare with each patch at mean 0 and variance 1."""
    sample: bool = True
    """vmae, vae, sdvae: decode a draw from the posterior; false decodes its mean."""
    noise: float = 0.25
    """dae: standard deviation of the noise on the encoder's input, in pixels of [-1, 1]."""
    tuning_start: int | None = None
    """vmae: batches before the whole image is encoded and the posterior's mean decoded, as in the
    second stage of the released script, so that the decoder meets what it will decode; null never.
    """
    freeze_encoder: bool = False
    """Train the decoder alone."""

    disc_start: int = 50001
    """sdvae: batches before the discriminator takes part (LDM's number)."""
    disc_weight: float = 0.5
    """sdvae: weight of the adversarial term; 0 builds no discriminator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self, "mask_ratio")
        at_least(self, 0, "visible_weight", "masked_weight", "perceptual_weight", "noise")
        at_least(self, 0, "kl_weight", "tuning_start")
        std = self.fixed_std
        require(std is None or std > 0, f"fixed_std must be positive or null, got {std}")


@dataclass
class AutoencoderConfig:
    """Everything that `AutoencoderModule` is built from."""

    kind: Literal["vmae", "ae", "dae", "vae", "sdvae"] = "vmae"
    """vmae, or on one convolutional network: ae, dae (noisy input), vae (KL), sdvae (SD3's)."""
    channels: int = 16
    """Channels of the latent."""
    vit: ViTConfig = field(default_factory=ViTConfig)
    """Sizes of vmae."""
    conv: ConvConfig = field(default_factory=ConvConfig)
    """Sizes of the others."""
    objective: AutoencoderObjective = field(default_factory=AutoencoderObjective)
    """The losses."""
    optim: AdversarialOptimConfig = field(default_factory=AdversarialOptimConfig)
    """The optimizers."""
    start: str | None = None
    """File of an autoencoder whose weights training begins with; its position tables are resized
    to vit.image_size. null begins with random weights."""

    def __post_init__(self) -> None:
        at_least(self, 1, "channels")

    @property
    def factor(self) -> int:
        """Image pixels per latent position along each side."""
        return self.vit.patch_size if self.kind == "vmae" else self.conv.conv_factor

    @property
    def stochastic(self) -> bool:
        """Whether the encoder gives a variance too."""
        return self.kind in ("vmae", "vae", "sdvae")

    @property
    def kl_weight(self) -> float:
        """Weight of the regularisation: the objective's, or that of the kind."""
        given = self.objective.kl_weight
        return KL_WEIGHTS[self.kind] if given is None else given


# Weight of the regularisation where the settings name none. vmae: 1e-6 beside a reconstruction of
# weight 0.5 in the released script. vae: ours, a Gaussian likelihood of standard deviation 0.1
# over the 192 pixel values behind a latent position. sdvae: LDM's 1e-6 beside summed pixels, as a
# mean. The paper's own weights are published nowhere that could be reached.
KL_WEIGHTS = {"vmae": 2e-6, "vae": 1e-4, "sdvae": 5e-9, "ae": 0.0, "dae": 0.0}

# `paper`: 60 % hidden, unit variance, the losses' weights of the released script divided by that
# of L_R. `released`: the script as it runs (its visible_loss_ratio of 0.75 is not handed on).
# `tuning`: its second stage, at 256 px: the whole image, the posterior's mean, pixels + 10 LPIPS.
AUTOENCODER_OBJECTIVES = {
    "paper": AutoencoderObjective(),
    "released": AutoencoderObjective(
        mask_ratio=0.25,
        visible_weight=0.5,
        masked_weight=0.5,
        perceptual_weight=0.5,
        kl_weight=1e-6,
        fixed_std=1e-3,
    ),
    "tuning": AutoencoderObjective(
        mask_ratio=0.0, masked_weight=0.0, perceptual_weight=10.0, kl_weight=0.0, sample=False
    ),
}

# The rows of the paper's ablation, losses added one by one: L_R, L_M, L_reg, L_P. Without L_reg
# nothing keeps the variance up, and the posterior's mean is decoded; without L_M nothing is hidden.
PIXELS: dict[str, Any] = {
    "mask_ratio": 0.0,
    "masked_weight": 0.0,
    "kl_weight": 0.0,
    "sample": False,
    "perceptual_weight": 0.0,
}
MASKED = {**PIXELS, "mask_ratio": 0.6, "masked_weight": 1.0}
REGULAR = {**MASKED, "kl_weight": None, "sample": True}
AUTOENCODER_LOSSES: dict[str, dict[str, Any]] = {
    "l_r": PIXELS,
    "l_rm": MASKED,
    "l_rm_reg": REGULAR,
    "all": {**REGULAR, "perceptual_weight": 1.0},
}

# VMAE/train_ae.sh: batch 2048 of ImageNet, 400 epochs of 626 batches with 10 of warm-up, then 10
# epochs at 256 px. sdvae: LDM's autoencoder_kl, 4.5e-6 per sample of a batch of 12 on one device.
AUTOENCODER_OPTIM = {
    "released": AdversarialOptimConfig(
        lr=8e-4,
        betas=[0.9, 0.95],
        weight_decay=0.05,
        decay_all=False,
        warmup_batches=6260,
        decay_batches=250_400,
    ),
    "tuning": AdversarialOptimConfig(
        lr=8e-5, betas=[0.9, 0.95], weight_decay=0.05, decay_all=False, decay_batches=6260
    ),
    "sdvae": AdversarialOptimConfig(lr=5.4e-5),
}


# LightningDiT-B/1 and XL/1 with the flags of LDMAE's ImageNet and CelebA-HQ settings (trainable
# parameters: 130,336,528; 674.9 M; 129.57 M). `text` is ours: B/1 with cross-attention.
DIT_MODELS = {
    "paper": DiTConfig(),
    "xl1": DiTConfig(hidden_size=1152, depth=28, num_heads=16),
    "celebahq": DiTConfig(num_classes=1, class_dropout_prob=0.0, use_qknorm=False),
    "text": DiTConfig(text_width=1024),
}

# `released` is the ImageNet setting of isno0907/ldmae, whose guidance reaches 3 of 16 channels by
# a slip inherited from GLIDE and has the scale 10 for it. `paper` guides all channels, with the
# scale 4 at which users of LightningDiT report about the same pictures. `celebahq` has no guidance.
DIT_SAMPLING = {
    "paper": SamplingConfig(guidance=4.0, guidance_channels=None),
    "released": SamplingConfig(),
    "celebahq": SamplingConfig(guidance=1.0),
    "ddim": SamplingConfig(
        solver="ddim", steps=50, guidance=4.0, guidance_channels=None, guidance_start=0.0
    ),
}
