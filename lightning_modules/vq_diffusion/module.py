"""VQ-Diffusion as a LightningModule: its network, loss and sampling loop on captioned tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.guidance import Guidance, equals, mixed_rows
from lightning_modules.common.labels import read_label
from lightning_modules.common.request import OnStep, Request
from lightning_modules.common.text import Condition
from lightning_modules.samplers import serve
from lightning_modules.samplers.kernel import Kernel, corrupt
from lightning_modules.samplers.serve import Conditions, Network
from lightning_modules.vq_diffusion import autoregressive, process
from lightning_modules.vq_diffusion.config import VQDiffusionConfig
from lightning_modules.vq_diffusion.network import Denoiser, Past, Side

Shares = Callable[[float | Tensor, list[Side]], tuple[list[Side], Any]]
"""Guidance scale, or those of B pictures, and all conditions -> what is needed, with weights."""


class VQDiffusionModule(GeneratorModule):
    """Mask-and-replace diffusion of image tokens by captions, classes or nothing (2111.14822).

    With `model.causal` it is the papers' autoregressive baseline VQ-AR of the same size.
    """

    config_class: ClassVar[type] = VQDiffusionConfig
    ABILITIES = frozenset({"labels", "blend_with", "start", "mask", "grid"})
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
        steps = model.diffusion_steps
        self.schedule = process.mask_schedule(steps, self.num_codes, self.config.schedule.mask_rate)
        # statistics of the importance sampling of t, part of every checkpoint as released
        self.register_buffer("loss_history", torch.zeros(steps))
        self.register_buffer("loss_count", torch.zeros(steps))
        self._tables: dict[torch.device, tuple[Kernel, Tensor, Tensor]] = {}

    @property
    def labelled(self) -> bool:
        """Whether it is conditioned on labels."""
        return self.config.model.condition == "class"

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Tokens, the condition and, but for VQ-AR, their noise and its tables."""
        tokens = self.batch_tokens(batch)
        if self.config.model.causal:
            return {"tokens": tokens, "condition": self._training_inputs(batch, generator)}
        rng: dict[str, Any] = {"generator": generator, "device": tokens.device}
        return {
            "tokens": tokens,
            "times": torch.rand(len(tokens), **rng),
            "uniforms": torch.rand(2, *tokens.shape, **rng),
            "numbers": self._numbers(tokens.device),
            "condition": self._training_inputs(batch, generator),
        }

    def compute_loss(
        self,
        tokens: Tensor,
        condition: Any,
        times: Tensor | None = None,
        uniforms: Tensor | None = None,
        numbers: tuple[Kernel, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound with its auxiliary term (released _train_loss); VQ-AR: cross entropy.

        Args:
            tokens: [B, h, w] int64.
            condition: what `_training_condition` prepares.
            times: [B] in [0, 1), of which t is made; None for VQ-AR.
            uniforms: [2, B, h, w] in [0, 1), of which x_t is made.
            numbers: of `_numbers`.
        """
        side = self._training_condition(condition)
        if times is None or uniforms is None or numbers is None:
            return self._causal_loss(tokens, side)
        objective, codes = self.config.objective, self.num_codes
        p_t = torch.full_like(self.loss_history, 1 / len(self.loss_history))
        if objective.times == "importance":
            p_t = process.time_law(self.loss_history, self.loss_count)
        t = process.draw_times(p_t, times)
        kernels, mask, replaced = numbers
        x_t = corrupt(tokens, mask[t], replaced[t], codes, uniforms)
        rows = self.network.mixed_rows(x_t, t, [side], [1.0])
        logits = self.network.head(rows).float().unflatten(0, (len(tokens), -1))  # [B, N, K]
        x_0, x_t = tokens.flatten(1), x_t.flatten(1)
        terms = process.token_losses(logits, x_0, x_t, kernels.map(lambda v: v[t][:, None]))
        losses, bounds = process.image_losses(
            terms,
            x_t == codes,
            t,
            p_t[t],
            len(p_t),
            auxiliary_weight=objective.auxiliary_weight,
            adaptive=objective.adaptive_auxiliary,
            mask_weight=objective.mask_weight,
        )
        if self.training:
            process.update_history(self.loss_history, self.loss_count, t, bounds)
        masked = (x_t == codes).float()
        best = logits.detach()
        right = (best.gather(-1, x_0[..., None]).squeeze(-1) >= best.amax(-1)) * masked
        return losses.sum() / tokens.numel(), {
            "accuracy": right.sum() / masked.sum().clamp_min(1),
            "bound": (bounds / p_t[t]).mean().detach() / x_0.shape[1],
        }

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the vectors that it reads of a caption: per token, and pooled."""
        return self.config.model.condition_dim, 0

    def _numbers(self, device: torch.device) -> tuple[Kernel, Tensor, Tensor]:
        """One-step kernels, C and the share of replaced tokens for all t: float32, on a device."""
        if device not in self._tables:
            times = torch.arange(self.schedule.steps)

            def move(values: Tensor) -> Tensor:
                return values.float().to(device)

            kernels = self.schedule.kernel(times).map(move)
            mask, replaced = self.schedule.mask[times], self.schedule.replaced[times]
            self._tables[device] = (kernels, move(mask), move(replaced))
        return self._tables[device]

    def _causal_loss(self, tokens: Tensor, condition: Side) -> tuple[Tensor, dict[str, Tensor]]:
        """VQ-AR: the time embeddings, which it has for the sake of equal size, stay those of 0."""
        t = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        logits = self.network.head(self.network.mixed_rows(tokens, t, [condition], [1.0])).float()
        accuracy = (logits.detach().argmax(1) == tokens.flatten()).float().mean()
        return F.cross_entropy(logits, tokens.flatten()), {"accuracy": accuracy}

    def _training_inputs(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        """What the condition of a training batch is prepared from: labels, captions or nothing."""
        if self.labelled:
            return self._batch_labels(batch)
        if self.config.model.condition == "none":
            return None
        return self.encode_text(batch["caption"])

    def _training_condition(self, given: Any) -> Side:
        """The condition of a training batch, prepared from `_training_inputs`."""
        if isinstance(given, Condition):
            return self.network.prepare(given.tokens, given.mask)
        return self.network.prepare(given)

    def _batch_labels(self, batch: dict[str, Any]) -> Tensor:
        """Labels [B] of a batch, which the network has classes for."""
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

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Speak up where prompts cannot be understood."""
        if self.config.model.condition == "text":
            super().check_prompts(prompts)
        elif self.labelled:
            self._labels(prompts)

    def _labels(self, prompts: Sequence[str]) -> list[int]:
        return [read_label(p, self.config.classes, self.config.num_classes) for p in prompts]

    def _condition(self, prompts: Sequence[str], labels: Sequence[int] | None = None) -> Side:
        """What `mixed_rows` of the network takes as one condition."""
        if self.config.model.condition == "none":
            return self.network.prepare()
        if self.labelled:
            asked = self._labels(prompts) if labels is None else labels
            return self.network.prepare(torch.tensor(asked, device=self.device))
        text = self.encode_text(prompts)
        return self.network.prepare(text.tokens, text.mask)

    def check_request(self, request: Request, first_step: int = 0) -> None:
        """Refuse what this paper, its condition or VQ-AR cannot do."""
        super().check_request(request, first_step)
        if request.labels is not None and not self.labelled:
            kind = self.config.model.condition
            raise ValueError(f"labels need model.condition=class, not {kind}")
        if first_step > 0 and self.config.model.causal:
            raise ValueError("VQ-AR (model.causal) makes no variations; give a mask")

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw tokens; with model.condition=class, prompts ask for a class; VQ-AR steps by rows."""
        settings, self.calls = settings or self.config.sampling, None
        self.check_request(request, settings.first_step)
        self.check_sampling(settings)
        grid, seeds = request.grid_or(self.grid), request.seeds
        guidance = self.guidance_of(settings)
        sides, shares = self._sides(request, guidance)
        start = None if request.start is None else request.start.to(self.device)
        mask = None if request.mask is None else request.mask.to(self.device)
        if self.config.model.causal:
            x = torch.zeros(len(seeds), *grid, dtype=torch.int64) if start is None else start
            draws = process.sample_noise(seeds, 1, grid)["draws"][0].to(self.device)
            pasts = [Past() for _ in self.network.blocks]
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            conditions, weights = shares(guidance.end, sides(None))

            def next_rows(x: Tensor) -> Tensor:
                return self.network.next_rows(x, first, conditions, weights, pasts)

            return autoregressive.sample(
                self.counting(next_rows, len(seeds)),
                self.network.head,
                x=x.to(self.device),
                draws=draws,
                truncation=settings.truncation,
                mask=mask,
                on_step=on_step,
            )

        total, places = self.schedule.steps, self.places()

        def predict(x: Tensor, t: Tensor, keep: Tensor | None) -> Tensor:
            scales = guidance.at(1 - (t.float() + 1) / total)  # [B]
            if keep is None:
                return self.network.mixed_rows(x, t, *shares(scales, sides(None)))

            def ask(scale: float, pictures: Tensor) -> Tensor:
                conditions, weights = shares(scale, sides(pictures))
                some = (x[pictures], one_time(t[pictures]), conditions, weights, keep[pictures])
                return self.network.mixed_rows(*some)

            return mixed_rows(ask, scales, keep)

        if not settings.sampler.own:
            generate = torch.ones(len(seeds), *grid, dtype=torch.bool, device=self.device)
            found = serve.sample(
                settings.sampler,
                self._served(settings, guidance, sides, shares),
                seeds=seeds,
                steps=settings.steps,
                first=settings.first_step,
                given=start,
                generate=generate if mask is None else mask.bool(),
                on_step=on_step,
                on_call=self.on_call,
            )
            self.count_calls(found.calls)
            return found.tokens
        steps = self._steps(settings, grid[0] * grid[1])
        noise = process.sample_noise(seeds, len(steps), grid)
        noise = {name: tensor.to(self.device) for name, tensor in noise.items()}
        x = self._beginning(noise.pop("start"), start, mask, settings, steps[0].t)
        loop = {"draw": places.draw, "places": places, "on_step": on_step, **noise}
        predict = self.counting(predict, len(seeds), places)
        tokens = self._loop(predict, steps, settings, x=x, mask=mask, **loop)
        self.count_calls(torch.full((len(seeds),), places.calls))
        return tokens

    def _served(
        self, settings: Any, guidance: Guidance, sides: Conditions, shares: Shares
    ) -> Network:
        """The network as samplers take it, whose times are shares of the training's."""
        corruption, heat = self.schedule.corruption(), settings.sampler.temperature

        def features(
            pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor
        ) -> Tensor:
            t = (corruption.index(time) - 1).clamp_min(0)
            conditions, weights = shares(scale, sides(pictures))
            return self.network.mixed_rows(x, one_time(t), conditions, weights, keep)

        return Network(
            features,
            self.network.head,
            corruption,
            guidance,
            (1.0, 1.0) if heat is None else (heat, heat),
            partial(process.truncate, rate=settings.truncation),
        )

    def guidance_of(self, settings: Any) -> Guidance:
        """The guidance of the settings, of which VQ-Diffusion has none."""
        return Guidance()

    def _null_condition(self, negative: Sequence[str] | None = None) -> Side:
        """The other side of the guidance, of all images at once or a caption for each."""
        raise NotImplementedError

    def _sides(self, request: Request, guidance: Guidance) -> tuple[Conditions, Shares]:
        """The conditions of a request with the null as the last, and their weights by scale."""
        sides, mixed = [self._condition(request.prompts, request.labels)], [1.0]
        if request.blend_with is not None:
            sides.append(self._condition(request.blend_with))
            mixed = [1 - request.blend, request.blend]
        if guidance.guides:
            sides.append(self._null_condition(request.negative))

        def shares(scale: float | Tensor, sides: list[Side]) -> tuple[list[Side], Any]:
            if equals(scale, 1) or not guidance.guides:
                return sides[: len(mixed)], mixed
            if equals(scale, 0):
                return sides[len(mixed) :], [1.0]
            return sides, [*(scale * w for w in mixed), 1 - scale]

        return Conditions(sides, len(request.seeds)), shares

    def _steps(self, settings: Any, tokens: int) -> list[Any]:
        """The network calls that the settings ask for."""
        return process.make_steps(self.schedule, settings)

    def _beginning(
        self, uniforms: Tensor, start: Tensor | None, mask: Tensor | None, settings: Any, t: int
    ) -> Tensor:
        """The tokens that sampling starts from: noise, noise around known tokens, noised tokens."""
        noise = process.start_tokens(self.schedule, uniforms)
        if start is None or (mask is None and settings.first_step == 0):
            return noise
        if settings.first_step > 0:
            masked, replaced = (
                values[t].float().to(self.device).expand(len(start))
                for values in (self.schedule.mask, self.schedule.replaced)
            )
            noise = corrupt(start, masked, replaced, self.num_codes, uniforms)
        return noise if mask is None else torch.where(mask.bool(), noise, start)

    def _loop(self, predict: Any, steps: list[Any], settings: Any, **arguments: Any) -> Tensor:
        """Run the sampling loop."""
        return process.sample(
            predict, self.network.head, steps=steps, truncation=settings.truncation, **arguments
        )


def one_time(t: Tensor) -> Tensor:
    """The times [B] of a call as [1] where all are equal, which serves all images at once."""
    return t[:1] if bool((t == t[0]).all()) else t
