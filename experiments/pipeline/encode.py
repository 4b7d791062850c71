"""The training shards encoded once: to tokens or moments, in one pass for all that need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data.cached import part_names, read_index
from data.files import file_hash
from data.view import ShardList, View
from experiments.pipeline.data import Shards
from experiments.pipeline.stage import (
    UNKEYED,
    FileStage,
    Folders,
    Log,
    Machine,
    SplitStage,
    plain_content,
    plain_paths,
)

if TYPE_CHECKING:
    from torch import Tensor

    from data.cache import EncodeText


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

    VERSION: ClassVar[int] = 3
    APART: ClassVar[bool] = True

    shards: Shards
    view: View
    views: tuple[EncodedView, ...]
    crops: int = 1
    """Crops of every picture, where the view draws them."""
    text: Mapping[str, Any] | None = None
    """Settings of a frozen text encoder whose states are kept; a Path where one names a file."""
    about: Mapping[str, Any] = field(default_factory=dict, metadata=UNKEYED)
    """What it is made of, for who trains on the cache, see `read_index`."""

    @property
    def reads_text(self) -> bool:
        """Whether a training takes the states of its captions."""
        return self.text is not None

    def folder_of(self, inputs: Folders) -> Path:
        """Return the folder of the cache."""
        return inputs[self]

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every shard."""
        names = part_names(self.shards.shards(inputs).paths)
        return [f"{name}.safetensors" for name in names]

    def beside(self, i: int, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the files of the captions, and of their states."""
        name = part_names(self.shards.shards(inputs).paths)[i]
        return [f"{name}.parquet", *([f"{name}.text.safetensors"] if self.text else [])]

    def made(self, inputs: Folders) -> dict[str, Any]:
        """Return what all parts depend on, as plain containers.

        Of first stages and text encoders the content counts, wherever they lie.
        """
        views = {
            v.name: {"reduce": v.reduce, "first_stage": file_hash(v.first_stage.file(inputs))}
            for v in self.views
        }
        return {
            "version": self.VERSION,
            "tokenizer": file_hash(self.views[0].first_stage.file(inputs)),
            "views": views,
            "text": None if self.text is None else plain_content(self.text),
            "crops": self.crops,
            **asdict(self.view),
        }

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load the first stages and the text encoder."""
        from data.cache import Encoder, Encoding, encode_shard
        from lightning_modules.registry import load_first_stage

        shards, made = self.shards.shards(inputs), self.made(inputs)
        names = part_names(shards.paths)
        encoders = {}
        for view in self.views:
            module = load_first_stage(view.first_stage.file(inputs), machine.device)
            codes = getattr(module, "num_codes", None)
            encode = module.encode if codes else module.moments
            encoders[view.name] = Encoder(_reduced(encode, view.reduce), codes)
        text = None if self.text is None else encode_text(self.text, machine.device)
        size, device = machine.batch_size, machine.device
        encoding = Encoding(self.view, encoders, self.crops, text, size, device)
        sums = _sums(folder)

        def make(i: int) -> None:
            for file, sha256 in sums.get(names[i], {}).items():
                path = folder / file
                if path.is_file() and file_hash(path) != sha256:
                    path.unlink()  # damaged since
            encode_shard(
                folder / f"{names[i]}.safetensors",
                shards.paths[i],
                shards,
                encoding,
                made={**made, "source": self._source(shards, i, inputs)},
                max_skipped=machine.max_skipped,
            )

        return make

    def _source(self, shards: ShardList, i: int, inputs: Folders) -> Any:
        """Return what tells a shard, and the choice of its samples, from another one."""
        from data.remote import stamp_of

        url = shards.paths[i]
        if Path(url).is_relative_to(inputs[self.shards]):
            return self.shards.key
        return [*stamp_of(url), shards.holdout, shards.held_out]

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write cache.json."""
        from data.cache import finish_cache
        from data.shards import SkipCounter, count_rows
        from lightning_modules.registry import load_first_stage

        module = load_first_stage(self.views[0].first_stage.file(inputs))
        made = {**self.made(inputs), "num_codes": getattr(module, "num_codes", None)}
        shards, skips = self.shards.shards(inputs), SkipCounter(machine.max_skipped)
        paths, counted = shards.paths, shards.rows or count_rows(shards)
        own = f"{inputs[self.shards]}/"
        sources = {n: p.removeprefix(own) for n, p in zip(part_names(paths), paths, strict=True)}
        index = finish_cache(folder, sources, made, skips, plain_paths(self.about), counted)
        log.note(skips.told(self.shards.split))
        return {"count": index["count"], "skipped": index["skipped"]}


@dataclass(frozen=True)
class Cached:
    """Training on a finished cache, of this run or another."""

    index: Path
    """Its cache.json, which knows the content of every file."""
    view: View
    """How validation sees a sample."""
    reads_text: bool = False
    """Whether the states of captions are taken."""

    def folder_of(self, inputs: Folders) -> Path:
        """Return the folder of the cache."""
        return self.index.parent


def encode_text(settings: Mapping[str, Any], device: str) -> EncodeText:
    """Return what encodes captions for a cache, from the settings of a frozen text encoder."""
    import torch

    from data.cache import TextStates
    from lightning_modules.common.config import TextConfig
    from lightning_modules.common.text import TEXT_ENCODERS

    encoder: Any = TEXT_ENCODERS[settings["name"]](TextConfig(**plain_paths(settings)))

    def encode(captions: Sequence[str]) -> TextStates:
        condition = encoder(list(captions), torch.device(device))
        return TextStates(condition.rows(), condition.pooled)

    return encode


def _sums(folder: Path) -> dict[str, dict[str, str]]:
    """Return the hashes that an earlier cache.json has of its files, by part."""
    with suppress(ValueError):
        return {part["name"]: part["files"] for part in read_index(folder)["parts"]}
    return {}


def _reduced(encode: Callable[[Tensor], Tensor], factor: int) -> Callable:
    """Let an encoder see smaller pictures."""
    if factor == 1:
        return encode

    def small(images: Tensor) -> Tensor:
        import torch.nn.functional as F

        return encode(F.interpolate(images, scale_factor=1 / factor, mode="area"))

    return small
