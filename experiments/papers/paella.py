"""Paella: renoising of a whole picture's tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments.papers.vqgan import TOKENIZER_PRESETS, TokenRun
from lightning_modules.paella.config import MODELS, PRESETS, PaellaConfig


@dataclass
class PaellaRun(PaellaConfig, TokenRun):
    """Paella: text to tokens by denoising and renoising a whole picture in a few steps."""

    READS: ClassVar[str] = "paella_v3.pt with vqgan_f4.pt, bare or under state_dict"
    PARTS: ClassVar[tuple[str, ...]] = ("prior",)
    ASIDE: ClassVar[tuple[str, ...]] = ("prior",)
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "model": {"paper": MODELS["paper"]},
        "v1": {"paper": MODELS["v1"]},
        "sampling": PRESETS,
        **TOKENIZER_PRESETS,
    }

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.paella import convert

        return convert.read

    @classmethod
    def part_reader(cls, name: str) -> Callable[[Path], Any]:
        """Return what reads the diffusion prior."""
        from lightning_modules.paella import convert

        return convert.read_prior

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        model = self.model
        if self.network == "v3" and model.clip_embd and model.clip_image and self.data.cache:
            raise ValueError(
                "data.cache must be false with model.clip_image=true: the cache holds tokens, and "
                "image vectors are made of pictures"
            )
