"""Training from a cache against encoding in every step: time on a core, and equal batches.

    python -m tests.bench.cache [--repeats 5] [--resolution 64] [--batch 8]

A step of Paella (a network of 6M) on tokens of Paella's own VQGAN, f4, under captions of a frozen
T5 of the small size: of pictures and captions, of cached tokens, and of cached tokens and states of
captions. All sides run in one process on one thread with the same weights, interleaved. Before
timing, all give the same keys, captions and tokens in the same order, and losses that agree up to
the half precision of the states. T5-XXL or 256 px cost many times more: the ratios are lower
bounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from data.cache import Encoder, Encoding, encode_shard, finish_cache
from data.cached import part_names
from data.scenes import scenes
from data.shards import write_shards
from data.tokens import TokenData
from data.view import Order, ShardList, View
from data.webdata import WebData
from experiments.pipeline.encode import encode_text
from lightning_modules.common.settings import plain
from lightning_modules.paella.module import PaellaModule
from lightning_modules.vqgan.config import PRESETS
from lightning_modules.vqgan.module import VQGANModule
from tests.bench.machine import heading, one_thread

SAMPLES = 64
WIDTH = 512  # of T5-small


def make_text_encoder(folder: Path) -> dict[str, Any]:
    """Write a byte T5 of the small size with random weights; returns the settings that name it."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384,
        d_model=WIDTH,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    return {"name": "byt5", "path": str(folder), "clip": None}


def make_generator(text: dict[str, Any], grid: int, codes: int) -> PaellaModule:
    model = {
        "num_labels": codes,
        "c_hidden": [128, 256],
        "nhead": [-1, 4],
        "blocks": [1, 4],
        "level_config": ["CT", "CTA"],
        "clip_embd": 0,
        "clip_image": False,
        "byt5_embd": WIDTH,
        "c_cond": 256,
        "patch_size": 1,
    }
    config = {"paper": "paella", "grid": [grid, grid], "num_codes": codes, "model": model}
    torch.manual_seed(0)
    module = PaellaModule({**config, "text": text})
    module.log_scalars = lambda *scalars: None  # type: ignore[method-assign]
    return module


class Side:
    """One way to get batches, with a generator of its own that starts from the same weights."""

    def __init__(self, data: WebData | TokenData, module: PaellaModule, first: VQGANModule) -> None:
        self.data, self.module = data, module.attach(first)
        self.optimizer = torch.optim.AdamW(module.parameters(), 1e-4)
        self.batches = self.endless()
        self.number = 0
        self.seconds: list[float] = []

    def endless(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            yield from self.data.stream(epoch)
            epoch += 1

    def step(self, batch: dict[str, Any] | None = None) -> float:
        """Do a training step, with the next batch by default; returns its loss."""
        begun = time.thread_time()
        batch = next(self.batches) if batch is None else batch
        self.module.generator = torch.Generator().manual_seed(self.number)
        torch.manual_seed(self.number)
        loss = self.module.training_step(batch, self.number)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.number += 1
        self.seconds.append(time.thread_time() - begun)
        return float(loss.detach())


def make_sides(folder: Path, resolution: int, batch: int) -> dict[str, Side]:
    """Draw shards, encode them, and return the three sides."""
    torch.manual_seed(0)
    first = VQGANModule({"paper": "vqgan", **plain(PRESETS["paella-f4"])})
    first.eval().requires_grad_(False)
    text = make_text_encoder(folder / "t5")
    paths = write_shards(scenes("train", SAMPLES, resolution=resolution), folder / "shards", 16)
    shards, view = ShardList(tuple(paths)), View(resolution)
    made = {"tokenizer": "", "num_codes": first.num_codes, "crops": 1, "flip": False, "text": text}
    encoding = Encoding(
        view,
        {"tokens": Encoder(first.encode, first.num_codes)},
        batch_size=batch,
        text=encode_text(text, "cpu"),
    )
    sources = dict(zip(part_names(paths), paths, strict=True))
    for name, url in sources.items():
        encode_shard(folder / "cache" / f"{name}.safetensors", url, shards, encoding, made=made)
    finish_cache(folder / "cache", sources, made)
    options: Any = {"batch_size": batch, "epoch_batches": SAMPLES // batch}
    data = {
        "pictures and captions": WebData(shards, None, view, Order(0, 1000), **options),
        "cached tokens": TokenData(folder / "cache", **options),
        "cached tokens and text": TokenData(folder / "cache", text=True, **options),
    }
    grid = resolution // first.factor
    return {n: Side(d, make_generator(text, grid, first.num_codes), first) for n, d in data.items()}


def check(sides: dict[str, Side], batches: int) -> None:
    """Compare keys, captions, tokens and losses of the first batches."""
    for _ in range(batches):
        found = {name: next(side.batches) for name, side in sides.items()}
        one, *others = found.values()
        tokens = sides["pictures and captions"].module.batch_tokens(one)
        for other in others:
            if one["key"] != other["key"] or one["caption"] != other["caption"]:
                raise SystemExit("the cache has another order than its shards")
            if not torch.equal(tokens, other["tokens"]):
                raise SystemExit("cached tokens are not those of the pictures")
        losses = [side.step(found[name]) for name, side in sides.items()]
        if losses[0] != losses[1] or abs(losses[0] - losses[2]) > 1e-2 * abs(losses[0]):
            raise SystemExit(f"losses differ: {losses}")
    for side in sides.values():
        side.seconds.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    one_thread()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(Path(folder), args.resolution, args.batch)
        check(sides, 2)
        print("keys, captions, tokens and losses: equal over 2 batches")
        for _ in range(args.repeats):
            for side in sides.values():
                side.step()
    medians = {}
    for name, side in sides.items():
        medians[name] = statistics.median(side.seconds)
        shown = ", ".join(f"{s:.2f}" for s in side.seconds)
        print(f"{name:22s} {1 / medians[name]:.2f} steps/s, {medians[name]:.2f} s ({shown})")
    encoded, tokens, both = medians.values()
    print(f"ratio of cached tokens {encoded / tokens:.2f}")
    print(f"ratio of cached text, tokens cached on both sides {tokens / both:.2f}")
    print(f"ratio {encoded / both:.2f}")


if __name__ == "__main__":
    main()
