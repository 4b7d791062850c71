"""The papers by name, and their checkpoints as modules that are ready to use."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import file_hash, load_strict, load_weights
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.improved_vqd.module import ImprovedVQDModule
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.module import LDMAEModule
from lightning_modules.muse.module import MuseModule
from lightning_modules.paella.module import PaellaModule
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from lightning_modules.vqgan.module import VQGANModule

TOKENIZERS: dict[str, type[VQGANModule] | type[AutoencoderModule]] = {
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


def load_tokenizer(
    path: Path | str, device: torch.device | str = "cpu", paper: str | None = None
) -> Any:
    """Load a tokenizer or an autoencoder (or its Lightning checkpoint), frozen and in eval mode.

    Args:
        path: its file.
        device: where it goes.
        paper: which of TOKENIZERS it must be; None takes any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another checkpoint.
    """
    state, config = load_weights(path)
    found = str(config.get("paper"))
    if found not in TOKENIZERS or paper not in (None, found):
        wanted = "an autoencoder" if paper == "autoencoder" else "a tokenizer"
        raise ValueError(f"{path} is a checkpoint of {found}, not {wanted}")
    module = TOKENIZERS[found].from_export(state, config)
    return module.eval().requires_grad_(False).to(device)


def load_generator(
    path: Path | str,
    tokenizer: Path | str | None = None,
    device: torch.device | str = "cpu",
    paper: str | None = None,
) -> GeneratorModule:
    """Load a generator with its tokenizer attached, frozen and in eval mode.

    Args:
        path: a generator's checkpoint of this suite.
        tokenizer: its tokenizer file; by default the file that the checkpoint names, beside it.
        device: where both go.
        paper: sample it as this paper does; improved_vqd takes checkpoints of vq_diffusion, too.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: not a generator, one of another paper than asked for, or another tokenizer than
            it was trained on.
    """
    state, config = load_weights(path)
    trained = str(config.get("paper"))
    if trained not in GENERATORS:
        raise ValueError(f"{path} is a checkpoint of {trained}, not of {', '.join(GENERATORS)}")
    found = _tokenizer_of(Path(path), config["tokenizer"], tokenizer)
    config = _text_beside(config, Path(path).parent)
    module: GeneratorModule
    if (trained, paper) == ("vq_diffusion", "improved_vqd"):
        module = ImprovedVQDModule.from_plain(state, config)
    elif paper not in (None, trained):
        raise ValueError(f"{path} is a checkpoint of {trained}, which {paper} cannot sample")
    else:
        module = GENERATORS[trained](config)
        load_strict(module, state, str(path))
    module.attach(load_tokenizer(found, device))
    high = config.get("high", {}).get("tokenizer")
    if high is not None and isinstance(module, MuseModule):  # super-resolution with its own
        own = load_tokenizer(_tokenizer_of(Path(path), high), device)
        module.attach(module.tokenizer, own)
    return module.eval().requires_grad_(False).to(device)


def _tokenizer_of(path: Path, named: dict[str, str], given: Path | str | None = None) -> Path:
    """Find the tokenizer that a checkpoint names, beside it or as it is given."""
    found = Path(given) if given is not None else path.parent / named["file"]
    if not found.is_file():
        raise FileNotFoundError(
            f"{path} needs its tokenizer {named['file']}, which is not beside it; "
            "copy it there or name it with --tokenizer"
        )
    # a decoder that was trained further shows the same tokens
    if named["sha256"] not in (file_hash(found), load_weights(found)[1].get("tokens_of")):
        raise ValueError(f"{found} is not the tokenizer that {path} was trained on")
    return found


def _text_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Find a text encoder's file that lies beside the checkpoint and is named without a folder."""
    text = config.get("text")
    if not text or "path" not in text or not (folder / text["path"]).is_file():
        return config
    return {**config, "text": {**text, "path": str(folder / text["path"])}}


def generator_file(
    module: GeneratorModule, tokenizer: Path, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_weights` writes for a generator whose tokenizer lies beside it.

    Args:
        module: the trained generator.
        tokenizer: its tokenizer file, for the hash.
        name: the tokenizer's file name beside the checkpoint.
    """
    state, config = module.export()
    return state, {**config, "tokenizer": {"file": name, "sha256": file_hash(tokenizer)}}
