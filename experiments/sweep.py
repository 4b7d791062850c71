"""Every combination of a sweep's settings, one after another: `python -m experiments.sweep FILE`.

The file is the one that a W&B agent runs (`wandb sweep FILE`, `wandb agent ID`); no account is
needed here. Stages whose results exist are shared, so sixteen ways of sampling train once, and
runs that are finished are not repeated.
"""

import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from data.files import write_text
from experiments.cli import RUN, Parser, command, console, first_line, prepare_torch, speaker
from experiments.grid import PROGRAM, Sweep, SweepRun, finished, make_runs, read_sweep
from experiments.pipeline.ranks import is_leader
from experiments.settings import ConfigError, UserError

if TYPE_CHECKING:
    from experiments.report.tables import Summary

COMMAND = "python -m experiments.sweep"

EPILOG = f"""settings: key=value words hold for every run and win over the file.

examples:
  {COMMAND} sweeps/paella_steps.yaml
  {COMMAND} sweeps/ldmae_autoencoders.yaml sweeps/ldmae_losses.yaml
  {COMMAND} sweeps/paella_steps.yaml eval.prompts=64 --dry-run

Writes table.csv, table.html and pictures into --out (default: runs/sweep-NAME), and every run into
a folder there. The same command resumes."""


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for; returns 0, or 1 where a run failed.

    Raises:
        ConfigError: a wrong word or file; nothing was started.
    """
    parser = make_parser()
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        return 0
    files = [Path(w) for w in words if w.endswith((".yaml", ".yml")) and "=" not in w]
    settings = [w for w in words if not (w.endswith((".yaml", ".yml")) and "=" not in w)]
    if not files:
        raise ConfigError("name a sweep file, e.g. sweeps/paella_steps.yaml")
    for word in settings:
        if "=" not in word:
            raise ConfigError(f"{word!r} is neither a sweep file nor a setting key=value")
    given = {"paper": args.paper, "scale": args.scale}
    settings += [f"--{name}={value}" for name, value in given.items() if value is not None]
    for name in ("out", "index"):
        if getattr(args, name) is not None and len(files) > 1:
            raise ConfigError(f"--{name} belongs to one sweep; give one file")
    grids = [grid(path, settings, args.out) for path in files]  # all checked before any work
    if args.index is not None and not 0 <= args.index < len(grids[0][2]):
        raise ConfigError(f"--index must be 0 to {len(grids[0][2]) - 1}, got {args.index}")
    if args.dry_run:
        for sweep, out, runs in grids:
            print(f"{sweep.name}: {len(runs)} runs into {out}")
            for number, run in enumerate(runs):
                state = "finished" if finished(run) else "to do"
                print(f"  {number:3} {state}  {PROGRAM} {shlex.join(run.argv)}")
        return 0
    prepare_torch()
    from experiments.report.published import all_published
    from experiments.report.tables import summarize, write_sweep

    say = speaker()
    failed = 0
    for sweep, out, runs in grids:
        do_runs(sweep, runs, say, args.index)
        if is_leader():
            published = all_published().of_sweep(sweep.name)
            typed = shlex.join([*COMMAND.split(), *argv])
            made = write_sweep(sweep, runs, out, typed, published)
            show(sweep, summarize(sweep, runs, published), made)
        failed += sum(run.error is not None for run in runs)
    return 1 if failed else 0


def grid(path: Path, words: Sequence[str], out: Path | None) -> tuple[Sweep, Path, list[SweepRun]]:
    """Read and check one sweep file; errors name it."""
    sweep = read_sweep(path)
    try:
        return sweep, *make_runs(sweep, words, out)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def make_parser() -> Parser:
    """Make the parser of all options; its help explains them."""
    parser = Parser(COMMAND, (__doc__ or "").splitlines()[0], EPILOG)
    parser.add_argument("--paper", metavar="NAME", help="in place of the file's paper")
    parser.add_argument("--scale", metavar="NAME", help="in place of the file's scale, e.g. micro")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--index",
        type=int,
        metavar="N",
        help="do run N alone, counted from 0 (a Slurm array: --index $SLURM_ARRAY_TASK_ID); the "
        "table shows all that are finished",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their state")
    return parser


def do_runs(
    sweep: Sweep, runs: Sequence[SweepRun], say: Callable[[str], None], only: int | None = None
) -> None:
    """Do every run that is not finished; one that fails is noted, and the next begins.

    Args:
        sweep: whose runs.
        runs: all of them; they receive their scores.
        say: gets one line per event.
        only: number of the run to do; None does all.
    """
    from experiments.pipeline.publish import Titles
    from experiments.pipeline.runner import execute
    from experiments.progress import clock

    last: float | None = None
    for number, run in enumerate(runs, 1):
        head = f"[{number}/{len(runs)}] {sweep.name}: {run.label}".rstrip(": ")
        if finished(run):
            say(f"{head}: finished, in {run.out}")
        elif only not in (None, number - 1):
            continue
        else:
            left = [p for p in runs[number - 1 :] if not finished(p)]
            # as the one before; the first of a sweep often trains what the others share
            guess = "" if last is None else f" (about {clock(last * len(left))} left in all)"
            say(f"{head}{guess}")
            start = time.monotonic()
            try:
                words = shlex.join([*RUN.split(), *run.argv])
                execute(
                    Titles(run.paper, run.scale, words),
                    run.config,
                    run.out,
                    lambda line: None if " reused from " in line else say(f"    {line}"),
                )
            except Exception as error:  # whatever it is, the other runs are not to blame
                known = isinstance(error, UserError)
                run.error = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
                say(f"    failed: {run.error}")
                if not known:
                    write_text(run.out / "error.txt", traceback.format_exc())
                    say(f"    the traceback is in {run.out / 'error.txt'}")
                continue
            last = time.monotonic() - start
        if is_leader():
            run.scores = json.loads((run.out / "metrics.json").read_text())


def show(sweep: Sweep, summary: "Summary", files: Sequence[Path]) -> None:
    """Print the tables, what was published, and the paths of what was made."""
    print(f"\n{sweep.name}: scores with their 95 % intervals")
    for number, table in enumerate(summary.tables):
        if number:
            print(f"\n{table.title}")
        made = Table(*table.heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for row in table.rows:
            made.add_row(*row)
        console().print(made)
    print("\n".join([*summary.notes, *summary.sources, "", *(f"  {path}" for path in files)]))


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
