"""aMUSEd's networks against numbers of diffusers; everything is read from the case."""

import re
from pathlib import PurePosixPath

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.muse import process
from lightning_modules.muse.config import DecodeConfig, UViTConfig
from lightning_modules.muse.convert import convert
from lightning_modules.muse.uvit import UViT, sinusoids
from lightning_modules.vqgan.convert import convert as convert_tokenizer
from lightning_modules.vqgan.module import VQGANModule

pytestmark = pytest.mark.golden


def load_uvit(state, hints) -> UViT:
    state, settings = convert(state, hints)
    network = UViT(build(UViTConfig, settings))
    load_strict(network, state, "the golden U-ViT")
    return network.eval()


def channels_first(logits: Tensor) -> Tensor:
    return logits.permute(0, 3, 1, 2)


def near(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected.view(actual.shape), atol=atol, rtol=0)


def recorded(network: UViT) -> dict[str, Tensor]:
    """Outputs of modules by the names of a case's activations, filled by the next forward."""
    named = {
        "encoder_proj_layer_norm": network.encoder_proj_layer_norm,
        "cond_embed": network.cond_embed,
        "embed": network.embed,
        "down_block": network.down_block,
        "project_to_hidden": network.project_to_hidden,
        "project_from_hidden": network.project_from_hidden,
        "up_block": network.up_block,
    }
    for side in ("down_block", "up_block"):
        block = getattr(network, side)
        for i, (res, attn) in enumerate(zip(block.res_blocks, block.attention_blocks, strict=True)):
            named |= {f"{side}_res{i}": res, f"{side}_attn{i}": attn}
    named |= {f"layer{i}": layer for i, layer in enumerate(network.transformer_layers)}
    if network.config.downsample:
        named |= {
            "downsample": network.down_block.downsample,
            "upsample": network.up_block.upsample,
        }
    seen = {}
    for name, module in named.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(f"act_{name}", out)
        )
    return seen


@pytest.mark.parametrize("name", ["uvit2d_base", "uvit2d_downup"])
def test_uvit(golden, name):
    case = golden(f"muse/{name}")
    io, atol = case.io, case.tolerance["logits_abs"]
    network = load_uvit(case.weights, case.config)
    assert len(network.state_dict()) == case.case["weights"]["n_tensors"]
    embedded = sinusoids(io["micro_conds"], network.config.micro_cond_encode_dim).flatten(1)
    near(embedded, io["micro_cond_embeds"], atol)

    seen = recorded(network)
    ids, micro = io["input_ids"], io["micro_conds"]
    assert int(ids.max()) == network.mask_id
    logits = network(ids, io["encoder_hidden_states"], io["pooled_text_emb"], micro)
    near(channels_first(logits), io["logits"], atol)
    for key in [key for key in io if key.startswith("act_")]:
        value = channels_first(seen[key]) if seen[key].ndim == io[key].ndim == 4 else seen[key]
        near(value, io[key], atol)

    labels = io["labels"]
    masked = labels >= 0
    told = {key: entry["what"] for key, entry in case.case["io"].items()}
    smoothed = float(re.search(r"label_smoothing ([0-9.]+)", told["loss_smoothed"])[1])
    for key, smoothing in (("loss", 0.0), ("loss_smoothed", smoothed)):
        loss = F.cross_entropy(logits[masked], labels[masked], label_smoothing=smoothing)
        near(loss, io[key], case.tolerance["loss_abs"])
    loss.backward()
    parameters = dict(network.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    grads = {"grad_norm": norm}
    for key in [key for key in io if key.startswith("grad_") and key not in grads]:
        grads[key] = parameters[told[key].removeprefix("gradient of ")].grad
    for key, value in grads.items():
        near(value, io[key], case.tolerance["grad_rel"] * float(io[key].abs().max()))


@pytest.mark.parametrize("name", ["uvit2d_base", "uvit2d_downup"])
@torch.inference_mode()
def test_guided_logits(golden, name):
    case = golden(f"muse/{name}")
    io, ids, s = case.io, case.io["input_ids"], case.case["guidance_scale"]
    network = load_uvit(case.weights, case.config)
    cond, null = (
        network.prepare(
            io[f"{which}encoder_hidden_states"],
            io[f"{which}pooled_text_emb"],
            io["micro_conds"],
        )
        for which in ("", "negative_")
    )
    rows = network.mixed_rows(ids, [cond, null], [s, 1 - s], torch.ones_like(ids).bool())
    guided = channels_first(network.head(rows).view(*ids.shape, -1))
    near(guided, io["guided_logits"], case.tolerance["logits_abs"])
    keep = ids == network.mask_id
    some = network.head(network.mixed_rows(ids, [cond, null], [s, 1 - s], keep))
    near(some, guided.permute(0, 2, 3, 1)[keep], case.tolerance["logits_abs"])


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] of the suite -> [0, 1] of aMUSEd."""
    return (images + 1) / 2


def test_vqmodel(golden):
    case = golden("muse/vqmodel")
    io, latents_abs, image_abs = case.io, case.tolerance["latents_abs"], case.tolerance["image_abs"]
    model = VQGANModule.from_export(*convert_tokenizer(case.weights, case.config))
    auto, images = model.autoencoder, io["pixels"] * 2 - 1
    seen = []
    auto.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    latents = model.latents(images)
    near(seen[0], io["encoder_out"], latents_abs)
    near(latents, io["latents"], latents_abs)
    assert torch.equal(model.encode(images), io["indices"])
    assert len(io["indices"].unique()) == case.case["codes_used"]
    near(auto.quantize.lookup(io["indices"]), io["codebook_entry"], latents_abs)
    near(to_unit(model.decode_codes(io["codebook_entry"])), io["decoded"], image_abs)
    near(to_unit(model(images)[0]), io["forward_sample"], image_abs)
    clamped = io["decoded"].clamp(0, 1)
    near(to_unit(model.decode(io["indices"])), clamped, image_abs)

    given = io["latents"].clone().requires_grad_()
    quantized = auto.quantize(given)
    near(quantized.codes, io["quantized"], latents_abs)
    relative = case.tolerance["loss_rel"]
    near(quantized.loss, io["vq_loss"], relative * float(io["vq_loss"]))
    (grad,) = torch.autograd.grad(quantized.loss, given)
    near(grad, io["grad_latents"], relative * float(io["grad_latents"].abs().max()))


def gumbel_draw(rows, noise, head, *, temperature, logits_filter):
    """The pipeline's draw with its noise given: argmax(log softmax(logits) + noise [n, K])."""
    logits = head(rows)
    assert temperature == 1 and logits_filter is None
    return (logits.log_softmax(1) + noise).argmax(1)


@torch.inference_mode()
def test_amused_pipeline(golden):
    case = golden("muse/amused_pipeline")
    io, config, tolerance = case.io, case.config, case.tolerance
    parts = {  # the folders of the two networks, each a case of its own
        name: golden(f"muse/{PurePosixPath(file).parent.name}")
        for name, file in case.case["weights_from"].items()
    }
    network = load_uvit(parts["transformer"].weights, config["transformer"])
    tokenizer = VQGANModule.from_export(
        *convert_tokenizer(parts["vqvae"].weights, parts["vqvae"].config)
    )
    steps, scale, scheduler = (
        config[k] for k in ("num_inference_steps", "guidance_scale", "scheduler")
    )
    heat = config["temperature"]
    first, last = heat if isinstance(heat, list) else (heat, 0.01)
    expected = io["tokens_after"]
    start = torch.full_like(expected[0], scheduler["mask_token_id"])
    grid = (config["height"] // tokenizer.factor, config["width"] // tokenizer.factor)
    assert grid == start.shape[1:] and network.mask_id == scheduler["mask_token_id"]
    micro = torch.tensor([config["micro_conds"]], dtype=torch.float32)
    cond, null = (
        network.prepare(io[f"{which}encoder_hidden_states"], io[f"{which}pooled_text_emb"], micro)
        for which in ("", "negative_")
    )
    everywhere, calls = torch.ones_like(start, dtype=torch.bool), []

    def predict(x: Tensor, weight: float, keep: Tensor) -> Tensor:
        both = [cond, null], [weight, 1 - weight]
        whole = network.head(network.mixed_rows(x, *both, everywhere)).view(*x.shape, -1)
        near(channels_first(whole), io["guided_logits"][len(calls)], tolerance["guided_abs"])
        calls.append(x)
        return network.mixed_rows(x, *both, keep)

    settings = process.loop_settings(
        DecodeConfig(
            steps=steps,
            schedule=scheduler["masking_schedule"],
            counting="maskgit",
            choice_temperature=first,
            choice_end=last,
            choice_law="linspace",
            guidance_start=scale,
            guidance_end=scale,
        ),
        (start == network.mask_id).flatten(1).sum(1),
    )
    after = []
    tokens = process.decode(
        predict,
        network.head,
        start=start,
        mask_id=network.mask_id,
        draws=io["g_token"].view(*expected.shape, -1),
        choice_noise=io["g_conf"].view(expected.shape),
        draw=gumbel_draw,
        on_step=lambda i, before, now: after.append(now),
        **settings,
    )
    assert len(calls) == steps
    assert torch.equal(torch.stack(after), expected) and torch.equal(tokens, expected[-1])
    near(to_unit(tokenizer.decode(tokens)), io["image"], tolerance["image_abs"])
