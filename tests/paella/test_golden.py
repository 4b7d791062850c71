"""Paella against numbers of the released code; everything is read from the case."""

import re

import pytest
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.paella import prior, process
from lightning_modules.paella.config import SamplingConfig
from lightning_modules.paella.convert import NETWORKS, convert
from lightning_modules.paella.network import timestep_embedding

pytestmark = pytest.mark.golden


def load_network(case):
    kind, state, settings = convert(case.weights, hints=case.config)
    network_class, config_class = NETWORKS[kind]
    network = network_class(build(config_class, settings))
    load_strict(network, state, case.name)
    return network.eval()


def close(case):
    def check(actual: Tensor, name_or_expected: str | Tensor, **tolerance) -> None:
        expected = (
            case.io[name_or_expected] if isinstance(name_or_expected, str) else name_or_expected
        )
        limits = {"atol": case.tolerance["atol"], "rtol": case.tolerance["rtol"]} | tolerance
        torch.testing.assert_close(actual.to(expected.dtype), expected, **limits)

    return check


def number(name: str, text: str) -> float:
    """The number that follows a name in a case's description."""
    return float(re.search(rf"{name} ([0-9.]+(e-?[0-9]+)?)", text)[1])


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def spread(rows: Tensor, x: Tensor) -> Tensor:
    """[B h w, K] -> [B, K, h, w]."""
    return channels_first(rows.view(*x.shape, -1))


def gumbel_draw(rows, noise, head, *, temperature, logits_filter):
    """The reference's draw: argmax(logits / temperature + noise), noise [n, K]."""
    logits = head(rows)
    logits = logits if logits_filter is None else logits_filter(logits)
    return (logits / temperature + noise).argmax(dim=1)


def conditions(io):
    """Every combination of conditioning parts that a case may hold, by name of its logits."""
    clip, image = io["clip"], io["clip_image"]
    yield "logits", {"clip": clip, "clip_image": image}
    yield "logits_full", {"clip": clip, "clip_image": image}
    yield "logits_no_image", {"clip": clip}
    yield "logits_byt5_only", {}
    yield "logits_byt5_and_image", {"clip_image": image}
    if "clip_image_2" in io:
        yield "logits_image_list", {"clip": clip, "clip_image": [image, io["clip_image_2"]]}
    if "attn_weights" in io:
        weights = io["attn_weights"]
        yield "logits_attn_weights", {"clip": clip, "clip_image": image, "attn_weights": weights}


@pytest.mark.parametrize("name", ["token_predictor", "token_predictor_options"])
@torch.inference_mode()
def test_logits(golden, name):
    case = golden(f"paella/{name}")
    io, check, network = case.io, close(case), load_network(case)
    check(timestep_embedding(io["t"], network.config.c_r), "r_embed")
    compared = 0
    for key, parts in conditions(io):
        if key in io:
            check(network(io["x"], io["t"], io["byt5"], **parts), key)
            compared += 1
    assert compared == sum(key.startswith("logits") for key in io)


@torch.inference_mode()
def test_intermediates(golden):
    case = golden("paella/token_predictor")
    io, check, network = case.io, close(case), load_network(case)
    check(network.condition(io["byt5"])[0], "c_embed_byt5_only")
    sequence, mask = network.condition(io["byt5"], io["clip"], io["clip_image"])
    check(sequence, "c_embed")

    seen = {}

    def record(key):
        return lambda module, args, output: seen.__setitem__(key, channels_first(output))

    levels = len(network.down_blocks)
    network.in_mapper.register_forward_hook(record("token_embed"))
    for level, blocks in enumerate(network.down_blocks):
        blocks[-1].register_forward_hook(record(f"level_output_{levels - 1 - level}"))
    network.down_blocks[0][0].register_forward_pre_hook(
        lambda module, args: seen.__setitem__("patch_embed", channels_first(args[0]))
    )
    network.up_blocks[-1][-1].register_forward_hook(record("up_out"))
    features = network.features(io["x"], io["t"], network.prepare(sequence, mask))
    seen["head_features"] = channels_first(features)
    assert seen.keys() == {k for k in io if k in seen or "level_output" in k}
    for key, value in seen.items():
        check(value, key)

    x, skip = (io[k].permute(0, 2, 3, 1) for k in ("skipblock_x", "skipblock_skip"))
    check(channels_first(network.up_blocks[1][0](x, skip)), "skipblock_out")


def test_noising_and_loss_weight(golden):
    case = golden("paella/train_loss")
    io, check = case.io, close(case)
    check(process.noise_rate(io["uniform_t"], "released"), "t")
    check(process.noise_rate(io["uniform_t"], "simple"), "t_simple")
    check(process.noise_rate(io["uniform_t"], "wuerstchen"), "t_wuerstchen")
    noised, mask = process.add_noise(io["tokens"], io["t"], io["uniform_mask"], io["random_x"])
    assert torch.equal(noised, io["noised"])
    assert torch.equal(mask, io["mask"].bool())
    check(process.loss_weight(mask, io["t"], case.case["min_val"]), "loss_weight")
    for key in [k for k in io if k.startswith("loss_weight_min")]:
        eta = float(f"0.{key.removeprefix('loss_weight_min0')}")
        check(process.loss_weight(mask, io["t"], eta), key)


def test_loss_gradients_and_update(golden):
    case = golden("paella/train_loss")
    io, check, network = case.io, close(case), load_network(case).train()
    logits = network(io["noised"], io["t"], io["byt5"], io["clip"], io["clip_image"])
    logits.retain_grad()
    ce = process.token_loss(logits, io["tokens"], case.case["label_smoothing"])
    weight = process.loss_weight(io["mask"].bool(), io["t"], case.case["min_val"])
    per_sample = process.sample_loss(ce, weight)
    loss = per_sample.mean()
    check(logits, "logits")
    check(ce, "ce_per_token")
    check(per_sample, "loss_per_sample")
    check(loss, "loss")
    check(ce.mean(), "loss_plain_mean")
    check((logits.argmax(1) == io["tokens"]).float().mean(), "accuracy")

    loss.backward()
    parameters = dict(network.named_parameters())
    check(logits.grad, "grad_logits")
    for key in [k for k in io if k.startswith("grad.")]:
        check(parameters[key.removeprefix("grad.")].grad, key)

    what, after = case.case["what"], number("atol", case.tolerance["after_step"])
    check(
        torch.nn.utils.clip_grad_norm_(network.parameters(), number("clipping to", what)),
        "grad_norm",
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=number("lr", what), weight_decay=number("weight decay", what)
    )
    optimizer.step()
    for key in [k for k in io if k.startswith("after_step.")]:
        check(parameters[key.removeprefix("after_step.")], key, atol=after)


def prepared(network, io, prefix=""):
    """Condition and null condition of a sampling case."""
    own = {k: io.get(f"{prefix}{k}", io.get(k)) for k in ("uncond_byt5", "uncond_clip")}
    image = io.get(f"{prefix}uncond_clip_image")
    cond = network.condition(io["byt5"], io["clip"], io["clip_image"])
    null = network.condition(own["uncond_byt5"], own["uncond_clip"], image)
    return network.prepare(*cond), network.prepare(*null)


def sampling_config(spec: dict, **more) -> SamplingConfig:
    """A case's sampler settings, by the released argument names, as our settings."""
    cfg, heat = (v if isinstance(v, list) else [v] * 2 for v in (spec["cfg"], spec["temperature"]))
    renoise = spec.get("renoise_steps")
    return SamplingConfig(
        steps=spec["steps"],
        guidance_start=cfg[0],
        guidance_end=cfg[1],
        guided_steps=spec.get("sampling_conditional_steps"),
        temperature_start=heat[0],
        temperature_end=heat[1],
        renoise_steps=renoise if isinstance(renoise, int) else None,
        t_start=spec.get("t_start", 1.0),
        t_end=spec.get("t_end", 0.0),
        mode=spec.get("mode", "multinomial"),
        **more,
    )


def check_v3_sampling(case, spec, prefix=""):
    io, check, network = case.io, close(case), load_network(case)
    cond, null = prepared(network, io, prefix)
    settings = process.loop_settings(sampling_config(spec))

    def get(key):
        return io.get(f"{prefix}{key}")

    draws, extra = get("draws"), {}
    if "Gumbel" in spec.get("draw", ""):
        draws, extra = draws.permute(0, 1, 3, 4, 2), {"draw": gumbel_draw}
    guide = network.predictor(cond, null)
    everything = torch.ones_like(get("init_noise"), dtype=torch.bool)
    calls = []

    def predict(x, t, weight, keep):
        i = len(calls)
        calls.append(x)
        check(t, get("step_t")[i])
        # the loop asks for the kept tokens only; here all of them are compared
        logits = {
            "step_logits_cond": network.mixed_rows(x, t, [cond], [1.0], everything),
            "step_logits_uncond": network.mixed_rows(x, t, [null], [1.0], everything),
            "guided_logits": guide(x, t, weight, everything),
        }
        logits = {name: spread(network.head(rows), x) for name, rows in logits.items()}
        scores = (logits["guided_logits"] / settings["temperature"][i]).softmax(dim=1)
        for name, value in {**logits, "step_scores": scores}.items():
            expected = get(name)
            if expected is not None and i < len(expected):
                check(value, expected[i])
        return guide(x, t, weight, keep)

    results = []
    final = process.sample(
        predict,
        network.head,
        init_noise=get("init_noise"),
        uniform_renoise=get("uniform_renoise"),
        draws=draws,
        start=get("init_x"),
        on_step=lambda i, x, out: results.append((x, out)),
        **settings,
        **extra,
    )
    inputs = torch.stack([x for x, _ in results])
    assert torch.equal(inputs, get("step_input_tokens"))
    renoised = get("step_renoised")
    for i, (_, out) in enumerate(results):
        if i < len(renoised):
            assert torch.equal(out, renoised[i])
            kept = get("step_renoise_mask")[i] == 0
            assert torch.equal(out[kept], get("step_presampled_before_renoise")[i][kept])
            rate = torch.as_tensor(settings["renoise_probability"][i]).expand(len(out))
            check(rate, get("step_renoise_t")[i])
        elif get("step_sampled") is not None:
            assert torch.equal(out, get("step_sampled")[i])
    assert torch.equal(final, get("final_tokens"))


@torch.inference_mode()
def test_sampling_cfg(golden):
    case = golden("paella/sampling_cfg")
    check_v3_sampling(case, case.case["sampler"])


@torch.inference_mode()
def test_sampling_variants(golden):
    case = golden("paella/sampling_variants")
    for name, spec in case.case["variants"].items():
        check_v3_sampling(case, spec, f"{name}_")


@torch.inference_mode()
def test_v1_network_and_loss(golden):
    case = golden("paella/v1_unet_sampling")
    io, check, network = case.io, close(case), load_network(case)
    rate = process.cosine_rate(io["r"])
    check(rate, "gamma")
    check(timestep_embedding(rate, network.config.c_r), "r_embed")
    logits = network(io["x"], io["c"], io["r"])
    check(logits, "logits")
    check(network(io["x"], io["c_spatial"], io["r"]), "logits_spatial")
    noised, mask = process.add_noise(io["x"], rate, io["uniform_mask"], io["random_x"])
    assert torch.equal(noised, io["noised"])
    assert torch.equal(mask, io["mask"].bool())
    ce = process.token_loss(
        logits, io["x"], number("label smoothing", case.case["tensors"]["loss"])
    )
    check(process.sample_loss(ce, process.loss_weight(mask, rate, 1.0)).mean(), "loss")


def check_v1_sampling(case, spec, prefix):
    io, check, network = case.io, close(case), load_network(case)

    def get(key):
        return io.get(f"{prefix}_{key}")

    scale, temperature = spec["classifier_free_scale"], spec.get("temp_range", [1.0, 1.0])
    weight = 1.0 if scale < 0 else scale
    config = SamplingConfig(
        steps=spec["T"],
        first_step=spec.get("starting_t", 0),
        guidance_start=weight,
        guidance_end=weight,
        temperature_start=temperature[0],
        temperature_end=temperature[1],
        renoise_steps=spec["renoise_steps"],
        renoise_mode=spec["renoise_mode"],
        schedule="cosine",
        typical_mass=spec.get("typical_mass", 0.2) if spec["typical_filtering"] else None,
        typical_min_tokens=spec.get("typical_min_tokens", 1),
    )
    guide = network.predictor(io["c"])
    everything = torch.ones_like(get("init_noise"), dtype=torch.bool)
    calls = []

    def predict(x, t, w, keep):
        i = len(calls)
        calls.append(x)
        assert torch.equal(x, get("step_input")[i])
        rows = network.head(guide(x, t, w, everything))  # [B h w, K]
        check(spread(rows, x), get("step_guided_logits")[i])
        if get("kept_labels") is not None:
            filtered = process.typical_filter(rows, config.typical_mass, config.typical_min_tokens)
            assert torch.equal(spread(filtered.isfinite(), x), get("kept_labels")[i].bool())
        return guide(x, t, w, keep)

    results = []
    # v1 starts from the given tokens and, without a mask, also renoises with them
    given = io["x"] if spec["start_tokens"] == "x" else None
    mask = get("mask") if spec["use_mask"] else None
    final = process.sample(
        predict,
        network.head,
        init_noise=get("init_noise") if mask is not None or given is None else given,
        uniform_renoise=get("uniform_renoise"),
        draws=get("gumbel").permute(0, 1, 3, 4, 2),
        draw=gumbel_draw,
        start=given,
        mask=mask,
        random_tokens=get("rand_tokens"),
        on_step=lambda i, x, out: results.append(out),
        **process.loop_settings(config),
    )
    assert len(calls) == len(get("step_input"))
    for i, out in enumerate(results[:-1]):
        assert torch.equal(out, get("step_input")[i + 1])
    assert torch.equal(final, get("final"))


@torch.inference_mode()
def test_v1_sampling(golden):
    case = golden("paella/v1_unet_sampling")
    for name, spec in case.case["variants"].items():
        check_v1_sampling(case, spec, name)


@torch.inference_mode()
def test_prior(golden):
    case = golden("paella/clip_prior")
    io, check, network = case.io, close(case), load_network(case)
    check(network(io["x"], io["r"], io["c"]), "pred_noise")
    check(prior.alpha_bar(io["r"]), "alpha_cumprod")
    check(prior.diffuse(io["x"], io["r"], io["noise"]), "diffused")
    spec = case.case["sampler"]
    for grid in ("arroz", "torchtools"):
        for sampler in ("ddpm", "ddim"):
            steps = []
            final = prior.sample(
                network,
                io["c"],
                init=io["init"],
                step_noise=io["step_noise"],
                times=prior.time_grid(spec["timesteps"], grid),
                guidance=spec["cfg"],
                sampler=sampler,
                on_step=lambda i, x, steps=steps: steps.append(x),
            )
            check(torch.stack(steps), f"{grid}_{sampler}")
            assert torch.equal(final, steps[-1])
