"""The moving average against its closed form."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.common.ema import WeightAverage, offline_average


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def step(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        net[1].running_mean.add_(1.0)
        net[1].num_batches_tracked.add_(1)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_closed_form(decay: float) -> None:
    net = module()
    average = WeightAverage(net, decay)
    history = [copy.deepcopy(net.state_dict())]
    for _ in range(12):
        step(net)
        average.update(net)
        history.append(copy.deepcopy(net.state_dict()))
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 13)]
    for name, shadow in average.shadow.items():
        if not shadow.is_floating_point():
            assert torch.equal(shadow, history[-1][name])
            continue
        # w_0 d_1...d_N + sum_n w_n (1 - d_n) d_{n+1}...d_N
        expected = history[0][name].double() * torch.tensor(decays).double().prod()
        for n, d in enumerate(decays, start=1):
            rest = torch.tensor(decays[n:], dtype=torch.float64).prod()
            expected += history[n][name].double() * (1 - d) * rest
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-5)
    assert average.updates == 12


def test_the_shadow_is_no_view_of_the_weights() -> None:
    net = module()
    average = WeightAverage(net, 0.9)
    before = {k: v.clone() for k, v in average.shadow.items()}
    step(net)
    assert all(torch.equal(average.shadow[k], before[k]) for k in before)
    average.update(net)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    average.shadow["0.weight"].zero_()
    assert torch.equal(net.state_dict()["0.weight"], weights["0.weight"])


def test_goes_on_after_a_reload(tmp_path: Path) -> None:
    net = module()
    one = WeightAverage(net, 0.9)
    for _ in range(3):
        step(net)
        one.update(net)
    torch.save(one.state_dict(), tmp_path / "ema.pt")
    two = WeightAverage(net, 0.9)
    two.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    step(net)
    one.update(net)
    two.update(net)
    assert two.updates == one.updates == 4
    assert all(torch.equal(one.shadow[k], two.shadow[k]) for k in one.shadow)


def test_the_offline_average_is_its_closed_form() -> None:
    series = [{"w": torch.randn(3, 2), "n": torch.tensor(k)} for k in range(4)]
    w = [s["w"] for s in series]
    found = offline_average(iter(series), 0.7)
    expected = 0.7**3 * w[0] + 0.3 * (0.7**2 * w[1] + 0.7 * w[2] + w[3])
    torch.testing.assert_close(found["w"], expected)
    assert found["n"] == 3
    assert torch.equal(series[0]["w"], w[0])  # nothing was changed in place
    torch.testing.assert_close(offline_average(series, 0.0)["w"], w[3])
    half = offline_average([{"w": torch.ones(2).bfloat16()}, {"w": torch.zeros(2).bfloat16()}], 0.9)
    assert half["w"].dtype == torch.bfloat16 and half["w"].float().mean() == pytest.approx(
        0.9, 0.01
    )


def test_the_offline_average_refuses_what_does_not_match() -> None:
    one = {"w": torch.zeros(2)}
    for other in ({"w": torch.zeros(3)}, {"v": torch.zeros(2)}, {}):
        with pytest.raises(ValueError, match="checkpoint 2 does not match the first"):
            offline_average([one, other], 0.5)
    with pytest.raises(ValueError, match="no checkpoint"):
        offline_average([], 0.5)
    with pytest.raises(ValueError, match="decay must be"):
        offline_average([one], 1.0)
