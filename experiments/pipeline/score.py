"""Scores of rows, with their intervals; no picture is looked at here."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import write_json
from experiments.pipeline.features import Features
from experiments.pipeline.given import GivenMoments
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import Folders, Log, Machine, Stage

LEAST = 4  # pictures of a reference, half of which give the floor


@dataclass(frozen=True)
class Scored:
    """One set of pictures and how it is scored."""

    scorer: str
    """A key of eval.scorers.SCORERS."""
    prefix: str
    """Put before the names of its scores."""
    made: Features
    reference: Features | GivenMoments | None = None
    """Real pictures that share no caption with them."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Stored beside every score."""


@dataclass(frozen=True, eq=False)
class Score(Stage):
    """All scores of a run."""

    VERSION = 5

    sets: tuple[Scored, ...]
    resamples: int
    """Bootstrap draws behind the intervals."""
    seed: int

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Reduce the rows, set by set."""
        from eval.calls import score_calls
        from eval.scorers import SCORERS

        scores: dict[str, Any] = {}
        verdicts: dict[str, Any] = {}
        for one in self.sets:
            made, asked = one.made.measured(inputs)
            reference = None
            count = None if one.reference is None else one.reference.count(inputs)
            if one.reference is not None and (count is None or count >= LEAST):
                reference = one.reference.measured(inputs)[0]
            elif one.reference is not None:
                log.note(f"{one.prefix}: too few real pictures of other captions for a distance")
            found, read = SCORERS[one.scorer](
                made,
                asked,
                reference,
                prefix=one.prefix,
                resamples=self.resamples,
                seed=self.seed,
                **one.about,
            )
            scores |= found
            drawn = one.made.follows
            calls = drawn.calls(inputs) if isinstance(drawn, Sample) else None
            if calls:
                how = {"resamples": self.resamples, "seed": self.seed}
                scores |= score_calls(calls, prefix=one.prefix, **how)
            verdicts[one.prefix] = (
                dict(zip((str(i) for i in made.rows["index"].tolist()), read, strict=True))
                if read
                else {}
            )
        for name, score in scores.items():
            if not math.isfinite(score["value"]):
                raise ValueError(
                    f"{name} is {score['value']}: the pictures or the model are broken"
                )
        write_json(folder / "metrics.json", scores)
        write_json(folder / "verdicts.json", verdicts)
        return {name: score["value"] for name, score in scores.items()}

    def scores(self, inputs: Folders) -> dict[str, Any]:
        """Return the scores by name."""
        return json.loads((inputs[self] / "metrics.json").read_text())

    def verdicts(self, inputs: Folders, prefix: str) -> dict[int, dict[str, Any]]:
        """Return what was read in the pictures of a set, by their places."""
        found = json.loads((inputs[self] / "verdicts.json").read_text()).get(prefix, {})
        return {int(place): verdict for place, verdict in found.items()}
