"""Rows as files: joined in order, equal bytes, and nothing that is not rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eval.rows import Measured, load_measured, reduced, save_measured


def made(first: int, count: int, shown: bool = False) -> Measured:
    rows = {
        "labels": np.arange(first, first + count, dtype=np.int16)[:, None],
        "features/noise=0.1": np.full((count, 2), first, np.float32),
    }
    pairs = np.full((1, 2, 3, 4, 4), first, np.uint8) if shown else None
    return Measured(rows, {"codes": np.array([first, 1])}, pairs, {"labels": "m"})


def test_files_are_joined_in_the_order_given(tmp_path: Path) -> None:
    parts = [made(0, 3, shown=True), made(3, 2)]
    paths = [tmp_path / "deep" / f"{i}.safetensors" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        save_measured(path, part)
    whole = load_measured(paths)
    assert len(whole) == 5 and whole.models == {"labels": "m"}
    assert list(whole.rows) == ["labels", "features/noise=0.1"]  # as they were, not sorted
    assert whole.rows["labels"].dtype == np.int16
    assert whole.rows["labels"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert whole.rows["features/noise=0.1"][:, 0].tolist() == [0, 0, 0, 3, 3]
    assert whole.sums["codes"].tolist() == [3, 2]
    assert whole.shown is not None and whole.shown.shape == (1, 2, 3, 4, 4)
    assert load_measured(paths[::-1]).rows["labels"][:, 0].tolist() == [3, 4, 0, 1, 2]
    assert load_measured(paths[1:]).shown is None


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_measured(tmp_path / f"{name}.safetensors", made(0, 3, shown=True))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_is_no_rows_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_measured(whole, made(0, 3))
    contents = {"empty": b"", "text": b"hello", "cut": whole.read_bytes()[:-40]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} holds no rows"):
            load_measured([whole, tmp_path / name])
    save_file({"rows.x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other holds no rows"):
        load_measured([tmp_path / "other"])
    with pytest.raises(FileNotFoundError):
        load_measured([tmp_path / "none.safetensors"])
    with pytest.raises(ValueError, match="no picture was measured"):
        load_measured([])


def test_rows_of_different_extractors_are_not_joined(tmp_path: Path) -> None:
    save_measured(tmp_path / "a.safetensors", made(0, 3))
    other = made(3, 2)
    save_measured(
        tmp_path / "b.safetensors", Measured(other.rows, other.sums, None, {"labels": "other"})
    )
    save_measured(tmp_path / "c.safetensors", Measured({"labels": other.rows["labels"]}))
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors were measured in another way"):
            load_measured([tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors"])


def test_pictures_are_reduced_by_area() -> None:
    images = torch.tensor([[0, 2, 8, 8], [4, 6, 8, 8], [1, 1, 0, 0], [1, 1, 0, 9]]).byte()
    images = images.expand(2, 3, 4, 4)
    assert reduced(images, 2)[1, 2].tolist() == [[3, 8], [1, 2]]
    assert torch.equal(reduced(images, 4), images) and torch.equal(reduced(images, 8), images)
    with pytest.raises(ValueError, match="do not reduce to 3 px"):
        reduced(images, 3)
