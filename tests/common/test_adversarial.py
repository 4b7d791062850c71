"""The discriminator and the adaptive weight beyond the golden cases."""

import pytest
import torch

from lightning_modules.common.adversarial import ActNorm, NLayerDiscriminator, adaptive_weight
from lightning_modules.common.config import AdversarialConfig


@pytest.mark.parametrize(("layers", "millions", "side"), [(3, 2.77, 30), (2, 0.66, 62)])
def test_discriminator_sizes(layers: int, millions: float, side: int) -> None:
    with torch.device("meta"):
        net = NLayerDiscriminator(layers=layers)
        assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, side, side)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_actnorm_normalises_its_first_training_batch_only() -> None:
    norm, x = ActNorm(3), torch.randn(8, 3, 5, 5) * 4 + 2
    assert torch.equal(norm.eval()(x), x)
    y = norm.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).std(1), torch.ones(3))
    torch.testing.assert_close(norm(2 * x), 2 * y - norm.scale * norm.loc)


def test_adaptive_weight_of_the_scalar_example() -> None:
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    nll, g_loss = 3 * w[0] + 4 * w[1], 0.6 * w[0] + 0.8 * w[1]
    objective = AdversarialConfig(disc_weight=0.8)
    assert float(adaptive_weight(nll, g_loss, w, objective)) == pytest.approx(3.99960004)
    capped = AdversarialConfig(disc_weight=0.8, adaptive_max=2.0)
    assert float(adaptive_weight(nll, g_loss, w, capped)) == pytest.approx(1.6)
    fixed = AdversarialConfig(disc_weight=0.8, adaptive_weight=False)
    assert float(adaptive_weight(nll, g_loss, w, fixed)) == pytest.approx(0.8)
    assert w.grad is None
