"""Settings as dataclasses: filled from YAML and key=value words, listed and compared.

Every mistake becomes a one-line `ConfigError`, before any work. Types are checked by OmegaConf,
which nothing outside this file sees.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

NULLS = ("null", "None", "~", "")
T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right; commands print it as one line and exit with 1."""


class ConfigError(UserError):
    """A setting that cannot be; commands print it as one line and exit with 2."""


def fill(base: Any, pairs: Sequence[tuple[str, Any]]) -> Any:
    """Set dotted keys on a config class or instance and check the whole.

    Args:
        base: a config dataclass, or an instance of one, which stays as it is.
        pairs: (dotted key, value), later ones win.

    Raises:
        ConfigError: wrong type, range or combination.
    """
    cls = base if isinstance(base, type) else type(base)
    node = deepcopy(_structured(cls)) if base is cls else OmegaConf.structured(base)
    _set(cls, node, pairs)
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(str(error).splitlines()[0]) from error
    return _build(cls, plain)


@cache
def _structured(cls: type) -> Any:
    return OmegaConf.structured(cls)  # slower than a copy of it


def override(config: T, words: Sequence[str], section: str = "") -> T:
    """Return a copy of any config dataclass with `key=value` words applied.

    Args:
        config: an instance; it stays as it is.
        words: `key=value` or `--key=value`.
        section: where `config` stands: with "sampling", `sampling.steps=8` sets `config.steps`.

    Raises:
        ConfigError: unknown key, wrong type or range.
    """
    if section:
        holder = dataclasses.make_dataclass(
            "Holder", [(section, type(config), field(default_factory=lambda: config))]
        )
        return getattr(override(holder(), words), section)
    return fill(config, parse_overrides(type(config), words))


def parse_overrides(cls: type, words: Sequence[str]) -> list[tuple[str, Any]]:
    """Turn `key=value` words into (dotted key, value) pairs by the types of `cls`.

    `section=word` means `section.name=word` where the section has a name, or fills it from the
    preset of that name; a name in a section's ALIASES sets all settings that it stands for; `None`
    means null.

    Raises:
        ConfigError: a word without '=', an unknown key, a value that is no YAML.
    """
    pairs: list[tuple[str, Any]] = []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("--")
        if not equals:
            if word.startswith("-"):
                near = _near(key, _keys(cls))
                raise ConfigError(f"unknown option {word}; {near or 'settings are key=value'}")
            raise ConfigError(f"{word!r} is not a setting; write key=value")
        for name in _meant(cls, key):
            hint = _hint(cls, name)
            section = _section(hint)
            if section is None:
                pairs.append((name, _parse(name, text, hint)))
            else:
                value: Any = _yaml(name, text) if text.lstrip().startswith("{") else text
                pairs.extend(_leaves(cls, section, value, name))
    return pairs


def file_pairs(cls: type, path: Path) -> list[tuple[str, Any]]:
    """Read a YAML file as (dotted key, value) pairs of the config class `cls`.

    Raises:
        ConfigError: no readable YAML, a key that `cls` does not have, a wrong type.
    """
    return list(_file_pairs(cls, path, path.stat().st_mtime_ns))


@cache  # a sweep reads the same few files for every one of its runs
def _file_pairs(cls: type, path: Path, mtime_ns: int) -> tuple[tuple[str, Any], ...]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(f"{path}: no readable YAML: {' '.join(str(error).split())}") from error
    try:
        pairs = tuple(_leaves(cls, cls, content or {}, ""))
        _set(cls, deepcopy(_structured(cls)), pairs)
        return pairs
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def resolved(config: Any) -> dict[str, Any]:
    """Return the config as nested plain containers."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the config as YAML, in the order of its fields."""
    return OmegaConf.to_yaml(OmegaConf.create(resolved(config)))


class Difference(NamedTuple):
    """One setting that two configs do not share."""

    key: str
    mine: Any
    theirs: Any


def diff(config: Any, other: Any) -> list[Difference]:
    """List the settings in which two configs of one class differ."""
    mine, theirs = _flat(resolved(config)), _flat(resolved(other))
    keys = [*mine, *(k for k in theirs if k not in mine)]
    return [Difference(k, mine.get(k), theirs.get(k)) for k in keys if mine.get(k) != theirs.get(k)]


class Setting(NamedTuple):
    """One line of the list of settings."""

    key: str
    type: str
    default: Any
    help: str


def describe(config: Any) -> list[Setting]:
    """List every setting of a config (or of a config class with its defaults)."""
    config = config() if isinstance(config, type) else config
    return list(_describe(config, ""))


def pick(what: str, given: str, allowed: Sequence[str]) -> str:
    """Return `given` if it is allowed.

    Raises:
        ConfigError: it is not; names what was given, the nearest name and all allowed ones.
    """
    if given in allowed:
        return given
    near = _near(given, allowed)
    names = ", ".join(allowed)
    raise ConfigError(f"{what}: {given!r} is not one of {names}" + (f"; {near}" if near else ""))


def _set(cls: type, node: Any, pairs: Sequence[tuple[str, Any]]) -> None:
    """Set keys of an OmegaConf node, types checked."""
    for key, value in pairs:
        hint = _hint(cls, key)
        problem = _wrong(hint, value)
        if problem is None:
            try:
                OmegaConf.update(node, key, value, merge=False)
            except OmegaConfBaseException:
                problem = f"expected {_type_name(hint)}, got {value!r}"
        if problem is not None:
            raise ConfigError(f"{key}: {problem}")


def _build(cls: type, plain: Any, at: str = "") -> Any:
    """Make plain dataclasses and call `check` of the whole; errors get the setting's full name."""
    hints = _fields(cls)
    values: dict[str, Any] = {}
    for key, value in plain.items():
        section = _section(hints[key])
        values[key] = _build(section, value, f"{at}{key}.") if section and value else value
    try:
        made = cls(**values)
        if not at and hasattr(made, "check"):
            made.check()
        return made
    except ValueError as error:
        message = str(error)
        known = message.partition(" ")[0].partition(".")[0] in hints
        raise ConfigError(
            f"{at}{message}" if known or not at else f"{at[:-1]}: {message}"
        ) from error


def _leaves(root: type, section: type, value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Walk what a section is set to; yields (dotted key, value) of single settings."""
    if isinstance(value, str):
        presets = getattr(root, "PRESETS", {}).get(at)
        if presets is not None:
            preset = presets[pick(at, value, list(presets))]
            value = preset if isinstance(preset, Mapping) else resolved(preset)
        elif "name" in _fields(section):
            value = {"name": value}
    if not isinstance(value, Mapping):
        keys = ", ".join(_fields(section))
        raise ConfigError(f"{at} is a section, got {value!r}; set one of its keys: {keys}")
    for key, inner in value.items():
        dotted = f"{at}.{key}" if at else str(key)
        inside = _section(_hint(root, dotted))
        if inside is None:
            yield dotted, inner
        else:
            yield from _leaves(root, inside, inner, dotted)


def _hint(cls: type, dotted: str) -> Any:
    """Type of a setting.

    Raises:
        ConfigError: no such setting; names the nearest.
    """
    hint: Any = cls
    for name in dotted.split("."):
        section = _section(hint)
        if section is None or name not in _fields(section):
            near = _near(dotted, _keys(cls))
            raise ConfigError(f"unknown setting {dotted!r}" + (f"; {near}" if near else ""))
        hint = _fields(section)[name]
    return hint


def _meant(cls: type, dotted: str) -> list[str]:
    """Return the settings that a name stands for by the ALIASES of its section, else the name."""
    at, _, last = dotted.rpartition(".")
    section: Any = cls
    for name in at.split(".") if at else []:
        section = _section(_fields(section).get(name))
        if section is None:
            return [dotted]
    names = getattr(section, "ALIASES", {}).get(last, (last,))
    return [f"{at}.{name}" if at else name for name in names]


def _near(given: str, allowed: Sequence[str]) -> str:
    """Say which allowed name was probably meant; empty where none is near."""
    ends = [a for a in allowed if a.rpartition(".")[2] == given]
    close = ends or difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if not close:  # the end of the name may be near although its section is missing or wrong
        by_end = {a.rpartition(".")[2]: a for a in reversed(allowed)}
        last = difflib.get_close_matches(given.rpartition(".")[2], list(by_end), n=1, cutoff=0.7)
        close = [by_end[last[0]]] if last else []
    return f"did you mean {' or '.join(close[:3])}?" if close else ""


def _keys(cls: type, at: str = "") -> list[str]:
    """Dotted names of all settings and sections."""
    names: list[str] = []
    for name, hint in _fields(cls).items():
        names.append(f"{at}{name}")
        section = _section(hint)
        if section is not None:
            names += _keys(section, f"{at}{name}.")
    return names


@cache
def _fields(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _section(hint: Any) -> type | None:
    """The dataclass in a type, also inside an Optional."""
    return next((o for o in _options(hint) if dataclasses.is_dataclass(o)), None)  # type: ignore[return-value]


def _words(hint: Any) -> list[Any]:
    """The allowed values of a Literal, also inside an Optional."""
    return [word for o in _options(hint) if get_origin(o) is Literal for word in get_args(o)]


def _type_name(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            names += [str(word) for word in get_args(option)]
        elif get_origin(option) is list:
            names.append(f"list of {_type_name(get_args(option)[0])}")
        else:
            names.append(
                "null" if option is type(None) else getattr(option, "__name__", str(option))
            )
    return " | ".join(names)


def _wrong(hint: Any, value: Any) -> str | None:
    """Say what OmegaConf would accept or explain badly: null, words, and text made of a number."""
    options = _options(hint)
    words = _words(hint)
    if value is None:
        return None if type(None) in options else f"may not be null, expected {_type_name(hint)}"
    if words and value not in words:
        near = _near(str(value), [str(w) for w in words])
        expected = f"expected one of {', '.join(map(str, words))}; got {value!r}"
        return f"{expected}; {near}" if near else expected
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if options[0] is str and not isinstance(value, str):
        return f"expected {_type_name(hint)}, got {value!r}"
    return None


def _parse(key: str, text: str, hint: Any) -> Any:
    """Read the text of one setting by its type; text for text is taken as it stands."""
    options = _options(hint)
    if text in NULLS and (type(None) in options or (text and str not in options)):
        return None
    words = {str(word): word for word in _words(hint)}
    if words:
        return words.get(text, text)
    return text if str in options else _yaml(key, text)


def _yaml(key: str, text: str) -> Any:
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(f"{key}: cannot read the value {text!r}") from error


def _flat(plain: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{at}{key}.")
        else:
            flat[f"{at}{key}"] = value
    return flat


def _describe(config: Any, at: str) -> Iterator[Setting]:
    cls: Any = type(config)
    docs = _docs(cls)
    for name, hint in _fields(cls).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _describe(value, f"{at}{name}.")
        else:
            yield Setting(f"{at}{name}", _type_name(hint), value, docs.get(name, ""))


@cache
def _docs(cls: Any) -> dict[str, str]:
    """Help of each field: the string literal that follows it in the source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # no source: object, or a class made at run time
            continue
        body = tree.body[0].body
        for before, after in itertools.pairwise(body):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[before.target.id] = " ".join(str(after.value.value).split())
    return docs
