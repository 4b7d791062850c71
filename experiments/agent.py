"""Parameters of a run that a W&B agent starts: as the agent's file gives them, whatever the words.

A sweep's command passes its parameters in one of several forms, of which some lose something: a
bare `--flag` for true and nothing for false, a Python dict for nested parameters, a JSON file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.settings import ConfigError

PARAMETERS = "WANDB_SWEEP_PARAM_PATH"
"""Environment variable in which an agent names the file of a run's parameters."""
MACROS = {"args", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_json_file"}
"""Forms of parameters in a sweep's command that `with_parameters` understands."""


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Return `--key=value` words of settings; nested tables become dotted keys."""
    return [f"--{key}={text_of(value)}" for key, value in flat(settings)]


def text_of(value: Any) -> str:
    """Write a value as W&B's agent puts it on the command line."""
    return str(value)


def flat(settings: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of the leaves of nested tables."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def with_parameters(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Replace what an agent made of its parameters by `--key=value` words, which come last.

    Args:
        words: the command line.
        environment: names the file, which holds {name: {"value": value}}, where an agent started
            this run; else the words stay as they are.

    Raises:
        ConfigError: the file cannot be read.
    """
    if PARAMETERS not in environment:
        return list(words)
    path = Path(environment[PARAMETERS])
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        given = {name: at["value"] for name, at in content.items() if name != "wandb_version"}
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(
            f"{PARAMETERS} names {path}, which holds no parameters of a sweep; unset it to run "
            "without an agent"
        ) from error
    made = {f"{end}{name}={value}" for name, value in given.items() for end in ("--", "")}
    made |= {f"--{name}" for name, value in given.items() if value is True}
    made |= {str(path.with_suffix(".json")), json.dumps(given)}
    return [*(word for word in words if word not in made), *words_of(given)]
