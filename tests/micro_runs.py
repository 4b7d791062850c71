"""Whole runs at scale micro: what tests of a paper's stages start from."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.papers.registry import load
from experiments.pipeline.plan import Plan, plan
from experiments.pipeline.publish import Titles
from experiments.pipeline.runner import execute
from experiments.pipeline.stage import Folders, Stage
from experiments.report.pictures import load_png
from experiments.settings import ConfigError

QUIET = (  # of Lightning
    "ignore:Checkpoint directory",
    "ignore:The dirpath has changed",
    "ignore:Your `IterableDataset`",
)


@dataclass
class Run:
    """A run that has ended."""

    paper: str
    out: Path
    cache: Path
    words: list[str]
    lines: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> Any:
        return load(self.paper, "micro", self.words)

    @cached_property
    def plan(self) -> Plan:
        return plan(self.paper, self.config)

    @property
    def scores(self) -> dict[str, Any]:
        return json.loads((self.out / "metrics.json").read_text())

    @property
    def page(self) -> str:
        return (self.out / "report.html").read_text()

    def folder(self, stage: Stage | str) -> Path:
        """Folder of a stage, or of the last stage of a name."""
        named = {s.name: s for s in self.plan.stages}
        return Folders(self.cache)[named[stage] if isinstance(stage, str) else stage]

    def asked(self, prefix: str = "eval") -> list[dict[str, Any]]:
        """What was asked of the pictures with a prefix of scores."""
        return json.loads((self.folder(self.plan.samples[prefix]) / "prompts.json").read_text())

    def pictures(self, prefix: str = "eval") -> Tensor:
        """The pictures [N, 3, H, W] of a prefix of scores."""
        folder = self.folder(self.plan.samples[prefix])
        return torch.stack([load_png(folder / row["file"])[0] for row in self.asked(prefix)])

    def made(self) -> set[str]:
        """Names of the stages that this run did not find done."""
        heads = [line.partition("] ")[2].split() for line in self.lines if line.startswith("[")]
        return {head[0].rstrip(":") for head in heads if head[1] in ("runs", "continues")}


def go(paper: str, out: Path, cache: Path, *words: str) -> Run:
    """Do a run."""
    run = Run(paper, out, cache, ["logger=csv", *words, f"cache={cache}"])
    execute(Titles(paper, "micro", f"run {paper}"), run.config, out, run.lines.append)
    return run


def names(paper: str, *words: str) -> list[str]:
    """Names of the stages of a run, in order."""
    return [stage.name for stage in stages(paper, *words)]


def stages(paper: str, *words: str) -> list[Stage]:
    """The stages of a run, in order."""
    return plan(paper, load(paper, "micro", words)).stages


def changed(paper: str, *words: str, given: tuple[str, ...] = ()) -> set[str]:
    """Names of the stages that other settings make anew."""
    before = {stage.folder for stage in stages(paper, *given)}
    return {s.name for s in stages(paper, *given, *words) if s.folder not in before}


def refused(call: Callable[[], Any]) -> str:
    """The one line with which settings are refused."""
    try:
        call()
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")
