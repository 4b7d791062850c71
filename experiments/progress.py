"""Progress of long work: one line that says how far it is and how long it will still take."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
