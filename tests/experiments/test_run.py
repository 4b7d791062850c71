"""The command that runs a paper: its words, its help, its plan, and what it hands on."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data.corpora import corpora
from experiments.cli import command, parse_run
from experiments.papers.registry import PAPERS, load, scales
from experiments.pipeline.plan import plan
from experiments.pipeline.publish import Outcome
from experiments.run import run
from experiments.settings import UserError

MICRO = ["--paper", "paella", "--scale", "micro"]


def main(argv: Sequence[str]) -> int:
    return command(run, argv)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stand in for the stages, so that nothing is trained."""
    monkeypatch.chdir(tmp_path)
    fake = SimpleNamespace(calls=[])

    def execute(titles, settings, out, say, until=None):
        fake.calls.append((titles, settings, out, until))
        say("[1/1] train: runs")
        return Outcome(
            {"eval/accuracy": {"value": 0.875, "low": 0.8, "high": 0.9, "n": 64}, "loss": 1},
            {"metrics.json": out / "metrics.json", "checkpoint": out / "generator.ckpt"},
        )

    fake.execute = execute
    monkeypatch.setattr("experiments.pipeline.runner.execute", lambda *a: fake.execute(*a))
    return fake


REFUSED = [
    (["--paper", "paela"], "; did you mean paella?"),
    (["--paper", "nothing"], "'nothing' is not one of vqgan, paella"),
    (["--paper"], "argument --paper: expected one argument"),
    ([], "--paper is missing; it is one of vqgan, paella"),
    (["--papr", "paella"], "option: '--papr' is not one of"),
    ([*MICRO, "--dry-rnu"], "did you mean --dry-run?"),
    (["--paper", "paella", "--scale", "tyni"], "--scale: 'tyni' is not one of micro, tiny, small"),
    (["--paper", "paella", "--scale", "none.yaml"], "--scale none.yaml: there is no such file"),
    ([*MICRO, "sampling.step=3"], "did you mean sampling.steps?"),
    ([*MICRO, "--trainer.max_step=3"], "did you mean trainer.max_steps?"),
    ([*MICRO, "trainer.max_steps=many"], "trainer.max_steps: expected int, got 'many'"),
    ([*MICRO, "sampling.steps=0"], "sampling.steps must be at least 1, got 0"),
    ([*MICRO, "data=digit"], "did you mean digits?"),
    ([*MICRO, "logger=wand"], "did you mean wandb?"),
    ([*MICRO, "data.resolution=33"], "data.resolution must be a multiple of 4, got 33"),
    ([*MICRO, "data.resolution=36"], "data.resolution must be a multiple of 8, got 36"),
    ([*MICRO, "sampling.steps"], "write key=value"),
    ([*MICRO, "--until", "trian"], "--until: 'trian' is not one of"),
    ([*MICRO, "--until", "trian"], "did you mean train?"),
    ([*MICRO, "--json"], "--json goes with --dry-run"),
    ([*MICRO, "--memory", "8GiB"], "--memory goes with --plan"),
    ([*MICRO, "--days", "2"], "--days goes with --plan"),
    ([*MICRO, "--plan", "--dry-run"], "--dry-run and --plan exclude each other"),
    (
        [*MICRO, "--plan", "--until", "train"],
        "--until goes with a run or --dry-run, not with --plan",
    ),
    ([*MICRO, "tokenizer.ckpt=none.safetensors"], "there is no file none.safetensors"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED)
def test_refused_in_one_line(argv: list[str], said: str, runs, capsys, tmp_path: Path):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err
    assert err.count("\n") == 1
    assert runs.calls == [] and list(tmp_path.iterdir()) == []


def test_exit_codes_of_the_command(tmp_path: Path):
    line = [sys.executable, "-m", "experiments.run", *MICRO, "sampling.step=3"]
    root = Path(__file__).parents[2]
    refused = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "sampling.steps" in refused.stderr


def test_help_says_what_exists(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (*PAPERS, *scales("paella"), "--print-config", "--dry-run", "data=digits", "--out"):
        assert word in out
    assert main(["--paper", "help"]) == 0
    listed = capsys.readouterr().out
    assert listed.partition("\ncorpora")[0].strip() in out
    for name, corpus in corpora().items():
        assert f"  {name} " in out and f"  {name}: {corpus.about}\n" in listed
        for told in (corpus.licence, corpus.access, corpus.download):
            assert told in listed
    assert re.search(r"micro +Smallest Paella that runs every stage", listed)


def test_help_of_a_paper_lists_every_setting(capsys):
    assert main([*MICRO, "--help", "sampling.steps=2"]) == 0
    out = capsys.readouterr().out
    assert "  sampling.steps=2  [int]\n      Number of sampling steps." in out
    assert "  trainer.max_steps=8  [int]" in out and "  tokenizer.ckpt=null  [str | null]" in out
    assert "  data.cache=true  [bool]" in out and "  tokenizer.model.ch_mult=[1,1,1]" in out


def test_print_config_is_yaml_with_the_difference_to_the_paper(capsys, tmp_path: Path):
    assert main([*MICRO, "--print-config", "sampling.steps=2"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["sampling"]["steps"] == 2
    assert "#   sampling.steps: 2 (paper: 12)\n" in out
    path = tmp_path / "again.yaml"
    path.write_text(out)
    assert load("paella", str(path)) == load("paella", "micro", ["sampling.steps=2"])


@pytest.mark.parametrize("paper", list(PAPERS))
def test_print_config_needs_no_file(paper: str, capsys, tmp_path: Path, monkeypatch):
    """The scale paper names files of others, with which the settings are compared all the same."""
    monkeypatch.chdir(tmp_path)
    assert main(["--paper", paper, "--scale", "micro", "--print-config"]) == 0
    assert "# settings that differ from the scale paper" in capsys.readouterr().out
    assert main(["--paper", paper, "--scale", "paper", "--help"]) == 0


@pytest.mark.parametrize(
    ("paper", "words", "named"),
    [
        ("paella", ["data=digits"], "tokenizer.ckpt=null"),
        ("ldmae", ["data=digits"], "autoencoder.ckpt=null"),
        ("paella", ["data=digits", "tokenizer.ckpt=null"], None),
        ("paella", [], None),
        ("vqgan", ["data=digits"], None),
    ],
)
def test_a_shipped_first_stage_under_other_pictures(paper, words, named, capsys):
    assert main(["--paper", paper, *words, "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (named is not None) and (named or "") in "".join(notes)


def test_until_does_no_more_and_a_dry_run_tells(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*MICRO, "cache=results", "logger=csv"]
    stages = plan("paella", load("paella", "micro", words[4:])).stages

    def dry(*more: str) -> list[dict]:
        assert main([*words, "--dry-run", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    rows = dry()
    assert [(r["stage"], r["key"]) for r in rows] == [(s.name, s.key) for s in stages]
    assert {r["folder"] for r in rows} == {f"results/{s.folder}" for s in stages}
    assert {r["would"] for r in rows} == {"run"} and list(tmp_path.iterdir()) == []
    assert dry("--until", "encode") == rows[: 1 + [s.name for s in stages].index("encode")]

    assert main([*words, "--until", "data-val", "--out", "here"]) == 0
    said = capsys.readouterr().out
    done = [r["stage"] for r in dry() if r["would"] == "reuse"]
    assert done == ["data-train", "data-val"] and said.count(": runs in ") == 2
    assert not Path("here").exists() and "[2/2] data-val: done" in said
    made = {p.name for p in Path("results").iterdir() if p.is_dir()}
    assert made == {r["folder"].partition("/")[2] for r in rows[:2]}

    assert main([*words, "--dry-run", "--out", "here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if len(line.split()) == 4][1:]
    assert table == [[r["stage"], r["key"], r["would"], r["folder"]] for r in dry()]
    assert lines[-1] == "results would go to here"
    assert main([*words, "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("results would go to runs/paella-micro-")


def test_a_run_gets_its_config_and_folder(runs, capsys):
    words = ["sampling.steps=2", "--trainer.max_steps=4"]
    assert main([*words, *MICRO]) == 0
    assert main([*MICRO, *reversed(words), "--out=there"]) == 0
    assert main([*MICRO, *words, "trainer.log_every=3"]) == 0
    assert main([*MICRO, *words, "sampling.t_start=0.5"]) == 0
    folders = [call[2] for call in runs.calls]
    assert folders[0].parent == Path("runs") and folders[0].name.startswith("paella-micro-")
    assert len(folders[0].name.rpartition("-")[2]) == 8
    assert folders[1] == Path("there")
    assert folders[2] == folders[0] and folders[3] not in folders[:3]
    titles, config, _, until = runs.calls[0]
    assert (titles.paper, titles.scale, until) == ("paella", "micro", None)
    assert config == load("paella", "micro", words)
    assert titles.command.startswith(
        "python -m experiments.run sampling.steps=2 --trainer.max_steps=4"
    )
    out = capsys.readouterr().out
    assert "[1/1] train: runs" in out
    assert "eval/accuracy" in out and "0.875" in out and "0.8 to 0.9" in out and "64" in out
    assert str(folders[0] / "metrics.json") in out


def test_default_scale_is_tiny():
    assert parse_run(["--paper", "paella"])[0].scale == "tiny"
    args, words = parse_run(["a=1", "--paper=paella", "--b.c=2", "--dry-run"])
    assert (args.paper, args.dry_run, words) == ("paella", True, ["a=1", "--b.c=2"])


def test_errors_of_a_run(runs, capsys):
    def fail(*args):
        raise UserError("data.shards: no such file")

    runs.execute = fail
    assert main(MICRO) == 1
    assert capsys.readouterr().err == "error: data.shards: no such file\n"


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*MICRO, "trainer.accelerator=cuda", "logger=csv"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: trainer.accelerator=cuda: this machine shows none")
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_only_rank_0_prints(runs, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(MICRO) == 0 and len(runs.calls) == 1
    assert main([*MICRO, "sampling.step=1"]) == 2
    assert capsys.readouterr() == ("", "")
