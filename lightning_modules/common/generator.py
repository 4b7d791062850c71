"""The base class of the generators: everything around a paper's loss and sampling loop."""

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.ema import WeightAverage
from lightning_modules.common.interfaces import Tokenizer
from lightning_modules.common.optim import adamw, lr_factor
from lightning_modules.common.seeding import mix_seed
from lightning_modules.common.settings import build
from lightning_modules.common.text import TEXT_ENCODERS, Condition


class GeneratorModule(LightningModule):
    """Trains on tokens or images with captions, samples images for prompts.

    A subclass names its settings (`config_class`, with sections text and optim among others),
    builds its networks in `__init__` and gives `loss` and `sample`. The tokenizer and frozen text
    encoders are attached, not owned: they are in no state dict, no optimizer, no average.

    Args:
        config: plain containers: the sections of `config_class`, and beside them `seed`, `grid`
            [h, w] of the token map, `num_codes` and whatever the experiment wants to keep.
    """

    config_class: type

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        fields = {f.name for f in dataclasses.fields(self.config_class)}
        self.config: Any = build(
            self.config_class, {k: v for k, v in config.items() if k in fields}
        )
        self.seed: int = config.get("seed", 0)
        self.grid: tuple[int, int] = tuple(config["grid"])
        self.optim: OptimConfig = self.config.optim
        text: TextConfig = self.config.text
        encoder = TEXT_ENCODERS[text.name](text)
        self.text_encoder = encoder if isinstance(encoder, nn.Module) else None
        self._attached: dict[str, Any] = {"tokenizer": None, "text": encoder}
        self.average: WeightAverage | None = None
        self.generator = torch.Generator()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that turns images into the tokens this generator models."""
        if self._attached["tokenizer"] is None:
            raise ValueError("this generator has no tokenizer yet: call attach(tokenizer)")
        return self._attached["tokenizer"]

    def attach(self, tokenizer: Tokenizer) -> "GeneratorModule":
        """Give the generator its (frozen) tokenizer."""
        self._attached["tokenizer"] = tokenizer
        return self

    @property
    def factor(self) -> int:
        """Pixels of a picture per token of `sample_tokens` along a side."""
        return self.tokenizer.factor

    @property
    def mask_factor(self) -> int:
        """Pixels of a picture per cell of an edit's mask along a side."""
        return self.tokenizer.factor

    @property
    def fixed_size(self) -> bool:
        """Whether pictures of another size than the trained one are made window by window."""
        return False

    def encode_text(self, captions: list[str]) -> Condition:
        """Encode captions on this module's device, in full precision whatever the trainer's."""
        with torch.autocast(self.device.type, enabled=False):
            return self._attached["text"](captions, self.device)

    def check_prompts(self, prompts: list[str]) -> None:
        """Speak up where prompts cannot be understood, before any work.

        Raises:
            ValueError, OSError, RuntimeError: whatever the text encoder has to say.
        """
        self.encode_text(prompts[:1])

    def encode_images(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to pooled image vectors of the text encoder's CLIP.

        Raises:
            ValueError: the text encoder of this generator has no image branch.
        """
        if not hasattr(self._attached["text"], "encode_images"):
            raise ValueError(
                f"text.name={self.config.text.name} has no image vectors; a variation starts from "
                "the image's tokens instead"
            )
        with torch.autocast(self.device.type, enabled=False):
            return self._attached["text"].encode_images(images)

    def begin(self, tokenizer: str) -> bool:
        """Take over weights to start a training from; False where nothing is to be trained.

        Args:
            tokenizer: sha256 of the tokenizer's file.
        """
        return True

    @abstractmethod
    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and further scalars to log; all chance is `generator`'s."""

    @abstractmethod
    def sample_tokens(self, prompts: list[str], *, seeds: list[int], **sampling: Any) -> Tensor:
        """Draw tokens [B, h, w]; `start`, where a paper has it, holds tokens [B, h, w]."""

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        *,
        seeds: list[int],
        start: Tensor | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1]; image i depends on prompt i and seed i alone.

        Args:
            prompts: B captions.
            seeds: B seeds.
            start: [B, 3, H, W] images in [-1, 1] that an edit or a variation starts from.
            **sampling: what the paper's `sample_tokens` takes.
        """
        if start is not None:
            sampling["start"] = self.tokenizer.encode(start.to(self.device))
        return self.tokenizer.decode(self.sample_tokens(prompts, seeds=seeds, **sampling))

    def pictures(
        self, prompts: list[str], *, seeds: list[int], **sampling: Any
    ) -> dict[str, Tensor]:
        """Draw the pictures of every stage by its name, the final ones last and as `sample` does.

        Args:
            prompts: B captions.
            seeds: B seeds.
            **sampling: what `sample` takes.
        """
        return {"": self.sample(prompts, seeds=seeds, **sampling)}

    def tokens_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the batch's tokens [B, h, w], encoding its images where no cache gave them."""
        if "tokens" in batch:
            return batch["tokens"]
        # bf16 would flip the nearest codes of a cache that was made in full precision
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(batch["image"])

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed all chance of an epoch by (seed, epoch, rank): resuming at its border is exact.

        This waits for the first batch because a data loader's iterator, which is made before or
        after the epoch's start depending on resuming, may draw from the global generator.
        """
        if batch_idx == 0:
            seed = mix_seed(self.seed, self.current_epoch, self.global_rank)
            torch.manual_seed(seed)
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Log and return the loss."""
        loss, scalars = self.loss(batch, self.generator)
        values = {"train/loss": loss, **{f"train/{k}": v for k, v in scalars.items()}}
        self.log_dict(values, batch_size=len(batch["caption"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss under chance that is the same at every validation."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        loss, scalars = self.loss(batch, generator)
        values = {"val/loss": loss, **{f"val/{k}": v for k, v in scalars.items()}}
        self.log_dict(values, batch_size=len(batch["caption"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up over everything trainable."""
        optimizer = adamw(self.optim, [self])
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(self.optim, total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the global norm to optim.clip."""
        if self.optim.clip > 0:
            self.clip_gradients(optimizer, self.optim.clip, "norm")

    def on_fit_start(self) -> None:
        """Move the tokenizer here; start the average unless a checkpoint brought one."""
        if isinstance(self._attached["tokenizer"], nn.Module):
            self._attached["tokenizer"].to(self.device)
        if self.optim.ema > 0 and self.average is None:
            self.average = WeightAverage(self, self.optim.ema)

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average once per optimizer step."""
        if self.average is not None and self.trainer.global_step > self.average.updates:
            self.average.update(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the average under its own key."""
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average back."""
        if "ema" in checkpoint:
            self.average = WeightAverage(self, self.optim.ema)
            self.average.load_state_dict(checkpoint["ema"])

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights to sample with (the average where there is one) and the settings."""
        state = self.average.shadow if self.average is not None else self.state_dict()
        return dict(state), dict(self.hparams["config"])
