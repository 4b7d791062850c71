"""Every point of a sweep: `python -m experiments.sweep FILE`.

The file is the one that a W&B agent runs (`wandb sweep FILE`, `wandb agent ID`); no account is
needed here. Stages whose results exist are shared, so sixteen ways of sampling train once, and
runs that are finished are not repeated. Any number of these commands may share a folder: a point
is done by whoever claims it first.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from experiments.cli import Parser, command, console, prepare_torch, speaker
from experiments.grid import (
    PROGRAM,
    SEEDS,
    Sweep,
    SweepRun,
    finished,
    make_runs,
    read_sweep,
    sweep_files,
    tuned,
)
from experiments.pipeline.ranks import is_leader
from experiments.points import collect, do_runs, supervise
from experiments.settings import ConfigError

if TYPE_CHECKING:
    from experiments.report.tables import Summary

COMMAND = "python -m experiments.sweep"

EPILOG = f"""settings: key=value words hold for every run and win over the file.

examples:
  {COMMAND} sweeps/paella_steps.yaml
  {COMMAND} sweeps/ldmae_autoencoders.yaml sweeps/ldmae_losses.yaml
  {COMMAND} sweeps/paella_steps.yaml seeds=3 --jobs 2
  {COMMAND} sweeps/samplers_muse.yaml draws=4 tune=sampling.sampler.temperature
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
    files, settings = sweep_files(words)
    if not files:
        raise ConfigError("name a sweep file, e.g. sweeps/paella_steps.yaml")
    given = {"paper": args.paper, "scale": args.scale}
    settings += [f"--{name}={value}" for name, value in given.items() if value is not None]
    for name in ("out", "index"):
        if getattr(args, name) is not None and len(files) > 1:
            raise ConfigError(f"--{name} belongs to one sweep; give one file")
    for name in ("jobs", "seeds", "draws", "runs"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, got {number}")
    grids = [grid(path, settings, args) for path in files]  # all checked before any work
    for path, (sweep, _, runs) in zip(files, grids, strict=True):
        if args.tune is not None:
            check_tuning(path, sweep, runs, args)
    if args.index is not None and not 0 <= args.index < len(grids[0][2]):
        raise ConfigError(f"--index must be 0 to {len(grids[0][2]) - 1}, got {args.index}")
    if args.dry_run:
        for sweep, out, runs in grids:
            print(f"{sweep.name}: {len(runs)} runs into {out}")
            for number, run in enumerate(runs):
                state = "finished" if finished(run) else "to do"
                print(f"  {number:3} {state}  {PROGRAM} {shlex.join(run.argv)}")
        return 0
    say = speaker()
    failed = 0
    for path, (sweep, out, runs) in zip(files, grids, strict=True):
        if args.jobs > 1 and args.index is None:
            own = [word for word in argv if Path(word) not in files]
            # the last word of a kind wins
            one = [str(path), *own, "--jobs=1", f"--out={out}"]
            screen = console() if sys.stdout.isatty() else None
            supervise(sweep, runs, one, args.jobs, say, screen)
        else:
            prepare_torch()
            first = [run for run in runs if args.tune is None or run.repeat == 0]
            do_runs(sweep, first, say, args.index)
            if args.tune is not None:
                collect(first)
                do_runs(sweep, tuned(sweep, runs, args.tune), say)
        if args.tune is not None:
            collect(runs)
            runs = tuned(sweep, runs, args.tune)
        failed += report(sweep, runs, out, shlex.join([*COMMAND.split(), *argv]))
    return 1 if failed else 0


def check_tuning(
    path: Path, sweep: Sweep, runs: Sequence[SweepRun], args: argparse.Namespace
) -> None:
    """Check that a setting can be tuned before its best value is measured again.

    Raises:
        ConfigError: it is not varied, or nothing would be measured again, or nothing says what is
            best.
    """
    if args.tune not in runs[0].settings:
        varied = ", ".join(k for k in runs[0].settings if k not in SEEDS) or "nothing"
        raise ConfigError(f"{path}: --tune {args.tune} is not varied; it varies {varied}")
    if args.seeds * args.draws == 1:
        raise ConfigError("--tune measures the best value with other seeds: give draws=3 or so")
    if sweep.metric is None:
        raise ConfigError(f"{path}: --tune needs the sweep's metric, which says what is best")
    if args.index is not None:
        raise ConfigError("--tune needs all first runs at once: give no --index")


def report(sweep: Sweep, runs: Sequence[SweepRun], out: Path, typed: str) -> int:
    """Write and print the tables of a sweep; returns how many runs failed."""
    from experiments.report.published import all_published
    from experiments.report.tables import summarize, write_sweep

    if is_leader():
        collect(runs)
        published = all_published().of_sweep(sweep.name)
        made = write_sweep(sweep, runs, out, typed, published)
        show(sweep, summarize(sweep, runs, published), made)
    return sum(run.error is not None for run in runs)


def grid(
    path: Path, words: Sequence[str], args: argparse.Namespace
) -> tuple[Sweep, Path, list[SweepRun]]:
    """Read and check one sweep file; errors name it."""
    sweep = read_sweep(path)
    more = {
        "seeds": args.seeds,
        "draws": args.draws,
        "count": args.runs,
        "draw_seed": args.draw_seed,
    }
    try:
        return sweep, *make_runs(sweep, words, args.out, **more)
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
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="K",
        help="processes that do runs side by side; one whose training is in work waits for it",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="K",
        help="do every run K times, each time with other seeds of training and sampling",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=1,
        metavar="K",
        help="sample every training K times, each time with other sampling seeds",
    )
    parser.add_argument(
        "--tune",
        metavar="KEY",
        help="repeat, of the values of this setting, only the one that is best by the sweep's "
        "metric with the first seed, for each combination of the others",
    )
    parser.add_argument("--runs", type=int, metavar="N", help="runs of a random sweep")
    parser.add_argument(
        "--draw-seed", type=int, default=0, metavar="N", help="seed of a random sweep's runs"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their state")
    return parser


def show(sweep: Sweep, summary: "Summary", files: Sequence[Path]) -> None:
    """Print the tables, what was published, and the paths of what was made."""
    print(f"\n{sweep.name}: scores with their 95 % intervals")
    for table in summary.tables:
        print(f"\n{table.title}")
        made = Table(*table.heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for row in table.rows:
            made.add_row(*row)
        console().print(made)
    print("\n".join([*summary.notes, *summary.sources, "", *(f"  {path}" for path in files)]))


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
