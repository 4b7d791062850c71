"""The tokenizer: trained alone, or under a generator of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.papers.base import GeneratorRun, RunSettings
from experiments.papers.first_stage import FirstStageKind
from experiments.papers.sections import FirstStageSection
from lightning_modules.common.checks import multiple
from lightning_modules.vqgan.config import PRESETS, VQGANConfig

SECTIONS = {
    section: {name: getattr(preset, section) for name, preset in PRESETS.items()}
    for section in ("model", "objective", "optim")
}


def _measures(config: VQGANConfig) -> tuple[int, int, None]:
    model = config.model
    return model.factor, model.used_codes or model.num_codes, None


TOKENIZER = FirstStageKind("tokenizer", "vqgan", VQGANConfig, SECTIONS, _measures, ("finetune",))


@dataclass
class TokenizerSection(VQGANConfig, FirstStageSection):
    """The tokenizer under a generator of tokens."""


@dataclass
class TokenRun(GeneratorRun):
    """A generator of tokens."""

    FIRST_STAGE: ClassVar[FirstStageKind] = TOKENIZER

    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    """The tokenizer under the generator."""


TOKENIZER_PRESETS: dict[str, Mapping[str, Any]] = {
    f"tokenizer.{section}": presets for section, presets in SECTIONS.items()
}


@dataclass
class VQGANRun(VQGANConfig, RunSettings):
    """The tokenizer of Esser et al. (taming transformers) and its relatives, trained and scored."""

    READS: ClassVar[str] = (
        "vqgan_f4.pt, taming and latent-diffusion files, diffusers folders of VQModel and\n"
        "PaellaVQModel; new ids of the codes go with --codes"
    )
    FIRST_STAGE: ClassVar[FirstStageKind] = TOKENIZER
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {**SECTIONS}

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.vqgan import convert

        return convert.read

    @property
    def first_stage(self) -> TokenizerSection:
        """This run's own settings."""
        return TokenizerSection(
            ckpt=None,
            trainer=self.trainer,
            model=self.model,
            objective=self.objective,
            optim=self.optim,
            finetune=self.finetune,
        )

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        multiple("data.resolution", self.data.resolution, self.model.factor)
        self.trainer.check_adversarial("trainer")
