"""Settings of the tokenizer and the sizes that were released."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_modules.common.checks import at_least, below_one, positive, require
from lightning_modules.common.config import AdversarialConfig, AdversarialOptimConfig, ConvConfig


@dataclass
class ModelConfig(ConvConfig):
    """The autoencoder and its quantizer: all that a tokenizer file needs to be rebuilt."""

    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """taming: width of each level as a multiple of ch; one level fewer halvings than entries"""
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    """taming: feature map sizes that get attention, counted from `resolution` when building"""

    network: Literal["taming", "paella"] = "taming"
    """taming: VQGAN of Esser et al. (f = 2^(levels-1)), whose sizes are those from ch to
    unit_range; paella: the f4 network of Paella"""
    num_codes: int = 1024
    """number of code vectors K"""

    ch_first: int = 0
    """taming: channels behind the encoder's first convolution; 0 is ch"""
    z_channels: int = 256
    """taming: channels between encoder and quant_conv"""
    embed_dim: int = 256
    """taming: length of a code vector"""
    decoder_ch: int = 0
    """taming: base width of the decoder; 0 is ch"""
    decoder_res_blocks: int = 0
    """taming: residual blocks per level of the decoder; 0 is one more than num_res_blocks"""
    unit_range: bool = False
    """taming: the network's own images are in [0, 1] (aMUSEd), which stays inside"""

    levels: int = 2
    """paella: number of halvings (2: f4, 3: f8)"""
    bottleneck_blocks: int = 12
    """paella: residual blocks of the decoder at the lowest resolution"""
    c_hidden: int = 384
    """paella: width at the lowest resolution"""
    decoder_hidden: int = 0
    """paella: width of the decoder at the lowest resolution; 0 is c_hidden"""
    c_latent: int = 4
    """paella: length of a code vector"""
    scale_factor: float = 1.0
    """paella: continuous latents are handed out divided by this; tokens are not affected"""

    quantizer: Literal["nearest", "ema", "gumbel", "l2"] = "nearest"
    """how latents become codes"""
    beta: float = 0.25
    """nearest, l2, ema: weight of the commitment term (with legacy_beta: of the codebook term)"""
    legacy_beta: bool = False
    """nearest: beta on the codebook term, as in all released taming and LDM models"""
    decay: float = 0.99
    """ema: decay of cluster sizes and sums"""
    eps: float = 1e-5
    """ema: Laplace smoothing of the cluster sizes"""
    entropy_weight: float = 0.0
    """l2: weight of the entropy loss"""
    kl_weight: float = 5e-4
    """gumbel: weight of the divergence from the uniform distribution over codes"""
    temperature: float = 1.0
    """gumbel: softmax temperature at the first batch"""
    temperature_end: float = 1.0
    """gumbel: temperature after temperature_batches"""
    temperature_batches: int = 0
    """gumbel: batches of the cosine from temperature to temperature_end; 0 keeps it constant"""
    straight_through: bool = True
    """gumbel: one-hot codes with the gradient of the softmax; false trains on soft codes"""
    sample_tokens: bool = False
    """gumbel: encode draws tokens with Gumbel noise (the released code does); false takes argmax"""
    restart_after: int = 0
    """a code unused for so many batches becomes a random latent of the batch; 0 never"""

    used_codes: int = 0
    """tokens are renumbered to this many kept codes (the buffer `used`); 0 keeps all"""
    unknown_code: Literal["extra", "random", "id"] = "extra"
    """what a code that was not kept becomes: an extra id, a random kept id, or unknown_id"""
    unknown_id: int = 0
    """the new id for unknown_code=id"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_codes", "levels")
        at_least(self, 0, "restart_after", "temperature_batches", "used_codes", "unknown_id")
        at_least(self, 0, "decoder_ch", "decoder_res_blocks", "decoder_hidden")
        at_least(self, 0, "bottleneck_blocks", "ch_first")
        positive(self, "temperature", "temperature_end", "scale_factor")
        below_one(self, "decay")
        self.check_widths(self.decoder_ch)
        for name in ("c_hidden", "decoder_hidden"):
            width, halvings = getattr(self, name), self.levels - 1
            fits = self.network == "taming" or width % 2**halvings == 0
            require(fits, f"{name} must halve {halvings} times, got {width}")
        learnt = self.quantizer == "gumbel" and self.restart_after > 0
        require(not learnt, "restart_after must be 0 with quantizer=gumbel, whose codes are learnt")
        kept = self.used_codes
        require(kept <= self.num_codes, f"used_codes must be at most num_codes, got {kept}")
        fits = not kept or self.unknown_id < kept
        require(fits, f"unknown_id must be below used_codes, got {self.unknown_id}")

    @property
    def code_dim(self) -> int:
        """Length of a code vector."""
        return self.embed_dim if self.network == "taming" else self.c_latent

    @property
    def factor(self) -> int:
        """Image pixels per token along each side."""
        return self.conv_factor if self.network == "taming" else 2**self.levels


@dataclass
class ObjectiveConfig(AdversarialConfig):
    """The reconstruction and adversarial losses (Esser et al. 2021, section 3.1)."""

    pixel_loss: Literal["l1", "l2"] = "l1"
    """norm of the pixel difference"""
    pixel_weight: float = 1.0
    """weight of the pixel difference"""
    perceptual_weight: float = 1.0
    """weight of LPIPS; without lpips_path the term is off"""
    lpips_path: str | None = None
    """file of VGG16 and LPIPS weights, a taming checkpoint that holds them, or a folder of both;
    shipped is a small network of scenes in that form (eval/perceptual.py)"""
    codebook_weight: float = 1.0
    """weight of the quantizer's loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "pixel_weight", "perceptual_weight", "codebook_weight")


@dataclass
class VQGANConfig:
    """Everything that `VQGANModule` is built from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """the autoencoder and its quantizer"""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """the losses"""
    optim: AdversarialOptimConfig = field(default_factory=AdversarialOptimConfig)
    """the optimizers"""
    finetune: str | None = None
    """tokenizer file whose encoder and codes are taken and never changed: only a decoder is
    trained, its own or a wider one (Muse, section 2.6); null trains all"""


# Released models. Sizes: the model yaml of each checkpoint in CompVis/taming-transformers (README
# "Overview of pretrained models") and CompVis/latent-diffusion (models/first_stage_models);
# losses: the same files, or configs/ of taming. Rates follow its main.py: accumulate x GPUs x
# batch x 4.5e-6. Paella: dome272/Paella, src/vqgan.py; its training code was never published.
F4: dict[str, Any] = {
    "num_codes": 8192,
    "ch_mult": [1, 2, 4],
    "attn_resolutions": [],
    "z_channels": 3,
    "embed_dim": 3,
}
F8: dict[str, Any] = {"ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}
F8 |= {"z_channels": 4, "embed_dim": 4}


def _released(lr: float, model: dict[str, Any], **objective: Any) -> VQGANConfig:
    """Make a model of the nearest code, trained with the legacy beta."""
    nearest = ModelConfig(**{"legacy_beta": True, **model})
    return VQGANConfig(nearest, ObjectiveConfig(**objective), AdversarialOptimConfig(lr=lr))


PRESETS: dict[str, VQGANConfig] = {
    "imagenet-f16-1024": _released(1.08e-4, {"num_codes": 1024}, disc_start=250001),
    "imagenet-f16-16384": _released(
        1.08e-4, {"num_codes": 16384}, disc_start=0, disc_weight=0.75, disc_layers=2
    ),
    # the loss settings of the Gumbel model were never published: kl weight and temperatures were
    "openimages-gumbel-f8": VQGANConfig(
        ModelConfig(
            num_codes=8192,
            ch_mult=[1, 1, 2, 4],
            attn_resolutions=[32],
            quantizer="gumbel",
            kl_weight=1e-8,
            temperature=0.9,
            temperature_end=1e-6,
            temperature_batches=1000001,
            sample_tokens=True,
        ),
        ObjectiveConfig(disc_start=250001),
        AdversarialOptimConfig(lr=1.08e-4),
    ),
    "ldm-vq-f4": _released(3.6e-5, F4, disc_start=0, disc_weight=0.75),
    "ldm-vq-f4-noattn": _released(
        3.6e-5, F4 | {"attn_type": "none"}, disc_start=0, disc_weight=0.75
    ),
    "ldm-vq-f8": _released(
        4.5e-5, F8 | {"num_codes": 16384}, disc_start=1, disc_weight=0.6, disc_layers=2
    ),
    "ldm-vq-f8-n256": _released(
        4.5e-5, F8 | {"num_codes": 256}, disc_start=250001, disc_weight=0.75
    ),
    "ldm-vq-f16": _released(
        6.3e-5,
        {"num_codes": 16384, "z_channels": 8, "embed_dim": 8},
        disc_start=250001,
        disc_weight=0.75,
        disc_layers=2,
    ),
    "paella-f4": VQGANConfig(
        ModelConfig(network="paella", num_codes=8192, scale_factor=0.3764),
    ),
}
