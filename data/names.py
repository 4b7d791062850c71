"""Under which names corpora keep their texts, labels, scores and splits."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# the words that `datasets` takes for a split in the names of files and folders
SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@cache
def corpora_yaml() -> Mapping[str, Any]:
    """Return data/corpora.yaml."""
    from omegaconf import OmegaConf

    path = Path(__file__).with_name("corpora.yaml")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content


@cache
def aliases(what: str) -> tuple[str, ...]:
    """Return the names under which something is kept, see aliases in corpora.yaml."""
    return tuple(corpora_yaml()["aliases"][what])


def aliased(what: str, row: Mapping[str, Any]) -> Any:
    """Return the value of a row under the first of its names that says something, else None."""
    return next((v for name in aliases(what) if (v := row.get(name)) not in (None, "", [])), None)


def number(what: str, row: Mapping[str, Any]) -> float:
    """Return the first number that a row holds under the names of something, else nan."""
    for name in aliases(what):
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            return float(row[name])
    return float("nan")


def texts(value: Any) -> tuple[str, ...]:
    """Return the captions that a text, a list of texts, or of {"raw": text} and the like, holds."""
    several = value if isinstance(value, (list, tuple)) else [value]
    inner = [
        aliased("caption", v) or v.get("raw") if isinstance(v, Mapping) else v for v in several
    ]
    return tuple(" ".join(t.split()) for t in inner if isinstance(t, str) and t.strip())


def split_of(names: Iterable[str]) -> str:
    """Return train, val or test as the names of folders or files say; "" where they do not.

    A word counts where neither a letter stands before nor after it.
    """
    for name in names:
        words = re.split(r"[\W_\d]+", name.lower())
        for split, known in SPLITS.items():
            if any(word in words for word in known):
                return split
    return ""
