"""Train, sample and score one paper: `python -m experiments.run --paper paella [key=value ...]`."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from data.corpora import corpora
from experiments.agent import with_parameters
from experiments.cli import (
    GRAMMAR,
    RUN,
    columns,
    command,
    console,
    parse_run,
    prepare_torch,
    show_outcome,
    speaker,
)
from experiments.papers.base import RunSettings
from experiments.papers.registry import PAPERS, header, load, scales
from experiments.pipeline.plan import chosen, plan
from experiments.pipeline.ranks import is_leader
from experiments.pipeline.stage import Stage
from experiments.pipeline.store import Store
from experiments.settings import ConfigError, describe, diff, pick, to_yaml

DAYS = 7.0  # that a training may take, where nobody says it
MAIN_SETTINGS = (
    "seed",
    "logger",
    "data.name",
    "data.shards",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.devices",
    "trainer.precision",
    "eval.prompts",
)
EXAMPLES = (
    ("--paper paella", "embedded data, some minutes on a CPU"),
    ("--paper paella sampling.steps=6", "the same model, sampled in 6 steps: trains nothing"),
    ("--paper paella data=digits", "real handwritten digits"),
    ("--paper paella --scale small trainer.devices=2", "an hour on a GPU, or less on two"),
    ("--paper vqgan data.shards='my/{00000..00009}.tar'", "the tokenizer, on your own shards"),
    ("--paper paella --dry-run", "what would run and what would be reused"),
)


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit code.

    Raises:
        ConfigError: a wrong word on the command line; nothing was started.
        UserError: something the user can put right stopped the run.
    """
    args, overrides = parse_run(with_parameters(argv, os.environ))
    if args.paper == "help":
        print(papers_help())
        return 0
    if args.paper is None:
        if args.help:
            print(general_help())
            return 0
        raise ConfigError(f"--paper is missing; it is one of {', '.join(PAPERS)}")
    pick("--paper", args.paper, list(PAPERS))
    if args.json and not (args.dry_run or args.plan):
        raise ConfigError("--json goes with --dry-run or --plan")
    shown = [
        f"--{n.replace('_', '-')}" for n in ("print_config", "dry_run", "plan") if vars(args)[n]
    ]
    if len(shown) > 1:
        raise ConfigError(f"{shown[0]} and {shown[1]} exclude each other; ask for one")
    if args.until and shown not in ([], ["--dry-run"]):
        raise ConfigError(f"--until goes with a run or --dry-run, not with {shown[0]}")
    for option in ("memory", "days"):
        if getattr(args, option) is not None and not args.plan:
            raise ConfigError(f"--{option} goes with --plan")
    settings = load(args.paper, args.scale, overrides)
    if args.help:
        print(paper_help(args.paper, args.scale, settings))
        return 0
    if args.print_config:
        print(printed(args.paper, settings), end="")
        return 0
    scale = Path(args.scale).stem
    planned = plan(args.paper, settings)
    stages = chosen(planned.stages, args.until)
    # by what is computed: a run that only shows more of its progress goes to the same folder
    out = args.out or Path("runs") / f"{args.paper}-{scale}-{planned.score.key[:8]}"
    if args.dry_run:
        show_plan(stages, Store(settings.cache), out, args.json)
        if settings.note() and not args.json:
            print(f"note: {settings.note()}")
        return 0
    if args.plan:
        prepare_torch()
        from experiments.report.needs import show_needs

        days = DAYS if args.days is None else args.days
        print(show_needs(planned, settings, args.memory, days, args.json))
        return 0
    prepare_torch()
    from experiments.pipeline.publish import Titles
    from experiments.pipeline.runner import execute

    titles = Titles(args.paper, scale, shlex.join([*RUN.split(), *argv]))
    outcome = execute(titles, settings, out, speaker(), args.until)
    if is_leader() and outcome.files:
        show_outcome(outcome.scores, outcome.files)
    return 0


def general_help() -> str:
    """Text of `--help`: what exists and the shape of a command."""
    lines = [
        f"usage: {RUN} --paper NAME [--scale NAME] [key=value ...]",
        "",
        *_papers(),
        "",
        "corpora, data=NAME data.root=DIR (how to get them: --paper help)",
        *columns({name: corpus.about for name, corpus in corpora().items()}),
    ]
    lines += ["", GRAMMAR, "", "options"]
    options = {
        "--scale NAME": "size of the experiment, or the path of a YAML (default: tiny)",
        "--out DIR": "run folder (default: runs/<paper>-<scale>-<key of its scores>)",
        "--print-config": "print the resolved config as YAML",
        "--dry-run": "print which stages would run and which would be reused (--json for programs)",
        "--until STAGE": "stop after a stage, e.g. encode",
        "--plan": "print what each training takes of its devices, and whether it fits "
        f"(--memory 80GiB, --days {DAYS:g}, --json)",
        "--paper NAME --help": "every setting of a paper: type, default, meaning",
    }
    lines += columns(options)
    lines += ["", "main settings"]
    rows = {row.key: row for row in describe(RunSettings)}
    lines += columns({k: f"{rows[k].help} [{rows[k].type}]" for k in MAIN_SETTINGS if k in rows})
    lines += ["", "examples"]
    lines += columns({f"{RUN} {words}": what for words, what in EXAMPLES})
    return "\n".join(lines)


def papers_help() -> str:
    """Text of `--paper help`: the papers and their scales, and the corpora and how to get them."""
    return "\n".join([*_papers(), "", "corpora, data=NAME data.root=DIR", *_corpora()])


def paper_help(paper: str, scale: str, config: RunSettings) -> str:
    """Text of `--paper NAME --help`: every setting with its type, value at this scale, meaning."""
    lines = [f"{paper}: {_about(paper)}", "", "scales"]
    lines += columns({name: _first(paper, name) for name in scales(paper)})
    lines += ["", "presets, written section=name"]
    presets = {section: ", ".join(names) for section, names in PAPERS[paper].PRESETS.items()}
    lines += columns(presets)
    lines += ["", f"settings, with their values at scale {scale}"]
    section = None
    for row in describe(config):
        if row.key.rpartition(".")[0] != section:
            section = row.key.rpartition(".")[0]
            lines.append("")
        lines += [f"  {row.key}={_value(row.default)}  [{row.type}]", f"      {row.help}"]
    return "\n".join(lines)


def printed(paper: str, config: RunSettings) -> str:
    """Text of `--print-config`: YAML, and as comments how it differs from the published scale."""
    text = to_yaml(config)
    if "paper" in scales(paper):
        rows = diff(config, load(paper, "paper"))
        text += f"# settings that differ from the scale paper: {len(rows)}\n"
        text += "".join(
            f"#   {r.key}: {_value(r.mine)} (paper: {_value(r.theirs)})\n" for r in rows
        )
    return text


def show_plan(stages: Sequence[Stage], store: Store, out: Path, as_json: bool) -> None:
    """Print which stages would run, which would be reused, and where."""
    rows = [
        {
            "stage": stage.name,
            "key": stage.key,
            "would": "run" if store.done(stage) is None else "reuse",
            "folder": str(store.folders[stage]),
        }
        for stage in stages
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0], box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        colour = "green" if row["would"] == "reuse" else "yellow"
        table.add_row(row["stage"], row["key"], Text(row["would"], colour), row["folder"])
    console().print(table)
    print(f"results would go to {out}")


def _papers() -> list[str]:
    lines = ["papers and their scales"]
    for paper in PAPERS:
        lines.append(f"  {paper}: {_about(paper)}")
        lines += [f"  {line}" for line in columns({s: _first(paper, s) for s in scales(paper)})]
    return lines


def _corpora() -> list[str]:
    lines = []
    for name, corpus in corpora().items():
        lines.append(f"  {name}: {corpus.about}")
        told = {n: getattr(corpus, n) for n in ("licence", "access", "download")}
        lines += [f"  {line}" for line in columns(told)]
    return lines


def _about(paper: str) -> str:
    return (PAPERS[paper].__doc__ or "").splitlines()[0]


def _first(paper: str, scale: str) -> str:
    return next(iter(header(paper, scale)), "")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
