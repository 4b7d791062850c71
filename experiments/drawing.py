"""Pictures of a command line: drawn batch by batch, and written with what makes them again."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import file_hash, write_text
from experiments.checkpoint import checkpoint_file, find_device, load, read_settings
from experiments.cli import counted, first_line, speaker
from experiments.edits import (
    describe_edit,
    make_edit,
    parse_expand,
    parse_size,
    read_picture,
    trained_size,
    vary,
)
from experiments.pipeline.generator import CHECKPOINT
from experiments.progress import Counter
from experiments.report.pictures import grid, save_png, to_pixels, to_uint8
from experiments.report.trace import trace_page
from experiments.requests import Task, conditioned, make_request, parse_attention
from experiments.settings import ConfigError, resolved
from experiments.tracing import check_playable, played, traced_settings
from experiments.vocabulary import unseen
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.request import Request

MAX_IN_GRID = 100
TRACED = 4  # pictures on the page of --trace


def draw(
    args: argparse.Namespace, words: Sequence[str], prompts: Sequence[str], tasks: list[Task]
) -> None:
    """Draw the pictures of some tasks, as the options say.

    Raises:
        ConfigError: an unfit file or setting; no picture was made.
    """
    picture = None if args.image is None else read_picture(args.image)
    mask = None if args.mask is None else read_picture(args.mask)
    style = None if args.style is None else to_pixels(read_picture(args.style))
    attention = parse_attention(args.attention)
    device = find_device(args.device)
    say = speaker()
    module = load(args.ckpt, args.tokenizer, device, args.paper)
    settings = read_settings(module, words)
    size = parse_size(module, args.size)
    edit = None
    if picture is not None:
        expand = None if args.expand is None else parse_expand(module, args.expand)
        edit = make_edit(module, picture, mask, size, expand)
        say(describe_edit(module, picture, edit))
        if edit.mask is None and not args.edit:
            settings = vary(settings, args.strength, words)
    try:
        module.check_prompts([task.prompt for task in tasks])
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"the text encoder: {first_line(error)}") from error

    traced = [] if args.trace is None else traced_settings(settings, args.samplers)
    for chosen in [settings, *traced]:
        check_settings(module, chosen)

    width, height = size or trained_size(module)
    if edit is not None:
        height, width = edit.pixels.shape[-2:]
    if traced:
        check_playable(module, width, height)
    out = out_folder(args, tasks)
    warn_of_words(args.ckpt, prompts, say)
    say(f"drawing {counted(len(tasks), 'picture')} of {width}x{height} pixels on {device}")

    def asked(some: Sequence[Task]) -> Request:
        request = make_request(module, some, prompts, args.negative, edit, size, args.edit)
        return conditioned(module, request, args.prior, style, attention)

    made: list[Tensor] = []
    counter = Counter("pictures", len(tasks), say)
    shape = 1 if args.interpolate else min(args.batch_size, len(tasks))
    try:
        for first in range(0, len(tasks), shape):
            part = tasks[first : first + shape]
            # filled up, so that all batches have one shape, and bits do not hang on their number
            filled = [*part, *part[-1:] * (shape - len(part))]
            request = asked(filled)

            def on_step(step: int, *_: Tensor, done: int = first) -> None:
                counter.update(done, f"step {step}")

            try:
                images = module.sample(request, settings, on_step).cpu()
                images = to_uint8(images)[: len(part)]
            except ValueError as error:
                raise ConfigError(first_line(error)) from error
            if edit is not None and edit.mask is not None and args.keep_known:
                images = torch.where(edit.mask, images, edit.pixels)
            for i, (task, image) in enumerate(zip(part, images, strict=True), first):
                save_png(out / file_name(i), image, png_text(args, task, prompts, settings))
            made.extend(images[: max(0, MAX_IN_GRID - first)])
            counter.update(first + len(part))
    finally:
        counter.close()
    columns = len(tasks) if args.interpolate else min(args.count, 10) if args.count > 1 else 8
    captions = [t.prompt if t.blend is None else f"blend {t.blend:.2f}" for t in tasks[: len(made)]]
    save_png(out / "grid.png", grid(torch.stack(made), columns, captions=captions))
    say(f"{counted(len(tasks), 'picture')} in {out}, all together in {out / 'grid.png'}")
    if traced:
        some = tasks[:TRACED]
        shown = played(module, asked(some), traced)
        title, prompted = f"Samplings of {args.ckpt.name}", [task.prompt for task in some]
        write_text(args.trace, trace_page(title, prompted, shown))
        say(f"step by step: {args.trace}")


def check_settings(module: GeneratorModule, settings: Any) -> None:
    """Refuse what the checkpoint cannot be sampled by, before a picture is drawn.

    Raises:
        ConfigError: a sampler or another setting that does not fit it.
    """
    try:
        module.check_sampling(settings)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def warn_of_words(ckpt: Path, prompts: Sequence[str], say: Callable[[str], None]) -> None:
    """Say which words a training on embedded data never saw."""
    beside = checkpoint_file(ckpt).with_suffix(".json")
    data = str(json.loads(beside.read_text()).get("data")) if beside.is_file() else ""
    strange = unseen(prompts, data)
    if strange:
        some = ", ".join(strange[:8]) + (", ..." if len(strange) > 8 else "")
        say(f"note: this checkpoint learned from captions of {data}, which never say: {some}")


def out_folder(args: argparse.Namespace, tasks: Sequence[Task]) -> Path:
    """Choose the folder: --out, or the first free samples/<checkpoint>-<seed>[-2, -3, ...].

    Raises:
        ConfigError: a picture would overwrite one.
    """
    if args.out is not None:
        names = [*(file_name(i) for i in range(len(tasks))), "grid.png"]
        taken = next((n for n in names if (args.out / n).exists()), None)
        if taken is not None or (args.out.exists() and not args.out.is_dir()):
            raise ConfigError(
                f"--out {args.out} already holds {taken}; choose another folder"
                if taken
                else f"--out {args.out} is a file"
            )
        return args.out
    stem = args.ckpt.resolve().name if args.ckpt.is_dir() else args.ckpt.stem
    if stem == Path(CHECKPOINT).stem:
        stem = args.ckpt.resolve().parent.name
    return next(folder for folder in _numbered(f"{stem}-{args.seed}") if not folder.exists())


def _numbered(name: str) -> Iterator[Path]:
    yield Path("samples") / name
    number = 2
    while True:
        yield Path("samples") / f"{name}-{number}"
        number += 1


def file_name(index: int) -> str:
    """Return the file of picture `index`."""
    return f"{index:05d}.png"


def png_text(
    args: argparse.Namespace, task: Task, prompts: Sequence[str], settings: Any
) -> dict[str, str]:
    """Return what is written into a picture: enough to make it again."""
    names = (
        "negative",
        "prior",
        "style",
        "attention",
        "size",
        "image",
        "mask",
        "expand",
        "edit",
        "keep_known",
        "strength",
    )
    used = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.mask is None and args.expand is None:
        used.pop("keep_known")
    for name in ("edit", "prior"):
        if not getattr(args, name):
            used.pop(name)
    if task.blend is not None:
        used |= {"blend_with": prompts[1], "blend": task.blend}
    return {
        "prompt": task.prompt,
        "seed": str(task.seed),
        "checkpoint": str(args.ckpt),
        "checkpoint_sha256": file_hash(checkpoint_file(args.ckpt)),
        "settings": json.dumps({"sampling": resolved(settings), **used}, default=str),
    }
