"""Samples per second of the training stream against webdataset: `python -m tests.bench.data`.

JPEGs of 512 px become pictures of 256 px; both read the same shards, in turns. `--memory` reads
20,000 and 200,000 samples instead, each in a process of its own, and prints the memory they took.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

import data.select
from data.shards import write_shards
from data.view import Order, ShardList, View
from data.webdata import WebData
from tests.bench.machine import heading, one_thread

BATCH = 32
SIDE, RESOLUTION = 512, 256


def prepare(folder: Path, shards: int, each: int, side: int, kinds: int = 64) -> None:
    """Write shards of JPEGs as smooth as photographs, of which `kinds` differ."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(kinds):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-4, 5, smooth.shape, np.int16)
        pictures.append(noisy.clip(0, 255).astype(np.uint8))
    samples = (
        {"key": f"{i:07d}", "image": pictures[i % kinds], "caption": f"picture {i}"}
        for i in range(shards * each)
    )
    write_shards(samples, folder, each, "jpg")


def paths(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def ours(folder: Path, workers: int, side: int = RESOLUTION, shuffle: int = 1000) -> Iterator[dict]:
    """Batches of our stream."""
    shards = ShardList(tuple(paths(folder)))
    web = WebData(
        shards, None, View(side), Order(workers, shuffle), batch_size=BATCH, epoch_batches=10**6
    )
    yield from web.stream()


def shrunk(sample: tuple[Image.Image, str]) -> tuple[np.ndarray, str]:
    """What a plain pipeline does with a decoded picture."""
    image, text = sample
    return np.asarray(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)), text


def batched(samples: list[tuple[np.ndarray, str]]) -> dict:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
    return {"image": pixels.movedim(-1, 1).float() / 127.5 - 1, "caption": [t for _, t in samples]}


def plain(folder: Path, workers: int) -> Iterator[dict]:
    """Batches of webdataset, as its documentation builds them."""
    stages = [
        webdataset.ResampledShards(paths(folder)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000, initial=250),
        webdataset.decode("pil"),
        webdataset.to_tuple("jpg", "txt"),
        webdataset.map(shrunk),
    ]
    dataset = webdataset.DataPipeline(*stages)
    yield from DataLoader(dataset, BATCH, num_workers=workers, collate_fn=batched, drop_last=True)


def measured(batches: Iterator[dict], count: int) -> float:
    """Samples per second, once the first batches are there."""
    for _ in islice(batches, 6):  # what was prefetched
        pass
    start = time.perf_counter()
    seen = sum(len(batch["caption"]) for batch in islice(batches, count))
    return seen / (time.perf_counter() - start)


def speed(folder: Path, workers: int, batches: int, repeats: int) -> None:
    """Print the rates of both, and of ours where every JPEG is decoded whole."""
    decode = data.select.decode_image

    def whole(*args, reduced: bool = False, **options) -> np.ndarray:
        return decode(*args, **options)

    streams = {"webdataset": plain(folder, workers), "ours": ours(folder, workers)}
    data.select.decode_image = whole
    streams["ours, decoded whole"] = ours(folder, workers)
    for _ in islice(streams["ours, decoded whole"], 1):  # its workers keep what they began with
        pass
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(repeats):
        for name, stream in streams.items():
            data.select.decode_image = whole if "whole" in name else decode
            rates[name].append(measured(stream, batches))
    data.select.decode_image = decode
    for name, values in rates.items():
        shown = ", ".join(f"{value:.0f}" for value in values)
        print(f"{workers} workers, {name}: median {statistics.median(values):.0f}/s ({shown})")
    for name in ("ours", "ours, decoded whole"):
        pairs = zip(rates[name], rates["webdataset"], strict=True)
        print(
            f"{workers} workers, ratio of {name}: {statistics.median(a / b for a, b in pairs):.2f}"
        )


def resident() -> float:
    """Return the resident memory of this process and its workers in MB; what they share twice."""
    processes = [os.getpid(), *(p.pid for p in torch.multiprocessing.active_children() if p.pid)]
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in processes]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(folder: Path, workers: int, counts: Sequence[int]) -> None:
    """Print the memory after so many samples of one stream."""
    stream, seen = ours(folder, workers, side=32), 0
    for count in counts:
        while seen < count:
            seen += len(next(stream)["caption"])
        print(f"{workers} workers, {seen} samples: {resident():.0f} MB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=12, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    one_thread()
    print(heading())
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            prepare(Path(folder), 40, 1000, 64)
            for workers in args.workers:
                memory(Path(folder), workers, (20_000, 100_000, 200_000))
            return
        prepare(Path(folder), 8, 100, SIDE)
        size = sum(os.path.getsize(path) for path in paths(Path(folder))) / 800
        print(f"{SIDE} px JPEGs of {size / 1000:.0f} kB to {RESOLUTION} px")
        for workers in args.workers:
            speed(Path(folder), workers, args.batches, args.repeats)


if __name__ == "__main__":
    main()
