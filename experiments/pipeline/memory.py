"""What the trainings of a run take of each device: bytes by kind, without a device or numbers."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.papers.base import RunSettings
from experiments.papers.sections import TrainerConfig
from experiments.pipeline.first_stage import Statistics
from experiments.pipeline.loop import Loop
from experiments.pipeline.plan import Plan
from experiments.pipeline.stage import FileStage, Folders
from experiments.pipeline.train import FirstStageRecipe, Train
from experiments.settings import ConfigError
from lightning_modules.common.interfaces import Geometry

GIB = 2**30
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40}
SPARE = 0.1  # of the memory, which allocators and libraries keep for themselves
LENGTHS = {"clip": 77, "open_clip": 1}  # tokens of a caption, where no setting says them


@dataclass(frozen=True)
class Need:
    """What one training takes of each of its devices; bytes, where nothing else is said."""

    training: str
    parameters: int
    """Number of parameters that are trained, over all devices."""
    weights: int
    gradients: int
    optimizer: int
    average: int
    copies: int
    """DDP's buckets and autocast's copies of weights, or what FSDP has gathered at a time."""
    frozen: int
    """First stage and text encoder, as far as their files are here."""
    activations: int | None
    """What a batch keeps for the way back, at most; None where it is not known."""
    samples: int
    """Samples of the whole training."""
    tokens: int | None
    """Tokens (or latent positions) of them; None of a first stage."""

    @property
    def total(self) -> int:
        """All of them."""
        parts = (self.weights, self.gradients, self.optimizer, self.average, self.copies)
        return sum(parts) + self.frozen + (self.activations or 0)

    def fits(self, memory: int) -> bool:
        """Say whether a device of so many bytes holds it, with a tenth to spare."""
        return self.total <= memory * (1 - SPARE)


def needs(planned: Plan, run: RunSettings) -> list[Need]:
    """Return what each training of a run takes, in order.

    Raises:
        ConfigError: a first stage whose grid cannot be known.
    """
    return [need(stage, run) for stage in planned.stages if isinstance(stage, Train)]


def need(stage: Train, run: RunSettings) -> Need:
    """Return what a training takes on the devices of `trainer`."""
    recipe, loop, trainer = stage.recipe, stage.loop, run.trainer
    first = isinstance(recipe, FirstStageRecipe)
    geometry = None if first else grid_of(run)
    module = recipe.blank(geometry)
    shards = loop.world if trainer.strategy == "fsdp" and not first else 1
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = sum(share(p, shards) for p in module.parameters())
    weights += sum(b.nbytes for b in module.buffers())
    gradients = sum(share(p, shards) for p in trained)
    average = 0
    if not first and module.optim.ema > 0:
        average = sum(share(v, shards) for v in module.state_dict().values())
    activations, cast = (None, 0) if first else kept(module, geometry, loop, trainer, run)
    copies = cast if shards == 1 else gathered(module, loop, trainer)
    if loop.world > 1 and shards == 1:
        copies += sum(p.nbytes for p in trained)  # buckets
    samples = loop.epochs * loop.length * loop.batch_size * loop.world
    return Need(
        training=stage.name,
        parameters=sum(p.numel() for p in trained),
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients + 4 * len(trained),  # two moments, and a step per tensor
        average=average,
        copies=copies,
        frozen=0 if first else frozen(stage, run),
        activations=activations,
        samples=samples,
        tokens=None if first else samples * math.prod(module.grid),
    )


def share(value: Any, shards: int) -> int:
    """Return the bytes that a device holds of a tensor, of which rows are shared out."""
    if shards == 1 or value.ndim == 0:
        return value.nbytes
    return math.ceil(value.shape[0] / shards) * (value.nbytes // max(1, value.shape[0]))


def grid_of(run: RunSettings) -> Geometry:
    """Return the grid of the first stage.

    Raises:
        ConfigError: its file does not say it.
    """
    geometry = getattr(run, "geometry", lambda: None)()
    if geometry is None:
        raise ConfigError(
            f"{run.FIRST_STAGE.section}.ckpt={run.first_stage.ckpt} does not say what grid it "
            "makes; without it nothing can be planned"
        )
    return geometry


def kept(
    module: Any, geometry: Geometry | None, loop: Loop, trainer: TrainerConfig, run: Any
) -> tuple[int, int]:
    """Return the bytes of activations that a batch keeps at most, and of the weights' copies.

    Captions count with the longest length that they may have, a masked token's part as if all
    were masked.
    """
    import torch

    from lightning_modules.common.blocks import keep_blocks
    from lightning_modules.common.meta import (
        BlankFirstStage,
        Pretend,
        blank_condition,
        kept_by,
    )

    assert geometry is not None
    text, (width, pooled) = run.text, module.text_widths
    length = LENGTHS.get(text.name, text.max_length)
    masked = text.name == "bytes" or (text.name in ("byt5", "t5") and text.mask_padding)
    trained = text.name == "bytes"

    def encode(captions: list[str]) -> Any:
        return blank_condition(len(captions), length, width, pooled, masked, trained)

    module.encode_text, module.encode_images = encode, lambda images: encode(images).pooled
    first = BlankFirstStage(geometry.factor, geometry.channels)
    others = {"low": first, "base": first} if hasattr(module, "low_tokens") else {}
    module.attach(first, **others)
    count = loop.batch_size
    numbers: dict[str, Any] = {"device": "meta", "dtype": torch.int64}
    batch = {
        "caption": ["a caption"] * count,
        "image": torch.empty(count, 3, *(n * first.factor for n in module.grid), device="meta"),
        "label": torch.empty(count, **numbers),
        "tokens": torch.empty(count, *module.grid, **numbers),
    }
    if geometry.channels:
        latents = (count, 2 * geometry.channels, *module.grid)
        batch["moments"] = torch.empty(latents, device="meta")
    if others:
        batch["low"] = torch.empty(count, *module.low_grid, **numbers)
    again = keep_blocks(module) or trainer.checkpoint_activations
    with Pretend(precision_on(loop, trainer), not on_gpu(trainer)) as pretend:
        found = kept_by(module, lambda: module.loss(batch, torch.Generator()))
    copies = pretend.copies
    return found.bytes(again, copies), sum(copies.values())


def precision_on(loop: Loop, trainer: TrainerConfig) -> str:
    """Return the arithmetic of a training on the kind of device that it asks for."""
    mixed = on_gpu(trainer)
    return {"auto": "bf16-mixed" if mixed else "32-true"}.get(loop.precision, loop.precision)


def on_gpu(trainer: TrainerConfig) -> bool:
    """Say whether a training asks for a GPU."""
    import torch

    there = trainer.accelerator == "auto" and torch.cuda.is_available()
    return there or trainer.accelerator == "cuda"


def gathered(module: Any, loop: Loop, trainer: TrainerConfig) -> int:
    """Return the bytes that FSDP has gathered at most.

    These are what lies in no block, with its gradients, and two blocks (one of them ahead of its
    time), one with its gradients.
    """
    from lightning_modules.common.blocks import blocks_of

    inside = {p: None for block in blocks_of(module) for p in block.parameters()}
    outside = sum(p.nbytes for p in module.parameters() if p not in inside)
    largest = max((sum(p.nbytes for p in b.parameters()) for b in blocks_of(module)), default=0)
    block = largest // 2 if precision_on(loop, trainer) == "bf16-mixed" else largest
    return 2 * outside + 2 * block + block


def frozen(stage: Train, run: Any) -> int:
    """Return the bytes of what a generator works with and does not train, as far as it is here."""
    inputs = {part for part in stage.inputs if isinstance(part, FileStage)}
    return sum(weights_of(part, run) for part in inputs) + sum(
        size_of(path) for path in text_files(run) if path.exists()
    )


def weights_of(stage: FileStage, run: Any) -> int:
    """Return the bytes of the weights that a stage gives."""
    if isinstance(stage, Statistics):
        return weights_of(stage.autoencoder, run)
    if not isinstance(stage, Train):
        return size_of(stage.file(Folders(Path())))
    geometry = None if isinstance(stage.recipe, FirstStageRecipe) else grid_of(run)
    return sum(p.nbytes for p in stage.recipe.blank(geometry).parameters())


def text_files(run: Any) -> list[Path]:
    """List what holds the weights of the frozen text encoder, here or not."""
    text = run.text
    paths = [text.path] if text.name in ("byt5", "t5", "clip") else []
    if text.name in ("byt5", "open_clip") and text.clip:
        paths.append(text.clip_pretrained)
    return [Path(path) for path in paths]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the weights in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    files = [p for kind in ("safetensors", "bin") for p in path.glob(f"*.{kind}")]
    return sum(p.stat().st_size for p in files)


def parse_bytes(words: str) -> int:
    """Read `80GiB` or `24GB`.

    Raises:
        ConfigError: another form.
    """
    for unit, size in UNITS.items():
        number = words.strip().removesuffix(unit).strip()
        if words.strip().endswith(unit) and number.replace(".", "", 1).isdigit():
            return int(float(number) * size)
    raise ConfigError(f"--memory {words}: write a number and a unit, such as 80GiB or 24GB")


def own_memory(accelerator: str) -> int | None:
    """Return the bytes of this machine's devices; None where there is no such device here."""
    import torch

    if accelerator in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    if accelerator == "cuda":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def remedy(planned: Plan, run: RunSettings, memory: int) -> str:
    """Name the settings, of those that change no result, under which every training fits."""
    world = run.world
    ways: list[dict[str, Any]] = [{"checkpoint_activations": True}]
    if world > 1:
        ways += [{"strategy": "fsdp"}, {"strategy": "fsdp", "checkpoint_activations": True}]
    for way in ways:
        trainer = dataclasses.replace(run.trainer, **way)
        if all(n.fits(memory) for n in needs(planned, dataclasses.replace(run, trainer=trainer))):
            words = [f"trainer.{k}={str(v).lower()}" for k, v in way.items()]
            return f"with {' '.join(words)} it does"
    more = "smaller trainer.batch_size with a larger trainer.accumulate, or more devices"
    return f"take a {more}"
