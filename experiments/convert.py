"""Official checkpoints to ours: `python -m experiments.convert --paper NAME --from FILE`."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from data.cached import read_index
from data.files import file_hash, write_json
from experiments.cli import Parser, blame, command, first_line, speaker
from experiments.papers.registry import PAPERS, scale_file
from experiments.settings import ConfigError, file_pairs, fill, parse_overrides, pick, resolved
from lightning_modules.common.interfaces import Geometry

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.common.foreign import Foreign, State

COMMAND = "python -m experiments.convert"
PARTS = sorted({name for paper in PAPERS.values() for name in paper.PARTS})
ASIDE = {"codes": "tokenizer", "stats": "autoencoder"}  # option -> first stage that it goes with

EPILOG = f"""what can be read:
{{reads}}
Files are read without running anything in them. A key that is missing or left over is an error.

key=value words say what the tensors do not: model.nhead=[-1,16,16], tokenizer.model.norm_groups=8,
and what a checkpoint needs besides: text.path=DIR and text.clip_pretrained=FILE (text encoders),
data.resolution=256 (size it was trained at), sampling.steps=12.

examples:
  {COMMAND} --paper paella --from paella_v3.pt --tokenizer vqgan_f4.pt --out paella.safetensors
  {COMMAND} --paper improved_vqd --from coco_learnable.pth --codes taming_vqvae_2887.pt --out X
  {COMMAND} --paper muse --from amused-256 --out amused-256.safetensors
  {COMMAND} --paper vqgan --from vq-f4/model.ckpt --out vq_f4.safetensors"""


class FirstStage(NamedTuple):
    """A tokenizer or autoencoder as it was read."""

    source: Path
    module: Any
    state: State
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Tokenizer or autoencoder."""
        return PAPERS[self.config["paper"]].FIRST_STAGE.section

    @property
    def kind(self) -> str:
        """Its network and its size, for a person."""
        network = self.config.get("kind") or f"{self.config['model']['network']} network"
        count = sum(value.numel() for value in self.module.parameters())
        codes = getattr(self.module, "num_codes", None)
        size = f"{self.module.channels} channels" if codes is None else f"{codes} codes"
        return f"{network}, {count:,} parameters, {size}, f{self.module.factor}"


def run(argv: Sequence[str]) -> None:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line or an unfit file; nothing was written.
    """
    parser = make_parser()
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        return
    for name in ("paper", "from", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing")
    paper = pick("--paper", args.paper, [*PAPERS])
    hints = dict(parse_overrides(PAPERS[paper], words))
    source, out = Path(getattr(args, "from")), args.out
    if out.suffix != ".safetensors":
        out = out.with_name(f"{out.name}.safetensors")
    for option, section in ASIDE.items():
        if getattr(args, option) is not None and PAPERS[paper].FIRST_STAGE.section != section:
            article = "an" if section[0] in "aeiou" else "a"
            raise ConfigError(
                f"--{option} goes with {article} {section}, which {paper} has none of"
            )
    aside = args.stats or args.codes
    parts = {name: getattr(args, name) for name in PARTS if getattr(args, name) is not None}
    for name in parts:
        if name not in PAPERS[paper].PARTS:
            raise ConfigError(f"--{name}: {paper} has no {name}")
    if PAPERS[paper].FIRST_STAGE.paper != paper:
        convert_generator(paper, source, args.tokenizer, aside, out, hints, parts)
        return
    if args.tokenizer is not None:
        raise ConfigError("--tokenizer goes with generators; a tokenizer is named by --from")
    free(out)
    write_first_stage(read_first_stage(paper, source, hints, aside), out)


def make_parser() -> Parser:
    """Make the parser of all options; its help explains them."""
    indent = " " * 11
    reads = "\n".join(
        f"  {name:8s} {textwrap.indent(cls.READS, indent).lstrip()}"
        if len(name) <= 8
        else f"  {name}\n{textwrap.indent(cls.READS, indent)}"
        for name, cls in PAPERS.items()
    )
    about = "Turn an official checkpoint into one that experiments.sample takes."
    parser = Parser(COMMAND, about, EPILOG.format(reads=reads))
    kinds = {cls.FIRST_STAGE.paper: cls.FIRST_STAGE.section for cls in PAPERS.values()}
    alone = {paper: f" ({kind} alone)" for paper, kind in kinds.items()}
    options = {
        "from": "the official file, or a diffusers folder",
        "tokenizer": "its tokenizer: official, or of this suite",
        "codes": "new ids of its codes: a table, or a folder of cached tokens, of which the codes "
        "that occur are kept",
        "stats": "mean and std of an autoencoder's latents (latents_stats.pt); without, an "
        "official one's latents are not normalised",
        "prior": "Paella: the diffusion prior (prior_v1.pt), from a text to image vectors",
        "out": "X.safetensors; the tokenizer goes beside it",
    }
    papers = ", ".join(f"{name}{alone.get(name, '')}" for name in PAPERS)
    parser.add_argument("--paper", metavar="NAME", help=papers)
    for name, text in options.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
    return parser


def read_first_stage(
    paper: str, source: Path, hints: Mapping[str, Any], aside: Path | None
) -> FirstStage:
    """Read a tokenizer or autoencoder, of this suite or an official one.

    Args:
        paper: a key of PAPERS.
        source: file, or diffusers folder.
        hints: what the tensors do not say, by the dotted keys of its settings.
        aside: new ids of its codes, or the statistics of its latents; of a folder of cached tokens
            the codes that occur are kept.

    Raises:
        ConfigError: no such file, one of unknown layout, or one that says otherwise than `hints`.
    """
    from lightning_modules.registry import FIRST_STAGES

    more = reading(aside, lambda: counted(aside, source)) if aside and aside.is_dir() else aside
    state, config = reading(source, lambda: PAPERS[paper].reader()(source, hints, more))
    for key, value in hints.items():
        found: Any = config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if key.partition(".")[0] in config and found != value:
            raise ConfigError(f"{key} is {found} in the file, not {value}")
    module = reading(source, lambda: FIRST_STAGES[paper].from_export(state, config))
    return FirstStage(source, module, state, config)


def counted(cache: Path, tokenizer: Path) -> Tensor:
    """Count how often every code [K] occurs in a folder of tokens that `tokenizer` made.

    Raises:
        ValueError: tokens of another tokenizer.
    """
    from data.cache import count_tokens

    made = read_index(cache)["made"]
    sha256 = file_hash(tokenizer) if tokenizer.is_file() else None
    return count_tokens(cache, made["num_codes"] or 0, sha256)


def write_first_stage(stage: FirstStage, out: Path) -> None:
    """Write a tokenizer or autoencoder and say what it is."""
    save(out, stage.state, stage.config)
    say = speaker()
    say(f"{stage.name} {stage.source}: {stage.kind} -> {out}")
    std = getattr(stage.module, "latent_std", None)
    if std is not None and bool((std == 1).all()):
        say("its latents are not normalised; --stats names the file of their mean and std")


def convert_generator(
    paper: str,
    source: Path,
    tokenizer: Path | None,
    aside: Path | None,
    out: Path,
    hints: Mapping[str, Any],
    parts: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Convert a generator with its first stage and write both, and a text encoder it came with.

    What the tensors do not say comes from the paper's scale `paper`, then from `hints`.

    Args:
        paper: a key of PAPERS.
        source: file, or diffusers folder.
        tokenizer: its first stage; None takes the one that came along.
        aside: what `read_first_stage` takes besides.
        out: the file to write.
        hints: what a user said, by dotted keys.
        parts: files of further weights by name.

    Raises:
        ConfigError: an unfit file, files that do not belong together, or `out` exists.
    """
    beside = out.with_name(f"{out.stem}.tokenizer.safetensors")
    text = out.with_name(f"{out.stem}.text.safetensors")
    others = {name: out.with_name(f"{out.stem}.{name}.safetensors") for name in parts}
    for file in (out, beside, text, *others.values()):
        free(file)
    read = {
        name: reading(path, partial(PAPERS[paper].part_reader(name), path))
        for name, path in parts.items()
    }
    found: Foreign = reading(source, lambda: PAPERS[paper].reader()(source, hints))
    tokenizer = tokenizer or found.tokenizer
    if tokenizer is None:
        raise ConfigError("--tokenizer is missing; a generator works with its tokenizer alone")
    for key, value in found.settings:
        if key in hints and hints[key] != value:
            raise ConfigError(f"{key} is {value} in {source}, not {hints[key]}")
    kind = PAPERS[paper].FIRST_STAGE
    section = kind.section
    own = {
        k.removeprefix(f"{section}."): v for k, v in hints.items() if k.startswith(f"{section}.")
    }
    stage = read_first_stage(kind.paper, tokenizer, own, aside)
    pairs = [(f"{section}.ckpt", str(tokenizer)), *found.settings, *found.defaults]
    if found.text:
        pairs.append(("text.path", text.name))
    if found.side is not None:
        pairs.append(("data.resolution", found.side * stage.module.factor))
    scale = file_pairs(PAPERS[paper], scale_file(paper, "paper"))
    config = fill(PAPERS[paper], [*scale, *pairs, *hints.items()])
    plain = plain_settings(paper, config, stage.module, found)
    check(config, plain, found, source, stage.module, read)
    write_first_stage(stage, beside)
    say = speaker()
    for name, (tensors, settings) in read.items():
        save(others[name], tensors, settings)
        size = sum(v.numel() for v in tensors.values())
        say(f"{name} {parts[name]}: {size:,} parameters -> {others[name]}")
    if read:
        named_parts = {n: {"file": p.name, "sha256": file_hash(p)} for n, p in others.items()}
        write_json(out.with_suffix(".json"), {"parts": named_parts})
    if found.text and plain["text"]["path"] == text.name:
        save(text, found.text, {"paper": "clip"})
        say(f"text encoder {source} -> {text}")
    named = {"file": beside.name, "sha256": file_hash(beside)}
    save(out, found.state, {**plain, "tokenizer": named})
    count, (height, width) = sum(v.numel() for v in found.state.values()), plain["grid"]
    say(f"{found.what} {source}: {count:,} parameters, {height}x{width} tokens -> {out}")
    say(f'try: python -m experiments.sample --ckpt {out} --prompt "..."')


def plain_settings(paper: str, config: Any, module: Any, found: Foreign) -> dict[str, Any]:
    """Return what the generator's module is made of.

    Raises:
        ConfigError: a resolution that the first stage cannot halve, or of more tokens than the
            generator has positions for.
    """
    from lightning_modules.registry import GENERATORS

    resolution, factor = config.data.resolution, module.factor
    side, rest = divmod(resolution, factor)
    if rest:
        raise ConfigError(f"data.resolution must be a multiple of {factor}, got {resolution}")
    if found.places is not None and side * side > found.places:
        raise ConfigError(
            f"data.resolution={resolution} gives {side}x{side} tokens, and {found.what} has "
            f"positions for {found.places}; set data.resolution to the size it was trained at"
        )
    own = {f.name for f in dataclasses.fields(GENERATORS[paper].config_class)}
    return {
        "paper": paper,
        "seed": 0,
        "grid": [side, side],
        "num_codes": getattr(module, "num_codes", None),
        **{name: value for name, value in resolved(config).items() if name in own},
    }


def check(
    config: Any,
    plain: dict[str, Any],
    found: Foreign,
    source: Path,
    first_stage: Any,
    parts: Mapping[str, tuple[State, dict[str, Any]]],
) -> None:
    """Check that the tensors fit the module and the first stage, without memory for a second copy.

    Raises:
        ConfigError: they do not.
    """
    import torch

    from lightning_modules.registry import GENERATORS

    if found.num_codes != plain["num_codes"]:
        raise ConfigError(
            f"{source} was trained on {found.num_codes} codes and the tokenizer has "
            f"{plain['num_codes']}; they do not belong together, or --codes says which of the "
            "codes it was trained on"
        )
    height, width = plain["grid"]
    channels = getattr(first_stage, "channels", None)
    geometry = Geometry((height, width), plain["num_codes"], channels, first_stage.factor)
    try:
        config.check_fit(geometry)
        config.check_sampling(config.sampling, geometry)
        with torch.device("meta"):
            module = GENERATORS[plain["paper"]].assemble(
                {k: v.to("meta") for k, v in found.state.items()},
                plain,
                {n: ({k: v.to("meta") for k, v in t.items()}, s) for n, (t, s) in parts.items()},
                str(source),
            )
        module.attach(first_stage)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def free(out: Path) -> None:
    """Refuse a file that exists.

    Raises:
        ConfigError: it does.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")


def save(out: Path, state: State, config: dict[str, Any]) -> None:
    """Write a file of weights.

    Raises:
        ConfigError: its folder or disk takes none.
    """
    from lightning_modules.common.checkpoint import save_weights

    try:
        save_weights(out, state, config)
    except (OSError, SafetensorError) as error:
        raise ConfigError(blame(out, error, "cannot be written")) from error


def reading(source: Path, read: Callable[[], Any]) -> Any:
    """Turn what can go wrong with a foreign file into one line that names it.

    Raises:
        ConfigError: it did.
    """
    try:
        return read()
    except (FileNotFoundError, ConfigError) as error:
        raise ConfigError(first_line(error)) from error
    except KeyError as error:
        raise ConfigError(f"{source} lacks {error}, which a file of its kind has") from error
    except ValueError as error:
        raise ConfigError(blame(source, error)) from error
    except (SafetensorError, EOFError, OSError, RuntimeError) as error:
        raise ConfigError(blame(source, error, "is no readable checkpoint")) from error


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
