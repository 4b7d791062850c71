"""Offline averages: one checkpoint from a series of them, as Muse's EMA is made."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from data.files import link, write_json
from experiments.cli import Parser, command
from experiments.settings import ConfigError
from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.ema import offline_average

COMMAND = "python -m experiments.average"
HELP = f"""The average a <- decay a + (1 - decay) w over weights w in the order given.

A training keeps them with trainer.keep_every=N, in the folder of its train stage. What they do not
have (another stage, the tokenizer) is that of --ckpt.

example:
  {COMMAND} --ckpt runs/x --out averaged/x.safetensors runs/cache/train-KEY/weights-*.safetensors"""


def run(argv: Sequence[str]) -> None:
    """Write the average that the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line.
        ValueError: files that are not of one series.
        FileNotFoundError: a file that is not there.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.help:
        print(parser.format_help())
        return
    if args.ckpt is None or args.out is None or len(args.files) < 2:
        raise ConfigError("needs --ckpt, --out and at least two files of weights; see --help")
    source = args.ckpt / "checkpoint.safetensors" if args.ckpt.is_dir() else args.ckpt
    state, config = load_weights(source)

    def states() -> Iterator[dict[str, Tensor]]:
        for path in args.files:
            own, settings = load_weights(path)
            if settings.get("paper") != config.get("paper"):
                raise ValueError(
                    f"{path} holds a {settings.get('paper')}, {source} a {config.get('paper')}"
                )
            odd = [k for k in own if k not in state or own[k].shape != state[k].shape]
            if odd:
                raise ValueError(f"{path} does not match {source}: {odd[0]}")
            yield own

    average = offline_average(states(), args.decay)
    save_weights(args.out, {**state, **average}, config)
    about = source.with_suffix(".json")
    if about.is_file():
        known = json.loads(about.read_text())
        files = [known["first_stage"], *known.get("parts", {}).values()]
        files += known.get("further", {}).values()
        write_json(args.out.with_suffix(".json"), known)
    else:
        files = [n for n in (config.get("tokenizer"), config.get("high", {}).get("tokenizer")) if n]
    for named in files:
        if not args.out.with_name(named["file"]).exists():
            link(source.with_name(named["file"]), args.out.with_name(named["file"]))
    print(f"{args.out}: the average of {len(args.files)} checkpoints, decay {args.decay}")


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
