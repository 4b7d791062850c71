"""Offline averages: one checkpoint from a series of them, as Muse's EMA is made."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import Parser, command, first_line
from experiments.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "python -m experiments.average"
HELP = f"""The average a <- decay a + (1 - decay) w over weights w in the order given.

A training keeps them with trainer.keep_every=N, in the folder of its train stage. What they do not
have (another stage, the tokenizer) is that of --ckpt.

example:
  {COMMAND} --ckpt runs/x --out averaged/x.safetensors runs/cache/train-KEY/weights-*.safetensors"""


def run(argv: Sequence[str]) -> None:
    """Write the average that the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line, a file that is not there, or files that are
            not of one series.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.help:
        print(parser.format_help())
        return
    if args.ckpt is None or args.out is None or len(args.files) < 2:
        raise ConfigError("needs --ckpt, --out and at least two files of weights; see --help")
    try:
        average(args.ckpt, args.files, args.decay, args.out)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(first_line(error)) from error
    print(f"{args.out}: the average of {len(args.files)} checkpoints, decay {args.decay}")


def average(ckpt: Path, files: Sequence[Path], decay: float, out: Path) -> None:
    """Write the average of weights, with what the checkpoint works with beside it.

    Args:
        ckpt: run folder or checkpoint of the same model.
        files: weights in the order of training.
        decay: weight of the average so far.
        out: the file to write.

    Raises:
        ValueError: files that are not of one series.
        FileNotFoundError: a file that is not there.
    """
    from data.files import link, write_json
    from lightning_modules.common.checkpoint import load_weights, save_weights
    from lightning_modules.common.ema import offline_average

    source = ckpt / "checkpoint.safetensors" if ckpt.is_dir() else ckpt
    state, config = load_weights(source)

    def states() -> Iterator[dict[str, "Tensor"]]:
        for path in files:
            own, settings = load_weights(path)
            if settings.get("paper") != config.get("paper"):
                raise ValueError(
                    f"{path} holds weights of {settings.get('paper')}, {source} of "
                    f"{config.get('paper')}"
                )
            odd = [k for k in own if k not in state or own[k].shape != state[k].shape]
            if odd:
                raise ValueError(f"{path} does not match {source}: {odd[0]}")
            yield own

    averaged = offline_average(states(), decay)
    save_weights(out, {**state, **averaged}, config)
    about = source.with_suffix(".json")
    if about.is_file():
        known = json.loads(about.read_text())
        beside = [known["first_stage"], *known.get("parts", {}).values()]
        beside += known.get("further", {}).values()
        write_json(out.with_suffix(".json"), known)
    else:
        beside = [
            n for n in (config.get("tokenizer"), config.get("high", {}).get("tokenizer")) if n
        ]
    for named in beside:
        if not out.with_name(named["file"]).exists():
            link(source.with_name(named["file"]), out.with_name(named["file"]))


def make_parser() -> Parser:
    """Make the parser of all options."""
    parser = Parser(COMMAND, HELP)
    add = parser.add_argument
    add("files", nargs="*", type=Path, help="weights in the order of training")
    add("--ckpt", type=Path, help="run folder or checkpoint of the same model")
    add("--out", type=Path, help="the file to write; its tokenizer is put beside it")
    add(
        "--decay",
        type=float,
        default=0.7,
        help="share of the average so far (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
