"""The samples of one split: scenes and digits are written, shards found, pictures listed."""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from data.corpora import rows
from data.digits import digits
from data.listing import write_listings
from data.patterns import expand_shards
from data.readers import Sample, is_image, reader_of
from data.scenes import scenes
from data.shards import write_shards
from data.view import ShardList, is_held_out

PER_SHARD = 250  # small, so that a few workers and ranks never lack a shard
LISTED = "shards.json"


def write_embedded(
    folder: Path, name: str, split: str, size: int, seed: int, resolution: int, max_objects: int
) -> ShardList:
    """Write a split of `scenes` or `digits`.

    Args:
        folder: of these settings alone.
        name: scenes or digits.
        split, size, seed, resolution, max_objects: as `scenes` takes them; of digits at most those
            that there are.
    """
    samples: Iterator[Sample]
    if name == "digits":
        samples = islice(digits(split, resolution=resolution, seed=seed), size)
    elif name == "scenes":
        samples = scenes(split, size, seed=seed, resolution=resolution, max_objects=max_objects)
    else:
        raise ValueError(f"embedded data are scenes or digits, not {name!r}")
    written = ShardList(tuple(write_shards(samples, folder, PER_SHARD)))
    written.save(folder / LISTED)
    return written


def find_shards(
    shards: str | Sequence[str],
    val_shards: str | Sequence[str] | None,
    split: str,
    limit: int | None = None,
    allow_pipe: bool = False,
) -> ShardList:
    """List a user's shards of a split; without `val_shards` some keys of `shards` are validation.

    Args:
        shards: pattern of the training shards, see `expand_shards`.
        val_shards: pattern of the validation shards.
        split: train or val.
        limit: at most so many samples.
        allow_pipe: let shards be the output of commands.

    Raises:
        ValueError: another split, a pattern that matches nothing, or shards in which validation
            cannot be told apart by key.
    """
    if split not in ("train", "val"):
        raise ValueError(f"shards have the splits train, val, not {split!r}")
    if val_shards is not None:
        own = shards if split == "train" else val_shards
        return ShardList(tuple(expand_shards(own, allow_pipe)), limit=limit)
    paths = tuple(expand_shards(shards, allow_pipe))
    return ShardList(paths, holdout_share(paths), split == "val", limit)


def list_pictures(
    folder: Path,
    name: str,
    root: Path,
    split: str,
    limit: int | None,
    note: Callable[[str], None],
) -> ShardList:
    """List the pictures of a corpus that lie in files of their own; nothing is copied.

    Where the corpus does not say what validation is, keys decide.

    Args:
        folder: where to write the listings.
        name: of the corpus.
        root: its folder.
        split: train or val.
        limit: at most so many samples.
        note: is told what was found, and what of the corpus's own lists is left out.

    Raises:
        ValueError: something of the corpus is missing, or no picture is left for the split.
    """
    faults: Counter[str] = Counter()
    found, official = rows(name, root, split, faults)
    if not official:
        share = holdout(len(found))
        found = [row for row in found if is_held_out(row.key, share) == (split == "val")]
    if not found:
        raise ValueError(f"{root} has no picture for the {split} split of {name}")
    classes = len({row.label for row in found} - {None})
    of = f" of {classes} class{'es' * (classes > 1)}" if classes else ""
    note(f"{name}: {len(found)} pictures{of} for {split}{'' if official else ', chosen by key'}")
    for fault, number in sorted(faults.items()):
        note(f"{name}: left out {number} times: {fault}")
    listed = ShardList(tuple(write_listings(found, root, folder)), limit=limit)
    listed.save(folder / LISTED)
    return listed


def holdout(count: int) -> float:
    """Return which share of `count` keys is validation: 2 %, or 16 samples, at most half."""
    return min(0.5, max(0.02, 16 / max(1, count)))


def holdout_share(paths: Sequence[str]) -> float:
    """Return which share of the keys is validation: 2 %, more where that is fewer than 16 samples.

    Raises:
        ValueError: all images have one key.
    """
    keys: set[str] = set()
    for path in paths:
        keys.update(reader_of(path).keys(path))
        if len(keys) >= 800:
            break
    images = _count_images(paths) if len(keys) == 1 else len(keys)
    if images > 1 and len(keys) == 1:
        raise ValueError(
            f"all {images} images of {paths[0]} ... have the key {keys.pop()!r}, the file name up "
            "to its first dot, so validation cannot be told apart: rename them, or set val_shards"
        )
    return holdout(len(keys))


def _count_images(paths: Sequence[str]) -> int:
    """Return how many images there are, also where a key that ends too early hides some."""
    images = 0
    for path in paths:
        with suppress(OSError, tarfile.TarError):
            for raw in reader_of(path).read(path, 0):
                images += max(1, sum(map(is_image, raw)))
    return images
