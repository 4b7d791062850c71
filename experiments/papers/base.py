"""What every paper's run has: its settings, its first stage, and how its stages are put together.

A paper is a dataclass of settings with three things of its own: PRESETS, `check`, and, where the
usual chain of cache, training and sampling is not all, `drawing`. Nothing outside asks which it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.cached import INDEX, differences, read_index
from data.config import DataConfig
from data.files import file_hash
from experiments.papers.first_stage import FirstStageKind, measures_of, shipped_folder, tokens_of
from experiments.papers.sections import MAX_SEED, EvalConfig, TrainerConfig
from experiments.pipeline.data import Captions, Data, PictureSource
from experiments.pipeline.encode import Cached, Encode, EncodedView
from experiments.pipeline.first_stage import MEASURED, Given, Statistics
from experiments.pipeline.generator import Generator
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import FileStage, Machine, plain_content
from experiments.pipeline.train import FirstStageRecipe, GeneratorRecipe, Train
from experiments.settings import ConfigError, resolved
from lightning_modules.common.checks import within
from lightning_modules.common.interfaces import Geometry

ROOT = Path(__file__).parents[2]
LPIPS_SCENES = ROOT / "eval" / "weights" / "lpips-32px-2objects.safetensors"


@dataclass(frozen=True)
class Materials:
    """What a run builds its stages of."""

    paper: str
    data: Data
    first_stage: FileStage


Draw = Callable[[Captions, int, int], dict[str, Sample]]
"""Captions, seed of the first and number of traces -> prefix of scores -> their pictures."""


@dataclass(frozen=True)
class Drawing:
    """What a trained paper draws."""

    generator: Generator
    """The generator with all its parts."""
    draw: Draw
    sampling: Mapping[str, Any]
    """Settings of sampling, all that its pictures depend on."""
    shown: str = "eval"
    """Prefix of the pictures that a person is shown."""
    resolution: int | None = None
    """Width and height of the final pictures, where they are not the data's."""


@dataclass
class RunSettings:
    """What every paper's run has."""

    READS: ClassVar[str] = "nothing yet"  # lines of help: what files of others can be read
    PARTS: ClassVar[tuple[str, ...]] = ()  # further weights that a checkpoint can work with
    FIRST_STAGE: ClassVar[FirstStageKind]
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {}  # section -> name -> its dataclass

    seed: int = 0
    """Seed of initial weights, data order and noise."""
    logger: Literal["wandb", "csv"] = "wandb"
    """Where curves go; wandb writes offline where there is no key or login."""
    cache: str = "runs/cache"
    """Folder of stage results, shared by all runs."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and on what machine."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is sampled and scored."""

    def check(self) -> None:
        """Check that the sections fit each other.

        Raises:
            ValueError: they do not; the message begins with the setting.
        """
        if self.data.path is not None:
            self.check_cache()
        within(self, 0, MAX_SEED, "seed")
        if self.data.seed > MAX_SEED:
            raise ValueError(f"data.seed must be at most {MAX_SEED}, got {self.data.seed}")
        if self.data.name != "digits":  # which has the samples that it has
            sizes = [("prompts", "val_size"), ("heldout", "heldout_size"), ("edits", "val_size")]
            for name, size in sizes if self.data.name == "scenes" else sizes[:1]:
                wanted, there = getattr(self.eval, name), getattr(self.data, size)
                if wanted > there:
                    raise ValueError(
                        f"eval.{name} must be at most data.{size} ({there}), got {wanted}"
                    )

    def check_cache(self) -> None:
        """Check that the cache of data.path is of these settings.

        Raises:
            ValueError: it is not; names what differs, in the cache and here.
        """
        raise ValueError("data.path holds tokens, and a first stage is trained on pictures")

    def note(self) -> str:
        """Say what the user may not expect of these settings, and which would change it."""
        return ""

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files of this paper.

        Generators: (source, hints) -> Foreign; first stages: (source, hints, aside) -> export.
        """
        raise ValueError("no files of others are known of this paper")

    @classmethod
    def part_reader(cls, name: str) -> Callable[[Path], Any]:
        """Return what reads a foreign file of one of PARTS: (file) -> tensors, settings."""
        raise ValueError(f"this paper has no part {name}")

    @property
    def first_stage(self) -> Any:
        """The section of the first stage, wherever this run keeps it."""
        raise NotImplementedError

    @property
    def world(self) -> int:
        """Processes that train together."""
        return self.trainer.devices * self.trainer.num_nodes

    def machine(self, **more: Any) -> Machine:
        """Return where and how the stages work."""
        where = ("accelerator", "devices", "num_nodes", "strategy")
        names = (*where, "checkpoint_activations", "compile")
        return Machine(
            device=device_of(self.trainer.accelerator),
            batch_size=self.eval.batch_size,
            max_skipped=self.data.max_skipped,
            workers=self.data.workers,
            progress=self.trainer.progress,
            classifiers=Path(self.cache) / "classifiers",
            trainer={name: getattr(self.trainer, name) for name in names},
            **more,
        )

    def source(self, data: Data, resolution: int | None = None) -> PictureSource:
        """Return the training pictures as they are read, without a cache."""
        return PictureSource(data.shards("train", resolution), data.view(resolution))

    def lpips(self) -> Path | None:
        """Return the weights of the first stage's perceptual term; `shipped` are those of scenes.

        Raises:
            ConfigError: there is nothing at that path.
        """
        given = self.first_stage.objective.lpips_path
        if given is None:
            return None
        path = LPIPS_SCENES if given == "shipped" else Path(given)
        if not path.exists():
            raise ConfigError(f"objective.lpips_path: there is no file or folder {path}")
        return path

    def first_stage_file(self) -> Path | None:
        """Return the finished first stage that a run names, None where it is to be trained.

        Raises:
            ConfigError: the file is not there.
        """
        kind, section = self.FIRST_STAGE, self.first_stage
        if section.ckpt is None:
            return None
        folder = ROOT / "lightning_modules" / shipped_folder(kind) / "shipped"
        shipped = folder / f"{section.preset}.safetensors"
        path = shipped if section.ckpt == "shipped" else Path(section.ckpt)
        if not path.is_file():
            if section.ckpt != "shipped":
                raise ConfigError(f"{kind.section}.ckpt: there is no file {path}")
            have = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors")))
            raise ConfigError(
                f"{kind.section}.ckpt: none ships for the preset {section.preset} (shipped: "
                f"{have}); add {kind.section}.ckpt=null to train it"
            )
        return path

    def first_stage_stage(self, data: Data) -> FileStage:
        """Return the stage that names or trains the first stage."""
        kind, section, path = self.FIRST_STAGE, self.first_stage, self.first_stage_file()
        stage: FileStage
        if path is not None:
            stage = Given(path, kind.paper)
        else:
            plain = resolved(section)
            own = {f.name: plain[f.name] for f in dataclasses.fields(kind.config)}
            own["objective"]["lpips_path"] = self.lpips()
            for name in kind.files:
                own[name] = existing(name, own[name])
            recipe = FirstStageRecipe(kind.paper, own)
            stage = Train(
                kind.section,
                recipe,
                self.source(data),
                section.trainer.loop(self.world),
                self.seed,
                data.shards("val"),
                section.trainer.monitor(),
                self.data.shuffle_buffer,
            )
        if not kind.statistics:
            return stage
        shards, view = data.shards("train"), dataclasses.replace(data.view(), flip=False)
        count = MEASURED if shards.size is None else min(MEASURED, shards.size)
        return Statistics(stage, shards, view, count, self.seed)

    def drawing(self, materials: Materials) -> Drawing | None:
        """Return what is drawn by the trained generator; None where there is none."""
        return None


@dataclass
class GeneratorRun(RunSettings):
    """A generator on top of a first stage."""

    LATER: ClassVar[tuple[str, ...]] = ()  # sections that the generator's training does not read
    ASIDE: ClassVar[tuple[str, ...]] = ()  # settings of sampling that no picture of a run reads

    @property
    def first_stage(self) -> Any:
        """The section of the first stage."""
        return getattr(self, self.FIRST_STAGE.section)

    def check(self) -> None:
        """Check that the sections fit each other, and the first stage."""
        super().check()
        self.first_stage.trainer.check_adversarial(f"{self.FIRST_STAGE.section}.trainer")
        geometry = self.geometry()
        if geometry is not None:
            self.check_fit(geometry)
            self.check_sampling(self.sampling, geometry)  # type: ignore[attr-defined]

    def note(self) -> str:
        """Say that the shipped first stage, which bounds what can be drawn, knows scenes alone.

        And of the states of captions in a cache which of them are not there, or not read.
        """
        section, notes = self.FIRST_STAGE.section, []
        if self.data.name != "scenes" and self.first_stage.ckpt == "shipped":
            data = self.data
            own = f"; add {section}.ckpt=null to train one on {data.name}"
            notes.append(
                f"the shipped {section} was trained on scenes, not on {data.name}, which bounds "
                f"how good any picture can be{own if data.path is None else ''}"
            )
        if self.data.path is not None and self.reads_text():
            kept = read_index(self.data.path)["made"]["text"]
            if self.known_text():
                if self.trainer.val_batches:
                    notes.append(
                        "validation loads the text encoder, since the cache holds the states of "
                        "training captions alone; trainer.val_batches=0 leaves it out"
                    )
            elif kept is not None:
                own = self.text.name  # type: ignore[attr-defined]
                notes.append(
                    f"text.name={own} is trained with the generator: the states of "
                    f"{kept['name']} in {self.data.path} are not read"
                )
        return "; ".join(notes)

    def check_cache(self) -> None:
        """Check that the cache was made with this first stage, view and text encoder."""
        section, path = self.FIRST_STAGE.section, self.data.path
        assert path is not None
        index = read_index(path)
        made, wants = index["made"], dataclasses.asdict(self.data.view())
        kept = {name: made.get(name) for name in wants}
        for name, here, there in differences(wants, kept):
            raise ValueError(
                f"data.{name} is {here} here and {there} in the cache {path}; make them equal, or "
                "encode again"
            )
        file = self.first_stage_file()
        if file is None:
            raise ValueError(f"{section}.ckpt must name the {section} that made the cache {path}")
        if made["tokenizer"] not in (file_hash(file), tokens_of(file)):
            other = index["about"].get("tokenizer")
            raise ValueError(
                f"{section}.ckpt: {file} ({file_hash(file)[:12]}) is not the {section} that the "
                f"cache {path} was made with: {other} ({made['tokenizer'][:12]})"
            )
        if self._frozen_text() and made["text"] is not None:
            for name, here, there in differences(self._frozen_text(), made["text"]):
                raise ValueError(
                    f"text.{name} is {here} here and {there} in the states of captions of the "
                    f"cache {path}; make them equal, or encode again"
                )

    def known_text(self) -> bool:
        """Say whether the cache holds the states of captions that the generator reads."""
        assert self.data.path is not None
        return bool(self._frozen_text()) and read_index(self.data.path)["made"]["text"] is not None

    def _frozen_text(self) -> dict[str, Any]:
        """Return what a cache says of the text encoder; nothing where it is trained, or unread."""
        text = self.trained_settings()["text"]
        return {} if text.get("name") in (None, "bytes") else plain_content(text)

    def check_fit(self, first: Geometry) -> None:
        """Check the paper's sections and the first stage; the module's own settings know how."""
        raise NotImplementedError

    def check_sampling(self, sampling: Any, first: Geometry) -> None:
        """Check that the paper can be sampled so; the module's own settings know how, if at all."""

    def geometry(self) -> Geometry | None:
        """Return the grid of the first stage; None where only its file knows."""
        measures = measures_of(self.FIRST_STAGE, self.first_stage)
        return None if measures is None else Geometry.of(self.data.resolution, *measures)

    def reads_text(self) -> bool:
        """Whether captions are what the generator is conditioned on."""
        return True

    def trained_settings(self) -> dict[str, Any]:
        """Return the paper's own sections that its training reads, as plain containers."""
        shared = {f.name for f in dataclasses.fields(GeneratorRun)}
        without = {self.FIRST_STAGE.section, "sampling", *shared, *self.LATER}
        plain = {k: v for k, v in resolved(self).items() if k not in without}
        plain["text"] = used_text(plain["text"]) if self.reads_text() else {}
        return plain

    def sampling_settings(self) -> dict[str, Any]:
        """Return the settings of sampling that pictures of a run depend on, as plain containers."""
        return {k: v for k, v in resolved(self)["sampling"].items() if k not in self.ASIDE}

    def encoded(
        self, data: Data, *views: EncodedView, resolution: int | None = None
    ) -> Encode | Cached | PictureSource:
        """Return what a generator learns from: the cache, or pictures."""
        if not self.data.cache:
            return self.source(data, resolution)
        if self.data.path is not None and resolution is None:
            index = existing("data.path", f"{self.data.path}/{INDEX}")
            assert index is not None
            return Cached(index, data.view(), self.known_text())
        shards, file = data.shards("train", resolution), self.first_stage_file()
        about = {"data": resolved(self.data), "tokenizer": file}
        return Encode(shards, data.view(resolution), views, self.data.crops, about=about)

    def base(self, m: Materials) -> Train:
        """Return the training of the generator."""
        name = "tokens" if not self.FIRST_STAGE.statistics else "moments"
        source = self.encoded(m.data, EncodedView(name, m.first_stage))
        recipe = GeneratorRecipe(
            m.paper, self.trained_settings(), m.first_stage, self.data.resolution
        )
        return Train(
            "train",
            recipe,
            source,
            self.trainer.loop(self.world),
            self.seed,
            m.data.shards("val"),
            self.trainer.monitor(),
            self.data.shuffle_buffer,
        )

    def drawing(self, materials: Materials) -> Drawing:
        """Return what is drawn: one set of pictures, scored as `eval`."""
        first, name = materials.first_stage, self.FIRST_STAGE.section
        generator = Generator(self.base(materials), first, name)
        sampling = self.sampling_settings()

        def draw(captions: Captions, seed: int, traces: int) -> dict[str, Sample]:
            return {"eval": Sample(generator, captions, sampling, seed, traces)}

        return Drawing(generator, draw, sampling)


def existing(name: str, path: str | None) -> Path | None:
    """Return the path that a setting names, None where it names none.

    Raises:
        ConfigError: there is no such file.
    """
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"{name}: there is no file {path}")
    return None if path is None else Path(path)


def used_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a text encoder reads; local files as Paths, known by content."""
    clip = ("clip", "clip_pretrained")
    names = {
        "bytes": ("width", "layers", "buckets", "max_length"),
        "byt5": ("path", "max_length", "mask_padding", *clip),
        "t5": ("path", "max_length", "mask_padding"),
        "open_clip": clip,
        "clip": ("path", "hidden_state", "unit_norm", "projected", "pad_id"),
    }[text["name"]]
    used = {"name": text["name"], **{name: text[name] for name in names}}
    for name in ("path", "clip_pretrained"):
        if used.get(name) and Path(used[name]).exists():
            used[name] = Path(used[name])
    return used


def device_of(wanted: str) -> str:
    """Return where a single process encodes, samples and scores.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise ConfigError(f"trainer.accelerator={wanted}: this machine shows none; use cpu or auto")
    return wanted if wanted != "auto" else next((k for k, v in there.items() if v), "cpu")
