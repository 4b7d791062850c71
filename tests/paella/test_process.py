"""Properties of noising, loss and the sampling loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lightning_modules.common.categorical import draw as draw_logits
from lightning_modules.paella import process
from lightning_modules.paella.config import PRESETS, SamplingConfig

CODES = 6
quick = settings(max_examples=25, deadline=None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def oracle(logits):
    """Predict and head of a network that always answers logits [h, w, K]."""

    def predict(x, t, weight, keep):
        return logits.expand(*x.shape, -1)[keep]

    return predict, lambda rows: rows


def run(logits, config, seeds, **more):
    predict, head = oracle(logits)
    loop = process.loop_settings(config)
    noise = process.sample_noise(
        seeds,
        len(loop["times"]),
        loop["renoise_steps"],
        tuple(logits.shape[:2]),
        logits.shape[2],
        random_tokens=config.renoise_mode == "rand",
    )
    return process.sample(predict, head, **{**noise, **loop, **more})


configs = st.builds(
    SamplingConfig,
    steps=st.integers(1, 5),
    renoise_mode=st.sampled_from(["start", "prev", "rand"]),
    schedule=st.sampled_from(["linear", "cosine"]),
    typical_mass=st.sampled_from([None, 0.3, 1.0]),
    typical_min_tokens=st.integers(1, 3),
    mode=st.sampled_from(["multinomial", "argmax", "quant"]),
)


@quick
@given(seed=st.integers(0, 2**31), rate=st.floats(0, 1))
def test_noise_replaces_with_rate_t_and_touches_nothing_else(seed, rate):
    g = seeded(seed)
    tokens = torch.randint(CODES, (2, 40, 40), generator=g)
    uniforms = torch.rand(tokens.shape, generator=g)
    random_tokens = torch.randint(CODES, tokens.shape, generator=g)
    noised, mask = process.add_noise(tokens, torch.full((2,), rate), uniforms, random_tokens)
    assert torch.equal(noised[~mask], tokens[~mask])
    assert torch.equal(noised[mask], random_tokens[mask])
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - rate) <= 6 * deviation + 1e-6


@quick
@given(seed=st.integers(0, 2**31), eta=st.floats(0, 1))
def test_loss_weight_lies_between_eta_and_one(seed, eta):
    g = seeded(seed)
    mask, t = torch.rand(3, 4, 4, generator=g) < 0.5, torch.rand(3, generator=g)
    weight = process.loss_weight(mask, t, eta)
    assert (weight[mask] == 1).all()
    assert (weight >= eta - 1e-6).all()
    assert (weight <= 1).all()
    clean = process.loss_weight(mask, torch.zeros(3), eta)[~mask]
    assert torch.allclose(clean, torch.tensor(eta), atol=1e-6)


def test_sample_loss_of_equal_weights_is_the_plain_mean():
    ce = torch.rand(3, 4, 4, generator=seeded(0))
    assert torch.allclose(process.sample_loss(ce, torch.ones_like(ce)).mean(), ce.mean())


@pytest.mark.parametrize("law", ["released", "simple", "wuerstchen"])
def test_noise_rate_stays_in_range(law):
    t = process.noise_rate(torch.rand(20000, generator=seeded(1)), law)
    assert t.min() > 0
    assert t.max() <= 1
    full = (t == 1).float().mean().item()
    assert full == pytest.approx(0.075 if law == "wuerstchen" else 0.0, abs=0.01)


@quick
@given(config=configs, seed=st.integers(0, 2**31))
def test_known_tokens_never_change(config, seed):
    g = seeded(seed)
    logits = torch.randn(4, 4, CODES, generator=g)
    mask = torch.rand(2, 4, 4, generator=g) < 0.5
    start = torch.randint(CODES, (2, 4, 4), generator=g)
    seen = []
    tokens = run(
        logits,
        config,
        [seed, seed + 1],
        mask=mask,
        start=start,
        codebook=torch.randn(CODES, 2, generator=g),
        on_step=lambda i, x, out: seen.extend([x, out]),
    )
    assert len(seen) == 2 * config.steps
    for state in [*seen, tokens]:
        assert torch.equal(state[~mask], start[~mask])
    assert ((tokens >= 0) & (tokens < CODES)).all()


@quick
@given(config=configs, seeds=st.lists(st.integers(0, 2**31), min_size=2, max_size=4))
def test_an_image_depends_on_its_own_seed_only(config, seeds):
    logits = torch.randn(4, 6, CODES, generator=seeded(0))
    codebook = torch.randn(CODES, 2, generator=seeded(1))
    together = run(logits, config, seeds, codebook=codebook)
    alone = [run(logits, config, [seed], codebook=codebook) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))


@quick
@given(seed=st.integers(0, 2**31))
def test_one_step_without_renoising_is_a_plain_draw(seed):
    logits = torch.randn(5, 5, CODES, generator=seeded(seed))
    config = SamplingConfig(steps=1, renoise_steps=0, temperature_start=0.8)
    noise = process.sample_noise([seed], 1, 0, (5, 5), CODES)
    plain = draw_logits(logits.flatten(0, 1) / 0.8, noise["draws"][0].flatten())
    assert torch.equal(run(logits, config, [seed]).flatten(), plain)


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_samples_follow_an_oracle(mode):
    """The last step renoises nothing, so that every token is a draw from its own distribution."""
    logits = torch.randn(2, 2, 4, generator=seeded(5))
    config = SamplingConfig(steps=4, renoise_mode=mode, temperature_start=1, temperature_end=1)
    tokens = run(logits, config, list(range(1500))).flatten(1)  # [image, position]
    for position, p in enumerate(logits.flatten(0, 1).softmax(1).double()):
        counts = torch.bincount(tokens[:, position], minlength=4)
        assert chisquare(counts.numpy(), (p / p.sum() * len(tokens)).numpy()).pvalue > 1e-4


def test_replaced_and_known_tokens_are_not_asked_for():
    """The renoise mask is drawn first; only tokens that survive reach the head."""
    asked = []

    def predict(x, t, weight, keep):
        asked.append(int(keep.sum()))
        return torch.zeros(int(keep.sum()), CODES)

    loop = process.loop_settings(SamplingConfig(steps=5))
    noise = process.sample_noise([0], 5, 4, (32, 32), CODES)
    mask = torch.zeros(1, 32, 32, dtype=torch.long)
    mask[:, :16] = 1
    start = torch.zeros_like(mask)
    process.sample(predict, lambda rows: rows, mask=mask, start=start, **noise, **loop)
    shares = torch.tensor(asked) / mask.sum()
    assert torch.allclose(shares, torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]), atol=0.1)


def test_guidance_is_off_at_weight_one_and_after_the_guided_steps():
    weights = []

    def predict(x, t, weight, keep):
        weights.append(weight)
        return torch.zeros(int(keep.sum()), CODES)

    config = SamplingConfig(steps=4, guidance_start=3.0, guidance_end=1.0, guided_steps=2)
    noise = process.sample_noise([0], 4, 3, (8, 8), CODES)
    process.sample(predict, lambda rows: rows, **noise, **process.loop_settings(config))
    assert weights == pytest.approx([3.0, 3.0 - 2 / 3, 1.0, 1.0])


def test_quant_takes_the_code_nearest_to_the_mean_code():
    codebook = torch.tensor([[0.0], [1.0], [10.0]])
    logits = torch.log(torch.tensor([0.45, 0.1, 0.45])).expand(2, 2, 3)  # mean code 4.6
    config = SamplingConfig(steps=2, mode="quant", temperature_start=1.0, temperature_end=1.0)
    assert (run(logits, config, [0], codebook=codebook, draws=None) == 1).all()


def test_argmax_takes_the_likeliest_label():
    logits = torch.randn(4, 4, CODES, generator=seeded(3))
    tokens = run(logits, SamplingConfig(steps=3, mode="argmax"), [0], draws=None)
    assert torch.equal(tokens[0], logits.argmax(-1))


def test_typical_filter_keeps_the_crossing_label_and_min_tokens():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    # |-log p - H| with H = 1.142: 0.449, 0.062, 0.755, 1.854, so the order is 1, 0, 2, 3

    def kept(*args):
        return process.typical_filter(p.log(), *args).isfinite().tolist()[0]

    assert kept(0.2) == [False, True, False, False]
    assert kept(0.4) == [True, True, False, False]
    assert kept(0.2, 3) == [True, True, True, False]
    assert kept(1.0) == [True] * 4


def test_first_step_cuts_the_schedules():
    whole = process.loop_settings(SamplingConfig(steps=6, guidance_start=2, temperature_start=1))
    cut = process.loop_settings(
        SamplingConfig(steps=6, guidance_start=2, temperature_start=1, first_step=2)
    )
    for name in ("times", "renoise_probability", "weights", "temperature"):
        assert list(cut[name]) == list(whole[name])[2:]
    assert cut["renoise_steps"] == 3
    config = SamplingConfig(steps=24, schedule="cosine", first_step=8)
    assert process.start_rate(config) == pytest.approx(0.866, abs=1e-3)
    assert process.start_rate(SamplingConfig(steps=4, first_step=1)) == pytest.approx(0.75)


def test_missing_tensors_are_named():
    predict, head = oracle(torch.zeros(4, 4, CODES))
    noise = process.sample_noise([0], 2, 1, (4, 4), CODES)
    loop = process.loop_settings(SamplingConfig(steps=2))
    with pytest.raises(ValueError, match="start"):
        process.sample(predict, head, **noise, **loop, mask=torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="random_tokens"):
        process.sample(predict, head, **noise, **{**loop, "renoise_mode": "rand"})
    with pytest.raises(ValueError, match="codebook"):
        process.sample(predict, head, **noise, **{**loop, "mode": "quant"})
    with pytest.raises(ValueError, match="draws"):
        process.sample(predict, head, **{**noise, "draws": None}, **loop)


def test_presets_and_ranges():
    assert PRESETS["paper"].temperature_start == PRESETS["paper"].temperature_end
    assert process.loop_settings(PRESETS["released"])["renoise_steps"] == 11
    for wrong in ({"steps": 0}, {"temperature_end": 0}, {"renoise_steps": 13}, {"t_end": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingConfig(**wrong)
