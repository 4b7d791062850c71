"""LDMAE's latent diffusion model as a LightningModule: network, loss and loop on latents."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.interfaces import Geometry
from lightning_modules.common.labels import read_label
from lightning_modules.common.places import Picked
from lightning_modules.common.request import OnStep, Request
from lightning_modules.common.text import Condition
from lightning_modules.ldmae import process
from lightning_modules.ldmae.config import LDMAEConfig, SamplingConfig
from lightning_modules.ldmae.network import DiT, Side


class Drawing(NamedTuple):
    """What the loops draw from."""

    settings: SamplingConfig
    predict: process.Predict
    seeds: Sequence[int]
    noise: Tensor  # [B, C, h, w]
    start: Tensor | None  # [B, C, h, w]
    generate: Tensor | None  # [B, 1, h, w] bool
    places: Picked
    on_step: OnStep | None


class LDMAEModule(GeneratorModule):
    """Flow matching on normalised latents (arXiv 2507.09984), by captions, labels or nothing.

    What other generators call tokens are normalised latents [B, C, h, w] here, and the first stage
    is an autoencoder with `moments`, `sample_posterior`, `normalise` and `decode`.
    """

    config_class = LDMAEConfig
    config: LDMAEConfig
    ABILITIES = frozenset({"labels", "negative", "start", "mask"})
    alpha_bar: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if self.config.condition != "text":
            self.text_encoder = None  # none of its weights is trained or kept
        self.network = DiT(self.config.network())
        self.register_buffer(
            "alpha_bar", process.signal_shares(self.config.objective).float(), persistent=False
        )

    def attach(self, first_stage: Any, **others: Any) -> Self:
        """Give the generator its (frozen) autoencoder, whose channels must be the network's."""
        self.config.check_fit(Geometry(self.grid, channels=first_stage.channels))
        return super().attach(first_stage, **others)

    @property
    def size_unit(self) -> int:
        """Pixels that a side of a picture must be a multiple of."""
        return self.pixels_per_token * self.network.config.grid_multiple

    @property
    def labelled(self) -> bool:
        """Whether it is conditioned on labels."""
        return self.config.condition == "label"

    def check_request(self, request: Request, first_step: int = 0) -> None:
        """Refuse what this paper, or a model of this condition, cannot do."""
        super().check_request(request, first_step)
        for name, condition in (("labels", "label"), ("negative", "text")):
            if name in request.asked() and self.config.condition != condition:
                raise ValueError(f"{name} needs condition={condition}, not {self.config.condition}")
        if request.grid_or(self.grid) != self.grid:
            height, width = self.grid
            raise ValueError(f"this checkpoint makes latents of {height}x{width} alone")

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Latents, noise, times and the condition of a batch, some of it hidden."""
        objective = self.config.objective
        latents = self.latents_of(batch, generator)
        rng: dict[str, Any] = {"generator": generator, "device": self.device}
        noise, count = torch.randn(latents.shape, **rng), latents.shape[0]
        if objective.kind == "ddpm":
            time = torch.randint(objective.train_steps, (count,), **rng)
        elif objective.t_law == "lognormal":
            time = process.training_times(torch.randn(count, **rng))
        else:
            time = torch.rand(count, **rng)
        condition = self._training_inputs(batch, generator)
        return {"latents": latents, "noise": noise, "time": time, "condition": condition}

    def compute_loss(
        self, latents: Tensor, noise: Tensor, time: Tensor, condition: Condition | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity (SiT, as in LDMAE), or of the noise (LDM).

        Beside it stand, with the velocity-direction term, the two parts.

        Args:
            latents: [B, C, h, w].
            noise: [B, C, h, w] N(0, 1).
            time: [B] in [0, 1], or int64 steps of the chain.
            condition: captions, or labels [B] int64.
        """
        objective = self.config.objective
        if objective.kind == "ddpm":
            x, target = process.diffuse(noise, latents, self.alpha_bar[time]), noise
        else:
            x, target = process.straight_path(noise, latents, time)
        if isinstance(condition, Tensor):
            side = self.network.label_side(condition)
        else:
            side = self.network.text_side(condition.tokens, condition.mask)
        predicted = self.network(x, time, [side])[0].float()
        error = process.squared_error(predicted, target).mean()
        if not objective.cosine_loss:
            return error, {}
        direction = process.direction_error(predicted, target).mean()
        return error + direction, {"squared": error, "direction": direction}

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> Any:
        """Check labels while they are on the CPU, where looking at them waits for nothing.

        Not in `on_before_batch_transfer`: of that hook Lightning calls the data's own alone.
        """
        if self.config.condition == "label" and "label" in batch:
            self._check_labels(torch.as_tensor(batch["label"]), "the data have")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _check_labels(self, labels: Tensor, who: str) -> None:
        count = self.network.config.num_classes
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong) > 0:
            raise ValueError(f"model.num_classes is {count}, but {who} the label {int(wrong[0])}")

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the vectors that it reads of a caption: per token, and pooled."""
        return self.network.config.text_width, 0

    def latents_of(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Draw the batch's latents from their posterior and normalise them: [B, C, h, w].

        Moments come from the cache, or from the batch's images through the autoencoder.
        """
        autoencoder = self.first_stage
        with torch.no_grad(), self.full_precision():
            if "moments" in batch:
                moments = batch["moments"].to(self.device).float()
            else:
                moments = autoencoder.moments(batch["image"])
            means = moments[:, : moments.shape[1] // 2]
            noise = torch.randn(means.shape, generator=generator, device=self.device)
            return autoencoder.normalise(autoencoder.sample_posterior(moments, noise))

    def _training_inputs(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> Condition | Tensor:
        """The encoded captions or the labels of a batch, some of them hidden."""
        count, model = len(batch["caption"]), self.network.config
        draws = torch.rand(count, generator=generator, device=self.device)
        hidden = draws < model.class_dropout_prob
        if self.config.condition == "text":
            pairs = zip(batch["caption"], hidden.tolist(), strict=True)
            return self.encode_text(["" if hide else caption for caption, hide in pairs])
        if self.config.condition == "none":
            labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        elif "label" in batch:
            labels = batch["label"]
        else:
            raise ValueError("condition=label needs data with labels, such as data=digits")
        return labels.masked_fill(hidden, model.num_classes)

    def _text_condition(self, captions: Sequence[str]) -> Side:
        condition = self.encode_text(captions)
        return self.network.text_side(condition.tokens, condition.mask)

    def labels_of(self, prompts: Sequence[str]) -> list[int]:
        """Read labels by `read_label`; "" is any class, where labels were hidden in training."""
        model = self.network.config
        hidden, count = model.class_dropout_prob > 0, model.num_classes
        return [
            count if hidden and not p.strip() else read_label(p, self.config.classes, count)
            for p in prompts
        ]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Speak up where prompts cannot be understood."""
        if self.config.condition == "label":
            self.labels_of(prompts)
        elif self.config.condition == "text":
            super().check_prompts(prompts)

    def _condition(self, request: Request) -> Side:
        if self.config.condition == "text":
            return self._text_condition(request.prompts)
        labels: Sequence[int] = [0]
        if request.labels is not None:
            labels = request.labels
            self._check_labels(torch.tensor(labels), "there is asked for")
        elif self.config.condition == "label":
            labels = self.labels_of(request.prompts)
        return self.network.label_side(torch.tensor(labels, device=self.device))

    def _null_condition(self, negative: Sequence[str] | None) -> Side:
        if self.config.condition == "text":
            return self._text_condition([""] if negative is None else negative)
        null = torch.tensor([self.network.config.num_classes], device=self.device)
        return self.network.label_side(null)

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw normalised latents [B, C, h, w]; with condition=label prompts name a class."""
        settings, self.calls = settings or self.config.sampling, None
        self.check_request(request, settings.first_step)
        self.check_sampling(settings)
        sides = {"own": self._condition(request)}
        if settings.guidance != 1:
            sides["null"] = self._null_condition(request.negative)

        def predict(x: Tensor, t: Tensor, conditions: Sequence[process.Condition]) -> Tensor:
            return self.network(x, t.to(x), [sides[name] for name in conditions])

        # dopri5 knows what each picture needed
        places = Picked() if settings.solver == "dopri5" else self.places()

        noise = process.sample_noise(request.seeds, (self.config.model.in_channels, *self.grid))
        noise = noise.to(self.alpha_bar)  # its device and precision
        start = None if request.start is None else request.start.to(noise)
        generate = None if request.mask is None else request.mask.to(self.device).bool()[:, None]
        if settings.solver != "dopri5":
            predict = self.counting(predict, len(noise), places)
        drawing = Drawing(settings, predict, request.seeds, noise, start, generate, places, on_step)
        follow = self._walk_the_chain if settings.solver == "ddim" else self._follow_the_flow
        latents = follow(drawing)
        calls = places.calls * (2 if settings.solver == "heun" else 1)
        self.count_calls(torch.full((len(noise),), calls))
        return latents

    def _follow_the_flow(self, d: Drawing) -> Tensor:
        s, interval = d.settings, (d.settings.guidance_start, d.settings.guidance_end)

        def velocity(interval: tuple[float, float]) -> process.Velocity:
            made = process.guided(d.predict, s.guidance, s.guidance_channels, interval)
            if d.start is None or d.generate is None:
                return made
            return process.held(made, d.start, d.noise, d.generate)

        if s.solver == "dopri5":
            return process.piecewise_dopri5(
                velocity,
                d.noise,
                interval,
                atol=s.atol,
                rtol=s.rtol,
                on_step=d.on_step,
                on_calls=self.count_calls,
            )
        times = process.time_grid(s.steps, s.timestep_shift)[s.first_step :]
        x = d.noise
        if d.start is not None:
            x = process.straight_path(d.noise, d.start, times[:1].to(x))[0]
        own: Any = {"inside": process.insides(s.guidance, interval, times), "places": d.places}
        solver: Any = s.solver
        return process.integrate(velocity(interval), x, times, solver, d.on_step, **own)

    def _walk_the_chain(self, d: Drawing) -> Tensor:
        s, interval = d.settings, (d.settings.guidance_start, d.settings.guidance_end)
        alpha_bar, total = process.signal_shares(self.config.objective), len(self.alpha_bar)
        grid = process.chain_grid(s.steps, total)[s.first_step :]

        def progress(k: Tensor) -> Tensor:
            return 1 - k / total

        model = process.guided(d.predict, s.guidance, s.guidance_channels, interval, progress)
        x = d.noise
        if d.start is not None and d.generate is not None:
            model = process.held_noise(model, d.start, d.places.send(alpha_bar), d.generate)
        if d.start is not None and s.first_step > 0:
            x = process.diffuse(d.noise, d.start, alpha_bar[grid[:1]].to(x))
        shape = tuple(x.shape[1:])
        fresh = (process.sample_noise(d.seeds, shape, i).to(x) for i in range(1, len(grid)))
        inside = process.insides(s.guidance, interval, progress(torch.tensor(grid)))
        own: Any = {"inside": inside, "places": d.places, "on_step": d.on_step}
        return process.ddim(model, x, grid, alpha_bar, eta=s.eta, fresh=fresh, **own)
