"""The optimizer: the update of its paper, by one kernel, exact across a resumption."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.common.config import OptimConfig
from lightning_modules.common.optim import adamw

CONFIG = OptimConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, decay_all=False)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(33, 17), nn.LayerNorm(17), nn.Linear(17, 5))


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def textbook(weights: list[Tensor], steps: int) -> list[Tensor]:
    """Algorithm 2 of arXiv 1711.05101 in float64; matrices alone decay."""
    b1, b2 = CONFIG.betas
    weights = [w.double().clone() for w in weights]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    module = network()
    for t in range(1, steps + 1):
        gradients(module, t)
        for i, p in enumerate(module.parameters()):
            assert p.grad is not None
            g = p.grad.double()
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            decay = CONFIG.weight_decay * weights[i] if weights[i].ndim >= 2 else 0.0
            ahead = m[i] / (1 - b1**t) / ((v[i] / (1 - b2**t)).sqrt() + 1e-8)
            weights[i] = weights[i] - CONFIG.lr * (ahead + decay)
    return weights


def test_the_update_is_that_of_the_paper() -> None:
    module = network()
    expected = textbook([p.detach() for p in module.parameters()], 20)
    optimizer = adamw(CONFIG, [module])
    assert all(group["fused"] for group in optimizer.param_groups)
    for t in range(1, 21):
        gradients(module, t)
        optimizer.step()
    for p, w in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.bits
def test_a_resumed_optimizer_makes_the_same_bits() -> None:
    whole, half, resumed = network(), network(), network(1)
    optimizers = [adamw(CONFIG, [module]) for module in (whole, half, resumed)]
    for module, optimizer in zip((whole, half), optimizers, strict=False):
        for t in range(1, 11 if module is whole else 6):
            gradients(module, t)
            optimizer.step()
    resumed.load_state_dict(half.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    for t in range(6, 11):
        gradients(resumed, t)
        optimizers[2].step()
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_that_a_scaler_unscales_are_clipped_before_the_update() -> None:
    optimizer = adamw(CONFIG, [network()], precision="16-mixed")
    assert not any(group["fused"] for group in optimizer.param_groups)
