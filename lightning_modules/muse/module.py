"""Muse as LightningModules: the base stage, and the super-resolution stage on top of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.interfaces import Tokenizer
from lightning_modules.common.seeding import mix_seed
from lightning_modules.common.settings import build, plain
from lightning_modules.common.text import Condition
from lightning_modules.muse import process
from lightning_modules.muse.config import (
    DecodeConfig,
    MuseConfig,
    ObjectiveConfig,
    SamplingConfig,
)
from lightning_modules.muse.editing import outpaint, rewrite
from lightning_modules.muse.network import MaskedTransformer
from lightning_modules.muse.superres import SuperRes
from lightning_modules.muse.uvit import UViT

AESTHETIC = 6.0  # the score that aMUSEd's pipeline asks for

OnStep = Callable[[int, Tensor, Tensor], None]


class MaskedStage(GeneratorModule):
    """What both stages share: masking, loss, dropped captions, guidance and decoding."""

    config_class = MuseConfig
    config: MuseConfig
    network: MaskedTransformer | UViT
    objective: ObjectiveConfig

    def masked(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Mask tokens [B, h, w] by the objective's law: the input, the mask, the rates [B]."""
        o = self.objective
        chance: dict[str, Any] = {"generator": generator, "device": tokens.device}
        total = tokens[0].numel()
        uniforms = torch.rand(len(tokens), **chance)
        rates = process.masked_rate(uniforms, o.mask_law, total, o.min_rate)
        number = process.masked_number(rates, total)
        mask = process.scattered_mask(number, torch.rand(tokens.shape, **chance))
        if o.rectangle > 0:
            coins = torch.rand(len(tokens), 4, **chance)
            boxes = process.rectangle_mask(number, (tokens.shape[1], tokens.shape[2]), coins[:, :3])
            mask = torch.where((coins[:, 3] < o.rectangle)[:, None, None], boxes, mask)
        return tokens.masked_fill(mask, self.network.mask_id), mask, rates

    def token_loss(
        self, tokens: Tensor, x: Tensor, mask: Tensor, rates: Tensor, side: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masked cross entropy (1.3) of tokens [B, h, w] given x.

        Returns:
            The loss, the accuracy over the masked tokens and their logits [mask.sum(), K].
        """
        o = self.objective
        all_count = o.visible_weight > 0
        keep = torch.ones_like(mask) if all_count else mask
        logits = self.network.head(self.network.mixed_rows(x, [side], [1.0], keep)).float()
        ce = F.cross_entropy(
            logits, tokens[keep], reduction="none", label_smoothing=o.label_smoothing
        )
        grid = ce.new_zeros(mask.shape)
        grid[keep] = ce
        rises = all_count and o.visible_law == "rate"
        weight = process.loss_weight(mask, rates, o.visible_weight, rises)
        loss = process.masked_loss(grid.flatten(1), weight.flatten(1), o.reduction)
        hidden = logits.detach()[mask[keep]]
        return loss, (hidden.argmax(1) == tokens[mask]).float().mean(), hidden

    def dropped(self, captions: list[str], generator: torch.Generator) -> Tensor:
        """Draw whose caption is hidden: [B] bool."""
        u = torch.rand(len(captions), generator=generator, device=generator.device)
        return u < self.objective.text_drop

    def side(
        self,
        captions: list[str] | None,
        drop: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        **more: Any,
    ) -> Any:
        """What the network takes as one condition.

        Args:
            captions: B texts; None is the dropped caption for any number of images.
            drop: [B] bool, True where the caption is hidden.
            grid: token grid, whose size in pixels aMUSEd's network is told.
            **more: what `prepare` of the network takes besides.
        """
        network = self.network
        empty = isinstance(network, UViT) or network.config.null_text == "empty"
        if captions is None and not empty:
            assert isinstance(network, MaskedTransformer)
            return network.prepare(None, **more)
        captions = [""] if captions is None else captions
        if drop is not None and empty:
            captions = ["" if d else c for c, d in zip(captions, drop.tolist(), strict=True)]
            drop = None
        text = self._encoded(captions)
        if not isinstance(network, UViT):
            return network.prepare(text.tokens, text.mask, drop, **more)
        if text.pooled is None:
            raise ValueError(
                f"text.name={self.config.text.name} gives no pooled vectors, which network=uvit is "
                "conditioned on: take text.name=clip with text.projected=true"
            )
        height, width = (n * self.tokenizer.factor for n in grid or self.grid)
        micro = torch.tensor([[width, height, 0, 0, AESTHETIC]], device=self.device)
        return network.prepare(text.tokens, text.pooled, micro, text.mask)

    def _encoded(self, captions: list[str]) -> Condition:
        """Encode captions; a frozen encoder reads the empty one only once."""
        if captions != [""] or self.text_encoder is not None:
            return self.encode_text(captions)
        if "empty" not in self._attached:
            self._attached["empty"] = self.encode_text(captions)
        return self._attached["empty"]

    def sides(
        self, prompts: list[str], blend_with: list[str] | None, blend: float, **more: Any
    ) -> tuple[list[Any], list[float]]:
        """The conditions of prompts, or of two kinds of them with their shares."""
        own = self.side(prompts, **more)
        if blend_with is None:
            return [own], [1.0]
        return [own, self.side(blend_with, **more)], [1 - blend, blend]

    def predictor(self, sides: list[Any], shares: list[float], null: Any) -> process.Predict:
        """The `predict` of decoding: features under `sides`, guided away from `null`."""

        def predict(x: Tensor, weight: float, keep: Tensor) -> Tensor:
            if weight == 1:
                return self.network.mixed_rows(x, sides, shares, keep)
            if weight == 0:
                return self.network.mixed_rows(x, [null], [1.0], keep)
            both = [*(weight * s for s in shares), 1 - weight]
            return self.network.mixed_rows(x, [*sides, null], both, keep)

        return predict

    def decode(
        self,
        predict: process.Predict,
        start: Tensor,
        seeds: list[int],
        settings: DecodeConfig,
        critic: Callable[[Tensor], Tensor] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode the masked tokens of start [B, h, w]; chance is that of the seeds."""
        grid, mask_id = (start.shape[1], start.shape[2]), self.network.mask_id
        unknown = (start == mask_id).flatten(1).sum(1)
        # counts hang on the last bit of a cosine, which a GPU may round otherwise
        loop = process.loop_settings(settings, unknown.cpu())
        loop["counts"] = loop["counts"].to(start.device)
        if settings.order == "halton":
            ranks = process.halton_ranks(grid, seeds, settings.halton_roll)
            loop["ranks"] = ranks.to(start.device)
        for name, tensor in process.sample_noise(seeds, len(loop["counts"]), grid).items():
            loop[name] = tensor.to(start.device)
        return process.decode(
            predict, self.network.head, start=start, mask_id=mask_id, critic=critic,
            on_step=on_step, **loop,
        )  # fmt: skip

    def settings(self, sampling: Mapping[str, Any]) -> SamplingConfig:
        """The checkpoint's sampling settings with some replaced, also inside their sections."""
        own = plain(self.config.sampling)
        for name, value in sampling.items():
            nested = isinstance(value, Mapping) and isinstance(own.get(name), dict)
            own[name] = {**own[name], **value} if nested else value
        return build(SamplingConfig, own)


class MuseModule(MaskedStage):
    """Text to tokens by parallel decoding (arXiv 2301.00704), with or without super-resolution.

    Args:
        config: as for every generator; with superres.enabled also `high`: the token grid and the
            number of codes of the super-resolution stage.
    """

    # what both stages are told
    SHARED: ClassVar[tuple[str, ...]] = ("negative", "blend_with", "blend", "superres")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        c = self.config
        uvit, self.objective = c.network == "uvit", c.objective
        self.network = UViT(c.uvit) if uvit else MaskedTransformer(c.model)
        self.num_codes: int = self.network.config.num_codes
        if config["num_codes"] != self.num_codes:
            name = "uvit.codebook_size" if uvit else "model.num_codes"
            raise ValueError(
                f"{name} must be the tokenizer's {config['num_codes']} codes, got {self.num_codes}"
            )
        self.critic: MaskedTransformer | None = None
        if c.critic.layers:
            sizes = dataclasses.replace(c.model, layers=c.critic.layers)
            self.critic = MaskedTransformer(sizes, outputs=1)
        self.superres: SuperResModule | None = None
        if c.superres.enabled:
            self.superres = SuperResModule(config)
            if self.text_encoder is None:  # a frozen one is held once
                self.superres._attached["text"] = self._attached["text"]

    def attach(self, tokenizer: Tokenizer, high: Tokenizer | None = None) -> "MuseModule":
        """Give the stages their (frozen) tokenizers; both take the same one unless `high` is."""
        super().attach(tokenizer)
        if self.superres is not None:
            self.superres.attach(high or tokenizer)
        return self

    @property
    def factor(self) -> int:
        """Pixels of a picture per base token along a side."""
        return self.tokenizer.factor * (1 if self.superres is None else self.config.superres.factor)

    @property
    def mask_factor(self) -> int:
        """Pixels of a picture per cell of an edit's mask: a token of the last stage."""
        return self.tokenizer.factor if self.superres is None else self.superres.tokenizer.factor

    @property
    def fixed_size(self) -> bool:
        """Whether the network has positions for the trained grid alone."""
        return isinstance(self.network, MaskedTransformer)

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked cross entropy, and beside it the critic's loss on what the generator draws.

        Args:
            batch: tokens [B, h, w] or image [B, 3, H, W], and caption.
            generator: source of masks, caption drops and draws, on this module's device.

        Returns:
            The loss, and the accuracy over the masked tokens.
        """
        tokens = self.tokens_of(batch)
        x, mask, rates = self.masked(tokens, generator)
        drop = self.dropped(batch["caption"], generator)
        side = self.side(batch["caption"], drop, (tokens.shape[1], tokens.shape[2]))
        loss, accuracy, logits = self.token_loss(tokens, x, mask, rates, side)
        scalars = {"accuracy": accuracy}
        if self.critic is not None:
            u = torch.rand(len(logits), generator=generator, device=logits.device)
            filled = tokens.clone()
            filled[mask] = draw_rows(logits, u, lambda rows: rows)
            scores = self._scores(self.critic, filled, self._critic_side(batch["caption"], drop))
            scalars["critic"] = process.critic_loss(scores, filled == tokens)
            loss = loss + self.config.critic.weight * scalars["critic"]
        return loss, scalars

    def _critic_side(self, captions: list[str], drop: Tensor | None = None) -> Any:
        """The critic's condition; its loss does not train the text encoder."""
        assert self.critic is not None
        text = self.encode_text(captions)
        if self.critic.config.null_text == "empty" and drop is not None:
            shown = ["" if d else c for c, d in zip(captions, drop.tolist(), strict=True)]
            text, drop = self.encode_text(shown), None
        return self.critic.prepare(text.tokens.detach(), text.mask, drop)

    def _scores(self, critic: MaskedTransformer, tokens: Tensor, side: Any) -> Tensor:
        """How real the critic finds every token of [B, h, w]: logits [B, h, w]."""
        rows = critic.mixed_rows(tokens, [side], [1.0], torch.ones_like(tokens, dtype=torch.bool))
        return critic.head(rows).float().view(tokens.shape)

    @torch.no_grad()
    def predicted(self, tokens: Tensor, captions: list[str], rates: Tensor,
                  generator: torch.Generator) -> Tensor:  # fmt: skip
        """Tokens [B, h, w] of which a share [B] is replaced by what this stage predicts.

        One step without guidance, as in training: the reconstructed tokens of Figure 3.
        """
        chance: dict[str, Any] = {"generator": generator, "device": tokens.device}
        number = (rates * tokens[0].numel()).round().long()
        mask = process.scattered_mask(number, torch.rand(tokens.shape, **chance))
        out = tokens.clone()
        if mask.any():
            x = tokens.masked_fill(mask, self.network.mask_id)
            side = self.side(captions, grid=(tokens.shape[1], tokens.shape[2]))
            rows = self.network.mixed_rows(x, [side], [1.0], mask)
            out[mask] = draw_rows(rows, torch.rand(len(rows), **chance), self.network.head)
        return out

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
        rewrite_all: bool = False,
        grid: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw the base's tokens for prompts; image i depends on prompt i and seed i alone.

        A grid larger than the one trained on is generated window by window where the network has
        learned positions.

        Args:
            prompts: B captions.
            seeds: B seeds.
            negative: B captions in place of the dropped one on the other side of the guidance.
            blend_with: B captions to blend into: the features of both are mixed.
            blend: share of `blend_with`, 0 to 1.
            start: [B, h, w] tokens: what stands where mask is 0; without a mask what a variation
                (sampling.first_step above 0) or an edit without a mask starts from.
            mask: [B, h, w], 1 = generate, 0 = keep start's token.
            rewrite_all: edit `start` without a mask (`editing.rewrite`).
            grid: token grid other than the one trained on; default is start's.
            on_step: called with step, input tokens and result tokens [B, h, w].
            **sampling: settings of `SamplingConfig` that differ from this checkpoint's.

        Returns:
            [B, h, w] int64.

        Raises:
            ValueError: an unknown setting, one out of range, or an edit without `start`.
        """
        settings = self.settings(sampling)
        if grid is None:
            grid = self.grid if start is None else (start.shape[1], start.shape[2])
        predict = self._predict(prompts, negative, blend_with, blend, grid)
        if rewrite_all:
            if start is None:
                raise ValueError("an edit without a mask needs start, the picture's tokens")
            return self._rewrite(predict, start, seeds, settings, on_step)
        x = self._beginning(len(prompts), seeds, grid, start, mask, settings)
        critic = None
        if settings.order == "critic" and self.critic is not None:
            net, side = self.critic, self._critic_side(prompts)
            critic = lambda tokens: self._scores(net, tokens, side)  # noqa: E731
        if self.fixed_size and (grid[0] > self.grid[0] or grid[1] > self.grid[1]):

            def decode(part: Tensor, number: int, place: tuple[int, int]) -> Tensor:
                names = [mix_seed(seed, 5, number) for seed in seeds]
                return self.decode(predict, part, names, settings, critic, on_step)

            return outpaint(decode, x, self.network.mask_id, self.grid)
        return self.decode(predict, x, seeds, settings, critic, on_step)

    def _predict(
        self,
        prompts: list[str],
        negative: list[str] | None,
        blend_with: list[str] | None,
        blend: float,
        grid: tuple[int, int],
    ) -> process.Predict:
        sides, shares = self.sides(prompts, blend_with, blend, grid=grid)
        return self.predictor(sides, shares, self.side(negative, grid=grid))

    def _beginning(
        self,
        count: int,
        seeds: list[int],
        grid: tuple[int, int],
        start: Tensor | None,
        mask: Tensor | None,
        settings: DecodeConfig,
    ) -> Tensor:
        """The tokens that decoding starts from, masked where it generates."""
        mask_id = self.network.mask_id
        if mask is not None and start is None:
            raise ValueError("a mask needs the given tokens (start)")
        if start is None:
            return torch.full((count, *grid), mask_id, device=self.device)
        if mask is None and settings.first_step > 0:  # a variation
            r = torch.tensor(settings.first_step / settings.steps)
            rate = process.mask_ratio(settings.schedule, r, start[0].numel())
            number = process.masked_number(rate.expand(count), start[0].numel())
            generators = [torch.Generator().manual_seed(mix_seed(seed, 1)) for seed in seeds]
            uniforms = torch.stack([torch.rand(grid, generator=g) for g in generators])
            mask = process.scattered_mask(number, uniforms)
        hidden = torch.ones_like(start) if mask is None else mask.to(self.device)
        return start.masked_fill(hidden.bool(), mask_id)

    def _rewrite(
        self,
        predict: process.Predict,
        start: Tensor,
        seeds: list[int],
        settings: SamplingConfig,
        on_step: OnStep | None,
    ) -> Tensor:
        edit, chance = settings.edit, []
        for seed in seeds:
            generator = torch.Generator().manual_seed(mix_seed(seed, 3))
            shape = (2, edit.iterations, *start.shape[1:])
            chance.append(torch.rand(shape, generator=generator))
        places, draws = torch.stack(chance, dim=2).to(self.device)  # each [T, B, h, w]
        return rewrite(
            predict, self.network.head, start, mask_id=self.network.mask_id, places=places,
            draws=draws, share=edit.share, top_k=edit.top_k, guidance=edit.guidance,
            temperature=edit.temperature, on_step=on_step,
        )  # fmt: skip

    @torch.no_grad()
    def pictures(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        start: Tensor | None = None,
        mask: Tensor | None = None,
        **sampling: Any,
    ) -> dict[str, Tensor]:
        """Draw the pictures of every stage, the final ones last; arguments as in `sample`.

        Returns:
            {"base": [B, 3, H, W]}, and with super-resolution also {"superres": the larger ones}.
        """
        if self.superres is None:
            return {"base": self._base_pictures(prompts, seeds, start, mask, sampling)[1]}
        factor, high, small = self.config.superres.factor, None, None
        if start is not None:
            start = start.to(self.device)
            small = F.interpolate(start, scale_factor=1 / factor, mode="area")
            high = self.superres.tokenizer.encode(start)
        low_mask = None
        if mask is not None and small is not None:
            factor_low = self.tokenizer.factor
            grid = (small.shape[2] // factor_low, small.shape[3] // factor_low)
            low_mask = F.adaptive_max_pool2d(mask.float(), grid).bool()
        low, base = self._base_pictures(prompts, seeds, small, low_mask, sampling)
        tokens = self.superres.sample_tokens(
            prompts, seeds=seeds, low=low, start=high if mask is not None else None, mask=mask,
            **{k: v for k, v in sampling.items() if k in self.SHARED},
        )  # fmt: skip
        return {"base": base, "superres": self.superres.tokenizer.decode(tokens)}

    def _base_pictures(
        self,
        prompts: list[str],
        seeds: list[int],
        start: Tensor | None,
        mask: Tensor | None,
        sampling: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        given = None if start is None else self.tokenizer.encode(start.to(self.device))
        tokens = self.sample_tokens(prompts, seeds=seeds, start=given, mask=mask, **sampling)
        return tokens, self.tokenizer.decode(tokens)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        start: Tensor | None = None,
        mask: Tensor | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1] through all stages.

        Args:
            prompts: B captions.
            seeds: B seeds.
            start: [B, 3, H, W] images in [-1, 1] that an edit or a variation starts from.
            mask: [B, h, w], 1 = generate; a cell is a token of the last stage (`mask_factor`). Of
                the base every token that a marked cell touches is generated.
            **sampling: what `sample_tokens` takes.
        """
        return list(
            self.pictures(prompts, seeds=seeds, start=start, mask=mask, **sampling).values()
        )[-1]


class SuperResModule(MaskedStage):
    """The super-resolution stage: high-res tokens from low-res tokens and text (section 2.4).

    It is trained on its own after the base, which is attached, not owned.

    Args:
        config: that of the whole model; `high` has this stage's token grid and number of codes.
    """

    network: SuperRes

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        stage, high = self.config.superres, config["high"]
        self.grid = (high["grid"][0], high["grid"][1])
        self.optim, self.objective = stage.optim, stage.objective
        self.network = SuperRes(stage.model)
        wanted = {"num_codes": high["num_codes"], "low_num_codes": config["num_codes"]}
        for name, codes in wanted.items():
            if getattr(stage.model, name) != codes:
                raise ValueError(
                    f"superres.model.{name} must be the tokenizer's {codes} codes, "
                    f"got {getattr(stage.model, name)}"
                )

    def attach_low(self, tokenizer: Tokenizer, base: MuseModule | None = None) -> "SuperResModule":
        """Give the stage the (frozen) tokenizer of low-res pictures, and the base that it enlarges.

        The base is needed in training with superres.low=predicted alone.
        """
        self._attached |= {"low": tokenizer, "base": base}
        return self

    def on_fit_start(self) -> None:
        """Move what is attached here, too."""
        super().on_fit_start()
        for part in (self._attached["low"], self._attached["base"]):
            if isinstance(part, nn.Module):
                part.to(self.device)

    def low_tokens(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Low-res tokens [B, h, w] of a batch, real ones or partly predicted by the base."""
        stage = self.config.superres
        if "low" in batch:
            low = batch["low"]
        else:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                small = F.interpolate(batch["image"], scale_factor=1 / stage.factor, mode="area")
                low = self._attached["low"].encode(small)
        if stage.low == "real":
            return low
        u = torch.rand(len(low), generator=generator, device=low.device)
        base: MuseModule = self._attached["base"]
        return base.predicted(low, batch["caption"], u * stage.low_rate, generator)

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked cross entropy of the high-res tokens.

        Args:
            batch: tokens [B, H, W] and low [B, h, w], or image [B, 3, ...]; and caption.
            generator: source of masks and caption drops, on this module's device.

        Returns:
            The loss, and the accuracy over the masked tokens.
        """
        tokens = self.tokens_of(batch)
        low = self.network.encode_low(self.low_tokens(batch, generator))
        x, mask, rates = self.masked(tokens, generator)
        side = self.side(batch["caption"], self.dropped(batch["caption"], generator), low=low)
        loss, accuracy, _ = self.token_loss(tokens, x, mask, rates, side)
        return loss, {"accuracy": accuracy}

    @torch.no_grad()
    def sample_tokens(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        low: Tensor | None = None,
        negative: list[str] | None = None,
        blend_with: list[str] | None = None,
        blend: float = 0.0,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw high-res tokens [B, H, W] for low-res ones, window by window where they are many.

        Args:
            prompts: B captions.
            seeds: B seeds.
            low: [B, h, w] tokens of the base.
            negative: B captions in place of the dropped one on the other side of the guidance.
            blend_with: B captions to blend into.
            blend: share of `blend_with`, 0 to 1.
            start: [B, H, W] high-res tokens that stand where mask is 0.
            mask: [B, H, W], 1 = generate.
            on_step: called with step, input tokens and result tokens.
            **sampling: `superres`, settings of its decoding that differ from this checkpoint's.

        Raises:
            ValueError: without `low`.
        """
        if low is None:
            raise ValueError("super-resolution needs low, the tokens of the base")
        settings = self.settings(sampling).superres
        h, w = low.shape[1:]
        trained = self.config_grid
        scale = self.grid[0] // trained[0]
        x = torch.full((len(low), h * scale, w * scale), self.network.mask_id, device=low.device)
        if start is not None and mask is not None:
            x = torch.where(mask.to(low.device).bool(), x, start)

        def decode(part: Tensor, number: int, place: tuple[int, int]) -> Tensor:
            names = [mix_seed(seed, 4, number) for seed in seeds]
            rows, columns = (
                slice(at // scale, (at + n) // scale)
                for at, n in zip(place, part.shape[1:], strict=True)
            )
            encoded = self.network.encode_low(low[:, rows, columns])
            null = self.side(negative, low=encoded)
            sides, shares = self.sides(prompts, blend_with, blend, low=encoded)
            predict = self.predictor(sides, shares, null)
            return self.decode(predict, part, names, settings, None, on_step)

        if (h, w) == trained:
            return decode(x, 0, (0, 0))
        return outpaint(decode, x, self.network.mask_id, self.grid, scale)

    @property
    def config_grid(self) -> tuple[int, int]:
        """Height and width of the low-res token grid that the stage was trained on."""
        grid = self.hparams["config"]["grid"]
        return (grid[0], grid[1])
