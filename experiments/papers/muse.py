"""Muse: parallel decoding of masked tokens, and super-resolution on top of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data.files import file_hash
from experiments.papers.base import Drawing, Materials, existing
from experiments.papers.first_stage import measures_of_file
from experiments.papers.sections import TrainerConfig
from experiments.papers.vqgan import TOKENIZER, TOKENIZER_PRESETS, TokenRun
from experiments.pipeline.data import Captions
from experiments.pipeline.encode import EncodedView
from experiments.pipeline.first_stage import Given
from experiments.pipeline.generator import Generator
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import FileStage, Folders, plain_paths
from experiments.pipeline.train import Recipe, Train, attachable, blank, described
from experiments.settings import resolved
from lightning_modules.common.interfaces import Geometry
from lightning_modules.muse.config import MODELS, PRESETS, SUPERRES_MODELS, UVIT_MODELS, MuseConfig

BASE_TRAINING = ("objective", "optim", "critic")  # sections of the base alone


@dataclass
class MuseRun(MuseConfig, TokenRun):
    """Muse: text to tokens by parallel decoding of masked tokens, and super-resolution on top."""

    READS: ClassVar[str] = (
        "folders of aMUSEd's pipeline (amused-256, amused-512; open-muse's too) or its\n"
        "transformer; their text encoder stays where it is"
    )
    LATER: ClassVar[tuple[str, ...]] = ("superres", "superres_trainer")
    ASIDE: ClassVar[tuple[str, ...]] = ("edit",)
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": MODELS,
        "uvit": UVIT_MODELS,
        "superres.model": SUPERRES_MODELS,
        "sampling": PRESETS,
        **TOKENIZER_PRESETS,
    }

    superres_trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long the super-resolution stage is trained; the machine's settings are trainer's."""

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.muse import convert

        return convert.read

    @property
    def high_resolution(self) -> int:
        """Width and height of the pictures that super-resolution makes."""
        return self.data.resolution * self.superres.factor

    def check(self) -> None:
        """Check that the sections fit each other, and super-resolution its own tokenizer."""
        super().check()
        path = self.superres.tokenizer
        if self.superres.enabled and path is not None:
            measures = measures_of_file(TOKENIZER, Path(path))
            if measures is not None:
                self.superres.check_high(Geometry.of(self.high_resolution, *measures))

    def sampling_settings(self) -> dict[str, Any]:
        """Leave those of super-resolution out, where there is none."""
        plain = super().sampling_settings()
        return plain if self.superres.enabled else {k: plain[k] for k in plain if k != "superres"}

    def drawing(self, materials: Materials) -> Drawing:
        """Return the base's pictures, and those of super-resolution from the same tokens."""
        if not self.superres.enabled:
            return super().drawing(materials)
        m, stage = materials, self.superres
        base = self.base(m)
        path = existing("superres.tokenizer", stage.tokenizer)
        own = m.first_stage if path is None else Given(path, "vqgan")
        size = self.high_resolution
        low_view = EncodedView("low", m.first_stage, stage.factor)
        pairs = self.encoded(m.data, EncodedView("tokens", own), low_view, resolution=size)
        # of the base only what must fit; how it was trained counts where it predicts
        shared = {k: v for k, v in self.trained_settings().items() if k not in BASE_TRAINING}
        recipe = SuperResRecipe(
            m.paper,
            {**shared, "superres": {**resolved(stage), "tokenizer": None}},
            m.first_stage,
            own,
            base if stage.low == "predicted" else None,
            self.data.resolution,
            stage.factor,
        )
        trainer = self.superres_trainer
        superres = Train(
            "superres",
            recipe,
            pairs,
            trainer.loop(self.world),
            self.seed,
            m.data.shards("val", size),
            trainer.monitor(),
            self.data.shuffle_buffer,
        )
        low = Generator(base, m.first_stage)
        whole = Generator(
            base,
            m.first_stage,
            parts={"superres": superres},
            further={} if path is None else {"high": own},
        )
        sampling = self.sampling_settings()
        enlarging = {"superres": sampling["superres"]}
        lower = {k: v for k, v in sampling.items() if k not in enlarging}

        def draw(captions: Captions, seed: int, traces: int) -> dict[str, Sample]:
            small = Sample(low, captions, lower, seed, traces, keep_tokens=True)
            large = Sample(whole, captions, enlarging, seed, part="superres", low=small)
            return {"eval": small, "superres": large}

        return Drawing(whole, draw, sampling, "superres", size)


@dataclass(frozen=True)
class SuperResRecipe(Recipe):
    """The super-resolution stage: high-res tokens from those of the reduced picture."""

    FILE: ClassVar[str] = "superres.safetensors"

    paper: str
    settings: Mapping[str, Any]
    """The paper's sections, superres among them."""
    low: FileStage
    """The base's tokenizer."""
    high: FileStage
    """Its own tokenizer."""
    base: Train | None
    """The base, where the low-res tokens are partly its own predictions."""
    resolution: int
    """Width and height of the base's pictures."""
    factor: int
    """How many times as wide the pictures become."""

    def note(self) -> str:
        """Say what the low-res tokens are."""
        if self.base is None:
            return "super-resolution is trained with the pictures' own low-res tokens"
        rate = self.settings["superres"]["low_rate"]
        return (
            f"super-resolution is trained with low-res tokens of which up to {rate:.0%} are "
            "predicted by the base"
        )

    def maker(self, inputs: Folders, seed: int) -> Callable[[], Any]:
        """Load both tokenizers and the base, and return what makes the module."""
        from lightning_modules.muse.module import SuperResModule
        from lightning_modules.registry import load_generator

        low, geometry = attachable(self.low, self.resolution, inputs)
        high, own = attachable(self.high, self.resolution * self.factor, inputs)
        settings = plain_paths(self.settings)
        config = {"paper": self.paper, "seed": seed, **geometry, "high": own, **settings}
        base = None
        if self.base is not None:
            base = load_generator(self.base.file(inputs), first_stage=self.low.file(inputs))
        return lambda: SuperResModule(config).attach(high, low=low, base=base)

    def blank(self, geometry: Geometry | None) -> Any:
        """Make the module without numbers."""
        from lightning_modules.muse.module import SuperResModule

        assert geometry is not None
        measures: Any = (geometry.factor, geometry.num_codes)
        if isinstance(self.high, Given) and self.high != self.low:
            measures = measures_of_file(TOKENIZER, self.high.path) or measures
        high = described(Geometry.of(self.resolution * self.factor, *measures))
        settings = plain_paths(self.settings)
        config = {"paper": self.paper, **described(geometry), "high": high, **settings}
        return blank(lambda: SuperResModule(config))

    def export(self, module: Any, inputs: Folders) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the weights to sample with, and the settings with the tokenizer's hash."""
        state, config = module.export()
        if self.high != self.low:
            named = {"sha256": file_hash(self.high.file(inputs))}
            config["high"] = {**config["high"], "first_stage": named}
        return state, config
