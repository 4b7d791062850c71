"""VQGAN as a LightningModule: the tokenizer that generators meet, and its training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.files import file_hash
from lightning_modules.common.adversarial_training import AdversarialModule, image_psnr
from lightning_modules.common.checkpoint import load_strict, load_weights
from lightning_modules.common.optim import cosine
from lightning_modules.common.settings import build, plain
from lightning_modules.vqgan.config import VQGANConfig
from lightning_modules.vqgan.losses import reconstruction_loss
from lightning_modules.vqgan.network import NETWORKS
from lightning_modules.vqgan.quantizer import Quantized, code_counts, perplexity, usage


class Reconstructed(NamedTuple):
    """What became of images, and how far it is from them."""

    loss: Tensor
    """All but the adversarial term."""
    nll: Tensor
    """The same without the quantizer's loss."""
    parts: dict[str, Tensor]
    """The terms of `nll` without weights."""
    images: Tensor
    """[B, 3, H, W], not clamped."""
    quantized: Quantized
    latents: Tensor
    """[B, c, h, w]."""


class VQGANModule(AdversarialModule):
    """The tokenizer: images [-1, 1] to codes and back, and the GAN training that makes it.

    Args:
        config: plain dict with the sections of `VQGANConfig`, and optionally `seed` (0).

    Raises:
        ValueError: an unknown setting, or one out of range.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {k: v for k, v in config.items() if k not in ("seed", "paper")}
        c = build(VQGANConfig, own)
        super().__init__(config, c.optim, c.objective)
        self.config = c
        self.autoencoder = NETWORKS[c.model.network](c.model)
        self.add_discriminator(c.model.in_channels)
        self.factor: int = c.model.factor
        # sha256 of the tokenizer file whose tokens this one shares, where it was fine-tuned
        self.same_tokens_as: str | None = None
        if c.finetune is not None:
            self._frozen().requires_grad_(False)
        self._val_counts = torch.zeros(c.model.num_codes, dtype=torch.int64)

    def adopt(self, state: Mapping[str, Tensor], same_tokens_as: str) -> None:
        """Take encoder and codes of a tokenizer, and its decoder too if it is as wide as ours.

        Args:
            state: tensors of its `export`; ValueError where encoder or codes do not fit.
            same_tokens_as: sha256 of its file, or of the one that it took its own encoder from.
        """
        own = self.autoencoder.state_dict()
        decoding = tuple(f"{name}." for name in self.autoencoder.decoding)
        fits = {k for k, v in state.items() if k in own and own[k].shape == v.shape}
        as_wide = all(k in fits for k in own if k.startswith(decoding))
        taken = {k: v for k, v in state.items() if as_wide or not k.startswith(decoding)}
        kept = {k: v for k, v in own.items() if k.startswith(decoding) and not as_wide}
        load_strict(self.autoencoder, {**taken, **kept}, "the tokenizer that finetune names")
        self.same_tokens_as = same_tokens_as
        self.train(self.training)  # the frozen encoder's batch norms, too, leave off learning

    def _frozen(self) -> nn.ModuleList:
        """Encoder and codes, which fine-tuning of the decoder leaves alone."""
        parts = self.autoencoder.named_children()
        return nn.ModuleList(p for name, p in parts if name not in self.autoencoder.decoding)

    def train(self, mode: bool = True) -> "VQGANModule":
        """Set the mode; frozen parts stay in that of evaluation."""
        super().train(mode)
        if self.config.finetune is not None:
            self._frozen().eval()
        return self

    @property
    def num_codes(self) -> int:
        """Number of token ids that `encode` can return."""
        return self.autoencoder.quantize.num_tokens

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to tokens [B, H/factor, W/factor] in [0, num_codes).

        The generator is for Gumbel models with sample_tokens and for unknown_code=random.
        """
        self.check_size(images)
        z, quantize = self.autoencoder.encode(images), self.autoencoder.quantize
        return quantize.to_used(quantize.assign(z, generator), generator)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, h, w] int64 to images [B, 3, h*factor, w*factor], clamped to [-1, 1]."""
        quantize = self.autoencoder.quantize
        return self.decode_codes(quantize.lookup(quantize.to_all(tokens))).clamp(-1, 1)

    def codebook(self) -> Tensor:
        """Return the vector of each token id [num_codes, c]."""
        quantize = self.autoencoder.quantize
        ids = torch.arange(self.num_codes, device=self.device)
        return quantize.codebook()[quantize.to_all(ids)].detach()

    def latents(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] divided by scale_factor."""
        self.check_size(images)
        return self.autoencoder.encode(images) / self.config.model.scale_factor

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Map code vectors [B, c, h, w] to images [B, 3, H, W], not clamped."""
        return self.autoencoder.decode(codes.to(self.autoencoder.last_layer.dtype))

    def forward(
        self, images: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Quantized, Tensor]:
        """Encode, quantize and decode images [B, 3, H, W] in [-1, 1].

        Args:
            images: [B, 3, H, W].
            noise: of a Gumbel quantizer, which draws it where it is missing.

        Returns:
            Reconstructions [B, 3, H, W] (not clamped), the quantizer's output, latents.
        """
        z = self.autoencoder.encode(images)
        quantized = self.autoencoder.quantize(z, noise)
        return self.decode_codes(quantized.codes), quantized, z

    def compute_loss(self, images: Tensor, noise: Tensor | None = None) -> Reconstructed:
        """Reconstruct images [B, 3, H, W] and compare; all but the adversarial term, as one graph.

        `noise` is that of `forward`.
        """
        objective = self.config.objective
        made, quantized, z = self(images, noise)
        nll, logs = reconstruction_loss(images, made, objective, self.perceptual())
        loss = nll + objective.codebook_weight * quantized.loss
        return Reconstructed(loss, nll, logs, made, quantized, z)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a tokenizer file holds: the autoencoder with its quantizer, and settings."""
        state = {k: v.detach() for k, v in self.autoencoder.state_dict().items()}
        config: dict[str, Any] = {"paper": "vqgan", "model": plain(self.config.model)}
        if self.same_tokens_as is not None:
            config["tokens_of"] = self.same_tokens_as
        return state, config

    @classmethod
    def from_export(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> "VQGANModule":
        """Build the tokenizer, without discriminator, from `export` or a Lightning checkpoint."""
        prefix = "autoencoder."
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        objective = {"disc_weight": 0.0, "perceptual_weight": 0.0}
        module = cls({"model": dict(config["model"]), "objective": objective})
        load_strict(module.autoencoder, state, "the tokenizer file")
        module.same_tokens_as = config.get("tokens_of")
        return module.eval()

    def trained_network(self) -> nn.Module:
        """Return encoder, quantizer and decoder."""
        return self.autoencoder

    def setup(self, stage: str) -> None:
        """Take the encoder of the tokenizer that finetune names, and LPIPS for the loss."""
        if stage == "fit" and self.config.finetune is not None and self.same_tokens_as is None:
            path = self.config.finetune
            state, config = load_weights(path)
            if config.get("paper") != "vqgan":
                raise ValueError(f"finetune: {path} is no tokenizer file")
            self.adopt(state, config.get("tokens_of") or file_hash(path))
        objective = self.config.objective
        self.use_lpips(objective.lpips_path, objective.perceptual_weight, stage)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Step the autoencoder, then the discriminator once disc_start batches were seen."""
        images = batch["image"]
        self._set_temperature()
        loss, nll, logs, made, quantized, z = self.compute_loss(images)
        logs |= self.update(images, made, nll, loss) | {"codebook": quantized.loss}
        if self.config.finetune is None:
            self.autoencoder.quantize.update(z, quantized.tokens)
        counts = code_counts(quantized.tokens, self.config.model.num_codes)
        logs |= {"usage": usage(counts), "perplexity": perplexity(counts)}
        self.log_scalars("train", logs, images)

    def on_validation_epoch_start(self) -> None:
        """Start the code histogram of a validation pass."""
        self._val_counts = torch.zeros_like(self._val_counts, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the losses of the reconstruction and PSNR, and count the codes."""
        images = batch["image"]
        loss, _, logs, made, quantized, _ = self.compute_loss(images)
        logs |= {
            "loss": loss,
            "codebook": quantized.loss,
            "psnr": image_psnr(images, made),
        }
        self.log_scalars("val", logs, images)
        self._val_counts += code_counts(quantized.tokens, self.config.model.num_codes)

    def on_validation_epoch_end(self) -> None:
        """Log codebook usage and perplexity over the whole validation set."""
        counts = self.trainer.strategy.reduce(self._val_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        self.log("val/usage", usage(counts), sync_dist=True)
        self.log("val/perplexity", perplexity(counts), sync_dist=True)

    def _set_temperature(self) -> None:
        """Set the Gumbel temperature of this batch."""
        m = self.config.model
        if m.temperature_batches:
            self.autoencoder.quantize.temperature = cosine(
                m.temperature, m.temperature_end, self.batches_seen, m.temperature_batches
            )
