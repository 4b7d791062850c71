"""The mathematics of the diffusion model against closed forms."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_modules.common.guidance import mix
from lightning_modules.ldmae import process
from lightning_modules.ldmae.config import DIT_SAMPLING, DiffusionConfig

MU, S = 0.7, 0.4  # mean and standard deviation of the Gaussian data
CHAIN = {
    "linear": DiffusionConfig("ddpm", beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": DiffusionConfig("ddpm"),
}


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).double()


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t] for x1 ~ N(MU, S^2): the flow that it drives ends in MU + S x0."""
    t = t.double()[:, None, None, None]
    variance = (t * S) ** 2 + (1 - t) ** 2
    return MU + (t * S**2 - (1 - t)) / variance * (x - t * MU)


def end_state(x0: Tensor) -> Tensor:
    return MU + S * x0


def error(steps: int, solver: str) -> float:
    x0, times = noise(50), torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    out = process.integrate(gaussian_velocity, x0, times, solver)
    return float((out - end_state(x0)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_have_their_order(solver: str, order: int) -> None:
    errors = [error(steps, solver) for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7])
def test_dopri5_keeps_its_tolerance(rtol: float) -> None:
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return gaussian_velocity(x, t)

    x0 = noise(3)
    out = process.dopri5(counted, x0, atol=rtol, rtol=rtol)
    assert float((out - end_state(x0)).abs().max()) < 10 * rtol
    assert all(bool((t >= 0).all() and (t <= 1).all()) for t in calls)
    assert len(calls) < {1e-3: 60, 1e-5: 120, 1e-7: 240}[rtol]


def test_dopri5_takes_the_steps_of_each_sample_alone() -> None:
    hard = torch.tensor([1.0, 60.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    x0, rounds = noise(3), []

    def alone(rate: Tensor):
        return lambda x, t: rate * (torch.cos(9 * t).view(-1, 1, 1, 1) - x)

    needed: list[Tensor] = []
    together = process.dopri5(
        alone(hard), x0, on_step=lambda i, a, b: rounds.append((a, b)), on_calls=needed.append
    )
    for i in range(3):
        calls: list[Tensor] = []
        own = process.dopri5(alone(hard[i]), x0[i : i + 1], on_calls=calls.append)
        torch.testing.assert_close(together[i : i + 1], own, rtol=0, atol=1e-12)
        assert sum(calls)[0] == sum(needed)[i]
    moved = [(b - a).flatten(1).abs().amax(1) > 0 for a, b in rounds]
    counts = torch.stack(moved).sum(0).tolist()
    assert counts[0] < counts[1] and counts[2] == 0  # the stiff one takes more steps


def test_dopri5_speaks_up() -> None:
    with pytest.raises(ValueError, match="not finite"):
        process.dopri5(lambda x, t: x * torch.nan, noise(1))


def test_dopri5_stops_where_guidance_begins_and_ends() -> None:
    predict, rounds = Recorded(), []
    out = process.piecewise_dopri5(
        lambda interval: process.guided(predict, 3.0, None, interval),
        noise(2),
        (0.25, 0.75),
        atol=1e-6,
        rtol=1e-3,
        on_step=lambda i, before, after: rounds.append(i),
    )
    torch.testing.assert_close(out, noise(2) + 0.25 + 3 * 0.5 + 0.25, rtol=0, atol=1e-12)
    assert rounds == list(range(len(rounds))) and len(rounds) < 30
    switches = [a != b for a, b in itertools.pairwise(predict.passes)]
    assert sum(switches) == 2 and predict.passes[0] == "own"

    predict = Recorded()
    out = process.piecewise_dopri5(
        lambda interval: process.guided(predict, 3.0, None, interval),
        noise(2),
        (0.0, 1.0),
        atol=1e-6,
        rtol=1e-3,
    )
    assert {*predict.passes} == {"own+null"}


def test_the_shifted_grid() -> None:
    t, s = torch.linspace(0, 1, 250), 0.3
    times = process.time_grid(249, s)
    torch.testing.assert_close(times, s * t / (1 + (s - 1) * t))
    assert times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
    assert times.diff()[0] < 1 / 249 < times.diff()[-1]
    assert torch.equal(process.time_grid(7), torch.linspace(0, 1, 8))


class Recorded:
    """A prediction of 1 under the condition and of 0 without, that notes what was asked."""

    def __init__(self) -> None:
        self.passes: list[str] = []

    def __call__(self, x: Tensor, t: Tensor, conditions: Sequence[process.Condition]) -> Tensor:
        self.passes.append("+".join(conditions))
        return torch.stack([torch.full_like(x, name == "own") for name in conditions])


def test_no_pass_without_condition_outside_the_interval() -> None:
    # the released setting leaves the first 68 of its 249 updates unguided
    released, predict = DIT_SAMPLING["released"], Recorded()
    velocity = process.guided(
        predict, released.guidance, 3, (released.guidance_start, released.guidance_end)
    )
    times = process.time_grid(released.steps, released.timestep_shift)
    process.integrate(velocity, torch.zeros(2, 4, 1, 1), times)
    assert predict.passes == ["own"] * 68 + ["own+null"] * 181

    predict = Recorded()
    velocity = process.guided(predict, 4.0, None, (0.25, 0.5))
    out = process.integrate(velocity, torch.zeros(1, 4, 1, 1), torch.linspace(0, 1, 5))
    assert predict.passes == ["own", "own+null", "own+null", "own"]
    torch.testing.assert_close(out, torch.full((1, 4, 1, 1), (1 + 4 + 4 + 1) / 4))


def test_guidance_one_is_no_guidance() -> None:
    predict, x = Recorded(), noise(2).float()
    velocity = process.guided(predict, 1.0)
    assert torch.equal(velocity(x, torch.tensor([0.5])), torch.ones_like(x))
    assert predict.passes == ["own"]


def test_guidance_zero_asks_the_null_alone() -> None:
    predict, x = Recorded(), noise(2).float()
    velocity = process.guided(predict, 0.0)
    assert torch.equal(velocity(x, torch.tensor([0.5])), torch.zeros_like(x))
    assert predict.passes == ["null"]
    # other channels, and samples outside of the interval, go by their condition
    some = process.guided(predict, 0.0, 1)(torch.zeros(1, 3, 1, 1), torch.tensor([0.5]))
    assert some.flatten().tolist() == [0.0, 1.0, 1.0]
    outside = process.guided(predict, 0.0, None, (0.4, 1.0))
    assert outside(torch.zeros(2, 1, 1, 1), torch.tensor([0.3, 0.5])).flatten().tolist() == [1, 0]
    assert predict.passes[1:] == ["own+null"] * 2


def test_guidance_of_all_and_of_some_channels() -> None:
    g = torch.Generator().manual_seed(0)
    own, null = torch.randn(2, 3, 5, 2, 2, generator=g)
    expected = null + 7.5 * (own - null)
    torch.testing.assert_close(mix(own, null, 7.5), expected)
    some = mix(own, null, 7.5, 2)
    torch.testing.assert_close(some[:, :2], expected[:, :2])
    assert torch.equal(some[:, 2:], own[:, 2:])


def test_every_sample_has_its_own_place_in_the_interval() -> None:
    velocity = process.guided(Recorded(), 3.0, None, (0.4, 0.6))
    out = velocity(torch.zeros(4, 1, 1, 1), torch.tensor([0.3, 0.4, 0.6, 0.7]))
    assert out.flatten().tolist() == [1.0, 3.0, 3.0, 1.0]


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_held_latents_come_back(solver: str) -> None:
    x0, known = noise(2), noise(2, seed=1)
    generate = torch.tensor([[True, False], [False, True]]).expand(2, 1, 2, 2)
    velocity = process.held(gaussian_velocity, known, x0, generate)
    if solver == "dopri5":
        out = process.dopri5(velocity, x0)
    else:
        out = process.integrate(velocity, x0, process.time_grid(9, 0.4).double(), solver)
    torch.testing.assert_close(out[~generate], known[~generate], rtol=0, atol=1e-6)
    assert (out - known)[generate].abs().min() > 1e-3


def test_the_straight_path() -> None:
    x0, x1, t = noise(3), noise(3, 1), torch.tensor([0.0, 0.25, 1.0]).double()
    xt, velocity = process.straight_path(x0, x1, t)
    torch.testing.assert_close(xt[0], x0[0])
    torch.testing.assert_close(xt[1], 0.25 * x1[1] + 0.75 * x0[1])
    torch.testing.assert_close(xt[2], x1[2])
    torch.testing.assert_close(velocity, x1 - x0)


def test_losses() -> None:
    a, b = noise(3).expand(-1, 4, -1, -1) * torch.arange(1, 5).view(1, 4, 1, 1), noise(3, 1)
    b = b.repeat(1, 4, 1, 1)
    torch.testing.assert_close(process.squared_error(a, b), ((a - b) ** 2).mean((1, 2, 3)))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(process.direction_error(a, b), (1 - cosine).mean((1, 2)))
    torch.testing.assert_close(process.direction_error(9 * a, a), torch.zeros(3).double())


def test_lognormal_times() -> None:
    normals = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = process.training_times(normals)
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    assert float(t.median()) == pytest.approx(0.5, abs=0.01)
    # a quarter of the normals lies above 0.6745
    assert float(t.quantile(0.75)) == pytest.approx(1 / (1 + math.exp(-0.6745)), abs=0.01)


def test_noise_belongs_to_the_seed() -> None:
    three = process.sample_noise([5, 6, 7], (2, 3, 3))
    assert torch.equal(three[1:2], process.sample_noise([6], (2, 3, 3)))
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three, process.sample_noise([5, 6, 7], (2, 3, 3), 1))


@pytest.mark.parametrize("schedule", CHAIN)
def test_the_chain(schedule: str) -> None:
    config = CHAIN[schedule]
    shares, beta = process.signal_shares(config), 1.0
    for k in range(config.train_steps):
        fraction = k / (config.train_steps - 1)
        if schedule == "linear":
            b = config.beta_start + fraction * (config.beta_end - config.beta_start)
        else:
            low, high = config.beta_start**0.5, config.beta_end**0.5
            b = (low + fraction * (high - low)) ** 2
        beta *= 1 - b
        if k in (0, 499, 999):
            assert float(shares[k]) == pytest.approx(beta, rel=1e-9)
    x, z = noise(2), noise(2, 1)
    k = torch.tensor([0, 999])
    a = shares[k][:, None, None, None]
    torch.testing.assert_close(process.diffuse(z, x, shares[k]), a**0.5 * x + (1 - a) ** 0.5 * z)


def test_the_steps_of_the_chain_that_are_visited() -> None:
    assert process.chain_grid(1000, 1000) == list(range(999, -1, -1))
    assert process.chain_grid(4, 1000) == [999, 749, 499, 249]
    assert process.chain_grid(3, 10) == [9, 6, 2]


def gaussian_noise(shares: Tensor):
    """E[noise | x_k] for x ~ N(MU, S^2)."""

    def predict(x: Tensor, k: Tensor) -> Tensor:
        a = float(shares[int(k)])
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)

    return predict


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_chain_ends_in_the_data(eta: float) -> None:
    shares = process.signal_shares(CHAIN["linear"])
    x, g = noise(5000), torch.Generator().manual_seed(1)
    fresh = (torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(999))
    grid = process.chain_grid(1000, 1000)
    x = process.ddim(gaussian_noise(shares), x, grid, shares, eta=eta, fresh=fresh)
    assert float(x.mean()) == pytest.approx(MU, abs=0.015)
    assert float(x.std()) == pytest.approx(S, abs=0.015)


def test_an_ancestral_step_is_that_of_ddpm() -> None:
    # x' ~ N((x - beta / sqrt(1 - a) noise) / sqrt(1 - beta), beta (1 - a') / (1 - a)): eq. 7 and 11
    shares = process.signal_shares(CHAIN["linear"])
    k, states = 600, []
    x, e, z = noise(2), noise(2, 1), noise(2, 2)
    process.ddim(
        lambda x, k: e,
        x,
        [k, k - 1],
        shares,
        eta=1.0,
        fresh=[z],
        on_step=lambda i, before, after: states.append(after),
    )
    a, after = float(shares[k]), float(shares[k - 1])
    beta = 1 - a / after
    mean = (x - beta / math.sqrt(1 - a) * e) / math.sqrt(1 - beta)
    std = math.sqrt(beta * (1 - after) / (1 - a))
    torch.testing.assert_close(states[0], mean + std * z)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_held_noise_brings_known_latents_back(eta: float) -> None:
    shares, known = process.signal_shares(CHAIN["scaled_linear"]), noise(2, 3)
    generate = torch.tensor([[True, False], [False, True]]).expand(2, 1, 2, 2)
    predict = process.held_noise(gaussian_noise(shares), known, shares, generate)
    fresh = (noise(2, 10 + i) for i in range(20))
    out = process.ddim(
        predict, noise(2), process.chain_grid(20, 1000), shares, eta=eta, fresh=fresh
    )
    torch.testing.assert_close(out[~generate], known[~generate])
    assert (out - known)[generate].abs().min() > 1e-3
