"""Progress of long work: one line that says how far it is and how long it will still take."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Log = Callable[[str], None]


class Counter:
    """Shows done of total with the time left: a bar on a terminal, else a line now and then.

    Args:
        what: what is counted.
        total: how many there are.
        log: gets the plain lines.
        style: auto (rich on a terminal, else plain), rich, plain or none.
        done: how many were done before this run.
        every: seconds between two plain lines.
    """

    def __init__(
        self, what: str, total: int, log: Log, style: str = "auto", done: int = 0, every: float = 15
    ) -> None:
        rich = style == "rich" or (style == "auto" and sys.stdout.isatty())
        self.what, self.total, self.log, self.style = what, total, log, style
        self.done, self.first, self.every = done, done, every
        self.began = self.last = time.monotonic()
        self.bar: Progress | None = None
        if rich:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn("{task.description}"), *columns, transient=True)
            self.task = self.bar.add_task(what, total=total, completed=done)
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Note that `done` of the total are done."""
        self.done = done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{self.what}  {note}")
        elif self.style != "none" and (now - self.last >= self.every):
            self.last = now
            rate = (done - self.first) / (now - self.began)
            left = f", {clock((self.total - done) / rate)} left" if rate else ""
            tail = f", {note}" if note else ""
            self.log(f"      {self.what} {done}/{self.total}{left}{tail}")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


class Board:
    """Shows the points of a sweep as they end: a live table on a terminal, else a line each.

    Args:
        what: name of the sweep.
        total: number of its points.
        done: how many were done before.
        log: gets the lines, where there is no terminal.
        screen: the terminal; None for lines.
    """

    SHOWN = 15  # points that the table holds, the last ones

    def __init__(
        self, what: str, total: int, done: int, log: Log, screen: Console | None = None
    ) -> None:
        self.what, self.total, self.first, self.done, self.log = what, total, done, done, log
        self.began = time.monotonic()
        self.rows: list[tuple[str, str, str]] = []
        self.live = None if screen is None else Live(self.table(), console=screen)

    def __enter__(self) -> "Board":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def add(self, point: str, state: str, score: str) -> None:
        """Note that a point has ended, how, and its score, empty where it has none."""
        self.done += 1
        self.rows.append((point, state, score))
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            return
        tail = "".join(f", {text}" for text in (score, self.left()) if text)
        self.log(f"[{self.done}/{self.total}] {self.what}: {point}: {state}{tail}")

    def left(self) -> str:
        """Say how long the points that are left will take, by the time of those that ended."""
        ended, rest = self.done - self.first, self.total - self.done
        if not ended or not rest:
            return ""
        return f"about {clock((time.monotonic() - self.began) / ended * rest)} left"

    def table(self) -> Group:
        """Lay out the last points, above how many have ended and the time left."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for row in self.rows[-self.SHOWN :]:
            table.add_row(*map(Text, row))
        told = filter(None, [f"{self.what}: {self.done} of {self.total}", self.left()])
        return Group(table, Text(", ".join(told)))


@contextmanager
def waiting(what: str, log: Log, style: str = "auto", every: float = 15) -> Iterator[None]:
    """Say every so many seconds that a piece of work, whose end nobody knows, goes on."""
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(every):
            log(f"      {what}, {clock(time.monotonic() - began)} so far")

    thread = threading.Thread(target=tell, daemon=True)
    if style != "none":
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def clock(seconds: float) -> str:
    """Return minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
