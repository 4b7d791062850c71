"""What every command shares: errors in one line, signals, the console, the grammar of its words."""

import argparse
import logging
import os
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

from experiments.pipeline.ranks import is_leader
from experiments.settings import ConfigError, UserError, pick

RUN = "python -m experiments.run"
GRAMMAR = """options: --name value, --name=value or name=value; settings: key=value or --key=value,
anywhere on the line."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong word as a ConfigError: one line, no usage.

    An option with a value may also be written name=value, so that settings and options share one
    form. Words that are no options are `key=value` settings, anywhere on the line.
    """

    def __init__(self, command: str, description: str = "", epilog: str = "") -> None:
        super().__init__(
            prog=command,
            description=description,
            epilog=f"{GRAMMAR}\n\n{epilog}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument("--help", "-h", action="store_true", help="this text")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with name=value read as --name=value."""
        words = sys.argv[1:] if args is None else args
        takes = {o for a in self._actions if a.nargs != 0 for o in a.option_strings}
        dashed = [
            f"--{word}"
            if f"--{word.partition('=')[0]}" in takes
            and "=" in word
            # a word behind an option is its value, whatever it looks like
            and before not in takes
            else word
            for before, word in zip(["", *words], words, strict=False)
        ]
        return super().parse_known_args(dashed, namespace)

    def split(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Split a command line into its options and the other words.

        Raises:
            ConfigError: an unknown option; names the nearest.
        """
        args, words = self.parse_known_args(argv)
        options = [o for action in self._actions for o in action.option_strings]
        for word in words:
            if word.startswith("-") and "=" not in word:
                pick("option", word, options)
        return args, words


def parse_run(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the words of `RUN`, which runs of a sweep have too, into options and settings."""
    parser = Parser(RUN)
    parser.add_argument("--paper")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--until")
    parser.add_argument("--memory")
    parser.add_argument("--days", type=float)
    for flag in ("--print-config", "--dry-run", "--plan", "--json"):
        parser.add_argument(flag, action="store_true")
    return parser.split(argv)


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


def command(
    run: Callable[[Sequence[str]], int | None],
    argv: Sequence[str],
    interrupted: str = "interrupted; the same command resumes",
) -> int:
    """Run a command; errors that a person can put right become one line.

    Args:
        run: does what the words ask for; returns an exit code, or None for 0.
        argv: the words.
        interrupted: what is said after Ctrl-C or SIGTERM.

    Returns:
        The exit code: 0, 1 failed, 2 refused, 130 or 143 interrupted, 141 nobody reads any more.
    """
    signals = Signals()
    try:
        code = run(argv) or 0
        sys.stdout.flush()  # a reader that has left is noticed here at the latest
        return code
    except BaseException as error:
        if signals.received is not None:
            # whatever it became on its way: Lightning makes an exit of it, a writer its own error
            return _end(interrupted, 128 + signals.received)
        return _told(error)
    finally:
        signals.restore()


def _told(error: BaseException) -> int:
    """Say an error that a person can put right; raise any other again."""
    if isinstance(error, BrokenPipeError):  # an OSError, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 128 + signal.SIGPIPE
    if isinstance(error, UserError):
        return _end(f"error: {error}", 2 if isinstance(error, ConfigError) else 1)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return _end(f"error: {error.filename}: {error.strerror}", 1)
    raise error


def _end(line: str, code: int) -> int:
    if is_leader():
        print(line, file=sys.stderr)
    return code


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def blame(file: Path, error: BaseException, what: str = "") -> str:
    """Say in one line what is wrong with a file, and its name once: "FILE WHAT: REASON"."""
    known = isinstance(error, OSError) and error.strerror
    reason = str(known or first_line(error))
    return reason if str(file) in reason else f"{file} {what}".rstrip() + f": {reason}"


def counted(number: int, noun: str) -> str:
    """Say a number of things: "1 picture", "2 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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


class _Console(Console):
    """Leaves it to the command what follows when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Make a console that cuts nothing off when its output goes to a file."""
    return _Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def columns(rows: Mapping[str, str]) -> list[str]:
    """Lay names and texts out in two columns."""
    width = max((len(key) for key in rows), default=0)
    return [f"  {key:<{width}}  {text}".rstrip() for key, text in rows.items()]


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
    print("\n".join(columns({name: str(path) for name, path in files.items()})))


def prepare_torch() -> None:
    """Make torch swift on a CPU, and keep Lightning's remarks and hints off the screen."""
    # threads that wait for each other should not do so by spinning for long: beside any other
    # process a training on all cores would crawl
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # seconds of start-up, after all that can be refused
    from lightning_modules.common.processor import prepare_cpu

    prepare_cpu()
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
