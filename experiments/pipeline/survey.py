"""What shards hold, looked at once before anything is trained on them; a part is a shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import write_json
from data.view import View
from experiments.pipeline.data import Shards
from experiments.pipeline.stage import Folders, Log, Machine, SplitStage


@dataclass(frozen=True, eq=False)
class Survey(SplitStage):
    """Counts, sizes, faults and some pictures of every shard."""

    NAME = "inspect"

    shards: tuple[Shards, ...]
    """All splits of what is looked at; a shard that several have is read once."""
    view: View
    """Its filters are counted one by one."""
    max_skipped: float
    """Share of faulty samples at which a run would stop."""
    limit: int | None = None
    """At most so many samples, of shards spread over all."""

    def chosen(self, inputs: Folders) -> list[tuple[str, int | None]]:
        """Return the shards that are read, and how many samples of each at most."""
        splits = [shards.shards(inputs).paths for shards in self.shards]
        paths = list(dict.fromkeys(path for split in splits for path in split))
        if self.limit is None:
            return [(path, None) for path in paths]
        count = min(len(paths), self.limit)
        each, more = divmod(self.limit, count)
        return [
            (paths[i * len(paths) // count], each + (1 if i < more else 0)) for i in range(count)
        ]

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every shard."""
        return [f"{i:05d}.safetensors" for i in range(len(self.chosen(inputs)))]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Return what looks at one shard."""
        from data.survey import survey_shard

        chosen = self.chosen(inputs)

        def make(i: int) -> None:
            url, limit = chosen[i]
            survey_shard(folder / f"{i:05d}.safetensors", url, self.view, limit)

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write survey.json and sheet.png."""
        import torch

        from data.survey import chosen_thumbs, summary
        from experiments.report.pictures import grid, save_png, to_pixels

        paths = [folder / name for name in self.parts(inputs, machine)]
        found = summary(paths, self.max_skipped)
        write_json(folder / "survey.json", found)
        thumbs = chosen_thumbs(paths)
        if thumbs:
            pictures = torch.stack([to_pixels(image) for image, _ in thumbs])
            captions = [caption for _, caption in thumbs]
            save_png(folder / "sheet.png", grid(pictures, 5, captions=captions))
        return {"samples": found["samples"]}
