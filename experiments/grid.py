"""The runs of a sweep: a file in W&B's format, and the checked run of every point."""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments import distributions
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
    "run_cap",
}
METHODS = ("grid", "random")
SEEDS = ("seed", "eval.seed")
"""Settings that repeat a point and do not make another one of it."""
SEED_STRIDE = 10_000_000
"""Between the sampling seeds of two repetitions; the pictures of a run have seeds in a row."""
MACRO = re.compile(r"\$\{(.*)\}")
VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
GOALS = ("minimize", "maximize")
METRIC = {"name", "goal"}
TEXTS = ("program", "name", "description", "project", "entity")
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
    method: str
    """grid: every combination; random: independent draws."""
    forms: dict[str, dict[str, Any]]
    """Setting -> its distribution, as `distributions.named` returns it."""
    cap: int | None = None
    """Runs, at most."""


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
    right: dict[str, dict[tuple[int, ...], bool]] = field(default_factory=dict)
    """Prefix of scores -> (seed, place of the prompt) -> whether its picture shows what was asked,
    where one can say. Of a run alone the key is (place,)."""
    repeat: int = 0
    """Which repetition of its point it is."""

    @property
    def label(self) -> str:
        """The varied settings in words."""
        return " ".join(f"{k}={text_of(v)}" for k, v in short_names(self.settings).items())


def sweep_files(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split words into sweep files and settings.

    Raises:
        ConfigError: a word that is neither.
    """

    def is_file(word: str) -> bool:
        return word.endswith((".yaml", ".yml")) and "=" not in word

    settings = [word for word in words if not is_file(word)]
    for word in settings:
        if "=" not in word:
            raise ConfigError(f"{word!r} is neither a sweep file nor a setting key=value")
    return [Path(word) for word in words if is_file(word)], settings


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file in W&B's format, of which a grid or random draws can be run here.

    Raises:
        ConfigError: no readable file, or something in it that only a W&B server can do.
    """
    if not path.is_file():
        raise ConfigError(f"there is no sweep file {path}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(f"{path}: no readable YAML: {' '.join(str(error).split())}") from error
    table = content.get("parameters") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{path}: a sweep has `parameters`, a table of settings")
    strange = [key for key in content if key not in KNOWN]
    if strange:
        raise ConfigError(f"{path}: {strange[0]} is for a W&B server; take it out")
    method = content.get("method")
    if method not in METHODS:
        raise ConfigError(
            f"{path}: method must be one of {', '.join(METHODS)}, got {method}; an agent of W&B "
            "runs the others"
        )
    for key in TEXTS:
        if not isinstance(content.get(key, ""), str):
            raise ConfigError(f"{path}: {key} must be a text, got {content[key]}")
    cap = content.get("run_cap", 1)
    if type(cap) is not int or cap < 1:
        raise ConfigError(f"{path}: run_cap must be a whole number above 0, got {cap}")
    forms: dict[str, dict[str, Any]] = {}
    for name, form in _parameters(path, table):
        if name in forms:
            raise ConfigError(f"{path}: {name} is given twice, dotted and nested")
        if method == "grid" and distributions.listed(form) is None:
            raise ConfigError(
                f"{path}: {name} is drawn from {form['distribution']}, which no grid can list; "
                "take method: random"
            )
        forms[name] = form
    metric = content.get("metric", {"name": ""})
    goal = metric.get("goal", "minimize") if isinstance(metric, dict) else None
    named = goal in GOALS and isinstance(metric.get("name"), str) and metric.keys() <= METRIC
    if not named:
        raise ConfigError(f"{path}: metric is {{name: NAME, goal: {' or '.join(GOALS)}}}: {metric}")
    return Sweep(
        name=path.stem,
        metric=metric["name"] or None,
        minimize=goal == "minimize",
        words=_fixed_words(path, content),
        method=str(method),
        forms=forms,
        cap=content.get("run_cap"),
    )


def _parameters(
    path: Path, table: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted setting, its distribution) of a table of parameters, which may hold tables."""
    for key, given in table.items():
        name = f"{at}{key}"
        if isinstance(given, dict) and isinstance(given.get("parameters"), dict):
            if not given["parameters"]:
                raise ConfigError(f"{path}: {name} has `parameters` and none in it")
            yield from _parameters(path, given["parameters"], f"{name}.")
            continue
        try:
            yield name, distributions.named(given if isinstance(given, dict) else {})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {name} needs {error}") from error


def _fixed_words(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Words after the program in the sweep's command, besides the macro of the parameters.

    Variables of the environment are filled in, as an agent does.
    """
    given = content.get("command", [])
    if not isinstance(given, list):
        raise ConfigError(f"{path}: command must be a list of words, got {given}")
    command = [str(word) for word in given]
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


def make_runs(
    sweep: Sweep,
    words: Sequence[str],
    out: Path | None,
    *,
    seeds: int = 1,
    draws: int = 1,
    count: int | None = None,
    draw_seed: int = 0,
) -> tuple[Path, list[SweepRun]]:
    """Make the checked config of every point: of a grid the last setting changes fastest.

    Args:
        sweep: what was read.
        words: `key=value`, for all runs; a setting of the sweep that is named is fixed by it.
        out: folder of the results; default runs/sweep-NAME, with a hash where `words` are given.
        seeds: repetitions of every point, each with a training and sampling seed of its own.
        draws: repetitions of every training's sampling, each with a sampling seed of its own.
        count: points of a random sweep; default its run_cap.
        draw_seed: seed of these points.

    Raises:
        ConfigError: a point that cannot be, or a random sweep without a number of points.
    """
    fixed = {word.partition("=")[0].removeprefix("--") for word in words}
    forms = {name: form for name, form in sweep.forms.items() if name not in fixed}
    many = [name for name, form in forms.items() if distributions.listed(form) is None]
    many += [name for name, form in forms.items() if len(distributions.listed(form) or []) > 1]
    if out is None:
        repeats = {"seeds": seeds, "draws": draws}
        said = [*words, *(f"{name}={number}" for name, number in repeats.items() if number > 1)]
        end = f"-{_hash(sorted(said))}" if said else ""
        out = Path("runs") / f"sweep-{sweep.name}{end}"
    loggers = [] if any(w.startswith(("logger=", "--logger=")) for w in words) else ["logger=csv"]
    runs = []
    for chosen in _points(sweep, forms, count, draw_seed):
        varied = {k: v for k, v in chosen.items() if k in many}
        own = [] if "logger" in chosen else loggers
        base: RunSettings | None = None
        for k in range(seeds * draws):
            argv = [*sweep.words, *words_of(chosen), *words]
            if base is not None:
                sampling = base.eval.seed + k * SEED_STRIDE
                argv += [f"seed={base.seed + k // draws}", f"eval.seed={sampling}"]
            try:
                args, config, planned = _checked(argv, own)
            except ConfigError as error:
                where = " ".join(f"{k}={text_of(v)}" for k, v in varied.items())
                raise ConfigError(f"{where}: {error}" if where else str(error)) from error
            base = base or config
            repeated = {"seed": (seeds, config.seed), "eval.seed": (draws, config.eval.seed)}
            shown = {**varied, **{name: at for name, (times, at) in repeated.items() if times > 1}}
            folder, scale = out / folder_name(shown), Path(args.scale).stem
            made = SweepRun(shown, argv, args.paper, scale, config, folder, planned, repeat=k)
            runs.append(made)
    return out, runs


def _points(
    sweep: Sweep, forms: Mapping[str, dict[str, Any]], count: int | None, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the settings of every point."""
    if sweep.method == "grid":
        values = [distributions.listed(form) or [] for form in forms.values()]
        points = (dict(zip(forms, c, strict=True)) for c in itertools.product(*values))
        yield from itertools.islice(points, sweep.cap)
        return
    number = count or sweep.cap
    if number is None:
        raise ConfigError("a random sweep needs a number of points: --runs N, or run_cap: N")
    rng = random.Random(seed)
    for _ in range(number):
        yield {name: distributions.draw(form, rng) for name, form in forms.items()}


def _checked(
    argv: Sequence[str], loggers: Sequence[str]
) -> tuple[argparse.Namespace, RunSettings, Plan]:
    """Parse the words of one run as its command does, and plan it."""
    args, settings = parse_run(argv)
    if args.paper is None:
        raise ConfigError("the sweep names no paper: add paper to its parameters")
    single = ("out", "until", "dry_run", "json", "print_config", "help", "plan", "memory", "days")
    for name in single:
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


def tuned(sweep: Sweep, runs: Sequence[SweepRun], key: str) -> list[SweepRun]:
    """Return the runs that measure the best value of a setting, and one run of every other value.

    For each combination of the other settings the first repetitions choose the value, and the later
    ones measure it, which had no part in the choice. Until one of these has a score, the first
    stands for them.

    Args:
        sweep: its metric says what is best.
        runs: all of them; the first repetitions have their scores.
        key: the setting that is tuned.
    """
    groups: dict[tuple[str, ...], list[SweepRun]] = defaultdict(list)
    for run in runs:
        others = {k: v for k, v in run.settings.items() if k != key and k not in SEEDS}
        groups[tuple(map(text_of, others.values()))].append(run)
    sign = -1 if sweep.minimize else 1
    kept: set[int] = set()
    for group in groups.values():
        scored = [run for run in group if run.repeat == 0 and sweep.metric in run.scores]
        best = max(scored, key=lambda r: sign * r.scores[str(sweep.metric)]["value"], default=None)
        chosen = [r for r in group if best is not None and r.settings[key] == best.settings[key]]
        measured = any(run.repeat > 0 and run.scores for run in chosen)
        kept |= {id(run) for run in group if run.repeat == 0 and not (measured and run in chosen)}
        kept |= {id(run) for run in chosen if run.repeat > 0}
    return [run for run in runs if id(run) in kept]


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
