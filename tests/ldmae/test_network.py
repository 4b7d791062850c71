"""LightningDiT: sizes, conditions, and the work that is done once."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ldmae.config import DIT_MODELS, DiTConfig
from lightning_modules.ldmae.network import DiT, RMSNorm, Rotation, Side

SMALL = {"input_size": 4, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
TEXT = {**SMALL, "num_classes": 0, "text_width": 6}
LABEL = {**SMALL, "num_classes": 5}


def make(**settings: Any) -> DiT:
    """A network whose silent branches speak."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(DiTConfig(**settings))
        for p in network.parameters():
            if not p.any() or p.ndim == 1:
                torch.nn.init.normal_(p, std=0.3)
    return network.eval()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sides(network: DiT) -> list[Side]:
    """Two conditions of two samples, and one that both share."""
    if not network.config.text_width:
        label = network.label_side
        return [label(torch.tensor([1, 3])), label(torch.tensor([4, 0])), label(torch.tensor([5]))]
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    text = network.text_side
    return [
        text(numbers(2, 4, 6, seed=1), mask),
        text(numbers(2, 3, 6, seed=2)),
        text(numbers(1, 1, 6, seed=3)),
    ]


@pytest.mark.parametrize(
    ("name", "count"),
    [("paper", 130_336_528), ("xl1", 674_928_976), ("celebahq", 129_566_992)],
)
def test_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        network = DiT(DIT_MODELS[name])
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
    assert network.pos_embed.shape == (1, 1024, network.config.hidden_size)


def test_a_new_network_predicts_nothing() -> None:
    for settings in (TEXT, LABEL):
        network = DiT(DiTConfig(**settings))
        out = network(numbers(2, 3, 4, 4), torch.tensor([0.1, 0.9]), sides(network)[:1])
        assert out.shape == (1, 2, 3, 4, 4) and not out.any()


@pytest.mark.parametrize("settings", [TEXT, LABEL, {**TEXT, "patch_size": 2, "wo_shift": True}])
@torch.inference_mode()
def test_conditions_do_not_see_each_other(settings: dict[str, Any]) -> None:
    network, x, t = make(**settings), numbers(2, 3, 4, 4), torch.tensor([0.3])
    given = sides(network)
    together = network(x, t, given)
    for side, out in zip(given, together, strict=True):
        torch.testing.assert_close(network(x, t, [side])[0], out, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2
    for i in range(2):  # nor do samples
        rows = [
            Side(
                s.vector[i : i + 1] if len(s.vector) > 1 else s.vector,
                [(k[i : i + 1], v[i : i + 1]) if len(k) > 1 else (k, v) for k, v in s.text],
                s.mask if s.mask is None else s.mask[i : i + 1],
            )
            for s in given
        ]
        alone = network(x[i : i + 1], t, rows)
        torch.testing.assert_close(alone, together[:, i : i + 1], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_shared_time_is_that_of_every_sample() -> None:
    network, x = make(**LABEL), numbers(2, 3, 4, 4)
    one = network(x, torch.tensor([0.4]), sides(network))
    both = network(x, torch.tensor([0.4, 0.4]), sides(network))
    torch.testing.assert_close(one, both)
    other = network(x, torch.tensor([0.4, 0.9]), sides(network))
    torch.testing.assert_close(one[:, 0], other[:, 0])
    assert (one[:, 1] - other[:, 1]).abs().max() > 1e-4


@torch.inference_mode()
def test_modulation_is_computed_once_per_row() -> None:
    network, rows = make(**LABEL), []
    network.blocks[0].adaLN_modulation.register_forward_hook(
        lambda module, args, output: rows.append(len(args[0]))
    )
    x, t = numbers(6, 3, 4, 4), torch.tensor([0.4])
    null = network.label_side(torch.tensor([5]))
    network(x, t, [network.label_side(torch.arange(6) % 5), null])
    network(x, t, [null])
    network(x, t.expand(6), [null])
    assert rows == [7, 1, 6]  # six labels and the null one; one; six times


@torch.inference_mode()
def test_padding_is_not_seen() -> None:
    network, x, t = make(**TEXT), numbers(1, 3, 4, 4), torch.tensor([0.5])
    tokens = numbers(1, 5, 6)
    plain = network(x, t, [network.text_side(tokens[:, :3])])
    mask = torch.tensor([[True, True, True, False, False]])
    padded = network(x, t, [network.text_side(tokens, mask)])
    torch.testing.assert_close(plain, padded)
    seen = network(x, t, [network.text_side(tokens)])
    assert (seen - plain).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [TEXT, LABEL])
def test_everything_is_trained(settings: dict[str, Any]) -> None:
    network = make(**settings)
    network(numbers(2, 3, 4, 4), torch.tensor([0.2, 0.8]), sides(network)).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_activations_computed_again() -> None:
    plain = make(**TEXT).train()
    again = make(**TEXT, use_checkpoint=True).train()
    x, t = numbers(2, 3, 4, 4), torch.tensor([0.2, 0.8])
    for network in (plain, again):
        network(x, t, sides(network)[:1]).square().sum().backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_norm_and_its_way_back() -> None:
    norm, x = RMSNorm(8).double(), numbers(2, 3, 8).double().requires_grad_()
    torch.testing.assert_close(norm(x), F.rms_norm(x.float(), (8,), eps=1e-6).double())
    plain = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    g = numbers(2, 3, 8, seed=1).double()
    ours, theirs = (torch.autograd.grad(f(x), x, g)[0] for f in (norm, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rotation_tells_distances() -> None:
    rotation = Rotation(8, 5)
    q, k = numbers(2, 8)
    turned_q, turned_k = rotation(q.expand(25, -1)), rotation(k.expand(25, -1))
    scores = (turned_q @ turned_k.T).view(5, 5, 5, 5)  # row and column of q, then of k
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[2, 3, 4, 4])
    torch.testing.assert_close(scores[1, 1, 1, 1], q @ k)
    assert (scores[0, 0, 2, 1] - scores[0, 0, 1, 2]).abs() > 1e-3


@pytest.mark.parametrize("settings", [TEXT, LABEL])
@torch.inference_mode()
def test_half_precision(settings: dict[str, Any]) -> None:
    network, x, t = make(**settings), numbers(2, 3, 4, 4), torch.tensor([0.5])
    full = network(x, t, sides(network))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x, t, sides(network))
    assert (half.float() - full).norm() < 0.05 * full.norm()
    converted = copy.deepcopy(network).bfloat16()
    with torch.autocast("cpu", enabled=False):
        given = (
            [converted.label_side(torch.tensor([1, 3]))]
            if settings is LABEL
            else [converted.text_side(numbers(2, 4, 6, seed=1).bfloat16())]
        )
        assert converted(x.bfloat16(), t, given).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"hidden_size": 770}, "hidden_size must be a multiple of 4 and of num_heads"),
        ({"hidden_size": 24, "num_heads": 4}, "a multiple of 4 num_heads with use_rope"),
        ({"patch_size": 3}, "input_size must be a multiple of patch_size"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must be from 0 to 1"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**settings)
