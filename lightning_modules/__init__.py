"""The papers as LightningModules; a name is loaded when it is first asked for."""

from importlib import import_module
from typing import Any

HOMES = {
    "VQGANModule": "vqgan.module",
    "PaellaModule": "paella.module",
    "VQDiffusionModule": "vq_diffusion.module",
    "ImprovedVQDModule": "improved_vqd.module",
    "MuseModule": "muse.module",
    "LDMAEModule": "ldmae.module",
    "AutoencoderModule": "ldmae.autoencoder",
    "Request": "common.request",
    "load_first_stage": "registry",
    "load_generator": "registry",
}
__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
