"""Encode a data set once: `python -m experiments.precompute --tokenizer FILE data=... --out DIR`.

Any number of processes may do it together (torchrun, an array of Slurm, or the same command in
several windows): each takes shards that nobody has taken.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.cached import INDEX, differences, read_index
from data.config import DataConfig
from experiments.cli import Parser, command, counted, prepare_torch, speaker
from experiments.papers.base import device_of, used_text
from experiments.papers.first_stage import FirstStageKind, measures_of_file
from experiments.papers.registry import PAPERS, with_corpus
from experiments.pipeline.data import Data
from experiments.pipeline.encode import Encode, EncodedView
from experiments.pipeline.first_stage import Given
from experiments.pipeline.ranks import is_leader
from experiments.pipeline.stage import Folders, Log, Machine, order
from experiments.pipeline.store import Store
from experiments.settings import (
    ConfigError,
    UserError,
    describe,
    fill,
    parse_overrides,
    pick,
    resolved,
)
from lightning_modules.common.checks import at_least
from lightning_modules.common.config import TextConfig

COMMAND = "python -m experiments.precompute"
OURS = (".safetensors", ".parquet", ".try", INDEX, "running.json")

EPILOG = f"""settings:
  data.KEY=VALUE as in a run (data=cc3m data.root=DIR, data.shards=..., data.resolution=256,
  data.flip=true, data.crop=random data.crops=4); text=t5 text.path=DIR keeps the states of a frozen
  text encoder, too. `{COMMAND} --help data` lists all.

together:
  torchrun --nproc-per-node 8 -m experiments.precompute ...
  sbatch --array=0-63 --wrap "{COMMAND} ..."
  A process that is killed loses the shard that it was at; the same command goes on.

then:
  python -m experiments.run --paper paella data=cache data.path=DIR tokenizer.ckpt=FILE ..."""


@dataclass
class PrecomputeSettings:
    """What is encoded, and where."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {}

    cache: str = "runs/cache"
    """Folder of what is drawn or listed on the way, shared with runs."""
    batch_size: int = 64
    """Pictures and captions that are encoded at once; across sizes they agree up to rounding."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Progress display; auto is rich on a terminal and plain lines elsewhere."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""
    text: TextConfig = field(default_factory=TextConfig)
    """The frozen text encoder whose states are kept; bytes, which is trained, keeps none."""

    def check(self) -> None:
        """Check that the settings can be encoded.

        Raises:
            ValueError: they cannot.
        """
        at_least(self, 1, "batch_size")
        if self.data.path is not None:
            raise ValueError("data.path names a cache, and one is made of pictures")
        if self.text.name in ("t5", "byt5") and not self.text.mask_padding:
            raise ValueError(
                "text.mask_padding must be true: states that see the padding depend on what else "
                "is in a batch"
            )


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit code.

    Raises:
        ConfigError: a wrong word on the command line; nothing was started.
        UserError: something the user can put right stopped the work.
    """
    parser = Parser(COMMAND, __doc__ or "", EPILOG)
    parser.add_argument("--tokenizer", type=Path, help="file of a tokenizer or an autoencoder")
    parser.add_argument("--out", type=Path, help="folder of the cache")
    parser.add_argument("--paper", help="whose filters of a corpus are taken")
    args, words = parser.split(argv)
    if args.help:
        print(settings_help() if "data" in words else parser.format_help(), end="")
        return 0
    if args.paper is not None:
        pick("--paper", args.paper, list(PAPERS))
    settings = load(words, args.paper or "any")
    if args.tokenizer is None or args.out is None:
        raise ConfigError("--tokenizer FILE and --out DIR are missing, see --help")
    stage = encode_stage(settings, args.tokenizer)
    check_home(args.out, stage, Folders(Path(settings.cache)))
    prepare_torch()
    from experiments.pipeline.runner import check_writable, in_one_line

    check_writable(args.out)
    device = device_of(settings.accelerator)
    try:
        with in_one_line():
            encode(settings, stage, args.out, device)
    except UserError as error:
        if not is_leader():  # whose own errors the command says
            print(f"error: process {os.environ.get('RANK', '')}: {error}", file=sys.stderr)
        raise
    if is_leader():
        show(args.out, args.tokenizer, settings)
    return 0


def load(words: Sequence[str], paper: str) -> PrecomputeSettings:
    """Make the checked settings.

    Raises:
        ConfigError: unknown key; wrong type, range or combination.
    """
    line = parse_overrides(PrecomputeSettings, words)
    return fill(PrecomputeSettings, with_corpus(paper, [], line))


def settings_help() -> str:
    """Text of `--help data`: every setting with its type, default and meaning."""
    rows = describe(PrecomputeSettings)
    return "".join(f"  {r.key}={r.default}  [{r.type}]\n      {r.help}\n" for r in rows)


def encode_stage(settings: PrecomputeSettings, file: Path) -> Encode:
    """Return the stage that encodes the training split with a first stage.

    Raises:
        ConfigError: there is no such file, it is no first stage, or does not fit the pictures.
    """
    if not file.is_file():
        raise ConfigError(f"--tokenizer: there is no file {file}")
    kind = kind_of(file)
    data = settings.data
    measures = measures_of_file(kind, file)
    assert measures is not None
    factor = measures[0]
    if data.resolution % factor:
        raise ConfigError(
            f"data.resolution must be a multiple of {factor}, the pixels per token of {file}, got "
            f"{data.resolution}"
        )
    name = "moments" if kind.statistics else "tokens"
    text = used_text(resolved(settings.text)) if settings.text.name != "bytes" else None
    return Encode(
        Data(data, 1, 1, 1).shards("train"),
        data.view(),
        (EncodedView(name, Given(file, kind.paper)),),
        data.crops,
        text,
        {"data": resolved(data), "tokenizer": os.path.abspath(file)},
    )


def kind_of(file: Path) -> FirstStageKind:
    """Return what kind of first stage a file holds.

    Raises:
        ConfigError: it holds none.
    """
    kinds = {paper.FIRST_STAGE.section: paper.FIRST_STAGE for paper in PAPERS.values()}
    found = [kind for kind in kinds.values() if measures_of_file(kind, file) is not None]
    if not found:
        raise ConfigError(
            f"--tokenizer: {file} is no tokenizer or autoencoder of this suite; "
            "experiments.convert reads those of others"
        )
    return found[0]


def check_home(out: Path, stage: Encode, inputs: Folders) -> None:
    """Refuse a folder that holds anything but a cache of these settings, whole or begun.

    Raises:
        ConfigError: it does; names what differs.
    """
    if not out.is_dir():
        return
    files = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    others = [path.name for path in files if not path.name.endswith(OURS)]
    if others:
        raise ConfigError(f"--out {out} holds other files ({others[0]}); name a folder of its own")
    made = _made(out, files)
    for name, here, there in differences(stage.made(inputs), made or stage.made(inputs)):
        raise ConfigError(
            f"--out {out} holds a cache of other settings: {name} is {there} there and {here} "
            "here; name another folder"
        )
    before = _identity(_about(out))
    for name, here, there in differences(_identity(stage.about) if before else {}, before):
        raise ConfigError(
            f"--out {out} holds a cache of other data: data.{name} is {there} there and {here} "
            "here; name another folder"
        )


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says which data set it is; shards may be added to one."""
    names = ("name", "seed", "train_size", "max_objects")
    return {name: about["data"].get(name) for name in names} if "data" in about else {}


def _about(out: Path) -> Mapping[str, Any]:
    return read_index(out)["about"] if (out / INDEX).is_file() else {}


def _made(out: Path, files: Sequence[Path]) -> dict[str, Any] | None:
    """Return the settings that a cache, or the first shard of one that was begun, was made with."""
    if (out / INDEX).is_file():
        try:
            made = read_index(out)["made"]
        except ValueError as error:
            raise ConfigError(f"--out: {error}") from error
    else:
        from data.cache import made_with

        parts = (made_with(p) for p in files if not p.name.endswith(".text.safetensors"))
        made = next((part for part in parts if part), None)
    return made and {k: v for k, v in made.items() if k not in ("source", "num_codes")}


def encode(settings: PrecomputeSettings, stage: Encode, out: Path, device: str) -> None:
    """Make the cache, together with whoever else makes it."""
    machine = Machine(
        device=device,
        batch_size=settings.batch_size,
        max_skipped=settings.data.max_skipped,
        progress=settings.progress,
    )
    # every process leads a run of its own, so none waits for one that was never started
    store = Store(settings.cache, leader=True, homes={stage: out}, apart=True)
    store.run(order([stage]), machine, Log(speaker(), machine.progress))


def show(out: Path, tokenizer: Path, settings: PrecomputeSettings) -> None:
    """Say what there is, and how to train on it."""
    index = read_index(out)
    size = sum((out / file).stat().st_size for part in index["parts"] for file in part["files"])
    shards = counted(len(index["parts"]), "shard")
    print(f"{out}: {index['count']} samples of {shards}, {size / 1e6:.1f} MB")
    section = kind_of(tokenizer).section
    words = ["data=cache", f"data.path={out}", f"data.resolution={settings.data.resolution}"]
    line = shlex.join([*words, f"{section}.ckpt={tokenizer}"])
    print(f"train on it: python -m experiments.run --paper ... {line}")


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
