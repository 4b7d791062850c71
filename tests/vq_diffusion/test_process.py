"""Laws of VQ-Diffusion's noise, posterior, loss and sampling loop."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from lightning_modules.common.categorical import draw as draw_logits
from lightning_modules.samplers.kernel import Chance, corrupt, posterior
from lightning_modules.vq_diffusion import process
from lightning_modules.vq_diffusion.config import PRESETS, SCHEDULES, SamplingConfig
from lightning_modules.vq_diffusion.process import Schedule, Step
from tests.vq_diffusion.forward import forward_law

quick = settings(max_examples=25, deadline=None)
rates = st.sampled_from([0.0, 0.3, 0.9, 0.99999, 1.0])
RELEASED = 0.99999


def draw_at_once(rows: Tensor, uniforms: Tensor, head) -> Tensor:
    """`draw_rows` for few codes, where cutting rows into pieces would cost more than drawing."""
    return draw_logits(head(rows), uniforms)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(a: Tensor, b: Tensor, c: Tensor, codes: int) -> Tensor:
    """The transition matrix (column = from) with the mask last, float64."""
    matrix = torch.full((codes + 1, codes + 1), float(b), dtype=torch.float64)
    matrix += float(a) * torch.eye(codes + 1, dtype=torch.float64)
    matrix[codes] = float(c)
    matrix[:, codes] = 0
    matrix[codes, codes] = 1
    return matrix


def between(schedule: Schedule, s: int, t: int) -> Tensor:
    """The product of all one-step matrices from s to t."""
    matrix = torch.eye(schedule.num_codes + 1, dtype=torch.float64)
    for i in range(s + 1, t + 1):
        kernel = schedule.kernel(i)
        matrix = dense(kernel.a, kernel.b, kernel.c, schedule.num_codes) @ matrix
    return matrix


def dense_posterior(schedule: Schedule, p0: Tensor, j: int, s: int, t: int) -> Tensor:
    """p(x_s | x_t = j) by Bayes' rule over all states."""
    codes = schedule.num_codes
    to_s, to_t, onward = between(schedule, -1, s), between(schedule, -1, t), between(schedule, s, t)
    law = torch.zeros(codes + 1, dtype=torch.float64)
    for k in range(codes):
        if to_t[j, k] > 0:
            law += p0[k] * onward[j] * to_s[:, k] / to_t[j, k]
    return law


@st.composite
def cases(draw):
    """A schedule, times s < t, and a seed."""
    steps = draw(st.integers(2, 12))
    schedule = process.mask_schedule(steps, draw(st.integers(2, 9)), draw(rates))
    t = draw(st.integers(0, steps - 1))
    return schedule, draw(st.integers(-1, t - 1)), t, draw(st.integers(0, 2**31))


# Noise ----


@quick
@given(case=cases())
def test_cumulative_numbers_are_those_of_the_matrices(case):
    schedule, s, t, _ = case
    whole = dense(schedule.keep[t], schedule.replace[t], schedule.mask[t], schedule.num_codes)
    torch.testing.assert_close(between(schedule, -1, t), whole, rtol=1e-9, atol=1e-12)
    kernel = schedule.kernel(t, s)
    strided = dense(kernel.a, kernel.b, kernel.c, schedule.num_codes)
    torch.testing.assert_close(between(schedule, s, t), strided, rtol=1e-9, atol=1e-12)
    assert (whole >= 0).all()
    torch.testing.assert_close(whole.sum(0), torch.ones(len(whole), dtype=torch.float64))


def test_the_table_of_the_released_schedule():
    """a, c, K b, A, C of the released code at T = 100 (fact sheet of VQ-Diffusion, section 1)."""
    schedule = process.mask_schedule(100, 2887, SCHEDULES["released"].mask_rate)
    for t, *expected in (
        (0, 0.99999, 9e-6, 1e-6, 0.99999, 9e-6),
        (1, 0.989899081, 0.0101009091, 1.01e-8, 0.989889182, 0.0101098182),
        (49, 0.980392499, 0.0196074625, 3.81e-8, 0.505049909, 0.494949091),
        (98, 0.500222655, 0.499752618, 2.47e-5, 0.0101098182, 0.989889182),
        (99, 0.000890223725, 0.99901096, 9.88e-5, 9e-6, 0.99999),
    ):
        k = schedule.kernel(t)
        found = [k.a, k.c, 2887 * k.b, schedule.keep[t], schedule.mask[t]]
        assert [float(v) for v in found] == pytest.approx(expected, rel=5e-3)
    torch.testing.assert_close(2887 * schedule.replace[:-1], torch.full((100,), 1e-6).double())


@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
def test_mask_rate_is_the_last_share_of_masks(steps):
    for rate in (0.0, 0.5, SCHEDULES["paper"].mask_rate, RELEASED, 1.0):
        schedule = process.mask_schedule(steps, 7, rate)
        assert float(schedule.mask[-2]) == pytest.approx(rate, abs=1e-5)
        if rate < 1:
            rest = 7 * float(schedule.replace[-2])
            assert rest == pytest.approx(1 - rate, abs=1e-5) and rest > 0
        else:
            assert (schedule.replace == 0).all()
        assert float(schedule.mask[-1]) == 0 and float(schedule.keep[-1]) == 1
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        process.mask_schedule(1, 7, 0.9)
    with pytest.raises(ValueError, match="no schedule keeps"):
        process.linear_schedule(5, 7, keep=(0.9, 0.5), mask=(0.2, 0.9))


@pytest.mark.parametrize("rate", [0.0, 0.6, RELEASED, 1.0])
def test_corruption_follows_its_law(rate):
    schedule = process.mask_schedule(6, 4, rate)
    tokens = torch.randint(4, (1, 1, 4), generator=seeded(0)).expand(20000, -1, -1)
    for t in (0, 2, 5):
        uniforms = torch.rand(2, *tokens.shape, generator=seeded(t))
        numbers = [n[t].float().expand(len(tokens)) for n in (schedule.mask, schedule.replaced)]
        drawn = corrupt(tokens, *numbers, 4, uniforms)
        law = forward_law(tokens[0, 0], schedule.keep[t], schedule.replace[t], schedule.mask[t], 4)
        for place in range(4):
            check_shares(drawn[:, 0, place], law[place])


def check_shares(drawn: Tensor, law: Tensor) -> None:
    """Chi-square of drawn states [n] against their law; states that cannot be must not occur."""
    counts = torch.bincount(drawn, minlength=len(law)).double()
    expected = law.double() / law.double().sum() * len(drawn)
    rare = expected < 5
    assert counts[rare].sum() <= expected[rare].sum() + 6 * expected[rare].sum().sqrt() + 3
    assert (counts[law == 0] == 0).all()
    common = ~rare
    if common.sum() > 1:
        scaled = expected[common] * (counts[common].sum() / expected[common].sum())
        assert chisquare(counts[common].numpy(), scaled.numpy()).pvalue > 1e-5


# Posterior ----


@quick
@given(case=cases())
def test_posterior_equals_dense_matrices(case):
    schedule, s, t, seed = case
    codes, kernel = schedule.num_codes, schedule.kernel(t, s)
    p0 = torch.rand(codes, generator=seeded(seed), dtype=torch.float64)
    p0 /= p0.sum()
    possible = between(schedule, -1, t)[:, :codes].sum(1) > 0
    for j in range(codes + 1):
        law = posterior(p0, torch.tensor(j), kernel)
        assert law.min() >= 0
        assert float(law.sum()) == pytest.approx(1 if possible[j] else float(law.sum()), abs=1e-9)
        if schedule.replace[t] > 0 or j == codes:
            expected = dense_posterior(schedule, p0, j, s, t)
        else:  # nothing is ever replaced: a revealed token is right
            expected = torch.nn.functional.one_hot(torch.tensor(j), codes + 1).double()
        if possible[j]:
            torch.testing.assert_close(law, expected, rtol=1e-7, atol=1e-10)


@quick
@given(case=cases(), scale=st.floats(0.1, 1))
def test_posterior_is_linear_in_the_prediction(case, scale):
    schedule, s, t, seed = case
    p0 = torch.rand(6, schedule.num_codes, generator=seeded(seed), dtype=torch.float64)
    x = torch.randint(schedule.num_codes + 1, (6,), generator=seeded(seed))
    kernel = schedule.kernel(t, s)
    law = posterior(p0, x, kernel)
    torch.testing.assert_close(posterior(scale * p0, x, kernel), scale * law)


@quick
@given(case=cases())
def test_a_stride_is_its_single_steps(case):
    """Over the states between, single steps back to x_s add up to the stride, for every x_0."""
    schedule, s, t, _ = case
    codes = schedule.num_codes
    if schedule.replace[t] == 0:
        return
    clean = torch.eye(codes, dtype=torch.float64)
    states = torch.arange(codes + 1)
    for k in range(codes):
        p0 = clean[k].expand(codes + 1, -1)
        walk = torch.eye(codes + 1, dtype=torch.float64)  # [x_t, x_now]
        for u in range(t, s, -1):
            walk = walk @ posterior(p0, states, schedule.kernel(u))
        strided = posterior(p0, states, schedule.kernel(t, s))
        there = between(schedule, -1, t)[:, k] > 0
        torch.testing.assert_close(walk[there], strided[there], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("codes", [2, 2887, 16384])
@pytest.mark.parametrize("rate", [0.9, RELEASED, 1.0])
def test_float32_is_safe(codes, rate):
    schedule = process.mask_schedule(100, codes, rate)
    for t, s in ((0, -1), (1, 0), (50, 49), (99, 98), (99, 95), (3, -1)):
        kernel = schedule.kernel(t, s)
        for peak in (0.0, 200.0):
            logits = torch.randn(4, codes, generator=seeded(t))
            logits[:, 1] += peak
            x_0, x_t = torch.tensor([1, 1, 1, 0]), torch.tensor([codes, 1, 0, 1])
            law = posterior(logits.softmax(-1), x_t, kernel)
            exact = posterior(logits.double().softmax(-1), x_t, kernel)
            assert law.isfinite().all()
            torch.testing.assert_close(law, exact.float(), atol=2e-6, rtol=1e-3)
            torch.testing.assert_close(law.sum(1), torch.ones(4), atol=1e-4, rtol=0)
            logits.requires_grad_()
            losses = process.token_losses(logits, x_0, x_t, kernel)
            assert all(v.isfinite().all() for v in losses)
            sum(v.sum() for v in losses).backward()
            assert logits.grad.isfinite().all()


# Loss ----


@quick
@given(case=cases())
def test_loss_equals_the_dense_posteriors(case):
    schedule, _, t, seed = case
    codes, kernel = schedule.num_codes, schedule.kernel(t)
    n = 40
    x_0 = torch.randint(codes, (n,), generator=seeded(seed))
    law = forward_law(x_0, schedule.keep[t], schedule.replace[t], schedule.mask[t], codes)
    x_t = torch.multinomial(law, 1, generator=seeded(seed)).squeeze(1)
    logits = 2 * torch.randn(n, codes, generator=seeded(seed), dtype=torch.float64)
    found = process.token_losses(logits, x_0, x_t, kernel)
    clean = torch.nn.functional.one_hot(x_0, codes).double()
    true = posterior(clean, x_t, kernel)
    model = posterior(logits.softmax(-1), x_t, kernel)
    kl = (torch.xlogy(true, true) - true * model.clamp_min(1e-30).log()).sum(1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-6, atol=1e-9)
    nll = -model.gather(1, x_0[:, None]).squeeze(1).log()
    torch.testing.assert_close(found.nll, nll, rtol=1e-6, atol=1e-9)
    ce = torch.nn.functional.cross_entropy(logits, x_0, reduction="none")
    torch.testing.assert_close(found.cross_entropy, ce)
    assert found.kl.min() > -1e-9


def test_masks_alone_weigh_the_cross_entropy():
    """With B = 0 the KL of a masked position is (1 - C_s / C_t) CE, that of others 0."""
    schedule = process.mask_schedule(10, 8, 1.0)
    logits = torch.randn(2, 8, generator=seeded(0), dtype=torch.float64)
    x_0, x_t = torch.tensor([3, 5]), torch.tensor([8, 5])
    for t in (1, 4, 9):
        kernel = schedule.kernel(t)
        losses = process.token_losses(logits, x_0, x_t, kernel)
        expected = losses.cross_entropy[0] * float(1 - schedule.mask[t - 1] / schedule.mask[t])
        assert float(losses.kl[0]) == pytest.approx(float(expected))
        assert float(losses.kl[1]) == pytest.approx(0, abs=1e-12)


def test_a_perfect_prediction_costs_nothing():
    schedule = process.mask_schedule(10, 5, 0.9)
    x_0 = torch.arange(5)
    logits = 60 * torch.nn.functional.one_hot(x_0, 5).double()
    for x_t in (x_0, torch.full((5,), 5), (x_0 + 1) % 5):
        for t in (1, 5, 9):
            losses = process.token_losses(logits, x_0, x_t, schedule.kernel(t))
            torch.testing.assert_close(losses.kl, torch.zeros(5).double(), rtol=0, atol=1e-9)


def test_times_and_their_statistics():
    history, count = torch.zeros(4), torch.zeros(4)
    assert torch.equal(process.time_law(history, count), torch.full((4,), 0.25))
    t, bounds = torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0])
    process.update_history(history, count, t, bounds)
    torch.testing.assert_close(history, torch.tensor([0.4, 0.0, 0.5, 0.0]))  # 5 = mean of 1 and 9
    assert torch.equal(count, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    process.update_history(history, count, t[:1], bounds[:1])
    assert float(history[2]) == pytest.approx(0.9 * 0.5 + 0.1)
    law = process.time_law(torch.tensor([100.0, 4.0, 9.0, 0.0]), torch.full((4,), 11.0))
    assert law[0] == law[1] and float(law[2] / law[1]) == pytest.approx(1.5, rel=1e-3)
    drawn = process.draw_times(law, torch.rand(20000, generator=seeded(0)))
    check_shares(drawn, law)


def test_weights_of_the_loss():
    terms = process.TokenLosses(torch.ones(3, 4), torch.full((3, 4), 2.0), torch.full((3, 4), 3.0))
    masked = torch.tensor([[True, True, False, False]]).expand(3, -1)
    t, pt = torch.tensor([0, 1, 5]), torch.tensor([0.5, 0.1, 0.1])
    losses, bounds = process.image_losses(
        terms, masked, t, pt, 10, auxiliary_weight=0.1, adaptive=True, mask_weight=[1, 0.5]
    )
    assert bounds.tolist() == pytest.approx([8, 3, 3])
    aux = [0.1 * w * a for w, a in ((2.0, 8), (1.9, 9), (1.5, 9))]
    expected = [(b + a) / p for b, a, p in zip([8, 3, 3], aux, [0.5, 0.1, 0.1], strict=True)]
    assert losses.tolist() == pytest.approx(expected)


# Steps and truncation ----


@quick
@given(total=st.integers(2, 120), steps=st.integers(1, 120))
def test_exact_steps_lead_from_noise_to_tokens(total, steps):
    schedule = process.mask_schedule(total, 3, RELEASED)
    if steps > total:
        with pytest.raises(ValueError, match="steps must be between 1 and"):
            process.exact_steps(schedule, steps)
        return
    made = process.exact_steps(schedule, steps)
    times = [step.t for step in made]
    assert len(made) == steps and times[0] == total - 1
    assert times == sorted(set(times), reverse=True)
    assert float(made[-1].kernel.keep) == 1  # the last one leads to clean tokens
    for step, after in zip(made, [*times[1:], -1], strict=True):
        assert float(step.kernel.mask) == float(schedule.mask[after])
    if steps == total:
        assert times == list(range(total))[::-1]


def test_the_table_of_the_released_fast_rule():
    """Calls, masks left after the middle one and largest share opened at once near the end."""
    schedule = process.mask_schedule(100, 2887, RELEASED)
    for stride, calls, middle, largest in (
        (1, 100, 0.485, 0.010),
        (2, 51, 0.687, 0.080),
        (3, 34, 0.766, 0.279),
        (4, 26, 0.808, 0.245),
        (5, 21, 0.846, 0.356),
        (10, 11, 0.904, 0.665),
    ):
        steps = process.released_steps(schedule, stride)
        assert len(steps) == calls
        chosen = process.make_steps(schedule, SamplingConfig(rule="released", steps=calls))
        assert [step.t for step in chosen] == [step.t for step in steps]
        left = [1.0]
        for step in steps:
            left.append(left[-1] * (1 - float(step.kernel.opens)))
        opened = [a - b for a, b in pairwise(left)]
        assert left[(calls + 1) // 2] == pytest.approx(middle, abs=0.03)
        assert max(opened[calls // 2 :]) == pytest.approx(largest, abs=0.006)


def test_settings_choose_the_steps():
    schedule = process.mask_schedule(100, 5, RELEASED)
    times = {name: [s.t for s in process.make_steps(schedule, c)] for name, c in PRESETS.items()}
    assert times["paper"] == times["released"] == list(range(100))[::-1]
    assert times["paper_fast"] == list(range(3, 100, 4))[::-1]
    assert times["released_fast"] == [*range(99, 0, -4), 0]
    cut = process.make_steps(schedule, SamplingConfig(steps=10, first_step=4))
    assert [s.t for s in cut] == [59, 49, 39, 29, 19, 9]
    for wrong in ({"steps": 0}, {"truncation": 0.0}, {"truncation": 1.1}, {"first_step": 100}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingConfig(**wrong)


@quick
@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(0.05, 1),
    codes=st.integers(1, 40) | st.integers(120, 500),
    spread=st.floats(0.1, 9),
)
def test_truncation_keeps_the_fewest_likeliest_codes(seed, rate, codes, spread):
    logits = spread * torch.randn(8, codes, generator=seeded(seed))
    kept = process.truncate(logits, rate).isfinite()
    p = logits.softmax(-1)
    assert torch.equal(process.truncate(logits, rate)[kept], logits[kept])
    for row, keeps in zip(p, kept, strict=True):
        mass = row[keeps].sum()
        assert keeps.any() and mass >= min(rate, 1) - 1e-5
        assert mass - row[keeps].min() < rate + 1e-5  # without the last one it would be too little
        if (~keeps).any():
            assert row[keeps].min() >= row[~keeps].max()
    assert process.truncate(logits, 1.0) is logits
    logits[3, 0] = torch.nan  # is seen by the draw
    assert process.truncate(logits, rate)[3].isnan().any()


# Sampling ----


def oracle(law: Tensor):
    """Predict and head of a network that always answers probabilities [h, w, K]."""

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        return law.log().expand(*x.shape, -1)[keep]

    return predict, lambda rows: rows


@pytest.mark.parametrize("rate", [0.0, 0.7, RELEASED, 1.0])
@pytest.mark.parametrize(("t", "s"), [(9, 8), (9, 4), (5, 2), (3, -1), (0, -1)])
def test_one_step_follows_the_posterior(rate, t, s):
    """The lean transition, for masks and for every revealed token, with and without truncation."""
    codes, n = 4, 20000
    schedule = process.mask_schedule(10, codes, rate)
    kernel = schedule.kernel(t, s)
    p0 = torch.tensor([0.05, 0.5, 0.15, 0.3])
    generate = torch.ones(n, 1, 1, dtype=torch.bool)
    for truncation in (1.0, 0.7):
        logits = process.truncate(p0.log()[None], truncation)
        kept = logits.softmax(-1)[0]
        for j in range(codes + 1):
            if (j < codes and schedule.keep[t] + schedule.replace[t] == 0) or (
                j == codes and schedule.mask[t] == 0
            ):
                continue
            noise = torch.rand(3, n, 1, 1, generator=seeded(j))
            x = torch.full((n, 1, 1), j)
            drawn = process.transition(
                x,
                Step(t, kernel),
                lambda keep: torch.zeros(int(keep.sum()), 1),
                lambda rows, logits=logits: logits.expand(len(rows), -1),
                Chance(*noise),
                generate,
                draw_at_once,
            )
            law = posterior(kept, torch.tensor(j), kernel)
            check_shares(drawn.flatten(), law)


def posterior_network(joint: Tensor, schedule: Schedule):
    """Predict and head that answer the true p(x_0 at a place | x_t) of a joint law [K] * N."""
    codes, places = joint.shape[0], joint.dim()
    states = torch.cartesian_prod(*[torch.arange(codes)] * places).view(-1, places)
    weights = joint.flatten().double()  # [states]

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        time = int(t[0])
        numbers = (schedule.keep[time], schedule.replace[time], schedule.mask[time])
        step = forward_law(torch.arange(codes), *numbers, codes)  # [x_0, x_t]
        flat = x.flatten(1)  # [B, N]
        likelihood = weights * torch.stack(
            [step[states[:, i]][:, flat[:, i]].T for i in range(places)]
        ).prod(0)  # [B, states]
        marginals = torch.stack(
            [
                torch.stack([likelihood[:, states[:, i] == k].sum(1) for k in range(codes)], dim=1)
                for i in range(places)
            ],
            dim=1,
        )  # [B, N, K]
        return marginals.clamp_min(1e-30).log().unflatten(1, x.shape[1:])[keep]

    return predict, lambda rows: rows


def run(predict, head, schedule, steps, n, grid, **more) -> Tensor:
    noise = process.sample_noise(range(n), len(steps), grid)
    x = process.start_tokens(schedule, noise.pop("start"))
    return process.sample(predict, head, x=x, steps=steps, draw=draw_at_once, **noise, **more)


def check_joint(drawn: Tensor, joint: Tensor) -> None:
    flat = torch.zeros(len(drawn), dtype=torch.int64)
    for place in drawn.flatten(1).T:
        flat = flat * joint.shape[0] + place
    check_shares(flat, joint.flatten())


@pytest.mark.parametrize("rate", [0.5, 0.9, RELEASED, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_samples_follow_independent_tokens(rate, steps):
    """All strides are exact where the tokens do not depend on each other."""
    parts = torch.rand(2, 3, generator=seeded(1)) + 0.1
    parts /= parts.sum(1, keepdim=True)
    joint = parts[0][:, None] * parts[1]
    schedule = process.mask_schedule(12, 3, rate)
    network = posterior_network(joint, schedule)
    made = process.exact_steps(schedule, steps)
    check_joint(run(*network, schedule, made, 3000, (1, 2)), joint)


@pytest.mark.parametrize("rate", [0.9, RELEASED, 1.0])
def test_samples_follow_a_joint_law(rate):
    """Single steps, so small that two tokens hardly ever change at once."""
    joint = torch.tensor([[0.30, 0.02, 0.08], [0.03, 0.25, 0.02], [0.10, 0.05, 0.15]])
    schedule = process.mask_schedule(100, 3, rate)
    network = posterior_network(joint, schedule)
    made = process.exact_steps(schedule, 100)
    check_joint(run(*network, schedule, made, 2000, (1, 2)), joint)


def test_only_positions_that_may_change_are_asked_for():
    """A mask opens with probability 1 - C_s / C_t: of N tokens about N / T per step."""
    codes, steps = 6, 20
    asked: list[int] = []

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        asked.append(int(keep.sum()))
        return torch.zeros(int(keep.sum()), codes)

    schedule = process.mask_schedule(steps, codes, 1.0)
    made = process.exact_steps(schedule, steps)
    run(predict, lambda rows: rows, schedule, made, 4, (32, 32))
    assert sum(asked) == 4 * 32 * 32  # with B = 0 every token is asked for once
    assert max(asked) < 2.0 * 4 * 1024 / steps
    # a network that is sure of itself is asked about revealed tokens, which may be wrong, but
    # about far fewer than there are
    asked.clear()
    released = process.mask_schedule(steps, codes, RELEASED)
    run(predict, lambda rows: rows, released, process.exact_steps(released, steps), 4, (32, 32))
    assert asked[-1] == 4 * 1024  # the last step draws everything again
    assert max(asked[:-1]) < 0.3 * 4 * 1024


def test_an_image_depends_on_its_own_seed_only():
    law = torch.rand(4, 6, 5, generator=seeded(0)).softmax(-1)
    predict, head = oracle(law)
    schedule = process.mask_schedule(10, 5, 0.9)
    steps = process.exact_steps(schedule, 5)

    def draw(seeds: list[int]) -> Tensor:
        noise = process.sample_noise(seeds, len(steps), (4, 6))
        x = process.start_tokens(schedule, noise.pop("start"))
        return process.sample(predict, head, x=x, steps=steps, truncation=0.8, **noise)

    together = draw([3, 1, 4, 1])
    assert torch.equal(together, torch.cat([draw([s]) for s in (3, 1, 4, 1)]))
    assert torch.equal(together[1], together[3]) and not torch.equal(together[0], together[1])
    assert ((together >= 0) & (together < 5)).all()


@pytest.mark.parametrize("rate", [0.5, RELEASED, 1.0])
def test_known_tokens_never_change(rate):
    law = torch.rand(4, 4, 5, generator=seeded(0)).softmax(-1)
    predict, head = oracle(law)
    schedule = process.mask_schedule(10, 5, rate)
    steps = process.exact_steps(schedule, 10)
    noise = process.sample_noise([0, 1], 10, (4, 4))
    mask = torch.rand(2, 4, 4, generator=seeded(1)) < 0.5
    start = torch.randint(5, (2, 4, 4), generator=seeded(2))
    x = torch.where(mask, process.start_tokens(schedule, noise.pop("start")), start)
    seen: list[Tensor] = []
    drawn = process.sample(
        predict,
        head,
        x=x,
        steps=steps,
        mask=mask.long(),
        **noise,
        on_step=lambda i, before, after: seen.extend([before, after]),
    )
    assert len(seen) == 20
    for tokens in (*seen, drawn):
        assert torch.equal(tokens[~mask], start[~mask])
    assert (drawn < 5).all()


def test_start_and_noise_have_their_shares():
    noise = process.sample_noise(range(50), 2, (32, 32))
    assert {k: tuple(v.shape) for k, v in noise.items()} == {
        "start": (2, 50, 32, 32),
        "opens": (2, 50, 32, 32),
        "draws": (2, 50, 32, 32),
        "swaps": (2, 50, 32, 32),
    }
    for rate in (0.0, 0.9, RELEASED, 1.0):
        schedule = process.mask_schedule(100, 10, rate)
        x = process.start_tokens(schedule, noise["start"])
        assert (x == 10).float().mean() == pytest.approx(rate, abs=0.01)
        codes = x[x < 10]
        if len(codes) > 100:
            check_shares(codes, torch.ones(10))
    more = process.sample_noise(range(50), 5, (32, 32))
    assert torch.equal(more["draws"][:2], noise["draws"])  # more steps change no earlier chance


def test_a_certain_network_is_believed():
    """Every rule ends with the tokens of a network without doubt."""
    wanted = torch.randint(6, (4, 4), generator=seeded(0))
    law = torch.nn.functional.one_hot(wanted, 6).float()
    predict, head = oracle(law * (1 - 6e-30) + 1e-30)
    for rate in (0.5, RELEASED, 1.0):
        schedule = process.mask_schedule(12, 6, rate)
        for config in (
            SamplingConfig(steps=12),
            SamplingConfig(steps=4, truncation=0.5),
            SamplingConfig(steps=5, rule="released"),
        ):
            steps = process.make_steps(schedule, config)
            drawn = run(predict, head, schedule, steps, 3, (4, 4), truncation=config.truncation)
            assert (drawn == wanted).all()
