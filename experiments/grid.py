"""The runs of a sweep: a file in W&B's format, and the checked run of every combination."""

import argparse
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.agent import MACROS, text_of, words_of
from experiments.cli import parse_run
from experiments.papers.base import RunSettings
from experiments.papers.registry import load
from experiments.pipeline.plan import Plan, plan
from experiments.pipeline.store import Store
from experiments.settings import ConfigError, UserError, to_yaml

PROGRAM = "experiments.run"
KNOWN = {
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "name",
    "description",
    "project",
    "entity",
}
MACRO = re.compile(r"\$\{(.*)\}")
VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
GOALS = ("minimize", "maximize")
LONGEST = 100
"""Characters of a run folder's name; a file system takes 255 bytes."""


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
class SweepRun:
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
    strange = [key for key in content if key not in KNOWN]
    if strange:
        raise ConfigError(f"{path}: {strange[0]} is for a W&B server; here goes a plain grid")
    if content.get("method") != "grid":
        raise ConfigError(
            f"{path}: method must be grid, got {content.get('method')}; "
            "an agent of W&B runs the others"
        )
    values: dict[str, list[Any]] = {}
    for name, given in _parameters(path, content["parameters"]):
        if name in values:
            raise ConfigError(f"{path}: {name} is given twice, dotted and nested")
        values[name] = given
    metric = content.get("metric") or {"name": None}
    goal = metric.get("goal", "minimize") if isinstance(metric, dict) else None
    if goal not in GOALS or not isinstance(metric.get("name"), str | None):
        raise ConfigError(f"{path}: metric is {{name: NAME, goal: {' or '.join(GOALS)}}}: {metric}")
    return Sweep(
        name=path.stem,
        metric=metric.get("name"),
        minimize=goal == "minimize",
        words=_fixed_words(path, content),
        values=values,
    )


def _parameters(
    path: Path, table: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, list[Any]]]:
    """Yield (dotted setting, its values) of a table of parameters, which may hold tables."""
    for key, given in table.items():
        name = f"{at}{key}"
        if isinstance(given, dict) and isinstance(given.get("parameters"), dict):
            yield from _parameters(path, given["parameters"], f"{name}.")
            continue
        form = dict(given) if isinstance(given, dict) else {}
        distribution = form.pop("distribution", None)
        if [*form] == ["values"] and distribution in (None, "categorical"):
            if not isinstance(form["values"], list) or not form["values"]:
                raise ConfigError(f"{path}: {name}.values must be a list with something in it")
            yield name, form["values"]
        elif [*form] == ["value"] and distribution in (None, "constant"):
            yield name, [form["value"]]
        else:
            raise ConfigError(f"{path}: {name} needs `value: x` or `values: [x, y]`, got {given}")


def _fixed_words(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Words after the program in the sweep's command, besides the macro of the parameters.

    Variables of the environment are filled in, as an agent does.
    """
    given = content.get("command")
    command = [str(word) for word in given] if isinstance(given, list) else []
    program = str(content.get("program") or "")
    if PROGRAM not in command and (given or not program.endswith("experiments/run.py")):
        raise ConfigError(f"{path}: command must run {PROGRAM}: [python, -m, {PROGRAM}, ${{args}}]")
    words = []
    for word in command[command.index(PROGRAM) + 1 :] if command else []:
        for name in VARIABLE.findall(word):
            if name not in os.environ:
                raise ConfigError(f"{path}: command asks for the variable {name}, which is not set")
        word = VARIABLE.sub(lambda found: os.environ[found[1]], word)
        macro = MACRO.fullmatch(word)
        if macro is None:
            words.append(word)
        elif macro[1] not in MACROS:
            raise ConfigError(f"{path}: command has {word}, which a run does not read: ${{args}}")
    return words


def make_runs(sweep: Sweep, words: Sequence[str], out: Path | None) -> tuple[Path, list[SweepRun]]:
    """Make the checked config of every combination, the last setting changing fastest.

    Args:
        sweep: what was read.
        words: `key=value`, for all runs; a setting of the sweep that is named is fixed by it.
        out: folder of the results; default runs/sweep-NAME, with a hash where `words` are given.

    Raises:
        ConfigError: a combination that cannot be.
    """
    fixed = {word.partition("=")[0].removeprefix("--") for word in words}
    values = {name: given for name, given in sweep.values.items() if name not in fixed}
    if out is None:
        end = f"-{_hash(sorted(words))}" if words else ""
        out = Path("runs") / f"sweep-{sweep.name}{end}"
    loggers = [] if any(w.startswith(("logger=", "--logger=")) for w in words) else ["logger=csv"]
    runs = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        varied = {k: v for k, v in chosen.items() if len(values[k]) > 1}
        argv = [*sweep.words, *words_of(chosen), *words]
        own = [] if "logger" in chosen else loggers
        try:
            args, config, planned = _checked(argv, own)
        except ConfigError as error:
            where = " ".join(f"{k}={text_of(v)}" for k, v in varied.items())
            raise ConfigError(f"{where}: {error}" if where else str(error)) from error
        scale = Path(args.scale).stem
        folder = out / folder_name(varied)
        runs.append(SweepRun(varied, argv, args.paper, scale, config, folder, planned))
    return out, runs


def _checked(
    argv: Sequence[str], loggers: Sequence[str]
) -> tuple[argparse.Namespace, RunSettings, Plan]:
    """Parse the words of one run as its command does, and plan it."""
    args, settings = parse_run(argv)
    if args.paper is None:
        raise ConfigError("the sweep names no paper: add paper to its parameters")
    for name in ("out", "until", "dry_run", "json", "print_config", "help"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for a single run, not for a sweep's")
    config = load(args.paper, args.scale, [*loggers, *settings])
    return args, config, plan(args.paper, config)


def folder_name(settings: Mapping[str, Any]) -> str:
    """Name a run's folder by its settings; a hash tells apart what a name cannot hold."""
    words = [f"{k}={text_of(v)}" for k, v in short_names(settings).items()]
    text = ",".join(words) or "run"
    name = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    return name if name == text and len(name) <= LONGEST else f"{name[:LONGEST]}-{_hash(words)}"


def _hash(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def finished(run: SweepRun) -> bool:
    """Say whether a run's results are there: made with these settings, and those of the store."""
    try:
        if (run.out / "config.yaml").read_text() != to_yaml(run.config):
            return False
        store, score = Store(run.config.cache), run.plan.score
        kept = json.loads((store.folders[score] / "metrics.json").read_text())
        mine = json.loads((run.out / "metrics.json").read_text())
        return store.done(score) is not None and mine == kept
    except (OSError, ValueError, UserError):
        return False


def short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their last names, where these differ."""
    lasts = [name.rpartition(".")[2] for name in settings]
    return {
        last if lasts.count(last) == 1 else name: value
        for (name, value), last in zip(settings.items(), lasts, strict=True)
    }
