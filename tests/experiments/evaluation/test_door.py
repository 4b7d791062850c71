"""Evaluations end to end on a planted COCO, with the embedded classifier's features."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eval.clip_score
import eval.cmmd
import eval.fid
import eval.fid_coco30k
import eval.prdc
import eval.preference
import eval.reconstruction
from data.files import file_hash
from eval.rows import load_measured
from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door
from experiments.report.pictures import load_png
from lightning_modules.common.checkpoint import load_weights
from tests import micro_checkpoint, planted

ROOT = Path(__file__).parents[3]
THREADS = str(torch.get_num_threads())  # on which the last bits depend
NUM, SIZE = 64, 8
COCO30K = eval.fid_coco30k.DOOR


def call(door: Door, *words: Any) -> int:
    return command(lambda argv: evaluate(door, argv), [str(word) for word in words])


def pngs(out: Path) -> dict[str, str]:
    return {p.name: file_hash(p) for p in sorted((out / "images").glob("*.png"))}


def scores(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())["scores"]


class Place:
    """A planted COCO, a checkpoint, and the words of an evaluation of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.coco = planted.coco(root / "coco", train=1, val=NUM)
        self.ckpt = micro_checkpoint.write(root / "run")

    def words(self, out: Path, cache: Path | None = None, form: str = "--{}={}") -> list[str]:
        given = {"ckpt": self.ckpt, "coco": self.coco, "num": NUM, "features": "scenes"}
        given |= {"batch-size": SIZE, "out": out, "cache": cache or out.parent / "cache"}
        return [form.format(name, value) for name, value in given.items()]

    def start(self, words: list[str], **environment: str) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS, **environment}
        line = [sys.executable, "-m", "eval.fid_coco30k", *words]
        return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def once(place: Place) -> Path:
    """The output of one run of the command."""
    out = place.root / "once"
    assert call(COCO30K, *place.words(out)) == 0
    return out


# What an evaluation leaves ----


def test_one_picture_per_id_and_a_result_that_says_how(place: Place, once: Path) -> None:
    numbers = {int(name.partition(".")[0]) for name in pngs(once)}
    assert numbers == {*range(5001, 5001 + NUM)}
    rows = json.loads((once / "prompts.json").read_text())
    picture, text = load_png(once / "images" / rows[3]["file"])
    assert picture.shape == (3, 32, 32)
    assert text == {"prompt": rows[3]["prompt"], "seed": rows[3]["id"]}

    told = json.loads((once / "result.json").read_text())
    found = {name.partition("/")[2]: score for name, score in told["scores"].items()}
    names = {"fd_scenes", "fd_scenes_floor", "fd_scenes_infinity", "kd_scenes", "clip_scenes"}
    names |= {"network_calls"}
    assert found.keys() == names and all(score["n"] in (NUM, NUM // 2) for score in found.values())
    protocol = told["protocol"]
    assert protocol["name"] == "coco30k" and {"num", "features"} <= {*protocol["changed"]}
    assert "prompts" not in protocol["changed"]
    assert protocol["n"] == protocol["list"]["n"] == protocol["reference"]["n"] == NUM
    assert len(protocol["list"]["sha256"]) == len(protocol["reference"]["sha256"]) == 64
    assert protocol["reference"]["prepared"] == {
        "resolution": 256,
        "crop": "square",
        "filter": "bicubic",
    }
    pictures = told["pictures"]
    assert pictures["checkpoint_sha256"] == file_hash(place.ckpt / "checkpoint.safetensors")
    assert pictures["first_stage_sha256"] == file_hash(place.ckpt / "tokenizer.safetensors")
    assert pictures["sampling"]["steps"] == 3 and pictures["format"] == "png"
    assert pictures["negative"] is None and "seed 0 + i" in pictures["seed_rule"]
    libraries = {"torch", "torchvision", "pillow", "clean-fid", "transformers", "open_clip_torch"}
    assert libraries <= told["versions"].keys()
    assert told["speed"]["images_per_second_and_process"] > 0
    assert told["command"].startswith("python -m eval.fid_coco30k --ckpt=")


def test_the_same_command_again_makes_nothing(place: Place, once: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in (once / "images").iterdir()}
    told = scores(once)
    capsys.readouterr()
    assert call(COCO30K, *place.words(once)) == 0
    assert ": runs" not in capsys.readouterr().out and scores(once) == told
    assert {p: p.stat().st_mtime_ns for p in (once / "images").iterdir()} == before


def test_a_folder_scores_as_the_checkpoint_that_filled_it(
    place: Place, once: Path, tmp_path: Path
) -> None:
    words = [w for w in place.words(tmp_path / "out") if not w.startswith("--ckpt")]
    assert call(COCO30K, *words, "--images", once / "images") == 0
    drawn = scores(once)
    assert drawn.pop("eval/network_calls")["value"] == 3  # a folder does not tell
    assert scores(tmp_path / "out") == drawn
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (
        told["protocol"]["list"]
        == json.loads((once / "result.json").read_text())["protocol"]["list"]
    )


def test_the_written_list_can_be_given(place: Place, once: Path, tmp_path: Path) -> None:
    words = ["--ckpt", place.ckpt, "--prompts", once / "prompts.json", "--features", "scenes"]
    words += ["--reference", place.coco / "val2014", "--batch-size", SIZE, "--num", NUM]
    more = ["--protocol", "coco30k", "--scores", "fid", "--out", tmp_path / "out"]
    assert call(eval.fid.DOOR, *words, *more, "--cache", place.root / "cache") == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())["protocol"]
    assert told["changed"] == ["num", "reference", "features", "scores", "prompts"]
    assert pngs(tmp_path / "out") == pngs(once)
    assert scores(tmp_path / "out")["eval/fd_scenes"] == scores(once)["eval/fd_scenes"]


# However the work is divided ----


def test_killed_and_started_again(place: Place, once: Path, tmp_path: Path) -> None:
    words = place.words(tmp_path / "out")
    process = place.start(words)
    images, end = tmp_path / "out" / "images", time.monotonic() + 120
    while len([*images.glob("*.png")]) < 2 * SIZE and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    made = {p: p.stat().st_mtime_ns for p in images.glob("*.png")}
    assert process.returncode == -signal.SIGKILL and SIZE < len(made) < NUM
    assert call(COCO30K, *words) == 0
    assert pngs(tmp_path / "out") == pngs(once) and scores(tmp_path / "out") == scores(once)
    kept = [p for p, when in made.items() if p.stat().st_mtime_ns == when]
    assert len(kept) >= SIZE  # those of the batches that were whole


def test_two_ranks(place: Place, once: Path, tmp_path: Path) -> None:
    words = place.words(tmp_path / "out", form="{}={}")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}
    done = subprocess.run(
        [*line, "-m", "eval.fid_coco30k", *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("eval/fd_scenes_floor") == 1  # one rank speaks
    assert pngs(tmp_path / "out") == pngs(once) and scores(tmp_path / "out") == scores(once)


def test_an_array_of_three_and_a_final_call(place: Place, once: Path, tmp_path: Path) -> None:
    words = place.words(tmp_path / "out")
    tasks = [place.start(words, SLURM_ARRAY_TASK_ID=str(i)) for i in range(3)]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0]
    assert sum("sample-prompts: runs in" in text for text in said) == 1
    assert call(COCO30K, *words) == 0
    assert pngs(tmp_path / "out") == pngs(once) and scores(tmp_path / "out") == scores(once)


# Trouble ----


def test_damaged_pictures_are_made_again_and_no_others(
    place: Place, once: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert call(COCO30K, *place.words(out, place.root / "cache")) == 0
    names = [row["file"] for row in json.loads((out / "prompts.json").read_text())]
    images = out / "images"
    (images / names[0]).write_bytes((images / names[0]).read_bytes()[:90])  # cut off
    Image.new("RGB", (8, 8)).save(images / names[1])  # another size
    Image.new("L", (32, 32)).save(images / names[2])  # no colours
    (images / names[3 * SIZE]).unlink()
    before = {name: (images / name).stat().st_mtime_ns for name in names[SIZE : 3 * SIZE]}
    (out / "result.json").unlink()
    capsys.readouterr()
    assert call(COCO30K, *place.words(out, place.root / "cache")) == 0
    assert "is damaged; sample-prompts is mended" in capsys.readouterr().out
    assert pngs(out) == pngs(once) and scores(out) == scores(once)
    assert {name: (images / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more(
    number: int, place: Place, once: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    replace: Callable[..., None] = os.replace
    left = [30]

    def fail(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    words = place.words(tmp_path / "out", place.root / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("data.files.os.replace", fail)
        assert call(COCO30K, *words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and os.strerror(number) in err and str(tmp_path) in err
    kept = pngs(tmp_path / "out")
    assert kept and not [*(tmp_path / "out" / "images").glob(".*.tmp")]
    assert call(COCO30K, *words) == 0
    assert pngs(tmp_path / "out") == pngs(once)


def test_a_folder_that_cannot_be_written(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    assert call(COCO30K, *place.words(tmp_path / "file" / "out", tmp_path / "cache")) == 2


def test_other_settings_do_not_mix_with_what_is_there(
    place: Place, once: Path, capsys: Any
) -> None:
    before = pngs(once)
    assert call(COCO30K, *place.words(once), "sampling.steps=2") == 2
    assert "sampling.steps is 3 there and 2 here" in capsys.readouterr().err
    assert pngs(once) == before


def test_a_folder_of_others_pictures_is_not_written_into(
    place: Place, tmp_path: Path, capsys: Any
) -> None:
    planted.picture(tmp_path / "out" / "images" / "a.png")
    assert call(COCO30K, *place.words(tmp_path / "out")) == 2
    assert "holds images/ that no evaluation made" in capsys.readouterr().err


REFUSED = {
    "pictures of another size": (
        ["--images", "IMAGES", "--reference", "VAL", "--features", "scenes"],
        "holds pictures of 24x20 pixels, and 32x32 are scored; --crop says how",
    ),
    "ids without a picture": (
        ["--images", "FEW", "--coco", "COCO", "--reference", "val2014", "--features", "scenes"],
        "lacks the pictures of 62 of 64 ids: ",
    ),
    "too few pictures": (
        ["--images", "FEW", "--reference", "VAL", "--num", 3, "--features", "scenes"],
        "holds 2 pictures, not 3",
    ),
    "two sources": (
        ["--images", "FEW", "--ckpt", "CKPT", "--num", 2, "--reference", "VAL"],
        "name either --ckpt, a generator, or --images",
    ),
    "a setting of sampling for pictures that are there": (
        ["--images", "FEW", "--reference", "VAL", "sampling.steps=3"],
        "sampling.steps=3 goes with --ckpt",
    ),
    "a negative prompt for pictures that are there": (
        ["--images", "FEW", "--reference", "VAL", "--negative", "grey"],
        "--negative goes with --ckpt",
    ),
    "no reference": (["--ckpt", "CKPT", "--num", 4], "--reference is missing"),
    "no number": (["--ckpt", "CKPT", "--reference", "VAL"], "--num is missing"),
    "classes of a model of text": (
        ["--ckpt", "CKPT", "--classes", 3, "--reference", "VAL", "--features", "scenes"],
        "is conditioned on text, not on classes",
    ),
    "no checkpoint": (
        ["--ckpt", "nothing", "--num", 4, "--reference", "VAL", "--features", "scenes"],
        "there is no checkpoint nothing",
    ),
    "an unknown score": (["--scores", "fid,kit"], "--scores: 'kit' is not one of fid, kid"),
    "a score of Inception": (
        [
            "--ckpt",
            "CKPT",
            "--num",
            4,
            "--scores",
            "sfid",
            "--features",
            "scenes",
            "--reference",
            "VAL",
        ],
        "sfid is a score of Inception-v3 alone",
    ),
    "an unknown setting": (
        [
            "--ckpt",
            "CKPT",
            "--num",
            4,
            "--reference",
            "VAL",
            "--features",
            "scenes",
            "sampling.step=3",
        ],
        "did you mean sampling.steps?",
    ),
    "weights that are not there": (
        ["--ckpt", "CKPT", "--num", 4, "--reference", "VAL", "--weights", "inception=none.pt"],
        "there is no file none.pt",
    ),
    "pictures for a score of pictures": (
        [
            "--ckpt",
            "CKPT",
            "--num",
            4,
            "--scores",
            "kid",
            "--features",
            "scenes",
            "--reference",
            "NPZ",
        ],
        "kid compares pictures, and",
    ),
    "a size that the classifier cannot read": (
        [
            "--images",
            "IMAGES",
            "--reference",
            "VAL",
            "--resolution",
            48,
            "--crop",
            "square",
            "--features",
            "scenes",
        ],
        "reads pictures of 32 px or multiples of it, not of 48",
    ),
    "statistics of other features": (
        ["--ckpt", "CKPT", "--num", 4, "--features", "scenes", "--reference", "NPZ"],
        "holds statistics of 3 features, and scenes has 64",
    ),
    "no statistics": (
        ["--ckpt", "CKPT", "--num", 4, "--features", "scenes", "--reference", "EMPTY"],
        "holds no statistics",
    ),
    "no prompts for a score of prompts": (
        ["--ckpt", "CKPT", "--num", 4, "--scores", "clip_score", "--features", "scenes"],
        "a score of pictures and prompts needs",
    ),
    "a negative number": (["--num", -1], "--num must be at least 2, got -1"),
    "a list without COCO": (["--protocol", "imagen", "--ckpt", "CKPT"], "--coco ROOT is missing"),
    "an unknown protocol": (["--protocol", "imagn"], "did you mean imagen?"),
    "too large a seed": (
        ["--ckpt", "CKPT", "--num", 4, "--seed", 2**32, "--reference", "VAL"],
        "no picture's seed may exceed",
    ),
    "too large a seed for a data set": (
        ["--ckpt", "CKPT", "--num", 12, "--seed", 2**32 - 11, "data=scenes"],
        "no picture's seed may exceed 4294967295, got 4294967296",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_any_work(
    case: str, place: Place, once: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    few = tmp_path / "few"
    for i in (5001, 5002):
        planted.picture(few / f"{i}.png", i, size=(32, 32))
    paths = {"IMAGES": once / "images", "VAL": place.coco / "val2014", "COCO": place.coco}
    paths |= {"FEW": few, "CKPT": place.ckpt, "NPZ": few / "a.npz", "EMPTY": few / "b.npz"}
    np.savez(few / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(few / "b.npz", other=np.zeros(3))
    words, said = REFUSED[case]
    assert call(eval.fid.DOOR, *(paths.get(str(word), word) for word in words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    left = {p.name for p in tmp_path.iterdir()} - {"few"}
    assert left <= {"runs"} and not [*tmp_path.rglob("result.json")]


def test_a_broken_picture_of_the_reference_is_left_out_and_said(
    place: Place, once: Path, tmp_path: Path, capsys: Any
) -> None:
    real = tmp_path / "real"
    for i in range(12):
        planted.picture(real / f"{i}.jpg", i)
    (real / "3.jpg").write_text("nonsense")
    (real / "5.jpg").write_bytes((real / "5.jpg").read_bytes()[:-150])
    words = ["--images", once / "images", "--reference", real, "--crop", "square"]
    words += ["--features", "scenes", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert call(eval.fid.DOOR, *words) == 0
    said = capsys.readouterr().out
    assert "1 file of" in said and "cannot be read, left out: 3.jpg" in said
    assert "1 of 11 pictures could not be read and are left out" in said
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["protocol"]["reference"]["left_out"] == 1
    assert told["protocol"]["reference"]["n"] == 10
    assert told["scores"]["eval/fd_scenes"]["reference"] == "10 pictures"


# The other doors ----

DOORS = {
    "prdc": (eval.prdc.DOOR, {"precision", "recall", "density", "coverage"}, True),
    "cmmd": (eval.cmmd.DOOR, {"mmd"}, True),
    "clip_score": (eval.clip_score.DOOR, {"clip"}, False),
}


@pytest.mark.parametrize("name", DOORS)
def test_other_scores_by_the_same_options(
    name: str, place: Place, once: Path, tmp_path: Path
) -> None:
    door, found, compares = DOORS[name]
    words = ["--images", once / "images", "--prompts", once / "prompts.json"]
    words += ["--reference", place.coco / "val2014", "--crop", "square"] if compares else []
    more = ["--features", "scenes", "--out", tmp_path / "out", "--cache", place.root / "cache"]
    assert call(door, *words, *more) == 0
    assert scores(tmp_path / "out").keys() == {f"eval/{name}_scenes" for name in found}


def test_preferences_need_their_weights(once: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--images", once / "images", "--prompts", once / "prompts.json"]
    given = ["--weights", "hpsv2=none.pt", "--weights", "pickscore=none.pt"]
    assert call(eval.preference.DOOR, *words, *given, "--cache", tmp_path) == 2
    assert "there is no file none.pt with the weights of HPSv2" in capsys.readouterr().err


def test_a_data_set_of_runs_gives_prompts_and_reference(place: Place, tmp_path: Path) -> None:
    words = ["--ckpt", place.ckpt, "data=scenes", "--num", 12, "--features", "scenes"]
    more = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--batch-size", SIZE]
    assert call(eval.fid.DOOR, *words, *more, "--scores", "fid,clip_score") == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["protocol"]["n"] == 12 == len(pngs(tmp_path / "out"))
    assert told["protocol"]["reference"]["captions"] == "shares none with the prompts"
    names = {"fd_scenes", "fd_scenes_floor", "clip_scenes", "network_calls"}
    assert told["scores"].keys() == {f"eval/{name}" for name in names}


def test_statistics_stand_for_the_pictures_that_they_are_of(
    place: Place, once: Path, tmp_path: Path
) -> None:
    words = ["--images", once / "images", "--features", "scenes"]
    words += ["--cache", tmp_path / "cache", "--out"]
    real = ["--reference", place.coco / "val2014", "--resolution", 32, "--crop", "square"]
    assert call(eval.fid.DOOR, *words, tmp_path / "folder", *real) == 0
    (rows,) = (tmp_path / "cache").glob("features-val2014-*")
    names = json.loads((rows / "rows.json").read_text())
    features = load_measured([rows / name for name in names]).rows["features"]
    np.savez(
        tmp_path / "real.npz",
        mu=features.astype(float).mean(0),
        sigma=np.cov(features.T.astype(float)),
    )
    given = ["--reference", tmp_path / "real.npz"]
    assert call(eval.fid.DOOR, *words, tmp_path / "npz", *given) == 0
    found = scores(tmp_path / "npz")
    assert found.keys() == {"eval/fd_scenes", "eval/fd_scenes_infinity"}
    assert found["eval/fd_scenes"]["value"] == pytest.approx(
        scores(tmp_path / "folder")["eval/fd_scenes"]["value"], rel=1e-9
    )


def test_classes_in_turn(place: Place, tmp_path: Path, capsys: Any) -> None:
    ckpt = micro_checkpoint.write(tmp_path / "run", classes=3)
    words = ["--ckpt", ckpt, "--reference", place.coco / "val2014", "--features", "scenes"]
    more = ["--num", 7, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    protocol = ["--protocol", "adm50k", "--scores", "fid"]
    assert call(eval.fid.DOOR, *words, *more, *protocol) == 2
    assert "--classes K is missing, which the protocol needs" in capsys.readouterr().err
    assert call(eval.fid.DOOR, *words, *more, "--classes", 4, *protocol) == 2
    assert "must ask for one class" in capsys.readouterr().err
    assert call(eval.fid.DOOR, *words, *more, "--classes", 3, *protocol) == 0
    rows = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len({*pngs(tmp_path / "out").values()}) == 7
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["protocol"]["reference"]["prepared"]["crop"] == "adm"


def test_an_official_first_stage(place: Place, tmp_path: Path) -> None:
    """As a Lightning checkpoint of taming would hold it."""
    state, _ = load_weights(place.ckpt / "tokenizer.safetensors")
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    words = ["--images", place.coco / "val2014", "--num", 12, "--resolution", 16]
    words += ["--crop", "square", "--features", "scenes", "--cache", tmp_path / "cache"]
    official = ["--ckpt", tmp_path / "model.ckpt", "--paper", "vqgan", "model.norm_groups=4"]
    assert call(eval.reconstruction.DOOR, *words, *official, "--out", tmp_path / "a") == 0
    own = ["--ckpt", place.ckpt / "tokenizer.safetensors"]
    assert call(eval.reconstruction.DOOR, *words, *own, "--out", tmp_path / "b") == 0
    assert scores(tmp_path / "a") == scores(tmp_path / "b")


def test_a_first_stage_of_pictures_of_any_size(place: Place, tmp_path: Path, capsys: Any) -> None:
    words = ["--ckpt", place.ckpt, "--images", place.coco / "val2014", "--num", 20]
    more = ["--out", tmp_path / "out", "--cache", place.root / "cache", "--features", "scenes"]
    assert call(eval.reconstruction.DOOR, *words, *more) == 2
    assert "no squares of one size (24x20)" in capsys.readouterr().err
    cut = ["--resolution", 16, "--crop", "square", "--batch-size", SIZE]
    assert call(eval.reconstruction.DOOR, *words, *more, *cut) == 0
    found = {name.partition("/")[2] for name in scores(tmp_path / "out")}
    assert {"rfd_scenes", "psnr", "ssim", "lpips_scenes", "codebook_usage"} <= found
    assert len(pngs(tmp_path / "out")) == 20


def test_reconstructions_count_what_was_scored(place: Place, tmp_path: Path) -> None:
    coco = planted.coco(tmp_path / "coco", train=1, val=12)
    broken = next((coco / "val2014").iterdir())
    broken.write_bytes(broken.read_bytes()[:-150])
    words = ["--ckpt", place.ckpt, "--coco", coco, "--num", 12, "--resolution", 16]
    words += ["--crop", "square", "--features", "scenes", "--cache", tmp_path / "cache"]
    assert call(eval.reconstruction.DOOR, *words, "--out", tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["protocol"]["n"] == told["protocol"]["reference"]["n"] == 11
    assert told["scores"]["reconstruction/psnr"]["n"] == 11
    assert told["speed"]["made"] == "11 pictures"


def test_help_and_refusals_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from eval.fid_coco30k import DOOR\n"
        "from experiments.evaluation.door import evaluate\n"
        "from experiments.settings import ConfigError\n"
        "evaluate(DOOR, ['--help'])\n"
        "try:\n    evaluate(DOOR, ['--num', '4', '--ckpt', 'x'])\n"
        "except ConfigError:\n    pass\n"
        "print([m for m in ('torch', 'lightning', 'wandb') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
