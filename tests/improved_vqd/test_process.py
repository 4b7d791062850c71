"""Laws of guidance and of sampling by purity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from lightning_modules.common.categorical import draw as draw_logits
from lightning_modules.common.guidance import mix
from lightning_modules.improved_vqd import process as improved
from lightning_modules.improved_vqd.config import PRESETS, SamplingConfig
from lightning_modules.vq_diffusion import process

quick = settings(max_examples=25, deadline=None)
RELEASED = 0.99999


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_at_once(rows: Tensor, uniforms: Tensor, head) -> Tensor:
    return draw_logits(head(rows), uniforms)


def sample(predict, schedule, calls, seeds, grid, x: Tensor | None = None, **more) -> Tensor:
    noise = process.sample_noise(seeds, len(calls), grid)
    noise.pop("start")
    if x is None:
        x = torch.full((len(seeds), *grid), schedule.num_codes)
    return improved.sample(
        predict, lambda rows: rows, x=x, calls=calls, draw=draw_at_once, **noise, **more
    )


def check_shares(counts: Tensor, law: Tensor) -> None:
    expected = law.double() / law.double().sum() * counts.sum()
    assert chisquare(counts.double().numpy(), expected.numpy()).pvalue > 1e-5


# Guidance ----


@quick
@given(seed=st.integers(0, 2**31), scale=st.floats(0, 8))
def test_mixing_is_guidance_in_log_space(seed, scale):
    cond, null = torch.randn(2, 5, 7, generator=seeded(seed), dtype=torch.float64)
    log_p, log_null = cond.log_softmax(1), null.log_softmax(1)
    guided = log_null + scale * (log_p - log_null)
    torch.testing.assert_close(mix(cond, null, scale).softmax(1), guided.softmax(1))


# Walks ----


def test_the_released_tables():
    sums = {100: 1024, 50: 1014, 25: 1003, 10: 955}
    for steps, table in improved.RELEASED_TABLES.items():
        assert len(table) == steps and sum(table[1:]) == sums[steps]
        schedule = process.mask_schedule(steps, 5, RELEASED)
        config = SamplingConfig(steps=steps, reveal="released")
        calls = improved.make_calls(schedule, config, 1024)
        assert [c.t for c in calls] == list(range(steps))[::-1]
        counts = [c.reveals[1] - c.reveals[0] for c in calls[:-1]]
        assert counts == table[:0:-1] and calls[-1].reveals is None
    slow = improved.RELEASED_SLOW_TABLE
    assert len(slow) == 100 and sum(slow[1:]) == 1024
    schedule = process.mask_schedule(100, 5, RELEASED)
    calls = improved.make_calls(schedule, PRESETS["high_quality"], 1024)
    counts = [c.reveals[1] - c.reveals[0] for c in calls[:-1]]
    assert set(counts) <= {5, 6} and sum(counts) == 1024 and len(calls) == 199
    for tokens, steps in ((256, 100), (1024, 20)):
        schedule = process.mask_schedule(steps, 5, RELEASED)
        with pytest.raises(ValueError, match=f"not {tokens} tokens and {steps} steps"):
            improved.make_calls(schedule, SamplingConfig(reveal="released"), tokens)


walks = st.tuples(st.integers(2, 40), st.integers(1, 40), st.integers(1, 200), st.integers(1, 9))


@quick
@given(walk=walks, rate=st.sampled_from([0.5, 0.9, RELEASED, 1.0]), limited=st.booleans())
def test_walks_reveal_every_token(walk, rate, limited):
    total, steps, tokens, limit = walk
    steps, schedule = min(steps, total), process.mask_schedule(total, 4, rate)
    config = SamplingConfig(steps=steps, tokens_per_call=limit if limited else None)
    calls = improved.make_calls(schedule, config, tokens)
    assert calls[-1].reveals is None and float(calls[-1].kernel.keep) == 1
    done = 0
    for call in calls[:-1]:
        before, after = call.reveals
        assert before == done and after > before
        assert not limited or after - before <= limit + 1
        done = after
        if not limited:  # as many as the noise schedule has revealed by then
            assert done == tokens - round(tokens * float(call.kernel.mask))
    assert done <= tokens
    times = [call.t for call in calls]
    assert times == sorted(times, reverse=True)

    config = SamplingConfig(reveal="constant", tokens_per_call=limit)
    calls = improved.make_calls(schedule, config, tokens)
    assert len(calls) == -(-tokens // limit)
    assert calls[0].reveals[0] == 0 and calls[-1].reveals[1] == tokens
    times = [call.t for call in calls]
    assert times == sorted(times, reverse=True) and times[0] == total - 1
    for call in calls:  # the network is told the time whose share of masks is nearest
        share = 1 - call.reveals[0] / tokens
        distance = (schedule.mask[:-1] - share).abs()
        assert float(distance[call.t]) == float(distance.min())


def test_a_call_that_would_leave_one_token_takes_it():
    assert improved._parts(11, 5) == [5, 6]
    assert improved._parts(10, 5) == [5, 5]
    assert improved._parts(12, 5) == [5, 5, 2]
    assert improved._parts(1, 5) == [1] and improved._parts(0, 5) == []
    assert improved._parts(3, 1) == [1, 2] and improved._parts(7, None) == [7]


def test_settings_that_do_not_fit_are_named():
    for wrong in (
        {"purity_weight": -1},
        {"tokens_per_call": 0},
        {"reveal": "constant"},
        {"rule": "released"},
        {"steps": 0},
    ):
        name = "tokens_per_call" if "reveal" in wrong else next(iter(wrong))
        with pytest.raises(ValueError, match=name):
            SamplingConfig(**wrong)
    assert SamplingConfig(rule="released", order="diffusion").rule == "released"
    schedule = process.mask_schedule(10, 4, RELEASED)
    config = SamplingConfig(reveal="constant", tokens_per_call=8, first_step=2)
    with pytest.raises(ValueError, match=r"first_step must be below the number of calls \(2\)"):
        improved.make_calls(schedule, config, 16)


# Positions ----


def test_positions_are_drawn_in_proportion_to_their_score():
    score = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.9]).expand(20000, -1)
    masked = torch.tensor([True, True, True, True, False]).expand_as(score)
    counts = torch.ones(len(score), dtype=torch.int64)
    uniforms = torch.rand(score.shape, generator=seeded(0))
    one = improved.choose(score, masked, counts, uniforms)
    assert torch.equal(one.sum(1), counts) and not one[:, 4].any()
    check_shares(one.sum(0)[:4], score[0, :4])
    # without replacement: the second in proportion to what the first left
    two = improved.choose(score, masked, 2 * counts, uniforms)
    assert torch.equal(two.sum(1), 2 * counts) and (two >= one).all()
    second = (two & ~one)[one[:, 1]].sum(0)
    check_shares(second[[0, 2, 3]], score[0, [0, 2, 3]])
    mixed = improved.choose(score[:3], masked[:3], torch.tensor([0, 4, 9]), uniforms[:3])
    assert mixed.sum(1).tolist() == [0, 4, 4]


def test_purity_is_the_probability_of_the_likeliest_code():
    logits = 3 * torch.randn(600, 11, generator=seeded(0))
    found = improved.purity(logits, lambda rows: rows)
    torch.testing.assert_close(found, logits.softmax(1).amax(1))


# Sampling ----


def joint_network(joint: Tensor):
    """Predict that answers p(x_0 at a place | revealed tokens) of a joint law [K] * N."""
    codes, places = joint.shape[0], joint.dim()
    states = torch.cartesian_prod(*[torch.arange(codes)] * places)

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        flat = x.flatten(1)[:, None]  # [B, 1, N]
        fits = ((flat == states) | (flat == codes)).all(2) * joint.flatten()  # [B, states]
        laws = [[fits[:, states[:, i] == k].sum(1) for k in range(codes)] for i in range(places)]
        p = torch.stack([torch.stack(law, dim=1) for law in laws], dim=1)  # [B, N, K]
        return p.clamp_min(1e-30).log().unflatten(1, x.shape[1:])[keep]

    return predict


@pytest.mark.parametrize("order", ["purity", "random"])
def test_one_token_per_call_follows_a_joint_law(order):
    """Which place comes next depends on revealed tokens only, so that every order is exact."""
    joint = torch.rand(3, 3, 3, generator=seeded(4)) ** 3
    joint /= joint.sum()
    schedule = process.mask_schedule(20, 3, 1.0)
    for config in (
        SamplingConfig(reveal="constant", tokens_per_call=1, order=order, purity_weight=0),
        SamplingConfig(steps=20, tokens_per_call=1, order=order, purity_weight=0),
    ):
        calls = improved.make_calls(schedule, config, 3)
        drawn = sample(
            joint_network(joint),
            schedule,
            calls,
            range(4000),
            (1, 3),
            order=order,
            purity_weight=0.0,
        ).flatten(1)
        counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27)
        check_shares(counts, joint.flatten())


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_purity_weight_sharpens(weight):
    """p' is p to the power of 1 + r score, and the score of the purest place is 1."""
    p = torch.tensor([0.5, 0.3, 0.2])
    schedule = process.mask_schedule(10, 3, 1.0)
    config = SamplingConfig(reveal="constant", tokens_per_call=1)
    calls = improved.make_calls(schedule, config, 1)
    drawn = sample(
        lambda x, t, keep: p.log().expand(int(keep.sum()), -1),
        schedule,
        calls,
        range(6000),
        (1, 1),
        purity_weight=weight,
    )
    check_shares(torch.bincount(drawn.flatten(), minlength=3), p ** (1 + weight))


def test_purer_places_come_first():
    law = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]]).log().view(1, 2, 3)
    schedule = process.mask_schedule(10, 3, 1.0)
    config = SamplingConfig(reveal="constant", tokens_per_call=1)
    firsts: list[Tensor] = []
    sample(
        lambda x, t, keep: law.expand(*x.shape, -1)[keep],
        schedule,
        improved.make_calls(schedule, config, 2),
        range(5000),
        (1, 2),
        on_step=lambda i, x, out: firsts.append(out.flatten(1)) if i == 0 else None,
    )
    opened = (firsts[0] != 3).sum(0)
    check_shares(opened, torch.tensor([0.98, 0.4]))


@pytest.mark.parametrize("order", ["purity", "random"])
def test_every_call_reveals_its_number(order):
    schedule = process.mask_schedule(8, 5, RELEASED)
    calls = improved.make_calls(schedule, SamplingConfig(steps=8, tokens_per_call=4), 35)
    asked: list[int] = []

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        asked.append(int(keep.sum()))
        return torch.zeros(int(keep.sum()), 5)

    states: list[Tensor] = []
    sample(
        predict,
        schedule,
        calls,
        [0, 1],
        (5, 7),
        order=order,
        on_step=lambda i, x, out: states.append((out != 5).flatten(1).sum(1)),
    )
    for call, revealed in zip(calls, states, strict=True):
        assert revealed.tolist() == [call.reveals[1] if call.reveals else 35] * 2
    each = [2 * (c.reveals[1] - c.reveals[0]) for c in calls[:-1]]
    # a score needs all positions; at random nothing but the chosen ones is asked for
    assert asked == [*([70] * len(each) if order == "purity" else each), 70]


def test_what_is_known_stays_and_shares_are_kept():
    """An edit reveals in each call the share that a whole picture would."""
    schedule = process.mask_schedule(6, 5, RELEASED)
    calls = improved.make_calls(schedule, SamplingConfig(steps=6), 64)
    mask = torch.zeros(3, 8, 8, dtype=torch.int64)
    mask[0, :4] = 1
    mask[1] = 1
    start = torch.randint(5, (3, 8, 8), generator=seeded(0))
    law = torch.rand(8, 8, 5, generator=seeded(1)).log()
    states: list[Tensor] = []
    drawn = sample(
        lambda x, t, keep: law.expand(*x.shape, -1)[keep],
        schedule,
        calls,
        [0, 1, 2],
        (8, 8),
        x=torch.where(mask == 1, 5, start),
        mask=mask,
        on_step=lambda i, x, out: states.append(out),
    )
    for state in states:
        assert torch.equal(state[mask == 0], start[mask == 0])
    for call, state in zip(calls[:-1], states, strict=False):
        new = ((state != 5) & (mask == 1)).flatten(1).sum(1).tolist()
        assert new == [call.reveals[1] // 2, call.reveals[1], 0]
    assert (drawn < 5).all()


def test_an_image_depends_on_its_own_seed_only():
    schedule = process.mask_schedule(10, 5, 0.9)
    law = torch.rand(4, 6, 5, generator=seeded(0)).log()

    def draw(seeds: list[int], order: str) -> Tensor:
        calls = improved.make_calls(schedule, SamplingConfig(steps=5, order=order), 24)
        return sample(
            lambda x, t, keep: law.expand(*x.shape, -1)[keep],
            schedule,
            calls,
            seeds,
            (4, 6),
            order=order,
            truncation=0.8,
        )

    for order in ("purity", "random", "diffusion"):
        together = draw([3, 1, 4, 1], order)
        assert torch.equal(together, torch.cat([draw([s], order) for s in (3, 1, 4, 1)]))
        assert not torch.equal(together[0], together[1])


def test_without_an_order_it_is_vq_diffusions_loop():
    schedule = process.mask_schedule(10, 5, 0.9)
    law = torch.rand(4, 4, 5, generator=seeded(0)).log()
    predict = lambda x, t, keep: law.expand(*x.shape, -1)[keep]  # noqa: E731
    config = SamplingConfig(steps=5, order="diffusion", truncation=0.7)
    noise = process.sample_noise([0, 1], 5, (4, 4))
    x = process.start_tokens(schedule, noise.pop("start"))
    ours = improved.sample(
        predict,
        lambda rows: rows,
        x=x,
        truncation=0.7,
        **noise,
        calls=improved.make_calls(schedule, config, 16),
        order="diffusion",
    )
    plain = process.sample(
        predict,
        lambda rows: rows,
        x=x,
        truncation=0.7,
        **noise,
        steps=process.make_steps(schedule, config),
    )
    assert torch.equal(ours, plain)


def test_raw_purity_sharpens_by_itself_and_asks_masks_alone():
    """Algorithm 2: p' is p to the power of 1 + r max p; released divides by the largest."""
    p = torch.tensor([0.5, 0.3, 0.2])
    schedule = process.mask_schedule(10, 3, 1.0)
    config = SamplingConfig(reveal="constant", tokens_per_call=1, purity="raw")
    kept: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        kept.append(torch.equal(keep, x == 3))
        return p.log().expand(int(keep.sum()), -1)

    calls = improved.make_calls(schedule, config, 2)
    drawn = sample(predict, schedule, calls, range(6000), (1, 2), purity_weight=2.0, raw=True)
    check_shares(torch.bincount(drawn.flatten(), minlength=3), p ** (1 + 2 * 0.5))
    assert all(kept) and len(kept) == 2


def test_the_time_is_chosen_anew_by_each_pictures_masks():
    schedule = process.mask_schedule(10, 3, 1.0)
    config = SamplingConfig(reveal="constant", tokens_per_call=2)
    told: list[list[int]] = []

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        told.append(t.tolist())
        return torch.zeros(int(keep.sum()), 3)

    x = torch.full((2, 2, 4), 3)
    x[1, 1] = 0  # half of the second picture is known
    sample(
        predict,
        schedule,
        improved.make_calls(schedule, config, 8),
        range(2),
        (2, 4),
        x=x,
        mask=x == 3,
        shares=schedule.mask[:-1],
    )
    times = (schedule.mask[:-1] - torch.tensor([1, 0.5, 0.75, 0.375])[:, None]).abs().argmin(1)
    whole, half, later, eighth = times.tolist()
    assert told[0] == [whole, half] and told[1] == [later, eighth]
