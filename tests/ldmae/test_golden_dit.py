"""The diffusion model against the released code; everything is read from the cases."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from experiments.report.pictures import to_uint8
from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.ldmae import process
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.config import DiTConfig, SamplingConfig
from lightning_modules.ldmae.convert import convert_dit, convert_vmae
from lightning_modules.ldmae.network import DiT, timestep_embedding

pytestmark = pytest.mark.golden


def load_network(case) -> DiT:
    state, settings = convert_dit(case.weights, case.config)
    found = convert_dit(case.weights, {"num_heads": case.config["num_heads"]})[1]
    told = set(found) - {"class_dropout_prob", "num_classes"}
    assert {k: found[k] for k in told} == {k: case.config.get(k, 0) for k in told}
    network = DiT(build(DiTConfig, settings))
    load_strict(network, state, case.name)
    return network.eval()


def close(case, prefix: str = ""):
    limits = {name: case.tolerance[f"{prefix}{name}"] for name in ("atol", "rtol")}

    def check(actual: Tensor, name: str | Tensor, **tolerance) -> None:
        expected = case.io[name] if isinstance(name, str) else name
        torch.testing.assert_close(actual, expected, **(limits | tolerance))

    return check


def hidden_labels(labels: Tensor, uniforms: Tensor, config: DiTConfig) -> Tensor:
    return labels.masked_fill(uniforms < config.class_dropout_prob, config.num_classes)


def predictor(network: DiT, labels: Tensor):
    """`predict` of `process.guided` for labels and the null label."""
    null = network.label_side(torch.tensor([network.config.num_classes]))
    sides = {"own": network.label_side(labels), "null": null}

    def predict(x: Tensor, t: Tensor, conditions: Sequence[process.Condition]) -> Tensor:
        return network(x, t, [sides[name] for name in conditions])

    return predict


@pytest.mark.parametrize("name", ["dit_imagenet_flags", "dit_celebahq_flags", "dit_plain_flags"])
@torch.inference_mode()
def test_forward(golden, name):
    case = golden(f"ldmae/{name}")
    io, check, network = case.io, close(case), load_network(case)
    seen: dict[str, Tensor] = {}

    def record(key):
        return lambda module, args, output: seen.__setitem__(key, output)

    network.x_embedder.register_forward_hook(record("x_tokens"))
    network.t_embedder.register_forward_hook(record("t_emb"))
    network.y_embedder.register_forward_hook(record("y_emb"))
    network.blocks[0].attn.register_forward_hook(record("attn_0"))
    network.blocks[0].mlp.register_forward_hook(record("mlp_0"))
    network.final_layer.register_forward_hook(record("final_tokens"))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(record(f"block_{i}"))
    seen["out"] = network(io["x"], io["t"], [network.label_side(io["y"])])[0]
    seen["t_freq"] = timestep_embedding(io["t"])
    if network.config.use_rope:
        # made here, not loaded
        rotation = DiT(network.config).feat_rope
        seen |= {"rope_cos": rotation.freqs_cos, "rope_sin": rotation.freqs_sin}
    later = ("drop", "out_train", "cfg")  # the tests below
    assert seen.keys() == {k for k in io if k not in ("x", "t", "y") and not k.startswith(later)}
    for key, value in seen.items():
        check(value, key)


@pytest.mark.parametrize("name", ["dit_imagenet_flags", "dit_plain_flags"])
@torch.inference_mode()
def test_hidden_labels_and_guidance(golden, name):
    case = golden(f"ldmae/{name}")
    io, check, network = case.io, close(case), load_network(case)
    labels = hidden_labels(io["y"], io["drop_uniform"], network.config)
    assert torch.equal(labels, io["dropped_labels"])
    network.train()
    check(network(io["x"], io["t"], [network.label_side(labels)])[0], "out_train")

    network.eval()
    released, x = SamplingConfig(), io["x"]
    labels = io["y"].new_full((len(x),), network.config.num_classes)
    for key in ("cfg_low", "cfg_high"):
        t = io[f"{key}_t"][: len(x)]
        velocity = process.guided(
            predictor(network, io["y"]),
            released.guidance,
            released.guidance_channels,
            (released.guidance_start, released.guidance_end),
        )
        ours = velocity(x, t)
        first, second = io[f"{key}_out"].chunk(2)
        limit = {"atol": case.tolerance["cfg outputs atol"]}
        check(ours, first, **limit)
        # the other half of the reference's doubled batch: the same guided channels, its own rest
        null = network(x, t, [network.label_side(labels)])[0]
        channels = released.guidance_channels
        check(torch.cat([ours[:, :channels], null[:, channels:]], dim=1), second, **limit)


def test_training(golden):
    case = golden("ldmae/flow_train_and_sample")
    check, network = close(case, "train "), load_network(case)
    io = {k.removeprefix("train."): v for k, v in case.io.items() if k.startswith("train.")}
    t = process.training_times(io["logit_normal_n"])
    check(t, io["t"])
    xt, ut = process.straight_path(io["x0"], io["x1"], t)
    check(xt, io["xt"])
    check(ut, io["ut"])
    labels = hidden_labels(io["y"], io["drop_uniform"], network.config)
    predicted = network.train()(xt, t, [network.label_side(labels)])[0]
    check(predicted, io["pred"])
    error = process.squared_error(predicted, ut)
    check(error, io["loss_per_sample"])
    check(process.direction_error(predicted, ut), io["cos_loss_per_sample"])
    check(error.mean(), io["loss"])
    error.mean().backward()
    weights = {
        "final_linear_weight": network.final_layer.linear.weight,
        "blocks_0_qkv_weight": network.blocks[0].attn.qkv.weight,
        "label_table": network.y_embedder.embedding_table.weight,
        "t_mlp_0_weight": network.t_embedder.mlp[0].weight,
    }
    assert {f"grad_{name}" for name in weights} == {k for k in io if k.startswith("grad_")}
    for name, weight in weights.items():
        check(weight.grad, io[f"grad_{name}"], rtol=case.tolerance["gradients rtol"])


@torch.inference_mode()
def test_euler(golden):
    case = golden("ldmae/flow_train_and_sample")
    io, check, network = case.io, close(case, "trajectory "), load_network(case)
    sample, z = case.case["sample"], io["sample.z"]
    steps = sample["num_sampling_steps"] - 1
    predict, scale = predictor(network, io["sample.y"]), sample["cfg_scale"]
    channels = SamplingConfig().guidance_channels

    def walk(velocity, times: Tensor) -> Tensor:
        states = [z]
        last = process.integrate(
            velocity, z, times, on_step=lambda i, before, after: states.append(after)
        )
        assert torch.equal(last, states[-1])
        return torch.stack(states)

    times = process.time_grid(steps)
    check(times, "plain.t_grid")
    check(walk(process.guided(predict, 1.0), times), "plain.trajectory")

    shifted = process.time_grid(steps, sample["timestep_shift"])
    check(shifted, "cfg.t_grid")
    interval = (sample["cfg_interval_start"], 1.0)
    ours = walk(process.guided(predict, scale, channels, interval), shifted)
    check(ours, io["cfg.trajectory"][:, : len(z)])
    check(ours[-1] * io["latent_std"] + io["latent_mean"], "cfg.latents")
    always = walk(process.guided(predict, scale, channels), shifted)
    check(always[-1], io["cfg_no_interval.final"][: len(z)])


@torch.inference_mode()
def test_the_guided_latents_decoded(golden):
    case = golden("ldmae/flow_train_and_sample")
    io, check, network = case.io, close(case, "trajectory "), load_network(case)
    sample = case.case["sample"]
    velocity = process.guided(
        predictor(network, io["sample.y"]),
        sample["cfg_scale"],
        SamplingConfig().guidance_channels,
        (sample["cfg_interval_start"], 1.0),
    )
    times = process.time_grid(sample["num_sampling_steps"] - 1, sample["timestep_shift"])
    latents = process.integrate(velocity, io["sample.z"], times)

    other = golden(f"ldmae/{case.case['vmae_case']}")
    state, settings = convert_vmae(other.weights, other.config)
    autoencoder = AutoencoderModule.from_export(state, settings)
    autoencoder.set_statistics(io["latent_mean"], io["latent_std"])
    check(autoencoder.decode_raw(autoencoder.denormalise(latents)), "cfg.decoded")
    levels = int(re.search(r"\d+", case.tolerance["decoded_uint8"])[0])
    grey = to_uint8(autoencoder.decode(latents)).permute(0, 2, 3, 1).int()
    assert (grey - io["cfg.decoded_uint8"].int()).abs().max() <= levels


@torch.inference_mode()
def test_dopri5(golden):
    case = golden("ldmae/flow_train_and_sample")
    network, calls = load_network(case), []
    predict = predictor(network, case.io["sample.y"])

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return predict(x, t.float(), ["own"])[0]

    released = SamplingConfig()
    final = process.dopri5(counted, case.io["sample.z"], atol=released.atol, rtol=released.rtol)
    limits = {"atol": case.tolerance["dopri5 atol"], "rtol": case.tolerance["trajectory rtol"]}
    torch.testing.assert_close(final, case.io["dopri5.final"], **limits)
    assert len(calls) > 2 * 6
