"""One page of what papers claim and what was measured: `python -m experiments.report`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import Parser, command, speaker
from experiments.grid import make_runs, read_sweep, sweep_files, tuned
from experiments.points import collect
from experiments.settings import ConfigError

COMMAND = "python -m experiments.report"
SWEEPS = Path(__file__).parents[2] / "sweeps"
HELP = f"""Puts the runs of sweeps together on one page: pictures of the same prompts side by side,
every claim of the papers with its verdict, every table measured beside published. Nothing is
trained or sampled: sweeps of which no run is done are left out.

Without a FILE all sweeps of the project are looked for. Words are those with which the sweeps were
run (experiments.sweep FILE ... key=value). Results are known in the cache by what they are made of,
so it does not matter what made them: a sweep with any --out, agents of W&B, or single runs. A CSV
is a measured.csv that this command wrote: its page is made again, without pictures.

examples:
  {COMMAND} --out report
  {COMMAND} sweeps/paella_steps.yaml sweeps/muse_steps.yaml seeds=3 --out report
  {COMMAND} experiments/measured/tiny.csv --out report"""


def run(argv: Sequence[str]) -> None:
    """Write the page that the command line asks for.

    Raises:
        ConfigError: a wrong word or file, or sweeps of which nothing was run.
    """
    parser = Parser(COMMAND, HELP)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report"), help="default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=1, help="as of the sweeps")
    parser.add_argument("--draws", type=int, default=1, help="as of the sweeps")
    parser.add_argument("--tune", metavar="KEY", help="as of the sweeps that vary it")
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        return
    tables = [Path(word) for word in words if word.endswith(".csv") and "=" not in word]
    files, settings = sweep_files([word for word in words if Path(word) not in tables])
    from experiments.report.measured import Done, read_measured

    found = [done for path in tables for done in read_measured(path, SWEEPS)]
    sweeps = []
    for path in files or ([] if tables else sorted(SWEEPS.glob("*.yaml"))):
        sweep = read_sweep(path)
        try:
            made = make_runs(sweep, settings, None, seeds=args.seeds, draws=args.draws)
            sweeps.append((sweep, made[1]))
        except ConfigError as error:
            if files:
                raise ConfigError(f"{path}: {error}") from error
    if args.tune is not None and not any(r and args.tune in r[0].settings for _, r in sweeps):
        raise ConfigError(f"--tune {args.tune} is varied by none of these sweeps")
    for sweep, runs in sweeps:
        collect(runs)
        chosen = runs and args.tune in runs[0].settings
        found.append(Done(sweep, tuned(sweep, runs, args.tune) if chosen else runs))
    if not any(run.scores for done in found for run in done.runs):
        names = ", ".join(done.sweep.name for done in found[:2]) + ", ..." * (len(found) > 2)
        raise ConfigError(
            f"no run of {names} is done; run experiments.sweep first, with the same words"
        )
    from experiments.report.overview import write_overview

    say = speaker()
    for path in write_overview(found, args.out, shlex.join([*COMMAND.split(), *argv])):
        say(f"  {path}")


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
