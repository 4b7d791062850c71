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
from lightning_modules.paella.network import Paella, Prepared, layer_norm


class PaellaModule(GeneratorModule):
    """Text-conditional renoising of image tokens (arXiv 2211.07292), the model of 2023."""

    config_class = PaellaConfig
    config: PaellaConfig

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.network = Paella(self.config.model)

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross entropy of the clean tokens given noised ones (src_distributed/train.py).

        Args:
            batch: tokens [B, h, w] or image [B, 3, H, W], and caption.
            generator: source of noise rates, noise and condition drops, on this module's device.

        Returns:
            The loss and the accuracy over all tokens, both scalars.
        """
        tokens = self.tokens_of(batch)
        uniforms = torch.rand(tokens.shape[0], generator=generator, device=self.device)
        t = process.noise_rate(uniforms, self.config.objective.t_law)
        noised, mask = process.add_noise(
            tokens,
            t,
            torch.rand(tokens.shape, generator=generator, device=self.device),
            torch.randint(
                self.config.model.num_labels, tokens.shape, generator=generator, device=self.device
            ),
        )
        features = self.network.features(noised, t, self._training_condition(batch, generator))
        logits = self.network.head(layer_norm(features))  # [B, h, w, K]
        ce = F.cross_entropy(
            logits.flatten(0, 2).float(),
            tokens.flatten(),
            reduction="none",
            label_smoothing=self.config.objective.label_smoothing,
        ).view(tokens.shape)
        weight = process.loss_weight(mask, t, self.config.objective.eta)
        accuracy = (logits.detach().argmax(-1) == tokens).float().mean()
        return process.sample_loss(ce, weight).mean(), {"accuracy": accuracy}

    def _training_condition(self, batch: dict[str, Any], generator: torch.Generator) -> Prepared:
        """The condition with its parts dropped independently, as section 1.3 of the sheet lists."""
        objective, captions = self.config.objective, batch["caption"]
        draws = torch.rand(3, len(captions), generator=generator, device=self.device)
        if objective.drop_per == "batch":
            draws = draws[:, :1].expand_as(draws)
        rates = (objective.text_drop, objective.pooled_drop, objective.image_drop)
        hide_text, hide_pooled, hide_image = (d < r for d, r in zip(draws, rates, strict=True))
        shown = ["" if h else c for c, h in zip(captions, hide_text.tolist(), strict=True)]
        condition = self.encode_text(shown)
        pooled = None
        if self.config.model.clip_embd > 0:
            full, null = self.encode_text(captions).pooled, self.encode_text([""]).pooled
            assert full is not None and null is not None
            pooled = torch.where(hide_pooled[:, None], null, full)
        image = None
        if self.config.model.clip_embd > 0 and self.config.model.clip_image:
            if "image" not in batch:
                raise ValueError(
                    "model.clip_image needs the pictures in training: set data.cache=false"
                )
            image = None if bool(hide_image.all()) else self.encode_images(batch["image"])
        sequence, mask = self.network.condition(condition.tokens, pooled, image, condition.mask)
        if image is not None and bool(hide_image.any()):
            if mask is None:
                mask = torch.ones(sequence.shape[:2], dtype=torch.bool, device=self.device)
            mask[:, -self.config.model.clip_seq_len :] &= ~hide_image[:, None]
        return self.network.prepare(sequence, mask)

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
            self.config.model.num_labels,
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
        own = self._prepared(prompts, image_condition, attn_weights)
        other = self._prepared(blend_with, image_condition, attn_weights) if blend_with else None
        null = self._prepared(negative or [""] * len(prompts))

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

    def _prepared(
        self,
        captions: list[str],
        image: Tensor | None = None,
        attn_weights: Tensor | None = None,
    ) -> Prepared:
        condition = self.encode_text(captions)
        pooled = condition.pooled if self.config.model.clip_embd > 0 else None
        return self.network.prepare(
            *self.network.condition(condition.tokens, pooled, image, condition.mask), attn_weights
        )
