"""The autoencoders as the continuous twin of the tokenizer, and their training."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.perceptual import LPIPS
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.config import AUTOENCODER_OBJECTIVES, AUTOENCODER_OPTIM
from lightning_modules.ldmae.losses import channel_statistics, normal_kl, split_moments, variance_kl

KINDS = ["vmae", "ae", "dae", "vae", "sdvae"]
BATCHES = 3


def config(kind: str = "vmae", **sections: Any) -> dict[str, Any]:
    """A model of a few thousand parameters with f = 4; keyword arguments extend its sections."""
    base: dict[str, Any] = {
        "kind": kind,
        "channels": 3,
        "vit": {
            "image_size": 16,
            "patch_size": 4,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 2,
            "decoder_embed_dim": 8,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
        "conv": {"ch": 4, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "norm_groups": 2},
        "objective": {"disc_start": 1, "disc_layers": 1, "disc_width": 4},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "clip": 1.0, "warmup_batches": 2},
        "seed": 5,
    }
    for name, value in sections.items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    return base


def module(kind: str = "vmae", **sections: Any) -> AutoencoderModule:
    torch.manual_seed(0)
    return AutoencoderModule(config(kind, **sections))


def pictures(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": pictures(1, seed=i)[0], "caption": "noise", "key": f"{i:05d}"}


def fit(
    folder: Path, epochs: int, trained: AutoencoderModule, ckpt: Path | None = None
) -> tuple[AutoencoderModule, L.Trainer]:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=BATCHES,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    loader = torch.utils.data.DataLoader(Images(), batch_size=2)
    trainer.fit(trained, loader, loader, ckpt_path=ckpt, weights_only=True)
    return trained, trainer


def differing(a: AutoencoderModule, b: AutoencoderModule) -> list[str]:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return [k for k in left if not torch.equal(left[k], right[k])]


@pytest.mark.parametrize("kind", KINDS)
def test_images_to_normalised_latents_and_back(kind: str, tmp_path: Path) -> None:
    auto, images = module(kind).eval(), pictures(3)
    assert (auto.channels, auto.factor) == (3, 4)
    moments = auto.moments(images)
    assert moments.shape == (3, 6, 4, 4)
    mean, logvar = split_moments(moments)
    if kind in ("ae", "dae"):
        assert torch.equal(logvar, torch.full_like(logvar, -30.0))
    noise = torch.randn(3, 3, 4, 4)
    expected = mean + (logvar / 2).exp() * noise
    torch.testing.assert_close(auto.sample_posterior(moments, noise), expected)

    raw = auto.decode_raw(mean).clamp(-1, 1)
    assert torch.equal(auto.encode(images), mean)  # as long as nothing was measured
    auto.measure([images, pictures(2, seed=1)], 5, torch.Generator().manual_seed(3))
    latents = auto.encode(images)
    assert not torch.equal(latents, mean)
    torch.testing.assert_close(auto.denormalise(latents), mean)
    torch.testing.assert_close(auto.decode(latents), raw)

    state, settings = auto.export()
    save_weights(tmp_path / "auto.safetensors", state, settings)
    loaded = AutoencoderModule.from_export(*load_weights(tmp_path / "auto.safetensors"))
    assert settings["paper"] == "autoencoder" and not loaded.training
    assert torch.equal(loaded.encode(images), latents)
    assert torch.equal(loaded.decode(latents), auto.decode(latents))
    halves = {k: v.half() for k, v in state.items()}
    torch.testing.assert_close(
        AutoencoderModule.from_export(halves, settings).encode(images), latents, atol=0.1, rtol=0.1
    )


def test_measured_latents_have_mean_0_and_deviation_1() -> None:
    auto, images = module(), pictures(10)
    auto.measure(images.split(4), 10, torch.Generator().manual_seed(0))
    generator, drawn = torch.Generator().manual_seed(0), []
    for moments in auto.moments(images).split(1):
        noise = torch.randn(1, 3, 4, 4, generator=generator)
        drawn.append(auto.normalise(auto.sample_posterior(moments, noise)))
    mean, std = (v.float() for v in channel_statistics(drawn))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-5, rtol=0)


def test_statistics_are_those_of_so_many_pictures_in_batches_of_any_size() -> None:
    # 27 numbers per picture: no multiple of the 16 that torch.randn draws together
    auto, images = module().double(), pictures(12, size=12).double()
    found = []
    for batches in (images[:10].split(10), images[:10].split(1), images.split(4)):
        auto.measure(batches, 10, torch.Generator().manual_seed(0))
        found.append(torch.stack([auto.latent_mean, auto.latent_std]))
    assert auto.training
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)
    auto.measure(images.split(4), 11, torch.Generator().manual_seed(0))
    assert (auto.latent_mean - found[0][0]).abs().max() > 1e-6


def test_what_cannot_be_measured_is_said() -> None:
    dead, generator = module("ae"), torch.Generator()
    torch.nn.init.zeros_(dead.network.encoder.conv_out.weight)
    with pytest.raises(ValueError, match="channel 0 of the latents never changes"):
        dead.measure([pictures(4)], 4, generator)
    with pytest.raises(ValueError, match="statistics of 9 pictures need 5 more than there are"):
        module().measure([pictures(4)], 9, generator)


@pytest.mark.parametrize("kind", ["vmae", "dae", "sdvae"])
def test_resume_at_an_epoch_border_is_bit_identical(tmp_path: Path, kind: str) -> None:
    whole, _ = fit(tmp_path, 3, module(kind))
    half, trainer = fit(tmp_path, 1, module(kind))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert differing(whole, half)
    assert any("decode" in k for k in differing(half, module(kind)))
    resumed, _ = fit(tmp_path, 3, module(kind), tmp_path / "half.ckpt")
    assert resumed.batches_seen == 3 * BATCHES
    assert not differing(whole, resumed)

    settings, state = torch.load(tmp_path / "half.ckpt", weights_only=True), half.state_dict()
    loaded = AutoencoderModule.from_export(
        settings["state_dict"], settings["hyper_parameters"]["config"]
    )
    assert loaded.discriminator is None
    assert torch.equal(loaded.encode(pictures()), half.eval().encode(pictures()))
    assert any(k.startswith("discriminator.") for k in state) == (kind == "sdvae")


@pytest.mark.parametrize("kind", ["vmae", "dae", "vae"])
def test_each_kind_learns(kind: str) -> None:
    auto, images = module(kind), pictures(4)
    optimizer = torch.optim.AdamW(auto.network.parameters(), 1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(20):
        loss, terms = auto.loss(images, auto(images, auto.draw(images, generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["visible"].detach()))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_terms_are_switched_one_by_one() -> None:
    images = pictures(4)
    off = {"visible_weight": 0.0, "masked_weight": 0.0, "perceptual_weight": 0.0, "kl_weight": 0.0}
    values = {"visible": 1.5, "masked": 0.25, "kl": 0.125}

    def run(**weights: float) -> tuple[Tensor, dict[str, Tensor]]:
        auto = module(objective=off | weights)
        return auto.loss(images, auto(images, auto.draw(images, torch.Generator().manual_seed(1))))

    total = torch.zeros(())
    for name, weight in values.items():
        loss, terms = run(**{f"{name}_weight": weight})
        torch.testing.assert_close(loss, weight * terms[name])
        total = total + loss
    everything, terms = run(**{f"{name}_weight": w for name, w in values.items()})
    torch.testing.assert_close(everything, total)
    assert set(terms) == {"visible", "masked", "kl"}
    assert set(run(visible_weight=1.0)[1]) == {"visible", "masked"}


def test_the_end_of_a_training_shows_the_decoder_whole_images() -> None:
    images = pictures(4)
    auto = module(objective={"tuning_start": 5, "kl_weight": 1.0})
    found = []
    for seen in (4, 5):
        auto.batches_seen = seen
        noise = auto.draw(images, torch.Generator().manual_seed(0))
        found.append((noise, auto(images, noise)))
    (early, masked), (late, whole) = found
    assert early.mask is not None and early.posterior is not None and masked.hidden is not None
    assert late.mask is None and late.posterior is None and whole.hidden is None
    expected = auto.network.decode(auto.moments(images)[:, : auto.channels])
    torch.testing.assert_close(whole.images, expected)
    other = module("vae", objective={"tuning_start": 0})
    assert other.draw(images, torch.Generator().manual_seed(0)).posterior is not None


def test_the_mean_is_free_for_vmae_alone() -> None:
    mean, logvar = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert float(variance_kl(torch.zeros(1))) == 0
    assert float(variance_kl(torch.tensor([2 * -3.0]), 0.049787068)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(normal_kl(mean, logvar) - variance_kl(logvar), mean.square() / 2)
    distribution = torch.distributions.Normal(mean, (logvar / 2).exp())
    unit = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(distribution, unit)
    torch.testing.assert_close(normal_kl(mean, logvar), expected)

    images = pictures()
    for kind, free in (("vmae", True), ("vae", False)):
        auto = module(kind, objective={"kl_weight": 1.0})
        made = auto(images, auto.draw(images, torch.Generator().manual_seed(0)))
        before = auto.loss(images, made)[1]["kl"]
        made.mean = made.mean + 3
        assert torch.equal(before, auto.loss(images, made)[1]["kl"]) == free


def test_a_frozen_encoder_keeps_its_latents(tmp_path: Path) -> None:
    for kind in ("vmae", "vae"):
        frozen, _ = fit(tmp_path, 1, module(kind, objective={"freeze_encoder": True}))
        fresh = module(kind)
        assert torch.equal(frozen.moments(pictures()), fresh.moments(pictures()))
        assert any("decode" in k for k in differing(frozen, fresh))


def test_the_second_stage_starts_from_the_first_at_another_size(tmp_path: Path) -> None:
    first = module()
    first.measure([pictures(3)], 3, torch.Generator().manual_seed(0))
    save_weights(tmp_path / "first.safetensors", *first.export())
    objective = {"mask_ratio": 0.0, "masked_weight": 0.0, "kl_weight": 0.0, "sample": False}
    start = str(tmp_path / "first.safetensors")
    second = module(vit={"image_size": 32}, objective=objective, start=start)
    second.setup("fit")
    images = pictures(2, 32)
    torch.testing.assert_close(second.encode(images), first.encode(images))
    assert second.network.pos_embed.shape == (1, 64, 8)

    noise = second.draw(images, torch.Generator().manual_seed(0))
    assert noise.mask is None and noise.posterior is None
    made = second(images, noise)
    torch.testing.assert_close(made.images.clamp(-1, 1), second.decode(second.encode(images)))
    loss, terms = second.loss(images, made)
    torch.testing.assert_close(loss, (made.images - images).square().mean())
    assert float(terms["masked"]) == 0

    with pytest.raises(ValueError, match="holds weights of vmae, not of vae"):
        module("vae", start=start).setup("fit")
    with pytest.raises(ValueError, match="of wrong shape"):
        module(vit={"embed_dim": 16}, start=start).setup("fit")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_vmae_draws_latents_of_all_that_it_sees(ratio: float) -> None:
    vmae, images = module(objective={"mask_ratio": ratio}), pictures()
    noise = vmae.draw(images, torch.Generator().manual_seed(0))
    assert noise.posterior is not None and (noise.mask is None) == (ratio == 0)
    made = vmae(images, noise)
    assert made.mean.shape == noise.posterior.shape
    vmae.loss(images, made)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vmae.parameters())


def test_noise_reaches_the_input_of_dae_alone(tmp_path: Path) -> None:
    images = pictures()
    for kind in ("ae", "dae"):
        auto = module(kind).eval()
        noise = auto.draw(images, torch.Generator().manual_seed(0))
        noisy = images + 0.25 * torch.randn(
            images.shape, generator=torch.Generator().manual_seed(0)
        )
        expected = auto.network.moments(noisy if kind == "dae" else images)
        torch.testing.assert_close(auto(images, noise).mean, expected)


def test_lpips_comes_from_a_file_and_stays_out_of_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    state = LPIPS((2, 2, 2, 2, 2)).state_dict()
    state = {k: v.abs() if k.startswith("lin") else v for k, v in state.items()}
    torch.save(state, tmp_path / "lpips.pth")
    path = {"lpips_path": str(tmp_path / "lpips.pth")}
    for kind in ("vmae", "sdvae"):
        trained, trainer = fit(tmp_path, 1, module(kind, objective=path))
        assert float(trainer.callback_metrics["val/perceptual"]) > 0
        assert not [k for k in trained.state_dict() if "slice" in k or "lin0" in k]
    _, trainer = fit(tmp_path, 1, module("ae", objective=path))
    assert "val/perceptual" not in trainer.callback_metrics
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, trainer = fit(tmp_path, 1, module())
    assert len([r for r in caplog.records if "perceptual term is off" in r.message]) == 1
    names = {"train/loss", "train/visible", "train/masked", "train/kl", "val/psnr", "val/loss"}
    assert names <= trainer.callback_metrics.keys()


def test_the_discriminator_is_sdvaes_and_waits(tmp_path: Path) -> None:
    assert module("vae").discriminator is None
    before, _ = fit(tmp_path, 1, module("sdvae", objective={"disc_start": BATCHES}))
    moved = differing(before, module("sdvae"))
    assert not [k for k in moved if k.startswith("discriminator.")]
    after, trainer = fit(tmp_path, 1, module("sdvae"))
    assert [k for k in differing(after, module("sdvae")) if k.startswith("discriminator.")]
    assert {"train/g_loss", "train/disc_loss", "train/d_weight"} <= trainer.callback_metrics.keys()


def test_presets_are_the_scripts_values() -> None:
    paper, released = AUTOENCODER_OBJECTIVES["paper"], AUTOENCODER_OBJECTIVES["released"]
    assert (paper.mask_ratio, paper.fixed_std) == (0.6, None)
    assert (released.mask_ratio, released.fixed_std) == (0.25, 1e-3)
    # divided by the weight of L_R, the script's weights are those of the paper's normalisation
    for name in ("masked_weight", "perceptual_weight"):
        share = getattr(released, name) / released.visible_weight
        assert share == getattr(paper, name) / paper.visible_weight
    assert released.kl_weight == pytest.approx(2e-6 * released.visible_weight)
    assert AutoencoderModule({}).config.kl_weight == 2e-6
    stage = AUTOENCODER_OPTIM["released"]
    assert stage.warmup_batches * 40 == stage.decay_batches and not stage.decay_all


def test_biases_and_norms_are_not_decayed_where_asked() -> None:
    optim = {"weight_decay": 0.05, "decay_all": False}
    (optimizer,) = module(optim=optim).configure_optimizers()
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in rest["params"])
    trained = [p for p in module().network.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(rest["params"]) == len(trained)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4, got 16 x 18"):
        module().moments(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="objectiv"):
        AutoencoderModule({"objectiv": {}})
    with pytest.raises(ValueError, match="fixed_std must be positive or null"):
        module(objective={"fixed_std": 0.0})
    with pytest.raises(ValueError, match="does not fit"):
        AutoencoderModule.from_export({}, config())
