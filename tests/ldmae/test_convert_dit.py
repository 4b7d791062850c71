"""Files of released diffusion models: what they hold besides, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lightning_modules.common.checkpoint import load_entries, load_strict
from lightning_modules.common.settings import build, plain
from lightning_modules.ldmae.config import DiTConfig
from lightning_modules.ldmae.convert import convert_dit, dit_entry
from lightning_modules.ldmae.network import DiT

CONFIGS = {
    "imagenet": DiTConfig(4, 1, 3, 16, 2, 2, num_classes=5),
    "celebahq": DiTConfig(
        4, 1, 3, 16, 2, 2, num_classes=1, class_dropout_prob=0.0, use_qknorm=False
    ),
    "plain": DiTConfig(
        4,
        2,
        3,
        24,
        1,
        3,
        mlp_ratio=2.5,
        num_classes=5,
        learn_sigma=True,
        use_swiglu=False,
        use_rope=False,
        use_rmsnorm=False,
        wo_shift=True,
    ),
    "wide": DiTConfig(4, 1, 3, 16, 2, 2, mlp_ratio=3.3, num_classes=5),
}


def released(name: str = "imagenet") -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiT(CONFIGS[name]).state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_read_from_the_shapes(name: str) -> None:
    state, found = convert_dit(released(name))
    wanted = plain(CONFIGS[name])
    ratio = found.pop("mlp_ratio")
    assert found == {k: v for k, v in wanted.items() if k in found}
    assert set(wanted) - set(found) == {"mlp_ratio", "use_checkpoint"}
    assert ratio == pytest.approx(wanted["mlp_ratio"], abs=0.1)
    load_strict(DiT(build(DiTConfig, {**found, "mlp_ratio": ratio})), state, name)


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
def test_the_average_is_taken_from_a_training_file(compiled: str, tmp_path: Path) -> None:
    state = {f"module.{compiled}{k}": v for k, v in released().items()}
    content: dict[str, Any] = {
        "model": {k: v + 1 for k, v in state.items()},
        "ema": {k.removeprefix("module."): v for k, v in state.items()},
        "opt": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-4}]},
        # an object of another package: it must not be made, only passed over
        "config": OmegaConf.create({"model": {"model_type": "LightningDiT-B/1"}}),
    }
    torch.save(content, tmp_path / "0100000.pt")
    entries = load_entries(tmp_path / "0100000.pt")
    found = convert_dit(dit_entry(entries))[0]
    for k, v in released().items():
        assert torch.equal(found[k], v)
    del entries["ema"]  # a bare training state
    assert torch.equal(dit_entry(entries)["pos_embed"], released()["pos_embed"] + 1)
    with pytest.raises(ValueError, match="this is no diffusion model of LDMAE or LightningDiT"):
        dit_entry({"": {"weight": torch.ones(1)}})


def test_what_does_not_fit() -> None:
    state = released()
    lacking = {k: v for k, v in state.items() if k != "blocks.1.mlp.w3.bias"}
    with pytest.raises(ValueError, match=r"1 missing, first 'blocks.1.mlp.w3.bias'"):
        convert_dit(lacking)
    with pytest.raises(ValueError, match=r"1 left over, first 'blocks.0.extra'"):
        convert_dit({**state, "blocks.0.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 of wrong shape, first 'final_layer.linear.bias'"):
        convert_dit({**state, "final_layer.linear.bias": torch.ones(7)})
    with pytest.raises(ValueError, match=r"the checkpoint lacks pos_embed"):
        convert_dit({k: v for k, v in state.items() if k != "pos_embed"})
    unrotated = {k: v for k, v in released("celebahq").items() if "rope" not in k}
    with pytest.raises(ValueError, match=r"does not tell model.num_heads; give it"):
        convert_dit(unrotated)
    assert convert_dit(unrotated, {"num_heads": 4})[1]["num_heads"] == 4
    with pytest.raises(ValueError, match="of wrong shape"):
        convert_dit(state, {"num_classes": 6})
