"""The tokenizer against numbers of the reference implementations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.adversarial import (
    DISC_LOSSES,
    NLayerDiscriminator,
    adaptive_weight,
    disc_factor,
    generator_loss,
)
from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.perceptual import LPIPS, lpips_state
from lightning_modules.vqgan import convert
from lightning_modules.vqgan.config import ModelConfig, ObjectiveConfig
from lightning_modules.vqgan.losses import reconstruction_loss
from lightning_modules.vqgan.module import VQGANModule
from lightning_modules.vqgan.quantizer import (
    QUANTIZERS,
    GumbelQuantizer,
    Quantizer,
    code_counts,
    entropy_loss,
    nearest,
    perplexity,
)

pytestmark = pytest.mark.golden

Golden = Callable[[str], Any]


def closeness(case: Any) -> Callable[..., None]:
    """Return check(value, name of a tensor in io), at the case's tolerance or exact for ints."""
    bounds = case.tolerance.get("float", case.tolerance)

    def check(value: Tensor, name: str, clamp: tuple[float, float] | None = None) -> None:
        expected = case.io[name]
        if expected.is_floating_point():
            torch.testing.assert_close(
                value.detach().float(),
                expected if clamp is None else expected.clamp(*clamp),
                atol=bounds["atol"],
                rtol=bounds["rtol"],
                msg=lambda m: f"{case.name}: {name}: {m}",
            )
        else:
            assert torch.equal(value.to(expected.dtype), expected), f"{case.name}: {name}"

    return check


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def test_vqmodel(golden: Golden) -> None:
    case = golden("vqgan/vqmodel")
    check, io = closeness(case), case.io
    model = VQGANModule.from_export(*convert.convert(case.weights, case.config))
    auto = model.autoencoder

    check(auto.encoder(io["x"]), "h")
    z = auto.encode(io["x"])
    check(z, "prequant")
    tokens = model.encode(io["x"])
    assert tokens.shape == (len(z), *z.shape[-2:])
    check(tokens.view_as(io["indices"]), "indices")
    quantized = auto.quantize(z)
    check(quantized.codes, "quant_ste")
    check(auto.quantize.lookup(tokens), "codebook_entry")
    check(auto.post_quant_conv(quantized.codes), "post_quant")
    check(auto.decode(quantized.codes), "dec")
    check(model.decode_codes(auto.quantize.lookup(tokens)), "dec_from_indices")
    check(model(io["x"])[0], "dec")
    check(model.decode(tokens), "dec_from_indices", clamp=(-1, 1))

    for form, legacy in (("legacy", True), ("fixed", False)):
        hints = case.config | {"legacy_beta": legacy}
        quantize = VQGANModule.from_export(*convert.convert(case.weights, hints)).autoencoder
        latents = io["prequant"].clone().requires_grad_()
        loss = quantize.quantize(latents).loss
        codes = quantize.quantize.embedding.weight
        grad_z, grad_codes = torch.autograd.grad(loss, [latents, codes])
        check(loss, f"emb_loss_{form}")
        check(grad_z, f"grad_z_{form}")
        check(grad_codes, f"grad_codebook_{form}")


def test_gumbelvq(golden: Golden) -> None:
    case = golden("vqgan/gumbelvq")
    check, io = closeness(case), case.io

    def load(**changes: Any) -> VQGANModule:
        hints = case.config | {"temperature": float(io["temperature"])} | changes
        return VQGANModule.from_export(*convert.convert(case.weights, hints))

    model = load(sample_tokens=False)
    auto = model.autoencoder
    z = auto.encode(io["x"])
    check(z, "prequant")
    check(auto.quantize.proj(z), "logits")
    sampled = auto.quantize(z, io["gumbels"])
    check(sampled.tokens, "indices")
    check(sampled.codes, "quant_hard")
    check(sampled.loss, "kl_loss")
    check(auto.decode(sampled.codes), "dec")
    check(auto.quantize.lookup(io["indices"]), "codebook_entry")
    check(model.encode(io["x"]), "indices_argmax")
    check(model.decode_codes(auto.quantize.lookup(model.encode(io["x"]))), "dec_argmax")
    check(model(io["x"])[0], "dec_argmax")

    soft = load(straight_through=False).train().autoencoder.quantize
    check(soft(io["prequant"], io["gumbels"]).codes, "quant_soft_train")

    hard = load(straight_through=True).train().autoencoder.quantize
    latents = io["prequant"].clone().requires_grad_()
    out = hard(latents, io["gumbels"])
    objective = (out.codes * io["probe"]).sum() + out.loss
    grads = torch.autograd.grad(objective, [latents, hard.embed.weight, hard.proj.weight])
    for value, name in zip(grads, ("grad_z", "grad_embed", "grad_proj"), strict=True):
        check(value, name)


def quantizer(kind: str, case: Any, **settings: Any) -> Quantizer:
    k, c = case.io["codebook"].shape
    config = ModelConfig(
        quantizer=kind, num_codes=k, embed_dim=c, beta=case.config["beta"], **settings
    )
    made = QUANTIZERS[kind](config)
    weight = made.embed.weight if isinstance(made, GumbelQuantizer) else made.embedding.weight
    weight.data.copy_(case.io["codebook"])
    return made


def test_quantizers_nearest_and_remap(golden: Golden) -> None:
    case = golden("vqgan/quantizers")
    check, io = closeness(case), case.io
    check(quantizer("nearest", case).assign(io["z"]), "idx")
    counts = code_counts(io["idx"], case.config["n_e"])
    check(perplexity(counts), "perplexity")
    check((counts > 0).sum(), "cluster_use")

    forms = [k.removeprefix("idx_remap_") for k in io if k.startswith("idx_remap_")]
    assert forms
    for form in forms:
        unknown = (
            {"unknown_code": "id", "unknown_id": int(form)}
            if form.isdecimal()
            else {"unknown_code": form}
        )
        q = quantizer("nearest", case, used_codes=len(io["used"]), **unknown)
        q.used.copy_(io["used"])
        tokens = q.to_used(q.assign(io["z"]))
        check(tokens, f"idx_remap_{form}")
        assert int(tokens.max()) < q.num_tokens
        check(q.to_all(tokens), f"idx_unmap_{form}")
        check(tokens, f"idx_remap_{form}")  # unmapping leaves its input alone
        check(q.lookup(q.to_all(tokens)), f"entry_{form}")


def test_quantizers_gumbel_with_remap(golden: Golden) -> None:
    case = golden("vqgan/quantizers")
    check, io = closeness(case), case.io
    q = quantizer(
        "gumbel",
        case,
        used_codes=len(io["used"]),
        kl_weight=case.config["gumbel_kl_weight"],
        temperature=case.config["gumbel_temperature"],
    )
    assert isinstance(q, GumbelQuantizer) and q.proj.bias is not None
    q.used.copy_(io["used"])
    q.proj.weight.data.copy_(io["gumbel_proj_weight"])
    q.proj.bias.data.copy_(io["gumbel_proj_bias"])
    for mode in (True, False):
        out = q.train(mode)(io["z"], io["gumbel_noise"])
        check(q.to_used(out.tokens), "gumbel_remap_idx")
        check(out.codes, "gumbel_remap_quant")
        check(out.loss, "gumbel_remap_kl")


def test_quantizers_ema(golden: Golden) -> None:
    case = golden("vqgan/quantizers")
    check, io = closeness(case), case.io
    q = quantizer("ema", case, decay=case.config["ema_decay"], eps=case.config["ema_eps"]).train()
    q.cluster_size.copy_(io["ema_cluster_size_0"])
    q.embed_avg.copy_(io["ema_embed_avg_0"])
    step = 1
    while f"ema_weight_{step}" in io:
        z = io["z" if step == 1 else f"z_step{step}"]
        out = q(z)
        check(out.loss, f"ema_loss_{step}")
        check(out.tokens.view_as(io[f"ema_idx_{step}"]), f"ema_idx_{step}")
        check(perplexity(code_counts(out.tokens, case.config["n_e"])), f"ema_perplexity_{step}")
        q.update(z, out.tokens)
        check(q.codebook(), f"ema_weight_{step}")
        check(q.cluster_size, f"ema_cluster_size_{step}")
        check(q.embed_avg, f"ema_embed_avg_{step}")
        step += 1
    assert step > 1


def test_quantizers_l2(golden: Golden) -> None:
    case = golden("vqgan/quantizers")
    check, io = closeness(case), case.io
    ratio = case.config["entropy_loss_ratio"]
    q = quantizer("l2", case, entropy_weight=ratio)
    z = io["z"].clone().requires_grad_()
    out = q(z)
    check(out.tokens.flatten(), "l2_idx")
    check(out.codes, "l2_quant")

    rows = F.normalize(io["z"], dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    check(ratio * entropy_loss(torch.cdist(rows, q.codebook()).square()), "l2_entropy_loss")
    beta, part_losses = case.config["beta"], quantizer("l2", case)(io["z"]).loss
    check(part_losses / (1 + beta), "l2_vq_loss")
    check(part_losses * beta / (1 + beta), "l2_commit_loss")

    grad_z, grad_codes = torch.autograd.grad(out.loss, [z, q.embedding.weight])
    check(grad_z, "l2_grad_z")
    check(grad_codes, "l2_grad_codebook")


def test_discriminator(golden: Golden) -> None:
    case = golden("vqgan/discriminator")
    io, every = case.io, closeness(case)
    for tag, settings in case.config.items():

        def check(value: Tensor, name: str, tag: str = tag) -> None:
            every(value, f"{tag}.{name}")

        sizes = (settings[name] for name in ("input_nc", "ndf", "n_layers", "use_actnorm"))
        net = NLayerDiscriminator(*sizes)
        load_strict(net, part(case.weights, f"{tag}."), tag)
        real, fake = io[f"{tag}.real"], io[f"{tag}.fake"]

        check(net.eval()(real), "eval_real")
        check(net(fake), "eval_fake")
        logits_real, logits_fake = net.train()(real), net(fake)
        check(logits_real, "train_real")
        check(logits_fake, "train_fake")
        for name, loss in DISC_LOSSES.items():
            check(loss(logits_real, logits_fake), name)
        check(-logits_fake.mean(), "g_loss")
        after = part(io, f"{tag}.after.")
        assert after
        for name in after:
            check(net.state_dict()[name], f"after.{name}")


def test_lpips_mini(golden: Golden) -> None:
    case = golden("vqgan/lpips_mini")
    check, io = closeness(case), case.io
    state, widths = lpips_state(case.weights)
    assert list(widths) == case.config["widths"]
    net = LPIPS(widths)
    load_strict(net, state, case.name)
    net.train()  # must not matter
    assert net.shift.flatten().tolist() == pytest.approx(case.config["shift"])
    assert net.scale.flatten().tolist() == pytest.approx(case.config["scale"])

    y = io["y"].clone().requires_grad_()
    distance = net(io["x"], y)
    check(distance.view_as(io["lpips"]), "lpips")
    check(torch.autograd.grad(distance.sum(), y)[0], "grad_y")
    layers = [d.mean((1, 2, 3)) for d in net.layers(io["x"], io["y"])]
    check(torch.stack(layers), "lpips_per_layer")
    check(net.spatial(io["x"], io["y"]), "lpips_spatial")
    for i, h in enumerate(net.features(io["x"])):
        check(h, f"relu_{i}")


def test_losses(golden: Golden) -> None:
    case = golden("vqgan/losses")
    check, io, settings = closeness(case), case.io, case.config
    # pixelloss_weight is not read by the reference either
    objective = ObjectiveConfig(
        perceptual_weight=settings["perceptual_weight"],
        codebook_weight=settings["codebook_weight"],
        disc_start=settings["disc_start"],
        disc_weight=settings["disc_weight"],
        disc_factor=settings["disc_factor"],
        disc_layers=settings["disc_num_layers"],
        disc_width=settings["disc_ndf"],
        disc_loss=settings["disc_loss"],
        use_actnorm=settings["use_actnorm"],
    )
    state, widths = lpips_state(case.weights)
    assert list(widths) == settings["lpips_widths"]
    lpips = LPIPS(widths)
    load_strict(lpips, state, case.name)
    names = ("disc_in_channels", "disc_ndf", "disc_num_layers", "use_actnorm")
    judge = NLayerDiscriminator(*(settings[name] for name in names))
    load_strict(judge, part(case.weights, "discriminator."), case.name)
    judge.train()

    for when, step in (("before", objective.disc_start - 1), ("after", objective.disc_start)):
        weight = io["last_layer_weight"].clone().requires_grad_()
        xr = F.conv2d(io["h"], weight, io["last_layer_bias"], padding=1)
        check(xr, "reconstructions")
        factor = disc_factor(objective, step)
        check(torch.tensor(factor), f"{when}.disc_factor")

        nll, parts = reconstruction_loss(io["inputs"], xr, objective, lpips)
        check(nll, f"{when}.nll_loss")
        check(nll, f"{when}.rec_loss")
        check(parts.get("perceptual", torch.tensor(0.0)), f"{when}.p_loss")
        fake_logits = copy.deepcopy(judge)(xr)
        g_loss = -fake_logits.mean()
        check(g_loss, f"{when}.g_loss")
        check(adaptive_weight(nll, g_loss, weight, objective), f"{when}.d_weight")
        (nll_grad,) = torch.autograd.grad(nll, weight, retain_graph=True)
        (g_grad,) = torch.autograd.grad(g_loss, weight, retain_graph=True)
        check(nll_grad.norm(), "nll_grad_norm")
        check(g_grad.norm(), "g_grad_norm")

        loss = nll + objective.codebook_weight * io["codebook_loss"]
        if factor:
            loss, _ = generator_loss(loss, nll, fake_logits, weight, objective, factor)
        check(loss, f"{when}.gen_loss")
        check(torch.autograd.grad(loss, weight)[0], f"{when}.grad_last_layer")

        net = copy.deepcopy(judge)
        real, fake = net(io["inputs"]), net(xr.detach())
        check(factor * DISC_LOSSES[objective.disc_loss](real, fake), f"{when}.disc_loss")
        check(real.mean(), f"{when}.logits_real")
        check(fake.mean(), f"{when}.logits_fake")


def test_paella_vqgan_f4(golden: Golden) -> None:
    case = golden("paella/vqgan_f4")
    check, io = closeness(case), case.io
    images = io["image"] * 2 - 1
    model = VQGANModule.from_export(*convert.convert(case.weights, case.config))
    settings = model.config.model
    for ours, theirs in (("num_codes", "codebook_size"), ("scale_factor", "scale_factor")):
        assert getattr(settings, ours) == case.config[theirs]
    for name in ("levels", "bottleneck_blocks", "c_hidden", "c_latent"):
        assert getattr(settings, name) == case.config[name]
    auto = model.autoencoder

    check(auto.in_block(io["image"]), "encoder_stem")
    z = auto.encode(images)
    check(z, "latents_unscaled")
    check(model.latents(images), "latents")
    tokens = model.encode(images)
    check(tokens, "indices")
    quantized = auto.quantize(z)
    check(quantized.codes / settings.scale_factor, "quantized")
    check(quantized.loss, "quant_loss")

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        return model.decode_codes(latents * settings.scale_factor)

    check(F.mse_loss(auto.quantize.lookup(tokens), z), "vq_loss")
    check(F.mse_loss(auto.quantize.lookup(tokens), z), "commit_loss")
    check((decoded(io["quantized"]) + 1) / 2, "decoded_from_quantized")
    check((model.decode_codes(auto.quantize.lookup(tokens)) + 1) / 2, "decoded_from_indices")
    check((decoded(io["latents"]) + 1) / 2, "decoded_from_latents")
    check((model.decode(tokens) + 1) / 2, "decoded_from_indices", clamp=(0, 1))
    soft = torch.einsum("bkhw,kc->bhwc", io["soft_scores"], model.codebook())
    check(soft, "soft_codes")
    check(nearest(soft.flatten(0, 2), model.codebook()).view(soft.shape[:3]), "soft_indices")

    renamed = {
        k.replace("vquantizer.codebook", "vquantizer.embedding"): v for k, v in case.weights.items()
    }
    other = VQGANModule.from_export(*convert.convert(renamed, case.config)).autoencoder
    check(other.encode(images), "diffusers_latents")
    check((other.decode(io["diffusers_latents"]) + 1) / 2, "diffusers_decoded")

    model.train()
    xr, quantized, z = model(images)
    total = F.mse_loss((xr + 1) / 2, io["image"]) + quantized.loss
    total.backward()
    check(quantized.tokens, "train_indices")
    check(z / settings.scale_factor, "train_latents")
    check(quantized.loss, "train_quant_loss")
    check((xr + 1) / 2, "train_reconstruction")
    check(total, "train_total_loss")
    (norm,) = [m for m in auto.modules() if isinstance(m, nn.BatchNorm2d)]
    check(norm.running_mean, "train_running_mean")
    check(norm.running_var, "train_running_var")
    names = [k.removeprefix("train_grad.") for k in io if k.startswith("train_grad.")]
    assert names
    for name in names:
        own = name.replace("vquantizer.codebook", "quantize.embedding")
        check(auto.get_parameter(own).grad, f"train_grad.{name}")
