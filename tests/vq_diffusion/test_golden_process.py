"""VQ-Diffusion's mathematics and loss against numbers of the released code, all from the case."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.samplers.kernel import Kernel, posterior
from lightning_modules.vq_diffusion import process
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.convert import convert
from lightning_modules.vq_diffusion.network import Denoiser
from lightning_modules.vq_diffusion.process import Schedule, TokenLosses
from tests.vq_diffusion.forward import forward_law

pytestmark = pytest.mark.golden
MATHS = ["maths_T100", "maths_small_T", "maths_mask_and_replace"]


def schedule_of(config: dict[str, Any]) -> Schedule:
    limits = config.get("alpha_schedule")
    if limits is None:  # what the released code has in it
        return process.mask_schedule(config["diffusion_step"], config["num_embed"], 0.99999)
    return process.linear_schedule(
        config["diffusion_step"],
        config["num_embed"],
        keep=(limits["att_1"], limits["att_T"]),
        mask=(limits["ctt_1"], limits["ctt_T"]),
    )


def limits(case, words: str) -> dict[str, Any]:
    """The tolerance whose name holds the given words."""
    (found,) = [v for k, v in case.tolerance.items() if words in k]
    return {"rtol": 0.0, "atol": 0.0, **{k: v for k, v in found.items() if k != "only_where"}}


def check_law(case, law: Tensor, name: str) -> None:
    """A law [B, N, K + 1] (K: without mask) against log probabilities [B, K + 1, N]."""
    expected = case.io[name].transpose(1, 2)[..., : law.shape[-1]]
    law = law.to(expected)
    torch.testing.assert_close(law, expected.exp(), **limits(case, "probabilities (exp"))
    shown = expected > -25
    log = law.clamp_min(1e-30).log()
    torch.testing.assert_close(log[shown], expected[shown], **limits(case, "log_probabilities"))
    assert (log[~shown] < -20).all()


def close(case, actual: Tensor, name: str) -> None:
    expected = case.io[name]
    torch.testing.assert_close(actual.to(expected), expected, **limits(case, "losses"))


def kernel_at(schedule: Schedule, t: Tensor) -> Kernel:
    """One-step kernels of times [B], to broadcast over positions."""
    return schedule.kernel(t).map(lambda v: v[:, None])


def gumbel(uniforms: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniforms + 1e-30) + 1e-30)


@pytest.mark.parametrize("name", MATHS)
def test_schedule(golden, name):
    case = golden(f"vq_diffusion/{name}")
    schedule, io = schedule_of(case.config), case.io
    steps = case.config["diffusion_step"]
    assert schedule.steps == steps
    kernel = schedule.kernel(torch.arange(steps))
    found = {
        "at": kernel.a,
        "bt": kernel.b,
        "ct": kernel.c,
        "cumprod_at": schedule.keep,
        "cumprod_bt": schedule.replace,
        "cumprod_ct": schedule.mask,
    }
    for key, value in found.items():
        torch.testing.assert_close(value, io[key].double(), rtol=1e-6, atol=1e-12, msg=key)
        stored = case.weights[f"log_{key}"].double()
        finite = value > 0  # the identity entry of B and C is -inf in the file
        torch.testing.assert_close(value[finite].log(), stored[finite], rtol=1e-5, atol=1e-5)
    # the same kernel where it is cut in two
    late = torch.arange(1, steps)
    torch.testing.assert_close(schedule.kernel(late, -1).a, schedule.keep[1:-1])
    torch.testing.assert_close(schedule.kernel(late, -1).c, schedule.mask[1:-1])


@pytest.mark.parametrize("name", MATHS)
def test_noise(golden, name):
    case = golden(f"vq_diffusion/{name}")
    schedule, io, codes = schedule_of(case.config), case.io, case.config["num_embed"]

    def law(tokens: Tensor, *numbers: Tensor) -> Tensor:
        return forward_law(tokens, *(n[:, None] for n in numbers), codes)

    whole = (schedule.keep, schedule.replace, schedule.mask)
    check_law(case, law(io["x0"], *(n[io["t"]] for n in whole)), "q_xt_given_x0")
    check_law(case, law(io["x0"], *(n[-torch.ones_like(io["t"])] for n in whole)), "q_x0_identity")
    one = schedule.kernel(io["t"])
    onward = law(io["x_t"], one.a, one.b, one.c)
    # of a mask the released function also gives b to every code, and nothing reads that
    masked = (io["x_t"] == codes)[..., None] & (torch.arange(codes + 1) < codes)
    check_law(case, torch.where(masked, one.b[:, None, None], onward), "q_xt_given_xtm1")
    at_x_0 = law(io["x0"], *(n[io["t"]] for n in whole))
    drawn = (at_x_0.log() + gumbel(io["u_q_sample"]).transpose(1, 2)).argmax(-1)
    assert torch.equal(drawn, io["q_sample"])


@pytest.mark.parametrize("name", MATHS)
def test_posterior(golden, name):
    case = golden(f"vq_diffusion/{name}")
    io, codes = case.io, case.config["num_embed"]
    kernel = kernel_at(schedule_of(case.config), io["t"])
    p0 = io["logits"].transpose(1, 2).softmax(-1)  # [B, N, K]
    check_law(case, p0, "log_x0_recon")
    check_law(case, posterior(p0, io["x_t"], kernel), "log_model_prob")
    clean = torch.nn.functional.one_hot(io["x0"], codes).to(p0)
    check_law(case, posterior(clean, io["x_t"], kernel), "log_true_prob")


def losses_of(case) -> TokenLosses:
    io = case.io
    kernel = kernel_at(schedule_of(case.config), io["t"])
    return process.token_losses(io["logits"].transpose(1, 2), io["x0"], io["x_t"], kernel)


@pytest.mark.parametrize("name", MATHS)
def test_terms_of_the_loss(golden, name):
    case = golden(f"vq_diffusion/{name}")
    found = losses_of(case)
    kl = case.io["kl_per_position"]
    # a KL is a difference of logarithms, which are given to that precision
    atol = limits(case, "log_probabilities")["atol"]
    torch.testing.assert_close(found.kl, kl, **{**limits(case, "losses"), "atol": atol})
    close(case, found.nll.sum(1), "decoder_nll")
    close(case, found.cross_entropy, "kl_aux_per_position")


@pytest.mark.parametrize("name", MATHS)
def test_training_loss_and_statistics(golden, name):
    case = golden(f"vq_diffusion/{name}")
    io, steps = case.io, case.config["diffusion_step"]
    terms = losses_of(case)
    masked = io["x_t"] == case.config["num_embed"]
    assert case.config["loss_variants"]
    for variant, settings in case.config["loss_variants"].items():
        history, count = torch.zeros(steps), torch.zeros(steps)
        if settings["pt"] != "uniform":
            history, count = io["imp_Lt_history_in"].clone(), torch.full((steps,), 11.0)
            close(case, process.time_law(history, count), "imp_pt_all")
            almost = torch.cat([count[:1] - 1, count[1:]])
            assert (process.time_law(history, almost) == 1 / steps).all()
        law = process.time_law(history, count)
        close(case, law[io["t"]], f"{variant}_pt")
        losses, bounds = process.image_losses(
            terms,
            masked,
            io["t"],
            law[io["t"]],
            steps,
            auxiliary_weight=settings["auxiliary_loss_weight"],
            adaptive=settings["adaptive_auxiliary_loss"],
            mask_weight=settings["mask_weight"],
        )
        close(case, losses, f"{variant}_vb_loss")
        close(case, losses.sum() / masked.numel(), f"{variant}_loss")
        if len(set(io["t"].tolist())) == len(io["t"]):
            process.update_history(history, count, io["t"], bounds)
            close(case, history, f"{variant}_Lt_history")
            close(case, count, f"{variant}_Lt_count")


def test_loss_and_gradients_of_the_full_model(golden):
    case = golden("vq_diffusion/full_model")
    io, config = case.io, case.config
    params = config["transformer_config"]["params"]
    official = convert(case.weights, params)
    network = Denoiser(build(ModelConfig, official.model))
    load_strict(network, official.network, case.name)
    null = official.null.requires_grad_()
    codes, steps = network.config.num_codes, network.config.diffusion_steps
    schedule = process.mask_schedule(steps, codes, official.mask_rate)
    law = forward_law(
        io["x0"],
        *(n[io["t"]][:, None] for n in (schedule.keep, schedule.replace, schedule.mask)),
        codes,
    )
    drawn = (law.log() + gumbel(io["u_q_sample"]).transpose(1, 2)).argmax(-1)
    assert torch.equal(drawn, io["x_t"])

    empty = ~io["condition_mask"].bool()[:, 2]
    text = torch.where(empty[:, None, None], null, io["clip_text_features"])
    x_t = drawn.unflatten(1, tuple(params["content_spatial_size"]))
    rows = network.mixed_rows(x_t, io["t"], [network.prepare(text)], [1.0])
    logits = network.head(rows).unflatten(0, drawn.shape)  # [B, N, K]
    kernel = kernel_at(schedule, io["t"])
    check_law(case, posterior(logits.softmax(-1), drawn, kernel), "log_model_prob")
    losses, _ = process.image_losses(
        process.token_losses(logits, io["x0"], drawn, kernel),
        drawn == codes,
        io["t"],
        torch.full((len(drawn),), 1 / steps),
        steps,
        auxiliary_weight=config["auxiliary_loss_weight"],
        adaptive=config["adaptive_auxiliary_loss"],
        mask_weight=config["mask_weight"],
    )
    loss = losses.sum() / drawn.numel()
    close(case, losses, "vb_loss")
    close(case, loss, "loss")
    loss.backward()
    gradients = {f"transformer.{k}": p.grad for k, p in network.named_parameters()}
    gradients["empty_text_embed"] = null.grad
    named = {k.removeprefix("grad/"): v for k, v in io.items() if k.startswith("grad/")}
    assert named
    for key, expected in named.items():
        torch.testing.assert_close(gradients[key].to(expected), expected, **limits(case, "grads"))
    for key, norm in config["grad_norms"].items():
        found = gradients[key].norm()
        torch.testing.assert_close(found, torch.tensor(norm).to(found), **limits(case, "grads"))
