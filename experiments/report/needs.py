"""What `--plan` prints: bytes by kind, the speed that a schedule asks for, and whether it fits."""

import dataclasses
import json
import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from experiments.cli import console
from experiments.papers.base import RunSettings
from experiments.pipeline.memory import (
    GIB,
    SPARE,
    Need,
    needs,
    own_memory,
    parse_bytes,
    remedy,
    text_files,
)
from experiments.pipeline.plan import Plan
from experiments.settings import ConfigError

KINDS = ("weights", "gradients", "optimizer", "average", "copies", "frozen", "activations")
DAY = 86400


def show_needs(
    planned: Plan, run: RunSettings, memory: str | None, days: float, as_json: bool
) -> str:
    """Return the text of `--plan`.

    Args:
        planned: the stages of the run.
        run: its settings.
        memory: of a device, such as 80GiB; None takes that of this machine's.
        days: that the training may take.
        as_json: for programs.

    Raises:
        ConfigError: a memory that cannot be read, or days that are no positive number.
    """
    if not 0 < days < math.inf:
        raise ConfigError(f"--days must be a number above 0, got {days:g}")
    bytes_there = parse_bytes(memory) if memory else own_memory(run.trainer.accelerator)
    found = needs(planned, run)
    if as_json:
        rows = [{**dataclasses.asdict(n), "total": n.total} for n in found]
        fits = bytes_there and all(n.fits(bytes_there) for n in found)
        whole = {"memory": bytes_there, "fits": fits, "devices": run.world, "trainings": rows}
        return json.dumps(whole, indent=1)
    if not found:
        return "nothing is trained: the run takes finished checkpoints"
    lines = [*table(found), ""]
    for n in found:
        lines.append(speed(n, run.world, days))
    absent = [str(p) for p in text_files(run) if not p.exists()] if hasattr(run, "text") else []
    if absent:
        lines.append(f"not counted: the frozen text encoder, not here ({', '.join(absent)})")
    lines += ["", verdict(planned, run, found, bytes_there)]
    return "\n".join(lines)


def table(found: Sequence[Need]) -> list[str]:
    """Lay out bytes per device in GiB, a column per training."""
    rows = Table("GiB per device", *(n.training for n in found), box=box.SIMPLE_HEAD)
    rows.add_row("parameters", *(f"{n.parameters:,}" for n in found))
    for kind in (*KINDS, "total"):
        values = [getattr(n, kind) for n in found]
        rows.add_row(kind, *("?" if v is None else size(v) for v in values))
    screen = console()
    with screen.capture() as text:
        screen.print(rows)
    return [line.rstrip() for line in text.get().splitlines() if line.strip()]


def size(value: int) -> str:
    """Return bytes in GiB, those of small networks with more digits."""
    return f"{value / GIB:.2f}" if value >= GIB / 100 else f"{value / GIB:.3g}"


def speed(n: Need, world: int, days: float) -> str:
    """Say how fast the devices must be."""
    seconds = days * DAY
    whole, per_second = f"{n.samples:,} samples", f"{n.samples / seconds:.4g} samples/s"
    if n.tokens is not None:
        whole += f", {n.tokens:,} tokens"
        per_second += f" or {n.tokens / seconds:.4g} tokens/s"
    each = f", {n.samples / seconds / world:.3g} samples/s on each of {world} devices"
    return f"{n.training}: {whole}; in {days:g} days {per_second}{each if world > 1 else ''}"


def verdict(planned: Plan, run: RunSettings, found: Sequence[Need], memory: int | None) -> str:
    """Say whether it fits, and what to do where it does not."""
    if memory is None:
        return "this machine has no such device: say --memory 80GiB to know whether it fits"
    largest = max(found, key=lambda n: n.total)
    here = f"{memory / GIB:.3g} GiB, of which {SPARE:.0%} stay free"
    if largest.fits(memory):
        return f"fits: {size(largest.total)} GiB of {here}"
    advice = remedy(planned, run, memory)
    return f"does not fit: {largest.training} takes {size(largest.total)} GiB of {here}; {advice}"
