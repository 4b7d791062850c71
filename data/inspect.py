"""Look at shards before training on them: `python -m data.inspect SHARDS`."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from data.config import DataConfig
from data.files import link, write_json
from experiments.cli import Parser, command, console, counted, prepare_torch, speaker
from experiments.pipeline.data import Data
from experiments.pipeline.ranks import RANKS, is_leader
from experiments.pipeline.stage import Log, Machine
from experiments.pipeline.store import Store
from experiments.pipeline.survey import Survey
from experiments.settings import ConfigError, override

COMMAND = "python -m data.inspect"
HELP = f"""Reads every sample of shards once and says what a person must know before a training.

SHARDS is a pattern as data.shards takes it; further words are settings of the data (data.min_size,
data.max_skipped, ...), whose filters are counted one by one. Exit code 1 where a run would stop.
What was read stays in --cache: the same command goes on where it was interrupted.

examples:
  {COMMAND} 'my/{{00000..00009}}.tar' --sheet sheet.png
  {COMMAND} --corpus cc3m --root DIR --limit 10000 --workers 8 data.min_size=256"""


def run(argv: Sequence[str]) -> int:
    """Look at the shards that the command line names; returns the exit code.

    Raises:
        ConfigError: a wrong word on the command line, or shards that are not there.
        UserError: the shards cannot be read.
    """
    args, words = parse(argv)
    if args.help:
        print(make_parser().format_help())
        return 0
    config = settings(args, words)
    data = Data(config, prompts=0, heldout=0, partial=0)
    splits = tuple(data.shards(split) for split in ("train", "val"))
    stage = Survey(splits, config.view(), config.max_skipped, args.limit)
    prepare_torch()
    from experiments.pipeline.runner import in_one_line

    store = Store(args.cache)
    # further processes take part as ranks of the same launch
    others = [_helper(argv, rank) for rank in range(1, args.workers)] if store.leader else []
    begun = time.monotonic()
    try:
        with in_one_line():
            reused = store.run([*splits, stage], Machine(), Log(speaker()))
    finally:
        for other in others:
            other.terminate()
            other.wait()
    if not store.leader:
        return 0
    folder = store.folders[stage]
    survey = json.loads((folder / "survey.json").read_text())
    if stage not in reused:
        survey["samples_per_second"] = round(survey["samples"] / (time.monotonic() - begun), 1)
    show(survey)
    if args.json:
        write_json(args.json, survey)
    if args.sheet and (folder / "sheet.png").exists():
        link(folder / "sheet.png", args.sheet)
        print(f"pictures: {args.sheet}")
    return 1 if survey["stops"] else 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into options and settings."""
    args, words = make_parser().split(argv)
    patterns = [word for word in words if "=" not in word.partition("/")[0]]
    args.shards = patterns
    if args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {args.workers}")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    return args, [word for word in words if word not in patterns]


def make_parser() -> Parser:
    """Make the parser of all options."""
    parser = Parser(COMMAND, HELP)
    add = parser.add_argument
    add("--corpus", help="a known corpus in place of SHARDS, see --paper help of experiments.run")
    add("--root", help="folder of the corpus")
    add("--limit", type=int, help="at most so many samples, of shards spread over all")
    add("--workers", type=int, default=1, help="processes that read (default: %(default)s)")
    add("--json", type=Path, help="write what was found as JSON")
    add("--sheet", type=Path, help="write a sheet of random pictures with their captions")
    add(
        "--cache",
        type=Path,
        default=Path("runs/cache"),
        help="keeps what was read (default: %(default)s)",
    )
    return parser


def settings(args: argparse.Namespace, words: Sequence[str]) -> DataConfig:
    """Return the settings of the data that the command line describes.

    Raises:
        ConfigError: neither shards nor a corpus, or both, or a wrong setting.
    """
    if bool(args.shards) == bool(args.corpus):
        raise ConfigError("give either SHARDS or --corpus NAME --root DIR; see --help")
    if args.root and not args.corpus:
        raise ConfigError("--root goes with --corpus NAME")
    if args.corpus:
        named = [f"data.name={args.corpus}", *([f"data.root={args.root}"] if args.root else [])]
    else:
        # a split of its own, so that nothing need be held out to look at it
        named = [f"data.{name}={','.join(args.shards)}" for name in ("shards", "val_shards")]
    return override(DataConfig(), [*named, *words], "data")


def show(survey: dict[str, Any]) -> None:
    """Print what was found."""
    screen = console()
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    shards = counted(survey["shards"], "shard")
    row("samples", f"{survey['samples']:,} in {shards}, {_size(survey['bytes'])} of pictures")
    for kind, fault in survey["faults"].items():
        row(f"fault: {kind}", f"{fault['count']:,}, {fault['example']}")
    if twice := survey["duplicate_keys"]["count"]:
        row("keys seen again", f"{twice:,}, {survey['duplicate_keys']['example']}")
    for name in ("width", "height", "caption_characters"):
        if survey[name]:
            row(name.replace("_", " "), ", ".join(f"{q} {n:,}" for q, n in survey[name].items()))
    total = max(1, survey["samples"])
    aspects = [f"{name}: {n / total:.1%}" for name, n in survey["aspect"].items() if n]
    if aspects:
        row("width by height", ", ".join(aspects))
    for name, share in survey["removed_by"].items():
        row(f"removed by {name}", f"{share:.1%}")
    if survey["removed_by"]:
        row("left", f"{survey['after_filters']:,}")
    if "samples_per_second" in survey:
        row("read", f"{survey['samples_per_second']:,} samples/s")
    screen.print(table)
    if survey["stops"]:
        screen.print(Text(f"a run would stop: {survey['stops']}", style="bold red"))


def _size(number: float) -> str:
    """Write bytes in the largest unit that leaves a number above 1."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = max(0, min(len(units) - 1, (len(str(int(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {units[power]}"


def _helper(argv: Sequence[str], rank: int) -> "subprocess.Popen[bytes]":
    ranks = dict.fromkeys(RANKS[:1], str(rank))
    return subprocess.Popen(
        [sys.executable, "-m", "data.inspect", *argv, "--workers", "1"],
        env={**os.environ, **ranks},
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    code = command(run, sys.argv[1:])
    sys.exit(code if is_leader() else 0)
