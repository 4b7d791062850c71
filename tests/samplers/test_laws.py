"""Every sampler that claims a law has it, by chi-square tests of 50,000 draws; errors are seen."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_modules.common import categorical
from lightning_modules.samplers import entropy_bound, flow, kernel, loop, posterior
from lightning_modules.samplers.entropy_bound import EntropyBound
from lightning_modules.samplers.flow import Flow
from lightning_modules.samplers.kernel import Corruption, Kernel
from lightning_modules.samplers.loop import Rows
from lightning_modules.samplers.ordered import Ordered, moment
from lightning_modules.samplers.posterior import Gibbs, Posterior
from lightning_modules.samplers.remdm import ReMDM
from tests.samplers.toy import (
    CLEAN,
    DRAWS,
    KERNELS,
    NOISY,
    K,
    N,
    P,
    Uniforms,
    chain,
    clean_law,
    exact,
    likelihood,
    noise_law,
    p_value,
    place,
    predictor,
    sampled,
)

HOLDS, FAILS = 1e-3, 1e-6
STEPS = 3
every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(autouse=True)
def large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows pass all at once: speed, and no other numbers."""
    monkeypatch.setattr(loop, "AT_ONCE", 10**6)
    monkeypatch.setattr(categorical, "DRAWN_AT_ONCE", 10**6)
    defaults = {**categorical.draw_rows.__kwdefaults__, "chunk": 10**6}
    monkeypatch.setattr(categorical.draw_rows, "__kwdefaults__", defaults)


# The exact posterior ----


def bayes(name: str, late: float, early: float) -> Tensor:
    """p(x_s | x_t) of every place given a noisy state by Bayes' rule, [(K + 1)^N, N, K + 1]."""
    noise = KERNELS[name]
    t, s = ([float(v) for v in noise.at(time)] for time in (late, early))
    p0 = exact(noise, late)

    def forward(keep: float, replaced: float, mask: float) -> Tensor:  # [from K + 1, to K + 1]
        law = torch.full((K + 1, K + 1), replaced, dtype=torch.float64)
        law[:K, :K] += keep * torch.eye(K, dtype=torch.float64)
        law[:, K], law[K] = mask, 0
        law[K, K] = 1
        return law

    shown = (1 - t[2]) / (1 - s[2])
    a = t[0] / s[0]
    stride = forward(a, (shown - a) / K, 1 - shown)  # q(x_t | x_s)
    from_clean, to_late = forward(*s)[:K], forward(*t)[:K]  # q(x_s | x_0), q(x_t | x_0)
    law = torch.einsum("ks,sy->kys", from_clean, stride)  # q(x_s, x_t | x_0)
    law = law / to_late.clamp_min(1e-300)[..., None]  # [x_0 K, x_t K + 1, x_s K + 1]
    places = [torch.einsum("yk,kyj->yj", p0[:, i], law[:, NOISY[:, i]]) for i in range(N)]
    return torch.stack(places, 1)


def ancestral_law(name: str, steps: int = STEPS) -> Tensor:
    borders = [1 - i / steps for i in range(steps + 1)]
    laws = [bayes(name, t, s) for t, s in pairwise(borders)]
    return clean_law(chain(laws, noise_law(KERNELS[name])))


@every_kernel
def test_the_exact_posterior_has_the_law_of_its_chain(name: str) -> None:
    law = ancestral_law(name)
    assert float(law.sum()) == pytest.approx(1)
    assert p_value(sampled(Posterior(KERNELS[name], steps=STEPS)).tokens, law) > HOLDS


@every_kernel
def test_in_many_steps_the_chain_is_the_data(name: str) -> None:
    distance = [float((ancestral_law(name, steps) - P).abs().sum() / 2) for steps in (5, 10, 20)]
    assert distance[0] > 1.7 * distance[1] > 1.7**2 * distance[2]


def without(field: str, value: Callable[[Kernel], Tensor]) -> Callable[..., Kernel]:
    made = Kernel.between.__func__  # type: ignore[attr-defined]

    def between(cls: type, *args: object) -> Kernel:
        found = made(cls, *args)
        return kernel.replace(found, **{field: value(found)})

    return classmethod(between)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("absorbing", "opens", lambda k: 1 - k.mask),  # not over C_t
        ("uniform", "replace", lambda k: 0 * k.replace),  # nothing is replaced
        ("uniform", "kept", lambda k: k.keep),  # not over A_t + B_t
        ("mask and replace", "opens", lambda k: k.mask),  # the wrong side
    ],
)
def test_an_error_of_the_posterior_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str, value: Callable[[Kernel], Tensor]
) -> None:
    law = ancestral_law(name)
    monkeypatch.setattr(Kernel, "between", without(field, value))
    assert p_value(sampled(Posterior(KERNELS[name], steps=STEPS)).tokens, law) < FAILS


def test_without_remasking_remdm_is_the_posterior_of_masks() -> None:
    law = ancestral_law("absorbing")
    assert p_value(sampled(ReMDM(KERNELS["absorbing"], STEPS, "none")).tokens, law) > HOLDS


# Orders ----


@pytest.mark.parametrize("order", ["random", "max_p", "margin", "entropy"])
def test_one_at_a_time_every_order_draws_the_data(order: str) -> None:
    """Where the place does not depend on the draw, opening masks one by one is the chain rule."""
    found = sampled(Ordered(KERNELS["absorbing"], N, order), masks=True)
    assert p_value(found.tokens, P) > HOLDS
    assert bool((found.calls == N).all())


def test_the_confidence_order_is_colder_than_the_data() -> None:
    found = sampled(Ordered(KERNELS["absorbing"], N, "confidence", 0.0), masks=True)
    assert p_value(found.tokens, P) < FAILS


def first_opened(noise: float, n: int = DRAWS) -> Tensor:
    """Where and with which token the moment sampler opens the first mask: place * K + token."""
    x = torch.full((n, N), K)
    masked = x == K
    zeros = torch.zeros(n)
    rows = predictor(KERNELS["absorbing"])(torch.arange(n), x, zeros, zeros, masked)
    u = Uniforms(3)(torch.arange(n), 2)
    opened, tokens = moment(rows, masked, torch.full((n,), N - 1), noise, u)
    assert bool((opened.sum(1) == 1).all())
    return opened.long().argmax(1) * K + tokens


def chi_square(cells: Tensor, law: Tensor) -> float:
    from scipy import stats

    counts = torch.bincount(cells, minlength=len(law)).double()
    expected = law * len(cells)
    return float(stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(law) - 1))


def moment_law(noise: float) -> Tensor:
    p = exact(KERNELS["absorbing"], 1.0)[place(torch.full((1, N), K), K + 1)[0]]  # [N, K]
    power = p ** (1 + 1 / noise)
    return (power / power.sum()).flatten()


def test_the_moment_sampler_has_its_law() -> None:
    assert chi_square(first_opened(0.5), moment_law(0.5)) > HOLDS
    assert chi_square(first_opened(4.5), moment_law(4.5)) > HOLDS


def test_an_error_of_the_moment_sampler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chi_square(first_opened(-0.5 + 1e-9), moment_law(0.5)) < FAILS  # a wrong sign
    monkeypatch.setattr(Tensor, "log_softmax", lambda logits, dim: logits)  # not normalised
    assert chi_square(first_opened(0.5), moment_law(0.5)) < FAILS


# Entropy bound ----


def test_at_gamma_0_the_entropy_bound_draws_the_data() -> None:
    found = sampled(EntropyBound(KERNELS["absorbing"], 0.0), masks=True)
    assert p_value(found.tokens, P) > HOLDS
    assert float(found.calls.double().mean()) == N
    faster = sampled(EntropyBound(KERNELS["absorbing"], 0.3), masks=True)
    assert 1 < float(faster.calls.double().mean()) < N
    assert bool((sampled(EntropyBound(KERNELS["absorbing"], 0.0, 2), masks=True).calls == 2).all())


def test_an_error_of_the_entropy_bound_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = entropy_bound.within_bound

    def two_largest(uncertainty: Tensor, candidates: Tensor, gamma: float) -> Tensor:
        return right(-uncertainty, candidates, gamma)  # a wrong sign accepts everything

    monkeypatch.setattr(entropy_bound, "within_bound", two_largest)
    found = sampled(EntropyBound(KERNELS["absorbing"], 0.0), masks=True)
    assert p_value(found.tokens, P) < FAILS


# The Gibbs corrector ----


def noisy_law(noise: Corruption, time: float) -> Tensor:
    return likelihood(*(float(v) for v in noise.at(time))) @ P


def corrected(name: str, tau: float | None = None) -> tuple[Tensor, Tensor]:
    """Tokens of the noisy law at t = 0.25 after one correction of one place, and that law."""
    noise, time = KERNELS[name], 0.25
    law = noisy_law(noise, time)
    generator = torch.Generator().manual_seed(8)
    x = NOISY[torch.multinomial(law, DRAWS, replacement=True, generator=generator)]
    sampler = Gibbs(noise, 4, corrections=1, places=1, tau=tau)
    everywhere = torch.ones_like(x, dtype=torch.bool)

    def ask(x: Tensor, t: float, done: float, keep: Tensor) -> Rows:
        alike = torch.full((len(x),), time)
        return predictor(noise)(torch.arange(len(x)), x, alike, alike, keep)

    u = Uniforms(9)(torch.arange(DRAWS), 2)
    out = sampler.corrected({"x": x, "generate": everywhere}, ask, u, time, 0.5)  # type: ignore[arg-type]
    assert 0.02 < float((out != x).any(1).double().mean()) < 1
    assert int((out != x).sum(1).max()) == 1
    return out, law


@pytest.mark.parametrize("name", ["uniform", "mask and replace"])
def test_the_corrector_leaves_the_noisy_law(name: str) -> None:
    out, law = corrected(name)
    assert p_value(out, law, K + 1) > HOLDS


@pytest.mark.parametrize("name", ["uniform", "mask and replace"])
def test_an_error_of_the_corrector_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = posterior.leave_one_out

    def wrong_sign(logits: Tensor, own: Tensor, odds: float) -> Tensor:
        return right(logits, own, 1 / (1 + odds) - 1)  # log1p of it is the other sign

    monkeypatch.setattr(posterior, "leave_one_out", wrong_sign)
    out, law = corrected(name)
    assert p_value(out, law, K + 1) < FAILS


def test_the_surplus_is_that_of_the_conditional() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, 9, generator=generator, dtype=torch.float64) * 20
    logits[3, 2] = -torch.inf
    own = torch.randint(9, (50,), generator=generator)
    for keep, replaced in ((0.3, 0.7 / 9), (0.999, 0.001 / 9), (1e-6, 0.11)):
        law = posterior.conditional(logits, own, keep, replaced)
        others = law.scatter(1, own[:, None], -torch.inf).amax(1)
        expected = law.gather(1, own[:, None]).squeeze(1) - others
        found = posterior.surplus(logits, own, keep, replaced)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        single = posterior.surplus(logits.float(), own, keep, replaced)
        torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)


def test_leave_one_out_is_what_the_others_say() -> None:
    noise = KERNELS["uniform"]
    keep, replaced, mask = (float(v) for v in noise.at(0.4))
    own = exact(noise, 0.4)
    at = place(CLEAN, K + 1)
    whole = likelihood(keep, replaced, mask)[at] * P
    for i in range(N):
        factor = torch.where(CLEAN[:, None, i] == CLEAN[None, :, i], keep + replaced, replaced)
        rest = whole / factor
        rest = rest / rest.sum(1, keepdim=True)
        expected = torch.stack([rest[:, CLEAN[:, i] == k].sum(1) for k in range(K)], 1)
        found = posterior.leave_one_out(own[at, i].log(), CLEAN[:, i], keep / replaced)
        torch.testing.assert_close(found.exp(), expected, rtol=1e-6, atol=1e-9)


# Discrete flow ----


def flow_law(name: str, c: float, steps: int) -> Tensor:
    """Law of the flow, place by place from the velocity in its definition."""
    noise = KERNELS[name]
    end = noise.end
    source = torch.full((K + 1,), float(end.replace), dtype=torch.float64)
    source[K] = float(end.mask)
    source = source / source.sum()
    eye, laws = torch.eye(K + 1, dtype=torch.float64), []
    for i in range(steps):
        p = exact(noise, 1 - i / steps)  # [S, N, K]
        if i == steps - 1:
            laws.append(torch.cat([p, torch.zeros_like(p[..., :1])], -1))
            continue
        kappa, after = noise.clean(1 - i / steps), noise.clean(1 - (i + 1) / steps)
        w, back = (after - kappa) / (1 - kappa), (after - kappa) / kappa if kappa else 0.0
        strength = c if kappa else 0.0
        law = torch.zeros(*p.shape[:2], K + 1, dtype=torch.float64)
        here = eye[NOISY]  # [S, N, K + 1]
        for k in range(K):
            velocity = w * (eye[k] - here)
            velocity = velocity + strength * (velocity - back * (here - source))
            away = (velocity * (1 - here)).clamp_min(0)
            total = away.sum(-1, keepdim=True)
            stay = torch.exp(-total)
            moved = stay * here + (1 - stay) * away / torch.where(total > 0, total, 1)
            law += p[..., k, None] * moved
        laws.append(law)
    return clean_law(chain(laws, noise_law(noise)))


@pytest.mark.parametrize("c", [0.0, 1.0])
@every_kernel
def test_the_flow_has_the_law_of_its_velocity(name: str, c: float) -> None:
    found = sampled(Flow(KERNELS[name], 4, c)).tokens
    assert p_value(found, flow_law(name, c, 4)) > HOLDS


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_in_small_steps_the_flow_is_the_data(c: float) -> None:
    """The divergence-free term moves nothing on the whole: the limit is the same."""
    distance = [float((flow_law("uniform", c, n) - P).abs().sum() / 2) for n in (6, 12, 24)]
    assert distance[0] > 1.5 * distance[1] > 1.5**2 * distance[2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self, kappa, grown: ((1 + self.churn(kappa)) * grown, 0.0),  # not over 1 - kappa
        lambda self, kappa, grown: (grown / (1 - kappa), 2 * grown / max(kappa, 0.1)),  # one half
    ],
)
@every_kernel
def test_an_error_of_the_flow_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., tuple[float, float]]
) -> None:
    monkeypatch.setattr(flow.Flow, "rates", wrong)
    found = sampled(Flow(KERNELS[name], 4, 1.0)).tokens
    assert p_value(found, flow_law(name, 1.0, 4)) < FAILS
