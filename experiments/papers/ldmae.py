"""LDMAE: latent diffusion on the latents of a masked autoencoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.papers.autoencoder import AUTOENCODER, SECTIONS, AutoencoderSection
from experiments.papers.base import GeneratorRun
from experiments.papers.first_stage import FirstStageKind
from lightning_modules.ldmae.config import DIT_MODELS, DIT_SAMPLING, LDMAEConfig


@dataclass
class LDMAERun(LDMAEConfig, GeneratorRun):
    """LDMAE: latent diffusion (flow matching) on the latents of a masked autoencoder."""

    READS: ClassVar[str] = (
        "0100000.pt and the like, or LightningDiT's, with the autoencoder as --tokenizer"
    )
    FIRST_STAGE: ClassVar[FirstStageKind] = AUTOENCODER
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": DIT_MODELS,
        "sampling": DIT_SAMPLING,
        **{f"autoencoder.{section}": presets for section, presets in SECTIONS.items()},
    }

    autoencoder: AutoencoderSection = field(default_factory=AutoencoderSection)
    """The autoencoder under the generator."""

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.ldmae import convert

        return convert.read

    def reads_text(self) -> bool:
        """Whether captions are what the generator is conditioned on."""
        return self.condition == "text"
