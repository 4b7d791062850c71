"""Shards of captioned images: tars with KEY.jpg, KEY.txt and KEY.json, as img2dataset writes them.

Writing is deterministic and atomic. Reading gives raw samples, of which `parse` finds picture,
captions and metadata. A bad sample is counted by reason and left out; too many bad ones end the
run. Of a shard that breaks off it is estimated how many samples are lost.
"""

import io
import json
import math
import os
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from data.files import atomic, decode_text
from data.names import aliased
from data.readers import IMAGE_KEYS, Sample, is_image, reader_of, stamp
from data.remote import StalledError, is_remote, stamps_of
from data.skips import NOTED, SEEN, SampleError, SkipCounter
from data.view import ShardList

LOST = "in broken shards (estimated)"
GONE = "in missing shards (estimated)"
STALLED = "in shards that do not answer (estimated)"
PICKLE = f"{NOTED}pickled member, not read"
PICKLED = {"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"}
CHANGED = "in shards that changed (estimated)"
LOSSES = (LOST, GONE, STALLED, CHANGED)
SIBLINGS = 32  # shards that are looked at to guess what a broken one held
COUNTED = 4 * 10**9  # bytes of shards whose samples are counted one by one
COUNTED_FAR = 10**8  # the same of remote ones, which have to be fetched for it
PROBED_FAR = 2
PROBED = 16  # shards that are counted where the others are estimated
BLOCK = 512  # what headers and contents of a tar are multiples of


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    per_shard: int,
    image_format: Literal["png", "jpg"] = "png",
) -> list[str]:
    """Write samples as 00000.tar, 00001.tar, ...; equal samples give equal bytes.

    Args:
        samples: {"key", "image" uint8 [H, W, 3], "caption"} and, where there are, "label" (int)
            and "attributes" (plain dict), which go into KEY.json.
        folder: where to write; a shard appears there complete or not at all.
        per_shard: samples in a shard; the last may hold fewer.
        image_format: png, or jpg of quality 95.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: no sample per shard.
    """
    if per_shard < 1:
        raise ValueError(f"a shard needs at least 1 sample, got per_shard={per_shard}")
    folder = Path(folder)
    stream = iter(samples)
    paths: list[str] = []
    sample = next(stream, None)
    while sample is not None:
        path = folder / f"{len(paths):05d}.tar"
        with (
            atomic(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for _ in range(per_shard):
                for suffix, data in _members(sample, image_format).items():
                    member = tarfile.TarInfo(f"{sample['key']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                sample = next(stream, None)
                if sample is None:
                    break
        paths.append(str(path))
    return paths


def _members(sample: Sample, image_format: str) -> dict[str, bytes]:
    """Encode one sample: suffix -> bytes."""
    image = Image.fromarray(sample["image"])
    encoded = io.BytesIO()
    if image_format == "png":
        image.save(encoded, "PNG")
    else:
        image.save(encoded, "JPEG", quality=95, subsampling=0)
    meta = {"key": sample["key"], "caption": sample["caption"]}
    meta |= {"width": image.width, "height": image.height}
    meta |= {name: sample[name] for name in ("label", "attributes") if name in sample}
    return {
        image_format: encoded.getvalue(),
        "txt": sample["caption"].encode(),
        "json": json.dumps(meta).encode(),
    }


def read_samples(
    urls: Iterable[str], skips: SkipCounter, siblings: Sequence[str] = ()
) -> Iterator[Sample]:
    """Yield the raw samples of shards, see `read_shard`.

    Raises:
        ValueError: so many shards in a row held no sample that nothing else can be hoped for.
    """
    barren = 0
    for url in urls:
        before = skips.counts[SEEN]
        yield from read_shard(url, skips, siblings=siblings)
        barren = 0 if skips.counts[SEEN] > before else barren + 1
        if barren >= 1000:
            raise ValueError(f"the last {barren} shards held no sample at all; the last was {url}")


def read_shard(
    url: str, skips: SkipCounter, first: int = 0, siblings: Sequence[str] = ()
) -> Iterator[Sample]:
    """Yield the raw samples of a shard: suffix -> bytes, with __key__ and __url__.

    What could be read of a broken shard is kept. As lost count the samples that it lacks of the
    largest of its siblings, else by the length of what was not read; at least 1.

    Args:
        url: the shard.
        skips: counts what was seen and what is lost.
        first: number of the first sample.
        siblings: shards like this one.
    """
    count, length = 0, 0
    samples = reader_of(url).read(url, first)
    while True:
        try:
            sample = next(samples, None)
        except Exception as error:  # whatever a damaged file makes of its reader
            whole = _size(url)
            unread = count * whole // max(1, length) - count - first
            lacking = _fullest(url, siblings) - count - first
            lost = max(1, lacking if lacking > 0 else unread)
            kind = lost_by(error)
            skips.note(kind, url, str(error))
            skips.add({SEEN: lost, kind: lost})
            return
        if sample is None:
            return
        count += 1
        length += sum(BLOCK + len(data) + -len(data) % BLOCK for data in _files(sample))
        skips.add({SEEN: 1})
        if pickled := PICKLED & sample.keys():
            skips.note(PICKLE, url, f"{sample['__key__']}.{min(pickled)}")
            skips.add({PICKLE: 1})
        yield sample


def lost_by(error: Exception) -> str:
    """Return the kind of fault that what a shard loses is counted under."""
    if isinstance(error, FileNotFoundError):
        return GONE
    return STALLED if isinstance(error, StalledError) else LOST


def count_rows(shards: ShardList) -> tuple[int, ...]:
    """Return how many samples of the split every shard has, good and bad; no content is read.

    Where the shards together are too large, or far away, some are counted and the others estimated
    by their size. One that cannot be read counts 1, so that reading it tells.
    """
    urls, sizes = shards.paths, _sizes(shards.paths)
    far = any(map(is_remote, urls))
    if sum(sizes) <= (COUNTED_FAR if far else COUNTED) and not (far and 0 in sizes):
        return tuple(len(held_rows(url, shards)) or int(not _readable(url)) for url in urls)
    probed = range(0, len(urls), -(-len(urls) // (PROBED_FAR if far else PROBED)))
    found = sum(len(held_rows(urls[i], shards)) for i in probed)
    rate, mean = found / max(1, sum(sizes[i] for i in probed)), found / len(probed)
    return tuple(max(1, round(rate * size if size else mean)) for size in sizes)


def _sizes(urls: Sequence[str]) -> list[int]:
    """Return the bytes of shards; 0 of one that is gone or does not tell."""
    try:
        return [size for size, _ in stamps_of(urls)]
    except OSError:
        return [_size(url) for url in urls]


def _readable(url: str) -> bool:
    """Say whether there is a sample in a shard."""
    return next(iter(held_rows(url, ShardList(()))), None) is not None


def held_rows(url: str, shards: ShardList) -> Sequence[int]:
    """Return the numbers of the samples of a shard that belong to a split."""
    try:
        return _held_rows(url, shards.holdout, shards.held_out, *stamp(url))
    except OSError:
        return []


@lru_cache(maxsize=4096)
def _held_rows(url: str, holdout: float, held_out: bool, *version: int) -> array:
    split = ShardList((url,), holdout, held_out)
    keys = reader_of(url).keys(url)
    return array("q", (number for number, key in enumerate(keys) if split.holds(key)))


def _files(sample: Sample) -> Iterator[bytes]:
    return (data for data in sample.values() if isinstance(data, bytes))


def _fullest(broken: str, siblings: Sequence[str]) -> int:
    """Return how many samples the largest other shard holds; 0 without one."""
    near = [url for url in siblings[:SIBLINGS] if url != broken]
    fullest = max(near, key=_size, default=None)
    if fullest is None:
        return 0
    return reader_of(fullest).count(fullest)


def _size(url: str) -> int:
    """Return the bytes of a shard; 0 of one that is gone, and of a remote one, which costs time."""
    return os.path.getsize(url) if os.path.exists(url) else 0


def apply(
    function: Callable[[Sample], Sample], samples: Iterable[Sample], skips: SkipCounter
) -> Iterator[Sample]:
    """Map samples; one for which `function` raises is counted and left out."""
    for sample in samples:
        try:
            result = function(sample)
        except Exception as error:
            name = sample.get("key") or sample["__key__"]
            skips.skip(error, f"{name} in {sample.get('url') or sample['__url__']}")
            continue
        yield result


def parse(raw: Sample, caption: str | None = None) -> Sample:
    """Find image, captions and metadata of a raw sample.

    Args:
        raw: suffix -> bytes, with __key__ and __url__.
        caption: that of a picture which has none; without it such a picture is left out.

    Returns:
        {"key", "url", "captions" list, "data" encoded image, "meta" dict}.

    Raises:
        SampleError: what the reader found at fault, no image, a text that cannot be decoded, no
            caption that says anything, or a KEY.json that is no JSON object.
    """
    if "__fault__" in raw:
        raise SampleError(raw["__fault__"])
    try:
        meta = json.loads(raw.get("json") or "{}", parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise SampleError("bad json")
    data = next((raw[name] for name in IMAGE_KEYS if raw.get(name)), None)
    if data is None:
        dotted = sum(map(is_image, raw))  # these have a second suffix
        why = " (a key ends at the first dot of a name)" if dotted else ""
        raise SampleError(f"no image{why}", max(1, dotted))
    text = _decoded(raw.get("txt", b""))
    captions = [text] if text else _texts(aliased("caption", meta))
    if not captions and caption is not None:
        captions = [caption]
    if not captions:
        raise SampleError("no caption")
    key, url = raw["__key__"], raw["__url__"]
    return {"key": key, "url": url, "captions": captions, "data": data, "meta": meta}


def _finite(text: str) -> float | None:
    """Return a number of a KEY.json; NaN and infinity are none."""
    number = float(text)
    return number if math.isfinite(number) else None


def _decoded(text: bytes) -> str:
    try:
        return decode_text(text).strip()
    except ValueError:
        raise SampleError("bad text") from None


def _texts(found: Any) -> list[str]:
    """Return the captions that KEY.json holds, one or a list."""
    several = found if isinstance(found, list) else [found]
    texts = [text.strip() for text in several if isinstance(text, str) and text.strip()]
    # half a surrogate pair, which JSON can hold, is no text
    return [_decoded(text.encode(errors="surrogatepass")) for text in texts]
