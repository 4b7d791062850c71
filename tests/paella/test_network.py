"""Sizes and invariants of the token predictors, and official checkpoints."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.common.checkpoint import load_foreign, load_strict
from lightning_modules.common.settings import build
from lightning_modules.paella import process
from lightning_modules.paella.config import (
    MODELS,
    ModelConfig,
    PriorConfig,
    SamplingConfig,
    V1Config,
)
from lightning_modules.paella.convert import NETWORKS, convert
from lightning_modules.paella.network import (
    GlobalResponseNorm,
    Paella,
    Perceptron,
    grid_norm,
    timestep_embedding,
)
from lightning_modules.paella.network_v1 import DenoiseUNet
from lightning_modules.paella.prior import Prior

TINY = {
    "c_in": 8,
    "c_out": 8,
    "num_labels": 20,
    "c_r": 8,
    "c_cond": 12,
    "byt5_embd": 10,
    "clip_embd": 6,
    "c_hidden": [8, 12],
    "nhead": [-1, 3],
    "blocks": [1, 2],
    "level_config": ["CT", "CTA"],
}


def tiny(**changes) -> Paella:
    torch.manual_seed(0)
    network = Paella(ModelConfig(**{**TINY, **changes})).eval()
    for name, p in network.named_parameters():
        if not p.any() or name.endswith("gamma"):  # the released initialisation has many zeros
            torch.nn.init.normal_(p, std=0.3)
    return network


def inputs(batch=2, length=5, grid=(8, 8)):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TINY["num_labels"], (batch, *grid), generator=g)
    return x, torch.rand(batch, generator=g), torch.randn(batch, length, 10, generator=g)


@pytest.mark.parametrize(
    ("name", "kind", "parameters", "entries"),
    [
        ("paper", "v3", 1_008_350_592, 844),
        ("v1", "v1", 577_995_184, 739),
        ("prior", "prior", 899_770_624, 292),
    ],
)
def test_released_sizes(name, kind, parameters, entries):
    with torch.device("meta"):
        network = NETWORKS[kind][0](MODELS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries


def test_a_network_without_clip_has_no_part_of_it():
    network = tiny(clip_embd=0)
    assert not [name for name in network.state_dict() if "clip" in name]
    x, t, byt5 = inputs()
    assert network(x, t, byt5).shape == (2, 20, 8, 8)
    with pytest.raises(ValueError, match="clip_mapper"):
        network(x, t, byt5, clip=torch.zeros(2, 6))


def test_logits_are_zero_at_the_released_initialisation():
    network = Paella(ModelConfig(**TINY)).eval()
    x, t, byt5 = inputs()
    assert not network(x, t, byt5, torch.randn(2, 6)).any()
    assert torch.equal(network.out_mapper[1].weight[..., 0, 0], network.in_mapper[0].weight)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_any_patch_and_number_of_levels(patch_size, levels):
    sizes = {k: TINY[k][:levels] for k in ("c_hidden", "nhead", "blocks", "level_config")}
    network = tiny(patch_size=patch_size, **sizes)
    multiple = patch_size * 2 ** (levels - 1)
    x, t, byt5 = inputs(grid=(multiple, 3 * multiple))
    assert network(x, t, byt5).shape == (2, 20, multiple, 3 * multiple)
    if multiple > 1:
        x, t, byt5 = inputs(grid=(multiple, multiple + 1))
        with pytest.raises(ValueError, match=f"multiple of {multiple}"):
            network(x, t, byt5)


@torch.inference_mode()
def test_masked_padding_changes_nothing():
    network = tiny()
    x, t, byt5 = inputs()
    clip = torch.randn(2, 6)
    padded = torch.cat([byt5, 100 * torch.randn(2, 3, 10)], dim=1)
    mask = torch.arange(8).expand(2, -1) < 5
    expected = network(x, t, byt5, clip)
    torch.testing.assert_close(network(x, t, padded, clip, mask=mask), expected)
    assert not torch.allclose(network(x, t, padded, clip), expected, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("level_config", [["CT", "CTA"], ["ATC", "CTA"], ["CT", "CF"]])
def test_two_conditions_in_one_pass_equal_two_passes(level_config):
    network = tiny(level_config=level_config, nhead=[2, 3])
    x, t, byt5 = inputs()
    cond = network.prepare(*network.condition(byt5, torch.randn(2, 6)))
    null = network.prepare(*network.condition(torch.randn(1, 2, 10)))  # one for all images
    one, two = network.features(x, t, cond), network.features(x, t, null)
    torch.testing.assert_close(network.features(x, t, cond + null), torch.cat([one, two]))

    keep = torch.rand(x.shape) < 0.5
    logits = [
        network.head(torch.nn.functional.layer_norm(f[keep], (8,), eps=1e-6)) for f in (one, two)
    ]
    guided = network.head(network.predictor(cond, null)(x, t, 3.0, keep))
    torch.testing.assert_close(guided, 3 * logits[0] - 2 * logits[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.head(network.predictor(cond)(x, t, 1.0, keep)), logits[0])


@torch.inference_mode()
def test_attention_weights_scale_the_last_keys():
    network = tiny()
    x, t, byt5 = inputs()
    clip = torch.randn(2, 6)
    plain = network(x, t, byt5, clip)
    ones = network(x, t, byt5, clip, attn_weights=torch.ones(5))
    torch.testing.assert_close(ones, plain)
    other = network(x, t, byt5, clip, attn_weights=torch.full((5,), 0.5))
    assert not torch.allclose(other, plain, atol=1e-3)
    with pytest.raises(ValueError, match="attn_weights"):
        network(x, t, byt5, attn_weights=torch.ones(6))


def test_response_norm_of_a_dead_channel_has_a_gradient():
    norm = GlobalResponseNorm(3)
    x = torch.zeros(2, 2, 2, 3, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all()
    y = torch.randn(2, 2, 2, 3)
    torch.testing.assert_close(grid_norm(y), y.norm(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize("images_at_once", [1, 2, 5])
def test_sampling_in_place_equals_training(images_at_once, monkeypatch):
    network = tiny()
    x, t, byt5 = inputs(batch=5)
    monkeypatch.setattr(Perceptron, "CACHED", images_at_once * 4 * 16 * 8)
    with torch.no_grad():
        in_place = network(x, t, byt5)
    torch.testing.assert_close(in_place, network(x, t, byt5).detach())


def test_sampling_never_holds_the_logits_of_the_whole_grid():
    """Not even one [B, K, h, w] tensor: what is largest is the table or a chunk of rows."""
    network = tiny(num_labels=512)
    grid, steps = (32, 32), 3
    byt5 = inputs(batch=1)[2]
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                o.numel()
                for o in (out if isinstance(out, tuple) else (out,))
                if isinstance(o, torch.Tensor)
            )
            return out

    with torch.inference_mode(), Sizes():
        cond = network.prepare(*network.condition(byt5))
        null = network.prepare(*network.condition(byt5[:, :1]))
        noise = process.sample_noise([0], steps, steps - 1, grid, 512)
        loop = process.loop_settings(SamplingConfig(steps=steps))
        process.sample(network.predictor(cond, null), network.head, **noise, **loop)
    assert max(sizes) < 512 * grid[0] * grid[1] / 2


def test_the_condition_gets_gradients():
    network = tiny().train()
    x, t, byt5 = inputs()
    byt5.requires_grad_()
    network(x, t, byt5, torch.randn(2, 6), torch.randn(2, 6)).square().mean().backward()
    assert byt5.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("width", [8, 9])
def test_timestep_embedding(width):
    embedding = timestep_embedding(torch.tensor([0.0, 0.5]), width)
    assert embedding.shape == (2, width)
    assert embedding[0, :4].tolist() == [0.0] * 4
    assert embedding[0, 4:8].tolist() == [1.0] * 4
    assert embedding[1, 0] == pytest.approx(torch.tensor(5000.0).sin().item(), abs=1e-3)


@pytest.mark.parametrize(
    "mistake",
    [
        {"c_out": 9},
        {"nhead": [-1, 5]},
        {"blocks": [1]},
        {"level_config": ["CT", "CTX"]},
        {"kernel_size": 4},
    ],
)
def test_impossible_sizes_are_named(mistake):
    with pytest.raises(ValueError, match=next(iter(mistake))):
        ModelConfig(**{**TINY, **mistake})


SMALL = {
    "v3": Paella(ModelConfig(**TINY)),
    "v1": DenoiseUNet(
        V1Config(num_labels=20, c_hidden=16, c_clip=6, c_r=64, down_levels=[1, 2], up_levels=[2, 1])
    ),
    "prior": Prior(PriorConfig(clip_embd=6, c_hidden=8, c_r=4, num_blocks=2)),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layout", ["bare", "training", "data_parallel"])
def test_official_layouts(kind, layout, tmp_path):
    state = SMALL[kind].state_dict()
    content = {
        "bare": state,
        "training": {"iter": 3, "state_dict": state, "optimizer_state_dict": {}},
        "data_parallel": {f"module.{k}": v for k, v in state.items()},
    }[layout]
    torch.save(content, tmp_path / "official.pt")
    found, converted, config = convert(load_foreign(tmp_path / "official.pt"), {"nhead": [-1, 3]})
    assert found == kind
    network_class, config_class = NETWORKS[kind]
    network = network_class(build(config_class, config))
    load_strict(network, converted, "converted")
    assert network.config == SMALL[kind].config
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_conversion_is_strict():
    state = SMALL["v3"].state_dict()
    hints = {"nhead": [-1, 3]}
    with pytest.raises(ValueError, match="extra"):
        convert({**state, "extra": torch.zeros(1)}, hints)
    with pytest.raises(ValueError, match=r"clf\.1\.bias"):
        convert({k: v for k, v in state.items() if k != "clf.1.bias"}, hints)
    with pytest.raises(ValueError, match="no Paella checkpoint"):
        convert({"weight": torch.zeros(1)})


def test_released_heads_are_the_default():
    with torch.device("meta"):
        state = Paella(ModelConfig()).state_dict()
    _, _, config = convert(state)
    assert build(ModelConfig, config) == ModelConfig()
