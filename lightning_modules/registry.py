"""The papers by name, and their checkpoints as modules that are ready to use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.files import file_hash
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.common.foreign import read_settings
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.improved_vqd.module import ImprovedVQDModule
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.module import LDMAEModule
from lightning_modules.muse.module import MuseModule
from lightning_modules.paella.module import PaellaModule
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from lightning_modules.vqgan.module import VQGANModule

FIRST_STAGES: dict[str, type[VQGANModule] | type[AutoencoderModule]] = {
    "vqgan": VQGANModule,
    "autoencoder": AutoencoderModule,
}
GENERATORS: dict[str, type[GeneratorModule]] = {
    "paella": PaellaModule,
    "vq_diffusion": VQDiffusionModule,
    "improved_vqd": ImprovedVQDModule,
    "muse": MuseModule,
    "ldmae": LDMAEModule,
}
CHECKPOINT = "checkpoint.safetensors"
"""Beside a checkpoint X.safetensors may stand X.json, which says what it works with, each key
optional: `first_stage` {file, sha256}, `sampling` settings, `parts` name -> {file, sha256} of
further weights, `further` name -> {file, sha256} of further first stages. Files are named from
its folder."""


def load_first_stage(
    path: Path | str, device: torch.device | str = "cpu", paper: str | None = None
) -> Any:
    """Load a tokenizer or an autoencoder (or its Lightning checkpoint), frozen and in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of FIRST_STAGES, or another than `paper`.
    """
    state, config = load_weights(path)
    found = str(config.get("paper"))
    if found not in FIRST_STAGES or paper not in (None, found):
        wanted = {None: "a first stage", "autoencoder": "an autoencoder"}.get(paper, "a tokenizer")
        raise ValueError(f"{path} is a checkpoint of {found}, not {wanted}")
    module = FIRST_STAGES[found].from_export(state, config)
    return module.eval().requires_grad_(False).to(device)


def load_generator(
    path: Path | str,
    first_stage: Path | str | None = None,
    device: torch.device | str = "cpu",
    paper: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> GeneratorModule:
    """Load a generator with its first stages attached, frozen and in eval mode.

    Args:
        path: a generator's checkpoint of this suite, or the run folder that holds it.
        first_stage: its first stage's file; by default the one that the settings beside the
            checkpoint name, or else the checkpoint.
        device: where everything goes.
        paper: sample it as this paper does, which must be its own or one that adopts it.
        sampling: settings in place of those beside it, which stand before the checkpoint's.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: not a generator, one of another paper than asked for, a first stage or a part
            that it was not trained with, or unknown settings.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT
    state, config = load_weights(path)
    trained = str(config.get("paper"))
    if trained not in GENERATORS:
        what = ", a first stage, which draws nothing alone," if trained in FIRST_STAGES else ","
        papers = ", ".join(GENERATORS)
        raise ValueError(f"{path} is a checkpoint of {trained}{what} not of {papers}")
    beside, config = read_settings(path.with_suffix(".json")), _text_beside(config, path.parent)
    noted, further = beside.get("sampling", {}), beside.get("further", {})
    cls = GENERATORS.get(paper or trained)
    if cls is GENERATORS[trained]:
        parts = {
            name: load_weights(_find(path, named, f"part {name}"))
            for name, named in beside.get("parts", {}).items()
        }
        module = cls.assemble(state, config, parts, str(path))
        module.config.sampling = module.settings(noted)
    elif cls is not None and trained in cls.ADOPTS:
        config = {**config, "sampling": {**config.get("sampling", {}), **noted}}
        module = cls.adopt(state, config)
    else:
        raise ValueError(f"{path} is a checkpoint of {trained}, which {paper} cannot sample")
    module.config.sampling = module.settings(sampling or {})
    # "tokenizer" in files from before there were other first stages
    named = beside.get("first_stage", config.get("first_stage", config.get("tokenizer")))
    if named is None:
        other = path.with_suffix(".json").name
        raise ValueError(f"neither {path} nor a {other} beside it names its first stage")
    others = {
        name: load_first_stage(_find(path, further.get(name, own), f"first stage {name}"), device)
        for name, own in module.further_first_stages().items()
    }
    found = _find(path, named, "first stage", first_stage)
    module.attach(load_first_stage(found, device), **others)
    return module.eval().requires_grad_(False).to(device)


def _find(
    checkpoint: Path, named: Mapping[str, str], what: str, given: Path | str | None = None
) -> Path:
    """Find a file that a checkpoint names from its folder, or is given, by its content."""
    found = Path(given) if given is not None else checkpoint.parent / named["file"]
    if not found.is_file():
        way = " or name it with --tokenizer" if what == "first stage" else ""
        raise FileNotFoundError(
            f"{checkpoint} needs its {what}, and there is no {found}; copy it there{way}"
        )
    # a decoder that was trained further shows the same tokens
    if named["sha256"] != file_hash(found):
        if named["sha256"] != load_weights(found)[1].get("tokens_of"):
            raise ValueError(f"{found} is not the {what} that {checkpoint} was trained with")
    return found


def _text_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Find a text encoder's file that lies beside the checkpoint and is named without a folder."""
    given = config.get("text")
    text: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    path = text.get("path")
    if not isinstance(path, str) or not (folder / path).is_file():
        return config
    return {**config, "text": {**text, "path": str(folder / path)}}
