"""Edits: half of a scene is generated anew for a caption with another thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_json
from experiments.pipeline.data import Asked, Captions, Pictures
from experiments.pipeline.generator import Generator
from experiments.pipeline.stage import Folders, Log, Machine, Stage

if TYPE_CHECKING:
    from torch import Tensor

GREY = 128


@dataclass(frozen=True, eq=False)
class Edits(Stage):
    """Edited pictures, by all parts of a generator.

    Of picture i the folder holds original-i.png (as the first stage gives it back), edit-i.png, and
    both with what was masked side by side in triple-i.png; tasks.json says what was asked.
    """

    generator: Generator
    captions: Captions
    """Pictures of the size that the generator makes."""
    count: int
    """Edits, at most."""
    sampling: Mapping[str, Any]
    seed: int

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Draw them."""
        import torch
        import torch.nn.functional as F

        from eval.edits import edit_tasks, half_mask
        from experiments.report.pictures import save_png, to_uint8
        from lightning_modules.common.request import Request

        module = self.generator.load(inputs, machine)
        settings = module.settings(self.sampling)
        tasks = edit_tasks(self.captions.rows(inputs), self.count, self.seed)
        read = Pictures(self.captions).reader(inputs, machine)
        last = module.final_first_stage
        for first in range(0, len(tasks), machine.batch_size):
            part = tasks[first : first + machine.batch_size]
            images = torch.cat([read(t["sample"], t["sample"] + 1)[0] for t in part])
            start = (images.float() / 127.5 - 1).to(module.device)
            masks = torch.stack([half_mask(t, *start.shape[-2:]) for t in part]).to(module.device)
            cells = F.max_pool2d(masks.float(), module.pixels_per_cell).bool()
            seeds = [self.seed + first + i for i in range(len(part))]
            request = Request([t["prompt"] for t in part], seeds, start=start, mask=cells)
            after = to_uint8(module.sample(request, settings).cpu())
            before = to_uint8(last.decode(last.encode(start)).cpu())
            hidden = before.masked_fill(masks.cpu()[:, None], GREY)
            for i, pictures in enumerate(zip(before, hidden, after, strict=True), first):
                save_png(folder / f"original-{i:05d}.png", pictures[0])
                save_png(folder / f"edit-{i:05d}.png", pictures[2])
                save_png(folder / f"triple-{i:05d}.png", torch.cat(pictures, dim=-1))
        write_json(folder / "tasks.json", tasks)
        return {"edits": len(tasks)}

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what was asked, in order."""
        return json.loads((inputs[self] / "tasks.json").read_text())

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Tensor, list[Asked]]]:
        """Return what reads edited pictures [first, last), and what was asked, with originals."""
        import torch

        from experiments.report.pictures import load_png

        rows, folder = self.rows(inputs), inputs[self]

        def read(first: int, last: int) -> tuple[Tensor, list[Asked]]:
            part = []
            for k, row in enumerate(rows[first:last], first):
                original = load_png(folder / f"original-{k:05d}.png")[0]
                part.append({**row, "index": k, "original": original})
            images = [load_png(folder / f"edit-{row['index']:05d}.png")[0] for row in part]
            return torch.stack(images), part

        return read
