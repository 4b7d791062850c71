"""The super-resolution network: sizes, its two axes, and what it is conditioned on."""

import pytest
import torch
from torch import nn

from lightning_modules.muse.config import SUPERRES_MODELS, SuperResConfig
from lightning_modules.muse.superres import MultiAxisAttention, SuperRes

TINY = {
    "num_codes": 20,
    "hidden": 16,
    "mlp": 24,
    "layers": 2,
    "heads": 4,
    "max_side": 8,
    "text_width": 10,
    "low_num_codes": 12,
    "low_layers": 2,
    "low_max_side": 4,
    "block": 2,
}


def tiny(**changes) -> SuperRes:
    torch.manual_seed(0)
    network = SuperRes(SuperResConfig(**{**TINY, **changes})).eval()
    for p in network.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return network


def inputs(batch=2):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TINY["num_codes"], (batch, 8, 4), generator=g)
    x[torch.rand(x.shape, generator=g) < 0.6] = TINY["num_codes"]
    low = torch.randint(TINY["low_num_codes"], (batch, 4, 2), generator=g)
    return x, torch.randn(batch, 5, TINY["text_width"], generator=g), low


def test_sizes_of_the_paper():
    counts = {}
    for name, config in SUPERRES_MODELS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in SuperRes(config).parameters())
    assert counts == {"3b": 768_913_408, "268m": 268_169_216}
    table6 = SUPERRES_MODELS["3b"]
    assert (table6.layers, table6.low_layers, table6.hidden, table6.mlp) == (32, 16, 1024, 4096)


@torch.inference_mode()
@pytest.mark.parametrize("block", [1, 2, 4])
def test_half_of_the_heads_are_local_and_half_dilated(block):
    torch.manual_seed(0)
    h, w, heads, d = 8, 4, 4, 3
    attention = MultiAxisAttention(SuperResConfig(**{**TINY, "block": block})).eval()
    q, k, v = (torch.randn(2, heads, h * w, d) for _ in range(3))
    i = torch.arange(h * w)
    row, column = i // w, i % w

    def equal(a):
        return a[:, None] == a[None]

    local = equal(row // block) & equal(column // block)
    dilated = equal(row % block) & equal(column % block)
    masks = torch.stack([local] * (heads // 2) + [dilated] * (heads // 2))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks)
    torch.testing.assert_close(attention.attend_grid(q, k, v, (h, w)), expected)


def test_a_grid_that_blocks_do_not_tile_is_refused():
    network = tiny(block=4)
    x, text, low = inputs()
    with pytest.raises(ValueError, match="multiple of 4, got 6x4"):
        network(x[:, :6], text, low=low)
    assert network.config.grid_multiple == 4


@torch.inference_mode()
def test_low_res_tokens_and_text_are_one_sequence():
    network = tiny()
    x, text, low = inputs()
    encoded = network.encode_low(low)
    assert encoded.shape == (2, 8, 16)
    side = network.prepare(text, low=encoded)
    assert side.mask is None and side.blocks[0].keys.shape == (2, 4, 8 + 5, 4)
    logits = network(x, text, low=low)
    assert not torch.allclose(network(x, text, low=low.flip(1)), logits, atol=1e-2)
    assert not torch.allclose(network(x, text.flip(1) * 2, low=low), logits, atol=1e-2)
    with pytest.raises(ValueError, match="needs low"):
        network(x, text)


@torch.inference_mode()
def test_the_low_res_encoder_has_a_table_and_positions_of_its_own():
    network = tiny()
    assert network.low.embed.table.num_embeddings == TINY["low_num_codes"]
    assert network.low.embed.table is not network.embed.table
    same = torch.zeros(1, 4, 2, dtype=torch.int64)
    assert len(network.encode_low(same)[0].unique(dim=0)) == 8


@torch.inference_mode()
@pytest.mark.parametrize("null_text", ["masked", "learned", "empty"])
def test_guidance_in_one_batch_equals_two_passes(null_text):
    network = tiny(null_text=null_text)
    x, text, low = inputs()
    keep, encoded = x == network.mask_id, network.encode_low(low)
    cond = network.prepare(text, low=encoded)
    null = network.prepare(text[:1] if null_text == "empty" else None, low=encoded)
    rows = network.mixed_rows(x, [cond, null], [3.0, -2.0], keep)
    c, u = (network.head(network.mixed_rows(x, [s], [1.0], keep)) for s in (cond, null))
    torch.testing.assert_close(network.head(rows), 3 * c - 2 * u, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(c, u, atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("null_text", ["masked", "learned"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_dropped_caption_leaves_the_low_res_tokens(null_text, masked):
    network = tiny(null_text=null_text)
    x, text, low = inputs()
    mask = torch.arange(5).expand(2, -1) < 4 if masked else None
    out = network(x, text, mask, torch.tensor([True, False]), low)
    torch.testing.assert_close(out[:1], network(x[:1], None, low=low[:1]), atol=1e-4, rtol=1e-4)
    shown = network(x[1:], text[1:], mask[1:] if masked else None, low=low[1:])
    torch.testing.assert_close(out[1:], shown, atol=1e-4, rtol=1e-4)
    other = network(x, text, mask, torch.tensor([True, False]), low.flip(1))
    assert not torch.allclose(out[0], other[0], atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("masked", [False, True])
def test_low_res_tokens_can_be_dropped_too(masked):
    network = tiny(null_text="learned", drop_low=True)
    x, text, low = inputs()
    mask = torch.arange(5).expand(2, -1) < 4 if masked else None
    drop = torch.tensor([True, False])
    out, other = (network(x, text, mask, drop, tokens) for tokens in (low, low.flip(1)))
    assert torch.equal(out[0], other[0]) and not torch.allclose(out[1], other[1], atol=1e-2)
    torch.testing.assert_close(out[:1], network(x[:1], None, low=low[:1]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="drop_low needs null_text=learned"):
        SuperResConfig(**TINY, drop_low=True)


def test_every_parameter_gets_a_gradient():
    network = tiny(qk_norm=True).train()
    x, text, low = inputs()
    network(x, text, drop=torch.tensor([True, False]), low=low).square().mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 1}, "heads must be even"),
        ({"block": 0}, "block must be at least 1"),
        ({"low_layers": -1}, "low_layers must be at least 0"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SuperResConfig(**{**TINY, **changes})


def test_low_tokens_at_their_places() -> None:
    """With place_low a high-res token reads the low-res token above it, also unattended."""
    network = tiny(place_low=True, low_layers=0)
    low = torch.zeros(2, 4, 4, dtype=torch.int64)
    low[1, 1, 2] = 3
    side = network.prepare(None, low=network.encode_low(low))
    x = torch.full((2, 8, 8), network.mask_id)
    first, second = network.embedded(x, [side]).view(2, 8, 8, -1)
    changed = (first != second).any(-1)
    assert changed.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    keep = torch.ones_like(x, dtype=torch.bool)
    both = network.mixed_rows(x, [side], [1.0], keep).view(2, 64, -1)
    alone = network.prepare(None, low=network.encode_low(low[1:]))
    own = network.mixed_rows(x[1:], [alone], [1.0], keep[1:])
    torch.testing.assert_close(both[1], own)  # also where every token is still masked
    assert not torch.allclose(both[0], both[1])
