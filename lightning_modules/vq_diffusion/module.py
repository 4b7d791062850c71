"""VQ-Diffusion as a LightningModule: its network, loss and sampling loop on captioned tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.labels import read_label
from lightning_modules.common.settings import build, plain
from lightning_modules.common.text import Condition
from lightning_modules.vq_diffusion import autoregressive, process
from lightning_modules.vq_diffusion.config import SamplingConfig, VQDiffusionConfig
from lightning_modules.vq_diffusion.network import Denoiser, Past, Side
from lightning_modules.vq_diffusion.process import Kernel

OnStep = Callable[[int, Tensor, Tensor], None]


class VQDiffusionModule(GeneratorModule):
    """Mask-and-replace diffusion of image tokens by captions, classes or nothing (2111.14822).

    With `model.causal` it is the papers' autoregressive baseline VQ-AR of the same size.
    """

    config_class: type = VQDiffusionConfig
    sampling_class: type = SamplingConfig
    config: VQDiffusionConfig

    loss_history: Tensor
    loss_count: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        model = self.config.model
        if model.condition != "text":  # nothing would ever read or train it
            self.text_encoder = self._attached["text"] = None
        self.network = Denoiser(model)
        self.num_codes: int = model.num_codes
        if config["num_codes"] != self.num_codes:
            raise ValueError(
                f"model.num_codes must be the tokenizer's {config['num_codes']} codes, "
                f"got {self.num_codes}"
            )
        steps = model.diffusion_steps
        self.schedule = process.mask_schedule(steps, self.num_codes, self.config.schedule.mask_rate)
        # statistics of the importance sampling of t, part of every checkpoint as released
        self.register_buffer("loss_history", torch.zeros(steps))
        self.register_buffer("loss_count", torch.zeros(steps))
        self._tables: dict[torch.device, tuple[Kernel, Tensor, Tensor]] = {}

    # Training ----

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound with its auxiliary term (released _train_loss); VQ-AR: cross entropy.

        Args:
            batch: tokens [B, h, w] or image [B, 3, H, W], and caption or label.
            generator: source of times, noise and dropped conditions, on this module's device.

        Returns:
            The loss, and beside it the accuracy over the masked (VQ-AR: all) tokens.
        """
        tokens = self.tokens_of(batch)
        if self.config.model.causal:
            return self._causal_loss(tokens, self._training_side(batch, generator))
        objective, codes = self.config.objective, self.num_codes
        chance: dict[str, Any] = {"generator": generator, "device": tokens.device}
        law = torch.full_like(self.loss_history, 1 / len(self.loss_history))
        if objective.times == "importance":
            law = process.time_law(self.loss_history, self.loss_count)
        t = process.draw_times(law, torch.rand(len(tokens), **chance))
        kernels, mask, replaced = self._numbers(tokens.device)
        uniforms = torch.rand(2, *tokens.shape, **chance)
        x_t = process.corrupt(tokens, mask[t], replaced[t], codes, uniforms)
        side = self._training_side(batch, generator)
        rows = self.network.mixed_rows(x_t, t, [side], [1.0])
        logits = self.network.head(rows).float().unflatten(0, (len(tokens), -1))  # [B, N, K]
        x_0, x_t = tokens.flatten(1), x_t.flatten(1)
        terms = process.token_losses(logits, x_0, x_t, kernels.map(lambda v: v[t][:, None]))
        losses, bounds = process.image_losses(
            terms, x_t == codes, t, law[t], len(law),
            auxiliary_weight=objective.auxiliary_weight, adaptive=objective.adaptive_auxiliary,
            mask_weight=objective.mask_weight,
        )  # fmt: skip
        if self.training:
            process.update_history(self.loss_history, self.loss_count, t, bounds)
        masked = (x_t == codes).float()
        best = logits.detach()
        right = (best.gather(-1, x_0[..., None]).squeeze(-1) >= best.amax(-1)) * masked
        return losses.sum() / tokens.numel(), {
            "accuracy": right.sum() / masked.sum().clamp_min(1),
            "bound": (bounds / law[t]).mean().detach() / x_0.shape[1],
        }

    def _numbers(self, device: torch.device) -> tuple[Kernel, Tensor, Tensor]:
        """One-step kernels, C and the share of replaced tokens for all t: float32, on a device."""
        if device not in self._tables:
            times = torch.arange(self.schedule.steps)

            def move(values: Tensor) -> Tensor:
                return values.float().to(device)

            kernels = self.schedule.kernel(times).map(move)
            shares = (move(self.schedule.mask[times]), move(self.schedule.replaced[times]))
            self._tables[device] = (kernels, *shares)
        return self._tables[device]

    def _causal_loss(self, tokens: Tensor, side: Side) -> tuple[Tensor, dict[str, Tensor]]:
        """VQ-AR: the time embeddings, which it has for the sake of equal size, stay those of 0."""
        t = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        logits = self.network.head(self.network.mixed_rows(tokens, t, [side], [1.0])).float()
        accuracy = (logits.detach().argmax(1) == tokens.flatten()).float().mean()
        return autoregressive.next_token_loss(logits, tokens), {"accuracy": accuracy}

    def _training_side(self, batch: dict[str, Any], generator: torch.Generator) -> Side:
        """The condition of a training batch."""
        kind = self.config.model.condition
        if kind == "none":
            return self.network.prepare()
        if kind == "class":
            return self.network.prepare(self._batch_labels(batch))
        condition = self.encode_text(batch["caption"])
        return self.network.prepare(condition.tokens, condition.mask)

    def _batch_labels(self, batch: dict[str, Any]) -> Tensor:
        """Labels [B] of a batch.

        Raises:
            ValueError: there are none, or one that the network has no class for.
        """
        if "label" not in batch:
            raise ValueError(
                "model.condition=class needs data with labels, such as data=digits; "
                "take model.condition=text"
            )
        labels = torch.as_tensor(batch["label"], device=self.device)
        if int(labels.min()) < 0 or int(labels.max()) >= self.config.num_classes:
            raise ValueError(
                f"model.class_number leaves labels 0 to {self.config.num_classes - 1}, but the "
                f"data hold {int(labels.min())} to {int(labels.max())}"
            )
        return labels

    # Sampling ----

    def check_prompts(self, prompts: list[str]) -> None:
        """Speak up where prompts cannot be understood."""
        if self.config.model.condition == "text":
            super().check_prompts(prompts)
        elif self.config.model.condition == "class":
            self._labels(prompts)

    def _labels(self, prompts: list[str]) -> list[int]:
        return [read_label(p, self.config.classes, self.config.num_classes) for p in prompts]

    def _side(self, prompts: list[str], labels: list[int] | None = None) -> Side:
        """What `mixed_rows` of the network takes as one condition."""
        kind = self.config.model.condition
        if kind == "none":
            return self.network.prepare()
        if kind == "class":
            asked = self._labels(prompts) if labels is None else labels
            return self.network.prepare(torch.tensor(asked, device=self.device))
        condition: Condition = self.encode_text(prompts)
        return self.network.prepare(condition.tokens, condition.mask)

    def settings(self, sampling: dict[str, Any]) -> Any:
        """The checkpoint's sampling settings with some replaced.

        Raises:
            ValueError: an unknown setting, or one out of range.
        """
        return build(self.sampling_class, {**plain(self.config.sampling), **sampling})

    @torch.no_grad()
    def sample_tokens(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        labels: list[int] | None = None,
        negative: list[str] | None = None,
        blend_with: list[str] | None = None,
        blend: float = 0.0,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw tokens for prompts; image i depends on prompt i and seed i alone.

        Args:
            prompts: B captions; with model.condition=class texts that ask for a class.
            seeds: B seeds.
            labels: B labels in place of the prompts, with model.condition=class.
            negative: B captions that guidance leads away from (of Improved VQ-Diffusion).
            blend_with: B captions to blend into: the features of both are mixed.
            blend: share of `blend_with`, 0 to 1.
            start: [B, h, w] tokens: what stands where mask is 0, or, without a mask, what a
                variation starts from (with sampling.first_step above 0).
            mask: [B, h, w], 1 = generate, 0 = keep start's token.
            grid: token grid other than the one trained on; default is start's.
            on_step: called with step (VQ-AR: row), input tokens and result tokens [B, h, w].
            **sampling: settings of the sampling section that differ from this checkpoint's.

        Returns:
            [B, h, w] int64.

        Raises:
            ValueError: an unknown setting, one out of range, or one that does not go with others.
        """
        settings = self.settings(sampling)
        if start is None and (mask is not None or settings.first_step > 0):
            what = "a mask" if mask is not None else "sampling.first_step"
            raise ValueError(f"{what} needs tokens to start from (start)")
        if grid is None:
            grid = self.grid if start is None else (start.shape[1], start.shape[2])
        sides, shares = [self._side(prompts, labels)], [1.0]
        if blend_with is not None:
            sides, shares = [*sides, self._side(blend_with)], [1 - blend, blend]
        sides, shares = self._guided(sides, shares, settings, negative)
        start = None if start is None else start.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        if self.config.model.causal:
            return self._write(sides, shares, settings, seeds, grid, start, mask, on_step)

        def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
            return self.network.mixed_rows(x, t[:1], sides, shares, keep)

        steps = self._steps(settings, grid[0] * grid[1])
        noise = process.sample_noise(seeds, len(steps), grid)
        noise = {name: tensor.to(self.device) for name, tensor in noise.items()}
        x = self._beginning(noise.pop("start"), start, mask, settings, steps[0].t)
        return self._loop(predict, steps, settings, x=x, mask=mask, on_step=on_step, **noise)

    def _guided(
        self, sides: list[Side], shares: list[float], settings: Any, negative: list[str] | None
    ) -> tuple[list[Side], list[float]]:
        """Conditions and weights with those of the guidance, of which VQ-Diffusion has none."""
        if negative is not None:
            raise ValueError("a negative prompt needs guidance, which Improved VQ-Diffusion has")
        return sides, shares

    def _steps(self, settings: Any, tokens: int) -> list[Any]:
        """The network calls that the settings ask for."""
        return process.make_steps(self.schedule, settings)

    def _beginning(
        self,
        uniforms: Tensor,
        start: Tensor | None,
        mask: Tensor | None,
        settings: Any,
        t: int,
    ) -> Tensor:
        """The tokens that sampling starts from: noise, noise around known tokens, noised tokens."""
        noise = process.start_tokens(self.schedule, uniforms)
        if start is None or (mask is None and settings.first_step == 0):
            return noise
        if settings.first_step > 0:
            share, replaced = (
                values[t].float().to(self.device).expand(len(start))
                for values in (self.schedule.mask, self.schedule.replaced)
            )
            noise = process.corrupt(start, share, replaced, self.num_codes, uniforms)
        return noise if mask is None else torch.where(mask.bool(), noise, start)

    def _loop(self, predict: Any, steps: list[Any], settings: Any, **arguments: Any) -> Tensor:
        """Run the sampling loop."""
        return process.sample(
            predict, self.network.head, steps=steps, truncation=settings.truncation, **arguments
        )

    def _write(
        self,
        sides: list[Side],
        shares: list[float],
        settings: Any,
        seeds: list[int],
        grid: tuple[int, int],
        start: Tensor | None,
        mask: Tensor | None,
        on_step: OnStep | None,
    ) -> Tensor:
        """VQ-AR: each token once, the keys and values of those before it remembered."""
        if settings.first_step > 0:
            raise ValueError("VQ-AR (model.causal) makes no variations; give a mask")
        pasts = [Past() for _ in self.network.blocks]
        t = torch.zeros(1, dtype=torch.int64, device=self.device)
        x = start if start is not None else torch.zeros(len(seeds), *grid, dtype=torch.int64)
        return autoregressive.sample(
            lambda x: self.network.next_rows(x, t, sides, shares, pasts),
            self.network.head,
            x=x.to(self.device),
            draws=process.sample_noise(seeds, 1, grid)["draws"][0].to(self.device),
            truncation=settings.truncation,
            mask=mask,
            on_step=on_step,
        )
