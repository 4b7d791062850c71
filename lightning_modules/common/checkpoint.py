"""Weights in and out: safetensors with their settings, Lightning files, and foreign checkpoints."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.files import atomic


def save_weights(path: Path | str, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors, and the plain settings that rebuild their module, as one safetensors file.

    It appears whole or not at all. Tensors that share storage are written one by one; the settings
    are JSON in the file's metadata under "config".
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(config)})


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and plain settings of a file of this suite or of a Lightning checkpoint.

    Raises:
        ValueError: a file that this suite did not write.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as f:
                text = (f.metadata() or {}).get("config")
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable checkpoint: {error}") from error
        if text is None:
            raise ValueError(
                f"{path} holds no settings of this suite; make it with experiments.convert"
            )
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds settings that are no mapping; make it anew")
        return load_file(path), config
    content = _mapping(_load_pickle(path))
    config = _mapping(content.get("hyper_parameters")).get("config")
    state = content.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, Mapping):
        raise ValueError(
            f"{path} is not a checkpoint of this suite; experiments.convert reads official files"
        )
    return dict(state), config


class _Inert:
    """Stands in for a foreign class while a checkpoint is read; keeps nothing, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Dict:
    """Stands in for a foreign kind of dict: a plain one, which the reader fills."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class _List(list):
    """Stands in for a foreign kind of list, which the reader fills."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


CONTAINERS = {"defaultdict": _Dict, "AttributeDict": _Dict, "deque": _List}


def load_foreign(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of an official checkpoint without running anything it contains.

    Accepts a .safetensors, .pt, .pth, .bin or .ckpt file, or a diffusers folder, also one whose
    weights are split in several files. The tensors may lie bare or under `state_dict` or `model`;
    a `module.` prefix of all names is dropped. Classes that a Lightning or numpy pickle names are
    replaced by inert stand-ins, or by plain containers.

    Returns:
        Tensors by their foreign names.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a file without tensors, or with such as hold no plain numbers.
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
    """Read the one tensor of a foreign file, bare or under a name, as safely as `load_foreign`."""
    content = _load_any(Path(path))
    found = [*_tensors({"it": content} if isinstance(content, Tensor) else content).values()]
    if len(found) != 1:
        raise ValueError(f"{path} must hold one tensor, it holds {len(found)}")
    return found[0]


def load_entries(path: Path | str) -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of an official training file, as safely as `load_foreign` does.

    Returns:
        Tensors by entry (`model`, `ema`, ...) and by foreign name; the bare tensors of a file, if
        it has any, under the empty name.
    """
    content = _load_any(Path(path))
    parts = {"": content, **{str(k): v for k, v in _mapping(content).items()}}
    found = {k: _tensors(v) for k, v in parts.items()}
    return {k: v for k, v in found.items() if v}


def _mapping(content: Any) -> Mapping[Any, Any]:
    return content if isinstance(content, Mapping) else {}


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, without the `module.` that all of their names may begin with."""
    state = {str(k): v.detach() for k, v in _mapping(content).items() if isinstance(v, Tensor)}
    for name, value in state.items():
        kinds = {"nested": value.is_nested, "quantized": value.is_quantized, "meta": value.is_meta}
        kind = next((k for k, found in kinds.items() if found), str(value.layout))
        if kind != str(torch.strided):
            raise ValueError(f"{name} is a tensor of kind {kind}; save it as a plain one")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def _load_any(path: Path) -> Any:
    """What a foreign file, or the weights of a folder, hold."""
    files = _weights(path) if path.is_dir() else [path]
    parts = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        parts.append(load_file(file) if file.suffix == ".safetensors" else _load_pickle(file))
    return parts[0] if len(parts) == 1 else {k: v for part in parts for k, v in part.items()}


def _weights(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or all that its index names; safetensors go first."""
    for kind in ("safetensors", "bin"):
        whole = [p for p in folder.glob(f"*.{kind}") if not re.search(r"-\d+-of-\d+$", p.stem)]
        if whole:
            return [max(whole) if kind == "safetensors" else min(whole)]
        indices = sorted(folder.glob(f"*.{kind}.index*.json"))
        if indices:
            return _shards(indices[-1])
    raise FileNotFoundError(f"{folder} holds no .safetensors or .bin weights")


def _shards(index: Path) -> list[Path]:
    """The files that an index of weights names, all in its own folder."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: it has no weight_map") from error
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} must name files of its own folder in weight_map")
    return [index.parent / name for name in sorted(names)]


def _load_pickle(path: Path) -> Any:
    with open(path, "rb") as f:
        zipped = f.read(4) == b"PK\x03\x04"
    # files from before torch 1.6 (VGG16, LPIPS) are no zip; their classes cannot be listed
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([_stand_in(name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, LookupError, EOFError, TypeError) as error:
        found = re.search(r"class '([\w.]+)'|GLOBAL ([\w.]+)", str(error))
        what = f": it holds a {found[1] or found[2]}" if found else ""
        raise ValueError(f"{path} is no checkpoint that can be read safely{what}") from error


def _stand_in(name: str) -> Any:
    """What takes the place of a foreign class: (class, its full name)."""
    module, _, last = name.rpartition(".")
    return type(last, (CONTAINERS.get(last, _Inert),), {"__module__": module}), name


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load `state` into `module`; every key and shape must fit.

    Raises:
        ValueError: they do not; `what` names the file or part.
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
