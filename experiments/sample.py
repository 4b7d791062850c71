"""Pictures from a checkpoint: `python -m experiments.sample --ckpt PATH --prompt "..."`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import decode_text, file_hash, write_text
from experiments.checkpoint import checkpoint_file, find_device, load, read_settings
from experiments.cli import (
    Parser,
    blame,
    command,
    counted,
    first_line,
    prepare_torch,
    speaker,
)
from experiments.papers.sections import MAX_SEED
from experiments.pipeline.generator import CHECKPOINT
from experiments.progress import Counter
from experiments.settings import ConfigError, describe, override, resolved
from experiments.vocabulary import unseen

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.edits import Edit
    from experiments.report.trace import Played
    from lightning_modules.common.generator import GeneratorModule
    from lightning_modules.common.request import Request

COMMAND = "python -m experiments.sample"
MAX_IN_GRID = 100
TRACED = 4  # pictures on the page of --trace
OPTIONS = {
    "negative": "--negative",
    "start": "--image",
    "mask": "--mask",
    "grid": "--size",
    "rewrite": "--edit",
    "blend_with": "--interpolate",
    "image_condition": "--style",
    "prior": "--prior",
    "attention": "--attention",
}

EPILOG = f"""settings:
  sampling.KEY=VALUE words change how the checkpoint samples, e.g. sampling.steps=8, and
  sampling=NAME takes a preset; --ckpt PATH --help lists the settings of that checkpoint.
  text.path=DIR and text.clip_pretrained=FILE say where frozen text encoders lie here.

papers that know an option, where not all do:
  --edit         muse
  --interpolate  paella, vq_diffusion, improved_vqd, muse
  --negative     paella, improved_vqd, muse, ldmae
  --size         paella, vq_diffusion, improved_vqd, muse; with --image all

examples:
  {COMMAND} --ckpt runs/x --prompt "a small red circle above a large blue square"
  {COMMAND} --ckpt runs/x --prompts prompts.txt --count 4 sampling.steps=8
  {COMMAND} --ckpt runs/x --image a.png --mask m.png --prompt "..."   (inpainting)
  {COMMAND} --ckpt runs/x --image a.png --expand 0,0,32,0             (outpainting)
  {COMMAND} --ckpt runs/x --image a.png --edit --prompt "..."         (editing without a mask)
  {COMMAND} --ckpt runs/x --image a.png --strength 0.6                (variations)
  {COMMAND} --ckpt runs/x --prompt "..." --trace a.html --samplers own,eb
  {COMMAND} --ckpt runs/x --prompt "..." --prompt "..." --interpolate 7
  {COMMAND} --ckpt paella.safetensors --prompt "..." --prior          (text to image vector)

Picture i of a call is 0000i.png and has seed N + i; its PNG text holds prompt, seed, checkpoint
(with its sha256) and settings. The same words give the same bytes again on the same processor;
across batch sizes and processors pictures agree up to ties of rounding."""


class Task(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int
    blend: float | None = None


def run(argv: Sequence[str]) -> None:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line or an unfit file; no picture was made.
    """
    parser = make_parser()
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        if args.ckpt is not None:
            module = load(args.ckpt, args.tokenizer, "cpu", args.paper)
            print("settings of this checkpoint:")
            for row in describe(module.config.sampling):
                print(f"  sampling.{row.key}={row.default}  [{row.type}]\n      {row.help}")
        return
    check(args)
    prompts = read_prompts(args)
    tasks = make_tasks(args, prompts)
    if tasks[-1].seed > MAX_SEED:
        raise ConfigError(
            f"--seed: no picture's seed may exceed {MAX_SEED}, got {args.seed} for the first of "
            f"{counted(len(tasks), 'picture')}"
        )
    prepare_torch()
    draw(args, words, prompts, tasks)


def draw(
    args: argparse.Namespace, words: Sequence[str], prompts: Sequence[str], tasks: list[Task]
) -> None:
    """Draw the pictures of some tasks, as the options say.

    Raises:
        ConfigError: an unfit file or setting; no picture was made.
    """
    import torch

    from experiments.edits import (
        describe_edit,
        make_edit,
        parse_expand,
        parse_size,
        read_picture,
        trained_size,
        vary,
    )
    from experiments.report.pictures import grid, save_png, to_pixels, to_uint8
    from experiments.report.trace import trace_page

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

    out = out_folder(args, tasks)
    warn_of_words(args.ckpt, prompts, say)
    width, height = size or trained_size(module)
    if edit is not None:
        height, width = edit.pixels.shape[-2:]
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
        if args.trace is not None:
            some = tasks[:TRACED]
            title = f"Samplings of {args.ckpt.name}"
            prompted = [task.prompt for task in some]
            shown = played(module, asked(some), traced)
            write_text(args.trace, trace_page(title, prompted, shown))
    finally:
        counter.close()
    columns = len(tasks) if args.interpolate else min(args.count, 10) if args.count > 1 else 8
    captions = [t.prompt if t.blend is None else f"blend {t.blend:.2f}" for t in tasks[: len(made)]]
    save_png(out / "grid.png", grid(torch.stack(made), columns, captions=captions))
    say(f"{counted(len(tasks), 'picture')} in {out}, all together in {out / 'grid.png'}")
    if args.trace is not None:
        say(f"step by step: {args.trace}")


def played(module: GeneratorModule, request: Request, traced: Sequence[Any]) -> list[list[Played]]:
    """Draw the pictures of a request once more by each of the `traced` settings.

    Raises:
        ConfigError: settings that do not fit, or pictures that are made window by window.
    """
    from experiments.pipeline.sample import decode_unfinished
    from experiments.report.pictures import to_uint8
    from experiments.report.trace import Played, Recorder
    from lightning_modules.samplers.loop import entropy_of

    shown: list[list[Played]] = [[] for _ in request.prompts]
    for settings in traced:
        head = getattr(module.network, "head", None)
        recorder = Recorder(len(request.prompts), None if head is None else entropy_of(head))
        try:
            with module.heard_by(recorder.on_call):
                module.sample(request, settings, recorder.on_step)
        except ValueError as error:
            raise ConfigError(first_line(error)) from error
        if len({state.shape for state in recorder.states}) != 1:
            raise ConfigError("--trace cannot follow pictures that are made window by window")
        for i in range(len(request.prompts)):
            one, calls, entropy = recorder.of(i)  # [T + 1, h, w]
            drawn = decode_unfinished(module.first_stage, one.to(module.device))
            frames = to_uint8(drawn.cpu())
            codes = module.first_stage.num_codes if one.ndim == 3 else None
            label = getattr(getattr(settings, "sampler", None), "name", "own")
            shown[i].append(Played(label, frames, one, codes, calls, entropy))
    return shown


def traced_settings(settings: Any, samplers: str | None) -> list[Any]:
    """Return the settings of each sampling that --trace plays: of --samplers, or as they are.

    Raises:
        ConfigError: no such sampler, or a paper that has its own loop alone.
    """
    return [by_sampler(settings, name) for name in samplers.split(",")] if samplers else [settings]


def check_settings(module: GeneratorModule, settings: Any) -> None:
    """Refuse what the checkpoint cannot be sampled by, before a picture is drawn.

    Raises:
        ConfigError: a sampler or another setting that does not fit it.
    """
    try:
        module.check_sampling(settings)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def by_sampler(settings: Any, name: str) -> Any:
    """Return settings with another sampler.

    Raises:
        ConfigError: no such sampler, or a paper that has its own loop alone.
    """
    if not hasattr(settings, "sampler"):
        raise ConfigError("--samplers: this checkpoint's paper has its own loop alone")
    try:
        return override(settings, [f"sampler={name}"])
    except ConfigError as error:
        raise ConfigError(f"--samplers: {error}") from error


def make_parser() -> Parser:
    """Make the parser of all options; its help explains them."""
    parser = Parser(
        COMMAND,
        "Draw pictures with a checkpoint: from text, or from a picture and text.",
        EPILOG,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="PATH", help="run folder, or checkpoint file of a generator")
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer, where not beside it")
    add(
        "--paper",
        metavar="NAME",
        help="sample it as this paper: improved_vqd also takes a vq_diffusion, untrained",
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    add("--negative", metavar="TEXT", help="what guidance leads away from (default: no text)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first picture (default: 0)")
    add("--count", type=int, default=1, metavar="N", help="pictures per prompt (default: 1)")
    add(
        "--prior",
        action="store_true",
        help="condition also on an image vector that the checkpoint's prior draws from the prompt",
    )
    add(
        "--style",
        type=Path,
        metavar="FILE",
        help="a picture whose CLIP vector is a condition beside the prompt",
    )
    add(
        "--attention",
        metavar="W,W,...",
        help="factors of the attention to the last conditioning tokens, e.g. 1,1,0.5",
    )
    add("--size", metavar="WxH", help="pixels (default: as trained; with --mask: as the image)")
    add("--image", type=Path, metavar="FILE", help="a picture to edit (JPEG, PNG or WebP)")
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white = generate, black = keep; as large as the image. A token that white touches "
        "is generated whole. --image alone gives variations",
    )
    add(
        "--expand",
        metavar="L,T,R,B",
        help="outpainting: pixels to add on the left, at the top, on the right, at the bottom",
    )
    add(
        "--edit",
        action="store_true",
        help="edit --image without a mask: its tokens are drawn again bit by bit under the prompt "
        "(sampling.edit.*)",
    )
    add(
        "--keep-known",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="what is not generated comes from the image itself (default); "
        "--no-keep-known shows them as the tokenizer decodes them, without seams",
    )
    add(
        "--strength",
        type=float,
        metavar="S",
        help="variations: 0 = hardly any change, 1 = the most (default: 0.7)",
    )
    add(
        "--interpolate",
        type=int,
        metavar="N",
        help="N pictures from the first prompt to the second",
    )
    add("--trace", type=Path, metavar="FILE", help="HTML page that plays the first pictures")
    add(
        "--samplers",
        metavar="NAMES",
        help="--trace: play each picture by these samplers too, as own,eb,posterior",
    )
    add("--out", type=Path, metavar="DIR", help="default: samples/<checkpoint>-<seed>, numbered")
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default: auto)",
    )
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="pictures at once; changes pictures by rounding at most",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Check what can be checked without any file.

    Raises:
        ConfigError: a missing option, one out of range, or two that exclude each other.
    """
    if args.ckpt is None:
        raise ConfigError("--ckpt is missing; name a run folder or a checkpoint file")
    for name, least in (("seed", 0), ("count", 1), ("batch_size", 1), ("interpolate", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.prior and (args.style or args.image):
        raise ConfigError("--prior draws the image vector that --style or --image gives; take one")
    parse_attention(args.attention)
    if args.trace is not None and args.interpolate:
        raise ConfigError("--trace plays single pictures; leave out --interpolate")
    if args.samplers and args.trace is None:
        raise ConfigError("--samplers needs --trace, the page that shows them side by side")
    if args.strength is not None and not 0 <= args.strength <= 1:
        raise ConfigError(f"--strength must be between 0 and 1, got {args.strength}")
    ways = {"--mask": args.mask, "--expand": args.expand, "--edit": args.edit or None}
    given = [name for name, value in ways.items() if value is not None]
    if args.image is None and given:
        raise ConfigError(f"{given[0]} needs --image, the picture that is changed")
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} exclude each other; make one edit at a time")
    if args.edit and not (args.prompt or args.prompts):
        raise ConfigError("--edit needs --prompt, which says what the picture becomes")
    if args.strength is not None and (args.image is None or given):
        unless = f" and no {given[0]}" if given else ""
        raise ConfigError(f"--strength belongs to variations: give --image{unless}")
    if args.interpolate and (args.image is not None or args.count > 1):
        raise ConfigError("--interpolate goes with two prompts alone: no --image, no --count")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --prompt and --prompts; an edit may go without, an interpolation needs two.

    Raises:
        ConfigError: no prompts, a wrong number of them, or an unreadable file.
    """
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = decode_text(args.prompts.read_bytes()).splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--prompts {blame(args.prompts, error)}") from error
        # files that were joined hold byte order marks inside
        stripped = [line.replace("\ufeff", "").strip() for line in lines]
        prompts += [line for line in stripped if line]
        if not prompts:
            raise ConfigError(f"--prompts {args.prompts} holds no prompt")
    for prompt in filter(None, [*prompts, args.negative]):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"--prompt {prompt!r} is no valid text") from error
    if args.interpolate and len(prompts) != 2:
        raise ConfigError(f"--interpolate needs exactly two prompts, got {len(prompts)}")
    if not prompts and args.image is None:
        raise ConfigError("--prompt is missing; say what to draw")
    return prompts or [""]


def make_tasks(args: argparse.Namespace, prompts: Sequence[str]) -> list[Task]:
    """One task per picture; the seeds count up, an interpolation keeps one seed."""
    if args.interpolate:
        shares = [i / (args.interpolate - 1) for i in range(args.interpolate)]
        return [Task(prompts[0], args.seed, share) for share in shares]
    repeated = [prompt for prompt in prompts for _ in range(args.count)]
    return [Task(prompt, args.seed + i) for i, prompt in enumerate(repeated)]


def warn_of_words(ckpt: Path, prompts: Sequence[str], say: Callable[[str], None]) -> None:
    """Say which words a training on embedded data never saw."""
    beside = checkpoint_file(ckpt).with_suffix(".json")
    data = str(json.loads(beside.read_text()).get("data")) if beside.is_file() else ""
    strange = unseen(prompts, data)
    if strange:
        some = ", ".join(strange[:8]) + (", ..." if len(strange) > 8 else "")
        say(f"note: this checkpoint learned from captions of {data}, which never say: {some}")


def make_request(
    module: GeneratorModule,
    tasks: Sequence[Task],
    prompts: Sequence[str],
    negative: str | None,
    edit: Edit | None,
    size: tuple[int, int] | None,
    rewrite: bool = False,
) -> Request:
    """Return the request for the pictures of some tasks.

    Raises:
        ConfigError: an option that this checkpoint's paper does not know.
    """
    from lightning_modules.common.request import Request

    count = len(tasks)
    request = Request([t.prompt for t in tasks], [t.seed for t in tasks])
    if negative is not None:
        request = replace(request, negative=[negative] * count)
    if tasks[0].blend is not None:
        request = replace(request, blend_with=[prompts[1]] * count, blend=tasks[0].blend)
    if edit is not None:
        pixels = (edit.pixels.float() / 127.5 - 1).to(module.device)
        start = pixels.expand(count, -1, -1, -1)
        if edit.tokens is not None:
            request = replace(request, start=start, mask=edit.tokens.expand(count, -1, -1))
        elif rewrite:
            request = replace(request, start=start, rewrite=True)
        else:
            request = replace(request, start=start, image_condition=module.image_condition(start))
    elif size is not None:
        unit = module.pixels_per_token
        request = replace(request, grid=(size[1] // unit, size[0] // unit))
    for name in request.asked() - module.ABILITIES:
        raise ConfigError(f"this checkpoint's paper knows no {OPTIONS.get(name, name)}")
    return request


def conditioned(
    module: GeneratorModule,
    request: Request,
    prior: bool,
    style: Tensor | None,
    attention: Sequence[float] | None,
) -> Request:
    """Add what a picture is conditioned on besides its prompt.

    Args:
        module: the generator.
        request: for B pictures.
        prior: draw an image vector from the prompt.
        style: [3, H, W] uint8, a picture of which the image vector is taken.
        attention: factors of the attention to the last conditioning tokens.

    Raises:
        ConfigError: an option that this checkpoint's paper does not know.
    """
    import torch

    more: dict[str, Any] = {"prior": True} if prior else {}
    if style is not None:
        pixels = (style.float() / 127.5 - 1).to(module.device)[None]  # [1, 3, H, W]
        vector = module.image_condition(pixels)
        if vector is None:
            raise ConfigError("this checkpoint sees no image vectors: leave out --style")
        more["image_condition"] = vector.expand(len(request.seeds), -1)
    if attention is not None:
        more["attention"] = torch.tensor(attention, device=module.device)
    for name in more.keys() - module.ABILITIES:
        raise ConfigError(f"this checkpoint's paper knows no {OPTIONS[name]}")
    return replace(request, **more)


def parse_attention(text: str | None) -> list[float] | None:
    """Read the factors of --attention.

    Raises:
        ConfigError: no numbers from 0 up.
    """
    if text is None:
        return None
    try:
        factors = [float(word) for word in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(0 <= factor < math.inf for factor in factors):
        raise ConfigError(f"--attention takes numbers from 0 up, e.g. 1,1,0.5, got {text}")
    return factors


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


if __name__ == "__main__":
    kept = "interrupted; the pictures that were finished are kept"
    sys.exit(command(run, sys.argv[1:], kept))
