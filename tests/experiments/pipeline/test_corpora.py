"""Corpora as they lie on a disk, from the command line to the scores."""

import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.listing import read_listing
from data.select import captions
from data.view import Order, ShardList, View
from data.webdata import WebData
from experiments.cli import command
from experiments.run import run as run_command
from tests import planted
from tests.micro_runs import QUIET, Run, go

pytestmark = pytest.mark.filterwarnings(*QUIET)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.coco(tmp_path_factory.mktemp("coco"))


def listed(run: Run, split: str) -> list[dict]:
    folder = run.folder(f"data-{split}")
    return [s for path in sorted(folder.glob("*.jsonl")) for s in read_listing(str(path))]


@pytest.mark.parametrize("paper", ["vqgan", "paella"])
def test_coco_end_to_end(paper: str, coco: Path, tmp_path: Path) -> None:
    words = ["data=coco2014", f"data.root={coco}"]
    run = go(paper, tmp_path / "out", tmp_path / "cache", *words)
    assert {len(listed(run, "train")), len(listed(run, "val"))} == {40, 24}
    assert not list((tmp_path / "cache").rglob("*.jpg"))  # nothing is copied
    told = [line.strip() for line in run.lines if " samples, " in line]
    assert told and all(line.endswith(" 0 skipped") for line in told)
    assert any(name.endswith("psnr") for name in run.scores)
    if paper == "paella":
        asked = run.asked()
        assert len({row["key"] for row in asked}) == len(asked) == 16
        assert all(row["key"].startswith("COCO_val2014_0000000050") for row in asked)


def test_training_is_that_on_tars_of_the_same_pictures(coco: Path, tmp_path: Path) -> None:
    words = ["data.cache=false", "trainer.max_steps=4", "trainer.epoch_steps=4"]
    listing = go(
        "vqgan", tmp_path / "a", tmp_path / "c", "data=coco2014", f"data.root={coco}", *words
    )
    for split in ("train", "val"):
        for path in sorted(listing.folder(f"data-{split}").glob("*.jsonl")):
            target = tmp_path / split / f"{path.stem}.tar"
            target.parent.mkdir(exist_ok=True)
            with tarfile.open(target, "w") as tar:
                for sample in read_listing(str(path)):
                    for suffix in ("jpg", "json"):
                        file = tmp_path / "member"
                        file.write_bytes(sample[suffix])
                        tar.add(file, f"{sample['__key__']}.{suffix}")
    words += [f"data.shards={tmp_path / 'train'}", f"data.val_shards={tmp_path / 'val'}"]
    tars = go("vqgan", tmp_path / "b", tmp_path / "c", *words)
    assert listing.scores == tars.scores
    weights = [load_file(run.out / "tokenizer.safetensors") for run in (listing, tars)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    root = planted.coco(tmp_path / "coco")
    gone = root / "train2014" / "COCO_train2014_000000000007.jpg"
    gone.unlink()
    (root / "val2014" / "COCO_val2014_000000005003.jpg").write_bytes(b"junk")
    words = ["data=coco2014", f"data.root={root}", "eval.prompts=20", "data.val_size=24"]
    run = go("paella", tmp_path / "out", tmp_path / "cache", *words)
    (train,) = (line.strip() for line in run.lines if line.strip().startswith("train: "))
    assert train.startswith("train: 39 samples, 1 skipped: 1 missing file (last: COCO_train2014_")
    assert "000000000007 in " in train
    for name in ("train", "val"):  # a picture that is there again is read again
        keys = [row["__key__"] for row in listed(run, name)]
        assert len(keys) == len(set(keys)) == {"train": 40, "val": 24}[name]


@pytest.mark.parametrize(
    ("name", "train", "val", "label"),
    [
        ("imagenet", 24, 12, True),
        ("ffhq", 10, 10, False),
        ("cub200", 16, 8, True),
        ("oxford102", 16, 8, True),
        ("imagefolder", 16, 8, True),
    ],
)
def test_other_corpora(name: str, train: int, val: int, label: bool, tmp_path: Path) -> None:
    makers = {"cub200": planted.birds, "oxford102": planted.flowers, "ffhq": planted.faces}
    makers |= {"imagenet": planted.imagenet, "imagefolder": planted.imagefolder}
    root = makers[name](tmp_path / name)
    words = [f"data={name}", f"data.root={root}", "eval.prompts=8"]
    run = go("vqgan", tmp_path / "out", tmp_path / "cache", *words)
    view = run.config.data.view()
    for split, count in (("train", train), ("val", val)):
        found = list(captions(ShardList.load(run.folder(f"data-{split}") / "shards.json"), view))
        assert len(found) == count and all(row["caption"] for row in found)
        assert all(("label" in row) == label for row in found)
    said = {line.strip() for line in run.lines}
    assert any(line.startswith(f"{name}: {val} pictures") and " for val" in line for line in said)
    if name == "cub200":
        assert "cub200: by trainvalclasses.txt, testclasses.txt" in said
        assert "cub200: left out 1 times: a picture that images.txt does not list" in said
    if name == "ffhq":
        assert found[0]["caption"] == "a portrait photograph of a person"


def test_parquet_end_to_end(tmp_path: Path) -> None:
    root = planted.parquet(tmp_path / "hub")
    run = go("vqgan", tmp_path / "out", tmp_path / "c", "data=parquet", f"data.root={root}")
    assert any(line.strip() == "val: 12 samples, 0 skipped" for line in run.lines)
    val = list(captions(ShardList.load(run.folder("data-val") / "shards.json"), View(32)))
    assert {row["label"] for row in val} == {0, 1} and val[0]["caption"] == "validation 0 0"


def test_keys_decide_where_a_corpus_does_not(tmp_path: Path) -> None:
    root = planted.faces(tmp_path / "faces", range(64))
    words = ["data=celebahq", f"data.root={root}", "eval.prompts=8"]
    run = go("vqgan", tmp_path / "out", tmp_path / "cache", *words)
    keys = [{row["__key__"] for row in listed(run, split)} for split in ("train", "val")]
    assert any(line.endswith(" pictures for val, chosen by key") for line in run.lines)
    assert len(keys[0] | keys[1]) == 64 and not keys[0] & keys[1] and 4 <= len(keys[1]) <= 32


def test_every_visit_draws_another_caption(coco: Path, tmp_path: Path) -> None:
    """Of training; a picture of validation keeps its own."""
    run = go("vqgan", tmp_path / "o", tmp_path / "c", "data=coco2014", f"data.root={coco}")
    lists = [ShardList.load(run.folder(f"data-{s}") / "shards.json") for s in ("train", "val")]
    data = WebData(*lists, View(8), Order(), batch_size=8, epoch_batches=20, val_batches=3)
    said = defaultdict[str, set[str]](set)
    for batch in data.stream():
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            said[key].add(caption)
            assert caption.startswith(f"picture {int(key[-12:])} said in way ")
    assert len(said) == 40 and sum(map(len, said.values())) > 80  # of four visits each
    first, again = ([b["caption"] for b in data.val_stream()] for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=coco2014"], "data.root must name the folder of coco2014; to get it: for f in zips"),
        (["data=laion"], "img2dataset --url_list relaion2B-en-research-safe"),
        (["data=coco2014", "data.root=none"], "data.root: there is no folder "),
        (["data=cc12m", "data.root=none"], "img2dataset --url_list cc12m.tsv"),
        (["data=coco2017", "data.root=coco"], "another version: data=coco2014"),
        (["data=imagenet", "data.root=coco"], "the train split of ImageNet is missing"),
        (["data=cc3m", "data.root=coco"], "no shard of cc3m in coco: there is no cc3m-train-*.tar"),
        (["data=ffhq", "data.root=empty"], "no picture (.jpg, .jpeg, .png, .webp, .avif) lies"),
        (["data=cub200", "data.root=empty"], "cub200 says nowhere which pictures"),
        (["data=oxford102", "data.root=empty"], "oxford102 says nowhere which pictures"),
        (["data=parquet", "data.root=empty"], "no parquet file of a train split in empty"),
        (["data=cc3m", "data.root=coco", "data.shards=x"], "data.root and data.shards exclude"),
        (["data=coco2014", "data.root=coco", "data.val_shards=x"], "data.val_shards goes with"),
        (["data.root=coco"], "data.root goes with a corpus, not with scenes"),
        (["data=coco2014", "data.root=coco", "data.max_caption=0"], "data.max_caption must be at"),
        (["data=coco2015", "data.root=coco"], "did you mean coco20"),
    ],
)
def test_a_wrong_root_is_refused(
    words: list[str],
    says: str,
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("coco").symlink_to(coco)
    Path("empty").mkdir()
    options = ["--paper", "vqgan", "--scale", "micro", "--out", "out", "cache=cache"]
    assert command(run_command, [*options, *words]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and says in told[0]
    assert not Path("cache").exists() and not Path("out").exists()


def test_a_broken_json_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = planted.coco(tmp_path / "coco", train=2, val=2)
    path = root / "annotations" / "captions_val2014.json"
    path.write_text(json.dumps(json.loads(path.read_text()))[:-9])
    options = ["--paper", "vqgan", "--scale", "micro", "--out", str(tmp_path / "out")]
    words = ["data=coco2014", f"data.root={root}", f"cache={tmp_path / 'c'}", "logger=csv"]
    assert command(run_command, [*options, *words]) == 1
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert str(path) in error and "is no whole JSON" in error
