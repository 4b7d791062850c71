"""Folders of pictures: what is in them, how they come to one size, and which is whose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from data.crops import adm
from experiments.pipeline.given import (
    CUTS,
    FolderPictures,
    Prepared,
    content_of,
    matched,
    pictures_of,
    sizes_of,
)
from experiments.pipeline.stage import Folders, Machine
from tests import planted

NOWHERE = Folders(Path("nowhere"))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 24), (25, 41), (33, 33), (90, 31)])
@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear"])
def test_cuts_are_what_they_say(size: tuple[int, int], resample: str) -> None:
    image, kernel = noise(*size), Image.Resampling[resample.upper()]
    cuts: list[Any] = [cut for cut in CUTS if cut != "none"]
    kind: Any = resample
    found = {cut: Prepared(None, 16, cut, kind).apply(tensor(image)) for cut in cuts}
    mode = InterpolationMode(resample)
    transform = Compose([Resize(16, interpolation=mode), CenterCrop(16)])
    assert torch.equal(found["short"], tensor(transform(image)))
    side = min(size)
    left, top = ((length - side) // 2 for length in size)
    square = image.crop((left, top, left + side, top + side)).resize((16, 16), kernel)
    assert torch.equal(found["square"], tensor(square))
    assert torch.equal(found["squash"], tensor(image.resize((16, 16), kernel)))
    assert torch.equal(found["adm"], tensor(adm(image, 16)))


def test_a_picture_of_the_size_stays_and_another_needs_a_cut() -> None:
    image = tensor(noise(16, 16))
    assert Prepared(None, 16).apply(image) is image
    with pytest.raises(ValueError, match="17x16 pixels and not 16x16; --crop"):
        Prepared(None, 16).apply(tensor(noise(17, 16)))


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "below/c.jpeg", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert pictures_of(tmp_path) == ["a.jpg", "b.PNG", "below/c.jpeg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        pictures_of(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder"):
        pictures_of(tmp_path / "nothing")


def test_content_follows_bytes_and_names_alone(tmp_path: Path) -> None:
    one, other, notes = tmp_path / "one", tmp_path / "other", tmp_path / "notes"
    for folder in (one, other):
        for i in range(3):
            planted.picture(folder / f"{i}.png", i)
    names = pictures_of(one)
    before = content_of(one, names, notes)
    assert content_of(other, names, notes) == before == content_of(one, names, notes)
    planted.picture(one / "1.png", 9)
    changed = content_of(one, names, notes)
    assert changed != before
    (other / "2.png").rename(other / "3.png")
    assert content_of(other, pictures_of(other), notes) not in (before, changed)
    next(notes.iterdir()).write_text("no json")
    assert content_of(one, names, notes) == changed


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.picture(tmp_path / "a.png")
    before = content_of(tmp_path, ["a.png"], tmp_path / "notes")

    def never(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("experiments.pipeline.given.file_hash", never)
    assert content_of(tmp_path, ["a.png"], tmp_path / "notes") == before


def test_pictures_are_matched_by_id() -> None:
    rows = [{"id": "42", "file": "000000000042.png"}, {"id": "x", "file": "x.png"}]
    folder = Path("f")
    for name in ("COCO_val2014_000000000042.jpg", "42.png", "a/000000000042.webp"):
        assert matched(folder, ["x.jpg", name, "43.png"], rows) == [name, "x.jpg"]
    with pytest.raises(ValueError, match="f lacks the pictures of 1 of 2 ids: 42"):
        matched(folder, ["x.png", "420.png"], rows)
    with pytest.raises(ValueError, match="several pictures of 1 ids: x"):
        matched(folder, ["x.png", "x.jpg", "42.png"], rows)
    many = [{"id": str(i), "file": f"{i:012d}.png"} for i in range(9)]
    with pytest.raises(ValueError, match=r"9 of 9 ids: 0, 1, 2, 3, 4, \.\.\."):
        matched(folder, ["x.png"], many)


def test_every_mode_becomes_rgb_and_broken_ones_are_named_or_left_out(tmp_path: Path) -> None:
    for i, mode in enumerate(["RGB", "L", "CMYK", "EXIF"]):
        planted.picture(tmp_path / f"{i}.jpg", i, mode)
    names = pictures_of(tmp_path)
    assert sizes_of(tmp_path, names, True) == dict.fromkeys(names, (24, 20))
    read = FolderPictures(tmp_path, tuple(names), "x").reader(NOWHERE, Machine())
    images, rows = read(0, 4)
    assert [image.shape for image in images] == [(3, 20, 24)] * 3 + [(3, 24, 20)]
    assert [(row["id"], row["index"]) for row in rows] == [(str(i), i) for i in range(4)]

    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[:-200])
    (tmp_path / "2.jpg").write_text("nonsense")
    assert [*sizes_of(tmp_path, names, False)] == ["0.jpg", "1.jpg", "3.jpg"]
    with pytest.raises(ValueError, match=r"1 of 4 files of .* cannot be read as pictures: 2\.jpg"):
        sizes_of(tmp_path, names, True)
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read"):
        FolderPictures(tmp_path, tuple(names), "x").reader(NOWHERE, Machine())(0, 2)
    lenient = FolderPictures(tmp_path, tuple(names), "x", strict=False)
    _, rows = lenient.reader(NOWHERE, Machine(max_skipped=0.6))(0, 4)
    assert [row["index"] for row in rows] == [0, 3]
    with pytest.raises(ValueError, match="cannot be read"):
        lenient.reader(NOWHERE, Machine(max_skipped=0.2))(0, 4)
