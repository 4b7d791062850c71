"""The table of a sweep's points as they end."""

import io
from unittest.mock import patch

from rich.console import Console

from experiments.progress import Board


def test_lines_say_what_ended_and_how_long_the_rest_takes() -> None:
    lines: list[str] = []
    with patch("experiments.progress.time.monotonic", side_effect=[100.0, 160.0, 220.0]):
        with Board("s", 5, 2, lines.append) as board:  # two were done before, and cost no time here
            board.add("steps=1", "done", "eval/a 0.9")
            board.add("steps=2", "failed", "")
            board.add("steps=3", "done", "eval/a 0.8")
    assert lines == [
        "[3/5] s: steps=1: done, eval/a 0.9, about 2:00 left",
        "[4/5] s: steps=2: failed, about 1:00 left",
        "[5/5] s: steps=3: done, eval/a 0.8",
    ]


def test_a_terminal_gets_one_table_of_the_last_points() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=40)
    lines: list[str] = []
    with patch("experiments.progress.time.monotonic", return_value=100.0):
        with Board("s", 40, 0, lines.append, screen) as board:
            for n in range(20):
                board.add(f"steps={n}", "done", f"eval/a {n}")
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert not lines and "s: 20 of 40, about 0:00 left" in shown
    last = shown[shown.rindex("steps=5 ") :]
    assert "steps=19" in last and "eval/a 5" in last and "s: 20 of 40" in last
    assert last.count("steps=") == Board.SHOWN and len(board.rows) == 20
