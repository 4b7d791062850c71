"""Settings that several papers share; light to import."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_modules.common.checks import at_least, below_one, positive, require


@dataclass
class TextConfig:
    """How captions become vectors."""

    name: Literal["bytes", "byt5", "t5", "open_clip", "clip"] = "bytes"
    """bytes: trained with the generator; byt5: frozen ByT5 and open_clip; t5: states of a frozen
    T5; open_clip: its pooled vectors alone; clip: hidden states of a frozen CLIP text transformer.
    """
    width: int = 128
    """bytes: width of the encoder and of its output vectors."""
    layers: int = 1
    """bytes: layers of the bidirectional GRU."""
    buckets: int = 4096
    """bytes: rows of the table that byte n-grams are hashed into."""
    max_length: int = 64
    """Longest text in tokens (bytes: words; byt5: bytes; t5: pieces); the rest is cut."""
    path: str = "google/byt5-xl"
    """byt5, t5: folder or hub name of the T5 encoder. clip: that of the CLIP text model, such as
    openai/clip-vit-base-patch32, or a file of OpenAI's weights."""
    mask_padding: bool = True
    """byt5, t5: hide padding from the generator; false attends to it, as the released code does."""
    clip: str | None = "ViT-H-14"
    """byt5, open_clip: model of the pooled text and image vectors; null leaves them out."""
    clip_pretrained: str = "laion2b_s32b_b79k"
    """byt5, open_clip: tag or weights file of the open_clip model."""
    hidden_state: int = -1
    """clip: -1 is the last hidden state, behind the final norm; -2 the one before, not normed."""
    unit_norm: bool = True
    """clip: divide every token vector by its L2 norm."""
    projected: bool = False
    """clip: also give the projected vector of the end token, as the pooled one."""
    pad_id: int = 0
    """clip: token id that fills a text up to the model's length; padding is never hidden."""

    def __post_init__(self) -> None:
        at_least(self, 1, "layers", "buckets", "max_length")
        at_least(self, 0, "pad_id")
        end = self.hidden_state
        require(end < 0, f"hidden_state counts from the end, got {end}")
        even = self.width >= 2 and self.width % 2 == 0
        require(even, f"width must be even and at least 2, got {self.width}")

    def check_width(self, name: str, width: int) -> None:
        """Refuse a network's setting `name` that is not the width of vectors trained with it."""
        require(
            self.name != "bytes" or width == self.width,
            f"{name} must be text.width ({self.width}) with text.name=bytes, got {width}",
        )

    @property
    def pooled(self) -> bool:
        """Whether every caption also has one pooled CLIP vector."""
        if self.name == "clip":
            return self.projected
        return self.name in ("byt5", "open_clip") and self.clip is not None


@dataclass
class OptimConfig:
    """Optimizer of a generator."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = True
    """Decay every parameter, as the released code does; false exempts biases and norms."""
    warmup_steps: int = 0
    """Steps of the linear warm-up from 0 (the first step has rate 0, as in the released code)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or cosine to 0 at trainer.max_steps."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 turns it off."""

    def __post_init__(self) -> None:
        positive(self, "lr")
        at_least(self, 0, "weight_decay", "warmup_steps", "clip")
        _check_betas(self.betas)
        below_one(self, "ema")


@dataclass
class ConvConfig:
    """Sizes of a convolutional autoencoder; defaults: SD3's."""

    in_channels: int = 3
    """channels of an image"""
    ch: int = 128
    """base width"""
    ch_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """width of each level as a multiple of ch; one level fewer halvings than entries"""
    num_res_blocks: int = 2
    """residual blocks per level (the decoder has one more)"""
    attn_resolutions: list[int] = field(default_factory=list)
    """feature map sizes that get attention, counted from `resolution` when building"""
    attn_type: Literal["vanilla", "none"] = "vanilla"
    """none removes all attention, also the one in the middle"""
    resolution: int = 256
    """image size that attn_resolutions refers to; other sizes may still be encoded"""
    norm_groups: int = 32
    """groups of GroupNorm; every width must be a multiple"""
    dropout: float = 0.0
    """dropout inside the residual blocks"""

    def __post_init__(self) -> None:
        at_least(self, 1, "in_channels", "ch", "num_res_blocks", "resolution", "norm_groups")
        require(bool(self.ch_mult), "ch_mult must name at least one level, got []")
        below_one(self, "dropout")
        self.check_widths(self.ch)

    def check_widths(self, base: int) -> None:
        """Refuse levels of width base * m that GroupNorm cannot divide."""
        odd = [base * m for m in self.ch_mult if base * m % self.norm_groups]
        require(not odd, f"norm_groups must divide every width, got {self.norm_groups} at {odd}")

    @property
    def conv_factor(self) -> int:
        """Image pixels per latent position along each side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass
class AdversarialConfig:
    """The discriminator against which an autoencoder is trained (Esser et al. 2021)."""

    disc_start: int = 10000
    """batches before the discriminator takes part"""
    disc_weight: float = 0.8
    """weight of the adversarial term; 0 builds no discriminator"""
    disc_factor: float = 1.0
    """further factor on the adversarial losses of both networks; 0 builds no discriminator"""
    disc_layers: int = 3
    """strided convolutions of the PatchGAN"""
    disc_width: int = 64
    """width of its first convolution"""
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    """loss of the discriminator"""
    use_actnorm: bool = False
    """ActNorm instead of BatchNorm in the discriminator"""
    adaptive_weight: bool = True
    """scale the adversarial term to the reconstruction's gradient at the last layer"""
    adaptive_max: float = 1e4
    """upper bound of that scale"""

    def __post_init__(self) -> None:
        at_least(self, 1, "disc_layers", "disc_width")
        at_least(self, 0, "disc_start", "disc_weight", "disc_factor", "adaptive_max")

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.disc_weight > 0 and self.disc_factor > 0


@dataclass
class AdversarialOptimConfig:
    """Optimizers of an autoencoder and its discriminator: one schedule, counted in batches."""

    lr: float = 1e-4
    """learning rate of the autoencoder after warm-up"""
    disc_lr: float | None = None
    """learning rate of the discriminator; null: as lr"""
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    """Adam's betas"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    decay_all: bool = True
    """decay every parameter; false exempts biases and norms"""
    warmup_batches: int = 0
    """batches of the linear warm-up"""
    decay_batches: int = 0
    """batch at which a cosine decay reaches lr_end; 0 keeps the rate constant after warm-up"""
    lr_end: float = 0.0
    """learning rate at the end of the decay, as a multiple of lr"""
    clip: float = 0.0
    """largest gradient norm of each network; 0 does not clip"""

    def __post_init__(self) -> None:
        positive(self, "lr", "disc_lr")
        at_least(self, 0, "weight_decay", "warmup_batches", "decay_batches", "lr_end", "clip")
        _check_betas(self.betas)


def _check_betas(betas: list[float]) -> None:
    fit = len(betas) == 2 and all(0 <= b < 1 for b in betas)
    require(fit, f"betas must be two numbers in [0, 1), got {betas}")
