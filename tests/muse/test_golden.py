"""Masking, loss and decoding against numbers of the reference code; all is read from the case."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.muse import process
from lightning_modules.muse.config import DecodeConfig
from lightning_modules.samplers import ordered

pytestmark = pytest.mark.golden


def named(theirs: str) -> str:
    """Our name of a MaskGIT schedule, which is its own but for one."""
    return "linear" if theirs == "uniform" else theirs


def gumbel_draw(rows, noise, head, *, temperature, logits_filter):
    """The references' draw: argmax(log softmax(logits) + noise), noise [n, K]."""
    logits = head(rows)
    logits = logits if logits_filter is None else logits_filter(logits)
    return ((logits / temperature).log_softmax(1) + noise).argmax(1)


def no_draw(*args, **options):
    raise AssertionError("nothing is to be drawn")


class Script:
    """A network that answers step s with logits[s], [T, B, h, w, K]."""

    def __init__(self, logits: Tensor):
        self.logits, self.inputs = iter(logits), []

    def predict(self, x, weight, keep):
        self.inputs.append(x)
        return next(self.logits)[keep]


def counts(n: int, steps: int, schedule: str, counting: str) -> Tensor:
    return process.mask_counts(torch.tensor([n]), steps, schedule, counting)[:, 0]  # type: ignore[arg-type]


def test_counts_of_every_reference(golden):
    io = golden("muse/mask_schedule").io
    orders = 0
    for key, expected in io.items():
        if found := re.fullmatch(r"halton_order_(\d+)", key):
            side = int(found[1])
            assert torch.equal(ordered.halton_order(side, side), expected), key
            orders += 1
            continue
        name, n, steps = re.fullmatch(r"(\S+)_N(\d+)_T(\d+)", key).groups()
        n, steps = int(n), int(steps)
        if name == "halton_arccos":
            actual = n - counts(n, steps, "arccos", "halton")
        elif name == "halton_conf_arccos":  # the case leaves out that each step opens a token
            actual = n - counts(n, steps, "arccos", "halton_confidence")
            expected = torch.maximum(expected, torch.arange(steps) + 1)
        elif name == "lucidrains":  # counted in front of each step
            after = counts(n, steps, "cosine", "lucidrains")
            actual = torch.cat([torch.tensor([n]), after[:-1]])
        else:
            actual = counts(n, steps, named(name.split("_")[-1]), "maskgit")
        assert actual.tolist() == expected.tolist(), key
    assert orders and len(io) > orders


def test_masking_and_losses(golden):
    case = golden("muse/masked_loss")
    io, config = case.io, case.config
    total, smoothing = io["image_tokens"].shape[1], config["label_smoothing"]

    def close(actual: Tensor, name: str, limit: float = case.tolerance["loss_abs"]) -> None:
        torch.testing.assert_close(actual, io[name].view(actual.shape), atol=limit, rtol=0)

    rates = process.masked_rate(
        io["u_time"], config["mask_schedule"], total, config["min_masking_rate"]
    )
    close(rates, "mask_prob", 1e-6)
    number = process.masked_number(rates, total)
    assert torch.equal(number, io["n_masked"])
    mask = process.scattered_mask(number, io["u_perm"][:, None])[:, 0]
    assert torch.equal(mask, io["mask"])
    tokens = io["image_tokens"].masked_fill(mask, config["mask_id"])
    assert torch.equal(tokens, io["input_ids"])
    other = process.masked_rate(io["u_time"], "arccos", total)
    close(other, "mask_prob_arccos", 1e-6)
    assert torch.equal(process.masked_number(other, total), io["n_masked_arccos"])

    logits = io["logits"].clone().requires_grad_()

    def ce(label_smoothing: float) -> Tensor:
        flat = F.cross_entropy(
            logits.flatten(0, 1),
            io["image_tokens"].flatten(),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return flat.view(mask.shape)

    only = process.loss_weight(mask, rates)
    every = process.loss_weight(mask, rates, visible=0.3, rises=True)
    close(every, "loss_weight", 1e-6)
    close(process.masked_loss(ce(0.0), only), "loss_open_muse")
    close(process.masked_loss(ce(0.0), only), "loss_lucidrains")
    close(process.masked_loss(ce(0.0), only, "samples"), "loss_maskgit")
    close(process.masked_loss(ce(smoothing), only, "samples"), "loss_maskgit_smoothed")
    close(process.masked_loss(ce(smoothing), every), "loss_predict_all_weighted")
    loss = process.masked_loss(ce(smoothing), only)
    close(loss, "loss_open_muse_smoothed")
    loss.backward()
    close(logits.grad, "grad_logits_open_muse_smoothed", case.tolerance["grad_abs"])


@pytest.mark.parametrize("name", ["maskgit_decode", "maskgit_decode_edit"])
def test_maskgit(golden, name):
    case = golden(f"muse/{name}")
    io, config = case.io, case.config
    first, steps, codes = config["start_iter"], config["num_iter"], io["logits"].shape[-1]
    # the mask is one id more than the codes
    start = torch.where(io["x_init"] == config["mask_token_id"], codes, io["x_init"])[:, None]
    settings = process.loop_settings(
        DecodeConfig(
            steps=steps,
            first_step=first,
            counting="maskgit",
            guidance_end=1.0,
            schedule=named(config["mask_scheduling_method"]),
            choice_temperature=config["choice_temperature"],
        ),
        (start == codes).flatten(1).sum(1),
    )
    script = Script(io["logits"][first:, :, None])
    sampled, scores, after = [], [], []

    def on_scores(i, tokens, score):
        sampled.append(tokens[:, 0])
        scores.append(score[:, 0])

    answer = process.decode(
        script.predict,
        lambda rows: rows,
        start=start,
        mask_id=codes,
        draw=gumbel_draw,
        draws=io["g_token"][first:, :, None],
        choice_noise=io["g_conf"][first:, :, None],
        on_scores=on_scores,
        on_step=lambda i, before, now: after.append(now[:, 0]),
        **settings,
    )
    seen = torch.stack(script.inputs)[:, :, 0]
    assert torch.equal(
        torch.where(seen == codes, config["mask_token_id"], seen), io["model_inputs"]
    )
    assert torch.equal((torch.stack(after) == codes).sum(-1)[:-1], io["mask_len"][:-1])
    assert torch.equal(torch.stack(sampled, 1), io["final_seqs"][:, first:])
    assert torch.equal(answer[:, 0], io["final_seqs"][:, -1])
    torch.testing.assert_close(
        torch.stack(scores), io["confidence"], atol=case.tolerance["confidence_abs"], rtol=0
    )


@pytest.mark.parametrize("name", ["amused_scheduler_cosine", "amused_scheduler_inpaint_linear"])
def test_amused_scheduler(golden, name):
    case = golden(f"muse/{name}")
    io, config = case.io, case.config
    mask_id, steps, start = config["mask_token_id"], config["num_inference_steps"], io["x_init"]
    heat = config["temperature"]
    heat = heat if isinstance(heat, list) else [heat, 0.01]
    settings = process.loop_settings(
        DecodeConfig(
            steps=steps,
            counting="maskgit",
            choice_law="linspace",
            choice_temperature=heat[0],
            choice_end=heat[1],
            guidance_end=1.0,
            schedule=named(config["masking_schedule"]),
        ),
        (start == mask_id).flatten(1).sum(1),
    )
    torch.testing.assert_close(
        torch.tensor(settings["choice_temperature"]),
        io["temperatures"],
        atol=case.tolerance["temperatures_abs"],
        rtol=0,
    )
    settings["counts"] = process.mask_counts(
        (start == mask_id).flatten(1).sum(1),
        steps,
        named(config["masking_schedule"]),
        "maskgit",
        total=start[0].numel(),
        share=config["starting_mask_ratio"],
    )
    assert torch.equal(settings["counts"][:-1], io["mask_len"].long())
    assert torch.equal(settings["counts"], io["n_masked_after"])

    script = Script(io["logits"].permute(0, 1, 3, 4, 2))
    sampled, scores, after = [], [], []

    def on_scores(i, tokens, score):
        sampled.append(tokens)
        scores.append(score)

    answer = process.decode(
        script.predict,
        lambda rows: rows,
        start=start,
        mask_id=mask_id,
        draw=gumbel_draw,
        draws=io["g_token"].view(*io["g_conf"].shape[:2], *start.shape[1:], -1),
        choice_noise=io["g_conf"].view(-1, *start.shape),
        on_scores=on_scores,
        on_step=lambda i, before, now: after.append(now),
        **settings,
    )
    assert torch.equal(torch.stack(after), io["prev_sample"])
    assert torch.equal(torch.stack(sampled), io["pred_original_sample"])
    assert torch.equal(answer, sampled[-1])
    actual = torch.stack(scores[:-1]).flatten(2)
    unknown = actual.isfinite()
    # the reference gives known tokens the largest float as probability, ours are simply never asked
    known = torch.tensor(torch.finfo(torch.float32).max).log()
    expected = known + io["temperatures"][:-1, None, None] * io["g_conf"][:-1]
    actual = torch.where(unknown, actual, expected)
    assert unknown.any() and torch.equal(unknown[0], (start == mask_id).flatten(1))
    torch.testing.assert_close(
        actual, io["confidence"], atol=case.tolerance["confidence_abs"], rtol=0
    )


@pytest.mark.parametrize("name", ["amused_scheduler_cosine", "amused_scheduler_inpaint_linear"])
def test_amused_add_noise(golden, name):
    case = golden(f"muse/{name}")
    io, config = case.io, case.config
    steps = config["num_inference_steps"]
    for i in range(steps):
        r = torch.tensor((i + 1) / steps)
        rate = process.mask_ratio(named(config["masking_schedule"]), r)
        masked = io["u_noise"][i] < rate
        noised = io["clean"].masked_fill(masked, config["mask_token_id"])
        assert torch.equal(noised, io["noised"][i])
