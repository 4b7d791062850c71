"""Pictures for the captions of a split, in batches of one fixed shape that processes share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import atomic, write_json
from experiments.pipeline.data import Asked, Captions
from experiments.pipeline.generator import Generator
from experiments.pipeline.given import GivenGenerator
from experiments.pipeline.prompts import Prompts
from experiments.pipeline.stage import Folders, Log, Machine, SplitStage

if TYPE_CHECKING:
    from torch import Tensor

CALLS = "calls.json"
SHOWN_STEPS = 12  # of a trace, at most


@dataclass(frozen=True, eq=False)
class Sample(SplitStage):
    """One picture per caption. Picture i has seed + i and stands in batch i // B.

    Rows that bring a number and a file of their own have seed + number, and that file.
    """

    generator: Generator | GivenGenerator
    captions: Captions | Prompts
    sampling: Mapping[str, Any]
    """Settings that differ from the checkpoint's."""
    seed: int
    traces: int = 0
    """Pictures, the first ones, whose tokens are shown step by step."""
    part: str = ""
    """Which part of the generator draws; empty for the generator itself."""
    low: Sample | None = None
    """The pictures whose tokens the part enlarges."""
    keep_tokens: bool = field(default=False)
    """Whether the tokens are kept beside the pictures."""
    negative: str | None = None
    """What guidance leads away from, in place of the null condition."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return "-".join(["sample", *([self.part] if self.part else []), self.captions.split])

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what was asked, in order, with seed and file."""
        rows = self.captions.rows(inputs)
        return [
            {"file": f"{i:05d}.png", **row, "seed": self.seed + row.get("number", i)}
            for i, row in enumerate(rows)
        ]

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every batch."""
        count, size = batches(len(self.captions.rows(inputs)), machine)
        return [f"batch-{size}-{i:05d}.safetensors" for i in range(count)]

    def beside(self, i: int, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the pictures of a batch, and what the first one shows step by step."""
        rows = self.rows(inputs)
        size = batches(len(rows), machine)[1]
        names = [row["file"] for row in rows[i * size : (i + 1) * size]]
        if i or not self.traces:
            return names
        return [*names, *(f"trace-{name}" for name in names[: self.traces]), "traces.json"]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load the generator."""
        from safetensors.torch import load_file, save_file

        from experiments.report.pictures import save_png, to_uint8

        whole = self.generator.load(inputs, machine)
        module = whole.part(self.part)
        settings = module.settings(self.sampling)
        rows = self.rows(inputs)
        size = batches(len(rows), machine)[1]
        names = self.parts(inputs, machine)
        lows = None if self.low is None else load_file(inputs[self.low] / "tokens.safetensors")

        def make(i: int) -> None:
            import torch

            places = range(i * size, min((i + 1) * size, len(rows)))
            count = len(places)
            # the last batch is filled up, so that all have one shape
            asked = [rows[min(k, len(rows) - 1)] for k in range(i * size, (i + 1) * size)]
            low = None
            if lows is not None:
                low = lows["tokens"].long()[[places[min(k, count - 1)] for k in range(size)]]
                low = low.to(module.device)
            trace = Trace(min(self.traces, count) if i == 0 else 0)
            request = make_request(module, asked, low, self.negative)
            tokens = torch.zeros(0)
            if self.keep_tokens or low is not None:
                tokens = module.sample_tokens(request, settings, trace.on_step)
                pictures = module.first_stage.decode(tokens)
            else:
                pictures = module.sample(request, settings, trace.on_step)
            images = to_uint8(pictures.cpu())[:count]
            for row, image in zip(asked, images, strict=False):
                text = {"prompt": row["prompt"], "seed": str(row["seed"])}
                save_png(folder / row["file"], image, text)
            trace.save(folder, module.first_stage, asked)
            kept = {"tokens": tokens[:count].cpu().contiguous() if self.keep_tokens else tokens[:0]}
            if module.calls is not None:
                kept["calls"] = module.calls[:count]
            with atomic(folder / names[i]) as temporary:
                save_file(kept, temporary)

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write what was asked, the calls, and the tokens of all batches in one file."""
        import torch
        from safetensors.torch import load_file, save_file

        rows = self.rows(inputs)
        write_json(folder / "prompts.json", rows)
        made = [load_file(folder / name) for name in self.parts(inputs, machine)]
        calls = [number for part in made if "calls" in part for number in part["calls"].tolist()]
        if len(calls) == len(rows):
            write_json(folder / CALLS, calls)
        if self.keep_tokens:
            tokens = torch.cat([part["tokens"] for part in made])
            with atomic(folder / "tokens.safetensors") as temporary:
                save_file({"tokens": tokens}, temporary)
        return {"pictures": len(rows)}

    def calls(self, inputs: Folders) -> list[int] | None:
        """Return the network calls of every picture; None where nobody counted."""
        path = inputs[self] / CALLS
        return json.loads(path.read_text()) if path.exists() else None

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Tensor, list[Asked]]]:
        """Return what reads pictures [first, last): uint8 [B, 3, H, W], and what was asked."""
        return png_reader(inputs[self], self.rows(inputs))


def png_reader(
    folder: Path, rows: Sequence[Asked]
) -> Callable[[int, int], tuple[Tensor, list[Asked]]]:
    """Return what reads the PNGs of rows [first, last), those that there are, and these rows."""
    import torch

    from experiments.report.pictures import load_png

    def read(first: int, last: int) -> tuple[Tensor, list[Asked]]:
        part = [{**row, "index": k} for k, row in enumerate(rows[first:last], first)]
        there = [row for row in part if (folder / row["file"]).exists()]
        return torch.stack([load_png(folder / row["file"])[0] for row in there]), there

    return read


class Trace:
    """Remembers the tokens of the first pictures of a batch, step by step.

    Args:
        count: how many pictures; nothing is remembered of none.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.states: list[Tensor] = []

    @property
    def on_step(self) -> Callable[[int, Tensor, Tensor], None] | None:
        """What a sampling loop calls after every step."""
        return self._remember if self.count else None

    def _remember(self, step: int, before: Tensor, after: Tensor) -> None:
        if not self.states:
            self.states.append(before[: self.count].clone())
        self.states.append(after[: self.count].clone())

    def save(self, folder: Path, first_stage: Any, asked: Sequence[Asked]) -> None:
        """Draw a strip for every picture, and traces.json with the changes of each step."""
        import torch

        from experiments.report.pictures import save_png, strip, to_uint8

        if not self.count:
            return
        told = []
        for number in range(self.count):
            states = torch.stack([s[number] for s in self.states])  # [T + 1, (C,) h, w]
            changed = states[1:] != states[:-1] if states.ndim == 3 else None
            steps = len(states) - 1
            shown = torch.linspace(1, steps, min(steps, SHOWN_STEPS)).round().long()  # few of many
            pictures = to_uint8(decode_unfinished(first_stage, states[shown]).cpu())
            masks = None if changed is None else changed[shown - 1].cpu()
            row = asked[number]
            name = f"trace-{row['file']}"
            save_png(folder / name, strip(pictures, masks, numbers=shown.tolist()))
            told.append(
                {
                    "prompt": row["prompt"],
                    "file": name,
                    "steps": steps,
                    "changed": [] if changed is None else changed.flatten(1).sum(1).tolist(),
                    "tokens": 0 if changed is None else states[0].numel(),
                }
            )
        write_json(folder / "traces.json", told)


def make_request(
    module: Any, asked: Sequence[Asked], low: Any = None, negative: str | None = None
) -> Any:
    """Return the request for the pictures of a batch."""
    from lightning_modules.common.request import Request

    return Request(
        [row["prompt"] for row in asked],
        [row["seed"] for row in asked],
        labels=[row["label"] for row in asked] if module.labelled else None,
        negative=None if negative is None else [negative] * len(asked),
        low=low,
    )


def decode_unfinished(first_stage: Any, states: Tensor) -> Tensor:
    """Decode unfinished tokens [T, h, w] or latents [T, C, h, w]; masked tokens are grey."""
    if states.ndim == 4:
        return first_stage.decode(states)
    masked = states >= first_stage.num_codes
    pictures = first_stage.decode(states.clamp(max=first_stage.num_codes - 1))
    factor = first_stage.factor
    hidden = masked.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return pictures.masked_fill(hidden[:, None], 0.0)


def batches(count: int, machine: Machine) -> tuple[int, int]:
    """Return number and size of the batches of `count` pictures."""
    size = max(1, min(machine.batch_size, count))
    return -(-count // size), size
