"""Improved VQ-Diffusion as a LightningModule: VQ-Diffusion with guidance and purity sampling."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_modules.common.checkpoint import load_strict, load_weights
from lightning_modules.common.checks import require
from lightning_modules.common.guidance import Guidance
from lightning_modules.common.request import Request
from lightning_modules.improved_vqd import process as improved
from lightning_modules.improved_vqd.config import ImprovedVQDConfig, SamplingConfig
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from lightning_modules.vq_diffusion.network import Side

TABLE = "ln2.emb.weight"  # the class table of every block


class ImprovedVQDModule(VQDiffusionModule):
    """VQ-Diffusion with dropped conditions, guidance and purity sampling (arXiv 2205.16007).

    Its weights are those of a VQ-Diffusion and, where the null is learned, the null: a text of
    `null_condition.length` token vectors, or one more row in every class table.
    """

    config_class = ImprovedVQDConfig
    ABILITIES: ClassVar[frozenset[str]] = VQDiffusionModule.ABILITIES | {"negative"}
    ADOPTS: ClassVar[tuple[str, ...]] = ("vq_diffusion",)
    config: ImprovedVQDConfig

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        null, model = self.config.null_condition, self.config.model
        self.null: nn.Parameter | None = None
        if model.condition == "text" and null.name == "learned":
            # scale 1, as released, whatever the scale of the text's vectors is
            self.null = nn.Parameter(torch.randn(null.length, model.condition_dim))

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Take a VQ-Diffusion's weights and settings; the null is the zero-shot one."""
        if config.get("paper") not in cls.ADOPTS:
            return super().adopt(state, config)
        own = {
            "paper": "improved_vqd",
            "null_condition": {"name": "empty"},
            "sampling": {"steps": config.get("sampling", {}).get("steps", SamplingConfig.steps)},
        }
        module = cls({**config, **own})
        load_strict(module, state, "the VQ-Diffusion checkpoint")
        return module

    def begin(self, first_stage: str) -> bool:
        """Take over the weights of init.ckpt, of this paper or VQ-Diffusion, where it is given."""
        file = self.config.init.file
        if file is None:
            return True
        state, config = load_weights(file)
        paper = config.get("paper")
        known = f"init.ckpt: {file} is a checkpoint of {paper}, not of vq_diffusion"
        require(paper in ("vq_diffusion", "improved_vqd"), known)
        # older checkpoints say "tokenizer"
        beneath = config.get("first_stage") or config.get("tokenizer") or {}
        same = f"init.ckpt: {file} was trained on another first stage than this one"
        require(beneath.get("sha256", first_stage) == first_stage, same)
        learned = self.config.null_condition.name == "learned"
        if not self.config.init.train and learned and self.config.model.condition != "none":
            never = (
                f"null_condition must be empty with init.train=false: {file} never learned a null"
            )
            require(paper == "improved_vqd", never)
        load_strict(self, self._completed(state), f"init.ckpt {file}")
        return self.config.init.train

    def _completed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint with what this model has besides, at its start values."""
        own, full = self.state_dict(), dict(state)
        if self.null is None:
            full.pop("null", None)
        elif "null" not in full:
            full["null"] = own["null"]
        for key in [k for k in full if k.endswith(TABLE) and k in own]:
            missing = len(own[key]) - len(full[key])
            if missing == 1:  # the null begins as the mean of all classes
                full[key] = torch.cat([full[key], full[key].mean(0, keepdim=True)])
        return full

    def _training_inputs(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        """Labels or captions of a batch, some hidden; with a learned null, which ones, besides."""
        model, count = self.config.model, len(batch["caption"])
        draws = torch.rand(count, generator=generator, device=self.device)
        hide = draws < self.config.null_condition.drop
        if self.null is not None:
            return self.encode_text(batch["caption"]), hide
        if model.condition == "class":
            return self._batch_labels(batch).masked_fill(hide, self.config.num_classes)
        if model.condition == "none":
            return None
        pairs = zip(batch["caption"], hide.tolist(), strict=True)
        return self.encode_text(["" if hidden else caption for caption, hidden in pairs])

    def _training_condition(self, given: Any) -> Side:
        """The condition of a training batch, some of it behind the learned null."""
        if self.null is None:
            return super()._training_condition(given)
        text, hide = given
        return self.network.prepare(*with_null(text.tokens, text.mask, self.null, hide))

    def check_request(self, request: Request, first_step: int = 0) -> None:
        """Refuse what this paper or its condition cannot do."""
        super().check_request(request, first_step)
        kind = self.config.model.condition
        if request.negative is not None and kind != "text":
            raise ValueError(f"a negative prompt needs model.condition=text, not {kind}")

    def _null_condition(self, negative: Sequence[str] | None = None) -> Side:
        """The other side of the guidance, of all images at once or a caption for each."""
        if negative is not None:
            return self._condition(negative)
        if self.labelled:
            return self._condition([], [self.config.num_classes])
        if self.null is not None:
            return self.network.prepare(self.null[None])
        return self._condition([""])

    def guidance_of(self, settings: Any) -> Guidance:
        """The guidance of the settings; a model without a condition has none."""
        none = self.config.model.condition == "none"
        return Guidance() if none else improved.guidance_of(settings)

    def _steps(self, settings: Any, tokens: int) -> list[Any]:
        """The network calls that the settings ask for."""
        return improved.make_calls(self.schedule, settings, tokens)

    def _beginning(
        self, uniforms: Tensor, start: Tensor | None, mask: Tensor | None, settings: Any, t: int
    ) -> Tensor:
        """Where a fixed number of masks opens per call, pure noise is masks alone, as released."""
        if settings.order != "diffusion" and settings.first_step == 0:
            uniforms = torch.ones_like(uniforms)
        return super()._beginning(uniforms, start, mask, settings, t)

    def _loop(self, predict: Any, steps: list[Any], settings: Any, **arguments: Any) -> Tensor:
        """Run the sampling loop."""
        arguments |= {"order": settings.order, "purity_weight": settings.purity_weight}
        arguments |= {"raw": settings.purity == "raw"}
        if settings.order != "diffusion" and settings.reveal == "constant":
            arguments |= {"shares": self.schedule.mask[:-1]}
        return improved.sample(
            predict, self.network.head, calls=steps, truncation=settings.truncation, **arguments
        )


def with_null(
    tokens: Tensor, mask: Tensor | None, null: Tensor, hide: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Put the learned null text in the place of the conditions of hide [B].

    Tokens [B, L, D] with the mask [B, L] of real ones (None: all) and null [M, D] give
    [B, max(L, M), D] and its mask.
    """
    length = max(tokens.shape[1], len(null))
    if mask is None and tokens.shape[1] != len(null):
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    padded = nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
    other = nn.functional.pad(null, (0, 0, 0, length - len(null))).to(padded.dtype)
    # torch.where, so that the null has a gradient in every batch (DDP waits for it)
    shown = torch.where(hide[:, None, None], other, padded)
    if mask is None:
        return shown, None
    mask = nn.functional.pad(mask, (0, length - mask.shape[1]), value=False)
    real = torch.arange(length, device=mask.device) < len(null)
    return shown, torch.where(hide[:, None], real, mask)
