"""Muse as LightningModules: the base stage, and the super-resolution stage on top of it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.guidance import equals
from lightning_modules.common.interfaces import Geometry
from lightning_modules.common.request import OnStep, Request, seeded_uniforms
from lightning_modules.common.seeding import mix_seed
from lightning_modules.muse import process
from lightning_modules.muse.config import DecodeConfig, MuseConfig, ObjectiveConfig
from lightning_modules.muse.editing import outpaint, rewrite
from lightning_modules.muse.network import MaskedTransformer
from lightning_modules.muse.superres import SuperRes
from lightning_modules.muse.uvit import UViT
from lightning_modules.samplers import serve
from lightning_modules.samplers.ordered import halton_ranks
from lightning_modules.samplers.serve import Conditions, Network
from lightning_modules.samplers.settings import NEEDS

AESTHETIC = 6.0  # the score that aMUSEd's pipeline asks for


def shown(captions: Sequence[str], drop: Tensor) -> list[str]:
    """The captions, "" in place of those where drop [B] is true."""
    return ["" if hidden else c for c, hidden in zip(captions, drop.tolist(), strict=True)]


class MaskedStage(GeneratorModule):
    """What both stages share: masking, loss, dropped captions, guidance and decoding."""

    config_class = MuseConfig
    config: MuseConfig
    network: MaskedTransformer | UViT
    objective: ObjectiveConfig

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the vectors that it reads of a caption: per token, and pooled."""
        if isinstance(self.network, UViT):
            return self.network.config.encoder_hidden_size, self.network.config.cond_embed_dim
        return self.network.config.text_width, 0

    def masking(self, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw for tokens [B, h, w] which are masked [B, h, w] bool, and the rates [B] of it."""
        o = self.objective
        rng: dict[str, Any] = {"generator": generator, "device": tokens.device}
        total = tokens[0].numel()
        uniforms = torch.rand(len(tokens), **rng)
        rates = process.masked_rate(uniforms, o.mask_law, total, o.min_rate)
        number = process.masked_number(rates, total)
        mask = process.scattered_mask(number, torch.rand(tokens.shape, **rng))
        if o.rectangle > 0:
            coins = torch.rand(len(tokens), 4, **rng)
            boxes = process.rectangle_mask(number, (tokens.shape[1], tokens.shape[2]), coins[:, :3])
            mask = torch.where((coins[:, 3] < o.rectangle)[:, None, None], boxes, mask)
        return {"tokens": tokens, "mask": mask, "rates": rates}

    def token_loss(
        self, tokens: Tensor, mask: Tensor, rates: Tensor, condition: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masked cross entropy (1.3) of tokens, the accuracy, and what is said of masked tokens.

        Args:
            tokens: [B, h, w] int64.
            mask: [B, h, w] bool, True = masked.
            rates: [B] masked shares.
            condition: what the network takes as one.

        Returns:
            Two scalars, and logits [n, K] of the tokens that `places` picks by the mask.
        """
        o, places = self.objective, self.places()
        x = tokens.masked_fill(mask, self.network.mask_id)
        keep = places.keep(mask) if o.visible_weight == 0 else None
        logits = self.network.head(self.network.mixed_rows(x, [condition], [1.0], keep)).float()
        target = tokens.flatten() if keep is None else tokens[keep]
        smoothing: Any = {"reduction": "none", "label_smoothing": o.label_smoothing}
        ce = F.cross_entropy(logits, target, **smoothing)
        grid = ce.view(mask.shape) if keep is None else ce.new_zeros(mask.shape)
        if keep is not None:
            grid[keep] = ce
        rises = o.visible_weight > 0 and o.visible_law == "rate"
        weight = process.loss_weight(mask, rates, o.visible_weight, rises)
        loss = process.masked_loss(grid.flatten(1), weight.flatten(1), o.reduction)
        hidden = logits.detach()
        if keep is None:
            hidden = places.pick(hidden.unflatten(0, mask.shape), mask)
        asked = places.pick(mask, mask)
        right = (hidden.argmax(1) == places.pick(tokens, mask)) & asked
        return loss, right.sum() / asked.sum(), hidden

    def dropped(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Draw whose caption is hidden: [B] bool."""
        u = torch.rand(len(captions), generator=generator, device=self.device)
        return u < self.objective.text_drop

    def condition(
        self,
        captions: Sequence[str] | None,
        drop: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        **more: Any,
    ) -> Any:
        """What the network takes as one condition; arguments as of `told`, and of `prepare`."""
        return self.network.prepare(**self.told(captions, drop, grid), **more)

    def told(
        self,
        captions: Sequence[str] | None,
        drop: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """What the network prepares a condition from: encoded captions, and what it takes besides.

        Args:
            captions: B texts; None is the dropped caption for any number of images.
            drop: [B] bool, True where the caption is hidden.
            grid: token grid, whose size in pixels aMUSEd's network is told.
        """
        network = self.network
        empty = isinstance(network, UViT) or network.config.null_text == "empty"
        if captions is None and not empty:
            return {"text": None}
        captions = [""] if captions is None else captions
        if drop is not None and empty:
            captions, drop = shown(captions, drop), None
        text = self.encode_text(captions)
        if not isinstance(network, UViT):
            return {"text": text.tokens, "mask": text.mask, "drop": drop}
        if text.pooled is None:
            raise ValueError(
                f"text.name={self.config.text.name} gives no pooled vectors, which network=uvit is "
                "conditioned on: take text.name=clip with text.projected=true"
            )
        height, width = (n * self.first_stage.factor for n in grid or self.grid)
        micro = torch.tensor([[width, height, 0, 0, AESTHETIC]], device=self.device)
        return {"text": text.tokens, "pooled": text.pooled, "micro": micro, "mask": text.mask}

    def texts(self, request: Request, grid: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """What conditions are prepared from: the captions, those to blend with, and the null."""
        captions = [request.prompts, request.blend_with, request.negative]
        asked = [c for i, c in enumerate(captions) if i != 1 or c is not None]
        return [self.told(c, grid=grid) for c in asked]

    def predictor(
        self, request: Request, texts: Sequence[dict[str, Any]], **more: Any
    ) -> process.Predict:
        """The `predict` of decoding: features under the captions, guided away from the null.

        `texts` are those of the request, `more` is what `prepare` of the network takes besides.
        """
        weights = [1.0] if len(texts) == 2 else [1 - request.blend, request.blend]
        sides = [self.network.prepare(**text, **more) for text in texts]
        picked = Conditions(sides, len(request.seeds))

        def predict(
            x: Tensor, weight: float | Tensor, keep: Tensor | None, pictures: Tensor | None = None
        ) -> Tensor:
            *conditions, null = picked(pictures)
            if equals(weight, 1):
                return self.network.mixed_rows(x, conditions, weights, keep)
            if equals(weight, 0):
                return self.network.mixed_rows(x, [null], [1.0], keep)
            guided = [*(weight * w for w in weights), 1 - weight]
            return self.network.mixed_rows(x, [*conditions, null], guided, keep)

        return predict

    def decode(
        self,
        predict: Callable[..., Tensor],
        start: Tensor,
        seeds: Sequence[int],
        settings: DecodeConfig,
        on_step: OnStep | None,
        critic: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Decode the masked tokens of start [B, h, w]; all noise is drawn from the seeds."""
        if not settings.sampler.own:
            return self._served(predict, start, seeds, settings, on_step, critic)
        grid, mask_id = (start.shape[1], start.shape[2]), self.network.mask_id
        places = self.places()
        predict = self.counting(predict, len(start), places)
        unknown = (start == mask_id).flatten(1).sum(1)
        # counts hang on the last bit of a cosine, which a GPU may round otherwise
        loop = process.loop_settings(settings, unknown.cpu())
        loop["counts"] = loop["counts"].to(start.device)
        if settings.order == "halton":
            ranks = halton_ranks(grid, seeds, "grid" if settings.halton_roll else "none")
            loop["ranks"] = ranks.to(start.device)
        for name, tensor in process.sample_noise(seeds, len(loop["counts"]), grid).items():
            loop[name] = tensor.to(start.device)
        loop |= {"critic": critic, "draw": places.draw, "places": places, "on_step": on_step}
        head = self.network.head
        tokens = process.decode(predict, head, start=start, mask_id=mask_id, **loop)
        self.count_calls(torch.full((len(start),), places.calls))
        return tokens

    def _served(
        self,
        predict: Callable[..., Tensor],
        start: Tensor,
        seeds: Sequence[int],
        settings: DecodeConfig,
        on_step: OnStep | None,
        critic: Callable[..., Tensor] | None,
    ) -> Tensor:
        """The same by another sampler, which calls the mask K whatever its id is."""
        mask_id, codes, sampler = (
            self.network.mask_id,
            self.network.config.num_codes,
            settings.sampler,
        )
        generate = start == mask_id

        def features(
            pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor
        ) -> Tensor:
            return predict(x.masked_fill(x == codes, mask_id), scale, keep, pictures)

        heat = (settings.temperature_start, settings.temperature_end)
        network = Network(
            features,
            self.network.head,
            process.noise_of(settings, codes),
            process.guidance_of(settings),
            heat if sampler.temperature is None else (sampler.temperature, sampler.temperature),
            None if settings.top_k is None else partial(process.top_k_filter, k=settings.top_k),
            None if critic is None else lambda pictures, x: critic(x, pictures),
        )
        found = serve.sample(
            sampler,
            network,
            seeds=seeds,
            steps=settings.steps,
            first=settings.first_step,
            given=start.masked_fill(generate, codes),
            generate=generate,
            on_step=on_step,
            on_call=self.on_call,
        )
        self.count_calls(found.calls)
        return found.tokens


class MuseModule(MaskedStage):
    """Text to tokens by parallel decoding (arXiv 2301.00704), with or without super-resolution.

    Args:
        config: as for every generator. With superres.enabled and `high` the module has the
            super-resolution stage, too: its grid and num_codes and, where its first stage is not
            the base's, `first_stage` {file, sha256}. Without `high` it is the base alone.
    """

    ABILITIES = frozenset({"negative", "blend_with", "start", "mask", "rewrite", "grid"})

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        c = self.config
        self.objective = c.objective
        self.network = UViT(c.uvit) if c.network == "uvit" else MaskedTransformer(c.model)
        self.critic: MaskedTransformer | None = None
        if c.critic.layers:
            sizes = dataclasses.replace(c.model, layers=c.critic.layers)
            self.critic = MaskedTransformer(sizes, outputs=1)
        self.superres: SuperResModule | None = None
        if c.superres.enabled and "high" in config:
            self.superres = SuperResModule(config)
            if self.text_encoder is None:  # a frozen one is held once
                self.superres.share_text(self)

    @classmethod
    def assemble(
        cls,
        state: Mapping[str, Tensor],
        config: dict[str, Any],
        parts: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]],
        what: str,
    ) -> Self:
        """Build the base of a checkpoint, with the part `superres` both stages.

        A file may hold both: the second one's tensors are called superres.* then.
        """
        others = dict(parts)
        tensors, settings = others.pop("superres", ({}, config))
        state = {**state, **{f"superres.{name}": tensor for name, tensor in tensors.items()}}
        if any(name.startswith("superres.") for name in state):
            config = {**config, "superres": settings["superres"], "high": settings["high"]}
        else:
            config = {name: value for name, value in config.items() if name != "high"}
        return super().assemble(state, config, others, what)

    def attach(self, first_stage: Any, high: Any = None, **others: Any) -> Self:
        """Give the stages their (frozen) first stages; both take the same one unless `high` is."""
        if self.superres is not None:
            self.superres.attach(high or first_stage)
        return super().attach(first_stage, **others)

    def further_first_stages(self) -> dict[str, dict[str, str]]:
        """Return that of the super-resolution stage, where it has one of its own."""
        high = {} if self.superres is None else self.hparams["config"]["high"]
        own = high.get("first_stage", high.get("tokenizer"))  # the latter in older files
        return {} if own is None else {"high": own}

    @property
    def final_first_stage(self) -> Any:
        """What the finished pictures are decoded by."""
        return self.first_stage if self.superres is None else self.superres.first_stage

    def part(self, name: str) -> GeneratorModule:
        """Return the super-resolution stage under its name."""
        if name == "superres" and self.superres is not None:
            return self.superres
        return super().part(name)

    @property
    def pixels_per_token(self) -> int:
        """Pixels of a picture per base token along a side."""
        times = 1 if self.superres is None else self.config.superres.factor
        return self.first_stage.factor * times

    @property
    def pixels_per_cell(self) -> int:
        """Pixels of a picture per cell of an edit's mask: a token of the last stage."""
        return self.final_first_stage.factor

    @property
    def size_unit(self) -> int:
        """Pixels that a side of a picture must be a multiple of, for both networks."""
        last = self.network if self.superres is None else self.superres.network
        return math.lcm(
            self.pixels_per_token * self.network.config.grid_multiple,
            self.pixels_per_cell * last.config.grid_multiple,
        )

    @property
    def fixed_size(self) -> bool:
        """Whether the network has positions for the trained grid alone."""
        return isinstance(self.network, MaskedTransformer)

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Tokens, what of them is masked, the captions, and what a critic needs besides."""
        tokens = self.batch_tokens(batch)
        found: dict[str, Any] = self.masking(tokens, generator)
        drop = self.dropped(batch["caption"], generator)
        found["told"] = self.told(batch["caption"], drop, (tokens.shape[1], tokens.shape[2]))
        if self.critic is not None:
            u = torch.rand(tokens.shape, generator=generator, device=tokens.device)
            judged = self.judged(batch["caption"], found["told"], drop)
            found |= {"chances": u, "judged": judged}
        return found

    def compute_loss(
        self,
        tokens: Tensor,
        mask: Tensor,
        rates: Tensor,
        told: dict[str, Any],
        chances: Tensor | None = None,
        judged: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked cross entropy, and beside it the critic's loss on what the generator draws.

        Args:
            tokens: [B, h, w] int64.
            mask: [B, h, w] bool, True = masked.
            rates: [B] masked shares.
            told: the condition, from `told`.
            chances: [B, h, w] in [0, 1) for what the critic judges.
            judged: the critic's condition, from `judged`.
        """
        condition = self.network.prepare(**told)
        loss, accuracy, logits = self.token_loss(tokens, mask, rates, condition)
        scalars = {"accuracy": accuracy}
        if self.critic is not None and chances is not None and judged is not None:
            places, side = self.places(), self.critic.prepare(**judged)
            # the loss tells of logits that are no numbers, and the training ends by it
            drawn = places.draw(logits.nan_to_num(), places.pick(chances, mask), lambda rows: rows)
            filled = places.put(tokens, mask, drawn)
            scores = self.critic.head(self.critic.mixed_rows(filled, [side], [1.0]))
            scores = scores.float().view(tokens.shape)
            scalars["critic"] = process.critic_loss(scores, filled == tokens)
            loss = loss + self.config.critic.weight * scalars["critic"]
        return loss, scalars

    def judged(
        self, captions: Sequence[str], told: dict[str, Any], drop: Tensor | None = None
    ) -> dict[str, Any]:
        """What the critic prepares its condition from; its loss does not train the text encoder.

        `told` is the condition of the generator, whose text is the same unless one of the two
        hides a dropped caption behind the empty one.
        """
        assert self.critic is not None
        empty = self.critic.config.null_text == "empty"
        text, mask = told["text"], told["mask"]
        if drop is not None and empty != (told.get("drop") is None):
            again = self.encode_text(shown(captions, drop) if empty else captions)
            text, mask = again.tokens, again.mask
        return {"text": text.detach(), "mask": mask, "drop": None if empty else drop}

    def critic_of(self, captions: Sequence[str], told: dict[str, Any]) -> Callable[..., Tensor]:
        """How real the critic finds every token of [B, h, w] under captions: logits [B, h, w]."""
        critic = self.critic
        assert critic is not None
        picked = Conditions([critic.prepare(**self.judged(captions, told))], len(captions))

        def scores(tokens: Tensor, pictures: Tensor | None = None) -> Tensor:
            rows = critic.mixed_rows(tokens, picked(pictures), [1.0])
            return critic.head(rows).float().view(tokens.shape)

        return scores

    @torch.no_grad()
    def predicted(
        self, tokens: Tensor, captions: Sequence[str], rates: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Tokens [B, h, w] of which a share [B] is replaced by what this stage predicts.

        One step without guidance, as in training: the reconstructed tokens of Figure 3.
        """
        rng: dict[str, Any] = {"generator": generator, "device": tokens.device}
        number = (rates * tokens[0].numel()).round().long()
        mask = process.scattered_mask(number, torch.rand(tokens.shape, **rng))
        out = tokens.clone()
        if mask.any():
            x = tokens.masked_fill(mask, self.network.mask_id)
            condition = self.condition(captions, grid=(tokens.shape[1], tokens.shape[2]))
            rows = self.network.mixed_rows(x, [condition], [1.0], mask)
            out[mask] = draw_rows(rows, torch.rand(len(rows), **rng), self.network.head)
        return out

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw the base's tokens [B, h, w]; a larger grid than the trained one window by window."""
        settings, self.calls = settings or self.config.sampling, None
        self.check_request(request, settings.first_step)
        self.check_sampling(settings)
        grid, seeds = request.grid_or(self.grid), request.seeds
        texts = self.texts(request, grid)
        predict = self.predictor(request, texts)
        mask_id = self.network.mask_id
        if request.rewrite:
            assert request.start is not None
            shape = (2, settings.edit.iterations, *request.start.shape[1:])
            uniforms = seeded_uniforms(seeds, shape, 3).movedim(0, 2)  # [2, T, B, h, w]
            noise: Any = dict(zip(("places", "draws"), uniforms.to(self.device), strict=True))
            again = {"mask_id": mask_id, "on_step": on_step, **noise}
            return rewrite(predict, self.network.head, request.start, settings.edit, **again)
        x = self._beginning(request, grid, settings)
        critic = None
        judged = settings.order == "critic" or NEEDS[settings.sampler.name].critic
        if judged and self.critic is not None:
            critic = self.critic_of(request.prompts, texts[0])
        if self.fixed_size and (grid[0] > self.grid[0] or grid[1] > self.grid[1]):

            def decode(part: Tensor, number: int, place: tuple[int, int]) -> Tensor:
                own = [mix_seed(seed, 5, number) for seed in seeds]
                return self.decode(predict, part, own, settings, on_step, critic)

            return outpaint(decode, x, mask_id, self.grid)
        return self.decode(predict, x, seeds, settings, on_step, critic)

    def _beginning(self, request: Request, grid: tuple[int, int], settings: DecodeConfig) -> Tensor:
        """The tokens [B, h, w] that decoding begins with, masked where it generates."""
        start, mask, count = request.start, request.mask, len(request.seeds)
        if start is None:
            return torch.full((count, *grid), self.network.mask_id, device=self.device)
        if mask is None and settings.first_step > 0:  # a variation
            r = torch.tensor(settings.first_step / settings.steps)
            rate = process.mask_ratio(settings.schedule, r, start[0].numel())
            number = process.masked_number(rate.expand(count), start[0].numel())
            mask = process.scattered_mask(number, seeded_uniforms(request.seeds, grid, 1))
        hidden = torch.ones_like(start) if mask is None else mask.to(self.device)
        return start.masked_fill(hidden.bool(), self.network.mask_id)

    @torch.no_grad()
    def sample(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1] through all stages.

        A cell of the mask is a token of the last stage (`pixels_per_cell`); of the base every token
        that a marked cell touches is generated. `on_step` hears of the base alone.
        """
        if self.superres is None:
            return super().sample(request, settings, on_step)
        settings = settings or self.config.sampling
        base, high = request, None
        if request.start is not None:
            start = request.start.to(self.device)
            small = F.interpolate(start, scale_factor=1 / self.config.superres.factor, mode="area")
            tokens, mask = self.first_stage.encode(small), request.mask
            if mask is not None:
                high = self.superres.first_stage.encode(start)
                mask = F.adaptive_max_pool2d(mask.float(), tokens.shape[1:]).bool()
            base = dataclasses.replace(request, start=tokens, mask=mask)
        low = self.sample_tokens(base, settings, on_step)
        larger = dataclasses.replace(request, low=low, start=high, rewrite=False, grid=None)
        tokens = self.superres.sample_tokens(larger, settings)
        return self.superres.first_stage.decode(tokens)


class SuperResModule(MaskedStage):
    """The super-resolution stage: high-res tokens from low-res tokens and text (section 2.4).

    It is trained on its own after the base. Attached are the first stage of its high-res tokens,
    `low`, that of the low-res ones, and with superres.low=predicted `base`, a MuseModule.

    Args:
        config: that of the whole model; `high` has this stage's token grid and number of codes.
    """

    ABILITIES = frozenset({"negative", "blend_with", "start", "mask", "low"})

    network: SuperRes

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        stage, high = self.config.superres, Geometry.from_config(config["high"])
        stage.check_high(high)
        self.low_grid, self.grid = self.grid, high.grid
        self.optim, self.objective = stage.optim, stage.objective
        self.network = SuperRes(stage.model)

    def low_tokens(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Low-res tokens [B, h, w] of a batch, real ones or partly predicted by the base."""
        stage = self.config.superres
        low = batch.get("low")
        if low is None:
            with torch.no_grad(), self.full_precision():
                small = F.interpolate(batch["image"], scale_factor=1 / stage.factor, mode="area")
                low = self._attached["low"].encode(small)
        if stage.low == "real":
            return low
        u = torch.rand(len(low), generator=generator, device=low.device)
        base: MuseModule = self._attached["base"]
        return base.predicted(low, batch["caption"], u * stage.low_rate, generator)

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """High-res tokens, what is masked, the low-res tokens (`low` of a batch) and captions."""
        tokens = self.batch_tokens(batch)
        low = self.low_tokens(batch, generator)
        masking = self.masking(tokens, generator)
        drop = self.dropped(batch["caption"], generator)
        return {**masking, "low": low, "told": self.told(batch["caption"], drop)}

    def compute_loss(
        self, tokens: Tensor, mask: Tensor, rates: Tensor, low: Tensor, told: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked cross entropy of the high-res tokens.

        Args:
            tokens: [B, H, W] int64.
            mask: [B, H, W] bool, True = masked.
            rates: [B] masked shares.
            low: [B, h, w] int64.
            told: the captions, from `told`.
        """
        condition = self.network.prepare(**told, low=self.network.encode_low(low))
        loss, accuracy, _ = self.token_loss(tokens, mask, rates, condition)
        return loss, {"accuracy": accuracy}

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw high-res tokens [B, H, W] for those in request.low, large ones window by window.

        `settings` are those of the whole model, of which section `superres` is read.
        """
        self.check_request(request)
        if request.low is None:
            raise ValueError("super-resolution needs low, the tokens of the base")
        settings, self.calls = settings or self.config.sampling, None
        decoding = settings.superres
        self.objective.check_sampler(decoding.sampler, "sampling.superres.sampler")
        low, scale = request.low, self.grid[0] // self.low_grid[0]
        _, h, w = low.shape
        x = torch.full((len(low), h * scale, w * scale), self.network.mask_id, device=low.device)
        if request.start is not None and request.mask is not None:
            x = torch.where(request.mask.to(low.device).bool(), x, request.start)

        texts = self.texts(request)

        def decode(part: Tensor, number: int, place: tuple[int, int]) -> Tensor:
            own = [mix_seed(seed, 4, number) for seed in request.seeds]
            rows, columns = (
                slice(at // scale, (at + n) // scale)
                for at, n in zip(place, part.shape[1:], strict=True)
            )
            encoded = self.network.encode_low(low[:, rows, columns])
            predict = self.predictor(request, texts, low=encoded)
            return self.decode(predict, part, own, decoding, on_step)

        if (h, w) == self.low_grid:
            return decode(x, 0, (0, 0))
        return outpaint(decode, x, self.network.mask_id, self.grid, scale)
