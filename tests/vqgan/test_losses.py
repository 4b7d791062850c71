"""The loss of the autoencoder beyond the golden cases."""

import pytest
import torch

from lightning_modules.common.adversarial import disc_factor
from lightning_modules.vqgan.config import ObjectiveConfig
from lightning_modules.vqgan.losses import reconstruction_loss


def test_weights_and_start_of_the_parts() -> None:
    objective = ObjectiveConfig(pixel_loss="l2", pixel_weight=4.0, disc_start=3, disc_factor=2.0)
    assert [disc_factor(objective, n) for n in (0, 2, 3, 4)] == [0, 0, 2, 2]
    x = torch.zeros(1, 3, 2, 2)
    nll, parts = reconstruction_loss(x, x + 0.5, objective, None)
    assert float(nll) == pytest.approx(1.0) and parts.keys() == {"rec"}
