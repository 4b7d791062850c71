"""Which samples of a shard are used: for training or validation, by metadata, and decoded how."""

import hashlib
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from data.config import DataConfig
from data.images import decode_image, open_image
from data.shards import FILTERED, Sample, SampleError, SkipCounter, apply, parse, read_samples

AESTHETIC = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2")


def holdout_share(config: DataConfig, splits: dict[str, list[str]]) -> float:
    """Return which share of the training shards' samples is validation.

    0 where validation has its own shards; else 2 %, and more where that would be fewer than 16
    samples (at most half).
    """
    if config.name != "shards" or config.val_shards is not None:
        return 0.0
    keys: set[str] = set()
    for url in splits["train"]:
        with suppress(OSError, tarfile.TarError), tarfile.open(url) as tar:
            keys.update(member.name.split(".")[0] for member in tar)
        if len(keys) >= 800:
            break
    return min(0.5, max(0.02, 16 / max(1, len(keys))))


def is_held_out(key: str, share: float) -> bool:
    """Say whether the sample of this key is validation: a hash of the key falls below `share`."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    return number < share * 2**64


def score(meta: dict[str, Any], names: Sequence[str]) -> float:
    """Return the first number that metadata hold under one of several names, else nan."""
    for name in names:
        with suppress(KeyError, TypeError, ValueError):
            return float(meta[name])
    return float("nan")


def check_metadata(sample: Sample, config: DataConfig) -> Sample:
    """Let a sample pass, or raise SampleError with the metadata filter that stops it."""
    meta = sample["meta"]
    if config.min_size is not None:
        size = [score(meta, [f"original_{side}"]) for side in ("width", "height")]
        if any(value != value for value in size):  # nan: img2dataset was not the source
            size = [float(value) for value in open_image(sample["data"]).size]
        if min(size) < config.min_size:
            raise SampleError(f"{FILTERED}min_size")
    # "not >=" and "not <=", so that a score that is missing does not pass
    least, watermark, unsafe = config.min_aesthetic, config.max_pwatermark, config.max_punsafe
    if least is not None and not score(meta, AESTHETIC) >= least:
        raise SampleError(f"{FILTERED}min_aesthetic")
    if watermark is not None and not score(meta, ["pwatermark"]) <= watermark:
        raise SampleError(f"{FILTERED}max_pwatermark")
    if unsafe is not None and not score(meta, ["punsafe"]) <= unsafe:
        raise SampleError(f"{FILTERED}max_punsafe")
    return sample


def finish(sample: Sample, config: DataConfig, rng: random.Random | None = None) -> Sample:
    """Decode: {"pixels" uint8 [H, W, 3], "caption", "key"}, "label" and "attributes" if given.

    Without a source of chance the square is cut in the centre and nothing is mirrored.
    """
    crop, flip = (config.crop, config.flip) if rng else ("center", False)
    crop = "adm" if config.crop == "adm" else crop
    pixels = decode_image(sample["data"], config.resolution, crop=crop, flip=flip, rng=rng)
    result = {"pixels": pixels, "caption": sample["caption"], "key": sample["key"]}
    label, attributes = sample["meta"].get("label"), sample["meta"].get("attributes")
    if isinstance(label, int):
        result["label"] = label
    if isinstance(attributes, dict):
        result["attributes"] = attributes
    return result


def selected(
    urls: Iterable[str], config: DataConfig, skips: SkipCounter, split: str, holdout: float
) -> Iterator[Sample]:
    """Chain the stages before the shuffle: read, choose by key, parse, filter by metadata.

    Args:
        urls: shards, possibly without end.
        config: the settings of the data.
        skips: counts what is left out.
        split: val takes the held-out keys, every other split the rest; with `holdout` 0 all.
        holdout: what `holdout_share` returned.

    Yields:
        Encoded samples as `parse` returns them.

    Raises:
        ValueError: too many bad samples, or 20,000 in a row left out.
    """

    def choose(raw: Sample) -> Sample:
        if holdout and is_held_out(raw["__key__"], holdout) != (split == "val"):
            raise SampleError(f"{FILTERED}other split")
        return raw

    chosen = apply(choose, read_samples(urls, skips), skips)
    parsed = apply(parse, chosen, skips)
    for sample in apply(lambda s: check_metadata(s, config), parsed, skips):
        skips.in_a_row = 0
        yield sample
