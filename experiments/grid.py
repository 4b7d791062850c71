"""The points of a sweep: a file in W&B's format, and the checked run of every combination."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.papers.base import RunSettings
from experiments.papers.registry import load
from experiments.pipeline.plan import Plan, plan
from experiments.pipeline.store import Store
from experiments.run import parse
from experiments.settings import ConfigError, UserError, to_yaml

PROGRAM = "experiments.run"
KNOWN = {
    "program", "command", "method", "metric", "parameters", "name", "description", "project",
    "entity", "run_cap",
}  # fmt: skip
MACRO = re.compile(r"\$\{\w+(:\w+)?\}")


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    name: str
    metric: str | None
    """The score that is sought, which comes first in the table."""
    minimize: bool
    """Whether it shall be low."""
    words: list[str]
    """Fixed words of the command, as `--paper paella`."""
    values: dict[str, list[Any]]
    """Setting -> its values; one value where it is fixed."""


@dataclass
class Point:
    """One combination of settings, and what became of it."""

    settings: dict[str, Any]
    """The varied settings."""
    argv: list[str]
    """Words for experiments.run."""
    paper: str
    scale: str
    config: RunSettings
    out: Path
    plan: Plan
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None

    @property
    def label(self) -> str:
        """The varied settings in words."""
        return " ".join(f"{k}={text_of(v)}" for k, v in short_names(self.settings).items())


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file in W&B's format, of which a grid of given values can be run here.

    Raises:
        ConfigError: no readable file, or something in it that only a W&B server can do.
    """
    if not path.is_file():
        raise ConfigError(f"there is no sweep file {path}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(f"{path}: no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise ConfigError(f"{path}: a sweep has `parameters`, a table of settings")
    strange = sorted(set(content) - KNOWN)
    if strange:
        raise ConfigError(f"{path}: {strange[0]} is for a W&B server; here goes a plain grid")
    if content.get("method") != "grid":
        raise ConfigError(f"{path}: method must be grid, got {content.get('method')}; "
                          "an agent of W&B runs the others")  # fmt: skip
    values: dict[str, list[Any]] = {}
    for name, given in content["parameters"].items():
        if not isinstance(given, dict) or set(given) not in ({"value"}, {"values"}):
            raise ConfigError(f"{path}: {name} needs `value: x` or `values: [x, y]`, got {given}")
        values[name] = given["values"] if "values" in given else [given["value"]]
        if not isinstance(values[name], list) or not values[name]:
            raise ConfigError(f"{path}: {name}.values must be a list with something in it")
    metric = content.get("metric") or {}
    return Sweep(
        name=path.stem,
        metric=metric.get("name"),
        minimize=metric.get("goal") == "minimize",
        words=_fixed_words(path, content),
        values=values,
    )


def _fixed_words(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Words that stand in the sweep's command besides W&B's macros."""
    command = [str(word) for word in content.get("command") or []]
    program = str(content.get("program") or "")
    if PROGRAM not in command and not program.endswith("experiments/run.py"):
        raise ConfigError(f"{path}: command must run {PROGRAM}: [python, -m, {PROGRAM}, ${{args}}]")
    after = command[command.index(PROGRAM) + 1 :] if PROGRAM in command else []
    return [word for word in after if not MACRO.fullmatch(word)]


def make_points(sweep: Sweep, words: Sequence[str], out: Path | None) -> tuple[Path, list[Point]]:
    """Make the checked config of every combination, the last setting changing fastest.

    Args:
        sweep: what was read.
        words: `key=value`, for all points; a setting of the sweep that is named is fixed by it.
        out: folder of the results; default runs/sweep-NAME, with a hash where `words` are given.

    Raises:
        ConfigError: a combination that cannot be.
    """
    fixed = {word.partition("=")[0].removeprefix("--") for word in words}
    values = {name: given for name, given in sweep.values.items() if name not in fixed}
    if out is None:
        name = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:8]
        end = f"-{name}" if words else ""
        out = Path("runs") / f"sweep-{sweep.name}{end}"
    loggers = [] if any(w.startswith(("logger=", "--logger=")) for w in words) else ["logger=csv"]
    points = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        argv = [*sweep.words, *(f"--{k}={text_of(v)}" for k, v in chosen.items()), *words]
        args, settings = parse(argv)
        if args.paper is None:
            raise ConfigError(f"the sweep {sweep.name} names no paper: add paper to its parameters")
        own = [] if "logger" in chosen else loggers
        config = load(args.paper, args.scale, [*own, *settings])
        varied = {k: v for k, v in chosen.items() if len(values[k]) > 1}
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{k}={text_of(v)}"
                      for k, v in short_names(varied).items())) or "point"  # fmt: skip
        scale = Path(args.scale).stem
        planned = plan(args.paper, config)
        points.append(Point(varied, argv, args.paper, scale, config, out / name, planned))
    return out, points


def stands(point: Point) -> bool:
    """Say whether a point's results are there: made with these settings, and those of the store."""
    try:
        if (point.out / "config.yaml").read_text() != to_yaml(point.config):
            return False
        store, score = Store(point.config.cache), point.plan.score
        kept = json.loads((store.folders[score] / "metrics.json").read_text())
        mine = json.loads((point.out / "metrics.json").read_text())
        return store.done(score) is not None and mine == kept
    except (OSError, ValueError, UserError):
        return False


def text_of(value: Any) -> str:
    """Write a value as W&B's agent puts it on the command line."""
    return str(value)


def short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their last names, where these differ."""
    lasts = [name.rpartition(".")[2] for name in settings]
    return {
        last if lasts.count(last) == 1 else name: value
        for (name, value), last in zip(settings.items(), lasts, strict=True)
    }
