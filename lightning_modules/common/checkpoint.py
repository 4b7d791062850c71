"""Weights in and out: safetensors with their settings, Lightning files, and foreign checkpoints."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(path: Path | str, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and the settings that rebuild their module as one safetensors file.

    Args:
        path: the file; it appears whole or not at all.
        state: tensors by name.
        config: plain containers, stored as JSON in the file's metadata under "config".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, temporary, metadata={"config": json.dumps(config)})
    temporary.chmod(0o644)  # safetensors keeps files from everybody else
    os.replace(temporary, path)


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and settings from a safetensors file of this suite or a Lightning checkpoint.

    Returns:
        The tensors by name and the plain settings.

    Raises:
        ValueError: a file that this suite did not write.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            config = (f.metadata() or {}).get("config")
        if config is None:
            raise ValueError(
                f"{path} holds no settings of this suite; make it with experiments.convert"
            )
        return load_file(path), json.loads(config)
    content = _load_pickle(path)
    if not isinstance(content, dict) or "config" not in content.get("hyper_parameters", {}):
        raise ValueError(
            f"{path} is not a checkpoint of this suite; experiments.convert reads official files"
        )
    return content["state_dict"], content["hyper_parameters"]["config"]


def file_hash(path: Path | str) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _Inert:
    """Stands in for a foreign class while a checkpoint is read; keeps nothing, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_foreign(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of an official checkpoint without running anything it contains.

    Accepts a .safetensors, .pt, .pth, .bin or .ckpt file, or a diffusers folder. The tensors may
    lie bare or under `state_dict` or `model`; a `module.` prefix of all names is dropped. Classes
    that a Lightning or numpy pickle names are replaced by inert stand-ins.

    Returns:
        Tensors by their foreign names.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a file without tensors.
    """
    content = _load_any(Path(path))
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = _tensors(content)
    if not state:
        raise ValueError(f"{path} holds no tensors")
    return state


def load_tensor(path: Path | str) -> Tensor:
    """Read the one tensor of a foreign file, bare or under a name, as safely as `load_foreign`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none, or several.
    """
    content = _load_any(Path(path))
    found = [content] if isinstance(content, Tensor) else [*_tensors(content).values()]
    if len(found) != 1:
        raise ValueError(f"{path} must hold one tensor, it holds {len(found)}")
    return found[0]


def load_entries(path: Path | str) -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of an official training file by the names of their entries.

    Returns:
        Tensors by entry (`model`, `ema`, ...) and by foreign name; the bare tensors of a file, if
        it has any, under the empty name. Read as safely as `load_foreign` does.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
    """
    content = _load_any(Path(path))
    parts = content if isinstance(content, Mapping) else {}
    found = {str(k): _tensors(v) for k, v in parts.items() if isinstance(v, Mapping)}
    return {k: v for k, v in {"": _tensors(content), **found}.items() if v}


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, without the `module.` that all of their names may begin with."""
    entries = content if isinstance(content, Mapping) else {}
    state = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def _load_any(path: Path) -> Any:
    """What a foreign file, or the weights file of a folder, holds."""
    if path.is_dir():
        candidates = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
        if not candidates:
            raise FileNotFoundError(f"{path} holds no .safetensors or .bin weights")
        path = candidates[-1] if candidates[-1].suffix == ".safetensors" else candidates[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)


def _load_pickle(path: Path) -> Any:
    with open(path, "rb") as f:
        zipped = f.read(4) == b"PK\x03\x04"
    # files from before torch 1.6 (VGG16, LPIPS) are no zip; their classes cannot be listed
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        stubs = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, IndexError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read safely") from error


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load `state` into `module`; every key must fit.

    Args:
        module: the network to fill.
        state: tensors by the module's own names.
        what: the name of the file or part, for the message.

    Raises:
        ValueError: missing or left-over keys, or a tensor of another shape.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    problems = [
        f"{len(keys)} {kind}, first {keys[0]!r}"
        for kind, keys in (("missing", missing), ("left over", extra), ("of wrong shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{what} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state))
