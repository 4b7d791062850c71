"""Train, sample and score one paper: `python -m experiments.run --paper paella [key=value ...]`."""

import argparse
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.config import (
    RUNS,
    ConfigError,
    RunSettings,
    UserError,
    describe,
    diff,
    header,
    load,
    scales,
    stage_key,
    to_yaml,
)
from experiments.settings import pick
from experiments.store import Store, is_leader

COMMAND = "python -m experiments.run"
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


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (0, 1 failed, 2 refused, 130/143 interrupted)."""
    signals = Signals()
    try:
        return run(argv)
    except ConfigError as error:
        return _end(f"error: {error}", 2)
    except UserError as error:
        return _end(f"error: {error}", 1)
    except (KeyboardInterrupt, SystemExit):
        if signals.received is None:
            raise
        # Lightning turns a KeyboardInterrupt in its loops into exit code 1
        return _end("interrupted; the same command resumes", 128 + signals.received)
    finally:
        signals.restore()


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line; nothing was started.
        UserError: something the user can put right stopped the run.
    """
    args, overrides = parse(argv)
    if args.paper == "help":
        print(papers_help())
        return 0
    if args.paper is None:
        if args.help:
            print(general_help())
            return 0
        raise ConfigError(f"--paper is missing; it is one of {', '.join(RUNS)}")
    pick("--paper", args.paper, list(RUNS))
    config = load(args.paper, args.scale, overrides)
    if args.help:
        print(paper_help(args.paper, args.scale, config))
        return 0
    if args.print_config:
        print(printed(args.paper, config), end="")
        return 0
    scale = Path(args.scale).stem
    out = args.out or Path("runs") / f"{args.paper}-{scale}-{stage_key(config)[:8]}"
    if args.dry_run:
        show_plan(args.paper, config, out)
        return 0
    settle()
    from experiments import stages

    command = shlex.join([*COMMAND.split(), *argv])
    outcome = stages.run(args.paper, scale, config, out, command=command, say=speaker())
    if is_leader():
        show_outcome(outcome.scores, outcome.files)
    return 0


class Parser(argparse.ArgumentParser):
    """Reports a wrong word as a ConfigError: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into options and `key=value` words, in any order."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--paper")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--out", type=Path)
    for flag in ("--print-config", "--dry-run"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    args, words = parser.parse_known_args(argv)
    options = [o for action in parser._actions for o in action.option_strings]
    for word in words:
        if word.startswith("-") and "=" not in word:
            pick("option", word, options)
    return args, words


class Signals:
    """Turns SIGINT and SIGTERM into a KeyboardInterrupt and remembers which it was."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.received: int | None = None
        self.process = os.getpid()
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupt at the first signal, end at once at the second."""
        # data workers inherit the handler with the fork; they just end
        if os.getpid() != self.process or self.received is not None:
            os._exit(128 + number)
        self.received = number
        raise KeyboardInterrupt

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def general_help() -> str:
    """Text of `--help`: what exists and the shape of a command."""
    lines = [f"usage: {COMMAND} --paper NAME [--scale NAME] [key=value ...]", "", *_papers()]
    lines += ["", "options"]
    options = {
        "--scale NAME": "size of the experiment, or the path of a YAML (default: tiny)",
        "--out DIR": "run folder (default: runs/<paper>-<scale>-<hash of the config>)",
        "--print-config": "print the resolved config as YAML",
        "--dry-run": "print which stages would run and which would be reused",
        "--paper NAME --help": "every setting of a paper: type, default, meaning",
    }
    lines += _columns(options)
    lines += ["", "main settings, written key=value or --key=value anywhere on the line"]
    rows = {row.key: row for row in describe(RunSettings)}
    lines += _columns({k: f"{rows[k].help} [{rows[k].type}]" for k in MAIN_SETTINGS if k in rows})
    lines += ["", "examples"]
    lines += _columns({f"{COMMAND} {words}": what for words, what in EXAMPLES})
    return "\n".join(lines)


def papers_help() -> str:
    """Text of `--paper help`: the papers and their scales."""
    return "\n".join(_papers())


def paper_help(paper: str, scale: str, config: RunSettings) -> str:
    """Text of `--paper NAME --help`: every setting with its type, value at this scale, meaning."""
    lines = [f"{paper}: {_about(paper)}", "", "scales"]
    lines += _columns({name: _first(paper, name) for name in scales(paper)})
    lines += ["", "presets, written section=name"]
    presets = {section: ", ".join(names) for section, names in RUNS[paper].PRESETS.items()}
    lines += _columns(presets)
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


def show_plan(paper: str, config: RunSettings, out: Path) -> None:
    """Print which stages would run, which would be reused, and where."""
    from experiments import stages

    store = Store(config.cache)
    table = Table(
        "stage", "key", "would", "folder", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for stage in stages.plan(paper, config):
        reuse = store.done(stage) is not None
        would = Text("reuse", "green") if reuse else Text("run", "yellow")
        table.add_row(stage.name, stage.key, would, str(store.folder(stage)))
    console().print(table)
    print(f"results would go to {out}")


def show_outcome(scores: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Print the scores and the paths of what was made.

    Args:
        scores: name -> number, or a mapping with value and maybe low, high and n.
        files: name -> path.
    """
    table = Table(
        "score", "value", "95 % interval", "n", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for name, score in scores.items():
        row = score if isinstance(score, Mapping) else {"value": score}
        interval = f"{row['low']:.4g} to {row['high']:.4g}" if row.get("low") is not None else ""
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown, interval, str(row.get("n", "")))
    console().print(table)
    print("\n".join(_columns({name: str(path) for name, path in files.items()})))


def speaker() -> Callable[[str], None]:
    """Return the function that prints one line of progress; silent on all ranks but 0."""
    if not is_leader():
        return lambda line: None
    screen = console()

    def say(line: str) -> None:
        text = Text(line)
        text.highlight_regex(r"^\[\d+/\d+\] [\w ]+:?", "bold")
        text.highlight_regex(r"\breused\b", "green")
        screen.print(text, soft_wrap=True)

    return say


def settle() -> None:
    """Make ready for work: swift on a CPU, and Lightning's remarks and hints off the screen."""
    # threads that wait for each other should not do so by spinning for long: beside any other
    # process a training on all cores would crawl
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch  # seconds of start-up, after all that can be refused

    # a GELU's far tail is full of numbers below 1e-38, with which a CPU is six times slower; here,
    # before torch makes its threads, which take this over
    torch.set_flush_denormal(True)
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def console() -> Console:
    """Make a console that cuts nothing off when its output goes to a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _end(line: str, code: int) -> int:
    if is_leader():
        print(line, file=sys.stderr)
    return code


def _papers() -> list[str]:
    lines = ["papers and their scales"]
    for paper in RUNS:
        lines.append(f"  {paper}: {_about(paper)}")
        lines += [f"  {line}" for line in _columns({s: _first(paper, s) for s in scales(paper)})]
    return lines


def _about(paper: str) -> str:
    return (RUNS[paper].__doc__ or "").splitlines()[0]


def _first(paper: str, scale: str) -> str:
    return next(iter(header(paper, scale)), "")


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max((len(key) for key in rows), default=0)
    return [f"  {key:<{width}}  {text}".rstrip() for key, text in rows.items()]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
