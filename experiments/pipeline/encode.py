"""The training shards encoded once: to tokens or moments, in one pass for all that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import file_hash
from data.view import View
from experiments.pipeline.data import Shards
from experiments.pipeline.stage import FileStage, Folders, Log, Machine, SplitStage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EncodedView:
    """One way to encode a picture."""

    name: str
    """Under which batches have it; the first view of a cache is `tokens` or `moments`."""
    first_stage: FileStage
    reduce: int = 1
    """Factor by which pictures are reduced before, by area averaging."""


@dataclass(frozen=True, eq=False)
class Encode(SplitStage):
    """A cache of what first stages make of the training pictures; a part is a shard."""

    VERSION = 2

    shards: Shards
    view: View
    views: tuple[EncodedView, ...]

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every shard."""
        return [f"{i:05d}.safetensors" for i in range(len(self.shards.shards(inputs).paths))]

    def beside(self, i: int, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of the captions."""
        return [f"{i:05d}.parquet"]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load the first stages."""
        from data.tokens import Encoder, encode_shard
        from lightning_modules.registry import load_first_stage

        shards = self.shards.shards(inputs)
        encoders = {}
        for view in self.views:
            module = load_first_stage(view.first_stage.file(inputs), machine.device)
            codes = getattr(module, "num_codes", None)
            encode = module.encode if codes else module.moments
            encoders[view.name] = Encoder(_reduced(encode, view.reduce), codes)

        def make(i: int) -> None:
            encode_shard(
                folder / f"{i:05d}.safetensors",
                shards.paths[i],
                shards,
                self.view,
                encoders,
                batch_size=machine.batch_size,
                device=machine.device,
                max_skipped=machine.max_skipped,
                stamp=self.key,
            )

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write cache.json."""
        from data.shards import SkipCounter, count_rows
        from data.tokens import finish_cache
        from lightning_modules.registry import load_first_stage

        stage = self.views[0].first_stage
        file = stage.file(inputs)
        made_with = {
            "tokenizer": file_hash(file),
            "num_codes": getattr(load_first_stage(file), "num_codes", None),
        }
        shards, skips = self.shards.shards(inputs), SkipCounter(machine.max_skipped)
        rows = shards.rows or count_rows(shards)
        summary = finish_cache(folder, len(shards.paths), made_with, skips, rows)
        log.note(skips.told(self.shards.split))
        return summary


def _reduced(encode: Callable[[Tensor], Tensor], factor: int) -> Callable:
    """Let an encoder see smaller pictures."""
    if factor == 1:
        return encode

    def small(images: Tensor) -> Tensor:
        import torch.nn.functional as F

        return encode(F.interpolate(images, scale_factor=1 / factor, mode="area"))

    return small
