"""The words of an evaluation: options, those that a protocol gives, and settings."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.config import DataConfig
from eval.choices import CHOICES, CLIP, weight_files
from eval.spaces import SPACES
from experiments.cli import Parser
from experiments.evaluation.protocols import Protocol, protocol, protocols
from experiments.pipeline.data import Data
from experiments.pipeline.given import CUTS
from experiments.settings import ConfigError, override, pick

FILTERS = ("bicubic", "lanczos", "bilinear", "box")
CAPTIONS = 512  # of a data set that are asked, where nobody says how many
LEAST = {"num": 2, "classes": 1, "resolution": 8, "batch_size": 1, "seed": 0, "list_seed": 0}


@dataclass(frozen=True)
class Door:
    """What a command is about."""

    command: str
    about: str
    scores: tuple[str, ...]
    """Keys of CHOICES, where --scores says nothing."""
    protocol: str | None = None
    """A key of protocols.yaml, where --protocol says nothing."""
    first_stage: bool = False
    """Whether reconstructions of a first stage are scored, in place of drawn pictures."""
    examples: tuple[str, ...] = ()


@dataclass
class _Words:
    data: DataConfig = field(default_factory=DataConfig)


class Options:
    """What was asked of a command, with what its protocol says besides.

    Args:
        door: the command.
        args: its options.
        words: its settings.

    Raises:
        ConfigError: a number out of range, an unknown name, or a wrong setting of data.
    """

    def __init__(self, door: Door, args: argparse.Namespace, words: Sequence[str]) -> None:
        for name, least in LEAST.items():
            value = getattr(args, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least {least}, got {value}")
        self.door, self.args = door, args
        self.protocol: Protocol | None = protocol(args.protocol or door.protocol)
        of_data = [w for w in words if w.removeprefix("--").startswith(("data=", "data."))]
        self.words = [w for w in words if w not in of_data]
        self.scores: list[str] = self._listed("scores", CHOICES) or [*door.scores]
        self.features: list[str] = self._listed("features", SPACES)
        self.num: int | None = self._value("num")
        self.resolution: int | None = self._value("resolution")
        self.crop: str = self._value("crop") or "none"
        self.filter: str = self._value("filter") or "bicubic"
        if args.filter is not None and self.crop == "adm":
            raise ConfigError("--filter goes with other crops; adm has filters of its own")
        self.reference: str | None = self._value("reference")
        self.data = self._data(of_data)

    def said(self, setting: str) -> Any:
        """Return what the protocol says of a setting; None without one."""
        return None if self.protocol is None else self.protocol.value(setting)

    def _value(self, setting: str) -> Any:
        given = getattr(self.args, setting)
        return self.said(setting) if given is None else given

    def _listed(self, setting: str, known: Any) -> list[str]:
        given = getattr(self.args, setting)
        if given is None:
            return [*(self.said(setting) or [])]
        return [pick(f"--{setting}", name.strip(), [*known]) for name in given.split(",")]

    def _data(self, words: Sequence[str]) -> Data | None:
        """Return the data set that words name, with as many captions as are asked."""
        if not words:
            return None
        config = override(_Words(), words).data
        if self.num is None:
            self.num = min(CAPTIONS, config.val_size)
        return Data(replace(config, val_size=max(self.num, config.val_size)), self.num, 0, 0)

    @property
    def prompts(self) -> str | None:
        """How a list was named, as protocols.yaml calls it; None where nobody named one."""
        args = self.args
        if self.door.first_stage:
            return None
        named = {"file": args.prompts, "classes": args.classes, "val2014": args.coco}
        named |= {"data": self.data, "none": True if args.images is None else None}
        return next((way for way, value in named.items() if value is not None), None)

    @property
    def weights(self) -> dict[str, Path]:
        """Files of weights by the names of features and scores.

        Raises:
            ConfigError: a word that is no NAME=FILE.
        """
        try:
            return weight_files(self.args.weights)
        except ValueError as error:
            raise ConfigError(f"--weights: {error}") from error

    def changed(self) -> list[str]:
        """Return the settings in which this departs from its protocol."""
        if self.protocol is None:
            return []
        names = ("num", "reference", "resolution", "crop", "filter", "features", "scores")
        changed = [n for n in names if self.said(n) not in (None, "given", getattr(self, n))]
        other_list = self.prompts is not None and self.said("prompts") not in (None, self.prompts)
        return changed + ["prompts"] * other_list


def make_parser(door: Door) -> Parser:
    """Make the parser of a command; its help explains everything."""
    lines = [
        "settings: sampling.KEY=VALUE changes how the checkpoint samples; data=NAME, data.root=DIR",
        "or data.shards=... takes prompts and real pictures from a data set of runs.",
        "",
        f"scores: {', '.join(CHOICES)}",
        f"features: {', '.join(SPACES)} (scenes is the embedded classifier: no download)",
        "crops: " + "; ".join(f"{name} ({what})" for name, what in CUTS.items()),
        "protocols:",
        *(f"  {one.name:12s} {one.about}" for one in protocols().values()),
        "",
        "The same command resumes. Any number of processes (torchrun, tasks of a Slurm array) with",
        "the same --out share the work; no picture depends on their number.",
        "",
        "examples:",
        *(f"  {door.command} {words}" for words in door.examples),
    ]
    parser = Parser(door.command, door.about, "\n".join(lines))
    add = parser.add_argument
    made = "run folder, or checkpoint file of a generator"
    scored = "pictures that are scored, in place of a checkpoint"
    if door.first_stage:
        made = "tokenizer or autoencoder; an official one with --paper vqgan or autoencoder"
        scored = "pictures that are encoded and decoded"
    add("--ckpt", type=Path, metavar="PATH", help=made)
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer, where not beside it")
    add("--paper", metavar="NAME", help="take the checkpoint as one of this paper")
    add("--images", type=Path, metavar="DIR", help=scored)
    add("--coco", type=Path, metavar="ROOT", help="COCO 2014: annotations/ and val2014/")
    add("--prompts", type=Path, metavar="FILE", help="csv, json or txt; csv and json may have ids")
    add("--classes", type=int, metavar="K", help="class-conditional: K classes in turn")
    add(
        "--num",
        type=int,
        metavar="N",
        help="how many pictures (default: the whole list); torchrun takes it as num=N alone",
    )
    add(
        "--reference",
        metavar="WHAT",
        help="a folder, an npz of mean and covariance, val2014, val2014-list, or data",
    )
    add("--protocol", metavar="NAME", help=f"default: {door.protocol or 'none'}")
    add("--scores", metavar="A,B", help=f"default: {','.join(door.scores)}, or the protocol's")
    add("--features", metavar="A,B", help="default: the usual ones of each score")
    add(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights of features or of a score, where not in a usual cache",
    )
    add("--clip", default=CLIP, metavar="MODEL TAG", help="of the CLIP score (%(default)s)")
    add("--resolution", type=int, metavar="N", help="width at which all pictures are scored")
    add("--crop", choices=tuple(CUTS), help="how a square is made of other pictures")
    add("--filter", choices=FILTERS, help="how they are resized (default: bicubic)")
    add("--negative", metavar="TEXT", help="what guidance leads away from")
    add("--seed", type=int, default=0, metavar="N", help="picture number i has seed N + i")
    add("--list-seed", type=int, default=0, metavar="N", help="draws the list of --coco")
    add("--out", type=Path, metavar="DIR", help="gets images/, prompts.json and result.json")
    add(
        "--cache",
        type=Path,
        default=Path("runs/cache"),
        metavar="DIR",
        help="keeps features of real pictures for all evaluations (%(default)s)",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
    add(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="pictures at once; the same for all processes (%(default)s)",
    )
    return parser
