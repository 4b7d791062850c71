"""The stages of a run, from its settings; light, nothing is started."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from data.config import DataConfig
from eval.choices import CHOICES, wanted, weight_files
from eval.extractors import (
    LEVELS,
    DigitRows,
    EditRows,
    FeatureRows,
    ReconstructionRows,
    SceneRows,
)
from eval.spaces import SPACES
from experiments.papers.base import Drawing, Materials, RunSettings
from experiments.papers.sections import APART
from experiments.pipeline.data import Data, Pictures
from experiments.pipeline.edit import Edits
from experiments.pipeline.features import Features
from experiments.pipeline.given import Prepared
from experiments.pipeline.sample import Sample
from experiments.pipeline.score import Score, Scored
from experiments.pipeline.stage import FileStage, Stage, order
from experiments.pipeline.train import FirstStageRecipe, Train
from experiments.settings import ConfigError, pick


class Scoring(NamedTuple):
    """How pictures of one kind of data are scored."""

    scorer: str
    extractor: Callable[[DataConfig], Any]
    reference: bool = True
    """Whether there are real pictures of other captions to compare with."""


SCORINGS: dict[str, Scoring] = {
    "scenes": Scoring("scenes", lambda data: SceneRows.of(data.resolution, data.max_objects)),
    "digits": Scoring("digits", lambda data: DigitRows(), reference=False),
    "shards": Scoring("features", lambda data: FeatureRows()),
}


class Split(NamedTuple):
    """Prompts that are asked."""

    end: str
    """Of the prefix of their scores."""
    seed: int
    """Added to the seed of their pictures."""
    reference: bool = True
    """Whether there are real pictures of other captions of the kind."""


SPLITS: dict[str, Split] = {
    "val": Split("", 0),
    "heldout": Split("/heldout", APART),
    "partial": Split("/partial", 2 * APART, reference=False),
}


@dataclass(frozen=True)
class Plan:
    """What a run makes."""

    first_stage: FileStage
    score: Score
    reconstructions: Features
    """Of the first stage, with the pairs that the page shows."""
    drawing: Drawing | None = None
    samples: dict[str, Sample] = field(default_factory=dict)
    """Prefix of scores -> pictures."""
    edits: Edits | None = None

    @cached_property
    def stages(self) -> list[Stage]:
        """All stages, what is needed first."""
        return order([self.score])

    @property
    def published(self) -> list[Stage]:
        """The stages whose results the run folder is filled from."""
        drawing = [] if self.drawing is None else [self.drawing.generator]
        edits = [] if self.edits is None else [self.edits]
        pictures = [*self.samples.values(), *edits, self.reconstructions]
        return [self.score, self.first_stage, *drawing, *pictures, *self.trainings]

    @property
    def trainings(self) -> list[Train]:
        """The run's own trainings: of its generator, or of the first stage where that is all."""
        found = [stage for stage in self.stages if isinstance(stage, Train)]
        return [s for s in found if not isinstance(s.recipe, FirstStageRecipe)] or found


def plan(paper: str, run: RunSettings) -> Plan:
    """Return the stages of a run.

    Args:
        paper: a key of PAPERS.
        run: its checked settings.

    Raises:
        ConfigError: a file that the settings name is not there.
    """
    e = run.eval
    data = Data(run.data, e.prompts, e.heldout, e.partial)
    scoring = SCORINGS.get(run.data.name, SCORINGS["shards"])
    extractor = scoring.extractor(run.data)
    first = run.first_stage_stage(data)
    drawing = run.drawing(Materials(paper, data, first))
    scenes = extractor if isinstance(extractor, SceneRows) else None
    alone = drawing is None
    continuous = run.FIRST_STAGE.statistics
    levels = LEVELS if continuous else (0.0,) if scenes else ()  # tokens take no noise
    rows = ReconstructionRows(
        lpips=run.lpips(),
        scenes=scenes,
        show=max(1, e.grid // 2),
        seed=e.seed,
        levels=levels if alone else (),
        compress=alone and continuous and scenes is not None,
    )
    real = Features(Pictures(data.captions("val", e.prompts)), rows, first)
    own = Scored("reconstruction", "eval" if alone else run.FIRST_STAGE.section, real)
    if drawing is None:
        if e.scores:
            raise ConfigError(
                "eval.scores are of generated pictures; python -m eval.reconstruction scores what "
                "a first stage gives back"
            )
        return Plan(first, Score((own,), e.bootstrap, e.seed), real)
    samples: dict[str, Sample] = {}
    sets: list[Scored] = []
    asked = {"val": e.prompts}
    if run.data.name == "scenes":
        asked |= {"heldout": e.heldout, "partial": e.partial}
    for split, (end, seed, compared) in SPLITS.items():
        if not asked.get(split):
            continue
        reference = None
        if scoring.reference and compared:
            reference = Features(Pictures(data.reference(split)), extractor)
        traces = e.traces if split == "val" else 0
        drawn = drawing.draw(data.captions(split, asked[split]), e.seed + seed, traces)
        for prefix, sample in drawn.items():
            samples[f"{prefix}{end}"] = sample
            about = {} if not sample.part else reduction(run.data.resolution)
            made = Features(sample, extractor)
            if split == "val":
                sets += further(run, data, prefix, sample)
            sets.append(Scored(scoring.scorer, f"{prefix}{end}", made, reference, about))
    edits = None
    if e.edits and scenes is not None:
        size = drawing.resolution or run.data.resolution
        captions = data.captions("val", run.data.val_size, size)
        edits = Edits(drawing.generator, captions, e.edits, drawing.sampling, e.seed)
        sets.append(Scored("edits", "edit", Features(edits, EditRows(scenes))))
    return Plan(first, Score((*sets, own), e.bootstrap, e.seed), real, drawing, samples, edits)


def further(run: RunSettings, data: Data, prefix: str, sample: Sample) -> list[Scored]:
    """Return the scores that eval.scores asks for besides, of one set of pictures.

    Raises:
        ConfigError: an unknown one, or weights that are not here.
    """
    e = run.eval
    for what, names, known in (("scores", e.scores, CHOICES), ("features", e.features, SPACES)):
        for name in names:
            pick(f"eval.{what}", name, [*known])
    try:
        chosen = wanted(e.scores, e.features, weight_files(e.weights))
    except ValueError as error:
        raise ConfigError(f"eval.scores: {str(error).splitlines()[0]}") from error
    if run.data.name == "digits" and any(one.reference for one in chosen):
        raise ConfigError("eval.scores: data=digits has no real pictures to compare with")
    size = run.data.resolution
    made = Prepared(sample, size, "squash", "box") if sample.part else sample
    real = Pictures(data.reference("val"))
    return [
        Scored(
            one.scorer,
            prefix,
            Features(made, one.extractor),
            Features(real, one.extractor) if one.reference else None,
            reduction(size) if sample.part else {},
        )
        for one in chosen
    ]


def reduction(resolution: int) -> dict[str, str]:
    """Say that larger pictures are scored at the data's size."""
    return {"pictures": f"reduced to {resolution} px by area averaging"}


def chosen(stages: list[Stage], until: str | None) -> list[Stage]:
    """Return the stages up to the last one of that name, all without a name.

    Raises:
        ConfigError: the run has no stage of that name.
    """
    if until is None:
        return stages
    names = [stage.name for stage in stages]
    pick("--until", until, list(dict.fromkeys(names)))
    return stages[: len(names) - names[::-1].index(until)]
