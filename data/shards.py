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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from data.files import atomic, decode_text
from data.names import aliased
from data.readers import IMAGE_KEYS, Sample, is_image, reader_of, stamp
from data.remote import is_remote, stamps_of
from data.view import MAX_SKIPPED, ShardList

SEEN = "seen"
FILTERED = "filtered: "
OTHER_SPLIT = f"{FILTERED}other split"
LOST = "in broken shards (estimated)"
WINDOW = 500
IN_A_ROW = 20_000
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


class SkipCounter:
    """Counts samples by what became of them, and says when too many are bad.

    `counts` holds SEEN, one entry per reason (the text of a SampleError, corrupt image, else the
    exception's type), and one per metadata filter (prefix FILTERED; what these remove is not called
    bad). What a broken shard loses comes at once: a window spans at least ten such losses.
    """

    def __init__(self, max_skipped: float = MAX_SKIPPED, window: int = WINDOW):
        self.max_skipped = max_skipped
        self.window = window
        self.counts: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()  # since the last full window
        self.untold: Counter[str] = Counter()  # since the last `take`
        self.in_a_row = 0  # left out since a sample last passed
        self.example = ""

    def add(self, counts: Mapping[str, int]) -> None:
        """Count.

        Raises:
            ValueError: a window is full and more than `max_skipped` of it is bad.
        """
        for counter in (self.counts, self.recent, self.untold):
            counter.update(counts)
        self.window = max(self.window, 10 * max(_bad(counts).values(), default=0))
        if self._considered(self.recent) >= self.window:
            recent, self.recent = self.recent, Counter()
            self.check(recent)

    def skip(self, error: Exception, where: str) -> None:
        """Count a sample that is left out because of an error."""
        reason = "corrupt image" if isinstance(error, OSError) else type(error).__name__
        reason = str(error) if isinstance(error, SampleError) else reason
        if not reason.startswith(FILTERED):
            self._note(error, where)
        images = error.images if isinstance(error, SampleError) else 1
        self.add({SEEN: images - 1, reason: images})
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            raise ValueError(f"none of the last {IN_A_ROW} samples was usable: {dict(self.counts)}")

    def lose(self, error: Exception, url: str, lost: int) -> None:
        """Count what a broken shard lacks, about `lost` samples."""
        self._note(error, url)
        self.add({SEEN: lost, LOST: lost})

    def _note(self, error: Exception, where: str) -> None:
        why = (str(error).splitlines() or [""])[0]
        told = " ".join(f"{where}: {why[:200].rstrip(': ')}".split())  # one line
        self.example = f" (last: {told})"

    def take(self) -> dict[str, int]:
        """Return what was counted since the last call, to be added up in another process."""
        counts, self.untold = dict(self.untold), Counter()
        return counts

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise ValueError where more than `max_skipped` of the counted samples is bad.

        What metadata filters remove is not counted at all: it is neither good nor bad.
        """
        counts = self.counts if counts is None else counts
        skipped, seen = sum(_bad(counts).values()), self._considered(counts)
        if skipped > self.max_skipped * seen:
            raise ValueError(
                f"{skipped} of {seen} samples were skipped: {_listed(_bad(counts))}{self.example}, "
                f"more than max_skipped={self.max_skipped} allows; repair the shards or raise "
                "max_skipped"
            )

    def told(self, split: str) -> str:
        """Return a line that says what became of the samples of a split."""
        bad = _bad(self.counts)
        parts = [f"{self._considered(self.counts) - sum(bad.values())} samples"]
        if others := self.counts[OTHER_SPLIT]:
            parts.append(f"{others} {'validation' if split.startswith('train') else 'training'}")
        parts += [
            f"{n} {reason}"
            for reason, n in sorted(self.counts.items())
            if reason.startswith(FILTERED) and reason != OTHER_SPLIT
        ]
        reasons = f": {_listed(bad)}{self.example}" if bad else ""
        return f"{split}: {', '.join(parts)}, {sum(bad.values())} skipped{reasons}"

    @staticmethod
    def _considered(counts: Mapping[str, int]) -> int:
        """Return how many samples were seen and not removed by a filter."""
        filtered = sum(n for reason, n in counts.items() if reason.startswith(FILTERED))
        return max(0, counts.get(SEEN, 0) - filtered)


def _bad(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of samples that are left out for a fault."""
    return {r: n for r, n in counts.items() if r != SEEN and not r.startswith(FILTERED)}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))


class SampleError(Exception):
    """A sample to leave out; the text is the reason that it is counted under.

    Args:
        reason: the text.
        images: for how many it counts.
    """

    def __init__(self, reason: str, images: int = 1):
        super().__init__(reason)
        self.images = images


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
            skips.lose(error, url, max(1, lacking if lacking > 0 else unread))
            return
        if sample is None:
            return
        count += 1
        length += sum(BLOCK + len(data) + -len(data) % BLOCK for data in _files(sample))
        skips.add({SEEN: 1})
        yield sample


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
