"""Sweeps: the files are W&B's, and runs that are finished are not done again."""

import contextlib
import csv
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.sdk.lib import config_util

from experiments import points, sweep
from experiments.agent import MACROS, PARAMETERS, with_parameters
from experiments.cli import command, parse_run
from experiments.distributions import draw, listed, named
from experiments.grid import KNOWN, PROGRAM, folder_name, make_runs, read_sweep, tuned
from experiments.papers.registry import load
from experiments.report.repeated import over_seeds
from experiments.settings import ConfigError
from lightning_modules.registry import load_generator

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
    _, runs = make_runs(read, [], None)
    assert len(runs) > 1 and read.metric and len({p.out for p in runs}) == len(runs)
    # an agent reads with PyYAML, where 1e-5 is a text; it sorts by name and writes --key=value
    raw = yaml.safe_load(path.read_text())
    values = {k: v.get("values", [v.get("value")]) for k, v in raw["parameters"].items()}
    assert values == {n: listed(f) for n, f in read.forms.items()}
    assert raw["command"][-1] == "${args}" and raw["command"][2:4] == ["-m", PROGRAM]
    assert set(raw) <= KNOWN
    for run in runs:
        args, words = parse_run(sorted(run.argv, key=lambda word: word.partition("=")[0]))
        own = [] if "logger" in values else ["logger=csv"]
        assert load(args.paper, args.scale, [*own, *words]) == run.config
    head = path.read_text().split("program:")[0]
    for part in (f"python -m experiments.sweep sweeps/{path.name}", "# time:"):
        assert part in head


# What is read ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters: {seed: {value: 1}}\nearly_terminate: {type: hyperband}", "early_terminate"),
        ("parameters: {seed: {min: 0}}", "seed needs `value: x` or `values: [x, y]`"),
        ("parameters: {seed: {min: 0.0, max: 3}}", "drawn from uniform, which no grid can list"),
        ("parameters: {seed: {min: 4, max: 3}}", "seed needs min (4) not above max (3)"),
        ("parameters: {seed: {values: []}}", "seed needs values with something in the list"),
        ("parameters: {seed: {values: 3}}", "seed needs values with something in the list"),
        ("parameters: [1]", "a sweep has `parameters`"),
        ("parameters: {seed: {value: 1}}", "names no paper"),
        ("parameters: {paper: {value: paela}}", "did you mean paella?"),
        ("parameters: {paper: {value: paella}, sampling.step: {value: 1}}", "sampling.steps?"),
        ("parameters: {paper: {value: paella}, seed: {values: [0, -1]}}", "seed must be from 0"),
        ("parameters: [", "no readable YAML"),
        ("parameters: {seed: {distribution: categorical, value: 1}}", "categorical with values"),
        ("parameters: {a: {parameters: {b: {max: 3}}}}", "a.b needs `value: x`"),
        ("parameters: {a.b: {value: 1}, a: {parameters: {b: {value: 2}}}}", "a.b is given twice"),
        ("parameters: {seed: {value: 1}}\nrun_cap: 0", "run_cap must be a whole number above 0"),
        ("parameters: {seed: {value: 1}}\n3: 2", "3 is for a W&B server"),
        ("parameters: {seed: {value: 1}}\nmetric: eval/a", "metric is {name: NAME, goal: minimize"),
        ("parameters: {seed: {value: 1}}\nmetric: {goal: minimize}", "metric is {name: NAME"),
        ("parameters: {seed: {value: 1}}\nmetric: {name: a, target: 1}", "metric is {name: NAME"),
        ("parameters: {seed: {value: 1}}\nname: 3", "name must be a text, got 3"),
        ("parameters: {seed: {value: 1}}\nproject: null", "project must be a text, got None"),
        ("parameters: {seed: {value: 1}}\nrun_cap: null", "above 0, got None"),
        ("parameters: {}", "a sweep has `parameters`"),
        ("parameters: {a: {parameters: {}}}", "a has `parameters` and none in it"),
        ("parameters: {a: {mu: 0, sigma: 1}}", "a needs `value: x`"),
        ("parameters: {a: {min: 0, max: 1, q: 0.1}}", "a needs `value: x`"),
        (
            "parameters: {a: {distribution: categorical, values: [1], probabilities: [1]}}",
            "categorical with values, got",
        ),
        (
            "parameters: {paper: {value: vqgan}, until: {value: x}}",
            "--until is for a single",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(
    text: str, said: str, tmp_path: Path, capsys
) -> None:
    assert main([str(write(tmp_path / "x.yaml", text)), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1 and "x.yaml: " in err
    assert not (tmp_path / "o").exists()


def test_other_mistakes(tmp_path: Path, capsys) -> None:
    path = small(tmp_path / "a.yaml")
    path.write_text(path.read_text().replace("method: grid", "method: bayes"))
    other = tmp_path / "b.yaml"
    other.write_text("method: grid\nparameters: {paper: {value: paella}}\n")
    for argv, said in [
        ([str(path)], "method must be one of grid, random, got bayes"),
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
    out, runs = make_runs(read, [], None)
    assert out == Path("runs/sweep-a")
    found = [(p.settings["sampling.steps"], p.settings["sampling.guidance_end"]) for p in runs]
    assert found == [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]
    assert [p.config.sampling.steps for p in runs] == [1, 1, 2, 2]  # type: ignore[attr-defined]
    assert runs[1].out == out / "steps=1,guidance_end=2.0"
    assert runs[0].argv == [
        "--paper=paella",
        "--scale=micro",
        "--sampling.steps=1",
        "--sampling.guidance_end=1.0",
    ]
    assert all(p.config.logger == "csv" for p in runs)

    out, runs = make_runs(read, ["sampling.steps=3", "logger=wandb"], None)
    assert out.name.startswith("sweep-a-") and len(runs) == 2
    assert {(p.config.sampling.steps, p.config.logger) for p in runs} == {(3, "wandb")}  # type: ignore[attr-defined]
    assert runs[0].settings == {"sampling.guidance_end": 1.0}


def test_one_point_of_an_array(tmp_path: Path, monkeypatch) -> None:
    """Each task of an array does its own."""
    done: list[str] = []

    def execute(titles, config, out: Path, say) -> None:
        out.mkdir(parents=True)
        (out / "metrics.json").write_text('{"eval/a": {"value": 1.0}}')
        done.append(out.name)

    monkeypatch.setattr("experiments.pipeline.runner.execute", execute)
    monkeypatch.setattr(points, "finished", lambda run: (run.out / "metrics.json").is_file())
    for index, count in ((2, 1), (0, 2)):
        _, runs = make_runs(read_sweep(small(tmp_path / "a.yaml")), [], tmp_path)
        points.do_runs(read_sweep(small(tmp_path / "a.yaml")), runs, lambda line: None, index)
        assert sum(map(points.finished, runs)) == count and points.finished(runs[index])
    assert done == ["steps=2,guidance_end=1.0", "steps=1,guidance_end=1.0"]


def test_words_of_the_command_count(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        'command: ["${env}", python, -m, experiments.run, --paper, vqgan, "${args_no_hyphens}",'
        ' "trainer.max_steps=${envvar:STEPS}"]\n'
        "method: grid\nparameters: {seed: {values: [0, 1]}, scale: {value: micro}}\n"
    )
    with pytest.raises(ConfigError, match=r"a.yaml: command asks for the variable STEPS"):
        read_sweep(path)
    monkeypatch.setenv("STEPS", "5")
    _, runs = make_runs(read_sweep(path), [], None)
    assert [(r.paper, r.config.trainer.max_steps) for r in runs] == [("vqgan", 5)] * 2  # type: ignore[attr-defined]
    path.write_text(path.read_text().replace("args_no_hyphens", "args_no_equals"))
    with pytest.raises(ConfigError, match=r"\{args_no_equals\}, which a run does not read"):
        read_sweep(path)


def test_folders_are_short_and_apart(tmp_path: Path) -> None:
    values = ["a/b", "a b", "a_b", "x" * 300, "x" * 299 + "y", "\U0001d4d0" * 90]
    names = [folder_name({"text.path": value}) for value in values]
    assert names[2] == "path=a_b" and len(set(names)) == len(names)
    for name in names:
        (tmp_path / name).mkdir()


def test_a_wrong_value_names_its_run_and_file(tmp_path: Path, capsys) -> None:
    assert main([str(small(tmp_path / "a.yaml", "[1, 0]")), "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/a.yaml: sampling.steps=0 sampling.guidance_end=1.0: "
        "sampling.steps must be at least 1, got 0\n"
    )


@pytest.mark.parametrize("words", [["--scale", "small"], ["--scale=small"], ["scale=small"]])
def test_one_grammar(words: list[str], tmp_path: Path, capsys) -> None:
    assert main([str(small(tmp_path / "a.yaml")), *words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("--scale=small") == 4


KEYS = st.sampled_from(["paper", "scale", "seed", "sampling", "sampling.steps", "data.shards", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
NODES = st.recursive(
    LEAVES | st.sampled_from(["paella", "micro"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["value", "values", "parameters", "distribution"]) | KEYS,
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(KEYS, NODES, max_size=3),
    st.dictionaries(st.sampled_from(["metric", "command", "program", "name"]), NODES, max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_no_sweep_file_gives_a_traceback(parameters: dict, others: dict) -> None:
    fixed = {"paper": {"value": "paella"}, "scale": {"value": "micro"}}
    content = {**yaml.safe_load(HEAD), **others, "parameters": fixed | parameters}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        with contextlib.suppress(ConfigError):
            make_runs(read_sweep(path), [], None)


# Under an agent ----

FORMS = """
  paper: {value: improved_vqd}
  scale: {value: micro}
  data:
    parameters:
      shards: {value: null}
      max_skipped: {distribution: categorical, values: [0.1, 1.0e-5]}
  sampling:
    parameters:
      compare: {values: [true, false]}
      guidance: {distribution: constant, value: 2}
  logger: {value: csv}
"""
FLAT = """
  paper: {value: improved_vqd}
  scale: {value: micro}
  sampling.compare: {values: [true, false]}
  eval.prompts: {values: [4, 8]}
  data.shards: {value: null}
"""


@pytest.mark.parametrize("macro", sorted(MACROS))
@pytest.mark.parametrize("text", [FORMS, FLAT])
def test_an_agent_makes_the_same_runs(text: str, macro: str, tmp_path: Path, monkeypatch) -> None:
    """The words and the file are made by W&B's own code, of what its server answers."""
    path = write(tmp_path / "a.yaml", "parameters:" + text)
    path.write_text(path.read_text().replace("${args}", f"${{{macro}}}"))
    _, runs = make_runs(read_sweep(path), [], None)
    assert len(runs) > 1
    for answer, run in zip(answers(yaml.safe_load(text)), runs, strict=True):
        args = {name: {"value": value} for name, value in answer.items()}
        config_util.save_config_file_from_dict(str(tmp_path / "config-1.yaml"), args)
        made = create_sweep_command_args({"args": args})
        made["args_json_file"] = [str(tmp_path / "config-1.json")]
        environment = {PARAMETERS: str(tmp_path / "config-1.yaml")}
        named, words = parse_run(with_parameters(made[macro], environment))
        own = [] if "logger" in answer else ["logger=csv"]
        assert load(named.paper, named.scale, [*own, *words]) == run.config


def answers(parameters: dict) -> Iterator[dict[str, Any]]:
    """What a server makes of a grid: nested parameters stay nested."""
    choices = [
        list(answers(given["parameters"]))
        if "parameters" in given
        else given.get("values") or [given["value"]]
        for given in parameters.values()
    ]
    for values in itertools.product(*choices):
        yield dict(zip(parameters, values, strict=True))


def test_words_stay_without_an_agent_and_a_lost_file_is_named(tmp_path: Path) -> None:
    assert with_parameters(["a=1", "--b"], {}) == ["a=1", "--b"]
    for text in (None, "[1]", "seed: 3", "{"):
        if text is not None:
            (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"c\.yaml, which holds no parameters"):
            with_parameters([], {PARAMETERS: str(tmp_path / "c.yaml")})


# Draws, seeds and several processes ----


def test_a_random_sweep_draws_the_same_runs_again(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        HEAD.replace("grid", "random")
        + "run_cap: 5\nparameters:\n  paper: {value: paella}\n  scale: {value: micro}\n"
        "  sampling.steps: {min: 2, max: 9}\n"
        "  sampling.guidance_end: {distribution: log_uniform_values, min: 1, max: 8}\n"
        "  seed: {values: [0, 7], probabilities: [0.0, 1.0]}\n"
    )
    drawn = [[r.settings for r in make_runs(read_sweep(path), [], None)[1]] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5
    for settings_ in drawn[0]:
        assert 2 <= settings_["sampling.steps"] <= 9 and settings_["seed"] == 7
        assert 1 <= settings_["sampling.guidance_end"] <= 8
    other = make_runs(read_sweep(path), [], None, count=3, draw_seed=1)[1]
    assert len(other) == 3 and other[0].settings != drawn[0][0]
    path.write_text(path.read_text().replace("run_cap: 5\n", ""))
    with pytest.raises(ConfigError, match="needs a number of points: --runs N"):
        make_runs(read_sweep(path), [], None)


def test_a_grid_lists_what_can_be_listed(tmp_path: Path) -> None:
    path = small(tmp_path / "a.yaml")
    path.write_text(
        path.read_text()
        .replace("{values: [1, 2]}", "{min: 2, max: 4}")
        .replace("{values: [1.0, 2.0]}", "{distribution: q_uniform, min: 1, max: 2, q: 0.5}")
    )
    _, runs = make_runs(read_sweep(path), [], None)
    found = [(r.settings["sampling.steps"], r.settings["sampling.guidance_end"]) for r in runs]
    assert found == list(itertools.product([2, 3, 4], [1, 1.5, 2]))


CASES = {
    "uniform": ({"min": -1.0, "max": 3.0}, 1.0, 4 / 12**0.5),
    "normal": ({"mu": 2.0, "sigma": 0.5}, 2.0, 0.5),
    "beta": ({"a": 2.0, "b": 3.0}, 0.4, 0.2),
    "log_uniform": (
        {"min": 0.0, "max": 1.0},
        np.e - 1,
        ((np.e**2 - 1) / 2 - (np.e - 1) ** 2) ** 0.5,
    ),
    "inv_log_uniform": ({"min": 0.0, "max": 1.0}, 1 - 1 / np.e, 0.181),
    "log_normal": ({"mu": 0.0, "sigma": 0.5}, np.exp(0.125), 0.604),
    "int_uniform": ({"min": 1, "max": 6}, 3.5, 1.708),
    "q_uniform": ({"min": 0.0, "max": 10.0, "q": 2.5}, 5.0, 3.062),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_mean_and_spread_of_their_law(name: str) -> None:
    form, mean, spread = CASES[name]
    form = named({"distribution": name, **form})
    rng = random.Random(0)
    found = np.array([draw(form, rng) for _ in range(40_000)], float)
    assert abs(found.mean() - mean) < 4 * spread / 200
    assert found.std() == pytest.approx(spread, rel=0.02)


def test_the_log_uniform_of_values_is_uniform_in_the_logarithm() -> None:
    for name in ("log_uniform_values", "inv_log_uniform_values"):
        form = named({"distribution": name, "min": 1e-5, "max": 1e-1})
        logs = np.log10([draw(form, random.Random(i)) for i in range(4000)])
        assert logs.min() > -5.01 and logs.max() < -0.99 and abs(logs.mean() + 3) < 0.08


def test_seeds_repeat_every_point_with_other_trainings_and_pictures(tmp_path: Path) -> None:
    read = read_sweep(small(tmp_path / "a.yaml"))
    _, runs = make_runs(read, ["seed=5"], None, seeds=3)
    assert len(runs) == 12 and len({r.out for r in runs}) == 12
    assert [r.config.seed for r in runs[:3]] == [5, 6, 7]
    assert [r.config.eval.seed for r in runs[:3]] == [0, 10_000_000, 20_000_000]
    assert [r.settings["seed"] for r in runs[:4]] == [5, 6, 7, 5]
    assert len({t.key for r in runs for t in r.plan.trainings}) == 3 * len(runs[0].plan.trainings)


def test_draws_sample_one_training_with_other_seeds(tmp_path: Path) -> None:
    read = read_sweep(small(tmp_path / "a.yaml"))
    _, runs = make_runs(read, [], None, draws=2)
    assert [(r.config.seed, r.config.eval.seed) for r in runs[:2]] == [(0, 0), (0, 10_000_000)]
    assert [r.settings["eval.seed"] for r in runs[:3]] == [0, 10_000_000, 0]
    assert runs[0].plan.trainings == runs[1].plan.trainings
    _, runs = make_runs(read, [], None, seeds=2, draws=2)
    assert [r.config.seed for r in runs[:4]] == [0, 0, 1, 1]
    assert len({r.config.eval.seed for r in runs[:4]}) == 4 and len({r.out for r in runs}) == 16


def test_the_seed_that_chooses_a_value_does_not_measure_it(tmp_path: Path) -> None:
    read = read_sweep(small(tmp_path / "a.yaml"))
    _, runs = make_runs(read, [], None, draws=3)
    key, other = [k for k in runs[0].settings if k != "eval.seed"]
    values = list(dict.fromkeys(r.settings[key] for r in runs))
    for r in runs:  # the second value is the better one, by luck where it was chosen
        better = r.settings[key] == values[1] and r.repeat == 0
        r.scores = {str(read.metric): {"value": 0.9 if better else 0.5}}
    kept = tuned(read, runs, key)
    ways = {r.settings[other] for r in runs}
    assert len(ways) == 2
    for way in ways:
        found = [(r.settings[key], r.repeat) for r in kept if r.settings[other] == way]
        assert sorted(found) == sorted([(values[0], 0), (values[1], 1), (values[1], 2)])
    best = [r for r in over_seeds(kept) if r.settings[key] == values[1]]
    assert all(r.scores[str(read.metric)]["value"] == 0.5 for r in best)
    for r in runs:  # none of those that measure is done yet
        r.scores = r.scores if r.repeat == 0 else {}
    assert {id(r) for r in runs if r.repeat == 0} <= set(map(id, tuned(read, runs, key)))
    assert tuned(replace(read, minimize=True), runs, key)[0].settings[key] == values[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tune=sampling.steps"], "give draws=3"),
        (["--tune=optim.lr", "--draws=2"], "--tune optim.lr is not varied"),
        (["--tune=sampling.steps", "--draws=2", "--index=0"], "give no --index"),
        (["--draws=0"], "--draws must be at least 1"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(small(tmp_path / "a.yaml")), *words]) == 2
    assert says in capsys.readouterr().err


def test_processes_share_a_sweep_and_a_killed_one_is_made_good(tmp_path: Path, capsys) -> None:
    """Every point is done once; trainings are waited for, and what a kill left is done again."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    path = small(tmp_path / "s.yaml")
    words = [str(path), f"cache={cache}", f"--out={out}"]
    _, runs = make_runs(read_sweep(path), [f"cache={cache}"], out)
    with points.claimed(runs[0]) as mine, points.claimed(runs[0]) as twice:
        assert mine and not twice
        with points.claimed(runs[1]) as other:  # which waits for the same training
            assert not other
    first = subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *words], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    next(line for line in first.stdout if "] train: runs" in line)
    first.kill()
    first.wait()
    assert main([*words, "--jobs=2"]) == 0
    said = capsys.readouterr().out
    assert said.count(": done") == 4 and "best eval/scene_accuracy" in said
    assert len(list(out.glob("*/metrics.json"))) == 4
    assert len([p for p in cache.glob("train-*") if p.is_dir()]) == 1


# A whole sweep ----


def test_a_sweep_trains_once_and_resumes(tmp_path: Path, capsys) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = [f"cache={cache}", "--out", str(out)]
    assert main([str(small(tmp_path / "s.yaml")), *words]) == 0
    said = capsys.readouterr().out
    assert said.count("] train: runs") == 1 and said.count("] sample-val: runs") == 4
    assert "[2/4] s: steps=1 guidance_end=2.0 (about" in said
    assert "in all runs: tokenizer/psnr" in said and "best eval/scene_accuracy: steps=" in said
    assert sorted(p.name for p in out.glob("*.*") if p.is_file()) == [
        "picture.png",
        "table.csv",
        "table.html",
    ]
    with open(out / "table.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["sampling.steps"], r["sampling.guidance_end"]) for r in rows] == [
        ("1", "1.0"),
        ("1", "2.0"),
        ("2", "1.0"),
        ("2", "2.0"),
    ]
    for row in rows:
        metrics = json.loads((Path(row["run"]) / "metrics.json").read_text())
        for name, score in metrics.items():
            assert float(row[name]) == score["value"]
            for key in ("low", "high", "n"):
                found = row[f"{name} {key}"]
                assert (float(found) if found else None) == score.get(key)
    # a report finds the results in the store, whatever folder the runs were told to fill
    _, runs = make_runs(read_sweep(tmp_path / "s.yaml"), words[:1], tmp_path / "elsewhere")
    points.collect(runs)
    for run, row in zip(runs, rows, strict=True):
        assert {n: s["value"] for n, s in run.scores.items()} == {
            n: float(row[n]) for n in run.scores
        }
        assert run.scores["eval/seconds"]["value"] > 0 and len(run.right["eval"]) == 16
        kept = load_generator(Path(row["run"]))
        count = sum(p.numel() for p in kept.parameters())
        assert run.scores["eval/parameters"]["value"] == count and run.error is None
    page = (out / "table.html").read_text()
    assert "data:image/svg+xml" in page and 'src="http' not in page and "clip_scenes" in page

    # one run more; one whose folder was lost, one of another day; the rest stays
    (Path(rows[3]["run"]) / "metrics.json").unlink()
    (Path(rows[2]["run"]) / "metrics.json").write_text("{}")
    kept = (Path(rows[0]["run"]) / "metrics.json").stat().st_mtime_ns
    again = [str(small(tmp_path / "s.yaml", "[1, 2, 3]")), *words]
    assert main([*again, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert listed.count(" finished  ") == 2 and listed.count(" to do  ") == 4
    assert main(again) == 0
    said = capsys.readouterr().out
    assert said.count("finished, in") == 2 and "] train: runs" not in said
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
