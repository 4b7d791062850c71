"""Whole runs at scale micro: what they leave, what they reuse, and how they survive a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.config import UserError, load, resolved
from experiments.pictures import load_png
from experiments.training import RESUME, curves
from torch import Tensor

from data.photos import photos
from data.select import holdout_share
from data.shards import write_shards
from experiments import sample, stages
from experiments.run import main
from experiments.store import Store
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.registry import load_generator, load_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)
ROOT = Path(__file__).parents[2]
STAGES = {
    "paella": ["data", "tokenizer", "cache", "train", "sample", "score", "report"],
    "vqgan": ["data", "tokenizer", "score", "report"],
}


@dataclass
class Run:
    """A run that has ended: where its results are, and what became of each stage."""

    paper: str
    words: list[str]
    out: Path
    cache: Path
    lines: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.out / "metrics.json").read_text())

    def stage(self, name: str) -> Path:
        return Store(self.cache).folder(self.plan[name])

    @cached_property
    def plan(self) -> dict[str, Any]:
        plan = stages.plan(self.paper, load(self.paper, "micro", self.words))
        return {stage.name: stage for stage in plan}

    def fate(self) -> dict[str, str]:
        """Stage -> runs, continues or reused, by what was said."""
        heads = [line.partition("] ")[2].split() for line in self.lines if line.startswith("[")]
        return {h[0].rstrip(":"): h[1] for h in heads if h[1] in ("runs", "continues", "reused")}


def go(paper: str, out: Path, cache: Path, *words: str) -> Run:
    """Do a run in this process."""
    run = Run(paper, ["logger=csv", *words, f"cache={cache}"], out, cache)
    config = load(paper, "micro", run.words)
    stages.run(paper, "micro", config, out, command=f"run {paper}", say=run.lines.append)
    return run


@contextmanager
def started(
    script: str, out: Path, cache: Path, *words: str, **environment: str
) -> Iterator[subprocess.Popen]:
    """A run in a process of its own, ended with the block whatever happens."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    env.pop("PL_GLOBAL_SEED", None)
    module = ["-m", "experiments.run"] if not script else [script]
    options = ["--scale", "micro", "--out", str(out), f"cache={cache}", *words]
    process = subprocess.Popen(
        [sys.executable, *module, *options], cwd=out.parent, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def end(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(cache: Path, pattern: str, process: subprocess.Popen, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not list(cache.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"{pattern} did not appear"
        time.sleep(0.01)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights(run: Run | Path) -> dict[str, Tensor]:
    out = run.out if isinstance(run, Run) else run
    return load_weights(out / "checkpoint.safetensors")[0]


def pixels(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A paella from an empty cache; the tests below build on its results."""
    root = tmp_path_factory.mktemp("first")
    return go("paella", root / "run", root / "cache")


@pytest.fixture
def copied(first: Run, tmp_path: Path) -> Path:
    """A cache of its own with the results of the first run."""
    return Path(shutil.copytree(first.cache, tmp_path / "cache"))


# What a run leaves ----


def test_a_run_leaves_scores_pictures_page_and_checkpoint(first: Run) -> None:
    names = ["checkpoint.safetensors", "config.yaml", "metrics.json", "report.html",
             "samples.png", "tokenizer.safetensors"]  # fmt: skip
    assert sorted(p.name for p in first.out.iterdir()) == names
    assert first.fate() == dict.fromkeys(STAGES["paella"], "runs")
    assert [line for line in first.lines if "done in" in line][3].startswith("[4/7] train: done")

    for name in ("eval/scene_accuracy", "eval/scene_accuracy/relation", "eval/clip_scenes",
                 "eval/heldout/scene_accuracy", "tokenizer/psnr"):  # fmt: skip
        score = first.metrics[name]
        assert score["n"] == 16 and score["low"] <= score["value"] <= score["high"]
    assert {"eval/fd_scenes", "eval/fd_scenes_floor"} <= first.metrics.keys()

    page = (first.out / "report.html").read_text()
    assert "run paella" in page and "eval/scene_accuracy" in page and 'src="http' not in page
    assert load_png(first.out / "samples.png")[0].ndim == 3
    assert load("paella", str(first.out / "config.yaml")) == load("paella", "micro", first.words)
    assert load_generator(first.out / "checkpoint.safetensors").config.sampling.steps == 3


def test_the_curves_have_every_step(first: Run) -> None:
    found = curves(first.stage("train"))
    assert [step for step, _ in found["train/loss"]] == list(range(8))
    assert [step for step, _ in found["val/loss"]] == [3, 7]
    assert not (first.stage("train") / "running.json").exists()


def test_the_second_run_reuses_everything(first: Run, tmp_path: Path) -> None:
    again = go("paella", tmp_path / "again", first.cache)
    assert again.fate() == dict.fromkeys(STAGES["paella"], "reused")
    for name in ("metrics.json", "samples.png", "report.html", "checkpoint.safetensors"):
        assert (again.out / name).read_bytes() == (first.out / name).read_bytes()


def test_fewer_sampling_steps_train_nothing(first: Run, tmp_path: Path) -> None:
    before = (first.stage("train") / "checkpoint.safetensors").stat().st_mtime_ns
    quick = go("paella", tmp_path / "quick", first.cache, "sampling.steps=2")
    again = ["sample", "score", "report"]
    assert quick.fate() == {s: "runs" if s in again else "reused" for s in STAGES["paella"]}
    assert (quick.stage("train") / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert same(weights(quick), weights(first))
    # and the checkpoint of a run samples as the run did
    assert load_generator(quick.out / "checkpoint.safetensors").config.sampling.steps == 2
    assert pixels(quick.stage("sample")) != pixels(first.stage("sample"))


def test_vqgan_shares_the_tokenizer(first: Run, tmp_path: Path) -> None:
    alone = go("vqgan", tmp_path / "alone", first.cache)
    fate = {"data": "reused", "tokenizer": "reused", "score": "runs", "report": "runs"}
    assert alone.fate() == fate
    assert alone.stage("tokenizer") == first.stage("tokenizer")
    names = ["config.yaml", "metrics.json", "report.html", "samples.png", "tokenizer.safetensors"]
    assert sorted(p.name for p in alone.out.iterdir()) == names
    assert alone.metrics["eval/psnr"] == first.metrics["tokenizer/psnr"]
    scores = {"psnr", "ssim", "codebook_usage", "codebook_perplexity", "scene_accuracy"}
    assert {f"eval/{name}" for name in scores} <= alone.metrics.keys()


def test_a_run_is_the_same_everywhere_and_with_every_logger(first: Run, tmp_path: Path) -> None:
    """From an empty cache, elsewhere, with W&B: nothing differs."""
    other = go("paella", tmp_path / "out", tmp_path / "cache", "logger=wandb")
    assert other.fate() == dict.fromkeys(STAGES["paella"], "runs")
    assert other.metrics == first.metrics
    assert same(weights(other), weights(first))
    assert pixels(other.stage("sample")) == pixels(first.stage("sample"))
    for name in ("tokenizer", "train"):
        assert curves(other.stage(name)) == curves(first.stage(name))


def test_wandb_is_offline_without_a_key(first: Run, copied: Path, tmp_path: Path) -> None:
    """No key, no login, no network: the curves go into the run folder."""
    home = tmp_path / "home"
    home.mkdir()
    hidden = {"HOME": str(home), "NETRC": str(home / "none"), "WANDB_DIR": str(tmp_path)}
    shown = {k: v for k, v in os.environ.items() if k.startswith("WANDB")}
    words = ["--paper", "paella", "logger=wandb", "trainer.max_steps=4"]
    for name in shown:
        os.environ.pop(name)
    try:
        with started("", tmp_path / "out", copied, *words, **hidden) as process:
            code, out, err = end(process)
    finally:
        os.environ.update(shown)
    assert code == 0, err
    assert err == "" and "tokenizer: reused" in out and "train: done" in out
    offline = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(offline) == 1 and list(offline[0].glob("*.wandb"))
    plain = go("paella", tmp_path / "csv", copied, "trainer.max_steps=4")
    assert plain.fate()["train"] == "reused"
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == plain.metrics


def test_sample_draws_the_runs_own_pictures(first: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = json.loads((first.stage("sample") / "prompts.json").read_text())
    for number in (0, 19):
        prompt = asked[number]
        words = ["--ckpt", str(first.out), "--prompt", prompt["prompt"], "--device", "cpu"]
        out = tmp_path / str(number)
        assert sample.main([*words, "--seed", str(prompt["seed"]), "--out", str(out)]) == 0
        theirs = load_png(first.stage("sample") / prompt["file"])[0]
        assert torch.equal(load_png(out / "00000.png")[0], theirs)


def test_prompts_are_those_of_both_splits(first: Run) -> None:
    asked = json.loads((first.stage("sample") / "prompts.json").read_text())
    assert [p["split"] for p in asked] == ["val"] * 16 + ["heldout"] * 16
    assert [p["seed"] for p in asked] == list(range(32))
    assert all(p["attributes"] and p["prompt"] for p in asked)
    assert len({p["key"] for p in asked if p["split"] == "val"}) == 16


# Keys ----


TRAINED = {"train", "sample", "score", "report"}
CHANGES: list[tuple[str, str, set[str]]] = [
    ("paella", "sampling.steps=2", {"sample", "score", "report"}),
    ("paella", "eval.prompts=8", {"sample", "score", "report"}),
    ("paella", "eval.traces=1", {"sample", "score", "report"}),
    ("paella", "eval.bootstrap=30", {"score", "report"}),
    ("paella", "eval.grid=8", {"score", "report"}),
    ("paella", "eval.batch_size=8", {"report"}),
    ("paella", "trainer.log_every=2", {"report"}),
    ("paella", "trainer.max_steps=4", TRAINED),
    ("paella", "optim.lr=0.01", TRAINED),
    ("paella", "objective.eta=0.5", TRAINED),
    ("paella", "text.layers=2", TRAINED),
    ("paella", "data.cache=false", {"cache", *TRAINED}),
    ("paella", "tokenizer.trainer.max_steps=4", {"tokenizer", "cache", *TRAINED}),
    ("paella", "tokenizer.optim.lr=0.01", {"tokenizer", "cache", *TRAINED}),
    ("paella", "data.workers=1", {"tokenizer", "cache", *TRAINED}),  # it orders the samples
    ("paella", "seed=1", {"tokenizer", "cache", *TRAINED}),
    ("paella", "data.seed=1", set(STAGES["paella"])),
    ("paella", "data.train_size=32", set(STAGES["paella"])),
    ("vqgan", "eval.grid=8", {"score", "report"}),
    ("vqgan", "eval.heldout=0", {"report"}),
    ("vqgan", "optim.lr=0.01", {"tokenizer", "score", "report"}),
    ("vqgan", "data.val_size=17", set(STAGES["vqgan"])),
]


def keys(paper: str, *words: str) -> dict[str, str]:
    return {s.name: s.key for s in stages.plan(paper, load(paper, "micro", words))}


@pytest.mark.parametrize(("paper", "word", "changed"), CHANGES)
def test_a_setting_changes_what_depends_on_it(paper: str, word: str, changed: set[str]) -> None:
    before, after = keys(paper), keys(paper, word)
    assert list(before) == STAGES[paper]
    assert {name for name in before if before[name] != after.get(name)} == changed


def test_both_papers_share_a_tokenizer_key() -> None:
    one, two = keys("paella"), keys("vqgan")
    assert (one["data"], one["tokenizer"]) == (two["data"], two["tokenizer"])
    words = ["trainer.devices=2", "trainer.accelerator=cpu"]
    assert keys("paella", *words)["tokenizer"] == keys("vqgan", *words)["tokenizer"]


def test_shards_are_known_by_their_files(tmp_path: Path) -> None:
    """Not by how they are spelled; and a file that was replaced is another one."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(b"0" * 1024)
    spelled = [f"data.shards={tmp_path}/{p}" for p in ("{0,1}.tar", "*.tar", "[0-1].tar")]
    found = [keys("vqgan", word) for word in [*spelled, f"data.shards={tmp_path}"]]
    assert all(f["tokenizer"] == found[0]["tokenizer"] for f in found)
    own_val = keys("vqgan", f"data.shards={tmp_path}/0.tar", f"data.val_shards={tmp_path}/1.tar")
    assert own_val["tokenizer"] != found[0]["tokenizer"]
    (tmp_path / "1.tar").write_bytes(b"1" * 1024)
    os.utime(tmp_path / "1.tar", (1, 1))
    assert keys("vqgan", spelled[0])["data"] != found[0]["data"]


# Interruptions ----


def test_a_training_that_ended_is_not_repeated(first: Run, copied: Path, tmp_path: Path) -> None:
    """Killed between the last border and the export: only the export is made up for."""
    moved = Run("paella", first.words, tmp_path / "out", copied)
    for name in ("train", "tokenizer"):
        folder = moved.stage(name)
        (folder / "done.json").unlink()
        for path in folder.glob("*.safetensors"):
            path.unlink()
    again = go("paella", tmp_path / "out", copied)
    expected = dict.fromkeys(STAGES["paella"], "reused")
    expected |= {"train": "continues", "tokenizer": "continues", "report": "runs"}
    assert again.fate() == expected  # the page shows the config, in which the cache has moved
    assert same(weights(again), weights(first))
    for name in ("train", "tokenizer"):
        assert curves(again.stage(name)) == curves(first.stage(name))
        assert len(list(again.stage(name).glob("log/*/metrics.csv"))) == 1


def test_sampling_goes_on_where_it_was_interrupted(
    first: Run, copied: Path, tmp_path: Path
) -> None:
    folder = Run("paella", first.words, tmp_path, copied).stage("sample")
    for name in ("done.json", "prompts.json", "traces.json", "trace-00000.png", "trace-00001.png"):
        (folder / name).unlink()
    for number in (3, 4, 11, 30):
        (folder / f"{number:05d}.png").unlink()
    kept = (folder / "00000.png").stat().st_mtime_ns
    again = go("paella", tmp_path / "out", copied)
    assert again.fate()["sample"] == "continues" and again.fate()["train"] == "reused"
    assert pixels(folder) == pixels(first.stage("sample"))
    assert (folder / "00000.png").stat().st_mtime_ns == kept
    assert again.metrics == first.metrics


def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the tokenizer, SIGTERM in the middle of the generator."""
    words = ["tokenizer.trainer.max_steps=48", "tokenizer.trainer.epoch_steps=8",
             "tokenizer.objective.disc_start=4", "trainer.max_steps=240",
             "trainer.epoch_steps=20", "optim.ema=0.9", "model.dropout=0.1"]  # fmt: skip
    cache, command = tmp_path / "cache", ["--paper", "paella", "logger=csv", *words]
    # both in processes of their own: another number of threads rounds sums differently
    quiet = tmp_path / "quiet"
    with started("", tmp_path / "whole", quiet, *command) as process:
        code, _, err = end(process)
    assert code == 0, err
    whole = Run("paella", [*words, "logger=csv", f"cache={quiet}"], tmp_path / "whole", quiet)
    for stage, number, code in (
        ("tokenizer", signal.SIGINT, 130),
        ("train", signal.SIGTERM, 143),
    ):
        with started("", tmp_path / "killed", cache, *command) as process:
            wait_for(cache, f"{stage}-*/{RESUME}", process)
            process.send_signal(number)
            found, _, err = end(process)
        assert found == code
        assert err.splitlines()[-1] == "interrupted; the same command resumes"
        (folder,) = cache.glob(f"{stage}-*")
        assert not (folder / "done.json").exists() and not (folder / "running.json").exists()
        assert not (tmp_path / "killed" / "metrics.json").exists()
        steps = torch.load(folder / RESUME, weights_only=True)["epoch"]
        assert steps < {"tokenizer": 5, "train": 11}[stage]  # it was in the middle
    with started("", tmp_path / "killed", cache, *command) as process:
        code, out, err = end(process)
    assert code == 0, err
    assert "tokenizer: reused" in out and "train: continues" in out

    killed = Run("paella", [*words, "logger=csv"], tmp_path / "killed", cache)
    assert same(weights(killed), weights(whole))
    tokenizers = [load_weights(r.out / "tokenizer.safetensors")[0] for r in (killed, whole)]
    assert same(*tokenizers)
    for name, label in (("tokenizer", "train/rec"), ("train", "train/loss")):
        ended = [curves(r.stage(name))[label][-1] for r in (killed, whole)]
        assert ended[0] == ended[1]
    assert killed.metrics == whole.metrics


def test_two_runs_at_once_share_their_work(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", [tmp_path / "a", tmp_path / "b"]
    command = ["--paper", "paella", "logger=csv"]
    with (
        started("", out[0], cache, *command) as one,
        started("", out[1], cache, *command, "sampling.steps=2") as two,
    ):
        ends = [end(process) for process in (one, two)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    said = [text for _, text, _ in ends]
    for stage in ("data", "tokenizer", "cache", "train"):
        assert sum(f"{stage}: done in" in text for text in said) == 1
        assert sum(f"{stage}: reused" in text for text in said) == 1
        assert len(list(cache.glob(f"{stage}-*"))) == 1
    assert same(weights(out[0]), weights(out[1]))
    assert len(list(cache.glob("sample-*"))) == 2
    assert not list(cache.rglob("*.tmp")) and not list(cache.rglob("running.json"))


# Several devices ----


RANKS = """
import os, sys
from pathlib import Path
import torch
from experiments import run, training, work

fit = training.fit

def noted(module, data, config, folder, *, what, **options):
    fit(module, data, config, folder, what=what, **options)
    rank, loop = int(os.environ["LOCAL_RANK"]), module.trainer.fit_loop
    keys = [k for k in module.state_dict() if "running" not in k]  # BatchNorm's are each rank's
    torch.save(
        {"batches": loop.total_batch_idx + 1, "steps": module.trainer.global_step,
         "state": {k: module.state_dict()[k] for k in keys}},
        Path(os.environ["NOTES"]) / f"{what}-{rank}.pt",
    )

work.fit = noted
sys.exit(run.main(sys.argv[1:]))
"""


def test_two_ranks_train_alike_and_end_together(tmp_path: Path) -> None:
    script, cache = tmp_path / "ranks.py", tmp_path / "cache"
    script.write_text(RANKS)
    words = ["--paper", "paella", "logger=csv", "trainer.devices=2", "trainer.accelerator=cpu",
             "trainer.strategy=ddp", "trainer.max_steps=200", "trainer.epoch_steps=20",
             "optim.ema=0.9"]  # fmt: skip
    with started(str(script), tmp_path / "out", cache, *words, NOTES=str(tmp_path)) as process:
        wait_for(cache, f"train-*/{RESUME}", process)
        process.send_signal(signal.SIGTERM)
        code, _, err = end(process)  # the other rank holds the pipe: it has ended too
    assert code == 143
    assert err.splitlines()[-1] == "interrupted; the same command resumes"

    with started(str(script), tmp_path / "out", cache, *words, NOTES=str(tmp_path)) as process:
        code, out, err = end(process)
    assert code == 0, err
    assert "tokenizer: reused" in out and "train: continues" in out
    for what, batches in (("tokenizer", 8), ("train", 200)):
        one, two = (torch.load(tmp_path / f"{what}-{r}.pt", weights_only=True) for r in (0, 1))
        assert one["batches"] == two["batches"] == batches
        assert one["steps"] == two["steps"]
        assert same(one["state"], two["state"])
    assert out.count("train: continues") == 1  # one rank speaks
    generator = load_generator(tmp_path / "out" / "checkpoint.safetensors")
    assert generator.num_codes == 32
    (folder,) = cache.glob("train-*")
    resume = torch.load(folder / RESUME, weights_only=True)
    assert resume["global_step"] == resume["ema"]["updates"] == 200


# Other data, other tokenizers, other networks ----


def test_digits(tmp_path: Path) -> None:
    run = go("paella", tmp_path / "out", tmp_path / "cache", "data=digits")
    assert run.metrics["eval/digit_accuracy"]["n"] == 16
    assert not any("scene" in name for name in run.metrics)
    asked = json.loads((run.stage("sample") / "prompts.json").read_text())
    assert {p["split"] for p in asked} == {"val"} and all(0 <= p["label"] <= 9 for p in asked)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The photographs that scikit-learn ships, as captioned 64-px JPEG patches in two shards."""
    folder = tmp_path_factory.mktemp("photos")
    paths = write_shards(photos(64, 48), folder, 125, "jpg")
    assert len(paths) == 2
    return f"{folder}/{{00000..00001}}.tar"


def test_photographs_through_shards(shards: str, tmp_path: Path) -> None:
    words = [f"data.shards={shards}", "data.resolution=64", "data.val_size=20", "eval.prompts=12"]
    alone = go("vqgan", tmp_path / "a", tmp_path / "cache", *words)
    assert alone.fate() == dict.fromkeys(STAGES["vqgan"], "runs")
    assert alone.metrics["eval/psnr"]["n"] >= 4
    run = go("paella", tmp_path / "b", tmp_path / "cache", *words)
    assert run.fate()["tokenizer"] == "reused" and run.fate()["train"] == "runs"
    names = {"tokenizer/psnr", "tokenizer/ssim", "tokenizer/codebook_usage"}
    assert names <= run.metrics.keys() and not any("scene" in n for n in run.metrics)

    # the split by key: what is validated was not trained on, and nothing is lost
    config = load("paella", "micro", run.words).data
    everything = [p["key"] for p in photos(64, 48)]
    asked = json.loads((run.stage("sample") / "prompts.json").read_text())
    cached = json.loads((run.stage("cache") / "cache.json").read_text())
    import pyarrow.parquet

    tables = sorted(run.stage("cache").glob("*.parquet"))
    trained = {key for t in tables for key in pyarrow.parquet.read_table(t)["key"].to_pylist()}
    validated = {p["key"] for p in asked}
    assert validated and not validated & trained
    assert len(trained) == cached["count"] < len(everything)
    share = holdout_share(config, {"train": sorted(map(str, Path(shards).parent.glob("*.tar")))})
    assert len(everything) - len(trained) == pytest.approx(share * len(everything), abs=12)
    made = load_png(run.stage("sample") / asked[0]["file"])[0]
    assert made.shape == (3, 64, 64)


def test_a_tokenizer_from_a_file(first: Run, tmp_path: Path) -> None:
    path = first.out / "tokenizer.safetensors"
    run = go("paella", tmp_path / "out", first.cache, f"tokenizer.ckpt={path}")
    assert run.fate()["data"] == "reused" and run.fate()["tokenizer"] == "runs"
    theirs = load_tokenizer(run.out / "tokenizer.safetensors").state_dict()
    assert same(theirs, load_tokenizer(path).state_dict())
    assert same(weights(run), weights(first))  # the same tokens, whichever way they came


def test_wrong_tokenizers_are_refused(first: Run, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        with pytest.raises(UserError) as raised:
            go("paella", tmp_path / "out", first.cache, *words)
        text = str(raised.value)
        assert "\n" not in text
        return text

    assert "there is no file" in said(f"tokenizer.ckpt={tmp_path}/none.safetensors")
    generator = first.out / "checkpoint.safetensors"
    assert "not a tokenizer" in said(f"tokenizer.ckpt={generator}")
    own = f"tokenizer.ckpt={first.out}/tokenizer.safetensors"
    assert "model.num_labels must be the tokenizer's 32 codes, got 31" in said(
        own, "model.num_labels=31"
    )
    assert "multiple" in said(own, "data.resolution=34")
    assert "multiple" in said(own, "data.resolution=36")


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"exists|directory") as raised:
        go("paella", tmp_path / "out", tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in str(raised.value)


def test_pictures_encoded_in_every_step(first: Run, tmp_path: Path) -> None:
    run = go("paella", tmp_path / "out", first.cache, "data.cache=false", "data.workers=1")
    assert list(run.fate()) == [s for s in STAGES["paella"] if s != "cache"]
    assert len(curves(run.stage("train"))["train/loss"]) == 8


def test_the_papers_condition(
    first: Run, tmp_path: Path, tiny_t5: str, tiny_clip: dict[str, str]
) -> None:
    """ByT5, pooled CLIP text and CLIP image, with small stand-ins; nothing frozen is stored."""
    clip = [f"text.{name}={value}" for name, value in tiny_clip.items()]
    full = go(
        "paella", tmp_path / "full", first.cache, "text=byt5", f"text.path={tiny_t5}", *clip,
        "model.byt5_embd=16", "model.clip_embd=12", "model.clip_image=true",
        "model.clip_seq_len=2", "data.cache=false",
    )  # fmt: skip
    assert {name.partition(".")[0] for name in weights(full)} == {"network"}
    assert "clip_image_mapper.weight" in {n.partition(".")[2] for n in weights(full)}
    v1 = go(
        "paella", tmp_path / "v1", first.cache, "network=v1", "text=open_clip", *clip,
        "v1.num_labels=32", "v1.c_hidden=16", "v1.c_clip=12", "v1.c_r=8", "v1.down_levels=[1,1]",
        "v1.up_levels=[1,1]", "sampling.schedule=cosine",
    )  # fmt: skip
    assert {name.partition(".")[0] for name in weights(v1)} == {"network"}
    for run in (full, v1):
        assert run.metrics["eval/scene_accuracy"]["n"] == 16
        resume = torch.load(run.stage("train") / RESUME, weights_only=True)
        assert {n.partition(".")[0] for n in resume["state_dict"]} == {"network"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_shard_ends_in_one_line(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
    Path("bad/00000.tar").write_bytes(noise.tobytes())
    words = ["--scale", "micro", "data.shards=bad", f"data.workers={workers}", "logger=csv"]
    for paper in ("vqgan", "paella"):
        assert main(["--paper", paper, *words, "cache=cache", "--out", "out"]) == 1
        err = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert len(err) == 1 and err[0].startswith("error: ") and "bad/00000.tar" in err[0]
    assert not Path("out").exists()


def test_the_resolved_config_is_kept_with_every_result(first: Run) -> None:
    config = resolved(load("paella", "micro", first.words))
    for name in STAGES["paella"]:
        marker = json.loads((first.stage(name) / "done.json").read_text())
        assert marker["settings"] == config
        assert marker["stage"] == name
