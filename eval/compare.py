"""Results side by side, if they were made alike: `python -m eval.compare A.json B.json ...`."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from data.cached import differences
from experiments.cli import Parser, blame, command, console
from experiments.settings import ConfigError

COMMAND = "python -m eval.compare"
EPILOG = """Results that differ in n, list of prompts, reference, mode, crop, filter, size, features
or picture format are refused, and every difference is named; --force shows them marked.
Versions of libraries are no part of a protocol, but where they differ it is said."""
# of a score, what is measured; all else says how
MEASURED = ("value", "low", "high", "std", "scales", "reader_accuracy")
# of a protocol, what has no say in a number that is not said elsewhere in it
ASIDE = (
    *("name", "changed", "unknown", "features", "list.name", "list.n", "pictures.sizes"),
    *(f"reference.{name}" for name in ("name", "from", "sizes", "format", "captions", "left_out")),
)
FOLLOW = ("n", "subset_size", "reference")  # of a score, what follows from its protocol's n


def run(argv: Sequence[str]) -> None:
    """Print the table.

    Raises:
        ConfigError: no results, or such as do not compare.
    """
    parser = Parser(COMMAND, (__doc__ or "").splitlines()[0], EPILOG)
    parser.add_argument("results", nargs="*", type=Path, help="result.json, or its folder")
    parser.add_argument("--force", action="store_true", help="show what does not compare, marked")
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        return
    if words or len(args.results) < 2:
        raise ConfigError("name at least two results")
    found = {name: read(path) for name, path in titled(args.results).items()}
    names = [*found]
    marked = {
        name: [
            f"{key} is {short(a)} in {names[0]} and {short(b)} in {name}"
            for key, a, b in unlike(found[names[0]], found[name])
        ]
        for name in names[1:]
    }
    told = [line for lines in marked.values() for line in lines]
    if told and not args.force:
        raise ConfigError(f"these do not compare: {'; '.join(told)}; --force shows them, marked")
    show(found, marked)
    for line in told:
        print(f"does not compare: {line}")
    for name in names[1:]:
        for what, a, b in differences(found[names[0]]["versions"], found[name]["versions"]):
            print(f"note: {what} is {a} in {names[0]} and {b} in {name}")


def titled(paths: Sequence[Path]) -> dict[str, Path]:
    """Name results by the part of their paths in which they differ."""
    files = [path / "result.json" if path.is_dir() else path for path in paths]
    if len({*files}) < len(files):
        raise ConfigError("the same result is named twice")
    places = [os.path.abspath(f.parent if f.name == "result.json" else f) for f in files]
    base = os.path.commonpath([os.path.dirname(p) for p in places])
    return {os.path.relpath(p, base): f for p, f in zip(places, files, strict=True)}


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        ConfigError: there is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(blame(path, error, "is no result")) from error
    parts = ("scores", "protocol", "versions")
    if not isinstance(content, dict) or any(not isinstance(content.get(p), dict) for p in parts):
        raise ConfigError(f"{path} is no result of an evaluation: it lacks {', '.join(parts)}")
    return content


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return in which respects two results were not made alike, with both values of each."""
    found = differences(one["protocol"], other["protocol"])
    rows: list[tuple[str, Any, Any]] = [
        row for row in found if not any(within(row[0], name) for name in ASIDE)
    ]
    mine, theirs = (result["protocol"].get("features", {}) for result in (one, other))
    for score in [name for name in mine if name in theirs]:
        rows += differences(
            {"features": {score: mine[score]}}, {"features": {score: theirs[score]}}
        )
    follows = FOLLOW if rows else ()
    for name in [name for name in one["scores"] if name in other["scores"]]:
        a, b = (
            {k: v for k, v in result["scores"][name].items() if k not in (*MEASURED, *follows)}
            for result in (one, other)
        )
        rows += [(f"{name}: {key}", x, y) for key, x, y in differences(a, b)]
    return rows


def short(value: Any) -> str:
    """Show a value, of a hash its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def within(key: str, name: str) -> bool:
    """Say whether a dotted key is `name` or below it."""
    return key == name or key.startswith(f"{name}.")


def show(found: Mapping[str, Mapping[str, Any]], marked: Mapping[str, list[str]]) -> None:
    """Print a row per score and a column per result; a star marks what does not compare."""
    table = Table("score", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in found:
        table.add_column(f"{name} *" if marked.get(name) else name)
    for score in dict.fromkeys(s for result in found.values() for s in result["scores"]):
        table.add_row(score, *(cell(result["scores"].get(score)) for result in found.values()))
    console().print(table)


def cell(score: Mapping[str, Any] | None) -> str:
    """Say a score with its interval and n."""
    if score is None:
        return ""
    ends = ""
    if score.get("low") is not None:
        ends = f" ({score['low']:.4g} to {score['high']:.4g})"
    return f"{score['value']:.4g}{ends}, n {score.get('n', '?')}"


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
