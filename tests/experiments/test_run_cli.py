import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from experiments.config import RUNS, UserError, load, scales

from experiments.run import main, parse
from experiments.store import Store

ROOT = Path(__file__).parents[2]
MICRO = ["--paper", "paella", "--scale", "micro"]


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def stages(monkeypatch, tmp_path: Path) -> SimpleNamespace:
    """Stand in for the stages, so that nothing is trained."""
    monkeypatch.chdir(tmp_path)
    fake = SimpleNamespace(calls=[])

    def run(paper, scale, config, out, *, command, say):
        fake.calls.append((paper, scale, config, out, command))
        say("[1/1] train: runs")
        return SimpleNamespace(
            scores={"eval/accuracy": {"value": 0.875, "low": 0.8, "high": 0.9, "n": 64}, "loss": 1},
            files={"metrics": out / "metrics.json", "checkpoint": out / "generator.ckpt"},
        )

    fake.run = run
    monkeypatch.setitem(sys.modules, "experiments.stages", fake)
    monkeypatch.delattr("experiments.stages", raising=False)
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
    ([*MICRO, "data.resolution=33"], "data.resolution must be a multiple of 8, got 33"),
    ([*MICRO, "sampling.steps"], "write key=value"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED)
def test_refused_in_one_line(argv: list[str], said: str, stages, capsys, tmp_path: Path):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err
    assert err.count("\n") == 1
    assert stages.calls == [] and list(tmp_path.iterdir()) == []


def test_exit_codes_of_the_command(tmp_path: Path):
    refused = python("-m", "experiments.run", *MICRO, "sampling.step=3", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "sampling.steps" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    helped = python("-m", "experiments.run", "--help", cwd=tmp_path)
    assert helped.returncode == 0 and helped.stderr == ""


def test_help_and_mistakes_import_nothing_heavy(tmp_path: Path):
    script = f"""
import sys
from experiments.run import main
codes = [main(argv) for argv in (
    ["--help"], ["--paper", "help"], {MICRO} + ["--help"], {MICRO} + ["--print-config"],
    {MICRO} + ["--dry-run"], {MICRO} + ["sampling.step=3"],
)]
assert codes == [0, 0, 0, 0, 0, 2], codes
heavy = {{"torch", "lightning", "transformers", "wandb", "webdataset"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_exists(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (*RUNS, *scales("paella"), "--print-config", "--dry-run", "data=digits", "--out"):
        assert word in out
    assert main(["--paper", "help"]) == 0
    listed = capsys.readouterr().out
    assert listed.strip() in out
    assert "micro  Smallest Paella that runs every stage" in listed


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


def test_dry_run_says_run_or_reuse(capsys, tmp_path: Path, monkeypatch):
    from experiments import stages

    monkeypatch.chdir(tmp_path)
    words = [*MICRO, "--dry-run", "cache=results"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = stages.plan("paella", load("paella", "micro", ["cache=results"]))
    for stage in plan:
        line = next(line for line in lines if line.startswith(f"{stage.name} "))
        assert line.split() == [stage.name, stage.key, "run", f"results/{stage.folder}"]
    assert lines[-1].startswith("results would go to runs/paella-micro-")
    assert list(tmp_path.iterdir()) == []

    store = Store("results")
    store.run(plan[0].name, plan[0].key, {}, lambda folder: {}, lambda line: None)
    assert main([*words, "--out", "here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    would = {line.split()[0]: line.split()[2] for line in lines if len(line.split()) == 4}
    assert would[plan[0].name] == "reuse" and would[plan[1].name] == "run"
    assert lines[-1] == "results would go to here"


def test_sampling_changes_no_key_before_the_samples():
    from experiments import stages

    before, after = (
        {s.name: s.key for s in stages.plan("paella", load("paella", "micro", words))}
        for words in ([], ["sampling.steps=2"])
    )
    changed = {name for name in before if before[name] != after[name]}
    assert "sample" in changed and "train" in before
    assert not changed & {"data", "tokenizer", "cache", "train"}


def test_a_run_gets_its_config_and_folder(stages, capsys):
    words = ["sampling.steps=2", "--trainer.max_steps=4"]
    assert main([*words, *MICRO]) == 0
    assert main([*MICRO, *reversed(words), "--out=there"]) == 0
    assert main([*MICRO, *words, "trainer.log_every=3"]) == 0
    assert main([*MICRO, *words, "sampling.t_start=0.5"]) == 0
    folders = [call[3] for call in stages.calls]
    assert folders[0].parent == Path("runs") and folders[0].name.startswith("paella-micro-")
    assert len(folders[0].name.rpartition("-")[2]) == 8
    assert folders[1] == Path("there")
    assert folders[2] == folders[0] and folders[3] not in folders[:3]
    paper, scale, config, _, command = stages.calls[0]
    assert (paper, scale, config) == ("paella", "micro", load("paella", "micro", words))
    assert command.startswith("python -m experiments.run sampling.steps=2 --trainer.max_steps=4")
    out = capsys.readouterr().out
    assert "[1/1] train: runs" in out
    assert "eval/accuracy" in out and "0.875" in out and "0.8 to 0.9" in out and "64" in out
    assert str(folders[0] / "metrics.json") in out


def test_default_scale_is_tiny():
    assert parse(["--paper", "paella"])[0].scale == "tiny"
    args, words = parse(["a=1", "--paper=paella", "--b.c=2", "--dry-run"])
    assert (args.paper, args.dry_run, words) == ("paella", True, ["a=1", "--b.c=2"])


def test_errors_of_a_run(stages, capsys):
    def fail(*args, **options):
        raise UserError("data.shards: no such file")

    stages.run = fail
    assert main(MICRO) == 1
    assert capsys.readouterr().err == "error: data.shards: no such file\n"

    def crash(*args, **options):
        raise ZeroDivisionError

    stages.run = crash
    with pytest.raises(ZeroDivisionError):  # what nobody foresaw keeps its traceback
        main(MICRO)


INTERRUPTED = """
import os, signal, sys, time, types

def run(*args, **options):
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(30)
    except KeyboardInterrupt:
        if sys.argv[2] == "lightning":
            sys.exit(1)
        raise

sys.modules["experiments.stages"] = types.SimpleNamespace(run=run)
from experiments.run import main
sys.exit(main(["--paper", "paella", "--scale", "micro"]))
"""


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("how", ["plain", "lightning"])
def test_interrupted(number: int, code: int, how: str, tmp_path: Path):
    done = python("-c", INTERRUPTED, str(number), how, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr == "interrupted; the same command resumes\n"


def test_only_rank_0_prints(stages, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(MICRO) == 0 and len(stages.calls) == 1
    assert main([*MICRO, "sampling.step=1"]) == 2
    assert capsys.readouterr() == ("", "")
