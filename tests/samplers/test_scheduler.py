"""Samplers as discrete schedulers: the same tokens as our loop, and who is refused."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_modules.common.seeding import mix_seed
from lightning_modules.samplers import serve
from lightning_modules.samplers.kernel import Absorbing, Corruption, Uniform
from lightning_modules.samplers.loop import CHANCES
from lightning_modules.samplers.scheduler import DiscreteScheduler, SchedulerOutput
from lightning_modules.samplers.settings import NEEDS, Name, SamplerConfig
from tests.samplers.toy import mask_and_replace

CODES, GRID, SEEDS = 7, (3, 4), [4, 9, 2]
WEIGHT = torch.randn(12, CODES + 1, CODES, generator=torch.Generator().manual_seed(3)).double() * 2
NOISE: dict[str, Corruption] = {
    "masks": Absorbing(CODES),
    "random": Uniform(CODES),
    "both": mask_and_replace(0.2, 60, CODES),
}
SERVED = [
    (name, noise)
    for name in get_args(Name)
    for noise in NOISE
    if name != "own"
    and not NEEDS[name].critic
    and NEEDS[name].masks in (None, noise != "random")
    and (noise != "masks" or not NEEDS[name].replaces)
    and (noise == "masks" or name not in ("eb", "klass"))
]


def logits_of(x: Tensor) -> Tensor:
    """[B, h, w] -> [B, h, w, K]: each token depends on itself and the one before it."""
    flat = x.flatten(1)
    at = torch.arange(flat.shape[1])
    return (WEIGHT[at, flat] + WEIGHT[at, flat.roll(1, 1)]).unflatten(1, x.shape[1:])


def network_of(kernel: Corruption) -> serve.Network:
    def features(pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor) -> Tensor:
        return logits_of(x)[keep]

    guidance = serve.Guidance()
    return serve.Network(features, lambda rows: rows, kernel, guidance, (1.0, 0.4))


def play(scheduler: DiscreteScheduler, x: Tensor, **step: Any) -> list[SchedulerOutput]:
    """A loop as pipelines of diffusers have it, with logits [B, K, h, w]."""
    found: list[SchedulerOutput] = []
    mask_id = scheduler.config.mask_token_id
    for t in scheduler.timesteps:
        inside = x.masked_fill(x == mask_id, CODES)
        out = scheduler.step(logits_of(inside).movedim(-1, 1), t, x, **step)
        assert isinstance(out, SchedulerOutput)
        found.append(out)
        x = out.prev_sample
        if bool(scheduler.finished.all()):
            break
    return found


@pytest.mark.parametrize(("name", "noise"), SERVED)
def test_it_draws_what_our_loop_draws(name: Any, noise: str) -> None:
    kernel, steps = NOISE[noise], 4
    config = SamplerConfig(name, corrections=2, eta=0.3 if "remdm" in name else None)
    shown: list[Tensor] = []
    ours = serve.sample(
        config,
        network_of(kernel),
        seeds=SEEDS,
        steps=steps,
        given=None,
        generate=torch.ones(3, *GRID, dtype=torch.bool),
        on_step=lambda i, before, after: shown.extend([after] if shown else [before, after]),
    )
    scheduler = DiscreteScheduler(kernel, config, mask_token_id=99, temperature=(1.0, 0.4))
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(mix_seed(seed, CHANCES)) for seed in SEEDS]
    start = shown[0].masked_fill(shown[0] == CODES, 99)
    found = play(scheduler, start, generator=generators)
    assert torch.equal(found[-1].prev_sample, ours.tokens)
    assert len(found) == len(shown) - 1
    for out, state in zip(found, shown[1:], strict=True):
        assert torch.equal(out.prev_sample, state.masked_fill(state == CODES, 99))
    assert bool(scheduler.finished.all())


def test_times_fall_from_one_and_stay_above_zero() -> None:
    for name, noise in SERVED:
        scheduler = DiscreteScheduler(NOISE[noise], SamplerConfig(name))
        scheduler.set_timesteps(5)
        times = scheduler.timesteps
        assert float(times[0]) == 1 and float(times.min()) > 0, name
        assert bool((times[1:] <= times[:-1]).all()), name
        expected = {"gibbs": 9, "gidd": 5 + 128, "eb": 48}.get(name, 5)
        assert len(times) == expected, name


def test_the_network_is_told_these_times() -> None:
    told: list[float] = []

    def features(pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor) -> Tensor:
        told.append(float(time[0]))
        return logits_of(x)[keep]

    for name in ("posterior", "gibbs", "gidd", "flow", "renoise_prev"):
        told.clear()
        kernel, config = NOISE["random"], SamplerConfig(name, corrections=2)
        serve.sample(
            config,
            serve.Network(features, lambda rows: rows, kernel, serve.Guidance()),
            seeds=SEEDS,
            steps=4,
            given=None,
            generate=torch.ones(3, *GRID, dtype=torch.bool),
        )
        scheduler = DiscreteScheduler(kernel, config)
        scheduler.set_timesteps(4)
        assert told == pytest.approx(scheduler.timesteps.tolist()), name


def test_known_tokens_stay_and_the_preview_is_the_likeliest() -> None:
    scheduler = DiscreteScheduler(NOISE["masks"], SamplerConfig("confidence"))
    scheduler.set_timesteps(4)
    x = torch.full((2, *GRID), CODES)
    x[:, 0] = torch.arange(4)
    known = x != CODES
    found = play(scheduler, x, generator=torch.Generator().manual_seed(1))
    for out in found:
        assert torch.equal(out.prev_sample[known], x[known])
        assert torch.equal(out.pred_original_sample[known], x[known])
    free = ~known[0]
    best = logits_of(x).argmax(-1)
    assert torch.equal(found[0].pred_original_sample[0][free], best[0][free])
    assert int(found[-1].prev_sample.max()) < CODES
    assert torch.equal(found[0].pred_logits, logits_of(x).movedim(-1, 1))


def test_temperature_and_filter_are_in_the_logits_that_tokens_are_drawn_from() -> None:
    config = SamplerConfig("posterior", temperature=0.5)

    def first_three(logits: Tensor) -> Tensor:
        return torch.where(torch.arange(CODES) < 3, logits, -torch.inf)

    scheduler = DiscreteScheduler(NOISE["random"], config, narrow=first_three)
    scheduler.set_timesteps(1)
    x = scheduler.noise((5, 12), torch.Generator().manual_seed(2))
    logits = logits_of(x.unflatten(1, GRID)).flatten(1, 2)
    out = scheduler.step(logits, 1.0, x)
    assert isinstance(out, SchedulerOutput)
    assert torch.equal(out.pred_logits, first_three(logits) / 0.5)
    assert int(out.prev_sample.max()) < 3
    scheduler.set_timesteps(1)
    assert type(scheduler.step(logits, 1.0, x, return_dict=False)) is tuple


@pytest.mark.golden
def test_amused(golden) -> None:
    """The confidence order, given the chances of the case, is aMUSEd's own scheduler."""
    case = golden("muse/amused_scheduler_cosine")
    io, config = case.io, case.config
    steps, start = config["num_inference_steps"], io["x_init"]
    codes = io["logits"].shape[2]
    kernel = Absorbing(codes, lambda time: torch.sin(time * torch.pi / 2))
    scheduler = DiscreteScheduler(
        kernel, SamplerConfig("confidence"), mask_token_id=config["mask_token_id"]
    )
    scheduler.set_timesteps(steps, config["temperature"])
    x = start
    for i, t in enumerate(scheduler.timesteps):
        draws = uniforms_of(io["logits"][i], io["pred_original_sample"][i])
        noise = (-(-io["g_conf"][i].double()).exp()).exp()  # whose Gumbel noise is g
        u = torch.stack([draws.flatten(1), noise.flatten(1)])
        out = scheduler.step(io["logits"][i].double(), t, x, uniforms=u)
        assert torch.equal(out[0], io["prev_sample"][i])
        x = out[0]


def uniforms_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Uniforms by which tokens [B, h, w] are drawn from logits [B, K, h, w]; any for other ids."""
    cdf = logits.double().softmax(1).cumsum(1)
    at = tokens.clamp(max=logits.shape[1] - 1)[:, None]
    above = cdf.gather(1, at)
    return (above - (above - torch.where(at > 0, cdf.gather(1, (at - 1).clamp(min=0)), 0)) / 2)[
        :, 0
    ]


@pytest.mark.parametrize(
    ("noise", "config", "words"),
    [
        ("masks", {}, "sampler must name one that serves several papers, not own"),
        ("masks", {"name": "gibbs"}, "sampler must not be gibbs, which mends wrong tokens"),
        ("random", {"name": "halton"}, "sampler must not be halton, which is not for a checkpoint"),
        ("masks", {"name": "p2_critic"}, "sampler must not be p2_critic without a Token-Critic"),
        ("random", {"name": "eb"}, "sampler must not be eb, which tells the network a time of"),
        (
            "masks",
            {"name": "halton", "roll": "order"},
            "roll must be none: a step is given no seeds",
        ),
    ],
)
def test_what_a_step_cannot_do_is_refused(noise: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        DiscreteScheduler(NOISE[noise], SamplerConfig(**config))


def test_steps_out_of_order_are_refused() -> None:
    scheduler = DiscreteScheduler(NOISE["masks"], SamplerConfig("random"))
    x = scheduler.noise((2, *GRID))
    logits = logits_of(x).movedim(-1, 1)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(logits, 1.0, x)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match=r"temperature must be a number or \(number, 0\)"):
        scheduler.set_timesteps(3, (2, 1))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="no step was made"):
        _ = scheduler.finished
    with pytest.raises(ValueError, match=r"timestep 0\.3 is not the next of this loop \(none\)"):
        scheduler.step(logits, 0.3, x)
    scheduler.step(logits, 0.5, x)  # a variation begins in the midst
    with pytest.raises(ValueError, match=r"timestep 0\.75 is not the next of this loop \(0\.25\)"):
        scheduler.step(logits, 0.75, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"model_output must be \[B, K, h, w\] with K=7"):
        scheduler.step(logits_of(x), 1.0, x)
    with pytest.raises(ValueError, match="generator must be one or one per picture"):
        scheduler.step(logits, 1.0, x, generator=[torch.Generator()])


def test_noise_of_a_time() -> None:
    clean = torch.arange(4000).view(2, 2000) % CODES
    for noise, share in (("masks", 0.3), ("random", 0.3 * (1 - 1 / CODES))):
        name = "confidence" if noise == "masks" else "flow"
        scheduler = DiscreteScheduler(NOISE[noise], SamplerConfig(name), mask_token_id=50)  # type: ignore[arg-type]
        x = scheduler.add_noise(clean, 0.3, torch.Generator().manual_seed(0))
        assert float((x != clean).double().mean()) == pytest.approx(share, abs=0.03)
        assert bool((x == 50).any()) == (noise == "masks") and int((x == CODES).sum()) == 0
        begin = scheduler.noise((2, 9))
        assert bool((begin == 50).all()) == (noise == "masks")
