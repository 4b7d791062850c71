"""Pictures from a checkpoint: `python -m experiments.sample --ckpt PATH --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.files import decode_text
from experiments.checkpoint import load
from experiments.cli import (
    Parser,
    blame,
    command,
    counted,
    prepare_torch,
)
from experiments.papers.sections import MAX_SEED
from experiments.requests import Task, parse_attention
from experiments.settings import ConfigError, describe

COMMAND = "python -m experiments.sample"
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
    from experiments.drawing import draw

    draw(args, words, prompts, tasks)


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


if __name__ == "__main__":
    kept = "interrupted; the pictures that were finished are kept"
    sys.exit(command(run, sys.argv[1:], kept))
