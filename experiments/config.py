"""The settings of every paper's run: dataclasses, filled from a scale's YAML and key=value words.

Later layers win: defaults of the dataclasses, the tokenizer preset, the scale's YAML, the command
line. A new paper is one dataclass here and one line in RUNS.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from data.config import DataConfig
from experiments.settings import (
    ConfigError,
    UserError,
    describe,
    diff,
    file_pairs,
    fill,
    override,
    parse_overrides,
    pick,
    resolved,
    stage_key,
    to_yaml,
)
from lightning_modules.improved_vqd.config import PRESETS as IMPROVED_PRESETS
from lightning_modules.improved_vqd.config import ImprovedVQDConfig, check_released
from lightning_modules.ldmae.config import (
    AUTOENCODER_LOSSES,
    AUTOENCODER_OBJECTIVES,
    AUTOENCODER_OPTIM,
    DIT_MODELS,
    DIT_SAMPLING,
    AutoencoderConfig,
    LDMAEConfig,
)
from lightning_modules.muse.config import MODELS as MUSE_MODELS
from lightning_modules.muse.config import PRESETS as MUSE_PRESETS
from lightning_modules.muse.config import SUPERRES_MODELS, UVIT_MODELS, MuseConfig
from lightning_modules.paella.config import MODELS as PAELLA_MODELS
from lightning_modules.paella.config import PRESETS as PAELLA_PRESETS
from lightning_modules.paella.config import PaellaConfig
from lightning_modules.vq_diffusion.config import MODELS as VQD_MODELS
from lightning_modules.vq_diffusion.config import OBJECTIVES as VQD_OBJECTIVES
from lightning_modules.vq_diffusion.config import PRESETS as VQD_PRESETS
from lightning_modules.vq_diffusion.config import SCHEDULES as VQD_SCHEDULES
from lightning_modules.vq_diffusion.config import VQDiffusionConfig
from lightning_modules.vqgan.config import PRESETS as VQGAN_PRESETS
from lightning_modules.vqgan.config import VQGANConfig

__all__ = [
    "RUNS",
    "ConfigError",
    "UserError",
    "describe",
    "diff",
    "load",
    "override",
    "resolved",
    "stage_key",
    "to_yaml",
]
CONFIGS = Path(__file__).parent / "configs"
TOKENIZER_PRESETS = {
    section: {name: getattr(preset, section) for name, preset in VQGAN_PRESETS.items()}
    for section in ("model", "objective", "optim")
}
AUTOENCODER_PRESETS: dict[str, Mapping[str, Any]] = {
    "objective": {**AUTOENCODER_OBJECTIVES, **AUTOENCODER_LOSSES},
    "optim": AUTOENCODER_OPTIM,
}


@dataclass
class TrainerConfig:
    """How long and on what machine a module is trained."""

    NOT_IN_KEY: ClassVar[tuple[str, ...]] = ("log_every", "progress")

    max_steps: int = 1000
    """Training batches that each device sees; with accumulate=k there are k batches per update."""
    epoch_steps: int = 250
    """Batches per virtual epoch (at most: epochs are equal); checkpoints stand at its borders."""
    batch_size: int = 64
    """Samples per batch and device."""
    accumulate: int = 1
    """Batches whose gradients are summed before one update."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic; auto is bf16-mixed on CUDA and 32-true elsewhere."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"
    """How devices work together; auto is ddp where there are several."""
    compile: bool = False
    """Run the network through torch.compile."""
    keep_every: int = 0
    """Virtual epochs between two weights that are kept beside resume.ckpt, as
    weights-STEP.safetensors for experiments.average; 0 keeps none."""
    val_batches: int = 4
    """Batches of the validation loss after every virtual epoch; 0 for none."""
    log_every: int = 20
    """Batches between two logged points."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Progress display; auto is rich on a terminal and plain lines elsewhere."""

    def __post_init__(self) -> None:
        names = ("max_steps", "epoch_steps", "batch_size", "accumulate", "devices", "num_nodes")
        for name in (*names, "log_every"):
            _at_least(self, name, 1)
        for name in ("keep_every", "val_batches"):
            _at_least(self, name, 0)

    @property
    def epochs(self) -> tuple[int, int]:
        """Number and length of the virtual epochs; their product is exactly max_steps.

        The length is the largest that divides max_steps and does not exceed epoch_steps; where
        that is less than half of epoch_steps, the whole training is one epoch.
        """
        for length in range(min(self.epoch_steps, self.max_steps), self.epoch_steps // 2, -1):
            if self.max_steps % length == 0:
                return self.max_steps // length, length
        return 1, self.max_steps

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes


@dataclass
class EvalConfig:
    """What is sampled and scored."""

    prompts: int = 512
    """Prompts (or images, for a tokenizer) of the val split that are scored."""
    heldout: int = 256
    """Prompts with attribute combinations that training never shows; 0 where there are none."""
    batch_size: int = 64
    """Samples made or scored at once; changes no picture."""
    seed: int = 0
    """Seed of the pictures: prompt i is drawn with seed + i."""
    bootstrap: int = 1000
    """Resamples behind each score's 95 % interval."""
    grid: int = 64
    """Pictures in samples.png."""
    traces: int = 4
    """Prompts whose tokens are shown step by step in the report."""
    edits: int = 0
    """Scenes of which one half is generated anew for a changed caption, and scored; 0 for none."""

    def __post_init__(self) -> None:
        _at_least(self, "prompts", 2)
        for name in ("batch_size", "bootstrap", "grid"):
            _at_least(self, name, 1)
        for name in ("heldout", "seed", "traces", "edits"):
            _at_least(self, name, 0)


@dataclass
class RunSettings:
    """What every paper's run has."""

    NOT_IN_KEY: ClassVar[tuple[str, ...]] = ("logger", "cache")
    CODEC: ClassVar[str] = "tokenizer"  # what is trained first, a key of CODECS
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {}  # section -> name -> its dataclass

    seed: int = 0
    """Seed of initial weights, data order and noise."""
    logger: Literal["wandb", "csv"] = "wandb"
    """Where curves go; wandb writes offline where there is no key or login."""
    cache: str = "runs/cache"
    """Folder of stage results, shared by all runs."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and on what machine."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is sampled and scored."""

    def check(self) -> None:
        """Check that the sections fit each other.

        Raises:
            ValueError: they do not; the message begins with the setting.
        """
        _at_least(self, "seed", 0)
        if self.data.name != "digits":  # which has the samples that it has
            sizes = [("prompts", "val_size"), ("heldout", "heldout_size"), ("edits", "val_size")]
            for name, size in sizes if self.data.name == "scenes" else sizes[:1]:
                wanted, there = getattr(self.eval, name), getattr(self.data, size)
                if wanted > there:
                    raise ValueError(
                        f"eval.{name} must be at most data.{size} ({there}), got {wanted}"
                    )


@dataclass
class CodecSection:
    """What stands under a generator: a finished tokenizer, or the settings that train one."""

    preset: str = "tiny"
    """File of configs/vqgan (or configs/autoencoder) that fills the settings of its training."""
    ckpt: str | None = "shipped"
    """shipped (the one that comes with the project), a checkpoint file, or null to train it."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long; the machine's settings are those of the run's own trainer section."""


@dataclass
class TokenizerSection(VQGANConfig, CodecSection):
    """The tokenizer under a generator of tokens."""


@dataclass
class AutoencoderSection(AutoencoderConfig, CodecSection):
    """The autoencoder under a generator of continuous latents."""


class Codec(NamedTuple):
    """What turns pictures into a small grid and back, trained before a generator."""

    paper: str
    """The key of RUNS that trains it alone, and the folder of its YAMLs."""
    config: type
    """The settings of its module."""
    section: type[CodecSection]
    """The section of a generator's run that holds them."""


CODECS = {
    "tokenizer": Codec("vqgan", VQGANConfig, TokenizerSection),
    "autoencoder": Codec("autoencoder", AutoencoderConfig, AutoencoderSection),
}


@dataclass
class StackedRun(RunSettings):
    """A generator on top of a codec, whose section is called as CODEC says."""

    LATER: ClassVar[tuple[str, ...]] = ()  # sections of what is trained after the generator

    @property
    def start(self) -> Path | None:
        """The checkpoint that the training starts from, where there is one."""
        return None

    @property
    def scored(self) -> dict[str, str]:
        """The pictures that are scored: beginning of their file names -> of their scores' names."""
        return {"": "eval"}

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        _two_players(f"{self.CODEC}.trainer", getattr(self, self.CODEC).trainer)


@dataclass
class GeneratorRun(StackedRun):
    """What the run of every generator of tokens has besides."""

    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    """The tokenizer under the generator."""

    def check_tokens(self, num_codes: int, name: str, grid_multiple: int) -> None:
        """Check that the generator fits the tokenizer that the tokenizer section describes.

        Raises:
            ValueError: another number of codes, or a grid that the network cannot halve.
        """
        if self.tokenizer.ckpt not in (None, "shipped"):
            return  # the file decides; it is checked when it is read
        model = self.tokenizer.model
        codes = model.used_codes or model.num_codes
        if num_codes != codes:
            raise ValueError(f"{name} must be the tokenizer's {codes} codes, got {num_codes}")
        _multiple("data.resolution", self.data.resolution, model.factor * grid_multiple)


@dataclass
class VQGANRun(VQGANConfig, RunSettings):
    """The tokenizer of Esser et al. (taming transformers) and its relatives, trained and scored."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {**TOKENIZER_PRESETS}

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        _multiple("data.resolution", self.data.resolution, self.model.factor)
        _two_players("trainer", self.trainer)


@dataclass
class AutoencoderRun(AutoencoderConfig, RunSettings):
    """An autoencoder with continuous latents: VMAE, or AE, DAE, VAE and SD-VAE beside it."""

    CODEC: ClassVar[str] = "autoencoder"
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = AUTOENCODER_PRESETS

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        _multiple("data.resolution", self.data.resolution, self.factor)
        _two_players("trainer", self.trainer)


@dataclass
class LDMAERun(LDMAEConfig, StackedRun):
    """LDMAE: latent diffusion (flow matching) on the latents of a masked autoencoder."""

    CODEC: ClassVar[str] = "autoencoder"
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": DIT_MODELS,
        "sampling": DIT_SAMPLING,
        **{f"autoencoder.{section}": presets for section, presets in AUTOENCODER_PRESETS.items()},
    }

    autoencoder: AutoencoderSection = field(default_factory=AutoencoderSection)
    """The autoencoder under the generator."""

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        self.check_diffusion()
        if self.autoencoder.ckpt not in (None, "shipped"):
            return  # the file decides; it is checked when it is read
        channels, factor = self.autoencoder.channels, self.autoencoder.factor
        if self.model.in_channels != channels:
            raise ValueError(
                f"model.in_channels must be the autoencoder's {channels} channels, "
                f"got {self.model.in_channels}"
            )
        _multiple("data.resolution", self.data.resolution, factor)
        side = self.data.resolution // factor
        if self.model.input_size != side:
            raise ValueError(
                f"model.input_size must be data.resolution / {factor} = {side}, "
                f"got {self.model.input_size}"
            )


@dataclass
class PaellaRun(PaellaConfig, GeneratorRun):
    """Paella: text to tokens by denoising and renoising a whole picture in a few steps."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": {"paper": PAELLA_MODELS["paper"]},
        "v1": {"paper": PAELLA_MODELS["v1"]},
        "sampling": PAELLA_PRESETS,
        **{f"tokenizer.{section}": presets for section, presets in TOKENIZER_PRESETS.items()},
    }

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        text, model = self.text, self.model
        if self.network == "v1":
            self.check_tokens(self.v1.num_labels, "v1.num_labels", self.v1.grid_multiple)
            if text.name == "bytes" or text.clip is None:
                raise ValueError("network=v1 needs one CLIP vector per caption: add text=open_clip")
        schedule = "cosine" if self.network == "v1" else "linear"
        if self.sampling.schedule != schedule:
            raise ValueError(
                f"sampling.schedule must be {schedule} with network={self.network}, whose time "
                f"runs the other way, got {self.sampling.schedule}"
            )
        if self.network == "v1":
            return
        self.check_tokens(model.num_labels, "model.num_labels", model.grid_multiple)
        if text.name == "bytes" and model.byt5_embd != text.width:
            raise ValueError(
                f"model.byt5_embd must be text.width ({text.width}) with text.name=bytes, "
                f"got {model.byt5_embd}"
            )
        if model.clip_embd and (text.name == "bytes" or text.clip is None):
            raise ValueError(
                f"model.clip_embd must be 0 without a CLIP encoder, got {model.clip_embd} with "
                f"text.name={text.name} and text.clip={text.clip}"
            )
        if model.clip_embd and model.clip_image and self.data.cache:
            raise ValueError(
                "data.cache must be false with model.clip_image=true: the cache holds tokens, and "
                "image vectors are made of pictures"
            )


@dataclass
class MuseRun(MuseConfig, GeneratorRun):
    """Muse: text to tokens by parallel decoding of masked tokens, and super-resolution on top."""

    LATER: ClassVar[tuple[str, ...]] = ("superres", "superres_trainer")
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": MUSE_MODELS,
        "uvit": UVIT_MODELS,
        "superres.model": SUPERRES_MODELS,
        "sampling": MUSE_PRESETS,
        **{f"tokenizer.{section}": presets for section, presets in TOKENIZER_PRESETS.items()},
    }

    superres_trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long the super-resolution stage is trained; the machine's settings are trainer's."""

    @property
    def scored(self) -> dict[str, str]:
        """With super-resolution the base's pictures are scored as those of every other paper."""
        return {"base-": "eval", "": "superres"} if self.superres.enabled else super().scored

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        text, uvit = self.text, self.network == "uvit"
        net, name = (self.uvit, "uvit.codebook_size") if uvit else (self.model, "model.num_codes")
        self.check_tokens(net.num_codes, name, net.grid_multiple)
        if uvit and text.name != "bytes" and (text.name != "clip" or not text.projected):
            raise ValueError(
                "network=uvit needs states and a pooled vector of a text: add text.name=clip and "
                "text.projected=true, or text.name=bytes"
            )
        if uvit and self.critic.layers:
            raise ValueError("critic.layers must be 0 with network=uvit: the critic is of model")
        widths = {"model.text_width": self.model.text_width}
        if uvit:
            names = ("encoder_hidden_size", "cond_embed_dim")
            widths = {f"uvit.{name}": getattr(self.uvit, name) for name in names}
        for key, width in widths.items():
            if text.name == "bytes" and width != text.width:
                raise ValueError(
                    f"{key} must be text.width ({text.width}) with text.name=bytes, got {width}"
                )
        if self.tokenizer.ckpt in (None, "shipped"):
            side = self.data.resolution // self.tokenizer.model.factor
            if not uvit and side > self.model.max_side:
                raise ValueError(
                    f"model.max_side must be at least the token grid's {side}, "
                    f"got {self.model.max_side}"
                )
            if self.superres.enabled:
                self._check_superres(side)

    def _check_superres(self, low_side: int) -> None:
        stage, model = self.superres, self.superres.model
        codes = self.tokenizer.model.used_codes or self.tokenizer.model.num_codes
        at = "superres.model"
        if model.low_num_codes != codes:
            raise ValueError(
                f"{at}.low_num_codes must be the tokenizer's {codes} codes, "
                f"got {model.low_num_codes}"
            )
        if model.low_max_side < low_side:
            raise ValueError(
                f"{at}.low_max_side must be at least the token grid's {low_side}, "
                f"got {model.low_max_side}"
            )
        if self.text.name == "bytes" and model.text_width != self.text.width:
            raise ValueError(
                f"{at}.text_width must be text.width ({self.text.width}) with text.name=bytes, "
                f"got {model.text_width}"
            )
        if stage.tokenizer is not None:
            return  # the file decides; it is checked when it is read
        if model.num_codes != codes:
            raise ValueError(
                f"{at}.num_codes must be the tokenizer's {codes} codes, got {model.num_codes}"
            )
        if model.max_side < low_side * stage.factor:
            raise ValueError(
                f"{at}.max_side must be at least the token grid's {low_side * stage.factor}, "
                f"got {model.max_side}"
            )
        _multiple("data.resolution", self.data.resolution * stage.factor,
                  self.tokenizer.model.factor * model.grid_multiple)  # fmt: skip


@dataclass
class VQDiffusionRun(VQDiffusionConfig, GeneratorRun):
    """VQ-Diffusion: text or class to tokens by undoing masks and replacements, step by step."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": VQD_MODELS,
        "schedule": VQD_SCHEDULES,
        "objective": VQD_OBJECTIVES,
        "sampling": VQD_PRESETS,
        **{f"tokenizer.{section}": presets for section, presets in TOKENIZER_PRESETS.items()},
    }

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        model, text = self.model, self.text
        self.check_tokens(model.num_codes, "model.num_codes", 1)
        if self.sampling.steps > model.diffusion_steps:
            raise ValueError(
                f"sampling.steps must be at most model.diffusion_steps ({model.diffusion_steps}), "
                f"got {self.sampling.steps}"
            )
        if model.condition == "text" and text.name == "bytes" and model.condition_dim != text.width:
            raise ValueError(
                f"model.condition_dim must be text.width ({text.width}) with text.name=bytes, "
                f"got {model.condition_dim}"
            )
        if model.condition == "class":
            if self.data.name == "scenes":
                raise ValueError("model.condition must be text with data=scenes, got class")
            if len(self.classes) not in (0, self.num_classes):
                raise ValueError(
                    f"classes must name all {self.num_classes} classes or none, "
                    f"got {len(self.classes)} names"
                )
        if self.tokenizer.ckpt in (None, "shipped"):
            side = self.data.resolution // self.tokenizer.model.factor
            places = model.spatial_size[0] * model.spatial_size[1]
            if places < side * side:
                raise ValueError(
                    f"model.spatial_size must have places for {side}x{side} tokens, "
                    f"got {model.spatial_size}"
                )


@dataclass
class ImprovedVQDRun(ImprovedVQDConfig, VQDiffusionRun):
    """Improved VQ-Diffusion: VQ-Diffusion with classifier-free guidance and purity sampling."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        **VQDiffusionRun.PRESETS,
        "sampling": IMPROVED_PRESETS,
    }

    @property
    def start(self) -> Path | None:
        """The checkpoint that the training starts from, where there is one."""
        return self.init.file

    @property
    def scored(self) -> dict[str, str]:
        """Its own pictures, and beside them those of VQ-Diffusion from the same weights."""
        both = {"": "eval", "vq_diffusion-": "vq_diffusion"}
        return both if self.sampling.compare else super().scored

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        if self.start is not None and not self.start.is_file():
            raise ValueError(f"init.ckpt: there is no file {self.start}")
        s = self.sampling
        if s.order != "diffusion" and s.reveal == "released":
            if self.tokenizer.ckpt in (None, "shipped"):
                side = self.data.resolution // self.tokenizer.model.factor
                try:
                    check_released(side * side, self.model.diffusion_steps)
                except ValueError as error:
                    raise ValueError(f"sampling.{error}") from error


RUNS: dict[str, type[RunSettings]] = {
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
    """Make the checked config of one run.

    Args:
        paper: a key of RUNS.
        scale: a YAML of configs/<paper>, by name, or a path.
        overrides: words `key=value` or `--key=value`, the last one wins.

    Raises:
        ConfigError: unknown paper, scale or key; wrong type, range or combination.
    """
    cls = RUNS[pick("--paper", paper, list(RUNS))]
    yaml, line = file_pairs(cls, scale_file(paper, scale)), parse_overrides(cls, overrides)
    preset = _codec_preset(cls.CODEC, yaml, line) if issubclass(cls, StackedRun) else []
    config = fill(cls, [*preset, *yaml, *line])
    asked = dict(line).get("data.name", config.data.name)
    if asked != config.data.name:  # shards that are set win over any name
        shards = config.data.shards
        raise ConfigError(f"data={asked} and data.shards={shards} exclude each other; set one")
    return config


def _codec_preset(
    codec: str, yaml: Sequence[tuple[str, Any]], line: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    """Settings of the codec's section that its preset's YAML gives."""
    paper, _, section = CODECS[codec]
    chosen = dict([*yaml, *line])
    name = chosen.get(f"{codec}.preset", CodecSection.preset)
    name = pick(f"{codec}.preset", str(name), scales(paper))
    ckpt = chosen.get(f"{codec}.ckpt", CodecSection.ckpt)
    own = [f"{codec}.{f.name}" for f in dataclasses.fields(section)]
    trained = [k for k in own if k not in (f"{codec}.preset", f"{codec}.ckpt")]
    idle = [k for k, _ in line if k.startswith(tuple(trained))]
    if ckpt is not None and idle:
        raise ConfigError(
            f"{idle[0]} has no effect while {codec}.ckpt={ckpt} is taken as it is; "
            f"add {codec}.ckpt=null to train the {codec}"
        )
    pairs = file_pairs(RUNS[paper], CONFIGS / paper / f"{name}.yaml")
    return [(f"{codec}.{k}", v) for k, v in pairs if f"{codec}.{k}".startswith(tuple(trained))]


def _at_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _multiple(name: str, value: int, factor: int) -> None:
    if value % factor:
        near = max(1, round(value / factor)) * factor
        raise ValueError(f"{name} must be a multiple of {factor}, got {value} (near: {near})")


def _two_players(section: str, trainer: TrainerConfig) -> None:
    # in manual optimization Lightning does not accumulate, and would clip scaled gradients
    if trainer.accumulate != 1:
        raise ValueError(
            f"{section}.accumulate must be 1 for a tokenizer, got {trainer.accumulate}"
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            f"{section}.precision must not be 16-mixed for a tokenizer; take bf16-mixed or 32-true"
        )
