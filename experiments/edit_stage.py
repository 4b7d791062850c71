"""The edits of a run: half of a scene is generated anew for a caption with another thing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from data.webdata import WebData, prepare
from eval.edits import edit_tasks, half_mask, score_edits
from experiments.config import resolved
from experiments.pictures import load_png, reduced, save_png, to_uint8
from experiments.report import Card
from experiments.stages import high_data, upscales
from lightning_modules.registry import load_generator

if TYPE_CHECKING:
    from experiments.work import Work

GREY = 128


def draw_edits(work: Work, checkpoint: Path) -> Path:
    """Edit pictures of the val split through all stages of a generator.

    Of picture i the folder holds original-i.png (as the tokenizer has it), edit-i.png, and both
    with what was masked side by side in card-i.png; tasks.json says what was asked.
    """
    config, e = work.config, work.config.eval

    def make(folder: Path) -> dict[str, Any]:
        module = load_generator(checkpoint, device=work.device)
        if "mask" not in inspect.signature(module.sample_tokens).parameters:
            raise ValueError(f"eval.edits must be 0: {work.paper} generates no part of a picture")
        data, splits = config.data, work.splits
        if upscales(config):
            data = high_data(config)
            splits = prepare(data, work.store.folder(work.stages["pairs"]))
        web = WebData(data, splits, batch_size=e.batch_size, seed=config.seed, epoch_batches=1)
        samples = web.samples("val")
        tasks = edit_tasks(samples, e.edits, e.seed)
        sampling = resolved(config)["sampling"]
        for first in range(0, len(tasks), e.batch_size):
            part = tasks[first : first + e.batch_size]
            start = torch.stack([samples[t["sample"]]["image"] for t in part]).to(work.device)
            masks = torch.stack([half_mask(t, *start.shape[-2:]) for t in part]).to(work.device)
            cells = F.max_pool2d(masks.float(), module.mask_factor).bool()
            made = module.sample(
                [t["prompt"] for t in part], seeds=[e.seed + first + i for i in range(len(part))],
                start=start, mask=cells, **sampling,
            )  # fmt: skip
            last = getattr(module, "superres", None) or module
            before = to_uint8(last.tokenizer.decode(last.tokenizer.encode(start)).cpu())
            after = to_uint8(made.cpu())
            hidden = before.masked_fill(masks.cpu()[:, None], GREY)
            for i, pictures in enumerate(zip(before, hidden, after, strict=True), first):
                save_png(folder / f"original-{i:05d}.png", pictures[0])
                save_png(folder / f"edit-{i:05d}.png", pictures[2])
                save_png(folder / f"card-{i:05d}.png", torch.cat(pictures, dim=-1))
        (folder / "tasks.json").write_text(json.dumps(tasks, indent=1))
        return {"edits": len(tasks)}

    return work._stage("edits", make)


def scores_of_edits(work: Work, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score what `draw_edits` left, at the judge's size."""
    tasks, e = _tasks(folder), work.config.eval
    before, after = (
        torch.stack([load_png(folder / f"{kind}-{i:05d}.png")[0] for i in range(len(tasks))])
        for kind in ("original", "edit")
    )
    side = work.config.data.resolution
    if after.shape[-1] > side:
        before, after = reduced(before, side), reduced(after, side)
    return score_edits(
        after, before, tasks, judge=work._judge(), resamples=e.bootstrap, seed=e.seed
    )


def edit_cards(folder: Path, verdicts: list[dict[str, Any]], count: int) -> list[Card]:
    """Show the first edits: the picture, what was masked, and what became of it."""
    pairs = list(zip(_tasks(folder), verdicts, strict=True))[:count]
    return [
        Card(
            folder / f"card-{i:05d}.png", task["prompt"], "edit", None, verdict["right"],
            f"wrong: {', '.join(verdict['wrong'])}",
        )
        for i, (task, verdict) in enumerate(pairs)
    ]  # fmt: skip


def _tasks(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "tasks.json").read_text())
