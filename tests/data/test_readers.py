"""Raw samples are read from any number on, and what a tar must not hold is named and left alone."""

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.readers import LINK, UNSAFE_NAME, read_tar, reader_of, split_name, tar_keys
from tests import planted


def tar_of(path: Path, names: list[str], links: dict[str, str] | None = None) -> str:
    """Write a tar of files that hold their own name, and of symbolic links."""
    files: list[tuple[str, bytes | str]] = [(name, name.encode()) for name in names]
    members = [*files, *(links or {}).items()]
    return str(planted.tar(path, members, format=tarfile.GNU_FORMAT))


@given(
    keys=st.lists(st.sampled_from(["a", "b", "c/d", "long" * 40]), max_size=12),
    first=st.integers(0, 13),
)
def test_reading_from_a_number_on_is_the_end_of_reading_all(tmp_path_factory, keys, first) -> None:
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    url = tar_of(path, [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt")])
    whole = list(read_tar(url))
    assert [raw["__key__"] for raw in whole] == keys
    assert reader_of(url).count(url) == len(whole)
    assert list(read_tar(url, first)) == whole[first:]
    assert list(tar_keys(url)) == keys


def test_links_and_unsafe_names_are_faults_of_their_sample(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "../b.jpg", "/c.jpg", "x/../d.jpg", "e.jpg", "f.txt"]
    url = tar_of(tmp_path / "0.tar", names, {"f.jpg": "/etc/passwd", "g.jpg": "e.jpg"})
    faults = {raw["__key__"]: raw.get("__fault__") for raw in read_tar(url)}
    bad = {"../b": UNSAFE_NAME, "/c": UNSAFE_NAME, "x/../d": UNSAFE_NAME, "f": LINK, "g": LINK}
    assert faults == {"a": None, "e": None, **bad}
    assert all(raw.get("jpg") is None for raw in read_tar(url) if raw.get("__fault__"))


def test_what_is_readable_of_a_broken_tar_comes_before_the_error(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "0.tar", ["a.jpg", "b.jpg", "c.jpg"])
    Path(url).write_bytes(Path(url).read_bytes()[:2100])
    samples = read_tar(url)
    assert [next(samples)["__key__"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(tarfile.TarError):
        next(samples)
    assert reader_of(url).count(url) == 2
    with pytest.raises(FileNotFoundError):
        next(read_tar(str(tmp_path / "none.tar")))


def test_the_ending_chooses_the_reader() -> None:
    assert reader_of("x/Y.TAR").read is read_tar
    with pytest.raises(ValueError, match=r"x/y\.zip is no shard: its name ends in none of \.tar"):
        reader_of("x/y.zip")


def test_a_key_ends_at_the_first_dot() -> None:
    assert split_name("a.b/c.d.JPG") == ("a.b/c", "d.jpg") and split_name("a") == ("a", "")
