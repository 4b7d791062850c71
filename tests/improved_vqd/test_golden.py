"""Guidance, truncation, purity and whole sampling loops against numbers of the released code."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.config import TextConfig
from lightning_modules.common.settings import build
from lightning_modules.common.text import ClipTextEncoder, openai_clip_text
from lightning_modules.improved_vqd import process as improved
from lightning_modules.improved_vqd.process import Call
from lightning_modules.samplers.kernel import Chance, posterior
from lightning_modules.vq_diffusion import process
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.convert import convert
from lightning_modules.vq_diffusion.network import Denoiser
from lightning_modules.vq_diffusion.process import Schedule

pytestmark = pytest.mark.golden
FAR = -25  # the released tensors are clamped somewhere below


def limits(case, words: str) -> dict[str, Any]:
    (found,) = [v for k, v in case.tolerance.items() if words in k]
    return {"rtol": 0.0, "atol": 0.0, **{k: v for k, v in found.items() if k != "only_where"}}


def check_law(case, law: Tensor, log: Tensor, rate: float) -> None:
    """Probabilities [..., K or K + 1] against log probabilities [..., K + 1].

    At truncation rate 1 the reference drops codes behind float32's last digit, which show in the
    logarithms alone.
    """
    expected = log[..., : law.shape[-1]]
    torch.testing.assert_close(law, expected.exp(), **limits(case, "probabilities (exp"))
    if rate == 1:
        return
    shown = expected > FAR
    found = law.clamp_min(1e-30).log()
    torch.testing.assert_close(found[shown], expected[shown], **limits(case, "log_probabilities"))


def released(case) -> Schedule:
    """The released schedule, which the weights of the case also hold."""
    config, stored = case.config, case.weights["log_cumprod_ct"].double()
    codes = config.get("num_embed")
    if codes is None:
        codes = config["content_emb_config"]["params"]["num_embed"]
    schedule = process.mask_schedule(config["diffusion_step"], codes, 0.99999)
    torch.testing.assert_close(schedule.mask[:-1], stored[:-1].exp(), rtol=1e-5, atol=1e-9)
    return schedule


def gumbel(uniforms: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniforms + 1e-30) + 1e-30)


def gumbel_draw(rows: Tensor, noise: Tensor, head) -> Tensor:
    """The reference's draw of a code: argmax(log p + noise), noise [n, K + 1]."""
    logits = head(rows)
    return (logits + noise[:, : logits.shape[1]]).argmax(1)


def kept(logits: Tensor, rate: float) -> Tensor:
    """Probabilities after truncation, not normalised again, as the released code leaves them."""
    p = logits.softmax(-1)
    return torch.where(process.truncate(logits, rate).isfinite(), p, torch.zeros_like(p))


def whole_posterior(x, step, rows, head, chance: Chance, generate, draw, places) -> Tensor:
    """A step of the reference: the posterior of every position, then Gumbel argmax over K + 1."""
    assert generate.all()
    p0 = head(rows(generate)).unflatten(0, x.shape).softmax(-1)
    law = posterior(p0, x, step.kernel)
    return (law.clamp_min(1e-30).log() + chance.draws).argmax(-1)


@torch.inference_mode()
def test_reverse_step(golden):
    case = golden("vq_diffusion/reverse_step")
    io, config, schedule = case.io, case.config, released(case)
    cond, null = (io[f"logits_{side}"].transpose(1, 2) for side in ("cond", "null"))
    for side, logits in {"cond": cond, "null": null}.items():
        check_law(case, logits.softmax(-1), io[f"log_x0_{side}"].transpose(1, 2), 0)
    x = io["x_t"]
    for name, settings in config["settings"].items():
        scale = settings["guidance_scale"]
        shares = [scale, 1 - scale]
        logits = torch.einsum("sbnk,s->bnk", torch.stack([cond, null]), torch.tensor(shares))
        rate = settings["truncation_rate"]
        p0 = kept(logits, rate)
        check_law(case, p0, io[f"{name}_log_x0"].transpose(1, 2), rate)
        times = [int(k.rpartition("_t")[2]) for k in settings if k.startswith("argmax_margin_t")]
        assert times
        for t in times:
            law = posterior(p0, x, schedule.kernel(t))
            check_law(case, law, io[f"{name}_t{t}_log_prob"].transpose(1, 2), rate)
            noise = gumbel(io[f"{name}_t{t}_u"]).transpose(1, 2)
            drawn = (law.clamp_min(1e-30).log() + noise).argmax(-1)
            assert torch.equal(drawn, io[f"{name}_t{t}_sample"])
        for skip in config["skips"]:
            t = config["fast_t"]
            fast = {s.t: s for s in process.released_steps(schedule, skip + 1)}
            kernel = fast[t].kernel if t in fast else schedule.kernel(t - skip)
            law = posterior(p0, x, kernel)
            expected = io[f"{name}_fast_t{t}_skip{skip}_log_prob"].transpose(1, 2)
            check_law(case, law, expected, rate)


def settings_of(spec: dict[str, Any]) -> tuple[float, int]:
    """Truncation rate and stride of a sample_type such as "top0.86r,time4"."""
    rate = float(re.search(r"top([0-9.]+)r", spec["sample_type"])[1])
    stride = re.search(r"time([0-9]+)", spec["sample_type"])
    return rate, int(stride[1]) if stride else 1


def load(case) -> tuple[Denoiser, Tensor, dict[bool, Tensor]]:
    """The network, the prompt's features, and those of both nulls by learnable or not."""
    official = convert(case.weights, case.config["transformer_config"]["params"])
    network = Denoiser(build(ModelConfig, official.model))
    load_strict(network, official.network, case.name)
    encoder = ClipTextEncoder(TextConfig(name="clip"))
    encoder.use(openai_clip_text(official.text).text_model, torch.device("cpu"))
    prompt, empty = (
        encoder.states(case.io[f"{name}_token"][None]).tokens for name in ("prompt", "empty")
    )
    return network.eval(), prompt, {True: official.null[None], False: empty}


@torch.inference_mode()
def test_sampling_loops(golden):
    case = golden("vq_diffusion/sampling_loops")
    config, loaded = case.config, load(case)
    assert config["settings"]
    for name, spec in config["settings"].items():
        check_loop(case, {**config, **spec}, name, *loaded)


def check_loop(
    case, spec: dict[str, Any], name: str, network: Denoiser, prompt: Tensor, nulls: dict
) -> None:
    schedule = released(case)
    grid = tuple(spec["transformer_config"]["params"]["content_spatial_size"])
    batch, tokens, codes = spec["batch"], grid[0] * grid[1], network.config.num_codes
    rate, stride = settings_of(spec)
    scale, rule = spec["guidance_scale"], spec.get("prior_rule", 0)

    def get(key: str) -> Tensor | None:
        return case.io.get(f"{name}_{key}")

    noise = gumbel(get("u")).transpose(2, 3).unflatten(2, grid)  # [R, B, h, w, K + 1]
    sides = [network.prepare(prompt)]
    if scale != 1:
        sides.append(network.prepare(nulls[spec["learnable_cf"]]))
    shares = [scale, 1 - scale] if scale != 1 else [1.0]
    everywhere = torch.ones(batch, *grid, dtype=torch.bool)
    laws = get("log_x0").transpose(2, 3)  # [R, B, N, K + 1]
    before = get("tokens_before")
    calls_made: list[int] = []

    def predict(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        i = len(calls_made)
        calls_made.append(int(t[0]))
        rows = network.mixed_rows(x, t, sides, shares, everywhere)
        p0 = kept(network.head(rows), rate).unflatten(0, (batch, tokens))
        check_law(case, p0, laws[i], rate)
        if before is not None:
            assert torch.equal(x.flatten(1), before[i])
        return network.mixed_rows(x, t, sides, shares, keep)

    results: list[Tensor] = []
    common: dict[str, Any] = {
        "x": torch.full((batch, *grid), codes),
        "draws": noise,
        "swaps": torch.zeros(noise.shape[:-1]),
        "truncation": rate,
        "on_step": lambda i, x, out: results.append(out.flatten(1)),
    }
    if rule == 0:
        steps = process.released_steps(schedule, stride)
        if stride == 1:
            exact = process.exact_steps(schedule, schedule.steps)
            assert [s.t for s in steps] == [s.t for s in exact]
        # the times that the file lists are those of the posterior
        posterior_times = [s.t - (stride - 1) if s.t > stride - 1 else s.t for s in steps]
        assert posterior_times == get("calls_t").tolist()
        final = process.sample(
            predict,
            network.head,
            steps=steps,
            opens=common["swaps"],
            transition=whole_posterior,
            **common,
        )
    else:
        calls = improved.table_calls(schedule, spec["n_sample"], spec.get("prior_ps"))
        assert [call.t for call in calls] == get("calls_t").tolist()
        opens = torch.full((len(calls), batch, *grid), 0.5)
        made = position_noise(calls, batch)
        assert len(made) == len(get("pos_u"))
        for (i, b), uniforms in zip(made, get("pos_u"), strict=True):
            opens[i, b] = uniforms.unflatten(0, grid)
        final = improved.sample(
            predict,
            network.head,
            calls=calls,
            opens=opens,
            draw=gumbel_draw,
            order={1: "random", 2: "purity"}[rule],
            purity_weight=spec.get("prior_weight", 0.0),
            **common,
        )
        check_positions(case, name, made, results, codes)
    assert len(calls_made) == len(laws)
    after = get("tokens_after")
    for i, out in enumerate(results):
        if after is not None:
            assert torch.equal(out, after[i]), f"{name}: call {i}"
    assert torch.equal(final.flatten(1), get("final")), name


def position_noise(calls: list[Call], batch: int) -> list[tuple[int, int]]:
    """Call and image of every draw of positions, in the order of the file."""
    return [(i, b) for i, c in enumerate(calls) if c.reveals is not None for b in range(batch)]


def check_positions(case, name: str, made, results: list[Tensor], codes: int) -> None:
    """Scores and chosen positions of every draw."""
    io = case.io
    p = io[f"{name}_log_x0"].exp()[:, :, :codes].amax(2)  # [R, B, N]
    for (i, b), score, chosen in zip(
        made, io[f"{name}_pos_score"], io[f"{name}_pos_sel"], strict=True
    ):
        before = results[i - 1][b] if i else torch.full_like(results[0][b], codes)
        masked = before == codes
        assert (score[~masked] == 0).all()
        if not torch.equal(score[masked], torch.ones_like(score[masked])):
            ours = p[i, b] / (p[i, b].max() + 1e-10)
            torch.testing.assert_close(ours[masked], score[masked], atol=1e-5, rtol=1e-4)
        revealed = (masked & (results[i][b] != codes)).nonzero().flatten()
        assert revealed.tolist() == sorted(chosen[chosen >= 0].tolist())
