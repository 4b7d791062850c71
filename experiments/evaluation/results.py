"""What a result says of itself: enough to make it again, and to see what it compares with."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cached import differences
from data.files import write_json
from eval.choices import MODES, Wanted, described
from experiments.cli import counted
from experiments.evaluation.options import Options
from experiments.evaluation.sources import Source
from experiments.pipeline.features import Features
from experiments.pipeline.prompts import list_hash
from experiments.pipeline.score import Score
from experiments.pipeline.stage import Stage
from experiments.pipeline.store import Store
from experiments.settings import ConfigError

LIBRARIES = (
    "torch",
    "torchvision",
    "pillow",
    "numpy",
    "scipy",
    "clean-fid",
    "transformers",
    "open_clip_torch",
)
STAGES = "stages.json"
FORMAT = 1


def guard(out: Path, pictures: Stage | None) -> None:
    """Refuse a folder that holds pictures of other settings.

    Raises:
        ConfigError: it does; names what differs.
    """
    if pictures is None:
        return
    try:
        before = json.loads((out / STAGES).read_text())["pictures"]
    except (OSError, ValueError, KeyError):
        before = None
    if before is None:
        if (out / "images").exists():
            raise ConfigError(
                f"--out {out} holds images/ that no evaluation made; choose another --out, or "
                "score them with --images"
            )
        return
    if before["key"] != pictures.key:
        differ = differences(before["fields"], dict(pictures.content))
        some = "; ".join(f"{name} is {a} there and {b} here" for name, a, b in differ[:3])
        raise ConfigError(f"--out {out} holds other pictures: {some}; choose another --out")


def remember(out: Path, stages: Sequence[Stage], pictures: Stage | None, cache: Path) -> None:
    """Note what the folder is made of, before any work."""
    rows = [{"name": s.name, "key": s.key, "folder": s.folder} for s in stages]
    own = None if pictures is None else {"key": pictures.key, "fields": pictures.content}
    write_json(out / STAGES, {"cache": str(cache), "stages": rows, "pictures": own})


def result(
    options: Options,
    store: Store,
    scores: Mapping[str, Any],
    made: Source,
    real: Source | None,
    measured: Sequence[Wanted],
    score: Score,
    pictures: Stage | None,
    prompts: Any,
    command: str,
) -> dict[str, Any]:
    """Return the content of result.json.

    `protocol` holds all in which two results must agree to be compared.
    """
    asked = None
    if prompts is not None:
        rows = prompts.rows(store.folders)
        keyed = [{**row, "id": row.get("id", row.get("key"))} for row in rows]
        name = getattr(getattr(prompts, "source", None), "name", None) or f"data, {prompts.split}"
        asked = {"name": name, "sha256": list_hash(keyed), "n": len(rows)}
    against = None
    if real is not None:
        against = dict(real.told)
        if hasattr(real.images, "rows"):
            against["n"] = scored(store, score, real.images)
    one = options.protocol
    return {
        "format": FORMAT,
        "command": command,
        "scores": dict(scores),
        "protocol": {
            "name": None if one is None else one.name,
            "changed": options.changed(),
            "unknown": [] if one is None else [k for k, v in one.known.items() if v == "unknown"],
            "n": scored(store, score, made.images),
            "list": asked,
            "reference": against,
            "pictures": {
                "format": made.told.get("format"),
                "prepared": made.told.get("prepared", "as they are"),
                "sizes": made.told["sizes"][:5],
            },
            "mode": {w.space: MODES[w.space] for w in measured if w.space in MODES},
            "features": {
                score: [described(w.extractor) for w in measured if w.score == score]
                for score in dict.fromkeys(w.score for w in measured)
            },
        },
        "pictures": {k: v for k, v in made.told.items() if k != "sizes"},
        "speed": speed(store, pictures),
        "versions": versions(),
    }


def scored(store: Store, score: Score, images: Any) -> int:
    """Return how many of some pictures all scores read; what cannot be read is left out."""
    pairs = [(one.made, one.reference) for one in score.sets]
    of = [f for f in itertools.chain(*pairs) if isinstance(f, Features) and f.images == images]
    return min(marker["what"]["pictures"] for marker in map(store.done, of) if marker)


def speed(store: Store, pictures: Stage | None) -> dict[str, Any]:
    """Return how fast pictures were made: by one process, whatever the number of them."""
    marker = None if pictures is None else store.done(pictures)
    if not marker or not marker.get("busy"):
        return {}
    n = marker["what"]["pictures"]
    rate = n / marker["busy"]
    return {"images_per_second_and_process": float(f"{rate:.4g}"), "made": counted(n, "picture")}


def versions() -> dict[str, str]:
    """Return the versions of Python and of all libraries that move scores."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
