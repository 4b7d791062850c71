"""Official checkpoints to ours: `python -m experiments.convert --paper NAME --from FILE`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.tokens import count_tokens
from experiments.config import CODECS, RUNS, load, resolved
from experiments.edits import first_line
from experiments.run import Parser, speaker
from experiments.settings import ConfigError, fill, parse_overrides, pick
from experiments.store import Say
from lightning_modules.common.checkpoint import (
    file_hash,
    load_entries,
    load_foreign,
    load_strict,
    load_tensor,
    load_weights,
    save_weights,
)
from lightning_modules.common.settings import build
from lightning_modules.common.text import CLIP_END
from lightning_modules.ldmae import convert as ldmae_convert
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.muse import convert as muse_convert
from lightning_modules.muse.config import PRESETS as MUSE_PRESETS
from lightning_modules.paella import convert as paella_convert
from lightning_modules.paella.config import PRESETS as PAELLA_PRESETS
from lightning_modules.registry import GENERATORS
from lightning_modules.vq_diffusion import convert as vqd_convert
from lightning_modules.vq_diffusion.config import ModelConfig as VQDModel
from lightning_modules.vqgan import convert as vqgan_convert
from lightning_modules.vqgan.module import VQGANModule
from lightning_modules.vqgan.quantizer import map_from_counts, used_from_map

COMMAND = "python -m experiments.convert"

EPILOG = f"""what can be read:
  paella   paella_v3.pt with vqgan_f4.pt, bare or under state_dict
  muse     folders of aMUSEd's pipeline (amused-256, amused-512; open-muse's too) or its
           transformer; their text encoder stays where it is
  vq_diffusion, improved_vqd
           coco_pretrained.pth, cc_learnable.pth and the like with their tokenizer and text encoder
           inside (and --codes taming_vqvae_2887.pt), and the folder of vq-diffusion-ithq
  ldmae    0100000.pt and the like, or LightningDiT's, with the autoencoder as --tokenizer
  autoencoder
           vmaef8d16.pth (VMAE); latents_stats.pt goes with --stats
  vqgan    vqgan_f4.pt, taming and latent-diffusion files, diffusers folders of VQModel and
           PaellaVQModel
Files are read without running anything in them. A key that is missing or left over is an error.

key=value words say what the tensors do not: model.nhead=[-1,16,16], tokenizer.model.norm_groups=8,
and what a checkpoint needs besides: text.path=DIR and text.clip_pretrained=FILE (text encoders),
data.resolution=256 (size it was trained at), sampling.steps=12.

examples:
  {COMMAND} --paper paella --from paella_v3.pt --tokenizer vqgan_f4.pt --out paella.safetensors
  {COMMAND} --paper improved_vqd --from coco_learnable.pth --codes taming_vqvae_2887.pt --out X
  {COMMAND} --paper muse --from amused-256 --out amused-256.safetensors
  {COMMAND} --paper vqgan --from vq-f4/model.ckpt --out vq_f4.safetensors"""

Pairs = list[tuple[str, Any]]

HOLD_TOKENIZERS = ("vq_diffusion", "improved_vqd")  # papers whose official files do


class Foreign(NamedTuple):
    """A generator as it was found."""

    what: str
    num_codes: int | None
    """Codes of the tokenizer that it was trained on; None on an autoencoder."""
    pairs: Pairs
    """Its settings: (dotted key of the paper's config, value)."""
    state: dict[str, Tensor]
    """Its tensors by the names of the paper's module."""
    text: dict[str, Tensor] | None = None
    """A CLIP text encoder that came with it, by OpenAI's names."""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (0, or 2 refused)."""
    try:
        run(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(argv: Sequence[str]) -> None:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word on the command line or an unfit file; nothing was written.
    """
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    if args.help:
        print(parser.format_help())
        return
    options = [o for action in parser._actions for o in action.option_strings]
    for word in words:
        if word.startswith("-") and "=" not in word:
            pick("option", word, options)
    for name in ("paper", "from", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing")
    codecs = [codec.paper for codec in CODECS.values()]
    pick("--paper", args.paper, [*GENERATORS, *codecs])
    pairs = parse_overrides(RUNS[args.paper], words)
    source, out = Path(getattr(args, "from")), args.out
    if out.suffix != ".safetensors":
        out = out.with_name(f"{out.name}.safetensors")
    if args.stats is not None and RUNS[args.paper].CODEC != "autoencoder":
        raise ConfigError(f"--stats goes with an autoencoder, which {args.paper} has none of")
    if args.paper in codecs:
        if args.tokenizer is not None:
            raise ConfigError("--tokenizer goes with generators; a tokenizer is named by --from")
        if args.paper == "autoencoder":
            convert_autoencoder(source, out, pairs, speaker(), args.stats)
        else:
            convert_tokenizer(source, out, pairs, speaker(), args.codes)
    else:
        tokenizer = args.tokenizer or _tokenizer_inside(args.paper, source)
        if tokenizer is None:
            raise ConfigError("--tokenizer is missing; a generator works with its tokenizer alone")
        aside = args.stats or args.codes
        convert_generator(args.paper, source, tokenizer, out, pairs, speaker(), aside)


def make_parser() -> Parser:
    """Make the parser of all options; its help explains them."""
    parser = Parser(
        prog=COMMAND,
        description="Turn an official checkpoint into one that experiments.sample takes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    papers = [*GENERATORS, *(f"{codec.paper} (a {name} alone)" for name, codec in CODECS.items())]
    add("--paper", metavar="NAME", help=", ".join(papers))
    add("--from", type=Path, metavar="PATH", help="the official file, or a diffusers folder")
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer: official, or of this suite")
    add("--codes", type=Path, metavar="PATH", help="new ids of its codes: a table, or a folder "
        "of cached tokens, of which the codes that occur are kept")  # fmt: skip
    add("--stats", type=Path, metavar="FILE", help="mean and std of an autoencoder's latents "
        "(latents_stats.pt); without, an official one's latents are not normalised")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="X.safetensors; the tokenizer goes beside it")
    add("--help", "-h", action="store_true", help="this text")
    return parser


def convert_tokenizer(
    source: Path, out: Path, pairs: Pairs, say: Say, codes: Path | None = None
) -> VQGANModule:
    """Convert a tokenizer and write it.

    Raises:
        ConfigError: an unfit file, or `out` exists.
    """
    _free(out)
    state, config = read_tokenizer(source, pairs, codes)
    module = VQGANModule.from_export(state, config)
    save_weights(out, state, config)
    count = sum(p.numel() for p in module.autoencoder.parameters())
    say(
        f"tokenizer {source}: {config['model']['network']} network, {count:,} parameters, "
        f"{module.num_codes} codes, f{module.factor} -> {out}"
    )
    return module


def convert_autoencoder(
    source: Path, out: Path, pairs: Pairs, say: Say, statistics: Path | None = None
) -> AutoencoderModule:
    """Convert an autoencoder and write it.

    Raises:
        ConfigError: an unfit file, or `out` exists.
    """
    _free(out)
    state, config = read_autoencoder(source, pairs, statistics)
    module = AutoencoderModule.from_export(state, config)
    save_weights(out, state, config)
    count = sum(p.numel() for p in module.network.parameters())
    say(
        f"autoencoder {source}: {config['kind']}, {count:,} parameters, "
        f"{module.channels} channels, f{module.factor} -> {out}"
    )
    if bool((module.latent_std == 1).all()):
        say("its latents are not normalised; --stats names the file of their mean and std")
    return module


def read_autoencoder(
    source: Path, pairs: Pairs, statistics: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an autoencoder of this suite or an official VMAE.

    Args:
        source: the file.
        pairs: ("vit.X", value) that the tensors do not say.
        statistics: file of mean and std of an official one's latents.

    Raises:
        ConfigError: no such file, one of unknown layout, or one that says otherwise than `pairs`.
    """
    hints = _section(pairs, "vit")

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if source.suffix == ".safetensors":
            try:
                state, config = load_weights(source)
            except ValueError:  # not ours
                pass
            else:
                return AutoencoderModule.from_export(state, config).export()
        stats = load_foreign(statistics) if statistics is not None else None
        return ldmae_convert.convert_vmae(load_foreign(source), hints, stats)

    state, config = _reading(source, read)
    _agree("vit", hints, config.get("vit", {}))
    return state, config


def read_tokenizer(
    source: Path, pairs: Pairs, codes: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a tokenizer of this suite or an official one.

    Args:
        source: file, or diffusers folder.
        pairs: ("model.X", value) that the tensors do not say.
        codes: file with the new id of every code, or folder of cached tokens to make it of.

    Raises:
        ConfigError: no such file, one of unknown layout, or one that says otherwise than `pairs`.
    """
    hints = _section(pairs, "model")

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if source.suffix == ".safetensors":
            try:
                state, config = load_weights(source)
            except ValueError:  # not ours
                pass
            else:
                return VQGANModule.from_export(state, config).export()
        if not hints:
            return vqgan_convert.convert_path(source)
        settings = source / "config.json"
        known = json.loads(settings.read_text()) if settings.is_file() else {}
        return vqgan_convert.convert(load_foreign(source), {**known, **hints})

    state, config = _reading(source, read)
    _agree("model", hints, config["model"])
    if codes is None:
        return state, config
    return _reading(codes, lambda: renumbered(state, config, new_ids(source, codes, config)))


def new_ids(source: Path, codes: Path, config: Mapping[str, Any]) -> Tensor:
    """Read the new id of every code [K] from a file, or count it in a folder of cached tokens.

    Raises:
        ValueError: a file of another form, or tokens of another tokenizer.
    """
    if not codes.is_dir():
        return load_tensor(codes)
    sha256 = file_hash(source) if source.is_file() else None
    return map_from_counts(count_tokens(codes, config["model"]["num_codes"], sha256))


def renumbered(
    state: dict[str, Tensor], config: dict[str, Any], ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give a tokenizer's codes new ids; those that share id 0 are no longer told apart.

    Args:
        state: the tokenizer's tensors.
        config: its settings.
        ids: [K] int64, every id of [0, max] occurring.

    Raises:
        ValueError: ids of another form, or codes that have new ids already.
    """
    model = config["model"]
    if model["used_codes"]:
        raise ValueError(f"the tokenizer keeps {model['used_codes']} of its codes already")
    if ids.dtype != torch.int64 or ids.shape != (model["num_codes"],) or int(ids.min()) < 0:
        raise ValueError(
            f"the new ids must be {model['num_codes']} whole numbers of at least 0, "
            f"got {ids.dtype} of shape {list(ids.shape)}"
        )
    used = used_from_map(ids)
    kept = {"used_codes": len(used), "unknown_code": "id", "unknown_id": 0}
    renamed = {**state, "quantize.used": used}
    return VQGANModule.from_export(renamed, {**config, "model": {**model, **kept}}).export()


def convert_generator(
    paper: str,
    source: Path,
    tokenizer: Path,
    out: Path,
    pairs: Pairs,
    say: Say,
    aside: Path | None = None,
) -> None:
    """Convert a generator with its tokenizer and write both, and a text encoder it came with.

    What the tensors do not say comes from the paper's scale `paper`, then from `pairs`. `aside` is
    what `read_tokenizer` or `read_autoencoder` takes besides.

    Raises:
        ConfigError: an unfit file, files that do not belong together, or `out` exists.
    """
    beside = out.with_name(f"{out.stem}.tokenizer.safetensors")
    text = out.with_name(f"{out.stem}.text.safetensors")
    for file in (out, beside, text):
        _free(file)
    found = _reading(source, lambda: FOREIGN[paper](source, pairs))
    given = dict(pairs)
    if found.text and "text.path" not in given:
        found.pairs.append(("text.path", text.name))
    for key, value in found.pairs:
        if key in given and given[key] != value:
            raise ConfigError(f"{key} is {value} in {source}, not {given[key]}")
    below = RUNS[paper].CODEC
    config = fill(load(paper, "paper"), [(f"{below}.ckpt", str(tokenizer)), *found.pairs, *pairs])

    hints = [(k.removeprefix(f"{below}."), v) for k, v in pairs if k.startswith(f"{below}.")]
    codec: VQGANModule | AutoencoderModule
    if below == "autoencoder":
        codec = AutoencoderModule.from_export(*read_autoencoder(tokenizer, hints, aside))
    else:
        codec = VQGANModule.from_export(*read_tokenizer(tokenizer, hints, aside))
    side, rest = divmod(config.data.resolution, codec.factor)
    if rest:
        raise ConfigError(f"data.resolution must be a multiple of {codec.factor}")
    own = {f.name for f in dataclasses.fields(GENERATORS[paper].config_class)}
    plain = {
        "paper": paper,
        "seed": 0,
        "grid": [side, side],
        "num_codes": getattr(codec, "num_codes", None),
        **{name: value for name, value in resolved(config).items() if name in own},
    }
    _check(paper, plain, found, source, codec)
    if below == "autoencoder":
        convert_autoencoder(tokenizer, beside, hints, say, aside)
    else:
        convert_tokenizer(tokenizer, beside, hints, say, aside)
    if found.text and plain["text"]["path"] == text.name:
        save_weights(text, found.text, {"paper": "clip"})
        say(f"text encoder {source} -> {text}")
    named = {"file": beside.name, "sha256": file_hash(beside)}
    save_weights(out, found.state, {**plain, "tokenizer": named})
    count = sum(v.numel() for v in found.state.values())
    say(f"{found.what} {source}: {count:,} parameters, {side}x{side} tokens -> {out}")
    say(f'try: python -m experiments.sample --ckpt {out} --prompt "..."')


def paella(source: Path, pairs: Pairs) -> Foreign:
    """Paella's token predictors of 2023 (v3) and 2022 (v1).

    Raises:
        ValueError: another file, or the diffusion prior, which draws no tokens.
    """
    kind, tensors, model = paella_convert.convert(
        load_foreign(source), {**_section(pairs, "v1"), **_section(pairs, "model")}
    )
    settings: Pairs = [("network", kind)]
    if kind == "prior":
        raise ValueError("this is the diffusion prior, which makes no pictures by itself")
    if kind == "v1":
        settings += [(f"v1.{k}", v) for k, v in model.items()]
        settings += [("text.name", "open_clip")]
        sampling = resolved(PAELLA_PRESETS["v1"])
        asked = {k for k, _ in pairs}
        settings += [
            (f"sampling.{k}", v) for k, v in sampling.items() if f"sampling.{k}" not in asked
        ]
    else:
        settings += [(f"model.{k}", v) for k, v in model.items()]
        if not model["clip_embd"]:
            settings += [("text.clip", None)]
    what = {"v3": "Paella's token predictor of 2023 (v3)", "v1": "Paella of 2022 (v1)"}[kind]
    own = {f"network.{k}": v for k, v in tensors.items()}
    return Foreign(what, model["num_labels"], settings, own)


def muse(source: Path, pairs: Pairs) -> Foreign:
    """aMUSEd's U-ViT: the folder of its pipeline (diffusers' or open-muse's), or the network alone.

    Raises:
        ValueError: another file.
    """
    inside = source / "transformer"
    network = inside if inside.is_dir() else source
    known, codec = _json(network / "config.json"), _json(source / "vqvae" / "config.json")
    tensors, model = muse_convert.convert(
        load_foreign(network), {**known, **_section(pairs, "uvit")}
    )
    settings: Pairs = [("network", "uvit"), *((f"uvit.{k}", v) for k, v in model.items())]
    settings += [("superres.enabled", False), ("critic.layers", 0), ("text.name", "clip")]
    settings += [("text.hidden_state", -2), ("text.unit_norm", False), ("text.projected", True)]
    asked, decoding = {k for k, _ in pairs}, resolved(MUSE_PRESETS["amused"])
    more = [(f"sampling.{k}", v) for k, v in decoding.items() if not isinstance(v, dict)]
    words = "tokenizer" if (source / "tokenizer").is_dir() else "text_encoder"
    more.append(("text.pad_id", _pad_id(_json(source / words / "tokenizer_config.json"))))
    if (source / "text_encoder").is_dir():
        more.append(("text.path", str(source / "text_encoder")))
    if "sample_size" in known:
        factor = 2 ** (len(codec.get("block_out_channels", [0] * 5)) - 1)
        more.append(("data.resolution", known["sample_size"] * factor))
    settings += [pair for pair in more if pair[0] not in asked]  # what a user may want otherwise
    own = {f"network.{k}": v for k, v in tensors.items()}
    return Foreign("aMUSEd's U-ViT", model["codebook_size"], settings, own)


def _pad_id(settings: Mapping[str, Any]) -> int:
    """What CLIP's tokenizer pads with: its end token, or the ! that OpenCLIP's settings name."""
    token = settings.get("pad_token")
    return 0 if (token.get("content") if isinstance(token, Mapping) else token) == "!" else CLIP_END


def _json(file: Path) -> dict[str, Any]:
    """The settings beside a network; none where there is no file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def vq_diffusion(source: Path, pairs: Pairs) -> Foreign:
    """VQ-Diffusion: a training file, or the Hugging Face folder.

    Raises:
        ValueError: another file, or one with the learnable null of Improved VQ-Diffusion.
    """
    found = _vq_diffusion(source, pairs)
    if found.null is not None:
        raise ValueError("this checkpoint has a learnable null: take --paper improved_vqd")
    settings, own = _diffusion_parts(source, found, pairs)
    return Foreign("VQ-Diffusion", found.model["num_codes"], settings, own, found.text)


def improved_vqd(source: Path, pairs: Pairs) -> Foreign:
    """Improved VQ-Diffusion; without a learnable null the guidance is zero-shot.

    Raises:
        ValueError: another file.
    """
    found = _vq_diffusion(source, pairs)
    settings, own = _diffusion_parts(source, found, pairs)
    more: Pairs = [("null_condition.name", "learned" if found.learnable else "empty")]
    if found.null is not None:
        own["null"] = found.null
        more += [("null_condition.length", len(found.null))]
    if found.model["condition"] != "text":  # the released code has no purity sampling for these
        more += [("sampling.order", "diffusion")]
    if found.model["condition"] == "class":  # README of the released code
        more += [("sampling.guidance", 1.5), ("sampling.truncation", 0.94)]
    elif source.is_dir():
        more += [("sampling.guidance", 5.0)]
    settings += _unasked(more, pairs)
    what = "Improved VQ-Diffusion"
    return Foreign(what, found.model["num_codes"], settings, own, found.text)


def _vq_diffusion(source: Path, pairs: Pairs) -> vqd_convert.Official:
    state, known = vqd_convert.load(source)
    return vqd_convert.convert(state, {**known, **_section(pairs, "model")})


def _diffusion_parts(
    source: Path, found: vqd_convert.Official, pairs: Pairs
) -> tuple[Pairs, dict[str, Tensor]]:
    """Settings and tensors that both papers have."""
    settings: Pairs = [(f"model.{k}", v) for k, v in found.model.items()]
    if found.mask_rate is not None:
        settings.append(("schedule.mask_rate", found.mask_rate))
    if found.model["condition"] == "text":
        more: Pairs = [("text.name", "clip")]
        if (source / "text_encoder").is_dir():
            more.append(("text.path", str(source / "text_encoder")))
        settings += _unasked(more, pairs)
    own = {f"network.{k}": v for k, v in found.network.items()}
    steps = build(VQDModel, found.model).diffusion_steps
    for ours, theirs in (("loss_history", "Lt_history"), ("loss_count", "Lt_count")):
        own[ours] = found.statistics.get(theirs, torch.zeros(steps))
    return settings, own


def _unasked(settings: Pairs, pairs: Pairs) -> Pairs:
    """Those of the settings that the command line does not say otherwise."""
    asked = {k for k, _ in pairs}
    return [pair for pair in settings if pair[0] not in asked]


def ldmae(source: Path, pairs: Pairs) -> Foreign:
    """The diffusion model of LDMAE, or LightningDiT's; the average where a file has one.

    Raises:
        ValueError: another file.
    """
    tensors = ldmae_convert.dit_entry(load_entries(source))
    tensors, model = ldmae_convert.convert_dit(tensors, _section(pairs, "model"))
    settings: Pairs = [(f"model.{k}", v) for k, v in model.items()]
    settings.append(("condition", "label" if model["num_classes"] > 1 else "none"))
    if not model["class_dropout_prob"] and "sampling.guidance" not in dict(pairs):
        settings.append(("sampling.guidance", 1.0))
    own = {f"network.{k}": v for k, v in tensors.items()}
    return Foreign("LDMAE's diffusion model", None, settings, own)


FOREIGN: dict[str, Callable[[Path, Pairs], Foreign]] = {
    "paella": paella,
    "vq_diffusion": vq_diffusion,
    "improved_vqd": improved_vqd,
    "muse": muse,
    "ldmae": ldmae,
}


def _check(paper: str, plain: dict[str, Any], found: Foreign, source: Path, codec: Any) -> None:
    """Check that the tensors fit the module and the tokenizer, without memory for a second copy."""
    num_codes = plain["num_codes"]
    if found.num_codes != num_codes:
        raise ConfigError(
            f"{source} was trained on {found.num_codes} codes and the tokenizer has {num_codes}; "
            "they do not belong together, or --codes says which of the codes it was trained on"
        )
    try:
        with torch.device("meta"):
            module = GENERATORS[paper](plain)
        load_strict(module, {k: v.to("meta") for k, v in found.state.items()}, str(source))
        module.attach(codec)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def _tokenizer_inside(paper: str, source: Path) -> Path | None:
    """The tokenizer that came with a generator, in its folder or in the same file."""
    for name in ("vqvae", "vae"):  # of diffusers, of open-muse
        if (source / name).is_dir():
            return source / name
    return source if paper in HOLD_TOKENIZERS and source.is_file() else None


def _section(pairs: Pairs, name: str) -> dict[str, Any]:
    return {k.removeprefix(f"{name}."): v for k, v in pairs if k.startswith(f"{name}.")}


def _agree(section: str, hints: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, value in hints.items():
        if found.get(name) != value:
            raise ConfigError(f"{section}.{name} is {found.get(name)} in the file, not {value}")


def _free(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")


def _reading(source: Path, read: Callable[[], Any]) -> Any:
    """Turn what can go wrong with a foreign file into one line that names it."""
    try:
        return read()
    except (FileNotFoundError, ConfigError) as error:
        raise ConfigError(first_line(error)) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{source}: {first_line(error)}") from error
    except (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ConfigError(f"{source} is no readable checkpoint: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
