"""VQDiffusionModule: its loss, conditions, and every way to sample."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.interfaces import Geometry
from lightning_modules.common.labels import read_label
from lightning_modules.samplers.kernel import corrupt, posterior
from lightning_modules.vq_diffusion import autoregressive, process
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from tests.tiny_generators import CAPTIONS, GRID, LABELS, K, batch, draw, exact, source, tiny

T = 10
SEEDS = [0, 1, 2, 3]


def make(kind: str = "", random: float = 0.0, **sections: Any) -> VQDiffusionModule:
    """Make a tiny module; keyword arguments extend its sections."""
    return tiny(f"vq_diffusion {kind}".strip(), random, **sections)


# The loss ----


@pytest.mark.parametrize("times", ["uniform", "importance"])
@pytest.mark.parametrize("rate", [0.9, 0.99999])
def test_the_loss_is_the_papers(rate: float, times: str) -> None:
    objective = {"auxiliary_weight": 0.01, "mask_weight": [1.0, 0.5], "times": times}
    module = make(random=0.3, objective=objective, schedule={"mask_rate": rate})
    module.loss_history.copy_(torch.rand(T, generator=source()) * 100)
    module.loss_count.fill_(20)
    given = batch(n=6)
    loss, scalars = module.loss(given, source())
    tokens, rng = given["tokens"], source()
    p_t = torch.full((T,), 1 / T)
    if times == "importance":
        p_t = process.time_law(module.loss_history, module.loss_count)
    t = process.draw_times(p_t, torch.rand(6, generator=rng))
    schedule = process.mask_schedule(T, K, rate)
    uniforms = torch.rand(2, *tokens.shape, generator=rng)
    numbers = (schedule.mask[t].float(), schedule.replaced[t].float())
    x_t = corrupt(tokens, *numbers, K, uniforms)
    text = module.encode_text(given["caption"])
    logits = module.network(x_t, t, text.tokens, text.mask).double()  # [B, N, K]
    kernel = schedule.kernel(t).map(lambda v: v[:, None])
    flat, x_0 = x_t.flatten(1), tokens.flatten(1)
    true = posterior(F.one_hot(x_0, K).double(), flat, kernel)
    model = posterior(logits.softmax(-1), flat, kernel)
    kl = (torch.xlogy(true, true) - true * model.clamp_min(1e-30).log()).sum(-1)
    nll = -model.gather(-1, x_0[..., None]).squeeze(-1).log()
    ce = F.cross_entropy(logits.flatten(0, 1), x_0.flatten(), reduction="none").view(x_0.shape)
    weight = torch.where(flat == K, 1.0, 0.5)
    bound = torch.where(t == 0, nll.sum(1), (weight * kl).sum(1))
    aux = torch.where(t == 0, nll.sum(1), (weight * ce).sum(1))
    expected = ((bound + (2 - t / T) * 0.01 * aux) / p_t[t]).sum() / tokens.numel()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    masked = flat == K
    right = (logits.argmax(-1) == x_0)[masked].float().mean()
    torch.testing.assert_close(scalars["accuracy"], right)
    torch.testing.assert_close(
        scalars["bound"], (bound / p_t[t]).mean().float() / 16, rtol=1e-4, atol=1e-5
    )


def test_the_causal_loss_is_next_token_cross_entropy() -> None:
    module, given = make("causal", 0.3), batch()
    loss, scalars = module.loss(given, source())
    text = module.encode_text(given["caption"])
    tokens = given["tokens"].flatten(1)
    t = torch.zeros(4, dtype=torch.int64)
    ce = []
    for i in range(tokens.shape[1]):  # what comes later cannot matter
        seen = tokens.clone()
        seen[:, i:] = 0
        logits = module.network(seen.view(-1, *GRID), t, text.tokens, text.mask)[:, i]
        ce.append(F.cross_entropy(logits, tokens[:, i]))
    torch.testing.assert_close(loss, torch.stack(ce).mean())
    assert 0 <= scalars["accuracy"] <= 1


def test_statistics_of_t_grow_in_training_alone() -> None:
    module = make()
    module.loss(batch(), source())
    assert module.loss_count.sum() == 0
    module.train()
    for i in range(3):
        module.loss(batch(), source(i))
    assert module.loss_count.sum() == 12 and (module.loss_history > 0).any()
    seen = module.loss_count > 0
    assert torch.equal(module.loss_history > 0, seen)


@pytest.mark.parametrize(("kind", "rate"), [("", 0.99999), ("class", 0.9), ("causal", 1.0)])
def test_overfits_one_batch_and_draws_it(kind: str, rate: float) -> None:
    """A few conditions, a few grids: the loss falls, and each condition gives its grid back."""
    module = make(kind, model={"n_embd": 32, "n_head": 4}, schedule={"mask_rate": rate}).train()
    generator = torch.Generator().manual_seed(0)
    given = {
        "tokens": torch.randint(K, (4, *GRID), generator=generator),
        "caption": CAPTIONS,
        "label": torch.tensor([1, 4, 0, 2]),
    }
    optimizer = torch.optim.AdamW(module.parameters())
    losses = []
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 300)  # at the end no spike of the loss
        loss, scalars = module.loss(given, source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(scalars["accuracy"].item())
    assert sum(losses[:5]) / 5 < 0.3 and sum(losses[-20:]) / 20 > 0.9
    prompts = LABELS if kind == "class" else CAPTIONS
    drawn = draw(module.eval(), prompts, SEEDS, changes={"steps": 5})
    assert (drawn == given["tokens"]).float().mean() > 0.9


# Conditions ----


def test_labels_come_from_prompts_or_arguments() -> None:
    names = ["zero", "one", "two", "three", "light house"]
    module = make("class", random=0.3, classes=names)
    assert module.labelled and not make().labelled
    by_name = draw(module, ["a handwritten two", "The Light-house."], [0, 1])
    by_number = draw(module, ["2", "4"], [0, 1])
    by_label = draw(module, ["?", "?"], [0, 1], labels=[2, 4])
    assert torch.equal(by_name, by_number) and torch.equal(by_label, by_number)
    with pytest.raises(ValueError, match=r"^labels need model\.condition=class, not text$"):
        draw(make(), ["x"], [0], labels=[2])
    for wrong in ("5", "", "one or two", "house"):
        with pytest.raises(ValueError, match="must ask for one class: a number from 0 to 4"):
            module.check_prompts([wrong])
    module.check_prompts(["3"])
    assert read_label("7", [], 10) == 7 and read_label("a sea lion", ["lion", "sea lion"], 2) == 1
    with pytest.raises(ValueError, match="data with labels, such as data=digits"):
        module.loss({k: v for k, v in batch().items() if k != "label"}, source())
    with pytest.raises(ValueError, match="leaves labels 0 to 4, but the data hold 0 to 7"):
        module.loss({**batch(), "label": torch.tensor([0, 7, 1, 1])}, source())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"num_codes": 13}},
            r"model\.num_codes must be the tokenizer's 12 codes, got 13",
        ),
        ({"text": {"width": 8}}, r"model\.condition_dim must be text\.width \(8\) .* got 16"),
        ({"grid": [4, 5]}, r"model\.spatial_size must have places for 4x5 tokens, got \[4, 4\]"),
    ],
)
def test_sections_that_do_not_fit(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(**sections)
    with pytest.raises(ValueError, match=r"^classes must name all 5 classes or none, got 1 names$"):
        make("class", classes=["zero"])
    make().config.check_fit(Geometry(GRID))  # of a first stage whose codes are not known yet


# Sampling ----


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_the_network_is_told_the_time(rule: str) -> None:
    module = make(random=0.3)
    told: list[int] = []
    mixed_rows = module.network.mixed_rows

    def record(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        told.append(int(t))
        return mixed_rows(x, t, *rest)

    module.network.mixed_rows = record  # type: ignore[method-assign]
    draw(module, CAPTIONS, SEEDS, changes={"steps": 4, "rule": rule})
    assert told == ([9, 7, 4, 2] if rule == "exact" else [9, 6, 3, 0])


@pytest.mark.parametrize("rate", [0.5, 0.99999])
def test_a_variation_starts_from_the_picture_noised(rate: float) -> None:
    module = make(random=0.3, schedule={"mask_rate": rate}, model={"spatial_size": [32, 32]})
    start = torch.randint(K, (2, 32, 32), generator=source())
    schedule, shares = process.mask_schedule(T, K, rate), []
    for first in (1, 3, 4):
        inputs: list[Tensor] = []
        draw(
            module,
            CAPTIONS[:2],
            [0, 1],
            lambda i, x, out, inputs=inputs: inputs.append(x),
            {"steps": 5, "first_step": first},
            start=start,
        )
        assert len(inputs) == 5 - first
        t = process.exact_steps(schedule, 5)[first].t
        expected = float(schedule.keep[t] + schedule.replace[t])
        shares.append((inputs[0] == start).float().mean().item())
        assert shares[-1] == pytest.approx(expected, abs=0.05)
    assert shares == sorted(shares)
    with pytest.raises(ValueError, match=r"VQ-AR .* makes no variations"):
        draw(make("causal"), CAPTIONS, SEEDS, None, {"first_step": 1}, start=batch()["tokens"])


def test_writing_equals_reading_it_all_again() -> None:
    """VQ-AR with remembered keys and values draws what whole forward passes draw."""
    for mlp in ("fc", "conv_mlp"):
        module = exact(make("causal", random=0.3, model={"mlp_type": mlp}))
        cached = draw(module, CAPTIONS, SEEDS, changes={"truncation": 0.8})
        text = module.encode_text(CAPTIONS)
        draws = process.sample_noise(SEEDS, 1, GRID)["draws"][0]
        t = torch.zeros(4, dtype=torch.int64)
        x = torch.zeros(4, 16, dtype=torch.int64)
        for i in range(16):
            logits = module.network(x.view(-1, *GRID), t, text.tokens, text.mask)[:, i]
            x[:, i] = draw_rows(
                logits, draws.flatten(1)[:, i], lambda rows: process.truncate(rows, 0.8)
            )
        assert torch.equal(cached.flatten(1), x)


def test_written_tokens_follow_their_distribution() -> None:
    """The chain rule: with the true conditionals the tokens follow the joint distribution."""
    joint = torch.rand(3, 3, generator=source()) + 0.05
    joint /= joint.sum()
    n, calls = 6000, iter(range(2))

    def predict(x: Tensor) -> Tensor:
        if next(calls) == 0:
            return joint.sum(1).log().expand(n, -1)
        return joint.log()[x[:, 0, 0]]

    drawn = autoregressive.sample(
        predict,
        lambda rows: rows,
        x=torch.zeros(n, 1, 2, dtype=torch.int64),
        draws=torch.rand(n, 1, 2, generator=source()),
    )
    counts = torch.bincount(drawn[:, 0, 0] * 3 + drawn[:, 0, 1], minlength=9) / n
    assert (counts - joint.flatten()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_another_grid() -> None:
    module = make(random=0.3, model={"spatial_size": [8, 8]})
    assert draw(module, ["x"], [0], grid=(6, 2)).shape == (1, 6, 2)
    with pytest.raises(ValueError, match="no place for 81 tokens"):
        draw(module, ["x"], [0], grid=(9, 9))


def test_more_steps_than_times_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^sampling\.steps must be at most .* \(10\), got 11$"):
        draw(make(), ["x"], [0], changes={"steps": 11})


def test_the_draw_is_the_common_one() -> None:
    """Random numbers in, tokens out: what the golden cases test is what samples."""
    for loop in (process.sample, autoregressive.sample):
        assert loop.__kwdefaults__["draw"] is draw_rows
    assert process.sample.__kwdefaults__["transition"] is process.transition
