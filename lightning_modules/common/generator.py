"""The base class of the generators: everything around a paper's loss and sampling loop."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_modules.common.blocks import shard, whole
from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.ema import WeightAverage
from lightning_modules.common.interfaces import Geometry
from lightning_modules.common.optim import adamw, lr_factor
from lightning_modules.common.places import Compiler, Masked, Picked
from lightning_modules.common.request import OnCall, OnStep, Request
from lightning_modules.common.settings import build, plain
from lightning_modules.common.text import TEXT_ENCODERS, Condition, FrozenEncoder, KnownStates
from lightning_modules.common.training import SeededModule


class GeneratorModule(SeededModule):
    """Trains on tokens or images with captions, samples images for prompts.

    A subclass names its settings (`config_class`, with sections text, optim and sampling among
    others), builds its networks in `__init__` and gives `loss` and `sample_tokens`. The first stage
    and frozen text encoders are attached, not owned: they are in no state dict, no optimizer, no
    average.

    Args:
        config: plain containers: the sections of `config_class`, and beside them `seed`, `grid`
            [h, w] of the token map, `num_codes` and whatever the experiment wants to keep.

    Raises:
        ValueError: settings that do not fit each other or the first stage.
    """

    config_class: ClassVar[type]
    ABILITIES: ClassVar[frozenset[str]] = frozenset()
    """Fields of a `Request` that `sample_tokens` honours, besides prompts and seeds."""
    ADOPTS: ClassVar[tuple[str, ...]] = ()
    """Papers whose checkpoints this one samples too, by `adopt`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        fields = {f.name for f in dataclasses.fields(self.config_class)}
        own = {k: v for k, v in config.items() if k in fields}
        self.config: Any = build(self.config_class, own)
        self.geometry = Geometry.from_config(config)
        self.config.check_fit(self.geometry)
        self.grid: tuple[int, int] = self.geometry.grid
        self.optim: OptimConfig = self.config.optim
        text: TextConfig = self.config.text
        encoder = TEXT_ENCODERS[text.name](text)
        self.text_encoder = encoder if isinstance(encoder, nn.Module) else None
        self._attached: dict[str, Any] = {"first_stage": None, "text": encoder}
        self.average: WeightAverage | None = None
        # makes the steps of sampling fast, `torch.compile` for one
        self.compiler: Compiler | None = None
        self.calls: Tensor | None = None
        self.on_call: OnCall | None = None
        """Hears of every network call of `sample_tokens`; see `heard_by`."""

    @classmethod
    def assemble(
        cls,
        state: Mapping[str, Tensor],
        config: dict[str, Any],
        parts: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]],
        what: str,
    ) -> Self:
        """Build the generator of a checkpoint from its tensors, settings and further parts by name.

        Raises:
            ValueError: tensors that do not fit, or a part that this paper has not, in file `what`.
        """
        if parts:
            raise ValueError(f"{what}: {cls.__name__} has no part {next(iter(parts))}")
        module = cls(config)
        load_strict(module, state, what)
        return module

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Build this paper's generator from a checkpoint of one that it `ADOPTS`."""
        raise ValueError(f"{cls.__name__} takes no checkpoint of {config.get('paper')}")

    @property
    def first_stage(self) -> Any:
        """What turns images into the tokens or latents that this generator models, and back.

        It has `factor`, `encode` and `decode`; a tokenizer `num_codes` and `codebook()` besides; an
        autoencoder `channels`, `moments`, `sample_posterior` and `normalise`.
        """
        if self._attached["first_stage"] is None:
            raise ValueError("this generator has no first stage yet: call attach(first_stage)")
        return self._attached["first_stage"]

    def attach(self, first_stage: Any, **others: Any) -> Self:
        """Give the generator its (frozen) first stage, and those of `further_first_stages`."""
        self._attached |= {"first_stage": first_stage, **others}
        return self

    def further_first_stages(self) -> dict[str, dict[str, str]]:
        """Return name -> {"file", "sha256"} of the first stages that `attach` takes besides."""
        return {}

    @property
    def final_first_stage(self) -> Any:
        """What the finished pictures are decoded by."""
        return self.first_stage

    def part(self, name: str) -> "GeneratorModule":
        """Return a part that draws pictures of its own; the empty name is the generator itself."""
        if name:
            raise ValueError(f"{type(self).__name__} has no part {name}")
        return self

    @property
    def pixels_per_token(self) -> int:
        """Pixels of a picture per token of `sample_tokens` along a side."""
        return self.first_stage.factor

    @property
    def pixels_per_cell(self) -> int:
        """Pixels of a picture per cell of an edit's mask along a side."""
        return self.first_stage.factor

    @property
    def size_unit(self) -> int:
        """Pixels that a side of a picture must be a multiple of."""
        return self.pixels_per_token

    @property
    @abstractmethod
    def text_widths(self) -> tuple[int, int]:
        """Widths of the vectors that it reads of a caption: per token, and pooled; 0 for none."""

    @property
    def fixed_size(self) -> bool:
        """Whether pictures of another size than the trained one are made window by window."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether it is conditioned on labels."""
        return False

    def encode_text(self, captions: Sequence[str]) -> Condition:
        """Encode captions on this module's device, in full precision whatever the trainer's."""
        with self.full_precision():
            return self._attached["text"](list(captions), self.device)

    def full_precision(self) -> AbstractContextManager:
        """Leave the trainer's lower precision, which the meta device does not have."""
        if self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def share_text(self, other: "GeneratorModule") -> None:
        """Take the text encoder that another generator holds."""
        self._attached["text"] = other._attached["text"]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Speak up where prompts cannot be understood, before any work."""
        self.encode_text(prompts[:1])

    def encode_images(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to pooled image vectors of the text encoder's CLIP."""
        if not hasattr(self._attached["text"], "encode_images"):
            raise ValueError(
                f"text.name={self.config.text.name} has no image vectors; a variation starts from "
                "the image's tokens instead"
            )
        with self.full_precision():
            return self._attached["text"].encode_images(images)

    def image_condition(self, images: Tensor) -> Tensor | None:
        """Return what a variation is conditioned on besides its tokens; None where nothing."""
        return None

    def begin(self, first_stage: str) -> bool:
        """Take over weights to start from, on a first stage of this sha256; False: no training."""
        return True

    def settings(self, changes: Mapping[str, Any]) -> Any:
        """Return the checkpoint's sampling settings with some replaced, also inside sections."""
        own = plain(self.config.sampling)
        for name, value in changes.items():
            nested = isinstance(value, Mapping) and isinstance(own.get(name), dict)
            own[name] = {**own[name], **value} if nested else value
        return build(type(self.config.sampling), own)

    def check_sampling(self, settings: Any) -> None:
        """Speak up where these networks cannot be sampled by these settings, before any work."""
        if hasattr(self.config, "check_sampling"):
            self.config.check_sampling(settings, self.geometry)

    def check_request(self, request: Request, first_step: int = 0) -> None:
        """Refuse an ability that this paper lacks, and a mask or a variation without a picture."""
        lacks = sorted(request.asked() - self.ABILITIES)
        if lacks:
            raise ValueError(f"this checkpoint's paper cannot take `{lacks[0]}`")
        for what, asked in (
            ("a mask", request.mask is not None),
            ("an edit without a mask", request.rewrite),
            ("sampling.first_step", first_step > 0),
        ):
            if asked and request.start is None:
                raise ValueError(f"{what} needs a picture to start from (start)")

    def counting(
        self, predict: Callable[..., Tensor], count: int, places: Picked | None = None
    ) -> Callable[..., Tensor]:
        """The same function, with a network call counted for each of `count` pictures.

        Where its last argument says which places are asked about, `on_call` hears that. Masked
        places count for themselves.
        """
        if isinstance(places, Masked):
            return predict

        def counted(*arguments: Any) -> Tensor:
            self.count_calls(torch.ones(count, dtype=torch.int64))
            rows = predict(*arguments)
            if self.on_call is not None:
                last = arguments[-1]
                keep = last if isinstance(last, Tensor) and last.dtype == torch.bool else None
                self.on_call(torch.arange(count, device=rows.device), keep, rows)
            return rows

        return counted

    @contextmanager
    def heard_by(self, on_call: OnCall) -> Iterator[None]:
        """Let someone hear of every network call, as a trace does."""
        self.on_call = on_call
        try:
            yield
        finally:
            self.on_call = None

    def count_calls(self, calls: Tensor) -> None:
        """Add network calls [B] to those of the pictures that are being drawn."""
        self.calls = calls.cpu() if self.calls is None else self.calls + calls.cpu()

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and further scalars to log; `generator` draws all noise."""
        return self.compute_loss(**self.inputs(batch, generator))

    @abstractmethod
    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return what the loss is computed from: tokens, encoded captions, and all noise."""

    @abstractmethod
    def compute_loss(self, *args: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of such inputs and further scalars to log.

        It is one graph of fixed shapes: no text, no draw and no look at a number stands in it.
        """

    def places(self) -> Picked:
        """How places are computed: picked on a CPU, where looking waits for nothing, else masked.

        Who hears of network calls hears of picked places.
        """
        if torch.compiler.is_compiling():
            return Masked(self.device)
        fixed = self.device.type == "cuda" or self.compiler is not None
        return Masked(self.device, self.compiler) if fixed and self.on_call is None else Picked()

    @abstractmethod
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw tokens [B, h, w] (or latents [B, C, h, w]); row i depends on prompt and seed i.

        Afterwards `calls` [B] int64 says how often the network was called for each picture, guided
        or not.

        Args:
            request: what is asked.
            settings: the paper's sampling settings; None takes the checkpoint's.
            on_step: called with step, input and result.

        Raises:
            ValueError: something that this paper or these settings cannot do.
        """

    @torch.no_grad()
    def sample(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1]; arguments as in `sample_tokens`, start an image."""
        if request.start is not None:
            start = self.first_stage.encode(request.start.to(self.device))
            request = dataclasses.replace(request, start=start)
        return self.first_stage.decode(self.sample_tokens(request, settings, on_step))

    def batch_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return the batch's tokens [B, h, w], encoding its images where no cache gave them."""
        if "tokens" in batch:
            return batch["tokens"]
        # bf16 would flip the nearest codes of a cache that was made in full precision
        with torch.no_grad(), self.full_precision():
            return self.first_stage.encode(batch["image"])

    @contextmanager
    def _knowing(self, batch: dict[str, Any]) -> Iterator[None]:
        """Let the text encoder take the states that a batch brings of its captions."""
        encoder = self._attached["text"]
        if "text" in batch and isinstance(encoder, FrozenEncoder):
            encoder.known = KnownStates(batch["caption"], **batch["text"])
            try:
                yield
            finally:
                encoder.known = None
        else:
            yield

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Log and return the loss."""
        with self._knowing(batch):
            loss, scalars = self.loss(batch, self.generator)
        self.log_scalars("train", {"loss": loss, **scalars}, batch["caption"])
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss under noise that is the same at every validation."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        loss, scalars = self.loss(batch, generator)
        self.log_scalars("val", {"loss": loss, **scalars}, batch["caption"])

    def configure_model(self) -> None:
        """Spread the parameters over the devices, where the trainer's strategy has a mesh."""
        if self.device_mesh is not None:
            mixed = self.trainer.precision == "bf16-mixed"
            shard(
                self,
                self.device_mesh["data_parallel"],
                ("training_step", "validation_step"),
                torch.bfloat16 if mixed else None,
            )

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up over everything trainable."""
        optimizer = adamw(self.optim, [self], precision=str(self.trainer.precision))
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(self.optim, total))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the global norm to optim.clip."""
        if self.optim.clip > 0:
            self.clip_gradients(optimizer, self.optim.clip, "norm")

    def on_fit_start(self) -> None:
        """Move what is attached here; start the average unless a checkpoint brought one."""
        for part in self._attached.values():
            if isinstance(part, nn.Module):
                part.to(self.device)
        if self.optim.ema > 0 and self.average is None:
            self.average = WeightAverage(self, self.optim.ema)

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average once per optimizer step."""
        if self.average is not None and self.trainer.global_step > self.average.updates:
            self.average.update(self)

    def _exchange(self) -> None:
        if self.average is not None and not self.trainer.sanity_checking:
            self.average.exchange(self)

    def on_validation_start(self) -> None:
        """Validate the weights that are exported: the average, where there is one."""
        self._exchange()

    def on_validation_end(self) -> None:
        """Give the trained weights back."""
        self._exchange()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the average under its own key."""
        if self.average is not None:
            shadow = whole(self.average.shadow, self.global_rank == 0)
            checkpoint["ema"] = {**self.average.state_dict(), "shadow": shadow}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average back."""
        if "ema" in checkpoint:
            self.average = WeightAverage(self, self.optim.ema)
            self.average.load_state_dict(checkpoint["ema"])

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights to sample with (the average where there is one) and the settings.

        Where they are sharded, all ranks call this together.
        """
        state = self.average.shadow if self.average is not None else self.state_dict()
        return whole(state), dict(self.hparams["config"])
