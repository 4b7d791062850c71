"""The stages of a run, and what the result of each depends on.

A stage's key is made of the settings that can change its result and of the keys of the stages it
builds on. So `sampling.steps` re-trains nothing, and all papers share one tokenizer.
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from data.config import DataConfig
from experiments.config import (
    CODECS,
    CodecSection,
    MuseRun,
    RunSettings,
    StackedRun,
    TrainerConfig,
    UserError,
    resolved,
    stage_key,
)
from experiments.store import Say, Stage

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "tokenizer": ROOT / "lightning_modules" / "vqgan" / "shipped",
    "autoencoder": ROOT / "lightning_modules" / "ldmae" / "shipped",
}
JUDGES = ROOT / "eval" / "weights"
LPIPS_SCENES = JUDGES / "lpips-32px-2objects.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: scores by name, and the paths of its files."""

    scores: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def plan(paper: str, config: RunSettings) -> list[Stage]:
    """Return the stages of a run with their keys, in order; light, nothing is started."""
    stages = [Stage("data", _data_key(config))]
    data = stages[0].key
    codec = _codec_key(config, data)
    stages.append(Stage(config.CODEC, codec))
    if not isinstance(config, StackedRun):
        e = config.eval
        score = stage_key(
            [e.prompts, e.bootstrap, e.seed, e.grid], _judges(config), _lpips(config),
            upstream=[data, codec],
        )  # fmt: skip
        stages.append(Stage("score", score))
    else:
        pictures = _pictures(config)
        source = [data, codec]
        if config.data.cache:
            cache = stage_key(pictures, upstream=source)
            stages.append(Stage("cache", cache))
            source = [cache, codec]
        else:
            pictures |= {"workers": config.data.workers, "buffer": config.data.shuffle_buffer}
        train = stage_key(
            paper, sections(config), config.trainer, config.seed,
            None if config.data.cache else pictures,
            *([] if config.start is None else [_hash(config.start, "init.ckpt")]), upstream=source,
        )  # fmt: skip
        stages.append(Stage("train", train))
        if upscales(config):
            stages += _superres(config, train, codec)
        e = config.eval
        sample = stage_key(
            _sampling(config), [e.prompts, e.heldout, e.seed, e.traces],
            upstream=[data, stages[-1].key],
        )  # fmt: skip
        drawn = [Stage("sample", sample)]
        if e.edits and config.data.name == "scenes":
            edits = stage_key(_sampling(config), [e.edits, e.seed], upstream=[stages[-1].key])
            drawn.append(Stage("edits", edits))
        score = stage_key(
            [e.bootstrap, e.seed, e.grid], _judges(config), _lpips(config),
            upstream=[stage.key for stage in drawn],
        )  # fmt: skip
        stages += [*drawn, Stage("score", score)]
    report = stage_key(paper, resolved(config), upstream=[stages[-1].key])
    return [*stages, Stage("report", report)]


def upscales(config: RunSettings) -> TypeGuard[MuseRun]:
    """Say whether a run trains a super-resolution stage on top of its generator."""
    return isinstance(config, MuseRun) and config.superres.enabled


def _superres(config: MuseRun, train: str, codec: str) -> list[Stage]:
    """Return what is done between the training of the base and the sampling of both stages."""
    stage = config.superres
    high = dataclasses.replace(config, data=high_data(config))
    if stage.tokenizer is not None:
        codec = stage_key(codec, _hash(Path(stage.tokenizer), "superres.tokenizer"))
    pictures = _pictures(high)
    if not config.data.cache:
        pictures |= {"workers": config.data.workers, "buffer": config.data.shuffle_buffer}
    pairs = stage_key(config.data.cache, pictures, upstream=[_data_key(high), codec])
    # the picture's own tokens are there without the base
    source = [pairs, train] if stage.low == "predicted" else [pairs]
    superres = stage_key(
        stage, config.text, on_machine(config, config.superres_trainer), config.seed,
        upstream=source,
    )  # fmt: skip
    joined = stage_key(upstream=[train, superres])
    return [Stage("pairs", pairs), Stage("superres", superres), Stage("joined", joined)]


def high_data(config: MuseRun) -> DataConfig:
    """Return the settings of the same data at the resolution of the super-resolution stage."""
    resolution = config.data.resolution * config.superres.factor
    return dataclasses.replace(config.data, resolution=resolution)


def _hash(path: Path, setting: str) -> str:
    if not path.is_file():
        raise UserError(f"{setting}: there is no file {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def codec_section(config: RunSettings) -> CodecSection:
    """Return the settings that train the codec, wherever this run keeps them."""
    if isinstance(config, StackedRun):
        return getattr(config, config.CODEC)
    _, settings, section = CODECS[config.CODEC]
    names = [f.name for f in dataclasses.fields(settings)]
    own = {name: getattr(config, name) for name in [*names, "trainer"]}
    return section(ckpt=None, **own)


def codec_file(config: RunSettings) -> Path | None:
    """Return the finished codec that a run names, None where it is to be trained.

    Raises:
        UserError: the file is not there.
    """
    codec, section = config.CODEC, codec_section(config)
    if section.ckpt is None:
        return None
    shipped = SHIPPED[codec] / f"{section.preset}.safetensors"
    path = shipped if section.ckpt == "shipped" else Path(section.ckpt)
    if not path.is_file():
        if section.ckpt != "shipped":
            raise UserError(f"{codec}.ckpt: there is no file {path}")
        have = ", ".join(sorted(p.stem for p in SHIPPED[codec].glob("*.safetensors")))
        raise UserError(
            f"{codec}.ckpt: none ships for the preset {section.preset} (shipped: {have}); "
            f"add {codec}.ckpt=null to train it"
        )
    return path


def lpips_file(config: RunSettings) -> Path | None:
    """Return the weights of the codec's perceptual term; `shipped` are those made of scenes.

    Raises:
        UserError: there is nothing at that path.
    """
    objective: Any = codec_section(config).objective  # type: ignore[attr-defined]
    if objective.lpips_path is None:
        return None
    path = LPIPS_SCENES if objective.lpips_path == "shipped" else Path(objective.lpips_path)
    if not path.exists():
        raise UserError(f"objective.lpips_path: there is no file or folder {path}")
    return path


def _data_key(config: RunSettings) -> str:
    data = config.data
    names = ["name", "resolution", "seed", "max_objects", "train_size", "val_size", "heldout_size"]
    if data.name != "shards":
        return stage_key({name: getattr(data, name) for name in names})
    from data.shards import expand_shards

    shards = {}
    for name in ("shards", "val_shards"):
        try:
            paths = expand_shards(getattr(data, name) or [])
        except ValueError as error:
            raise UserError(f"data.{name}: {error}") from error
        # a shard that was replaced is another shard, also one of the same size
        status = [(os.path.abspath(p), os.stat(p)) for p in paths]
        shards[name] = [(path, s.st_size, s.st_mtime_ns) for path, s in status]
    return stage_key(shards, data.val_size)


def _pictures(config: RunSettings) -> dict[str, Any]:
    """Settings, besides those of the data's own key, that change a training sample's pixels."""
    left_out = {"workers", "max_skipped", "shuffle_buffer", "cache", "shards", "val_shards"}
    plain = dataclasses.asdict(config.data)
    return {k: v for k, v in plain.items() if k not in left_out}


def _codec_key(config: RunSettings, data: str) -> str:
    section, path = codec_section(config), codec_file(config)
    pictures = _pictures(config)
    if path is not None:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        if config.CODEC == "tokenizer":
            return stage_key(content)
        # the statistics of its latents are those of this run's pictures
        return stage_key(content, config.seed, pictures, upstream=[data])
    loader = {"workers": config.data.workers, "buffer": config.data.shuffle_buffer}
    settings = [getattr(section, f.name) for f in dataclasses.fields(CODECS[config.CODEC].config)]
    finetune = getattr(section, "finetune", None)
    if finetune is not None:
        settings.append(_hash(Path(finetune), "finetune"))
    return stage_key(
        *settings, _lpips(config), codec_trainer(config, section), config.seed, pictures | loader,
        upstream=[data],
    )  # fmt: skip


def codec_trainer(config: RunSettings, section: CodecSection) -> TrainerConfig:
    """Return how long the section says, on the devices of the run's own trainer section."""
    return on_machine(config, section.trainer)


def on_machine(config: RunSettings, trainer: TrainerConfig) -> TrainerConfig:
    """Return another trainer's settings with the devices of the run's own."""
    machine = ("accelerator", "devices", "num_nodes", "strategy", "progress")
    return dataclasses.replace(trainer, **{name: getattr(config.trainer, name) for name in machine})


def sections(config: StackedRun) -> dict[str, Any]:
    """Return the paper's own sections as plain containers, without the sampling loop's."""
    shared = {config.CODEC, *config.LATER, *(f.name for f in dataclasses.fields(StackedRun))}
    names = [f.name for f in dataclasses.fields(config)]
    plain = resolved(config)
    return {name: plain[name] for name in names if name not in shared and name != "sampling"}


def _sampling(config: StackedRun) -> dict[str, Any]:
    return resolved(config)["sampling"]


def _judges(config: RunSettings) -> list[str]:
    """Fingerprints of the shipped judges, for data that is judged."""
    if config.data.name != "scenes":
        return []
    return [
        hashlib.sha256(p.read_bytes()).hexdigest()
        for kind in ("clip", "judge")
        for p in sorted(JUDGES.glob(f"{kind}-*.safetensors"))
    ]


def _lpips(config: RunSettings) -> list[str]:
    """Fingerprints of the weights of LPIPS, where a run names any."""
    path = lpips_file(config)
    files = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()]


def run(
    paper: str, scale: str, config: RunSettings, out: Path, *, command: str, say: Say
) -> Outcome:
    """Do every stage of a run whose result does not stand yet, and publish the results.

    Args:
        paper: a key of RUNS.
        scale: name of the scale, for titles.
        config: the checked settings.
        out: the run folder.
        command: what was typed, for the report.
        say: gets one line per event.

    Returns:
        Scores and files; nothing on other ranks than the first.

    Raises:
        UserError: something the user can put right, in one sentence.
    """
    from experiments.work import Work

    try:
        return Work(paper, scale, config, out, command, say).everything()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UserError(f"{error.strerror or error}{where}") from error
    except ValueError as error:
        # a worker process passes its error on with a traceback in front
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
