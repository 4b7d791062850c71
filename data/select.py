"""The samples of a split in order: encoded, as captions alone, or as pictures.

A sample's position counts those that pass the metadata filters, whether or not its picture can be
decoded: so captions and pictures agree, and any part of a split can be read without decoding what
comes before. A picture that cannot be decoded leaves a gap.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import cast

from data.crops import CROPS
from data.images import decode_image, open_image
from data.names import aliased, number
from data.shards import Sample, apply, parse, read_samples
from data.skips import FILTERED, OTHER_SPLIT, SampleError, SkipCounter
from data.view import MAX_SKIPPED, Crop, ShardList, View


def check_metadata(sample: Sample, view: View) -> Sample:
    """Return a sample with the captions that pass, or raise SampleError with what stops it."""
    meta = sample["meta"]
    if view.min_size is not None:
        size = [number("width", meta), number("height", meta)]
        if any(value != value for value in size):  # nan: img2dataset was not the source
            size = [float(value) for value in open_image(sample["data"]).size]
        if min(size) < view.min_size:
            raise SampleError(f"{FILTERED}min_size")
    # "not >=" and "not <=", so that a score that is missing does not pass
    least, watermark, unsafe = view.min_aesthetic, view.max_pwatermark, view.max_punsafe
    if least is not None and not number("aesthetic", meta) >= least:
        raise SampleError(f"{FILTERED}min_aesthetic")
    if watermark is not None and not number("pwatermark", meta) <= watermark:
        raise SampleError(f"{FILTERED}max_pwatermark")
    if unsafe is not None and not number("punsafe", meta) <= unsafe:
        raise SampleError(f"{FILTERED}max_punsafe")
    shortest, longest = view.min_caption, view.max_caption
    captions = [c for c in sample["captions"] if shortest is None or len(c) >= shortest]
    if not captions:
        raise SampleError(f"{FILTERED}min_caption")
    captions = [c for c in captions if longest is None or len(c) <= longest]
    if not captions:
        raise SampleError(f"{FILTERED}max_caption")
    return {**sample, "captions": captions}


def drawn(draw: str, what: str) -> random.Random:
    """Return the generator of one choice about a sample.

    Args:
        draw: says of which sample, and at which visit where every visit draws anew.
        what: the choice: caption, crop or mirror.
    """
    return random.Random(f"{draw}/{what}")


def mirrored(draw: str) -> bool:
    """Say whether a sample is mirrored where half of them are."""
    return drawn(draw, "mirror").random() < 0.5


def caption_of(captions: Sequence[str], draw: str) -> str:
    """Return one of the captions of a sample."""
    return captions[0] if len(captions) == 1 else drawn(draw, "caption").choice(captions)


def frozen(view: View, key: str) -> str:
    """Return the draw of a sample that looks the same at every visit."""
    return f"{view.seed}/{key}"


def described(sample: Sample, draw: str) -> Sample:
    """Return "key" and "caption" of an encoded sample, "label" and "attributes" if given."""
    result = {"key": sample["key"], "caption": caption_of(sample["captions"], draw)}
    label, attributes = aliased("label", sample["meta"]), sample["meta"].get("attributes")
    if type(label) is int and 0 <= label < 2**63:
        result["label"] = label
    if isinstance(attributes, dict):
        result["attributes"] = attributes
    return result


def decoded(sample: Sample, view: View) -> Sample:
    """Return an encoded sample as validation sees it: its crop and its caption draw nothing anew.

    Returns:
        What `described` does, with "pixels" uint8 [H, W, 3].
    """
    crop = cast(Crop, CROPS[view.crop].seen)
    pixels = decode_image(sample["data"], view.resolution, crop=crop)
    return {"pixels": pixels, **described(sample, frozen(view, sample["key"]))}


def visited(sample: Sample, view: View, draw: str, flip: bool) -> Sample:
    """Return an encoded sample as training sees it: crop, mirror and caption follow the draw.

    Args:
        sample: encoded, as `data.shards.parse` returns it.
        view: resolution and crop.
        draw: what is drawn depends on it, and on nothing else.
        flip: mirror half of the pictures.

    Returns:
        What `described` does, with "pixels" uint8 [H, W, 3].
    """
    pixels = decode_image(
        sample["data"],
        view.resolution,
        crop=view.crop,
        rng=drawn(draw, "crop"),
        mirror=flip and mirrored(draw),
        reduced=True,
    )
    return {"pixels": pixels, **described(sample, draw)}


def select(raw: Sample, shards: ShardList, view: View) -> Sample:
    """Return what `parse` makes of a raw sample, chosen by key and filtered by metadata.

    Raises:
        SampleError: it belongs to another split, is bad, or a filter stops it.
    """
    if not shards.holds(raw["__key__"]):
        raise SampleError(OTHER_SPLIT)
    return check_metadata(parse(raw, view.caption), view)


def selected(
    urls: Iterable[str], shards: ShardList, view: View, skips: SkipCounter
) -> Iterator[Sample]:
    """Yield what `select` makes of the samples of files.

    Args:
        urls: the files.
        shards: which keys belong to the split.
        view: the metadata filters.
        skips: counts what is left out.

    Raises:
        ValueError: too many bad samples, or 20,000 in a row left out.
    """
    raws = read_samples(urls, skips, shards.paths)
    for sample in apply(lambda raw: select(raw, shards, view), raws, skips):
        skips.in_a_row = 0
        yield sample


def encoded(
    shards: ShardList,
    view: View,
    skips: SkipCounter,
    first: int = 0,
    limit: int | None = None,
) -> Iterator[Sample]:
    """Yield the encoded samples at positions [first, first + limit); each file is read once.

    Raises:
        ValueError: too many bad samples, or a split without any sample.
    """
    stops = [n for n in (shards.limit, None if limit is None else first + limit) if n is not None]
    stop = min(stops, default=None)
    found = False
    for sample in islice(selected(shards.paths, shards, view, skips), first, stop):
        found = True
        yield sample
    skips.check()
    if not found and first == 0 and stop != 0:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skips.counts.items()))
        raise ValueError(
            f"{', '.join(shards.paths[:2])} ... hold no sample to use ({counts or 'none seen'}): "
            "give more shards, set val_shards, or loosen the filters"
        )


def captions(
    shards: ShardList,
    view: View,
    *,
    first: int = 0,
    limit: int | None = None,
    skips: SkipCounter | None = None,
) -> Iterator[Sample]:
    """Yield {"key", "caption"}, "label" and "attributes" if given; no pixel is decoded.

    Args:
        shards: the split.
        view: its metadata filters choose.
        first: position of the first sample.
        limit: at most so many positions.
        skips: counts what is left out.
    """
    samples = encoded(shards, view, skips or SkipCounter(), first, limit)
    return (described(sample, frozen(view, sample["key"])) for sample in samples)


def pictures(
    shards: ShardList,
    view: View,
    *,
    first: int = 0,
    limit: int | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> Iterator[Sample]:
    """Yield what `captions` does with "pixels" uint8 [H, W, 3], cut in the centre, not mirrored.

    Each picture is decoded once, when it is asked for, and none before position `first`.
    """
    skips = SkipCounter(max_skipped)
    samples = encoded(shards, view, skips, first, limit)
    yield from apply(lambda s: decoded(s, view), samples, skips)
    skips.check()
