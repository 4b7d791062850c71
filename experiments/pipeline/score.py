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
        verdicts: dict[str, dict[str, Any]] = {}
        for number, one in enumerate(self.sets, 1):
            drawing = {"resamples": self.resamples, "seed": self.seed}
            how: dict[str, Any] = {"prefix": one.prefix, **drawing}
            with log.waiting(f"{one.prefix}: {one.scorer}, {number} of {len(self.sets)}"):
                made, asked = one.made.measured(inputs)
                reference = self._reference(one, inputs, log)
                found, read = SCORERS[one.scorer](made, asked, reference, **how, **one.about)
            scores |= found
            drawn = one.made.follows
            calls = drawn.calls(inputs) if isinstance(drawn, Sample) else None
            if calls:
                scores |= score_calls(calls, **how)
            of = verdicts.setdefault(one.prefix, {})  # which several sets may have
            if read:
                for place, verdict in zip(made.rows["index"].tolist(), read, strict=True):
                    of[str(place)] = {**of.get(str(place), {}), **verdict}
        for name, score in scores.items():
            if not math.isfinite(score["value"]):
                raise ValueError(
                    f"{name} is {score['value']}: the pictures or the model are broken"
                )
        write_json(folder / "metrics.json", scores)
        write_json(folder / "verdicts.json", verdicts)
        return {name: score["value"] for name, score in scores.items()}

    def _reference(self, one: Scored, inputs: Folders, log: Log) -> Any:
        """Return the rows of real pictures, None where there are none or too few."""
        if one.reference is None:
            return None
        count = one.reference.count(inputs)
        if count is None or count >= LEAST:
            return one.reference.measured(inputs)[0]
        log.note(f"{one.prefix}: too few real pictures of other captions for a distance")
        return None

    def scores(self, inputs: Folders) -> dict[str, Any]:
        """Return the scores by name."""
        return json.loads((inputs[self] / "metrics.json").read_text())

    def verdicts(self, inputs: Folders, prefix: str) -> dict[int, dict[str, Any]]:
        """Return what was read in the pictures of a set, by their places."""
        found = json.loads((inputs[self] / "verdicts.json").read_text()).get(prefix, {})
        return {int(place): verdict for place, verdict in found.items()}
