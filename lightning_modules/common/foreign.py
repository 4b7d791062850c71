"""Foreign checkpoints: what a paper's reader returns, and the checks that all readers share."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from lightning_modules.common.checkpoint import load_strict, load_weights
from lightning_modules.common.settings import build

State = dict[str, Tensor]
Settings = list[tuple[str, Any]]
Hints = Mapping[str, Any] | None
Converted = tuple[State, dict[str, Any]]
"""What `from_export` of a first stage takes."""

PAD_IDS = {"!": 0, "<|endoftext|>": 49407}  # of CLIP's tokens, those that texts are filled with


@dataclass
class Foreign:
    """A generator as it was found."""

    what: str
    """Its name, for a person."""
    num_codes: int | None
    """Codes of the tokenizer that it was trained on; None on continuous latents."""
    settings: Settings
    """What the tensors say: (dotted key of the paper's settings, value)."""
    defaults: Settings
    """The same, where a user may say otherwise."""
    state: State
    """Its tensors by the names of the paper's module."""
    text: State | None = None
    """A CLIP text encoder that came with it, by OpenAI's names."""
    tokenizer: Path | None = field(default=None, kw_only=True)
    """File or folder where its first stage came along."""
    side: int | None = field(default=None, kw_only=True)
    """Tokens along a side that it was trained on, where the file says it."""
    places: int | None = field(default=None, kw_only=True)
    """Most tokens that it has positions for; None is any number."""


def section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what has keys under `name.`, by the rest of them: hints, or tensors of a part."""
    return {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}


def read_settings(file: Path) -> dict[str, Any]:
    """Read the JSON mapping beside a network; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping, it holds a {type(content).__name__}")
    return content


def read_suite(source: Path, paper: str) -> Converted | None:
    """Read the first stage of a file of this suite; None for a file of others."""
    if source.suffix != ".safetensors" or not source.is_file():
        return None
    try:
        state, config = load_weights(source)
    except ValueError:  # no settings in it
        return None
    if config.get("paper") != paper:
        raise ValueError(f"{source} is a checkpoint of {config.get('paper')}, not of {paper}")
    return state, config


def trained_side(settings: Mapping[str, Any]) -> int | None:
    """Return the token grid's side that a diffusers config.json says (sample_size)."""
    side = settings.get("sample_size")
    if side is not None and (type(side) is not int or side < 1):
        raise ValueError(f"sample_size must be a whole number of at least 1, got {side!r}")
    return side


def pad_id(folder: Path) -> int:
    """Return the id that a CLIP tokenizer's folder pads texts with; without a word, the end."""
    token = read_settings(folder / "tokenizer_config.json").get("pad_token", "<|endoftext|>")
    token = token.get("content") if isinstance(token, Mapping) else token
    if token not in [*PAD_IDS]:
        raise ValueError(
            f"pad_token of {folder} must be one of {[*PAD_IDS]}, got {token!r}; give text.pad_id"
        )
    return PAD_IDS[token]


def shape(state: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size:
    """Return the shape of a tensor that a checkpoint must have, of so many dimensions."""
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    found = state[key].shape
    if len(found) != ndim or 0 in found:
        raise ValueError(f"{key} must have {ndim} dimensions, none of 0, got {list(found)}")
    return found


def count(keys: Iterable[str], prefix: str, least: int = 0) -> int:
    """Return how many numbered children `prefix` has: one more than the largest number.

    Raises:
        ValueError: fewer than `least`, or a number that so few keys cannot have.
    """
    pattern, keys = re.compile(re.escape(prefix) + r"\.(\d+)\."), [*keys]
    found = 1 + max((int(m[1]) for k in keys if (m := pattern.match(k))), default=-1)
    if found < least:
        raise ValueError(f"the checkpoint lacks {prefix}.{found}")
    if found > len(keys):
        raise ValueError(f"the checkpoint has {prefix}.{found - 1}, but not all before it")
    return found


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Check values against the types of the dataclass `cls`, but for names that it lacks."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            hint = hints[name]
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def typed(cls: type, values: Mapping[str, Any]) -> Any:
    """Make the dataclass `cls` from plain values whose types are checked."""
    check_types(cls, values)
    return build(cls, values)


def _is(value: Any, hint: Any) -> bool:
    options, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return value in options
    if origin in (Union, UnionType):
        return any(_is(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(_is(v, options[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def fitted(network: Callable[[], nn.Module], state: Mapping[str, Tensor], what: str) -> State:
    """Return tensors in the precision of the network that they belong to.

    The network, which takes no memory, must have all of them, of their shapes and kinds of number;
    `what` names the file or part in the message.
    """
    with torch.device("meta"):
        empty = network()
    load_strict(empty, {k: v.to("meta") for k, v in state.items()}, what)
    own = empty.state_dict()
    return {k: numbers(k, v, own[k].dtype) for k, v in state.items()}


def numbers(name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of finite real (or whole) numbers in the precision that it is used in."""
    real = value.is_floating_point()
    if value.is_complex() or real != dtype.is_floating_point:
        wanted = "real" if dtype.is_floating_point else "whole"
        raise ValueError(f"{name} must hold {wanted} numbers, got {value.dtype}")
    value = value.to(dtype)
    if real and not value.is_meta and not bool(value.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite")
    return value
