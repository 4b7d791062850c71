"""What shards hold, read once: samples, faults, sizes, captions, what filters would remove.

Map and reduce: `survey_shard` writes a small file for one shard, `summary` reads them all, in the
memory of a few histograms and of one number per key.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from data.files import atomic
from data.images import upright
from data.select import caption_of, check_metadata, frozen
from data.shards import Sample, apply, parse, read_samples
from data.skips import SampleError, SkipCounter, bad
from data.view import View

SHOWN = 25  # pictures of the contact sheet
THUMB = 128
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
LONGEST = 100_000  # sides and captions beyond are counted as this long
ASPECTS = (0, 1 / 3, 1 / 2, 2 / 3, 0.8, 1.25, 1.5, 2, 3, np.inf)  # width by height


def filters(view: View) -> dict[str, View]:
    """Return the metadata filters of a view one by one: name -> a view with that one alone."""
    plain = View(view.resolution)
    names = [f.name for f in fields(View) if f.name.startswith(("min_", "max_"))]
    asked = [name for name in names if getattr(view, name) is not None]
    return {name: replace(plain, **{name: getattr(view, name)}) for name in asked}


def survey_shard(path: Path, url: str, view: View, limit: int | None = None) -> None:
    """Read the samples of one shard, each picture decoded once, and write what was found.

    Args:
        path: the .safetensors to write: sides [N, 2] int32 width and height, length [M] int32
            characters of all captions, removed [N, F] bool by each filter, keys [N] uint64 hashes,
            thumbs [k] encoded; the rest as JSON among its metadata.
        url: the shard.
        view: its filters, and the seed that chooses a caption.
        limit: at most so many samples.
    """
    skips = SkipCounter(1.0)
    single = filters(view)
    keys: list[int] = []
    sides: list[tuple[int, int]] = []
    lengths: list[int] = []
    removed: list[list[bool]] = []
    thumbs: list[tuple[int, str, bytes]] = []
    size = 0
    raw = islice(read_samples([url], skips), limit)
    for sample in apply(lambda s: _looked_at(parse(s, view.caption)), raw, skips):
        image: Image.Image = sample["picture"]
        number = int.from_bytes(hashlib.blake2b(sample["key"].encode(), digest_size=8).digest())
        keys.append(number)
        sides.append((min(image.width, LONGEST), min(image.height, LONGEST)))
        caption = caption_of(sample["captions"], frozen(view, sample["key"]))
        lengths += [min(len(text), LONGEST) for text in sample["captions"]]
        removed.append([not _passes(sample, one) for one in single.values()])
        size += len(sample["data"])
        # the smallest hashes are a random choice that does not depend on the order of reading
        if len(thumbs) < SHOWN or number < thumbs[-1][0]:
            thumbs = sorted([*thumbs, (number, caption, _thumb(image))])[:SHOWN]
    arrays: dict[str, np.ndarray] = {
        "keys": np.array(keys, np.uint64),
        "sides": np.array(sides, np.int32).reshape(-1, 2),
        "length": np.array(lengths, np.int32),
        "removed": np.array(removed, bool).reshape(len(keys), len(single)),
        **{f"thumb{i:02d}": np.frombuffer(data, np.uint8) for i, (*_, data) in enumerate(thumbs)},
    }
    about = {
        "url": url,
        "counts": dict(skips.counts),
        "examples": dict(skips.examples),
        "bytes": size,
        "filters": list(single),
        "thumbs": [[number, caption] for number, caption, _ in thumbs],
    }
    with atomic(path) as temporary:
        save_file(arrays, temporary, metadata={"survey": json.dumps(about)})


def _looked_at(sample: Sample) -> Sample:
    """Decode the whole picture, as training would."""
    return {**sample, "picture": upright(sample["data"])}


def _passes(sample: Sample, view: View) -> bool:
    try:
        check_metadata(sample, view)
    except SampleError:
        return False
    return True


def _thumb(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMB, THUMB))
    factor = THUMB // max(small.size)  # pixels of a small one stay squares
    small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    square = Image.new("RGB", (THUMB, THUMB), "white")
    square.paste(small, ((THUMB - small.width) // 2, (THUMB - small.height) // 2))
    encoded = io.BytesIO()
    square.save(encoded, "PNG")
    return encoded.getvalue()


def summary(paths: Sequence[Path], max_skipped: float) -> dict[str, Any]:
    """Put what `survey_shard` wrote together.

    Args:
        paths: its files, in the order of the shards.
        max_skipped: share of faulty samples at which a run stops.

    Returns:
        Plain containers: samples, faults by kind, duplicates, quantiles, histograms, and under
        "stops" the sentence with which a run would stop, or None.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    widths, heights, lengths = (np.zeros(LONGEST + 1, np.int64) for _ in range(3))
    aspects = np.zeros(len(ASPECTS) - 1, np.int64)
    removed: Counter[str] = Counter()
    left = 0
    keys: list[np.ndarray] = []
    shards: list[dict[str, Any]] = []
    size = 0
    for about, arrays in map(read_survey, paths):
        counts.update(about["counts"])
        for kind, example in about["examples"].items():
            examples.setdefault(kind, example)
        sides = arrays["sides"]
        widths += np.bincount(sides[:, 0], minlength=LONGEST + 1)
        heights += np.bincount(sides[:, 1], minlength=LONGEST + 1)
        lengths += np.bincount(arrays["length"], minlength=LONGEST + 1)
        aspects += np.histogram(sides[:, 0] / np.maximum(1, sides[:, 1]), ASPECTS)[0]
        removed.update(dict(zip(about["filters"], arrays["removed"].sum(0).tolist(), strict=True)))
        left += int((~arrays["removed"].any(1)).sum())
        keys.append(arrays["keys"])
        size += about["bytes"]
        shards.append({"url": about["url"], "samples": len(sides)})
    samples = int(widths.sum())
    skips = SkipCounter(max_skipped)
    skips.counts.update(counts)
    skips.examples.update(examples)
    stops = _stops(skips, left)
    faults = {k: {"count": n, "example": examples.get(k, "")} for k, n in bad(counts).items()}
    return {
        "samples": samples,
        "after_filters": left,
        "shards": len(shards),
        "empty_shards": [s["url"] for s in shards if not s["samples"]][:10],
        "bytes": size,
        "faults": faults,
        "duplicate_keys": _duplicates(keys, shards),
        "width": _quantiles(widths),
        "height": _quantiles(heights),
        "aspect": dict(zip(_ranges(ASPECTS), aspects.tolist(), strict=True)),
        "caption_characters": _quantiles(lengths),
        "removed_by": {k: n / max(1, samples) for k, n in removed.items()},
        "stops": stops,
    }


def _stops(skips: SkipCounter, left: int) -> str | None:
    try:
        skips.check()
    except ValueError as error:
        return str(error)
    return None if left else "no sample is left to train on"


def _duplicates(keys: Sequence[np.ndarray], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count the samples whose key came before, and name shards that share one."""
    together = np.concatenate([*keys, np.zeros(0, np.uint64)])
    found, times = np.unique(together, return_counts=True)
    twice = found[times > 1]
    count = int((times - 1).sum())
    if not count:
        return {"count": 0, "example": ""}
    sharing = [s["url"] for s, own in zip(shards, keys, strict=True) if np.isin(twice[0], own)]
    where = f"in {sharing[0]} and {sharing[1]}" if len(sharing) > 1 else f"twice in {sharing[0]}"
    return {"count": count, "example": f"one key stands {where}"}


def _quantiles(histogram: np.ndarray) -> dict[str, int]:
    """Return the quantiles of whole numbers of which `histogram` counts each."""
    total = int(histogram.sum())
    if not total:
        return {}
    ends = np.cumsum(histogram)
    return {
        name: int(np.searchsorted(ends, max(1, round(q * total)))) for name, q in QUANTILES.items()
    }


def _ranges(edges: Iterable[float]) -> list[str]:
    texts = [f"{edge:.3g}" for edge in edges]
    return [f"{a} to {b}" for a, b in pairwise(texts)]


def read_survey(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `survey_shard` wrote of one shard."""
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["survey"])
        return about, {name: file.get_tensor(name) for name in file.keys()}


def chosen_thumbs(paths: Sequence[Path]) -> list[tuple[Image.Image, str]]:
    """Return the pictures of the contact sheet with their captions, a random choice of all."""
    best: list[tuple[int, str, np.ndarray]] = []
    for about, arrays in map(read_survey, paths):
        for i, (number, caption) in enumerate(about["thumbs"]):
            best.append((number, caption, arrays[f"thumb{i:02d}"]))
        best = sorted(best, key=lambda row: row[:2])[:SHOWN]
    return [(Image.open(io.BytesIO(data.tobytes()), formats=["PNG"]), c) for _, c, data in best]
