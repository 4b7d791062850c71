"""The base transformer: sizes, guidance, dropped captions and what is computed once."""

import pytest
import torch
from torch import nn

from lightning_modules.muse.config import MODELS, ModelConfig
from lightning_modules.muse.network import CrossAttention, MaskedTransformer, SelfAttention

TINY = {
    "num_codes": 20,
    "hidden": 16,
    "mlp": 24,
    "layers": 3,
    "heads": 4,
    "max_side": 6,
    "text_width": 10,
}
OPTIONS = [
    {},
    {"norm": "post", "qk_norm": True},
    {"positions": "flat", "tied_head": True, "null_text": "learned"},
    {"head_mlp": False, "null_text": "empty"},
    {"mlp_type": "conv"},
    {"mlp_type": "conv", "norm": "post"},
]


def tiny(**changes) -> MaskedTransformer:
    torch.manual_seed(0)
    network = MaskedTransformer(ModelConfig(**{**TINY, **changes})).eval()
    for p in network.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return network


def inputs(batch=2, grid=(4, 6), length=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TINY["num_codes"], (batch, *grid), generator=g)
    x[torch.rand(x.shape, generator=g) < 0.6] = TINY["num_codes"]
    return x, torch.randn(batch, length, TINY["text_width"], generator=g)


def null_side(network, text):
    """The other side of the guidance, for one image or all."""
    return network.prepare(text[:1] if network.config.null_text == "empty" else None)


def test_sizes_of_the_paper():
    counts = {}
    for name, config in MODELS.items():
        with torch.device("meta"):
            network = MaskedTransformer(config)
        counts[name] = sum(p.numel() for p in network.parameters())
        parts = [block.own, block.cross, block.mlp] if (block := network.blocks[0]) else []
        inside = sum(p.numel() for part in parts for p in part.parameters())
        assert inside == 8 * config.hidden**2 + 2 * config.hidden * config.mlp
    assert counts == {"3b": 3_267_737_600, "632m": 626_154_496}
    assert MODELS["3b"].layers == 48 and MODELS["3b"].hidden == 2048 and MODELS["3b"].mlp == 8192


@torch.inference_mode()
@pytest.mark.parametrize("changes", OPTIONS)
def test_guidance_in_one_batch_equals_two_passes(changes):
    network = tiny(**changes)
    x, text = inputs()
    keep = x == network.mask_id
    cond, null = network.prepare(text), null_side(network, text)
    assert null.batch == 1
    rows = network.mixed_rows(x, [cond, null], [3.5, -2.5], keep)
    c, u = (network.mixed_rows(x, [side], [1.0], keep) for side in (cond, null))
    expected = network.head(u) + 3.5 * (network.head(c) - network.head(u))
    torch.testing.assert_close(network.head(rows), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(c, u, atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("changes", OPTIONS)
def test_kept_rows_are_those_of_the_whole_grid(changes):
    network = tiny(**changes)
    x, text = inputs()
    keep = x == network.mask_id
    assert keep.any() and not keep.all()
    logits = network(x, text)
    assert logits.shape == (2, 4, 6, 20)
    some = network.head(network.mixed_rows(x, [network.prepare(text)], [1.0], keep))
    torch.testing.assert_close(some, logits[keep], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_images_that_are_all_masks_share_a_pass():
    network = tiny()
    x, text = inputs(batch=3)
    x[:] = network.mask_id
    seen = []
    network.blocks[0].own.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    network.blocks[1].own.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    sides = [network.prepare(text), network.prepare(None)]
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    shared = network.mixed_rows(x, sides, [2.0, -1.0], keep)
    assert seen == [1, 3 + 1]
    alone = [
        network.mixed_rows(
            x[i : i + 1], [network.prepare(text[i : i + 1]), sides[1]], [2.0, -1.0], keep[i : i + 1]
        )
        for i in range(3)
    ]
    torch.testing.assert_close(shared, torch.cat(alone), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_masked_padding_changes_nothing():
    network = tiny()
    x, text = inputs()
    padded = torch.cat([text, 100 * torch.randn(2, 3, 10)], dim=1)
    mask = torch.arange(8).expand(2, -1) < 5
    torch.testing.assert_close(network(x, padded, mask), network(x, text))
    assert not torch.allclose(network(x, padded), network(x, text), atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("null_text", ["masked", "learned"])
def test_a_dropped_caption_is_the_null_side(null_text):
    network = tiny(null_text=null_text)
    x, text = inputs()
    mask = torch.arange(5).expand(2, -1) < 4
    out = network(x, text, mask, torch.tensor([True, False]))
    torch.testing.assert_close(out[:1], network(x[:1], None), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[1:], network(x[1:], text[1:], mask[1:]), atol=1e-5, rtol=1e-4)
    mask = mask & torch.tensor([[False], [True]])  # no key at all is no matter where all are hidden
    drop = torch.tensor([True, False])
    assert network.prepare(text, mask, drop).mask.any(1).all()  # no softmax over nothing
    other = network(x, 2 * text, mask, drop)
    torch.testing.assert_close(other[0], out[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out[1], other[1], atol=1e-2)


def test_a_dropped_empty_caption_is_refused():
    network = tiny(null_text="empty")
    with pytest.raises(ValueError, match="text of ''"):
        network.prepare(None)
    with pytest.raises(ValueError, match="text of ''"):
        network.prepare(inputs()[1], drop=torch.tensor([True, False]))


def test_a_masked_null_side_computes_no_cross_attention():
    network = tiny()
    x, _ = inputs()

    def never(module, args):
        raise AssertionError("nothing is there to attend to")

    for module in network.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_pre_hook(never)
    assert network(x, None).shape == (2, 4, 6, 20)


@pytest.mark.parametrize("changes", OPTIONS)
def test_every_parameter_gets_a_gradient(changes):
    network = tiny(**changes, dropout=0.1).train()
    x, text = inputs()
    drop = None if network.config.null_text == "empty" else torch.tensor([True, False])
    network(x, text, drop=drop).square().mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("changes", OPTIONS)
def test_half_precision_by_autocast(changes):
    network = tiny(**changes)
    x, text = inputs()
    expected = network(x, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x, text)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()
    logits.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_dropout_only_in_training():
    network = tiny(dropout=0.5)
    x, text = inputs()
    assert torch.equal(network(x, text), network(x, text))
    network.train()
    assert not torch.allclose(network(x, text), network(x, text), atol=1e-2)


def test_initialisation():
    network = MaskedTransformer(ModelConfig(**TINY))
    for name, p in network.named_parameters():
        if p.ndim > 1:
            assert 0.01 < p.std() < 0.025 and p.abs().max() <= 0.04, name
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in name or "head_mlp" in name)))


def test_positions_reach_as_far_as_the_setting():
    network = tiny()
    x, text = inputs(grid=(7, 3))
    with pytest.raises(ValueError, match=r"6 tokens a side, got 7x3"):
        network(x, text)
    for positions in ("factorised", "flat"):
        table = tiny(positions=positions).embed
        same = torch.zeros(1, 3, 4, dtype=torch.int64)
        assert len(table(same)[0].unique(dim=0)) == 12
        torch.testing.assert_close(  # a smaller grid is the corner of a larger one
            table(same).view(3, 4, -1)[:2, :3], table(same[:, :2, :3]).view(2, 3, -1)
        )


def test_a_critic_has_one_number_per_token():
    torch.manual_seed(0)
    critic = MaskedTransformer(ModelConfig(**TINY, tied_head=True), outputs=1)
    x, text = inputs()
    assert critic(x, text).shape == (2, 4, 6, 1)
    assert critic.table.shape == (1, 16)


@torch.inference_mode()
def test_self_attention_normalises_queries_and_keys():
    torch.manual_seed(0)
    attention = SelfAttention(ModelConfig(**TINY, qk_norm=True)).eval()
    x = torch.randn(1, 6, 16)
    q, k, v = (part.view(1, 6, 4, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    q, k = (t / t.square().mean(-1, keepdim=True).sqrt() for t in (q, k))
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, (2, 3)), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads must divide hidden"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**TINY, **changes})
