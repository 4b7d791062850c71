"""VMAE against the released code; everything is read from the cases."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data.crops import adm
from data.images import to_tensor
from experiments.report.pictures import to_uint8
from lightning_modules.common.checkpoint import load_strict
from lightning_modules.ldmae.autoencoder import AutoencoderModule, TrainingNoise
from lightning_modules.ldmae.config import ViTConfig
from lightning_modules.ldmae.convert import convert_vmae
from lightning_modules.ldmae.losses import channel_statistics, normal_kl, split_moments, variance_kl
from lightning_modules.ldmae.vmae import masking, patchify, resize_tables, sincos_table, unpatchify

pytestmark = pytest.mark.golden


class PooledDistance(nn.Module):
    """The stand-in for LPIPS that a training case describes."""

    def __init__(self, description: str) -> None:
        super().__init__()
        found = re.search(r"(\d+)x\1 average pooling with stride (\d+)", description)
        assert found, description
        self.side, self.stride = int(found[1]), int(found[2])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (F.avg_pool2d(v, self.side, self.stride) for v in (x, y))
        return (x - y).square().mean((1, 2, 3))


def load(case: Any, **objective: Any) -> AutoencoderModule:
    state, settings = convert_vmae(case.weights, case.config)
    module = AutoencoderModule({**settings, "objective": objective})
    load_strict(module, state, case.name)
    return module


def closeness(case: Any, atol: str, rtol: str) -> Any:
    """Return check(value, name of a tensor in io) at two of the case's tolerances."""

    def check(actual: Tensor, name: str, **limits: float) -> None:
        expected = case.io[name]
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), f"{case.name}: {name}"
            return
        given = {"atol": case.tolerance.get(atol, 0.0), "rtol": case.tolerance[rtol]}
        torch.testing.assert_close(
            actual.detach(), expected, **(given | limits), msg=lambda m: f"{name}: {m}"
        )

    return check


def recorded(module: AutoencoderModule) -> dict[str, Tensor]:
    """A dict that the next pass fills with what some layers put out."""
    seen: dict[str, Tensor] = {}
    network = module.network
    layers = {
        "patch_tokens": network.patch_embed,
        "encoder_out": network.norm,
        "latent_params": network.to_latent,
        "from_latent_out": network.from_latent,
        "decoder_embed_out": network.decoder_embed,
        "decoder_norm_out": network.decoder_norm,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    return seen


def check_gradients(case: Any, module: AutoencoderModule, prefix: str) -> None:
    check = closeness(case, "gradients atol", "gradients rtol")
    weights = dict(module.network.named_parameters())
    names = [k for k in case.io if k.startswith(f"{prefix}.grad_")]
    assert names
    for name in names:
        said = re.findall(r"[\w.]+", case.case["io"][name]["what"])
        (own,) = {w for w in said if w in weights}
        check(weights[own].grad, name)


TRAINING = ["vmae_train", "vmae_train_variant"]


@pytest.mark.parametrize("name", TRAINING)
def test_training_losses_and_gradients(golden, name):
    case = golden(f"ldmae/{name}")
    config, io = case.config, case.io
    check = closeness(case, "forward atol", "forward rtol")
    check_loss = closeness(case, "losses atol", "losses rtol")
    rough = re.search(r"rtol ([\d.e-]+)", case.tolerance["kl with fixed_std"])
    stub = PooledDistance(case.case["perceptual stub"])
    for run, settings in case.case["runs"].items():
        share = settings["visible_loss_ratio"]
        module = load(
            case,
            mask_ratio=settings["mask_ratio"],
            fixed_std=settings["fixed_std"],
            norm_pix_loss=settings["norm_pix_loss"],
            visible_weight=share,
            masked_weight=1 - share,
            perceptual_weight=config["perceptual_loss_ratio"],
            kl_weight=config["kl_loss_weight"],
        )
        module._lpips = [stub]
        seen = recorded(module)
        chance = TrainingNoise(mask=io[f"{run}.mask_noise"], posterior=io[f"{run}.posterior_noise"])
        made = module(io["images"], chance)
        for layer, value in seen.items():
            check(value, f"{run}.{layer}")
        check(made.hidden.shuffle, f"{run}.ids_shuffle")
        check(made.hidden.restore, f"{run}.ids_restore")
        check(made.hidden.mask, f"{run}.mask", atol=0, rtol=0)
        check(made.mean, f"{run}.mean")
        check(made.logvar, f"{run}.logvar")
        check((0.5 * made.logvar).exp(), f"{run}.std")
        check(made.mean + (0.5 * made.logvar).exp() * chance.posterior, f"{run}.z")
        check(made.images, f"{run}.pred_image")
        check(patchify(made.images, config["patch_size"]), f"{run}.pred")

        kl_limits = {} if settings["fixed_std"] is None else {"rtol": float(rough[1])}
        per_sample = variance_kl(made.logvar, settings["fixed_std"]).sum((1, 2))
        check_loss(per_sample, f"{run}.kl_per_sample", **kl_limits)
        total, terms = module.loss(io["images"], made)
        check_loss(terms["visible"], f"{run}.visible_loss")
        check_loss(terms["masked"], f"{run}.mask_loss")
        check_loss(terms["perceptual"], f"{run}.p_loss")
        check_loss(terms["kl"], f"{run}.kl_loss", **kl_limits)
        check_loss(total, f"{run}.loss", **kl_limits)
        total.backward()
        check_gradients(case, module, run)


@pytest.mark.parametrize("name", TRAINING)
def test_second_stage(golden, name):
    case = golden(f"ldmae/{name}")
    settings, io = case.case["stage3"], case.io
    weights = dict(case.weights)
    if settings["ldmae_mode"]:
        weights.pop("mask_token")
    state, sizes = convert_vmae(weights, case.config)
    objective = {
        "mask_ratio": settings["mask_ratio"],
        "masked_weight": 0.0,
        "perceptual_weight": settings["perceptual_loss_ratio"],
        "kl_weight": settings["kl_loss_weight"],
        "sample": False,
    }
    module = AutoencoderModule({**sizes, "objective": objective})
    load_strict(module, state, case.name)
    module._lpips = [PooledDistance(case.case["perceptual stub"])]
    made = module(io["images"], module.draw(io["images"], torch.Generator().manual_seed(0)))
    patches = patchify(made.images, case.config["patch_size"])
    closeness(case, "forward atol", "forward rtol")(patches, "stage3.pred")
    total, terms = module.loss(io["images"], made)
    check = closeness(case, "losses atol", "losses rtol")
    check(terms["visible"], "stage3.visible_loss")
    check(terms["perceptual"], "stage3.p_loss")
    check(total, "stage3.loss")
    total.backward()
    check_gradients(case, module, "stage3")


@pytest.mark.parametrize("name", TRAINING)
def test_sizes_tables_and_patches(golden, name):
    case = golden(f"ldmae/{name}")
    config, io = case.config, case.io
    check = closeness(case, "forward atol", "forward rtol")
    settings = convert_vmae(case.weights, case.config)[1]
    vit = settings["vit"]
    assert settings["channels"] == config["latent_dim"]
    assert vit["image_size"] == config["img_size"]
    same = set(vit) & set(config)
    assert {"patch_size", "depth", "decoder_depth", "mlp_ratio", "embed_dim"} <= same
    assert {k: vit[k] for k in same} == {k: config[k] for k in same}
    assert (vit["head"] == "conv") == config["pred_with_conv"]

    side = config["img_size"] // config["patch_size"]
    check(sincos_table(config["embed_dim"], side), "sincos_pos_embed")
    wide = ViTConfig(**(vit | {"image_size": 2 * config["img_size"]}))
    check(resize_tables(case.weights, wide)["pos_embed"], "pos_embed_resized_x2")
    patches = patchify(io["images"], config["patch_size"])
    check(patches, "patches", atol=0, rtol=0)
    assert torch.equal(unpatchify(patches, (side, side), config["patch_size"]), io["images"])
    for run, settings in case.case["runs"].items():
        noise, count = io[f"{run}.mask_noise"], io[f"{run}.mean"].shape[2]
        assert masking(noise, settings["mask_ratio"]).visible == count


def test_inference(golden):
    case = golden("ldmae/vmae_infer")
    io, check = case.io, closeness(case, "float atol", "rtol")
    module = load(case).eval()
    moments = module.moments(io["images"])
    mean, logvar = split_moments(moments)
    raw = module.network.moments(io["images"])
    check(raw, "latent_params")
    check(mean, "mean")
    check(logvar, "logvar")
    check((0.5 * logvar).exp(), "std")
    sample = module.sample_posterior(moments, io["sample_noise"])
    check(sample, "sample")
    check(normal_kl(mean, logvar).sum((1, 2, 3)), "kl_full_per_image")
    check(module.decode_raw(mean), "recon_from_mode")
    check(module.decode_raw(sample), "recon_from_sample")
    levels = [k for k in io if k.startswith("robust_recon_")]
    assert levels
    for name in levels:
        step = float(name.rpartition("_")[2]) * io["robust_noise"] * io["latent_std"]
        check(module.decode_raw(mean + step), name)

    pixels = to_uint8(module.decode(module.encode(io["images"]))).movedim(1, -1)
    difference = (pixels.int() - io["recon_uint8"].int()).abs()
    allowed = int(re.search(r"at most (\d+) grey", case.tolerance["recon_uint8"])[1])
    assert int(difference.max()) <= allowed and float(difference.float().mean()) < 0.01

    found, std = channel_statistics(sample.split(1))
    check(found.float().view(1, -1, 1, 1), "stats_mean")
    check(std.float().view(1, -1, 1, 1), "stats_std")
    module.set_statistics(io["stats_mean"], io["stats_std"])
    check(module.normalise(sample), "normalised")
    check(module.denormalise(io["normalised"]), "sample")
    clamped = case.io["recon_from_mode"].clamp(-1, 1)
    limits = {"atol": case.tolerance["float atol"], "rtol": case.tolerance["rtol"]}
    torch.testing.assert_close(module.decode(module.normalise(mean)), clamped, **limits)


def test_preprocessing(golden):
    case = golden("ldmae/vmae_infer")
    picture = Image.fromarray(case.io["raw_image"].numpy())
    cut = adm(picture, case.config["img_size"])
    tensor = to_tensor(np.array(cut))
    limit = float(re.search(r"atol ([\d.e-]+)", case.tolerance["preprocessed"])[1])
    torch.testing.assert_close(tensor, case.io["preprocessed"], atol=limit, rtol=0)
    torch.testing.assert_close(tensor.flip(-1), case.io["preprocessed_flip"], atol=limit, rtol=0)
