"""What every paper's run has: its settings, its first stage, and how its stages are put together.

A paper is a dataclass of settings with three things of its own: PRESETS, `check`, and, where the
usual chain of cache, training and sampling is not all, `drawing`. Nothing outside asks which it is.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from safetensors import SafetensorError, safe_open

from data.cached import INDEX, differences, read_index
from data.config import DataConfig
from data.files import file_hash
from experiments.pipeline.data import Captions, Data, PictureSource
from experiments.pipeline.encode import Cached, Encode, EncodedView
from experiments.pipeline.first_stage import MEASURED, Given, Statistics
from experiments.pipeline.generator import Generator
from experiments.pipeline.loop import Loop, Monitor
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import FileStage, Machine, plain_content
from experiments.pipeline.train import FirstStageRecipe, GeneratorRecipe, Train
from experiments.settings import ConfigError, resolved
from lightning_modules.common.checks import at_least, require, within
from lightning_modules.common.interfaces import Geometry

MAX_SEED = 2**32 - 1  # of torch's generators, which take no more bits
APART = 1_000_000  # between the seeds of two splits, so that no two pictures share one
ROOT = Path(__file__).parents[2]
LPIPS_SCENES = ROOT / "eval" / "weights" / "lpips-32px-2objects.safetensors"


@dataclass
class TrainerConfig:
    """How long and on what machine a module is trained."""

    max_steps: int = 1000
    """Training batches that each device sees; with accumulate=k there are k batches per update."""
    epoch_steps: int = 250
    """Batches per virtual epoch (at most: epochs are equal); checkpoints stand at its borders."""
    batch_size: int = 64
    """Samples per batch and device."""
    accumulate: int = 1
    """Batches whose gradients are summed before one update."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic; auto is bf16-mixed on CUDA and 32-true elsewhere."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"] = "auto"
    """How devices work together; auto is ddp where there are several; fsdp spreads the weights of a
    generator, its gradients, optimizer and average over them."""
    checkpoint_activations: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations."""
    compile: bool = False
    """Run the blocks of the network through torch.compile in training."""
    keep_every: int = 0
    """Virtual epochs between two weights that are kept beside resume.ckpt, as
    weights-STEP.safetensors for experiments.average; 0 keeps none."""
    val_batches: int = 4
    """Batches of the validation loss after every virtual epoch; 0 for none."""
    log_every: int = 20
    """Batches between two logged points."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Progress display; auto is rich on a terminal and plain lines elsewhere."""

    def __post_init__(self) -> None:
        names = ("max_steps", "epoch_steps", "batch_size", "accumulate", "devices", "num_nodes")
        at_least(self, 1, *names, "log_every")
        at_least(self, 0, "keep_every", "val_batches")
        require(
            self.strategy != "fsdp" or self.precision != "16-mixed",
            "precision must not be 16-mixed with strategy=fsdp; take bf16-mixed or 32-true",
        )

    @property
    def epochs(self) -> tuple[int, int]:
        """Number and length of the virtual epochs; their product is exactly max_steps.

        The length is the largest that divides max_steps and does not exceed epoch_steps; where
        that is less than half of epoch_steps, the whole training is one epoch.
        """
        for length in range(min(self.epoch_steps, self.max_steps), self.epoch_steps // 2, -1):
            if self.max_steps % length == 0:
                return self.max_steps // length, length
        return 1, self.max_steps

    def loop(self, world: int) -> Loop:
        """Return what of this changes the result, for trainings on `world` devices."""
        return Loop(*self.epochs, self.batch_size, self.accumulate, self.precision, world)

    def monitor(self) -> Monitor:
        """Return what is watched."""
        return Monitor(self.val_batches, self.log_every, self.keep_every)

    def check_adversarial(self, section: str) -> None:
        """Refuse what a training with a discriminator cannot do.

        Raises:
            ValueError: in manual optimization Lightning does not accumulate, and would clip scaled
                gradients.
        """
        if self.accumulate != 1:
            raise ValueError(
                f"{section}.accumulate must be 1 for a first stage, got {self.accumulate}"
            )
        if self.precision == "16-mixed":
            raise ValueError(
                f"{section}.precision must not be 16-mixed for a first stage; take bf16-mixed or "
                "32-true"
            )


@dataclass
class EvalConfig:
    """What is sampled and scored."""

    prompts: int = 512
    """Prompts (or images, for a first stage) of the val split that are scored."""
    heldout: int = 256
    """Prompts with attribute combinations that training never shows; 0 where there are none."""
    partial: int = 256
    """Prompts that leave something out, each asked 4 times; 0 where there are none."""
    batch_size: int = 64
    """Pictures that are encoded, made or scored at once; across sizes they agree up to rounding."""
    seed: int = 0
    """Seed of the pictures: prompt i is drawn with seed + i, of the heldout with 1000000 and of the
    partial ones with 2000000 more."""
    bootstrap: int = 1000
    """Resamples behind each score's 95 % interval."""
    grid: int = 64
    """Pictures in samples.png."""
    traces: int = 4
    """Prompts whose tokens are shown step by step in the report."""
    edits: int = 0
    """Scenes of which one half is generated anew for a changed caption, and scored; 0 for none."""
    scores: list[str] = field(default_factory=list)
    """Further scores of the val prompts' pictures, such as fid,kid,clip_score; python -m eval.fid
    --help lists them."""
    features: list[str] = field(default_factory=list)
    """Features of the further scores; empty takes the usual ones of each, scenes the embedded
    classifier."""
    weights: list[str] = field(default_factory=list)
    """NAME=FILE: weights of further features and scores, where they are in no usual cache."""

    def __post_init__(self) -> None:
        at_least(self, 2, "prompts")
        at_least(self, 1, "batch_size", "bootstrap", "grid")
        at_least(self, 0, "heldout", "partial", "traces", "edits")
        within(self, 0, MAX_SEED - 3 * APART, "seed")
        for name in ("features", "weights"):
            if getattr(self, name) and not self.scores:
                raise ValueError(f"{name} must be empty without scores, which they are for")


@dataclass
class FirstStageSection:
    """What stands under a generator: a finished first stage, or the settings that train one."""

    preset: str = "tiny"
    """File of the first stage's own configs that fills the settings of its training."""
    ckpt: str | None = "shipped"
    """shipped (the one that comes with the project), a checkpoint file, or null to train it."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long; the machine's settings are those of the run's own trainer section."""


@dataclass(frozen=True)
class FirstStageKind:
    """A kind of first stage, as papers name it."""

    section: str
    """The section of a generator's run that holds it."""
    paper: str
    """The paper that trains it alone, and the folder of its YAMLs."""
    config: type
    """The settings of its module."""
    presets: Mapping[str, Mapping[str, Any]]
    """Section of these -> name -> settings."""
    measures: Callable[[Any], tuple[int, int | None, int | None]]
    """Settings of the module -> factor, number of codes, channels of latents."""
    files: tuple[str, ...] = ()
    """Settings that name files which its training reads."""
    statistics: bool = False
    """Whether the statistics of its latents are those of a run's own pictures."""


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

        And that states of captions in the cache are not read, where captions are.
        """
        section, notes = self.FIRST_STAGE.section, []
        if self.data.name != "scenes" and self.first_stage.ckpt == "shipped":
            data = self.data
            own = f"; add {section}.ckpt=null to train one on {data.name}"
            notes.append(
                f"the shipped {section} was trained on scenes, not on {data.name}, which bounds "
                f"how good any picture can be{own if data.path is None else ''}"
            )
        if self.data.path is not None and self.reads_text() and not self.known_text():
            kept = read_index(self.data.path)["made"]["text"]
            if kept is not None:
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


def shipped_folder(kind: FirstStageKind) -> str:
    """Return the folder of lightning_modules that holds a kind's module and shipped files."""
    return kind.config.__module__.split(".")[1]


def measures_of(kind: FirstStageKind, section: Any) -> tuple[int, int | None, int | None] | None:
    """Return factor, codes and channels of the first stage of a section; None where unknown."""
    if section.ckpt in (None, "shipped"):
        return kind.measures(section)
    return measures_of_file(kind, Path(section.ckpt))


def measures_of_file(kind: FirstStageKind, path: Path) -> tuple[int, int | None, int | None] | None:
    """Read the same from a file's settings, without its tensors; None where it has none."""
    from lightning_modules.common.settings import build

    try:
        with safe_open(path, "np") as file:
            config = json.loads((file.metadata() or {})["config"])
        if config["paper"] != kind.paper:
            return None
        names = {f.name for f in dataclasses.fields(kind.config)}
        return kind.measures(build(kind.config, {k: v for k, v in config.items() if k in names}))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # it is refused, with its reason, when it is read


def tokens_of(path: Path) -> str | None:
    """Return the sha256 of the tokenizer whose tokens a file decodes, None where it is its own."""
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["config"]).get("tokens_of")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError):
        return None


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
