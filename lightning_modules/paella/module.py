"""Paella as a LightningModule: its network, loss and sampling loop on captioned tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.guidance import equals
from lightning_modules.common.request import OnStep, Request, seeded_normals, seeded_uniforms
from lightning_modules.common.settings import build
from lightning_modules.common.text import Condition
from lightning_modules.paella import prior as prior_process
from lightning_modules.paella import process
from lightning_modules.paella.config import PaellaConfig, PriorConfig, SamplingConfig
from lightning_modules.paella.network import Paella
from lightning_modules.paella.network_v1 import DenoiseUNet
from lightning_modules.paella.prior import Prior
from lightning_modules.samplers import serve
from lightning_modules.samplers.kernel import Uniform
from lightning_modules.samplers.serve import Conditions, Network


class PaellaModule(GeneratorModule):
    """Text-conditional renoising of image tokens (arXiv 2211.07292), of 2023 (v3) or 2022 (v1)."""

    config_class = PaellaConfig
    config: PaellaConfig
    ABILITIES = frozenset(
        {"negative", "blend_with", "start", "mask", "image_condition", "prior", "attention", "grid"}
    )

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        v1 = self.config.network == "v1"
        self.network = DenoiseUNet(self.config.v1) if v1 else Paella(self.config.model)
        self.num_codes: int = self.network.config.num_labels

    @classmethod
    def assemble(
        cls,
        state: Mapping[str, Tensor],
        config: dict[str, Any],
        parts: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]],
        what: str,
    ) -> Self:
        """Build the token predictor of a checkpoint, with the part `prior` beside it."""
        others = dict(parts)
        tensors, settings = others.pop("prior", (None, {}))
        module = super().assemble(state, config, others, what)
        if tensors is not None:
            prior = Prior(build(PriorConfig, settings["prior"]))
            load_strict(prior, tensors, f"the prior of {what}")
            module.config.check_prior(prior.config)
            module.attach(None, prior=prior.eval().requires_grad_(False))
        return module

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the vectors that it reads of a caption: per token, and pooled."""
        if isinstance(self.network, DenoiseUNet):
            return self.network.config.c_clip, self.network.config.c_clip
        return self.network.config.byt5_embd, self.network.config.clip_embd

    @property
    def size_unit(self) -> int:
        """Pixels that a side of a picture must be a multiple of."""
        return self.pixels_per_token * self.network.config.grid_multiple

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Tokens, their noise and the condition, whose parts are dropped independently."""
        tokens = self.batch_tokens(batch)
        rng: dict[str, Any] = {"generator": generator, "device": self.device}
        return {
            "tokens": tokens,
            "time": torch.rand(tokens.shape[0], **rng),
            "random_tokens": torch.randint(self.num_codes, tokens.shape, **rng),
            "uniforms": torch.rand(tokens.shape, **rng),
            **self._training_inputs(batch, generator),
        }

    def compute_loss(
        self,
        tokens: Tensor,
        time: Tensor,
        random_tokens: Tensor,
        uniforms: Tensor,
        text: Condition,
        hide: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross entropy of the clean tokens given noised ones (src_distributed/train.py).

        v1 draws r uniformly and replaces tokens with probability cos(r pi/2) instead. Beside the
        loss stands the accuracy over all tokens.

        Args:
            tokens: [B, h, w] int64.
            time: [B] in [0, 1), of which the noise rate is made.
            random_tokens: [B, h, w] int64.
            uniforms: [B, h, w] in [0, 1).
            text: the captions, with the image vectors that are shown.
            hide: [B] bool, which image vectors are hidden; None where none is.
        """
        objective = self.config.objective
        eta, condition = objective.eta, self._training_condition(text, hide)
        if self.config.network == "v1":
            t, eta = process.cosine_rate(time), 1.0  # it takes the plain mean
        else:
            t = time = process.noise_rate(time, objective.t_law)
        noised, replaced = process.add_noise(tokens, t, uniforms, random_tokens)
        rows = self.network.mixed_rows(noised, time, [condition], [1.0])
        logits, target = self.network.head(rows), tokens.flatten()  # [B h w, K], [B h w]
        smoothing = objective.label_smoothing
        ce = F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=smoothing)
        weight = process.loss_weight(replaced, t, eta)
        accuracy = (logits.detach().argmax(1) == target).float().mean()
        loss = process.sample_loss(ce.view(tokens.shape), weight).mean()
        return loss, {"accuracy": accuracy}

    def _training_condition(self, text: Condition, hide: Tensor | None) -> Any:
        """What `mixed_rows` of the network takes as the condition; arguments as `compute_loss`."""
        if isinstance(self.network, DenoiseUNet):
            return text.pooled
        sequence, mask = self.network.condition(text.tokens, text.pooled, text.image, text.mask)
        if hide is not None:
            if mask is None:
                mask = torch.ones(sequence.shape[:2], dtype=torch.bool, device=hide.device)
            last = torch.arange(mask.shape[1], device=hide.device).flip(0)
            mask = mask & ~(hide[:, None] & (last < self.config.model.clip_seq_len))
        return self.network.prepare(sequence, mask)

    def _training_inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The condition with its parts dropped, and which of its image vectors are hidden."""
        objective, captions = self.config.objective, batch["caption"]
        draws = torch.rand(3, len(captions), generator=generator, device=self.device)
        if objective.drop_per == "batch":
            draws = draws[:, :1].expand_as(draws)
        rates = (objective.text_drop, objective.pooled_drop, objective.image_drop)
        hide_text, hide_pooled, hide_image = (d < r for d, r in zip(draws, rates, strict=True))
        if isinstance(self.network, DenoiseUNet):
            vectors = self._pooled(captions) * ~hide_text[:, None]
            return {"text": Condition(vectors[:, None], None, vectors), "hide": None}
        shown = ["" if h else c for c, h in zip(captions, hide_text.tolist(), strict=True)]
        text = self.encode_text(shown)
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
        hides = image is not None and bool(hide_image.any())
        text = Condition(text.tokens, text.mask, pooled, image)
        return {"text": text, "hide": hide_image if hides else None}

    def _pooled(self, captions: Sequence[str]) -> Tensor:
        """One text vector per caption [B, P]."""
        pooled = self.encode_text(captions).pooled
        assert pooled is not None  # config.check asked for it
        return pooled

    def image_condition(self, images: Tensor) -> Tensor | None:
        """Return CLIP vectors [B, P], if the network was trained to see any; v1 was not."""
        model = self.config.model
        seen = self.config.network == "v3" and model.clip_embd > 0 and model.clip_image
        if not seen or not hasattr(self._attached["text"], "encode_images"):
            return None
        return self.encode_images(images.to(self.device))

    def imagine(self, prompts: Sequence[str], seeds: Sequence[int], settings: Any) -> Tensor:
        """Draw image vectors [B, P] from captions by the prior; row i depends on seed i alone.

        Args:
            prompts: B captions.
            seeds: B seeds.
            settings: the section `sampling.prior`.

        Raises:
            ValueError: the checkpoint has no prior.
        """
        prior = self._attached.get("prior")
        if prior is None:
            raise ValueError("this checkpoint has no prior: convert it again with --prior FILE")
        text = self._pooled(prompts)  # [B, P]
        times = prior_process.time_grid(settings.steps, settings.grid)
        noise = seeded_normals(seeds, (len(times), text.shape[1]), 2).to(text).transpose(0, 1)
        return prior_process.sample(
            prior.to(self.device),
            text,
            init=noise[0],
            step_noise=noise[1:] if settings.sampler == "ddpm" else None,
            times=times,
            guidance=settings.guidance,
            sampler=settings.sampler,
        )

    def _condition(
        self, captions: Sequence[str], image: Tensor | None = None, attention: Tensor | None = None
    ) -> Any:
        """What `mixed_rows` of the network takes as one condition."""
        if isinstance(self.network, DenoiseUNet):
            return self._pooled(captions) if image is None else image
        text = self.encode_text(captions)
        pooled = text.pooled if self.config.model.clip_embd > 0 else None
        sequence, mask = self.network.condition(text.tokens, pooled, image, text.mask)
        return self.network.prepare(sequence, mask, attention)

    def _null_condition(self, negative: Sequence[str] | None, like: Any) -> Any:
        """What guidance leads away from: the empty or a negative caption; zeros for v1."""
        if negative is None and isinstance(self.network, DenoiseUNet):
            return torch.zeros_like(like)
        return self._condition([""] if negative is None else negative)

    def predictor(self, request: Request) -> Callable[..., Tensor]:
        """The `predict` of the loop; weight 1 asks the condition alone, 0 the null."""
        seen = (request.image_condition, request.attention)
        sides, weights = [self._condition(request.prompts, *seen)], [1.0]
        null = self._null_condition(request.negative, sides[0])
        if request.blend_with is not None:
            sides.append(self._condition(request.blend_with, *seen))
            weights = [1 - request.blend, request.blend]
        picked = Conditions([*sides, null], len(request.seeds))

        def predict(
            x: Tensor,
            t: Tensor,
            weight: float | Tensor,
            keep: Tensor | None,
            pictures: Tensor | None = None,
        ) -> Tensor:
            *conditions, null = picked(pictures)
            if equals(weight, 1):
                return self.network.mixed_rows(x, t, conditions, weights, keep)
            if equals(weight, 0):
                return self.network.mixed_rows(x, t, [null], [1.0], keep)
            mixed = [*(weight * w for w in weights), 1 - weight]
            return self.network.mixed_rows(x, t, [*conditions, null], mixed, keep)

        return predict

    def _served(
        self,
        predict: Callable[..., Tensor],
        request: Request,
        grid: tuple[int, int],
        settings: SamplingConfig,
        on_step: OnStep | None,
    ) -> Tensor:
        """Draw tokens by another sampler than the paper's loop."""
        v1, sampler = self.config.network == "v1", settings.sampler

        def features(
            pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor
        ) -> Tensor:
            told = time.clamp(0, 1).arccos() * 2 / math.pi if v1 else time  # the rate's own r
            return predict(x, told.to(self.dtype), scale, keep, pictures)

        heat = (settings.temperature_start, settings.temperature_end)
        mass, least = settings.typical_mass, settings.typical_min_tokens
        network = Network(
            features,
            self.network.head,
            Uniform(self.num_codes),
            process.guidance_of(settings),
            heat if sampler.temperature is None else (sampler.temperature, sampler.temperature),
            None if mass is None else lambda logits: process.typical_filter(logits, mass, least),
        )
        start, mask = request.start, request.mask
        shape = (len(request.seeds), *grid)
        generate = torch.ones(shape, dtype=torch.bool, device=self.device)
        found = serve.sample(
            sampler,
            network,
            seeds=request.seeds,
            steps=settings.steps,
            first=settings.first_step,
            given=None if start is None else start.to(self.device),
            generate=generate if mask is None else mask.to(self.device).bool(),
            on_step=on_step,
            on_call=self.on_call,
        )
        self.count_calls(found.calls)
        return found.tokens

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw tokens [B, h, w] int64; image_condition holds vectors of `encode_images`."""
        settings, self.calls = settings or self.config.sampling, None
        self.check_request(request, settings.first_step)
        self.check_sampling(settings)
        if request.prior:
            drawn = self.imagine(request.prompts, request.seeds, settings.prior)
            request = replace(request, prior=False, image_condition=drawn)
        grid = request.grid_or(self.grid)
        predict = self.predictor(request)
        if not settings.sampler.own:
            return self._served(predict, request, grid, settings, on_step)
        loop = process.loop_settings(settings)
        fresh = settings.renoise_mode == "rand"
        counts = (len(loop["times"]), loop["renoise_steps"])
        noise = process.sample_noise(
            request.seeds, *counts, grid, self.num_codes, random_tokens=fresh
        )
        noise = {name: tensor.to(self.device) for name, tensor in noise.items()}
        start = None if request.start is None else request.start.to(self.device)
        if start is not None and request.mask is None and settings.first_step > 0:
            # a variation begins with the image's tokens, noised to the rate of its first step
            rate = process.start_rate(settings).to(self.device).expand(len(start))
            uniforms = seeded_uniforms(request.seeds, grid, 1).to(self.device)
            start, _ = process.add_noise(start, rate, uniforms, noise["init_noise"])
        places, count = self.places(), len(request.seeds)
        tokens = process.sample(
            self.counting(predict, count, places),
            self.network.head,
            **noise,
            **loop,
            mask=None if request.mask is None else request.mask.to(self.device),
            start=start,
            codebook=self.first_stage.codebook() if settings.mode == "quant" else None,
            draw=places.draw,
            places=places,
            on_step=on_step,
        )
        self.count_calls(torch.full((count,), places.calls))
        return tokens
