"""The CSV of all that was measured: what is written is read back, and the page comes from it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.cli import command
from experiments.grid import make_runs, read_sweep
from experiments.report import __main__ as report
from experiments.report.measured import (
    HEADS,
    Done,
    _bits,
    _hexadecimal,
    measured_csv,
    read_measured,
)

SWEEPS = Path(__file__).parents[3] / "sweeps"


def measured(name: str, *words: str, draws: int = 1) -> Done:
    sweep = read_sweep(SWEEPS / f"{name}.yaml")
    _, runs = make_runs(sweep, [*words, "cache=/elsewhere"], None, draws=draws)
    for n, run in enumerate(runs[:-1]):  # one of them is not done
        accuracy = {"value": (50 + n) / 100, "low": 0.25, "high": 1.0, "n": 6}
        run.scores = {"eval/scene_accuracy": accuracy, "eval/network_calls": {"value": 4.0}}
        run.right = {"eval": {(i,): i % (n + 2) == 0 for i in range(6)}}
    return Done(sweep, runs)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    whole = [measured("paella_steps", "eval.heldout=0", draws=2), measured("muse_steps")]
    path = tmp_path / "m.csv"
    path.write_text(measured_csv(whole))
    assert "/elsewhere" not in path.read_text()
    for before, after in zip(whole, read_measured(path, SWEEPS), strict=True):
        assert after.sweep == before.sweep
        for a, b in zip(before.runs, after.runs, strict=True):
            assert (a.settings, a.scores, a.right) == (b.settings, b.scores, b.right)
            assert (a.repeat, a.config.eval.heldout) == (b.repeat, b.config.eval.heldout)


def test_repetitions_that_were_not_done_change_no_names(tmp_path: Path) -> None:
    done = measured("paella_steps", draws=3)
    for run in done.runs:
        run.scores = run.scores if run.repeat == 0 else {}
    path = tmp_path / "m.csv"
    path.write_text(measured_csv([done]))
    (again,) = read_measured(path, SWEEPS)
    assert [bool(r.scores) for r in again.runs] == [bool(r.scores) for r in done.runs]


def test_parts_of_scores_stay_out() -> None:
    done = measured("paella_steps")
    done.runs[0].scores["eval/scene_accuracy/color"] = {"value": 0.25}
    assert "scene_accuracy/color" not in measured_csv([done])


def test_curves_are_kept() -> None:
    done = measured("ldmae_smoothness")
    for name in ("eval/rfd_scenes", "eval/rfd_scenes/noise=0.3", "eval/psnr/noise=0.1"):
        done.runs[0].scores[name] = {"value": 0.25}
    table = measured_csv([done])
    assert "eval/rfd_scenes/noise=0.3" in table and "eval/psnr/noise=0.1" in table


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back(bits: list[bool]) -> None:
    assert _bits(_hexadecimal(bits), len(bits)) == bits


def test_the_page_comes_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(measured_csv([measured("paella_steps")]))
    out = tmp_path / "out"
    assert command(report.run, [str(tmp_path / "m.csv"), "--out", str(out)]) == 0
    assert "paella_steps" in (out / "index.html").read_text()
    assert (out / "measured.csv").read_text() == (tmp_path / "m.csv").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no readable CSV"),
        ("a,b\n1,2\n", "the columns must be sweep"),
        ("none,paella,tiny,,x,1,,,\n", "no sweep file"),
        ("paella_steps,paella,tiny,sampling.steps=99,x,1,,,\n", "no run 'sampling.steps=99'"),
        ("paella_steps,paella,tiny,sampling.steps=4,x,much,,,\n", "paella_steps, x: could not"),
        ("paella_steps,paella,tiny,sampling.steps=4,right/eval,f,,,9\n", "fewer than 9 bits"),
        ("paella_steps,paella,tiny,,words,,1,many,\n", "high is a number of repetitions"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.csv"
    if text is not None:
        path.write_text(text if "\n1,2" in text else f"{','.join(HEADS)}\n{text}")
    assert command(report.run, [str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
