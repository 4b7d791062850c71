"""Improved VQ-Diffusion: guidance and purity sampling, beside plain VQ-Diffusion."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.papers.base import Drawing, Materials, existing
from experiments.papers.vq_diffusion import VQDiffusionRun
from experiments.pipeline.data import Captions
from experiments.pipeline.sample import Sample
from experiments.settings import resolved
from lightning_modules.improved_vqd.config import PRESETS, ImprovedVQDConfig


@dataclass
class ImprovedVQDRun(ImprovedVQDConfig, VQDiffusionRun):
    """Improved VQ-Diffusion: VQ-Diffusion with classifier-free guidance and purity sampling."""

    READS: ClassVar[str] = (
        "coco_learnable.pth, cc_learnable.pth and the like, and all that vq_diffusion reads"
    )
    ASIDE: ClassVar[tuple[str, ...]] = ("compare",)
    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {
        **VQDiffusionRun.PRESETS,
        "sampling": PRESETS,
    }

    @classmethod
    def reader(cls) -> Callable[..., Any]:
        """Return what reads foreign files."""
        from lightning_modules.improved_vqd import convert

        return convert.read

    def check(self) -> None:
        """Check that the sections fit each other."""
        super().check()
        if self.init.file is not None and not self.init.file.is_file():
            raise ValueError(f"init.ckpt: there is no file {self.init.file}")

    def trained_settings(self) -> dict[str, Any]:
        """Return what the training reads; the checkpoint that it starts from by its content."""
        plain = super().trained_settings()
        file = self.init.file
        plain["init"]["ckpt"] = existing("init.ckpt", None if file is None else str(file))
        return plain

    def drawing(self, materials: Materials) -> Drawing:
        """Return its own pictures, and beside them those of VQ-Diffusion from the same weights."""
        own = super().drawing(materials)
        if not self.sampling.compare:
            return own
        without = {k: v for k, v in resolved(self.sampling.plain()).items() if k in own.sampling}

        def draw(captions: Captions, seed: int, traces: int) -> dict[str, Sample]:
            plain = Sample(own.generator, captions, without, seed)
            return {**own.draw(captions, seed, traces), "vq_diffusion": plain}

        return dataclasses.replace(own, draw=draw)
