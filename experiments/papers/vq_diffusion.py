"""VQ-Diffusion: undoing masks and replacements, step by step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.papers.vqgan import TOKENIZER_PRESETS, TokenRun
from lightning_modules.vq_diffusion.config import (
    MODELS,
    OBJECTIVES,
    PRESETS,
    SCHEDULES,
    VQDiffusionConfig,
)


@dataclass
class VQDiffusionRun(VQDiffusionConfig, TokenRun):
    """VQ-Diffusion: text or class to tokens by undoing masks and replacements, step by step."""

    READS: ClassVar[str] = (
        "coco_pretrained.pth and the like with tokenizer and text encoder inside (and\n"
        "--codes taming_vqvae_2887.pt), and the folder of vq-diffusion-ithq"
    )
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": MODELS,
        "schedule": SCHEDULES,
        "objective": OBJECTIVES,
        "sampling": PRESETS,
        **TOKENIZER_PRESETS,
    }

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.vq_diffusion import convert

        return convert.read

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        if self.model.condition == "class" and self.data.name == "scenes":
            raise ValueError("model.condition must be text with data=scenes, got class")

    def reads_text(self) -> bool:
        """Whether captions are what the generator is conditioned on."""
        return self.model.condition == "text"
