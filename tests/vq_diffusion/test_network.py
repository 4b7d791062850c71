"""Sizes and invariants of the denoiser."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.vq_diffusion.config import MODELS, ModelConfig
from lightning_modules.vq_diffusion.network import Denoiser, Past, Side

TINY = {
    "num_codes": 11,
    "n_layer": 2,
    "n_embd": 12,
    "n_head": 3,
    "mlp_hidden_times": 2,
    "spatial_size": [4, 5],
    "diffusion_steps": 9,
    "condition_dim": 7,
    "class_number": 5,
}
GRID = (4, 5)
NO_LABEL = 99


def tiny(**changes) -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(ModelConfig(**{**TINY, **changes})).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)  # the released initialisation hides what depends on what
    return network


def inputs(batch: int = 3, grid: tuple[int, int] = GRID) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TINY["num_codes"] + 1, (batch, *grid), generator=g)
    return x, torch.randint(TINY["diffusion_steps"], (batch,), generator=g)


def condition(kind: str, batch: int = 3, seed: int = 2, length: int = 6) -> Tensor | None:
    g = torch.Generator().manual_seed(seed)
    if kind == "text":
        return torch.randn(batch, length, 7, generator=g)
    return torch.randint(5, (batch,), generator=g) if kind == "class" else None


def a_side(network: Denoiser, **made) -> Side:
    return network.prepare(condition(network.config.condition, **made))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("s", 35_936_647),
        ("b", 388_780_871),
        ("l", 1_359_274_624),
        ("imagenet", 518_025_678),
        ("ffhq", 411_185_664),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = Denoiser(MODELS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert not list(network.buffers())


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 5},
        {"num_codes": 0},
        {"spatial_size": [4]},
        {"dropout": 1.0},
        {"n_embd": 9, "timestep_type": "adalayernorm_abs"},
        {"condition": "class", "class_type": "adainsnorm", "causal": True},
    ],
)
def test_impossible_sizes_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError):
        ModelConfig(**{**TINY, **changes})


KINDS = [
    {"condition": condition, "mlp_type": mlp}
    for condition, mlp in itertools.product(("text", "class", "none"), ("fc", "conv_mlp"))
]


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_image_does_not_depend_on_its_batch(kind: dict) -> None:
    network = tiny(**kind)
    (x, t), given = inputs(), condition(kind["condition"])
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    together = network.mixed_rows(x, t, [network.prepare(given)], [1.0], keep)
    for i, rows in enumerate(together.split(keep.sum((1, 2)).tolist())):
        one = slice(i, i + 1)
        side = network.prepare(None if given is None else given[one])
        expected = network.mixed_rows(x[one], t[one], [side], [1.0], keep[one])
        torch.testing.assert_close(rows, expected)


@torch.inference_mode()
@pytest.mark.parametrize("timestep_type", ["adalayernorm", "adalayernorm_abs"])
def test_a_batch_of_equal_t_is_what_its_images_are(timestep_type: str) -> None:
    network = tiny(timestep_type=timestep_type)
    (x, _), side = inputs(), a_side(network)
    each = network.features(x, torch.full((3,), 4), [side])
    for t in (torch.tensor([4]), torch.tensor(4).expand(3)):
        torch.testing.assert_close(network.features(x, t, [side]), each)
    assert not torch.allclose(network.features(x, torch.tensor([5]), [side]), each, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_guidance_in_one_batch_is_guidance_of_log_probabilities(kind: dict) -> None:
    network = tiny(**kind)
    x, t = inputs()
    side = a_side(network)
    # one null for all images, of another length
    null = a_side(network, batch=1, seed=5, length=1)
    keep = x < 8
    logp = [
        network.head(network.mixed_rows(x, t, [s], [1.0], keep)).log_softmax(1)
        for s in (side, null)
    ]
    assert not torch.allclose(*logp, atol=0.01)
    for scale in (1.0, 3.0, 0.5):
        rows = network.mixed_rows(x, t, [side, null], [scale, 1 - scale], keep)
        guided = logp[1] + scale * (logp[0] - logp[1])
        torch.testing.assert_close(
            network.head(rows).log_softmax(1), guided.log_softmax(1), rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_masked_padding_changes_nothing() -> None:
    network = tiny()
    x, t = inputs()
    g = torch.Generator().manual_seed(2)
    text, lengths = torch.randn(3, 6, 7, generator=g), torch.tensor([6, 2, 4])
    mask = torch.arange(9) < lengths[:, None]
    padded = torch.cat([text, torch.randn(3, 3, 7, generator=g)], 1).where(mask[..., None], 9.0)
    logits = network(x, t, padded, mask)
    for i, n in enumerate(lengths):
        alone = network(x[i : i + 1], t[i : i + 1], text[i : i + 1, :n])
        torch.testing.assert_close(logits[i : i + 1], alone)
    assert not torch.allclose(network(x, t, padded), logits, atol=0.01)


@torch.inference_mode()
@pytest.mark.parametrize("class_type", ["adalayernorm", "adainsnorm"])
def test_a_label_beyond_the_table_is_the_mean_class(class_type: str) -> None:
    network = tiny(condition="class", class_type=class_type)
    x, t = inputs()
    labels = torch.tensor([1, 5, NO_LABEL])
    logits = network(x, t, labels)
    torch.testing.assert_close(logits[:1], network(x[:1], t[:1], labels[:1]))
    torch.testing.assert_close(logits[1:], network(x[1:], t[1:], torch.tensor([NO_LABEL] * 2)))
    for block in network.blocks:  # row 0 becomes the mean of all
        table = block.ln2.emb.weight
        table[0] = table[1:].mean(0)
    torch.testing.assert_close(
        network(x, t, torch.tensor([0] * 3)), network(x, t, torch.tensor([5] * 3))
    )


def test_a_condition_must_fit_the_network() -> None:
    with pytest.raises(ValueError, match="none was given"):
        tiny().prepare()
    with pytest.raises(ValueError, match="one was given"):
        tiny(condition="none").prepare(torch.zeros(1, 2, 7))


@torch.inference_mode()
def test_places_are_counted_in_the_tables_columns() -> None:
    network = tiny(spatial_size=[3, 8])
    table = network.content_emb
    x, t = inputs(grid=(4, 4))
    tokens = x.flatten(1)
    expected = table.emb(tokens)
    for i in range(16):
        expected[:, i] += table.height_emb.weight[i // 8] + table.width_emb.weight[i % 8]
    torch.testing.assert_close(table(tokens), expected)
    changed = a_side(network)
    before = network.features(x, t, [changed])
    table.height_emb.weight[2] += 1  # a row that a 4x4 grid does not reach
    assert torch.equal(network.features(x, t, [changed]), before)
    x, t = inputs(grid=(5, 5))
    with pytest.raises(ValueError, match=r"3x8 .* 25 tokens"):
        network.features(x, t, [changed])


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_causal_token_sees_those_before_it(kind: dict) -> None:
    network = tiny(causal=True, **kind)
    (x, t), side = inputs(), a_side(network)
    rows = network.mixed_rows(x, t, [side], [1.0]).unflatten(0, (3, 20))
    for place in (0, 7, 19):
        other = x.clone()
        other.flatten(1)[:, place] = (other.flatten(1)[:, place] + 1) % 11
        changed = network.mixed_rows(other, t, [side], [1.0]).unflatten(0, (3, 20))
        same = (changed == rows).all(2).all(0)
        assert same[: place + 1].all() and not same[place + 1 :].any()


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_token_by_token_equals_all_at_once(kind: dict) -> None:
    network = tiny(causal=True, **kind)
    (x, t), sides, shares = inputs(), [a_side(network)], [1.0]
    if kind["condition"] != "none":
        sides, shares = [*sides, a_side(network, batch=1, seed=6, length=2)], [2.5, -1.5]
    expected = network.mixed_rows(x, t, sides, shares).unflatten(0, (3, 20))
    pasts = [Past() for _ in network.blocks]
    drawn = torch.full_like(x, -1)  # what is not drawn yet must not be looked at
    for place in range(20):
        rows = network.next_rows(drawn, t, sides, shares, pasts)
        torch.testing.assert_close(rows, expected[:, place])
        drawn.flatten(1)[:, place] = x.flatten(1)[:, place]
    assert all(past.length == 20 for past in pasts)


def test_recomputing_blocks_changes_no_gradient() -> None:
    gradients = []
    for again in (False, True):
        network, runs = tiny(checkpoint_blocks=again).train(), []
        network.blocks[0].attn1.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        (x, t), side = inputs(), a_side(network)
        network.features(x, t, [side]).square().mean().backward()
        assert len(runs) == 1 + again
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_parameter_learns(kind: dict) -> None:
    network = tiny(**kind).train()
    (x, t), side = inputs(), a_side(network)
    network.head(network.mixed_rows(x, t, [side], [1.0])).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_and_half_precision(kind: dict) -> None:
    network, (x, t) = tiny(**kind), inputs()
    given = condition(kind["condition"])
    for times in (t, t[:1]):
        expected = network(x, times, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(x, times, given)
            logits.float().square().mean().backward()
        error = (logits - expected).abs().mean() / expected.abs().mean()
        assert logits.dtype == torch.bfloat16 and 0 < error < 0.05
    text = given if given is None or not given.is_floating_point() else given.bfloat16()
    assert network.bfloat16()(x, t, text).dtype == torch.bfloat16


def test_released_initialisation() -> None:
    torch.manual_seed(0)
    network = Denoiser(ModelConfig(**{**TINY, "n_embd": 96, "pos_emb_type": "parameter"}))
    for name, p in network.named_parameters():
        if name.endswith("bias") or "height_emb" in name or "width_emb" in name:
            assert not p.any(), name
        elif "ln2" in name or "to_logits.0" in name:
            assert (p == 1).all(), name
        else:
            assert 0.018 < p.std() < 0.022, name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@torch.inference_mode()
@pytest.mark.parametrize("mlp_type", ["fc", "conv_mlp"])
def test_attention_is_never_held_and_the_head_sees_kept_rows_only(mlp_type: str) -> None:
    network = tiny(spatial_size=[32, 32], mlp_type=mlp_type, num_codes=5000)
    x, t = inputs(batch=1, grid=(32, 32))
    keep = torch.zeros_like(x, dtype=torch.bool)
    keep[0, 3, :4] = True
    side = a_side(network, batch=1)
    with Largest() as largest:
        network.head(network.mixed_rows(x, t, [side, side], [2.0, -1.0], keep))
    # the widest is the hidden layer of both sides' MLPs; the token table is no result
    assert largest.numel <= 2 * 1024 * 24
