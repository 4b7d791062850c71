"""The autoencoder: trained alone, or under LDMAE."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from experiments.papers.base import RunSettings
from experiments.papers.first_stage import FirstStageKind
from experiments.papers.sections import FirstStageSection
from lightning_modules.common.checks import multiple
from lightning_modules.ldmae.config import (
    AUTOENCODER_LOSSES,
    AUTOENCODER_OBJECTIVES,
    AUTOENCODER_OPTIM,
    AutoencoderConfig,
)

SECTIONS: dict[str, Mapping[str, Any]] = {
    "objective": {**AUTOENCODER_OBJECTIVES, **AUTOENCODER_LOSSES},
    "optim": AUTOENCODER_OPTIM,
}


def _measures(config: AutoencoderConfig) -> tuple[int, None, int]:
    return config.factor, None, config.channels


AUTOENCODER = FirstStageKind(
    "autoencoder", "autoencoder", AutoencoderConfig, SECTIONS, _measures, ("start",), True
)


@dataclass
class AutoencoderSection(AutoencoderConfig, FirstStageSection):
    """The autoencoder under a generator of continuous latents."""


@dataclass
class AutoencoderRun(AutoencoderConfig, RunSettings):
    """An autoencoder with continuous latents: VMAE, or AE, DAE, VAE and SD-VAE beside it."""

    READS: ClassVar[str] = "vmaef8d16.pth (VMAE); latents_stats.pt goes with --stats"
    FIRST_STAGE: ClassVar[FirstStageKind] = AUTOENCODER
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = SECTIONS

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.ldmae import convert

        return convert.read_autoencoder

    @property
    def first_stage(self) -> AutoencoderSection:
        """This run's own settings."""
        own = {f.name: getattr(self, f.name) for f in fields(AutoencoderConfig)}
        return AutoencoderSection(ckpt=None, trainer=self.trainer, **own)

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        multiple("data.resolution", self.data.resolution, self.factor)
        self.trainer.check_adversarial("trainer")
