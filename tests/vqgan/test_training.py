"""VQGANModule under a Trainer: budget, delayed discriminator, save, reload, resume."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_modules.common.perceptual import LPIPS
from lightning_modules.vqgan.module import VQGANModule

BATCHES = 3


def config(**sections: dict[str, Any]) -> dict[str, Any]:
    """A model of a few thousand parameters; keyword arguments extend its sections."""
    base: dict[str, Any] = {
        "model": {
            "ch": 8,
            "ch_mult": [1, 2],
            "norm_groups": 4,
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "z_channels": 4,
            "embed_dim": 4,
            "num_codes": 16,
            "dropout": 0.1,
        },
        "objective": {"disc_start": 2, "disc_layers": 1, "disc_width": 4},
        "optim": {"lr": 1e-3, "clip": 1.0, "warmup_batches": 2},
        "seed": 5,
    }
    return {
        k: base[k] | sections.get(k, {}) if isinstance(base[k], dict) else base[k] for k in base
    }


class Images(torch.utils.data.Dataset):
    """A few fixed random pictures as the DataModule gives them."""

    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        return {"image": image, "caption": "noise", "key": f"{i:05d}"}


def trainer(folder: Path, epochs: int) -> L.Trainer:
    return L.Trainer(
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


def fit(
    folder: Path, epochs: int, module: VQGANModule, ckpt: Path | None = None
) -> tuple[VQGANModule, L.Trainer]:
    loader = torch.utils.data.DataLoader(Images(), batch_size=2)
    t = trainer(folder, epochs)
    t.fit(module, loader, loader, ckpt_path=ckpt, weights_only=True)
    return module, t


def module(**sections: dict[str, Any]) -> VQGANModule:
    torch.manual_seed(0)
    return VQGANModule(config(**sections))


def differing(a: VQGANModule, b: VQGANModule) -> list[str]:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return [k for k in left if not torch.equal(left[k], right[k])]


@pytest.mark.parametrize(
    "model",
    [
        {"restart_after": 2},
        {"quantizer": "ema", "restart_after": 2},
        {"quantizer": "gumbel", "temperature_end": 0.1, "temperature_batches": 8},
        {"quantizer": "l2", "entropy_weight": 0.1, "restart_after": 1},
        {"network": "paella", "levels": 2, "c_hidden": 16, "bottleneck_blocks": 1},
    ],
    ids=["nearest", "ema", "gumbel", "l2", "paella"],
)
def test_resume_at_an_epoch_border_is_bit_identical(tmp_path: Path, model: dict) -> None:
    whole, _ = fit(tmp_path, 3, module(model=model))
    half, t = fit(tmp_path, 1, module(model=model))
    t.save_checkpoint(tmp_path / "half.ckpt")
    assert differing(whole, half)

    resumed, _ = fit(tmp_path, 3, module(model=model), tmp_path / "half.ckpt")
    assert resumed.batches_seen == 3 * BATCHES
    assert not differing(whole, resumed)


def test_the_checkpoint_loads_safely_and_exports_the_same_tokenizer(tmp_path: Path) -> None:
    trained, t = fit(tmp_path, 1, module(model={"quantizer": "ema"}))
    t.save_checkpoint(tmp_path / "last.ckpt")
    assert not torch.equal(trained.autoencoder.quantize.cluster_size, torch.ones(16))
    trained.eval()
    images = Images()[0]["image"][None]

    reloaded = VQGANModule.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert reloaded.batches_seen == BATCHES
    assert not differing(trained, reloaded)

    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state, settings in (
        trained.export(),
        (content["state_dict"], content["hyper_parameters"]["config"]),
    ):
        tokenizer = VQGANModule.from_export(state, settings)
        assert tokenizer.discriminator is None
        tokens = tokenizer.encode(images)
        assert torch.equal(tokens, trained.encode(images))
        assert torch.equal(tokenizer.decode(tokens), trained.decode(tokens))


def test_the_discriminator_waits_for_its_batch(tmp_path: Path) -> None:
    before, _ = fit(tmp_path, 1, module(objective={"disc_start": BATCHES}))
    fresh = module(objective={"disc_start": BATCHES})
    same = [k for k in differing(before, fresh) if k.startswith("discriminator.")]
    assert not same  # neither weights nor BatchNorm statistics have moved

    after, _ = fit(tmp_path, 1, module(objective={"disc_start": BATCHES - 1}))
    assert any(k.startswith("discriminator.") for k in differing(after, fresh))


@pytest.mark.parametrize("off", ["disc_weight", "disc_factor"])
def test_without_weight_there_is_no_discriminator(tmp_path: Path, off: str) -> None:
    trained, t = fit(tmp_path, 1, module(objective={off: 0.0}))
    assert trained.discriminator is None
    assert not [k for k in trained.state_dict() if "discriminator" in k]
    assert t.global_step == BATCHES


def test_schedules_follow_batches_and_not_optimizer_steps(tmp_path: Path) -> None:
    optim = {"warmup_batches": 2, "decay_batches": 6, "lr": 0.1, "disc_lr": 0.01, "lr_end": 0.5}
    trained, t = fit(tmp_path, 1, module(optim=optim, objective={"disc_start": 0}))
    assert t.global_step == 2 * BATCHES  # Lightning's count, which nothing here may use
    seen = []
    optimizers = trained.optimizer_list()
    for trained.batches_seen in (0, 1, 2, 4, 6, 100):
        trained.set_rates(optimizers)
        seen.append([p.param_groups[0]["lr"] for p in optimizers])
    rates = torch.tensor(seen)
    torch.testing.assert_close(rates[:, 0], torch.tensor([0.05, 0.1, 0.1, 0.075, 0.05, 0.05]))
    torch.testing.assert_close(rates[:, 1], rates[:, 0] / 10)


def test_the_loss_weighs_pixels_codes_and_the_discriminator(tmp_path: Path) -> None:
    objective = {"pixel_weight": 4.0, "codebook_weight": 0.5, "disc_start": 0, "disc_factor": 2.0}
    _, t = fit(tmp_path, 1, module(objective=objective))
    m = {k: float(v) for k, v in t.callback_metrics.items()}
    for stage, term in (("val", 0.0), ("train", 2 * m["train/d_weight"] * m["train/g_loss"])):
        expected = 4 * m[f"{stage}/rec"] + 0.5 * m[f"{stage}/codebook"] + term
        assert m[f"{stage}/loss"] == pytest.approx(expected, rel=1e-5)
    assert m["train/d_weight"] > 0 and m["train/disc_loss"] > 0


def test_lpips_trains_and_never_enters_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lpips = LPIPS((2, 2, 2, 2, 2))
    state = {k: v.abs() if k.startswith("lin") else v for k, v in lpips.state_dict().items()}
    torch.save(state, tmp_path / "lpips.pth")
    objective = {"lpips_path": str(tmp_path / "lpips.pth")}

    trained, t = fit(tmp_path, 1, module(objective=objective))
    assert float(t.callback_metrics["val/perceptual"]) > 0
    t.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [k for k in content["state_dict"] if "lpips" in k or "slice" in k or "lin0" in k]
    for stored in content["optimizer_states"]:
        assert len(stored["state"]) in (
            len(list(trained.autoencoder.parameters())),
            len(list(trained.discriminator.parameters())),
        )

    without, _ = fit(tmp_path, 1, module())
    assert differing(trained, without)  # the term does reach the weights
    (tmp_path / "lpips.pth").unlink()
    VQGANModule.load_from_checkpoint(tmp_path / "last.ckpt")  # needs no LPIPS file


def test_without_a_file_the_run_says_that_the_perceptual_term_is_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, t = fit(tmp_path, 1, module())
    said = [r for r in caplog.records if "perceptual term is off" in r.message]
    assert len(said) == 1
    assert "val/perceptual" not in t.callback_metrics


def test_logged_names(tmp_path: Path) -> None:
    _, t = fit(tmp_path, 1, module(objective={"disc_start": 0}))
    names = {"train/loss", "train/rec", "train/usage", "train/disc_loss", "val/rec", "val/psnr"}
    assert names | {"val/usage", "val/perplexity"} <= t.callback_metrics.keys()
    values: list[Tensor] = list(t.callback_metrics.values())
    assert all(torch.isfinite(v) for v in values)


def test_bf16_autocast_keeps_losses_and_distances_in_float32(tmp_path: Path) -> None:
    m = module(model={"quantizer": "l2"}).train()
    images = torch.stack([Images()[i]["image"] for i in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        reconstructions, quantized, z = m(images)
    assert z.dtype == torch.bfloat16 and quantized.codes.dtype == torch.bfloat16
    assert quantized.loss.dtype == torch.float32
    assert torch.equal(quantized.tokens, m.autoencoder.quantize.assign(z.float()))
    assert reconstructions.shape == images.shape


def test_an_image_that_does_not_fit_the_grid_is_named() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2, got 16 x 15"):
        module().encode(torch.zeros(1, 3, 16, 15))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="widht"):
        VQGANModule({"model": {"widht": 3}})
    with pytest.raises(ValueError, match="norm_groups"):
        VQGANModule({"model": {"ch": 20}})
