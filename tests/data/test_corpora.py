"""What data/corpora.yaml says, and how corpora of tars and parquet lie below a root."""

import tarfile
from pathlib import Path
from typing import get_args, get_type_hints

import fsspec
import pytest

from data.config import EMBEDDED, DataConfig
from data.corpora import FILTERS, KINDS, corpora, index, shards
from data.names import aliased, number, split_of, texts
from experiments.papers.registry import PAPERS, load
from tests import planted


def test_every_corpus_can_be_named_and_says_how_to_get_it() -> None:
    names = set(get_args(get_type_hints(DataConfig)["name"]))
    assert set(corpora()) <= names and {*EMBEDDED, "shards"} <= names
    for corpus in corpora().values():
        assert corpus.kind in (*KINDS, "shards", "parquet")
        assert bool(corpus.splits) == (corpus.kind == "shards")
        assert all((corpus.about, corpus.licence, corpus.access, corpus.download))
        assert {*corpus.filters} <= {*PAPERS, "any"}
        assert all(set(values) <= set(FILTERS) for values in corpus.filters.values())
        for paper in PAPERS:
            DataConfig(name=corpus.name, root="x", **corpus.settings(paper))
    for name in ("laion", "cc3m", "cc12m"):
        assert corpora()[name].download.count("img2dataset --url_list") == 1
    assert "research-safe" in corpora()["laion"].about


def tar(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tarfile.open(path, "w").close()


@pytest.mark.parametrize(
    ("name", "files", "train", "val"),
    [
        ("cc3m", ["cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar"], 2, 1),
        ("cc3m", ["cc3m-train-0000.tar", "notes.tar"], 1, None),
        ("cc3m", ["00000.tar", "00001.tar"], 2, None),
        ("cc3m", ["train/0.tar", "val/0.tar", "val/1.tar"], 1, 2),
        ("cc12m", ["cc12m-train-0000.tar"], 1, None),
        ("cc12m", ["train/0.tar", "validation/0.tar"], 1, 1),
        ("laion", ["00000.tar"], 1, None),
        ("laion", ["part0/00000.tar", "part1/00000.tar"], 2, None),
    ],
)
def test_shards_of_a_corpus(
    tmp_path: Path, name: str, files: list[str], train: int, val: int | None
) -> None:
    for file in files:
        tar(tmp_path / file)
    found = shards(name, str(tmp_path))
    assert (len(found[0]), found[1] if found[1] is None else len(found[1])) == (train, val)
    assert not set(found[0]) & set(found[1] or [])


def test_shards_of_a_remote_root(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("train/a", "cc3m-train-0000", "cc3m-train-0001", "cc3m-validation-0000"):
        store.pipe(f"/train-bucket/cc3m/{name}.tar", b"")
    train, val = shards("cc3m", "memory://train-bucket/cc3m/")
    assert [url.rpartition("/")[2] for url in train] == [
        "cc3m-train-0000.tar",
        "cc3m-train-0001.tar",
    ]
    assert len(val or []) == 1 and train[0].startswith("memory://")
    for name in ("train-0.parquet", "test-0.parquet"):
        store.pipe(f"/train-bucket/hub/data/{name}", b"")
    train, val = shards("parquet", "memory://train-bucket/hub")
    assert [len(train), len(val or [])] == [1, 1] and train[0].endswith("data/train-0.parquet")
    with pytest.raises(ValueError, match="coco2014 is read from a local folder, not from memory:"):
        index("coco2014", "memory://train-bucket/hub")


@pytest.mark.parametrize("name", ["laion", "cc3m", "cc12m", "parquet"])
def test_what_was_looked_for_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder .*none to read {name} from"):
        shards(name, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"there is no .*\*\.(tar|parquet)"):
        shards(name, str(tmp_path))


def test_parquet_is_split_as_its_names_say(tmp_path: Path) -> None:
    import datasets.data_files

    planted.parquet(tmp_path)
    train, val = shards("parquet", str(tmp_path))
    found = datasets.data_files.get_data_patterns(str(tmp_path))
    files = datasets.data_files.DataFilesDict.from_patterns(found, base_path=str(tmp_path))
    assert train == list(files["train"]) and val == list(files["validation"])
    for path in map(Path, val or []):
        path.rename(path.with_name(path.name.replace("validation", "test")))
    assert len(shards("parquet", str(tmp_path))[1] or []) == 2
    for number_, path in enumerate(sorted((tmp_path / "data").iterdir())):
        path.rename(path.with_name(f"{number_}.parquet"))
    assert [len(shards("parquet", str(tmp_path))[0]), shards("parquet", str(tmp_path))[1]] == [
        4,
        None,
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("Validation", "val"),
        ("my_dev_set", "val"),
        ("test2017", "test"),
        ("evaluation", "test"),
        ("latest", ""),
        ("trained", ""),
        ("00000", ""),
    ],
)
def test_words_of_splits(name: str, split: str) -> None:
    assert split_of([name]) == split_of(["data", name]) == split


def test_aliases() -> None:
    assert number("aesthetic", {"AESTHETIC_SCORE": "6.5"}) == 6.5
    assert number("width", {"original_width": None, "WIDTH": 640}) == 640
    assert number("punsafe", {}) != number("punsafe", {})  # nan
    assert aliased("caption", {"TEXT": "a", "text": ""}) == "a"
    assert aliased("label", {"label": 0}) == 0
    assert texts(["a  b", " ", None, {"raw": "c"}]) == ("a b", "c") and texts(None) == ()


def test_a_user_wins_over_a_corpus_and_it_over_the_scale() -> None:
    laion = load("paella", "paper", ["data=laion", "data.root=x", "data.min_aesthetic=6"]).data
    assert (laion.name, laion.shards, laion.min_aesthetic, laion.max_punsafe) == (
        "laion",
        None,
        6,
        0.99,
    )
    coco = load("paella", "paper", ["data=coco2014", "data.root=x"]).data
    assert not any(getattr(coco, name) is not None for name in FILTERS) and coco.resolution == 256
    own = load("muse", "paper", ["data=laion", "data.shards=y"]).data
    assert (own.name, own.shards, own.min_aesthetic) == ("laion", "y", 4.9)


def test_other_data_than_the_scales_own_leave_nothing_of_it() -> None:
    data = load("vqgan", "paper", ["data=digits"]).data
    assert (data.name, data.root, data.resolution) == ("digits", None, 256)
    data = load("muse", "paper", ["data=cc3m", "data.root=x"]).data
    assert (data.name, data.root, data.shards) == ("cc3m", "x", None)


def test_a_file_that_names_a_corpus_wins_over_it(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("data: {name: laion, root: x, min_size: 128}\n")
    data = load("vqgan", str(path)).data
    assert (data.min_size, data.max_punsafe) == (128, 0.5)
    assert load("vqgan", str(path), ["data.min_size=64"]).data.min_size == 64
