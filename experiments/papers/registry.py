"""The papers by name, and the checked settings of a run from YAML and `key=value` words."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cached import read_index
from data.config import DataConfig
from data.corpora import BROUGHT, corpora
from experiments.papers.autoencoder import AutoencoderRun
from experiments.papers.base import GeneratorRun, RunSettings
from experiments.papers.first_stage import FirstStageKind
from experiments.papers.improved_vqd import ImprovedVQDRun
from experiments.papers.ldmae import LDMAERun
from experiments.papers.muse import MuseRun
from experiments.papers.paella import PaellaRun
from experiments.papers.sections import FirstStageSection
from experiments.papers.vq_diffusion import VQDiffusionRun
from experiments.papers.vqgan import VQGANRun
from experiments.pipeline.ranks import launched
from experiments.settings import ConfigError, file_pairs, fill, parse_overrides, pick

# settings of data that a run says itself: they are compared with those of its cache, or are none
OWN = ("path", "cache", "resolution", "crop", "flip", "shuffle_buffer", "workers", "max_skipped")
Pairs = Sequence[tuple[str, Any]]
CONFIGS = Path(__file__).parents[1] / "configs"
PAPERS: dict[str, type[RunSettings]] = {
    "vqgan": VQGANRun,
    "paella": PaellaRun,
    "vq_diffusion": VQDiffusionRun,
    "improved_vqd": ImprovedVQDRun,
    "muse": MuseRun,
    "autoencoder": AutoencoderRun,
    "ldmae": LDMAERun,
}


def scales(paper: str) -> list[str]:
    """Names of the paper's scales: the YAML files of configs/<paper>, smallest first."""
    known = ["micro", "tiny", "small", "paper"]
    names = [path.stem for path in (CONFIGS / paper).glob("*.yaml")]
    return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


def header(paper: str, scale: str) -> list[str]:
    """Comment lines at the top of a scale's YAML, without the '#'."""
    lines = scale_file(paper, scale).read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("#").strip() for line in lines[:end]]


def scale_file(paper: str, scale: str) -> Path:
    """Path of a scale's YAML; `scale` may also be the path of a YAML file.

    Raises:
        ConfigError: neither a scale of this paper nor a file.
    """
    if scale.endswith((".yaml", ".yml")):
        if not Path(scale).is_file():
            raise ConfigError(f"--scale {scale}: there is no such file")
        return Path(scale)
    return CONFIGS / paper / f"{pick('--scale', scale, scales(paper))}.yaml"


def load(paper: str, scale: str = "tiny", overrides: Sequence[str] = ()) -> RunSettings:
    """Make the checked settings of one run.

    Later layers win: defaults of the dataclasses, the first stage's preset, the scale's YAML, the
    command line.

    Args:
        paper: a key of PAPERS.
        scale: a YAML of configs/<paper>, by name, or a path.
        overrides: words `key=value` or `--key=value`, the last one wins.

    Raises:
        ConfigError: unknown paper, scale or key; wrong type, range or combination.
    """
    cls = PAPERS[pick("--paper", paper, list(PAPERS))]
    yaml, line = file_pairs(cls, scale_file(paper, scale)), parse_overrides(cls, overrides)
    preset = []
    if issubclass(cls, GeneratorRun):
        preset = _first_stage_preset(cls.FIRST_STAGE, yaml, line)
    layers = with_cache(yaml, line)
    words = dict(layers[1])
    config = fill(cls, [*preset, *with_corpus(paper, *layers)])
    if words.get("data.root") and words.get("data.shards"):
        raise ConfigError("data.root and data.shards exclude each other; set one")
    asked = words.get("data.name", config.data.name)
    if asked != config.data.name:  # shards that are set win over any name
        shards = config.data.shards
        raise ConfigError(f"data={asked} and data.shards={shards} exclude each other; set one")
    _follow_launcher(config)
    return config


def with_cache(yaml: Pairs, line: Pairs) -> tuple[Pairs, Pairs]:
    """Put the data that a cache was made of above the scale's own, where data.path names one.

    Raises:
        ConfigError: there is no cache.
    """
    chosen = dict([*yaml, *line])
    path = chosen.get("data.path")
    if path is None:
        return yaml, line
    try:
        made_of = read_index(path)["about"]["data"]
    except (ValueError, KeyError) as error:
        told = f"{path} does not say what it was made of" if isinstance(error, KeyError) else error
        raise ConfigError(f"data.path: {told}") from error
    known = {f.name for f in dataclasses.fields(DataConfig)}
    brought = [(f"data.{k}", v) for k, v in made_of.items() if k in known and k not in OWN]
    return [*yaml, *brought], [pair for pair in line if pair != ("data.name", "cache")]


def with_corpus(paper: str, yaml: Pairs, line: Pairs) -> list[tuple[str, Any]]:
    """Put what a corpus brings below the layer that names it, so that a user's words win.

    Where the line names other data than the scale, what the scale says of its own gives way.
    """
    asked, own = dict(line).get("data.name"), dict(yaml).get("data.name")
    corpus = corpora().get(asked or own or "")
    settings = {} if corpus is None else corpus.settings(paper)
    brought = [(f"data.{name}", value) for name, value in settings.items()]
    if asked in (None, own):
        return [*brought, *yaml, *line]
    given_way = [(f"data.{name}", None) for name in ("root", "shards", "val_shards", *BROUGHT)]
    return [*yaml, *given_way, *brought, *line]


def _follow_launcher(config: RunSettings) -> None:
    """Train on all processes that torchrun or srun started.

    Raises:
        ConfigError: the settings say another number of them.
    """
    there, trainer = launched(), config.trainer
    if there is None or there == (trainer.devices, trainer.num_nodes):
        return
    devices, nodes = there
    if (trainer.devices, trainer.num_nodes) != (1, 1):
        raise ConfigError(
            f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes} disagree "
            f"with the launcher, which started {devices} processes on each of {nodes} nodes; leave "
            "both out, or make them equal"
        )
    trainer.devices, trainer.num_nodes = devices, nodes


def _first_stage_preset(
    kind: FirstStageKind,
    yaml: Sequence[tuple[str, Any]],
    line: Sequence[tuple[str, Any]],
) -> list[tuple[str, Any]]:
    """Settings of the first stage's section that its preset's YAML gives."""
    at = kind.section
    chosen = dict([*yaml, *line])
    name = chosen.get(f"{at}.preset", FirstStageSection.preset)
    name = pick(f"{at}.preset", str(name), scales(kind.paper))
    ckpt = chosen.get(f"{at}.ckpt", FirstStageSection.ckpt)
    given = (f"{at}.preset", f"{at}.ckpt")
    idle = [k for k, _ in line if k.startswith(f"{at}.") and k not in given]
    if ckpt is not None and idle:
        raise ConfigError(
            f"{idle[0]} has no effect while {at}.ckpt={ckpt} is taken as it is; "
            f"add {at}.ckpt=null to train the {at}"
        )
    # of the YAML of a run, what its first stage's section has too
    section = (*(f.name for f in dataclasses.fields(kind.config)), "trainer")
    pairs = file_pairs(PAPERS[kind.paper], CONFIGS / kind.paper / f"{name}.yaml")
    return [(f"{at}.{k}", v) for k, v in pairs if k.partition(".")[0] in section]
