"""The released sizes, built without memory, and the ranges of settings."""

import pytest
import torch
from torch import nn

from lightning_modules.common.settings import build, plain
from lightning_modules.vqgan.config import (
    PRESETS,
    AdversarialOptimConfig,
    ModelConfig,
    ObjectiveConfig,
    VQGANConfig,
)
from lightning_modules.vqgan.network import NETWORKS

# encoder, decoder, total in millions and tensors in the state dict, as the released files have them
TAMING = {
    "imagenet-f16-1024": (29.30, 42.45, 72.14, 343, 16),
    "imagenet-f16-16384": (29.30, 42.45, 76.07, 343, 16),
    "openimages-gumbel-f8": (26.35, 38.32, 69.00, 301, 8),
    "ldm-vq-f4": (22.34, 32.96, 55.32, 205, 4),
    "ldm-vq-f4-noattn": (21.29, 31.91, 53.22, 185, 4),
    "ldm-vq-f8": (27.40, 40.25, 67.72, 299, 8),
    "ldm-vq-f8-n256": (27.40, 40.25, 67.65, 299, 8),
    "ldm-vq-f16": (28.16, 41.31, 69.59, 343, 16),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def network(name: str) -> nn.Module:
    model = PRESETS[name].model
    with torch.device("meta"):
        return NETWORKS[model.network](model)


@pytest.mark.parametrize("name", TAMING)
def test_sizes_of_taming_and_ldm(name: str) -> None:
    net = network(name)
    encoder, decoder, total, keys, factor = TAMING[name]
    assert parameters(net.get_submodule("encoder")) / 1e6 == pytest.approx(encoder, abs=0.005)
    assert parameters(net.get_submodule("decoder")) / 1e6 == pytest.approx(decoder, abs=0.005)
    assert parameters(net) / 1e6 == pytest.approx(total, abs=0.005)
    assert len(net.state_dict()) == keys
    assert PRESETS[name].model.factor == factor


def test_size_of_paella_f4() -> None:
    net = network("paella-f4")
    encoder = [net.get_submodule(name) for name in ("in_block", "down_blocks")]
    assert sum(map(parameters, encoder)) == 2_667_284
    assert parameters(net) == 18_406_894
    assert PRESETS["paella-f4"].model.factor == 4
    assert net.get_submodule("up_blocks")[13].weight.shape == (384, 192, 4, 4)


def test_every_preset_is_tested_and_survives_plain_containers() -> None:
    assert PRESETS.keys() == TAMING.keys() | {"paella-f4"}
    for preset in PRESETS.values():
        assert build(VQGANConfig, plain(preset)) == preset


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (ModelConfig, {"num_codes": 0}, "num_codes must be at least 1, got 0"),
        (ModelConfig, {"ch_mult": []}, "ch_mult"),
        (ModelConfig, {"ch": 48}, "norm_groups must divide every width"),
        (ModelConfig, {"network": "paella", "levels": 3, "c_hidden": 6}, "c_hidden must halve"),
        (ModelConfig, {"quantizer": "gumbel", "restart_after": 5}, "restart_after"),
        (ModelConfig, {"used_codes": 2000}, "used_codes must be at most num_codes"),
        (ModelConfig, {"decay": 1.0}, "decay"),
        (ModelConfig, {"temperature": 0.0}, "temperature"),
        (ObjectiveConfig, {"disc_start": -1}, "disc_start must be at least 0, got -1"),
        (AdversarialOptimConfig, {"lr": 0.0}, "lr must be positive"),
        (AdversarialOptimConfig, {"betas": [0.9]}, "betas"),
    ],
)
def test_settings_out_of_range_are_named(cls: type, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        cls(**settings)
