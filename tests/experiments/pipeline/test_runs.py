"""Whole runs at scale micro: what they leave, what they reuse, and how they survive a kill."""

import json
import os
import shutil
import signal
import socket
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
import pyarrow.parquet
import pytest
import torch
import wandb
from torch import Tensor

from data.files import file_hash, write_json
from data.photos import photos
from data.shards import write_shards
from data.sources import holdout_share
from experiments import run as run_command
from experiments.cli import command
from experiments.papers.registry import load
from experiments.pipeline import train
from experiments.pipeline.fit import RESUME, curves
from experiments.pipeline.plan import plan
from experiments.pipeline.publish import Titles
from experiments.pipeline.runner import execute, wandb_loggers, wandb_mode
from experiments.pipeline.stage import Stage
from experiments.pipeline.store import Store
from experiments.report.pictures import load_png
from experiments.settings import ConfigError, UserError
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.registry import load_first_stage, load_generator

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)
ROOT = Path(__file__).parents[3]
TOKENIZER = ["data-train", "data-val", "tokenizer"]
TRAINED = [*TOKENIZER, "encode", "train", "generator"]
VAL = ["captions-val", "sample-val", "features-sample-val"]
VAL += ["data-reference", "captions-reference", "features-reference"]
HELDOUT = [name.replace("val", "heldout").replace("reference", "heldout_reference") for name in VAL]
PARTIAL = [f"{what}-partial" for what in ("data", "captions", "sample", "features-sample")]
STAGES = {
    "paella": [*TRAINED, *VAL, "data-heldout", *HELDOUT, *PARTIAL, "features-val", "score"],
    "vqgan": [*TOKENIZER, "captions-val", "features-val", "score"],
}
DRAWN = [f"sample-{split}" for split in ("val", "heldout", "partial")]
# begun while their pictures were still drawn
BESIDE = dict.fromkeys([f"features-{name}" for name in DRAWN], "continues")
SAMPLED = {*DRAWN, *BESIDE}


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
        return Store(self.cache).folders[self.plan[name]]

    @cached_property
    def plan(self) -> dict[str, Stage]:
        return {s.name: s for s in plan(self.paper, load(self.paper, "micro", self.words)).stages}

    def fate(self) -> dict[str, str]:
        """Stage -> runs, continues or reused, by what was said."""
        heads = [line.partition("] ")[2].split() for line in self.lines if line.startswith("[")]
        return {h[0].rstrip(":"): h[1] for h in heads if h[1] in ("runs", "continues", "reused")}


def go(paper: str, out: Path, cache: Path, *words: str) -> Run:
    """Do a run in this process."""
    run = Run(paper, ["logger=csv", *words, f"cache={cache}"], out, cache)
    titles = Titles(paper, "micro", f"run {paper}")
    execute(titles, load(paper, "micro", run.words), out, run.lines.append)
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
    argv, pipe = [sys.executable, *module, *options], subprocess.PIPE
    process = subprocess.Popen(argv, cwd=out.parent, env=env, text=True, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def end(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(
    cache: Path, pattern: str, process: subprocess.Popen, known: dict[Path, int] | None = None
) -> None:
    """Wait for a file that was not there, or was another one, before."""
    limit = time.monotonic() + 120
    before = known or {}
    while all(path.stat().st_mtime_ns == before.get(path) for path in cache.glob(pattern)):
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
    """A paella from an empty cache, in batches of 4; the tests below build on its results."""
    root = tmp_path_factory.mktemp("first")
    return go("paella", root / "run", root / "cache", "eval.batch_size=4")


@pytest.fixture
def copied(first: Run, tmp_path: Path) -> Path:
    """A cache of its own with the results of the first run."""
    return Path(shutil.copytree(first.cache, tmp_path / "cache"))


# What a run leaves ----


def test_a_run_leaves_scores_pictures_page_and_checkpoint(first: Run) -> None:
    shown = {"config.yaml", "metrics.json", "report.html", "samples.png", "stages.json"}
    trained = {"checkpoint.json", "checkpoint.safetensors", "tokenizer.safetensors"}
    assert {p.name for p in first.out.iterdir()} == shown | trained
    assert first.fate() == dict.fromkeys(STAGES["paella"], "runs") | BESIDE
    assert list(first.plan) == STAGES["paella"]
    assert [line for line in first.lines if "done in" in line][4].startswith("[5/25] train: done")

    names = ["scene_atoms", "partial/scene_coverage", "partial/scene_coverage_real"]
    names += ["scene_accuracy", "scene_accuracy/relation", "clip_scenes", "heldout/scene_accuracy"]
    for name in (*(f"eval/{name}" for name in names), "tokenizer/psnr"):
        score = first.metrics[name]
        assert score["n"] == 16 and score["low"] <= score["value"] <= score["high"]
    assert {"eval/fd_scenes", "eval/fd_scenes_floor"} <= first.metrics.keys()

    page = (first.out / "report.html").read_text()
    assert "run paella" in page and "eval/scene_accuracy" in page and 'src="http' not in page
    assert load_png(first.out / "samples.png")[0].ndim == 3
    assert load("paella", str(first.out / "config.yaml")) == load("paella", "micro", first.words)
    assert load_generator(first.out).config.sampling.steps == 3


def test_nothing_large_is_copied_and_every_result_is_named(first: Run) -> None:
    told = json.loads((first.out / "stages.json").read_text())
    assert told["cache"] == str(first.cache)
    assert [row["name"] for row in told["stages"]] == STAGES["paella"]
    assert all((first.cache / row["folder"] / "done.json").is_file() for row in told["stages"])
    trained = first.stage("train") / "checkpoint.safetensors"
    tokenizer = first.stage("tokenizer") / "first_stage.safetensors"
    for folder in (first.out, first.stage("generator")):
        assert (folder / "checkpoint.safetensors").samefile(trained)
        assert (folder / "tokenizer.safetensors").samefile(tokenizer)
    about = json.loads((first.out / "checkpoint.json").read_text())
    named = {"file": "tokenizer.safetensors", "sha256": file_hash(tokenizer)}
    assert about["first_stage"] == named


def test_every_marker_tells_what_the_result_depends_on(first: Run) -> None:
    for name, stage in first.plan.items():
        marker = json.loads((first.stage(name) / "done.json").read_text())
        assert (marker["name"], marker["key"]) == (name, stage.key)
        assert marker["fields"] == json.loads(json.dumps(stage.content))


def test_the_curves_have_every_step(first: Run) -> None:
    found = curves(first.stage("train"))
    assert [step for step, _ in found["train/loss"]] == list(range(8))
    assert [step for step, _ in found["val/loss"]] == [3, 7]
    assert not (first.stage("train") / "running.json").exists()


def test_the_second_run_reuses_everything(first: Run, tmp_path: Path) -> None:
    again = go("paella", tmp_path / "again", first.cache, "eval.batch_size=4")
    assert again.fate() == dict.fromkeys(STAGES["paella"], "reused")
    for name in ("metrics.json", "samples.png", "report.html", "checkpoint.safetensors"):
        assert (again.out / name).read_bytes() == (first.out / name).read_bytes()


def test_fewer_sampling_steps_train_nothing(first: Run, tmp_path: Path) -> None:
    before = (first.stage("train") / "checkpoint.safetensors").stat().st_mtime_ns
    quick = go("paella", tmp_path / "quick", first.cache, "sampling.steps=2")
    again = SAMPLED | {"score"}
    fate = {s: "runs" if s in again else "reused" for s in STAGES["paella"]}
    assert quick.fate() == fate | BESIDE
    assert (quick.stage("train") / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert same(weights(quick), weights(first))
    # and the checkpoint of a run samples as the run did
    assert load_generator(quick.out).config.sampling.steps == 2
    assert pixels(quick.stage("sample-val")) != pixels(first.stage("sample-val"))


def test_vqgan_shares_the_tokenizer(first: Run, tmp_path: Path) -> None:
    alone = go("vqgan", tmp_path / "alone", first.cache)
    again = {"features-val": "runs", "score": "runs"}  # with a distance that no generator needs
    assert alone.fate() == {s: "reused" for s in STAGES["vqgan"]} | again
    assert alone.stage("tokenizer") == first.stage("tokenizer")
    without = {p.name for p in first.out.iterdir()} - {p.name for p in alone.out.iterdir()}
    assert without == {"checkpoint.json", "checkpoint.safetensors"}
    own, other = alone.metrics["eval/psnr"], first.metrics["tokenizer/psnr"]
    assert own["value"] == pytest.approx(other["value"], rel=1e-5)  # in batches of another size
    scores = {"psnr", "ssim", "codebook_usage", "codebook_perplexity", "scene_accuracy"}
    scores |= {"rfd_scenes"}
    assert {f"eval/{name}" for name in scores} <= alone.metrics.keys()


def test_a_run_is_the_same_everywhere_and_with_every_logger(first: Run, tmp_path: Path) -> None:
    """From an empty cache, elsewhere, with W&B: nothing differs."""
    other = go("paella", tmp_path / "out", tmp_path / "cache", "logger=wandb", "eval.batch_size=4")
    assert other.fate() == dict.fromkeys(STAGES["paella"], "runs") | BESIDE
    assert other.metrics == first.metrics
    assert same(weights(other), weights(first))
    for split in ("val", "heldout", "partial"):
        drawn = pixels(other.stage(f"sample-{split}"))
        assert drawn == pixels(first.stage(f"sample-{split}")) and len(drawn) >= 16
    for name in ("tokenizer", "train"):
        assert curves(other.stage(name)) == curves(first.stage(name))


def test_wandb_is_offline_without_a_key(tmp_path: Path) -> None:
    """No key, no login, no network, no home: the curves of both trainings go into the run folder.

    Without a home wandb's service logs to the screen where it is given no other folder.
    """
    cache, hidden = tmp_path / "cache", {"NETRC": "none", "WANDB_DIR": str(tmp_path)}
    shown = {k: v for k, v in os.environ.items() if k.startswith("WANDB") or k == "HOME"}
    words = ["eval.edits=0", "eval.heldout=0"]
    for name in shown:
        os.environ.pop(name)
    try:
        with started(
            "", tmp_path / "out", cache, "--paper", "muse", "logger=wandb", *words, **hidden
        ) as process:
            code, out, err = end(process)
    finally:
        os.environ.update(shown)
    assert code == 0, err
    assert err == "" and "superres: done" in out and "curves go to W&B offline: " in out
    (offline,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (path,) = offline.glob("*.wandb")
    stored = path.read_bytes()
    for label in ("train/loss", "val/loss"):
        both = stored.count(label.encode())
        prefixed = stored.count(f"superres-{label}".encode())
        assert prefixed and both > prefixed, label
    assert b"superres/scene_accuracy" in stored
    plain = go("muse", tmp_path / "csv", cache, *words)
    assert set(plain.fate().values()) == {"reused"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == plain.metrics


def test_the_trainings_of_a_run_share_one_wandb_run(tmp_path: Path) -> None:
    run = load("muse", "micro", ["logger=csv", f"cache={tmp_path / 'cache'}"])
    titles, out, said = Titles("muse", "micro", "words"), tmp_path / "out", list[str]()
    assert wandb_loggers(plan("muse", run), run, titles, out, said.append) == {}
    assert not out.exists()
    run.logger = "wandb"
    made = wandb_loggers(plan("muse", run), run, titles, out, said.append)
    assert list(made) == ["train", "superres"]  # the tokenizer's is shared by other runs
    asked = made["train"]._wandb_init
    assert asked["mode"] == "disabled"  # WANDB_MODE of these tests
    assert (asked["project"], asked["name"], asked["group"]) == ("tokengrid", "out", "muse")
    assert asked["tags"] == ["micro", "scenes"] and asked["config"]["seed"] == 0
    assert made["superres"]._prefix == "superres" and not made["train"]._prefix
    assert made["superres"].experiment is made["train"].experiment
    tokenizer = load("vqgan", "micro", ["logger=wandb"])
    made = wandb_loggers(plan("vqgan", tokenizer), tokenizer, titles, out, said.append)
    assert list(made) == ["tokenizer"] and said == []


def test_a_sweeps_agent_names_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "x")
    run = load("paella", "micro", ["logger=wandb"])
    made = wandb_loggers(plan("paella", run), run, Titles("paella", "micro", ""), tmp_path, print)
    assert made["train"]._wandb_init["name"] is None


def test_without_network_or_key_wandb_writes_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionRefusedError

    said: list[str] = []
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert wandb_mode(said.append) == "offline"
    assert said == ["      curves go to W&B offline: wandb.example cannot be reached"]
    monkeypatch.setattr(socket, "create_connection", lambda *args, **options: socket.socket())
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    assert wandb_mode(said.append) == "offline" and said[1].endswith("there is no W&B key")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE=online: there is no W&B key; leave it out"):
        wandb_mode(said.append)
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    assert wandb_mode(said.append) is None and len(said) == 2


def asked_of(run: Run, split: str) -> list[dict[str, Any]]:
    return json.loads((run.stage(f"sample-{split}") / "prompts.json").read_text())


def test_prompts_are_those_of_every_split(first: Run) -> None:
    for split, seed in (("val", 0), ("heldout", 1_000_000), ("partial", 2_000_000)):
        asked = asked_of(first, split)
        assert [p["split"] for p in asked] == [split] * 16
        assert [p["seed"] for p in asked] == [*range(seed, seed + 16)]
        assert all(p["attributes"] and p["prompt"] for p in asked)
        assert len({p["key"] for p in asked}) == 16


# Keys ----


def keys(paper: str, *words: str) -> dict[str, str]:
    return {s.name: s.key for s in plan(paper, load(paper, "micro", words)).stages}


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
    assert keys("vqgan", spelled[0])["data-train"] != found[0]["data-train"]


# Interruptions ----


def test_a_training_that_ended_is_not_repeated(first: Run, copied: Path, tmp_path: Path) -> None:
    """Killed between the last border and the export: only the export is made up for."""
    moved = Run("paella", first.words, tmp_path / "out", copied)
    for name in ("train", "tokenizer"):
        folder = moved.stage(name)
        (folder / "done.json").unlink()
        for path in folder.glob("*.safetensors"):
            path.unlink()
    again = go("paella", tmp_path / "out", copied, "eval.batch_size=4")
    expected = dict.fromkeys(STAGES["paella"], "reused")
    assert again.fate() == {**expected, "train": "continues", "tokenizer": "continues"}
    assert same(weights(again), weights(first))
    for name in ("train", "tokenizer"):
        assert curves(again.stage(name)) == curves(first.stage(name))
        assert len(list(again.stage(name).glob("log/*/metrics.csv"))) == 1


def test_sampling_goes_on_where_it_was_interrupted(
    first: Run, copied: Path, tmp_path: Path
) -> None:
    folder = Run("paella", first.words, tmp_path, copied).stage("sample-val")
    for name in ("done.json", "prompts.json", "traces.json", "trace-00000.png", "trace-00001.png"):
        (folder / name).unlink()
    for number in (0, 2):
        (folder / f"batch-4-{number:05d}.safetensors").unlink()
    for number in (1, 2, 3, 9):
        (folder / f"{number:05d}.png").unlink()
    for number in (1, 3):  # what stands beside the parts until all are done
        part = f"batch-4-{number:05d}.safetensors"
        names = [f"{4 * number + k:05d}.png" for k in range(4)] + [part]
        sums = {name: file_hash(folder / name) for name in names}
        noted = {"key": folder.name[-12:], "files": sums, "seconds": 1.0}
        write_json(folder / f".{part}.sum", noted)
    kept = {n: (folder / f"{n:05d}.png").stat().st_mtime_ns for n in (4, 7, 12, 15)}
    again = go("paella", tmp_path / "out", copied, "eval.batch_size=4")
    assert again.fate()["sample-val"] == "continues"
    assert {again.fate()[name] for name in STAGES["paella"] if name != "sample-val"} == {"reused"}
    assert pixels(folder) == pixels(first.stage("sample-val"))
    assert {n: (folder / f"{n:05d}.png").stat().st_mtime_ns for n in kept} == kept
    assert again.metrics == first.metrics


def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the tokenizer, SIGTERM and SIGKILL in that of the generator."""
    tokenizer = ["trainer.max_steps=48", "trainer.epoch_steps=8", "objective.disc_start=4"]
    words = [f"tokenizer.{word}" for word in tokenizer]
    words += ["trainer.max_steps=240", "trainer.epoch_steps=20", "optim.ema=0.9"]
    words += ["model.dropout=0.1", "eval.heldout=0"]
    cache, command = tmp_path / "cache", ["--paper", "paella", "logger=csv", *words]
    # both in processes of their own: another number of threads rounds sums differently
    quiet = tmp_path / "quiet"
    with started("", tmp_path / "whole", quiet, *command) as process:
        code, _, err = end(process)
    assert code == 0, err
    whole = Run("paella", [*words, "logger=csv", f"cache={quiet}"], tmp_path / "whole", quiet)
    for stage, number, code, epoch in (
        ("tokenizer", signal.SIGINT, 130, 5),
        ("train", signal.SIGTERM, 143, 11),
        ("train", signal.SIGKILL, -9, 11),
    ):
        known = {path: path.stat().st_mtime_ns for path in cache.glob(f"{stage}-*/{RESUME}")}
        with started("", tmp_path / "killed", cache, *command) as process:
            wait_for(cache, f"{stage}-*/{RESUME}", process, known)
            process.send_signal(number)
            found, _, err = end(process)
        assert found == code
        (folder,) = cache.glob(f"{stage}-*")
        if number != signal.SIGKILL:
            assert err.splitlines()[-1] == "interrupted; the same command resumes"
            assert not (folder / "running.json").exists()
        assert not (folder / "done.json").exists()
        assert not (tmp_path / "killed" / "metrics.json").exists()
        assert torch.load(folder / RESUME, weights_only=True)["epoch"] < epoch  # in the middle
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
    command = ["--paper", "paella", "logger=csv", "eval.heldout=0"]
    with (
        started("", out[0], cache, *command) as one,
        started("", out[1], cache, *command, "sampling.steps=2") as two,
    ):
        ends = [end(process) for process in (one, two)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    said = [text for _, text, _ in ends]
    for stage in [*TRAINED, *VAL, "features-val", "score"]:
        both = stage in SAMPLED | {"score"}
        assert sum(f" {stage}: done in" in text for text in said) == 1 + both
        assert sum(f" {stage}: reused" in text for text in said) == 1 - both
        assert len(list(cache.glob(f"{stage}-{'[0-9a-f]' * 12}"))) == 1 + both
    assert same(weights(out[0]), weights(out[1]))
    assert not list(cache.rglob("*.tmp")) and not list(cache.rglob("running.json"))


# Several devices ----


RANKS = """
import os, sys
from pathlib import Path
import torch
from experiments import cli, run
from experiments.pipeline import fit as training

fit = training.fit

def noted(module, data, loop, folder, *, what, **options):
    fit(module, data, loop, folder, what=what, **options)
    rank, progress = int(os.environ["LOCAL_RANK"]), module.trainer.fit_loop
    keys = [k for k in module.state_dict() if "running" not in k]  # BatchNorm's are each rank's
    torch.save(
        {"batches": progress.total_batch_idx + 1, "steps": module.trainer.global_step,
         "state": {k: module.state_dict()[k] for k in keys}},
        Path(os.environ["NOTES"]) / f"{what}-{rank}.pt",
    )

training.fit = noted
sys.exit(cli.command(run.run, sys.argv[1:]))
"""


def test_two_ranks_train_alike_and_end_together(tmp_path: Path) -> None:
    script, cache = tmp_path / "ranks.py", tmp_path / "cache"
    script.write_text(RANKS)
    trainer = ["devices=2", "accelerator=cpu", "strategy=ddp", "max_steps=200", "epoch_steps=20"]
    words = ["--paper", "paella", "logger=csv", *(f"trainer.{word}" for word in trainer)]
    words += ["optim.ema=0.9", "eval.heldout=0"]
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
    assert load_generator(tmp_path / "out").num_codes == 32
    (folder,) = cache.glob("train-*")
    resume = torch.load(folder / RESUME, weights_only=True)
    assert resume["global_step"] == resume["ema"]["updates"] == 200


# Other data, other tokenizers, other networks ----


def test_digits(tmp_path: Path) -> None:
    shipped = ["tokenizer.preset=tiny", "tokenizer.ckpt=shipped", "model.num_labels=512"]
    run = go("paella", tmp_path / "out", tmp_path / "cache", "data=digits", *shipped)
    note = "note: the shipped tokenizer was trained on scenes, not on digits"
    assert sum(note in line for line in run.lines) == 1
    assert note.capitalize() in (run.out / "report.html").read_text()
    assert run.metrics["eval/digit_accuracy"]["n"] == 16
    assert not any("scene" in name for name in run.metrics)
    assert "sample-heldout" not in run.plan
    asked = asked_of(run, "val")
    assert all(0 <= p["label"] <= 9 for p in asked)


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
    # of captions that no classifier reads
    scores = {"eval/fd_scenes", "eval/fd_scenes_floor"}
    found = {name for name in run.metrics if name.startswith("eval/")}
    assert found == scores | {"eval/network_calls"} and names <= run.metrics.keys()
    assert "say little of what the pictures show" in run.metrics["eval/fd_scenes"]["about"]

    # the split by key: what is validated was not trained on, and nothing is lost
    everything = {p["key"] for p in photos(64, 48)}
    tables = sorted(run.stage("encode").glob("*.parquet"))
    trained = {key for t in tables for key in pyarrow.parquet.read_table(t)["key"].to_pylist()}
    validated = {p["key"] for p in asked_of(run, "val")}
    assert validated and not validated & trained
    cached = json.loads((run.stage("encode") / "cache.json").read_text())
    assert len(trained) == cached["count"] < len(everything)
    share = holdout_share(sorted(map(str, Path(shards).parent.glob("*.tar"))))
    assert len(everything - trained) == pytest.approx(share * len(everything), abs=12)
    assert load_png(run.stage("sample-val") / "00000.png")[0].shape == (3, 64, 64)

    # without captions to spare there is no distance, and a word of why; nothing is trained for it
    few = go("paella", tmp_path / "c", tmp_path / "cache", *words, "data.val_size=12")
    assert few.fate()["train"] == few.fate()["tokenizer"] == few.fate()["encode"] == "reused"
    assert not scores & few.metrics.keys()
    assert any("too few real pictures of other captions" in line for line in few.lines)


def test_a_tokenizer_from_a_file(first: Run, tmp_path: Path) -> None:
    path = first.out / "tokenizer.safetensors"
    run = go("paella", tmp_path / "out", first.cache, f"tokenizer.ckpt={path}")
    assert run.fate()["data-train"] == "reused" and run.fate()["given-vqgan"] == "runs"
    assert "tokenizer" not in run.plan
    assert (run.out / "tokenizer.safetensors").samefile(path)  # a link again, no copy
    theirs = load_first_stage(run.out / "tokenizer.safetensors").state_dict()
    assert same(theirs, load_first_stage(path).state_dict())
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
    out = tmp_path / "file" / "out"
    with pytest.raises(ConfigError, match=f"--out {out} cannot be written: Not a directory"):
        go("paella", out, tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # no work was done for it


def test_first_weights_follow_from_the_seed_alone(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is loaded before draws numbers, too; it used to decide the first weights."""
    load = train.attachable

    def draws(*arguments: Any) -> Any:
        torch.rand(7)
        return load(*arguments)

    monkeypatch.setattr(train, "attachable", draws)
    other = go("paella", tmp_path / "out", tmp_path / "cache", "eval.heldout=0", "eval.prompts=4")
    assert same(weights(other), weights(first))


def test_pictures_encoded_in_every_step(first: Run, tmp_path: Path) -> None:
    run = go("paella", tmp_path / "out", first.cache, "data.cache=false", "data.workers=1")
    assert list(run.fate()) == [s for s in STAGES["paella"] if s != "encode"]
    assert len(curves(run.stage("train"))["train/loss"]) == 8


def test_the_papers_condition(
    first: Run, tmp_path: Path, tiny_t5: str, tiny_clip: dict[str, str]
) -> None:
    """ByT5, pooled CLIP text and CLIP image, with small stand-ins; nothing frozen is stored."""
    clip = [f"text.{name}={value}" for name, value in tiny_clip.items()]
    sizes = ["byt5_embd=16", "clip_embd=12", "clip_image=true", "clip_seq_len=2"]
    words = ["text=byt5", f"text.path={tiny_t5}", *clip, *(f"model.{size}" for size in sizes)]
    full = go("paella", tmp_path / "full", first.cache, *words, "data.cache=false")
    assert {name.partition(".")[0] for name in weights(full)} == {"network"}
    assert "clip_image_mapper.weight" in {n.partition(".")[2] for n in weights(full)}
    sizes = ["num_labels=32", "c_hidden=16", "c_clip=12", "c_r=8", "down_levels=[1,1]"]
    words = ["network=v1", "text=open_clip", *clip, *(f"v1.{size}" for size in sizes)]
    words += ["v1.up_levels=[1,1]", "sampling.schedule=cosine"]
    v1 = go("paella", tmp_path / "v1", first.cache, *words)
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
        argv = ["--paper", paper, *words, "cache=cache", "--out", "out"]
        assert command(run_command.run, argv) == 1
        err = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert len(err) == 1 and err[0].startswith("error: ") and "bad/00000.tar" in err[0]
    assert not Path("out").exists()
