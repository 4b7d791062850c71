"""CUB-200-2011 and Oxford-102 with the ten captions per picture of Reed et al. in text files.

Text-to-image papers split both by class (CUB: 150 classes for training, 50 for test; flowers: 82
and 20), as the lists of Reed et al. or StackGAN's filenames.pickle say; the split by pictures that
the sets themselves came with is taken where neither is there.
"""

import os
import pickletools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data.listing import Row, first_of, holds_pictures, is_picture, read_lines

Split = Callable[[str, str], str]  # class folder and name of a picture -> its split
BIRDS, FLOWERS = "CUB_200_2011", "102flowers"
TEXTS = ("text_c10", "text/text", "text", "cvpr2016_cub/text_c10", "cvpr2016_flowers/text_c10")


def birds_index(root: Path) -> list[Path]:
    """Return the files and folders that say what CUB-200 holds.

    Raises:
        ValueError: pictures, captions or splits are missing.
    """
    _, files = _split(root, _bird_splits(root), "cub200")
    return [_bird_pictures(root), _texts(root, "cub200"), *files]


def _bird_pictures(root: Path) -> Path:
    return first_of(root, ["images", f"{BIRDS}/images"], "the pictures of cub200")


def birds(root: Path, faults: Counter[str]) -> Iterator[Row]:
    """Yield a row per bird with all its captions; label = number of its class folder - 1."""
    folder, texts = _bird_pictures(root), _texts(root, "cub200")
    split, _ = _split(root, _bird_splits(root), "cub200")
    listed = _images_txt(folder.parent)
    below = folder.relative_to(root).as_posix()
    for kind in sorted(name for name in os.listdir(folder) if (folder / name).is_dir()):
        number = re.match(r"\d+", kind)
        for file in sorted(filter(is_picture, os.listdir(folder / kind))):
            name = Path(file).stem
            if listed and f"{kind}/{file}" not in listed:  # some copies hold pictures made RGB too
                faults["a picture that images.txt does not list"] += 1
                continue
            label = int(number[0]) - 1 if number else None
            captions = _captions(texts / kind / f"{name}.txt")
            if part := split(kind, name):
                yield Row(f"{kind}/{name}", f"{kind}/{file}", captions, part, label, base=below)
            else:
                faults["a picture that no list of a split names"] += 1


def _images_txt(folder: Path) -> dict[str, str]:
    """Return path -> number of the pictures that the set lists; empty without the list."""
    path = folder / "images.txt"
    lines = read_lines(path) if path.is_file() else []
    return {line.split()[1]: line.split()[0] for line in lines if len(line.split()) == 2}


def flowers_index(root: Path) -> list[Path]:
    """Return the files and folders that say what Oxford-102 holds.

    Raises:
        ValueError: pictures, captions or splits are missing.
    """
    _, files = _split(root, _flower_splits(root), "oxford102")
    return [_flower_pictures(root), _texts(root, "oxford102"), *files]


def _flower_pictures(root: Path) -> Path:
    places = ["jpg", f"{FLOWERS}/jpg", "images"]
    found = next((root / place for place in places if holds_pictures(root / place)), None)
    return found or first_of(root, places, "the pictures of oxford102")


def flowers(root: Path, faults: Counter[str]) -> Iterator[Row]:
    """Yield a row per flower with all its captions; label = number of its class - 1."""
    folder, texts = _flower_pictures(root), _texts(root, "oxford102")
    split, _ = _split(root, _flower_splits(root), "oxford102")
    told = {path.stem: path for path in sorted(texts.rglob("*.txt")) if path.stem[:6] == "image_"}
    labels = _beside(root, "imagelabels.mat")
    numbers = None if labels is None else _matlab(labels)["labels"].ravel()
    below = folder.relative_to(root).as_posix()
    for file in sorted(filter(is_picture, os.listdir(folder))):
        name = Path(file).stem
        text = told.get(name)
        kind = text.parent.name if text and text.parent != texts else ""
        number = re.search(r"\d+", kind)
        label = int(number[0]) - 1 if number else None
        if numbers is not None and (place := _number(name)) is not None and place <= len(numbers):
            label = int(numbers[place - 1]) - 1
        if part := split(kind or (f"class_{label + 1:05d}" if label is not None else ""), name):
            captions = _captions(text) if text else ()
            yield Row(name, file, captions, part, label, base=below)
        else:
            faults["a picture that no list of a split names"] += 1


def _texts(root: Path, name: str) -> Path:
    return first_of(root, TEXTS, f"the captions of {name}")


def _captions(path: Path) -> tuple[str, ...]:
    return tuple(read_lines(path)) if path.is_file() else ()


def _number(name: str) -> int | None:
    """Return the number at the end of image_00001."""
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else None


def _split(root: Path, own: tuple[Split, list[Path]] | None, name: str) -> tuple[Split, list[Path]]:
    """Return what says the split of a picture, and the files that it is read from.

    Args:
        root: of the corpus.
        own: the split that the set came with.
        name: of the corpus.

    Raises:
        ValueError: nothing says it.
    """
    places = [root, *(root / p for p in (BIRDS, FLOWERS, "cvpr2016_cub", "cvpr2016_flowers"))]
    for place in places:
        lists = {s: place / s / "filenames.pickle" for s in ("train", "test")}
        if all(path.is_file() for path in lists.values()):
            named = {n: s for s, path in lists.items() for n in pickled_texts(path)}
            return _by_name(named), list(lists.values())
        classes = {"train": place / "trainvalclasses.txt", "test": place / "testclasses.txt"}
        if all(path.is_file() for path in classes.values()):
            kinds = {line: s for s, path in classes.items() for line in read_lines(path)}
            return _by_class(kinds), list(classes.values())
    if own is None:
        raise ValueError(
            f"{name} says nowhere which pictures are for training: {root} has neither "
            "train/filenames.pickle and test/filenames.pickle, nor trainvalclasses.txt and "
            f"testclasses.txt, nor {'train_test_split.txt' if name == 'cub200' else 'setid.mat'}"
        )
    return own


def _by_name(named: dict[str, str]) -> Split:
    short = {Path(name).name: split for name, split in named.items()}
    return lambda kind, name: named.get(f"{kind}/{name}") or short.get(name, "")


def _by_class(kinds: dict[str, str]) -> Split:
    return lambda kind, name: kinds.get(kind, "")


def _bird_splits(root: Path) -> tuple[Split, list[Path]] | None:
    """Return the split that CUB-200 came with, by pictures."""
    for folder in (root, root / BIRDS):
        path = folder / "train_test_split.txt"
        if path.is_file() and (listed := _images_txt(folder)):
            flags = dict(line.split()[:2] for line in read_lines(path))
            names = {"1": "train", "0": "test"}
            named = {
                os.path.splitext(file)[0]: names.get(flags.get(number, ""), "")
                for file, number in listed.items()
            }
            return _by_name(named), [folder / "images.txt", path]
    return None


def _flower_splits(root: Path) -> tuple[Split, list[Path]] | None:
    """Return the split that Oxford-102 came with, by pictures: 1,020, 1,020 and 6,149."""
    path = _beside(root, "setid.mat")
    if path is None:
        return None
    content = _matlab(path)
    names = {"trnid": "train", "valid": "val", "tstid": "test"}
    split = {int(i): s for name, s in names.items() for i in content[name].ravel()}
    return (lambda kind, name: split.get(_number(name) or 0, "")), [path]


def _beside(root: Path, name: str) -> Path | None:
    return next((f / name for f in (root, root / FLOWERS) if (f / name).is_file()), None)


def _matlab(path: Path) -> dict:
    from scipy.io import loadmat

    try:
        return loadmat(path)
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{path} is no MATLAB file: {error}") from error


def pickled_texts(path: Path) -> list[str]:
    """Return the texts in a pickle, by looking at its operations; nothing of it is executed.

    Raises:
        ValueError: it is no pickle.
    """
    names = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE")
    try:
        found = [arg for op, arg, _ in pickletools.genops(path.read_bytes()) if op.name in names]
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{path} is no list of names: {error}") from error
    return [text for text in found if isinstance(text, str)]
