"""One training: a recipe that builds a module, what it learns from, and how long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data.files import file_hash
from data.view import ShardList
from experiments.pipeline.data import PictureSource, Shards
from experiments.pipeline.encode import Cached, Encode
from experiments.pipeline.loop import Loop, Monitor
from experiments.pipeline.stage import (
    UNKEYED,
    FileStage,
    Folders,
    Log,
    Machine,
    plain_paths,
)
from lightning_modules.common.interfaces import Geometry


@dataclass(frozen=True)
class Recipe:
    """What is trained; its fields are part of the stage's key."""

    FILE: ClassVar[str] = "checkpoint.safetensors"
    ADVERSARIAL: ClassVar[bool] = False
    """Whether it trains against a discriminator, by hand."""

    def note(self) -> str:
        """Say what a reader must know besides the settings, where there is anything."""
        return ""

    def maker(self, inputs: Folders, seed: int) -> Callable[[], Any]:
        """Load what the module needs, and return what makes it: first weights are all that draws.

        What is loaded draws too, by the making of its own networks, which are filled afterwards.
        """
        raise NotImplementedError

    def blank(self, geometry: Geometry | None) -> Any:
        """Make the module on torch's meta device, on a first stage of this grid.

        It has shapes and no numbers, and takes neither memory nor files.
        """
        raise NotImplementedError

    def begin(self, module: Any, inputs: Folders) -> bool:
        """Take over weights to start from; False where nothing is to be trained."""
        return True

    def export(self, module: Any, inputs: Folders) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors and the plain settings of the file that is kept."""
        return module.export()


@dataclass(frozen=True)
class FirstStageRecipe(Recipe):
    """A tokenizer or an autoencoder."""

    FILE: ClassVar[str] = "first_stage.safetensors"
    ADVERSARIAL: ClassVar[bool] = True

    paper: str
    settings: Mapping[str, Any]
    """Its sections; a Path where a setting names a file."""

    def note(self) -> str:
        """Say that the perceptual term is off, where it is for want of weights."""
        objective = self.settings["objective"]
        off = objective["perceptual_weight"] and objective["lpips_path"] is None
        return "perceptual term off: objective.lpips_path names no LPIPS weights" if off else ""

    def maker(self, inputs: Folders, seed: int) -> Callable[[], Any]:
        """Return what makes the module."""
        from lightning_modules.registry import FIRST_STAGES

        config = {"seed": seed, **plain_paths(self.settings)}
        return lambda: FIRST_STAGES[self.paper](config)

    def blank(self, geometry: Geometry | None) -> Any:
        """Make the module without numbers."""
        return blank(self.maker(Folders(Path()), 0))


@dataclass(frozen=True)
class GeneratorRecipe(Recipe):
    """A paper's generator on a first stage."""

    paper: str
    settings: Mapping[str, Any]
    """The paper's sections that training depends on."""
    first_stage: FileStage
    resolution: int
    """Width and height of the pictures."""

    def maker(self, inputs: Folders, seed: int) -> Callable[[], Any]:
        """Load the first stage, and return what makes the module."""
        from lightning_modules.registry import GENERATORS

        first, geometry = attachable(self.first_stage, self.resolution, inputs)
        config = {"paper": self.paper, "seed": seed, **geometry, **plain_paths(self.settings)}
        return lambda: GENERATORS[self.paper](config).attach(first)

    def blank(self, geometry: Geometry | None) -> Any:
        """Make the module without numbers."""
        from lightning_modules.registry import GENERATORS

        assert geometry is not None
        config = {"paper": self.paper, **described(geometry), **plain_paths(self.settings)}
        return blank(lambda: GENERATORS[self.paper](config))

    def begin(self, module: Any, inputs: Folders) -> bool:
        """Start from another checkpoint, where one is named."""
        return module.begin(file_hash(self.first_stage.file(inputs)))

    def export(self, module: Any, inputs: Folders) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the weights to sample with, and the settings with the first stage's hash."""
        state, config = module.export()
        file = self.first_stage.file(inputs)
        return state, {**config, "first_stage": {"sha256": file_hash(file)}}


@dataclass(frozen=True, eq=False)
class Train(FileStage):
    """One Lightning training, by all ranks."""

    NAME = "{what}"
    VERSION = 2
    RANKS: ClassVar[Any] = "all"

    what: str
    """Name of what is trained."""
    recipe: Recipe
    source: Encode | Cached | PictureSource
    loop: Loop
    seed: int
    """Of initial weights, order of the samples, and noise."""
    val: Shards | None = field(default=None, metadata=UNKEYED)
    """What the validation loss is watched on; changes no weight."""
    monitor: Monitor = field(default=Monitor(), metadata=UNKEYED)
    shuffle_buffer: int = 1000
    """Training samples of all devices together that are shuffled at a time."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Train, and write the weights that are used from here on."""
        from lightning import seed_everything

        from experiments.pipeline.fit import fit
        from experiments.pipeline.ranks import is_leader
        from lightning_modules.common.checkpoint import save_weights

        recipe = self.recipe
        if recipe.note():
            log.note(recipe.note())
        make = recipe.maker(inputs, self.seed)
        seed_everything(self.seed, verbose=False)
        module = make()
        data = self._data(inputs, machine)
        if recipe.begin(module, inputs):
            fit(
                module,
                data,
                self.loop,
                folder,
                what=self.what,
                machine=machine,
                log=log,
                monitor=self.monitor,
                adversarial=recipe.ADVERSARIAL,
            )
        weights = recipe.export(module, inputs)  # by all ranks, which may hold parts of them
        if is_leader():
            save_weights(folder / recipe.FILE, *weights)
        skipped = {}
        if isinstance(self.source, PictureSource) and data.left_out.counts:
            log.note(data.left_out.told("train, over all passes"))
            skipped = data.left_out.found()
        return {"parameters": sum(p.numel() for p in module.parameters()), **skipped}

    def _data(self, inputs: Folders, machine: Machine) -> Any:
        from data.tokens import TokenData
        from data.view import Order
        from data.webdata import WebData

        source, loop = self.source, self.loop
        shared = {
            "batch_size": loop.batch_size,
            "seed": self.seed,
            "epoch_batches": loop.length,
        }
        web = WebData(
            ShardList(()) if isinstance(source, Cached) else source.shards.shards(inputs),
            None if self.val is None else self.val.shards(inputs),
            source.view,
            Order(machine.workers, self.shuffle_buffer),
            **shared,
            val_batches=self.monitor.val_batches,
            max_skipped=machine.max_skipped,
        )
        if isinstance(source, PictureSource):
            return web
        return TokenData(
            source.folder_of(inputs),
            **shared,
            shuffle_buffer=self.shuffle_buffer,
            val=web,
            text=source.reads_text,
        )

    def file(self, inputs: Folders) -> Path:
        """Path of the weights."""
        return inputs[self] / self.recipe.FILE


def attachable(stage: FileStage, resolution: int, inputs: Folders) -> tuple[Any, dict[str, Any]]:
    """Return a first stage, and what a generator's plain settings say of it."""
    from lightning_modules.registry import load_first_stage

    first = load_first_stage(stage.file(inputs))
    codes, channels = getattr(first, "num_codes", None), getattr(first, "channels", None)
    geometry = Geometry.of(resolution, first.factor, codes, None if codes else channels)
    return first, described(geometry)


def described(geometry: Geometry) -> dict[str, Any]:
    """Return what a generator's plain settings say of its first stage."""
    return {
        "grid": list(geometry.grid),
        "num_codes": geometry.num_codes,
        "channels": geometry.channels,
    }


def blank(make: Callable[[], Any]) -> Any:
    """Make a module on torch's meta device."""
    import torch

    from lightning_modules.common.meta import Pretend

    with Pretend(), torch.device("meta"):
        return make().to("meta").train()
