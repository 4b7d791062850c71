"""What a run says of its pictures, set by set."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data.config import DataConfig
from eval.rows import Measured
from eval.scorers import SCORERS
from experiments.pipeline.data import Data
from experiments.pipeline.score import Score, Scored
from experiments.pipeline.stage import Folders, Log, Machine
from experiments.progress import waiting


@dataclass(frozen=True)
class Rows:
    """Features of some pictures, by their places."""

    follows: ClassVar[None] = None
    places: tuple[int, ...]

    def measured(self, inputs: Any) -> tuple[Measured, list[dict[str, Any]]]:
        return Measured({"index": np.array(self.places)}), [{}] * len(self.places)


def test_sets_of_one_prefix_keep_what_each_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"one": {"right": True}, "other": {"text": "red"}, "silent": None}

    def scorer(name: str) -> Any:
        def score(made: Measured, *_: Any, prefix: str, **how: Any) -> Any:
            verdicts = [read[name]] * len(made) if read[name] else []
            return {f"{prefix}/{name}": {"value": 1.0}}, verdicts

        return score

    for name in read:
        monkeypatch.setitem(SCORERS, name, scorer(name))
    kinds = [("one", (0, 2)), ("other", (2, 3)), ("silent", (0,))]
    made: list[Any] = [Scored(name, "eval", Rows(at)) for name, at in kinds]  # type: ignore
    stage, folders = Score(tuple(made), 10, 0), Folders(tmp_path)
    folders.homes[stage] = tmp_path
    found = stage.run(tmp_path, folders, Machine(), Log(print))
    assert found == {f"eval/{name}": 1.0 for name in read}
    assert stage.verdicts(folders, "eval") == {
        0: {"right": True},
        2: {"right": True, "text": "red"},
        3: {"text": "red"},
    }


def test_long_work_without_parts_is_not_silent() -> None:
    said: list[str] = []
    with waiting("eval: fid of 9 pictures, 1 of 2", said.append, every=0.01):
        while len(said) < 2:
            time.sleep(0.01)
    assert set(said) == {"      eval: fid of 9 pictures, 1 of 2, 0:00 so far"}
    count = len(said)
    with waiting("x", said.append, "none", every=0.001):
        time.sleep(0.02)
    assert len(said) == count  # over, and asked not to speak


def test_a_reference_begins_behind_what_is_asked_of_its_split(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    own = Data(DataConfig(shards=str(tmp_path / "a.tar")), prompts=5, heldout=3, partial=0)
    for split, asked in (("val", 5), ("heldout", 3)):
        captions = own.reference(split)
        assert (captions.split, captions.first, captions.count) == (split, asked, 2 * asked)
