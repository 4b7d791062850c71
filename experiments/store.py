"""What the store of stage results holds: `python -m experiments.store ls|rm|gc [--cache DIR]`."""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich import box
from rich.table import Table

from experiments.cli import Parser, command, console, counted
from experiments.settings import ConfigError, pick

COMMAND = "python -m experiments.store"
EPILOG = """commands:
  ls           every result with its size, when it was made, and the runs that use it
  rm NAME ...  delete results, by folder name or by stage name (all of that stage)
  gc           delete what no run needs: no run folder that is still there names it

A run that needs a deleted result makes it again. Nothing is deleted while a run is at work."""


@dataclass(frozen=True)
class Entry:
    """One stage folder."""

    folder: Path
    size: int
    """Bytes, of which links to the same file count in each folder."""
    when: str
    """When it was done; empty where it was interrupted."""
    runs: tuple[str, ...]
    """Run folders that were made of it and are still there."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.folder.name.rpartition("-")[0]

    @property
    def lock(self) -> FileLock:
        """The lock that a run holds while it works on the result."""
        return FileLock(lock_file(self.folder))


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word; nothing was deleted.
    """
    parser = Parser(COMMAND, (__doc__ or "").splitlines()[0], EPILOG)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="the store's folder")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    args, words = parser.split(argv)
    if args.help or not words:
        print(parser.format_help())
        return 0
    what, *names = words
    pick("command", what, ["ls", "rm", "gc"])
    if bool(names) != (what == "rm"):
        raise ConfigError("rm takes names of results; ls and gc take none")
    found = entries(args.cache)
    if what == "ls":
        show(found)
        return 0
    chosen = [e for e in found if not e.runs] if what == "gc" else named(found, names)
    check_idle(found)
    return delete(chosen, args.yes)


def entries(root: Path) -> list[Entry]:
    """List the results of a store.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"--cache {root}: there is no such folder")
    users: dict[str, list[str]] = {}
    for path in sorted((root / "runs").glob("*.json")):
        try:
            known = json.loads(path.read_text())
            out, stages = Path(known["out"]), list(map(str, known["stages"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is damaged: repeat the runs that used {root}, or delete the file"
            ) from error
        for name in stages if out.is_dir() else []:
            users.setdefault(name, []).append(str(out))
    found = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        marker: dict[str, Any] = {}
        if (folder / "done.json").is_file():
            with suppress(ValueError):  # a damaged one is no result
                marker = json.loads((folder / "done.json").read_text())
            marker = marker if isinstance(marker, dict) else {}
        elif not lock_file(folder).exists():
            continue  # no stage: classifiers, or the list of runs
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        runs = tuple(users.get(folder.name, []))
        found.append(Entry(folder, size, marker.get("when", ""), runs))
    return found


def lock_file(folder: Path) -> Path:
    """Return the file of a stage folder's lock, which stays beside it."""
    return folder.with_name(f".{folder.name}.lock")


def named(found: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """Return the results of some names.

    Raises:
        ConfigError: a name that nothing has; names the nearest.
    """
    known = [*(e.folder.name for e in found), *dict.fromkeys(e.stage for e in found)]
    for name in names:
        pick("rm", name, known)
    return [e for e in found if e.folder.name in names or e.stage in names]


def show(found: Sequence[Entry]) -> None:
    """Print a table."""
    heads = ("result", "size", "done", "runs")
    table = Table(*heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for entry in found:
        done = entry.when or "interrupted"
        table.add_row(entry.folder.name, size_text(entry.size), done, ", ".join(entry.runs) or "-")
    console().print(table)
    free = sum(e.size for e in found if not e.runs)
    total = size_text(sum(e.size for e in found))
    print(f"{counted(len(found), 'result')}, {total}; no run needs {size_text(free)} of them")


def check_idle(found: Sequence[Entry]) -> None:
    """Refuse to delete while a run is at work: it needs what it made, and no list names it yet.

    Raises:
        ConfigError: one of the results is locked.
    """
    for entry in found:
        try:
            with entry.lock.acquire(timeout=0):
                pass
        except Timeout as error:
            raise ConfigError(
                f"a run works on {entry.folder}; delete results when it has ended"
            ) from error


def delete(chosen: Sequence[Entry], sure: bool) -> int:
    """Delete results after asking; returns the exit code, 1 where nothing was deleted."""
    if not chosen:
        print("nothing to delete")
        return 0
    for entry in chosen:
        used = f", used by {', '.join(entry.runs)}" if entry.runs else ""
        print(f"  {entry.folder}  {size_text(entry.size)}{used}")
    total = size_text(sum(e.size for e in chosen))
    if not sure and not agreed(f"delete {counted(len(chosen), 'result')}, {total}? [y/N] "):
        print("nothing was deleted")
        return 1
    for entry in chosen:
        with entry.lock:
            (entry.folder / "done.json").unlink(missing_ok=True)  # first: no half result stands
            shutil.rmtree(entry.folder)
    return 0


def agreed(question: str) -> bool:
    """Ask; an input that has ended is a no."""
    try:
        return input(question).strip().lower() == "y"
    except EOFError:
        print()
        return False


def size_text(size: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
