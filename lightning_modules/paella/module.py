"""Paella as a LightningModule: its network, loss and sampling loop on captioned tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.seeding import mix_seed
from lightning_modules.common.settings import build, plain
from lightning_modules.paella import process
from lightning_modules.paella.config import PaellaConfig, SamplingConfig
from lightning_modules.paella.network import Paella
from lightning_modules.paella.network_v1 import DenoiseUNet


class PaellaModule(GeneratorModule):
    """Text-conditional renoising of image tokens (arXiv 2211.07292), of 2023 (v3) or 2022 (v1)."""

    config_class = PaellaConfig
    config: PaellaConfig

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        v1 = self.config.network == "v1"
        self.network = DenoiseUNet(self.config.v1) if v1 else Paella(self.config.model)
        self.num_codes: int = self.network.config.num_labels
        if config["num_codes"] != self.num_codes:
            raise ValueError(
                f"{'v1' if v1 else 'model'}.num_labels must be the tokenizer's "
                f"{config['num_codes']} codes, got {self.num_codes}"
            )

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross entropy of the clean tokens given noised ones (src_distributed/train.py).

        v1 draws r uniformly and replaces tokens with probability cos(r pi/2) instead.

        Args:
            batch: tokens [B, h, w] or image [B, 3, H, W], and caption.
            generator: source of noise rates, noise and condition drops, on this module's device.

        Returns:
            The loss and the accuracy over all tokens, both scalars.
        """
        tokens, objective = self.tokens_of(batch), self.config.objective
        chance: dict[str, Any] = {"generator": generator, "device": self.device}
        time = torch.rand(tokens.shape[0], **chance)
        if self.config.network == "v1":
            t = process.cosine_rate(time)
        else:
            t = time = process.noise_rate(time, objective.t_law)
        random_tokens = torch.randint(self.num_codes, tokens.shape, **chance)
        uniforms = torch.rand(tokens.shape, **chance)
        noised, mask = process.add_noise(tokens, t, uniforms, random_tokens)
        side = self._training_side(batch, generator)
        everywhere = torch.ones_like(mask)
        logits = self.network.head(
            self.network.mixed_rows(noised, time, [side], [1.0], everywhere)
        )  # [B h w, K]
        ce = F.cross_entropy(
            logits.float(),
            tokens.flatten(),
            reduction="none",
            label_smoothing=objective.label_smoothing,
        ).view(tokens.shape)
        eta = 1.0 if self.config.network == "v1" else objective.eta  # v1 takes the plain mean
        weight = process.loss_weight(mask, t, eta)
        accuracy = (logits.detach().argmax(1) == tokens.flatten()).float().mean()
        return process.sample_loss(ce, weight).mean(), {"accuracy": accuracy}

    def _training_side(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        """The condition with its parts dropped independently of each other."""
        objective, captions = self.config.objective, batch["caption"]
        draws = torch.rand(3, len(captions), generator=generator, device=self.device)
        if objective.drop_per == "batch":
            draws = draws[:, :1].expand_as(draws)
        rates = (objective.text_drop, objective.pooled_drop, objective.image_drop)
        hide_text, hide_pooled, hide_image = (d < r for d, r in zip(draws, rates, strict=True))
        if isinstance(self.network, DenoiseUNet):
            return self._pooled(captions) * ~hide_text[:, None]
        shown = ["" if h else c for c, h in zip(captions, hide_text.tolist(), strict=True)]
        condition = self.encode_text(shown)
        pooled = image = None
        if self.config.model.clip_embd > 0:
            pooled = torch.where(hide_pooled[:, None], self._pooled([""]), self._pooled(captions))
            if self.config.model.clip_image:
                if "image" not in batch:
                    raise ValueError(
                        "model.clip_image needs the pictures in training: add data.cache=false"
                    )
                # hidden images pass the mapper too: DDP wants a gradient of every parameter
                hidden = bool(hide_image.all())
                image = torch.zeros_like(pooled) if hidden else self.encode_images(batch["image"])
        sequence, mask = self.network.condition(condition.tokens, pooled, image, condition.mask)
        if image is not None and bool(hide_image.any()):
            if mask is None:
                mask = torch.ones(sequence.shape[:2], dtype=torch.bool, device=self.device)
            mask[:, -self.config.model.clip_seq_len :] &= ~hide_image[:, None]
        return self.network.prepare(sequence, mask)

    def _pooled(self, captions: list[str]) -> Tensor:
        """One text vector per caption [B, P].

        Raises:
            ValueError: the text encoder gives none.
        """
        pooled = self.encode_text(captions).pooled
        if pooled is None:
            raise ValueError(
                f"text.name={self.config.text.name} with text.clip={self.config.text.clip} gives "
                "no pooled vectors, which this network is conditioned on"
            )
        return pooled

    def _side(
        self,
        captions: list[str],
        image: Tensor | None = None,
        attn_weights: Tensor | None = None,
    ) -> Any:
        """What `mixed_rows` of the network takes as one condition."""
        if isinstance(self.network, DenoiseUNet):
            return self._pooled(captions) if image is None else image
        condition = self.encode_text(captions)
        pooled = condition.pooled if self.config.model.clip_embd > 0 else None
        return self.network.prepare(
            *self.network.condition(condition.tokens, pooled, image, condition.mask), attn_weights
        )

    def _null_side(self, negative: list[str] | None, like: Any) -> Any:
        """The other side of the guidance: the empty or a negative caption; zeros for v1."""
        if negative is None and isinstance(self.network, DenoiseUNet):
            return torch.zeros_like(like)
        return self._side([""] if negative is None else negative)

    @torch.no_grad()
    def sample_tokens(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        negative: list[str] | None = None,
        blend_with: list[str] | None = None,
        blend: float = 0.0,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        image_condition: Tensor | None = None,
        attn_weights: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw tokens for prompts; image i depends on prompt i and seed i alone.

        Args:
            prompts: B captions.
            seeds: B seeds.
            negative: B captions in place of the empty one on the other side of the guidance.
            blend_with: B captions to blend into: the features of both are mixed.
            blend: share of `blend_with`, 0 to 1.
            start: [B, h, w] tokens: what stands where mask is 0, or, without a mask, what a
                variation starts from (with sampling.first_step above 0).
            mask: [B, h, w], 1 = generate, 0 = keep start's token.
            image_condition: [B, P] pooled image vectors of `encode_images`.
            attn_weights: [n] factors of the attention to the last n conditioning tokens.
            grid: token grid other than the one trained on; default is start's.
            on_step: called with step, input tokens and result tokens [B, h, w].
            **sampling: settings of `SamplingConfig` that differ from this checkpoint's.

        Returns:
            [B, h, w] int64.

        Raises:
            ValueError: an unknown setting, or one out of range.
        """
        settings = build(SamplingConfig, {**plain(self.config.sampling), **sampling})
        loop = process.loop_settings(settings)
        if grid is None:
            grid = self.grid if start is None else (start.shape[1], start.shape[2])
        noise = process.sample_noise(
            seeds,
            len(loop["times"]),
            loop["renoise_steps"],
            grid,
            self.num_codes,
            random_tokens=settings.renoise_mode == "rand",
        )
        noise = {name: tensor.to(self.device) for name, tensor in noise.items()}
        if start is not None and mask is None and settings.first_step > 0:
            # a variation begins with the image's tokens, noised to the rate of its first step
            rate = process.start_rate(settings).to(self.device)
            generators = [torch.Generator().manual_seed(mix_seed(seed, 1)) for seed in seeds]
            uniforms = torch.stack([torch.rand(grid, generator=g) for g in generators])
            start, _ = process.add_noise(
                start, rate.expand(len(seeds)), uniforms.to(self.device), noise["init_noise"]
            )
        own = self._side(prompts, image_condition, attn_weights)
        other = self._side(blend_with, image_condition, attn_weights) if blend_with else None
        null = self._null_side(negative, own)

        def predict(x: Tensor, t: Tensor, weight: float, keep: Tensor) -> Tensor:
            sides = [own] if other is None else [own, other]
            shares = [1.0] if other is None else [1 - blend, blend]
            if weight != 1:
                sides, shares = [*sides, null], [*(weight * s for s in shares), 1 - weight]
            return self.network.mixed_rows(x, t, sides, shares, keep)

        return process.sample(
            predict,
            self.network.head,
            **noise,
            **loop,
            mask=None if mask is None else mask.to(self.device),
            start=start,
            codebook=self.tokenizer.codebook() if settings.mode == "quant" else None,
            on_step=on_step,
        )
