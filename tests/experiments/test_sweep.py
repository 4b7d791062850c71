"""Sweeps: the files are W&B's, the points are runs, and what stands is not done again."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from experiments import sweep
from experiments.cli import command
from experiments.papers.registry import load
from experiments.points import KNOWN, PROGRAM, make_points, read_sweep
from experiments.run import parse
from experiments.settings import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
HEAD = """
program: experiments/run.py
command: ["${env}", "${interpreter}", -m, experiments.run, "${args}"]
method: grid
"""


def main(argv: list[str]) -> int:
    return command(sweep.run, argv)


def write(path: Path, text: str) -> Path:
    path.write_text(HEAD + text)
    return path


def small(path: Path, values: str = "[1, 2]") -> Path:
    return write(
        path,
        "metric: {name: eval/scene_accuracy, goal: maximize}\n"
        "parameters:\n"
        "  paper: {value: paella}\n"
        "  scale: {value: micro}\n"
        f"  sampling.steps: {{values: {values}}}\n"
        "  sampling.guidance_end: {values: [1.0, 2.0]}\n",
    )


# The files of the project ----


def test_there_are_sweeps_and_no_package() -> None:
    names = {"paella_steps", "paella_guidance", "ldmae_autoencoders", "ldmae_losses"}
    assert names | {"improved_vqd_guidance_purity", "ldmae_generation"} <= {
        path.stem for path in FILES
    }
    assert not list((ROOT / "sweeps").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_sweep_makes_runs_here_and_with_an_agent(path: Path) -> None:
    read = read_sweep(path)
    _, points = make_points(read, [], None)
    assert len(points) > 1 and read.metric and len({p.out for p in points}) == len(points)
    # an agent reads with PyYAML, where 1e-5 is a text; it sorts by name and writes --key=value
    raw = yaml.safe_load(path.read_text())
    values = {k: v.get("values", [v.get("value")]) for k, v in raw["parameters"].items()}
    assert values == read.values
    assert raw["command"][-1] == "${args}" and raw["command"][2:4] == ["-m", PROGRAM]
    assert set(raw) <= KNOWN
    for point in points:
        args, words = parse(sorted(point.argv, key=lambda word: word.partition("=")[0]))
        own = [] if "logger" in values else ["logger=csv"]
        assert load(args.paper, args.scale, [*own, *words]) == point.config
    head = path.read_text().split("program:")[0]
    for part in (f"python -m experiments.sweep sweeps/{path.name}", "# time:"):
        assert part in head


# What is read ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters: {seed: {value: 1}}\nearly_terminate: {type: hyperband}", "early_terminate"),
        ("parameters: {seed: {min: 0, max: 3}}", "seed needs `value: x` or `values: [x, y]`"),
        ("parameters: {seed: {values: []}}", "seed.values must be a list"),
        ("parameters: {seed: {values: 3}}", "seed.values must be a list"),
        ("parameters: [1]", "a sweep has `parameters`"),
        ("parameters: {seed: {value: 1}}", "names no paper"),
        ("parameters: {paper: {value: paela}}", "did you mean paella?"),
        ("parameters: {paper: {value: paella}, sampling.step: {value: 1}}", "sampling.steps?"),
        ("parameters: {paper: {value: paella}, seed: {values: [0, -1]}}", "seed must be at least"),
        ("parameters: [", "no readable YAML"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(
    text: str, said: str, tmp_path: Path, capsys
) -> None:
    assert main([str(write(tmp_path / "x.yaml", text)), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_other_mistakes(tmp_path: Path, capsys) -> None:
    path = small(tmp_path / "a.yaml")
    path.write_text(path.read_text().replace("method: grid", "method: bayes"))
    other = tmp_path / "b.yaml"
    other.write_text("method: grid\nparameters: {paper: {value: paella}}\n")
    for argv, said in [
        ([str(path)], "method must be grid, got bayes"),
        ([str(other)], "command must run experiments.run"),
        ([str(tmp_path / "none.yaml")], "there is no sweep file"),
        ([], "name a sweep file"),
        ([str(path), "seed"], "'seed' is neither a sweep file nor a setting"),
        ([str(path), str(path), "--out", "x"], "--out belongs to one sweep; give one file"),
        ([str(path), str(path), "--index", "1"], "--index belongs to one sweep; give one file"),
        ([str(small(tmp_path / "c.yaml")), "--index", "4"], "--index must be 0 to 3, got 4"),
    ]:
        assert main(argv) == 2
        assert said in capsys.readouterr().err


def test_points_are_the_product_the_last_setting_fastest(tmp_path: Path) -> None:
    read = read_sweep(small(tmp_path / "a.yaml"))
    out, points = make_points(read, [], None)
    assert out == Path("runs/sweep-a")
    found = [(p.settings["sampling.steps"], p.settings["sampling.guidance_end"]) for p in points]
    assert found == [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]
    assert [p.config.sampling.steps for p in points] == [1, 1, 2, 2]  # type: ignore[attr-defined]
    assert points[1].out == out / "steps=1,guidance_end=2.0"
    assert points[0].argv == ["--paper=paella", "--scale=micro", "--sampling.steps=1",
                              "--sampling.guidance_end=1.0"]  # fmt: skip
    assert all(p.config.logger == "csv" for p in points)

    out, points = make_points(read, ["sampling.steps=3", "logger=wandb"], None)
    assert out.name.startswith("sweep-a-") and len(points) == 2
    assert {(p.config.sampling.steps, p.config.logger) for p in points} == {(3, "wandb")}  # type: ignore[attr-defined]
    assert points[0].settings == {"sampling.guidance_end": 1.0}


def test_one_point_of_an_array(tmp_path: Path, monkeypatch) -> None:
    """Each task of an array does its own; the table shows those that stand."""
    _, points = make_points(read_sweep(small(tmp_path / "a.yaml")), [], tmp_path)
    done: list[str] = []

    def execute(titles, config, out: Path, say) -> None:
        out.mkdir(parents=True)
        (out / "metrics.json").write_text('{"eval/a": {"value": 1.0}}')
        done.append(out.name)

    monkeypatch.setattr("experiments.pipeline.runner.execute", execute)
    monkeypatch.setattr(sweep, "stands", lambda point: (point.out / "metrics.json").is_file())
    for index, count in ((2, 1), (0, 2)):
        _, points = make_points(read_sweep(small(tmp_path / "a.yaml")), [], tmp_path)
        sweep.do_points(read_sweep(small(tmp_path / "a.yaml")), points, lambda line: None, index)
        assert sum(bool(p.scores) for p in points) == count and bool(points[index].scores)
    assert done == ["steps=2,guidance_end=1.0", "steps=1,guidance_end=1.0"]


def test_words_of_the_command_count(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        'command: ["${env}", python, -m, experiments.run, --paper, vqgan, "${args_no_hyphens}"]\n'
        "method: grid\nparameters: {seed: {values: [0, 1]}, scale: {value: micro}}\n"
    )
    _, points = make_points(read_sweep(path), [], None)
    assert [p.paper for p in points] == ["vqgan", "vqgan"]


# A whole sweep ----


def test_a_sweep_trains_once_and_resumes(tmp_path: Path, capsys) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = [f"cache={cache}", "--out", str(out)]
    assert main([str(small(tmp_path / "s.yaml")), *words]) == 0
    said = capsys.readouterr().out
    assert said.count("] train: runs") == 1 and said.count("] sample-val: runs") == 4
    assert "[2/4] s: steps=1 guidance_end=2.0 (about" in said
    assert "in all points: tokenizer/psnr" in said and "best eval/scene_accuracy: steps=" in said
    assert sorted(p.name for p in out.glob("*.*") if p.is_file()) == [
        "picture.png", "table.csv", "table.html",
    ]  # fmt: skip
    with open(out / "table.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["sampling.steps"], r["sampling.guidance_end"]) for r in rows] == [
        ("1", "1.0"), ("1", "2.0"), ("2", "1.0"), ("2", "2.0"),
    ]  # fmt: skip
    for row in rows:
        metrics = json.loads((Path(row["run"]) / "metrics.json").read_text())
        for name, score in metrics.items():
            assert float(row[name]) == score["value"]
            for key in ("low", "high", "n"):
                found = row[f"{name} {key}"]
                assert (float(found) if found else None) == score.get(key)
    page = (out / "table.html").read_text()
    assert "data:image/svg+xml" in page and 'src="http' not in page and "clip_scenes" in page

    # one point more; one whose folder was lost, one of another day; the rest stands
    (Path(rows[3]["run"]) / "metrics.json").unlink()
    (Path(rows[2]["run"]) / "metrics.json").write_text("{}")
    kept = (Path(rows[0]["run"]) / "metrics.json").stat().st_mtime_ns
    again = [str(small(tmp_path / "s.yaml", "[1, 2, 3]")), *words]
    assert main([*again, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert listed.count(" stands  ") == 2 and listed.count(" to do  ") == 4
    assert main(again) == 0
    said = capsys.readouterr().out
    assert said.count("stands in") == 2 and "] train: runs" not in said
    assert said.count("] sample-val: runs") == 2  # of the lost one only the folder is made again
    assert (Path(rows[0]["run"]) / "metrics.json").stat().st_mtime_ns == kept


def test_a_point_that_fails_is_noted_and_the_others_are_done(tmp_path: Path, capsys) -> None:
    (tmp_path / "none.pth").write_text("no weights")
    path = write(
        tmp_path / "f.yaml",
        "parameters:\n  paper: {value: vqgan}\n  scale: {value: micro}\n"
        f"  objective.lpips_path: {{values: [{tmp_path}/none.pth, null]}}\n"
        "  objective.perceptual_weight: {value: 1.0}\n",
    )
    out = tmp_path / "out"
    assert main([str(path), f"cache={tmp_path}/cache", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert said.count("failed: ") == 2 and "none.pth" in said
    with open(out / "table.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert "none.pth" in rows[0]["error"] and rows[0]["eval/psnr"] == ""
    assert rows[1]["error"] == "" and float(rows[1]["eval/psnr"]) > 0


def test_a_file_that_is_not_there_is_refused_before_any_work(tmp_path: Path, capsys) -> None:
    path = write(
        tmp_path / "f.yaml",
        "parameters:\n  paper: {value: vqgan}\n  scale: {value: micro}\n"
        f"  objective.lpips_path: {{values: [null, {tmp_path}/gone.pth]}}\n",
    )
    out = tmp_path / "out"
    assert main([str(path), f"cache={tmp_path}/cache", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "gone.pth" in error and error.count("\n") == 1
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_help(capsys) -> None:
    assert main(["--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_wrong_option_is_refused(capsys) -> None:
    assert main([str(FILES[0]), "--dryrun"]) == 2
    assert "--dryrun" in capsys.readouterr().err


def test_errors_are_config_errors() -> None:
    with pytest.raises(ConfigError):
        sweep.run(["nothing.yaml"])
