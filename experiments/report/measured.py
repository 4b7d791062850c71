"""Everything that was measured in one CSV, which holds enough to make the page again."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.agent import text_of
from experiments.grid import SEEDS, Sweep, SweepRun, make_runs, read_sweep
from experiments.report.scores import parent_of, scans
from experiments.settings import ConfigError

HEADS = ["sweep", "paper", "scale", "settings", "score", "value", "low", "high", "n"]
WORDS, RIGHT = "words", "right"
"""Rows that hold no score: settings that all runs of a sweep share besides its file's, with the
numbers of seeds and draws as low and high; and which prompts are right, four in a hexadecimal
digit, the first prompt in the highest bit."""
MACHINE = {"cache", "logger"}


class Done(NamedTuple):
    """A sweep with its runs, of which some may not be done."""

    sweep: Sweep
    runs: list[SweepRun]


def measured_csv(sweeps: Iterable[Done]) -> str:
    """Return a line for every score of every run, to six digits; of parts only curves."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(HEADS)
    for sweep, runs in sweeps:
        scored = [run for run in runs if run.scores]
        if scored:
            first = scored[0]
            shared = " ".join(shared_words(sweep, first))
            seeds, sampled = (len({run.settings.get(key) for run in runs}) for key in SEEDS)
            draws = sampled // seeds or 1  # without draws, no run names a sampling seed
            head = [sweep.name, first.paper, first.scale, ""]
            writer.writerow([*head, WORDS, shared, seeds, draws, ""])
        for run in scored:
            head = [sweep.name, run.paper, run.scale, _settings(run)]
            curves = {name for curve in scans(run.scores).values() for name in curve.values()}
            for name, score in run.scores.items():
                if name in curves or not parent_of(name, run.scores):
                    numbers = [score.get(key) for key in ("value", "low", "high")]
                    writer.writerow([*head, name, *map(_digits, numbers), score.get("n")])
            for prefix, places in run.right.items():
                bits = [places[key] for key in sorted(places)]
                if bits:
                    found = [f"{RIGHT}/{prefix}", _hexadecimal(bits), "", "", len(bits)]
                    writer.writerow([*head, *found])
    return lines.getvalue()


def read_measured(path: Path, folder: Path) -> list[Done]:
    """Read what `measured_csv` wrote; pictures are not in it.

    Args:
        path: the file.
        folder: of the sweep files.

    Raises:
        ConfigError: no such file, or one that does not fit the sweeps.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: no readable CSV: {error}") from error
    if list(reader.fieldnames or []) != HEADS:
        raise ConfigError(f"{path}: the columns must be {', '.join(HEADS)}")
    found = []
    for name in dict.fromkeys(row["sweep"] for row in rows):
        own = [row for row in rows if row["sweep"] == name]
        sweep = read_sweep(folder / f"{name}.yaml")
        words: list[str] = []
        repeats = {"seeds": 1, "draws": 1}
        for row in (row for row in own if row["score"] == WORDS):
            words, repeats = row["value"].split(), {"seeds": _whole(path, row, "low")}
            repeats["draws"] = _whole(path, row, "high")
        _, runs = make_runs(sweep, words, None, **repeats)
        by_settings = {_settings(run): run for run in runs}
        for row in own:
            if row["score"] != WORDS:
                run = by_settings.get(row["settings"])
                if run is None:
                    raise ConfigError(f"{path}: {sweep.name} has no run {row['settings']!r}")
                try:
                    _take(run, row)
                except ValueError as error:
                    raise ConfigError(f"{path}: {name}, {row['score']}: {error}") from error
        found.append(Done(sweep, runs))
    return found


def shared_words(sweep: Sweep, run: SweepRun) -> list[str]:
    """Return the words of a run that neither its sweep file nor its seeds or this machine gave."""
    own = {*sweep.forms, *SEEDS, *MACHINE}
    words = [word for word in run.argv if word not in sweep.words]
    return [word for word in words if word.removeprefix("--").partition("=")[0] not in own]


def _take(run: SweepRun, row: dict[str, str]) -> None:
    kind, _, prefix = row["score"].partition("/")
    if kind == RIGHT:
        run.right[prefix] = {(i,): ok for i, ok in enumerate(_bits(row["value"], int(row["n"])))}
        return
    score: dict[str, Any] = {k: float(row[k]) for k in ("value", "low", "high") if row[k]}
    run.scores[row["score"]] = {**score, **({"n": int(row["n"])} if row["n"] else {})}


def _settings(run: SweepRun) -> str:
    return " ".join(f"{k}={text_of(v)}" for k, v in run.settings.items())


def _whole(path: Path, row: dict[str, str], column: str) -> int:
    """Return a number of repetitions.

    Raises:
        ConfigError: it is none.
    """
    if not row[column].isdecimal() or not int(row[column]):
        raise ConfigError(
            f"{path}: {row['sweep']}, {WORDS}: {column} is a number of repetitions above 0, "
            f"got {row[column]!r}"
        )
    return int(row[column])


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _hexadecimal(bits: Sequence[bool]) -> str:
    padded = [*bits, *[False] * (-len(bits) % 4)]
    return f"{int(''.join(map(str, map(int, padded))), 2):0{len(padded) // 4}x}"


def _bits(text: str, count: int) -> list[bool]:
    bits = f"{int(text, 16):0{4 * len(text)}b}"
    if len(bits) < count:
        raise ValueError(f"{text!r} has fewer than {count} bits")
    return [bit == "1" for bit in bits[:count]]
