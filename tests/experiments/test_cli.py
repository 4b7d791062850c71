"""What every command shares: one line for errors, exit codes, signals, quiet ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import Parser, blame, columns, command, counted, first_line, speaker
from experiments.settings import ConfigError, UserError

ROOT = Path(__file__).parents[2]


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *argv]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def raising(error: BaseException):
    def run(argv: list[str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("seed: no"), 2), (UserError("the disk is full"), 1)]
)
def test_errors_are_one_line_and_a_code(error: Exception, code: int, capsys) -> None:
    assert command(raising(error), []) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_codes_of_what_ends_well() -> None:
    assert command(lambda argv: None, ["a"]) == 0
    assert command(lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_a_file_that_cannot_be_written_is_one_line(capsys) -> None:
    lost = PermissionError(13, "Permission denied", "a/b.png")
    assert command(raising(lost), []) == 1
    assert capsys.readouterr() == ("", "error: a/b.png: Permission denied\n")


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        command(raising(ZeroDivisionError()), [])
    with pytest.raises(SystemExit):  # without a signal it is no interruption
        command(raising(SystemExit(1)), [])


INTERRUPTED = """
import os, sys, time
from experiments.cli import command

def run(argv):
    try:
        os.kill(os.getpid(), int(argv[0]))
        time.sleep(30)
    except KeyboardInterrupt:
        if argv[1] == "lightning":
            sys.exit(1)
        if argv[1] == "twice":
            os.kill(os.getpid(), int(argv[0]))
            time.sleep(30)
        raise

sys.exit(command(run, sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("how", ["plain", "lightning", "twice"])
def test_interrupted(number: int, code: int, how: str, tmp_path: Path) -> None:
    done = python("-c", INTERRUPTED, str(number), how, cwd=tmp_path)
    assert done.returncode == code
    # the second signal ends it at once
    said = "" if how == "twice" else "interrupted; the same command resumes\n"
    assert (done.stdout, done.stderr) == ("", said)


def test_handlers_are_put_back() -> None:
    import signal

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    command(lambda argv: 0, [])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_rank_0_prints(name: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    speaker()("[1/2] train: runs")
    assert command(raising(ConfigError("no")), []) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(name, "0")
    speaker()("[1/2] train: runs")
    assert capsys.readouterr().out == "[1/2] train: runs\n"


def test_lines_are_not_broken(capsys) -> None:
    line = "[1/2] train: runs in " + "/a-long-folder" * 30
    speaker()(line)
    assert capsys.readouterr().out == line + "\n"


def test_options_are_written_as_settings_are() -> None:
    parser = Parser("x")
    parser.add_argument("--scale")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--flag", action="store_true")
    for written in (["--scale", "micro"], ["--scale=micro"], ["scale=micro"]):
        args, words = parser.split(["seed=1", *written, "--flag"])
        assert (args.scale, args.flag, words) == ("micro", True, ["seed=1"])
    args, words = parser.split(
        ["--prompt", "scale=two", "prompt=a=b", "flag=1", "scale=b", "scale=c"]
    )
    assert (args.prompt, args.scale, words) == (["scale=two", "a=b"], "c", ["flag=1"])
    assert "--name=value or name=value" in parser.format_help()


def test_settings_and_options_in_any_order() -> None:
    parser = Parser("x")
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--out")
    args, words = parser.split(["a=1", "--flag", "--b.c=2", "--out=there"])
    assert (args.flag, args.out, words) == (True, "there", ["a=1", "--b.c=2"])
    for argv, said in (
        (["--flga"], "did you mean --flag?"),
        (["--out"], "expected one argument"),
        (["--fl"], "did you mean --flag?"),  # no abbreviations
    ):
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            parser.split(argv)


@pytest.mark.parametrize("words", ["run --help", "run --paper paella --dry-run", "sample --help"])
def test_a_reader_that_leaves_gets_no_traceback(words: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m experiments.{words} | true; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_texts() -> None:
    assert counted(1, "picture") == "1 picture" and counted(0, "picture") == "0 pictures"
    lost = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert blame(Path("a.txt"), lost) == "a.txt: No such file or directory"
    assert blame(Path("a.pt"), ValueError("x"), "is odd") == "a.pt is odd: x"
    assert blame(Path("a.pt"), ValueError("a.pt lacks x"), "is odd") == "a.pt lacks x"
    assert columns({"a": "one", "long": "two", "b": ""}) == ["  a     one", "  long  two", "  b"]
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"


LIGHT = """
import sys
from experiments import {names}
from experiments.cli import command
for module, argv, code in {calls}:
    found = command(vars()[module].run, argv)
    assert found == code, (module, argv, found)
heavy = {{"torch", "lightning", "transformers", "wandb", "webdataset"}} & set(sys.modules)
assert not heavy, heavy
"""
MICRO = ["--paper", "paella", "--scale", "micro"]
SWEEP = str(ROOT / "sweeps" / "paella_steps.yaml")
CALLS = [
    ("run", ["--help"], 0),
    ("run", ["--paper", "help"], 0),
    ("run", [*MICRO, "--help"], 0),
    ("run", [*MICRO, "--print-config"], 0),
    ("run", [*MICRO, "--dry-run", "--json"], 0),
    ("run", ["--paper", "muse", "--scale", "micro", "--dry-run"], 0),
    ("run", ["--paper", "ldmae", "--scale", "micro", "--dry-run"], 0),
    ("run", [*MICRO, "sampling.step=3"], 2),
    ("run", [*MICRO, "--dry-run", "--until", "trian"], 2),
    ("run", [*MICRO, "--dry-run", "data.shards=none/{0..3}.tar"], 2),
    ("sweep", ["--help"], 0),
    ("sweep", [SWEEP, "--dry-run"], 0),
    ("sweep", [SWEEP, "sampling.step=3"], 2),
    ("store", ["--help"], 0),
    ("store", ["ls"], 2),
    ("sample", ["--help"], 0),
    ("sample", ["--prompt", "a"], 2),
    ("sample", ["--ckpt", "none", "--prommpt", "a"], 2),
    ("average", ["--help"], 0),
    ("convert", ["--help"], 0),
    ("convert", ["--paper", "muze"], 2),
    ("convert", ["--paper", "muse", "--from", "x", "--out", "y", "model.layerz=3"], 2),
    ("run", [*MICRO, "seed=18446744073709551617"], 2),
    ("run", [*MICRO, "eval.seed=18446744073709551617"], 2),
    ("run", [*MICRO, "data.seed=18446744073709551617"], 2),
    ("sample", ["--ckpt", "none", "--prompt", "a", "--seed", "18446744073709551617"], 2),
    ("average", ["--out", "x"], 2),
]


def test_help_and_mistakes_import_nothing_heavy(tmp_path: Path) -> None:
    names = ", ".join(dict.fromkeys(module for module, _, _ in CALLS))
    done = python("-c", LIGHT.format(names=names, calls=CALLS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_that_became_another_error_is_one_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(argv: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:  # as a writer of zip files does, which ends in the middle of an entry
            raise RuntimeError("unexpected position")

    assert command(run, []) == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes\n"
