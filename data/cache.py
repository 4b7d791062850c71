"""Shards encoded once: to tokens or to moments of latents, and captions to states of an encoder.

For every training shard NAME.tar there are

- NAME.safetensors: `tokens` [N, h, w], and `tokens_flip` of the mirrored images, `tokens_crop1` and
  so on of further crops. Continuous autoencoders have `moments` [N, 2C, h, w] in place of tokens:
  the mean and the logarithm of the variance of the posterior, of which a latent is drawn anew at
  every read. Further views of the same pictures stand beside them under their own names.
- NAME.parquet: of the same rows key, captions, label, width and height of the upright picture, and
  the square that every crop was cut from.
- NAME.text.safetensors, where a text encoder is cached: `states` [T, D], one caption behind the
  other, `lengths` [C + 1] and `pooled` [C + 1, P]; the last caption is the empty one, to which
  training drops others.

cache.json (`data/cached.py`) says what made them and is written last.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from torch import Tensor

from data.cached import INDEX, read_index
from data.files import atomic, file_hash, write_json
from data.images import crop_box, to_tensor
from data.readers import Sample
from data.select import drawn, frozen, visited
from data.shards import LOSSES, apply
from data.skips import SkipCounter
from data.view import MAX_SKIPPED, ShardList, View
from data.webdata import ShardPictures

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("label", pyarrow.int64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        # left, top, right, bottom of every crop in pixels
        ("crops", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
        # number among the samples of the split in the shard, good and bad
        ("row", pyarrow.int64()),
    ]
)


class Encoder(NamedTuple):
    """A first stage as a cache needs it.

    `encode` maps images [B, 3, H, W] in [-1, 1] to tokens [B, h, w] below `num_codes`, or, where
    that is None, to moments [B, 2C, h, w].
    """

    encode: Callable[[Tensor], Tensor]
    num_codes: int | None


class TextStates(NamedTuple):
    """What a text encoder makes of B captions."""

    states: list[Tensor]
    """[L, D] of every caption, without padding."""
    pooled: Tensor | None
    """[B, P], where the encoder has pooled vectors."""


EncodeText = Callable[[Sequence[str]], TextStates]


class Encoding(NamedTuple):
    """How the pictures and captions of a shard are encoded.

    Attributes:
        view: how samples become pictures.
        encoders: the views by name; the first is stored as "tokens" or "moments", whatever its
            name. Tokens take 2 bytes, 4 above 65,536 codes; moments half precision.
        crops: of every picture, where `view.crop` draws them.
        text: encodes captions, where their states are kept.
        batch_size: images and captions encoded at once.
        device: where the encoders work.
    """

    view: View
    encoders: Mapping[str, Encoder]
    crops: int = 1
    text: EncodeText | None = None
    batch_size: int = 64
    device: str | torch.device = "cpu"


def content(num_codes: int | None) -> str:
    """Return what a cache's first view is called: tokens of a codebook, or moments without one."""
    return "moments" if num_codes is None else "tokens"


def encode_shard(
    path: Path,
    url: str,
    shards: ShardList,
    encoding: Encoding,
    *,
    made: Mapping[str, Any],
    max_skipped: float = MAX_SKIPPED,
) -> None:
    """Encode one training shard, unless that is done; every crop is decoded once for all views.

    Augmentation freezes: with a random crop an image keeps the `crops` that are drawn from its key,
    and with `view.flip` the mirrored image is encoded too. All batches have one shape: the last is
    filled with its last picture and cut afterwards, so a row does not depend on the size of the
    shard.

    Args:
        path: what to write, NAME.safetensors; the other files go beside it.
        url: the shard.
        shards: the training split, which says which keys belong to it.
        encoding: what is made of its samples.
        made: plain settings, all that the content depends on; a part with the same ones is kept.
        max_skipped: share of bad samples at which a ValueError is raised.

    Raises:
        ValueError: the shard cannot be read at all, too many bad samples, a token outside the
            codebook, or a moment that half precision cannot hold.
    """
    text_path = path.with_suffix(".text.safetensors")
    if made_with(path) == json.loads(json.dumps(made)):
        if encoding.text is None or text_path.exists():
            return
    view = encoding.view
    read = ShardPictures(shards, view, view.seed, max_skipped)
    skips, total = read.skips, 0
    first, *others = encoding.encoders.items()
    views = {content(first[1].num_codes): first[1], **dict(others)}

    def numbered() -> Iterator[Sample]:
        nonlocal total
        for sample in read.rows(shards.paths.index(url), 0):
            if sample is not None:
                yield {**sample, "row": total}
            total += 1

    def cropped(sample: Sample) -> Sample:
        draw = frozen(view, sample["key"])
        draws = [f"{draw}/{i}" if i else draw for i in range(encoding.crops)]
        several = [visited(sample, view, one, flip=False) for one in draws]
        boxes = [
            crop_box(sample["data"], view.resolution, view.crop, drawn(d, "crop")) for d in draws
        ]
        (width, height), _ = boxes[0]
        pixels = np.stack([s["pixels"] for s in several])  # [crops, H, W, 3]
        kept = {"captions": sample["captions"], "row": sample["row"]}
        kept["crops"] = [box for _, box in boxes]
        return {**several[0], **kept, "pixels": pixels, "width": width, "height": height}

    samples = apply(cropped, numbered(), skips)
    grids: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    while batch := list(islice(samples, encoding.batch_size)):
        rows += [{column: s.get(column) for column in SCHEMA.names} for s in batch]
        filled = batch + batch[-1:] * (encoding.batch_size - len(batch))
        pixels = np.stack([s["pixels"] for s in filled], axis=1)  # [crops, B, H, W, 3]
        for number, crop in enumerate(pixels):
            images = to_tensor(crop).to(encoding.device)  # [B, 3, H, W]
            for mirror in (False, True)[: 1 + view.flip]:
                shown = images.flip(-1) if mirror else images
                for name, encoder in views.items():
                    with torch.no_grad():
                        encoded = encoder.encode(shown).cpu().numpy()[: len(batch)]
                    tensor = variant(name, number, mirror)
                    grids.setdefault(tensor, []).append(_packed(encoded, encoder.num_codes, path))
    lost = [kind for kind in LOSSES if skips.counts[kind]]
    if not rows and lost:
        raise ValueError(f"{url} cannot be read (last: {skips.examples[lost[0]]})")
    # what comes from a channels-last tensor is not laid out as a file holds it
    tensors = {name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in grids.items()}
    with atomic(path.with_suffix(".parquet")) as temporary:
        table = pyarrow.Table.from_pylist(rows, SCHEMA)
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    if encoding.text is not None:
        captions = [caption for row in rows for caption in row["captions"]]
        states = _text_tensors(encoding.text, captions, encoding.batch_size)
        with atomic(text_path) as temporary:
            save_torch(states, temporary)
    # one entry: the order of several in the file is another one in every process
    told = {"made": made, "read": total, "skipped": skips.counts, "examples": skips.examples}
    with atomic(path) as temporary:  # last: it stands for all
        save_file(tensors, temporary, {"encoded": json.dumps(told, sort_keys=True)})


def variant(view: str, crop: int, mirror: bool) -> str:
    """Name the tensor of one crop of a view, or of its mirror image."""
    return view + (f"_crop{crop}" if crop else "") + ("_flip" if mirror else "")


def _packed(encoded: np.ndarray, num_codes: int | None, path: Path) -> np.ndarray:
    """Return tokens of the codebook in 2 or 4 bytes, moments in half precision."""
    if num_codes is None:
        with np.errstate(over="ignore"):
            moments = encoded.astype(np.float16)  # [B, 2C, h, w]
        if not np.isfinite(moments).all():
            raise ValueError(f"a moment of {path} is no finite number of half precision")
        return moments
    if encoded.min() < 0 or encoded.max() >= num_codes:
        raise ValueError(f"a token of {path} is outside the {num_codes} codes")
    return encoded.astype(np.uint16 if num_codes <= 2**16 else np.int32)  # [B, h, w]


def _text_tensors(encode: EncodeText, captions: Sequence[str], size: int) -> dict[str, Tensor]:
    """Return the tensors of a text file: captions [C] and the empty one, `size` at once."""
    batches = [captions[i : i + size] for i in range(0, len(captions), size)]
    made = [encode(batch) for batch in [*batches, [""]]]
    several = [states for batch in made for states in batch.states]
    tensors = {
        "states": _halved(torch.cat(several)),  # [T, D]
        "lengths": torch.tensor([len(states) for states in several]),  # [C + 1]
    }
    pooled = [batch.pooled for batch in made if batch.pooled is not None]
    if pooled:
        tensors["pooled"] = _halved(torch.cat(pooled))  # [C + 1, P]
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _halved(values: Tensor) -> Tensor:
    """Return values in 2 bytes: float16, or bfloat16 where one is too large for it."""
    halved = values.half()
    return halved if bool(torch.isfinite(halved).all()) else values.bfloat16()


def made_with(path: Path) -> dict[str, Any] | None:
    """Return the settings that an encoded shard was made with; None where it does not stand."""
    with suppress(OSError, SafetensorError), safe_open(path, "numpy") as stored:
        return _told(stored).get("made") if path.with_suffix(".parquet").exists() else None
    return None


def _told(stored: Any) -> dict[str, Any]:
    return json.loads((stored.metadata() or {}).get("encoded", "{}"))


def finish_cache(
    folder: Path,
    sources: Mapping[str, str],
    made: Mapping[str, Any],
    skips: SkipCounter | None = None,
    about: Mapping[str, Any] | None = None,
    counted: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write cache.json over the encoded shards.

    Args:
        folder: with their files.
        sources: name of every part -> its shard, in order.
        made: what the content depends on: "tokenizer" (sha256 of its file) and "num_codes" are
            what `count_tokens` compares.
        skips: counts what was left out of all shards.
        about: what they were made of, for who reads the cache.
        counted: samples of every shard, good and bad, as training from the shards counts them; by
            default those that were read.

    Returns:
        Its content, see `read_index`.

    Raises:
        ValueError: a file that is missing or damaged, too many bad samples, or no sample at all.
    """
    parts, skips = [], skips or SkipCounter()
    for number, (name, source) in enumerate(sources.items()):
        path = folder / f"{name}.safetensors"
        with reading(path), safe_open(path, "numpy") as stored:
            told = _told(stored)
        table = path.with_suffix(".parquet")
        with reading(table):
            rows = pyarrow.parquet.read_metadata(table).num_rows
        text = path.with_suffix(".text.safetensors")
        files = [path, table, *([text] if made.get("text") else [])]
        sums = {file.name: file_hash(file) for file in files}
        told_rows = told["read"] if counted is None else counted[number]
        numbers = {"rows": rows, "read": told["read"], "counted": told_rows}
        parts.append({"name": name, "source": source, **numbers, "files": sums})
        skips.counts.update(told["skipped"])  # not judged by windows: the whole set is known
        skips.examples |= told["examples"]
    skips.check()
    count = sum(part["rows"] for part in parts)
    if not count:
        raise ValueError("the training shards hold no sample to encode")
    summary = {"made": made, "count": count, **skips.found(), "about": about or {}}
    write_json(folder / INDEX, {**summary, "parts": parts})
    return {**summary, "parts": parts}


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what readers raise of a missing or damaged file of a cache into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{file} is missing or damaged: encode again, which makes it anew"
        ) from error


def count_tokens(folder: Path, num_codes: int, sha256: str | None = None) -> Tensor:
    """Count how often every code occurs in a cache, all its variants included: [num_codes] int64.

    Raises:
        ValueError: no cache, or one of another tokenizer (of that sha256, where one is given).
    """
    index = read_index(folder)
    made = index["made"]
    if made["num_codes"] != num_codes or sha256 not in (None, made["tokenizer"]):
        raise ValueError(f"{folder} was made with another tokenizer, of {made['num_codes']} codes")
    counts = torch.zeros(num_codes, dtype=torch.int64)
    for part in index["parts"]:
        path = folder / f"{part['name']}.safetensors"
        with reading(path), safe_open(path, "numpy") as stored:
            for name in stored.keys():
                if name == "tokens" or name.startswith("tokens_"):
                    tokens = torch.from_numpy(stored.get_tensor(name).astype(np.int64))
                    counts += torch.bincount(tokens.flatten(), minlength=num_codes)
    return counts
