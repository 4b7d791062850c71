"""aMUSEd's U-ViT: released sizes, guidance, and the first step's savings."""

import warnings

import pytest
import torch
from torch import nn

from lightning_modules.muse.config import UVIT_MODELS, UViTConfig
from lightning_modules.muse.uvit import UViT, fold

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "in_channels": 10,
    "block_out_channels": 12,
    "block_num_heads": 3,
    "num_res_blocks": 2,
    "vocab_size": 24,
    "codebook_size": 20,
    "encoder_hidden_size": 10,
    "cond_embed_dim": 6,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
}
MICRO = torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]])


def tiny(**changes) -> UViT:
    torch.manual_seed(0)
    network = UViT(UViTConfig(**{**TINY, **changes})).eval()
    for p in network.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return network


def inputs(batch=2, grid=(6, 4), length=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TINY["codebook_size"], (batch, *grid), generator=g)
    x[torch.rand(x.shape, generator=g) < 0.6] = TINY["vocab_size"] - 1
    text = torch.randn(batch, length, TINY["encoder_hidden_size"], generator=g)
    return x, text, torch.randn(batch, TINY["cond_embed_dim"], generator=g)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("amused-256", 603_537_664, 474), ("amused-512", 608_257_792, 478)],
)
def test_released_sizes(name, parameters, tensors):
    with torch.device("meta"):
        network = UViT(UVIT_MODELS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert network.mask_id == 8255


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes", [{}, {"downsample": True}, {"block_out_channels": 16, "block_num_heads": 2}]
)
def test_guidance_in_one_batch_equals_two_passes(changes):
    network = tiny(**changes)
    x, text, pooled = inputs()
    keep = x == network.mask_id
    cond = network.prepare(text, pooled, MICRO)
    null = network.prepare(text.flip(1)[:1, :3], -pooled[:1], MICRO)
    rows = network.mixed_rows(x, [cond, null], [3.5, -2.5], keep)
    c, u = (network.head(network.mixed_rows(x, [s], [1.0], keep)) for s in (cond, null))
    torch.testing.assert_close(network.head(rows), u + 3.5 * (c - u), atol=1e-4, rtol=1e-4)
    logits = network(x, text, pooled, MICRO)
    torch.testing.assert_close(c, logits[keep], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(c, u, atol=1e-2)


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("edge", [0, 1, 3])
def test_folded_lines(size, edge):
    lines = fold(size, edge).tolist()
    if size <= 2 * edge + 1:
        assert lines == list(range(size))
    else:
        middle = [edge] * (size - 2 * edge)
        assert lines == [*range(edge), *middle, *range(edge + 1, 2 * edge + 1)]


@torch.inference_mode()
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("grid", [(16, 12), (4, 20), (2, 2)])
def test_the_first_step_is_exact_on_a_folded_grid(downsample, grid):
    network = tiny(downsample=downsample).double()
    x, text, pooled = inputs(batch=3, grid=grid)
    x[:] = network.mask_id
    text, pooled = text.double(), pooled.double()
    sides = [network.prepare(text, pooled, MICRO), network.prepare(text[:1], pooled[:1], MICRO)]
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    seen = []
    network.transformer_layers[0].register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:2])
    )
    folded = network.mixed_rows(x, sides, [2.0, -1.0], keep)
    network.train()  # without dropout, training differs by that it takes no short cut
    whole = network.mixed_rows(x, sides, [2.0, -1.0], keep)
    torch.testing.assert_close(folded, whole, atol=1e-9, rtol=1e-9)
    h, w = (n // network.config.grid_multiple for n in grid)
    assert seen == [(3 + 1, min(h, 5) * min(w, 5)), (3 + 3, h * w)]


@torch.inference_mode()
def test_masked_padding_changes_nothing():
    network = tiny()
    x, text, pooled = inputs()
    padded = torch.cat([text, 100 * torch.randn(2, 3, 10)], dim=1)
    mask = torch.arange(8).expand(2, -1) < 5
    expected = network(x, text, pooled, MICRO)
    torch.testing.assert_close(network(x, padded, pooled, MICRO, mask), expected)
    assert not torch.allclose(network(x, padded, pooled, MICRO), expected, atol=1e-2)


@torch.inference_mode()
def test_everything_given_is_seen():
    network = tiny()
    x, text, pooled = inputs()
    logits = network(x, text, pooled, MICRO)
    for other in (
        network(x.flip(2), text, pooled, MICRO),
        network(x, text.flip(0), pooled, MICRO),
        network(x, text, pooled.flip(0), MICRO),
        network(x, text, pooled, MICRO * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5])),
    ):
        assert not torch.allclose(other, logits, atol=1e-2)


def test_an_odd_grid_cannot_be_halved():
    network = tiny(downsample=True)
    x, text, pooled = inputs(grid=(6, 5))
    with pytest.raises(ValueError, match="multiple of 2 on both sides, got 6x5"):
        network(x, text, pooled, MICRO)


def test_logits_are_zero_at_the_released_initialisation():
    network = UViT(UViTConfig(**TINY)).eval()
    x, text, pooled = inputs()
    assert not network(x, text, pooled, MICRO).any()
    table = network.mlm_layer.conv2.weight[..., 0, 0]
    assert torch.equal(table, network.embed.embeddings.weight[:20])


@pytest.mark.parametrize("downsample", [False, True])
def test_every_parameter_gets_a_gradient(downsample):
    network = tiny(downsample=downsample, hidden_dropout=0.1, attention_dropout=0.1).train()
    x, text, pooled = inputs()
    network(x, text, pooled, MICRO).square().mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_half_precision_by_autocast():
    network = tiny()
    x, text, pooled = inputs()
    x[0] = network.mask_id
    expected = network(x, text, pooled, MICRO)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = network(x, text, pooled, MICRO)
        same = network(torch.full_like(x, network.mask_id), text, pooled, MICRO)
    for found, whole in ((logits, expected), (same[:1], expected[:1])):
        assert found.dtype == torch.bfloat16
        assert (found.float() - whole).norm() < 0.1 * whole.norm()
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"num_attention_heads must divide hidden_size \(16\), got 3"),
        ({"vocab_size": 20}, r"vocab_size must be above codebook_size \(20\)"),
        ({"micro_cond_embed_dim": 18}, "micro_cond_embed_dim must be a multiple of 4"),
        ({"micro_cond_encode_dim": 3}, "micro_cond_encode_dim must be even"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UViTConfig(**{**TINY, **changes})
