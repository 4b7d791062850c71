"""LDMAE's latent diffusion model as a LightningModule: network, loss and loop on latents."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.labels import read_label
from lightning_modules.common.settings import build, plain
from lightning_modules.ldmae import process
from lightning_modules.ldmae.config import LDMAEConfig, SamplingConfig, check_sampling
from lightning_modules.ldmae.network import DiT, Side


class LDMAEModule(GeneratorModule):
    """Flow matching on normalised latents (arXiv 2507.09984), by captions, labels or nothing.

    What other generators call tokens are latents [B, C, h, w] here, and the tokenizer is an
    autoencoder with `moments`, `sample_posterior`, `normalise` and `decode`.
    """

    config_class = LDMAEConfig
    config: LDMAEConfig
    shares: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config.check_diffusion()
        model = self.config.network()
        if self.grid != (model.input_size, model.input_size):
            raise ValueError(
                f"model.input_size must be the side of the latents {self.grid[0]}x{self.grid[1]}, "
                f"got {model.input_size}"
            )
        if self.config.condition != "text":
            self.text_encoder = None  # none of its weights is trained or kept
        self.network = DiT(model)
        self.register_buffer(
            "shares", process.signal_shares(self.config.objective).float(), persistent=False
        )

    def attach(self, tokenizer: Any) -> "LDMAEModule":
        """Give the generator its (frozen) autoencoder.

        Raises:
            ValueError: its latents have another number of channels.
        """
        if tokenizer.channels != self.config.model.in_channels:
            raise ValueError(
                f"model.in_channels must be the autoencoder's {tokenizer.channels} channels, "
                f"got {self.config.model.in_channels}"
            )
        super().attach(tokenizer)
        return self

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity (SiT, as in LDMAE), or of the noise (LDM).

        Args:
            batch: moments [B, 2C, h, w] or image [B, 3, H, W], and caption or label.
            generator: source of latents, times, noise and hidden conditions, on this module's
                device.

        Returns:
            The loss, and with the velocity-direction term its two parts, all scalars.
        """
        objective = self.config.objective
        latents = self.latents_of(batch, generator)
        chance: dict[str, Any] = {"generator": generator, "device": self.device}
        noise = torch.randn(latents.shape, **chance)
        batch_size = latents.shape[0]
        if objective.kind == "ddpm":
            time = torch.randint(objective.train_steps, (batch_size,), **chance)
            x, target = process.diffuse(noise, latents, self.shares[time]), noise
        else:
            if objective.t_law == "lognormal":
                time = process.training_times(torch.randn(batch_size, **chance))
            else:
                time = torch.rand(batch_size, **chance)
            x, target = process.straight_path(noise, latents, time)
        side = self._training_side(batch, generator)
        predicted = self.network(x, time, [side])[0].float()
        error = process.squared_error(predicted, target).mean()
        if not objective.cosine_loss:
            return error, {}
        direction = process.direction_error(predicted, target).mean()
        return error + direction, {"squared": error, "direction": direction}

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Any:
        """Check labels while they are on the CPU, where looking at them waits for nothing."""
        if self.config.condition == "label" and "label" in batch:
            self._check_labels(torch.as_tensor(batch["label"]), "the data have")
        return batch

    def _check_labels(self, labels: Tensor, who: str) -> None:
        count = self.network.config.num_classes
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong) > 0:
            raise ValueError(f"model.num_classes is {count}, but {who} the label {int(wrong[0])}")

    def latents_of(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Draw the batch's latents from their posterior and normalise them: [B, C, h, w].

        Moments come from the cache, or from the batch's images through the autoencoder.
        """
        autoencoder: Any = self.tokenizer
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if "moments" in batch:
                moments = batch["moments"].to(self.device).float()
            else:
                moments = autoencoder.moments(batch["image"])
            means = moments[:, : moments.shape[1] // 2]
            noise = torch.randn(means.shape, generator=generator, device=self.device)
            return autoencoder.normalise(autoencoder.sample_posterior(moments, noise))

    def _training_side(self, batch: dict[str, Any], generator: torch.Generator) -> Side:
        """The conditions of a batch, a share of them hidden."""
        count, model = len(batch["caption"]), self.network.config
        draws = torch.rand(count, generator=generator, device=self.device)
        hidden = draws < model.class_dropout_prob
        if self.config.condition == "text":
            pairs = zip(batch["caption"], hidden.tolist(), strict=True)
            return self._text_side(["" if hide else caption for caption, hide in pairs])
        if self.config.condition == "none":
            labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        elif "label" in batch:
            labels = batch["label"]
        else:
            raise ValueError("condition=label needs data with labels, such as data=digits")
        return self.network.label_side(labels.masked_fill(hidden, model.num_classes))

    def _text_side(self, captions: list[str]) -> Side:
        condition = self.encode_text(captions)
        return self.network.text_side(condition.tokens, condition.mask)

    def labels_of(self, prompts: list[str]) -> list[int]:
        """Read the label that each prompt asks for: a number, or a text that names one class.

        The empty prompt asks for any class, where labels were hidden in training.

        Raises:
            ValueError: a prompt names no class or several.
        """
        model = self.network.config
        labels = []
        for prompt in prompts:
            if not prompt.strip() and model.class_dropout_prob > 0:
                labels.append(model.num_classes)
                continue
            labels.append(read_label(prompt, self.config.classes, model.num_classes))
        return labels

    def check_prompts(self, prompts: list[str]) -> None:
        """Speak up where prompts cannot be understood."""
        if self.config.condition == "label":
            self.labels_of(prompts)
        elif self.config.condition == "text":
            super().check_prompts(prompts)

    def _side(self, prompts: list[str], labels: list[int] | None) -> Side:
        if self.config.condition == "text":
            return self._text_side(prompts)
        if self.config.condition == "none":
            labels = [0]
        elif labels is None:
            labels = self.labels_of(prompts)
        else:
            self._check_labels(torch.tensor(labels), "there is asked for")
        return self.network.label_side(torch.tensor(labels, device=self.device))

    def _null_side(self, negative: list[str] | None) -> Side:
        if self.config.condition != "text":
            if negative is not None:
                raise ValueError(
                    f"a negative prompt needs condition=text, not {self.config.condition}"
                )
            null = torch.tensor([self.network.config.num_classes], device=self.device)
            return self.network.label_side(null)
        return self._text_side([""] if negative is None else negative)

    @torch.no_grad()
    def sample_tokens(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        labels: list[int] | None = None,
        negative: list[str] | None = None,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        on_step: process.OnStep | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw latents for prompts; sample i depends on prompt i and seed i alone.

        Args:
            prompts: B captions; with condition=label texts that name a class; with none anything.
            seeds: B seeds.
            labels: B labels in place of the prompts, with condition=label.
            negative: B captions in place of the empty one on the other side of the guidance.
            start: [B, C, h, w] normalised latents: what stands where mask is 0, or, without a
                mask, what a variation starts from (with sampling.first_step above 0).
            mask: [B, h, w], 1 = generate, 0 = keep start's latent.
            on_step: called with step, input and result [B, C, h, w].
            **sampling: settings of `SamplingConfig` that differ from this checkpoint's.

        Returns:
            [B, C, h, w] normalised latents.

        Raises:
            ValueError: an unknown setting, or one out of range.
        """
        settings = build(SamplingConfig, {**plain(self.config.sampling), **sampling})
        check_sampling(settings, self.config)
        if start is None and (mask is not None or settings.first_step > 0):
            needs = "a mask" if mask is not None else "sampling.first_step"
            raise ValueError(f"{needs} needs latents to start from (start)")
        if labels is not None and self.config.condition != "label":
            raise ValueError(f"labels need condition=label, not {self.config.condition}")
        own = self._side(prompts, labels)
        null = self._null_side(negative) if settings.guidance != 1 else None

        def predict(x: Tensor, t: Tensor, with_null: bool) -> Tensor:
            sides = [own, null] if with_null and null is not None else [own]
            return self.network(x, t.to(x.device, torch.float32), sides)

        noise = process.sample_noise(seeds, (self.config.model.in_channels, *self.grid))
        noise = noise.to(self.device)
        start = None if start is None else start.to(noise)
        generate = None if mask is None else mask.to(self.device).bool()[:, None]
        if settings.solver == "ddim":
            return self._walk_the_chain(settings, predict, noise, seeds, start, generate, on_step)
        return self._follow_the_flow(settings, predict, noise, start, generate, on_step)

    def _follow_the_flow(
        self,
        settings: SamplingConfig,
        predict: process.Predict,
        noise: Tensor,
        start: Tensor | None,
        generate: Tensor | None,
        on_step: process.OnStep | None,
    ) -> Tensor:
        interval = (settings.guidance_start, settings.guidance_end)

        def velocity(interval: tuple[float, float]) -> process.Velocity:
            made = process.guided(predict, settings.guidance, settings.guidance_channels, interval)
            if start is None or generate is None:
                return made
            return process.held(made, start, noise, generate)

        if settings.solver == "dopri5":
            return process.piecewise_dopri5(
                velocity, noise, interval, atol=settings.atol, rtol=settings.rtol, on_step=on_step
            )
        times = process.time_grid(settings.steps, settings.timestep_shift)[settings.first_step :]
        x = noise
        if start is not None:
            x = process.straight_path(noise, start, times[:1].to(noise))[0]
        solver: Any = settings.solver
        return process.integrate(velocity(interval), x, times, solver, on_step)

    def _walk_the_chain(
        self,
        settings: SamplingConfig,
        predict: process.Predict,
        noise: Tensor,
        seeds: list[int],
        start: Tensor | None,
        generate: Tensor | None,
        on_step: process.OnStep | None,
    ) -> Tensor:
        shares = process.signal_shares(self.config.objective)
        total = self.config.objective.train_steps
        grid = process.chain_grid(settings.steps, total)[settings.first_step :]
        interval = (settings.guidance_start, settings.guidance_end)
        model = process.guided(
            predict, settings.guidance, settings.guidance_channels, interval,
            progress=lambda k: 1 - k / total,
        )  # fmt: skip
        x = noise
        if start is not None and generate is not None:
            model = process.held_noise(model, start, shares, generate)
        if start is not None and settings.first_step > 0:
            x = process.diffuse(noise, start, shares[grid[:1]].to(noise))

        def fresh() -> Iterator[Tensor]:
            for i in range(1, len(grid)):
                yield process.sample_noise(seeds, tuple(noise.shape[1:]), i).to(noise)

        return process.ddim(
            model, x, grid, shares, eta=settings.eta, fresh=fresh(), on_step=on_step
        )
