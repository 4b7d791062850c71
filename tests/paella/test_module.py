"""PaellaModule: its average, its loss, conditions dropped, and every way to sample."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.request import Request
from lightning_modules.common.text import Condition
from lightning_modules.paella import process
from lightning_modules.paella.config import SamplingConfig
from lightning_modules.paella.module import PaellaModule
from tests.tiny_generators import (
    BYTES,
    CAPTIONS,
    GRID,
    PAELLA,
    SAMPLING,
    Greys,
    K,
    exact,
    fit,
    same,
    source,
)

V1 = {
    "num_labels": K,
    "c_hidden": 16,
    "c_clip": 12,
    "c_r": 8,
    "down_levels": [1, 1],
    "up_levels": [1, 1],
}
Make = Callable[..., PaellaModule]


@pytest.fixture
def make(tiny_t5: str, tiny_clip: dict[str, str]) -> Make:
    """Make a module of one kind; keyword arguments extend its sections."""
    frozen = {"name": "byt5", "path": tiny_t5, **tiny_clip}
    kinds: dict[str, dict[str, Any]] = {
        "v3": {"network": "v3", "model": PAELLA, "text": BYTES},
        "full": {
            "network": "v3",
            "model": {**PAELLA, "clip_embd": 12, "clip_image": True, "clip_seq_len": 2},
            "text": frozen,
        },
        "v1": {
            "network": "v1",
            "v1": V1,
            "text": {**frozen, "name": "open_clip"},
            "sampling": {**SAMPLING["paella"], "schedule": "cosine"},
        },
    }

    def build(kind: str = "v3", random: float | None = None, **sections: Any) -> PaellaModule:
        config: dict[str, Any] = {
            "paper": "paella",
            "seed": 5,
            "grid": [*GRID],
            "num_codes": K,
            "sampling": SAMPLING["paella"],
            **kinds[kind],
        }
        for name, section in sections.items():
            both = isinstance(section, dict) and name in config
            config[name] = {**config[name], **section} if both else section
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = PaellaModule(config)
            if random:  # the released initialisation begins with logits of 0
                for p in module.parameters():
                    nn.init.normal_(p, std=random)
        return module.attach(Greys()).eval()

    return build


KINDS = ["v3", "full", "v1"]


def batch(seed: int = 0, n: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(K, (n, *GRID), generator=generator)
    image = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    return {"tokens": tokens, "image": image, "caption": [CAPTIONS[i % 4] for i in range(n)]}


def draw(
    module: PaellaModule,
    prompts: list[str] = CAPTIONS,
    seeds: list[int] | None = None,
    on_step: Any = None,
    sampling: dict[str, Any] | None = None,
    **asked: Any,
) -> Tensor:
    """Sample tokens with some of the checkpoint's settings replaced."""
    request = Request(prompts, seeds or [*range(len(prompts))], **asked)
    return module.sample_tokens(request, module.settings(sampling or {}), on_step)


def test_the_average_has_its_own_key_and_is_what_is_exported(make: Make, tmp_path: Path) -> None:
    class Record(L.Callback):
        def __init__(self) -> None:
            self.weights: list[dict[str, Tensor]] = []

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.note(pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
            if trainer.global_step == len(self.weights):  # once per optimizer step
                self.note(module)

        def note(self, module: L.LightningModule) -> None:
            self.weights.append({k: v.clone() for k, v in module.state_dict().items()})

    record = Record()
    module = make(optim={"ema": 0.9, "lr": 1e-2})
    trainer = fit(module, 4, callbacks=[record], accumulate_grad_batches=2)
    assert len(record.weights) == trainer.global_step + 1 == 4 * 2 + 1
    expected = record.weights[0]
    for n, weights in enumerate(record.weights[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    state, config = module.export()
    for k, v in state.items():
        torch.testing.assert_close(v, expected[k])
    assert not same(state, module.state_dict())
    assert config == module.hparams["config"]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert same(content["ema"]["shadow"], state)
    assert same(content["state_dict"], module.state_dict())

    plain = make()
    fit(plain, 1).save_checkpoint(tmp_path / "y.ckpt")
    assert "ema" not in torch.load(tmp_path / "y.ckpt", weights_only=True)
    assert same(plain.export()[0], plain.state_dict())


# The loss ----


@pytest.mark.parametrize("kind", ["v3", "v1"])
@pytest.mark.parametrize("t_law", ["released", "wuerstchen"])
def test_the_loss_is_the_papers(kind: str, t_law: str, make: Make) -> None:
    objective = {"eta": 0.4, "label_smoothing": 0.2, "text_drop": 0.0, "t_law": t_law}
    module = make(kind, random=0.3, objective=objective)
    given = batch(n=6)
    loss, scalars = module.loss(given, source())
    tokens, generator = given["tokens"], source()
    time = torch.rand(6, generator=generator)
    if kind == "v1":
        t = torch.cos(time * torch.pi / 2)
    else:
        t = time = process.noise_rate(time, t_law)  # type: ignore[arg-type]
    noise = torch.randint(K, tokens.shape, generator=generator)
    hit = torch.rand(tokens.shape, generator=generator) <= t[:, None, None]
    x = torch.where(hit, noise, tokens)
    text = module.encode_text(given["caption"])
    network: Any = module.network
    if kind == "v1":
        logits = network(x, text.pooled, time)
    else:
        logits = network(x, time, text.tokens, mask=text.mask)
    ce = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=0.2)
    weight = torch.where(hit, 1.0, 1 - (1 - t[:, None, None]) * 0.6)
    weight = torch.ones_like(ce) if kind == "v1" else weight  # v1 takes the plain mean
    expected = ((ce * weight).sum((1, 2)) / weight.sum((1, 2))).mean()
    torch.testing.assert_close(loss, expected)
    assert scalars["accuracy"] == (logits.argmax(1) == tokens).float().mean()


def test_validations_can_be_compared(make: Make) -> None:
    """Every validation draws the same noise, whenever it comes."""
    losses = []
    for i in range(2):
        torch.manual_seed(i)
        trainer = fit(make(optim={"lr": 1e-9}), 1 + i)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_overfits_one_batch_and_draws_it(make: Make) -> None:
    """A few captions, a few grids: the loss falls, and each caption gives its grid back."""
    module = make(
        model={"dropout": 0.0, "c_hidden": [32, 32], "c_cond": 32, "c_in": 32, "c_out": 32},
        objective={"text_drop": 0.1, "label_smoothing": 0.0},
    ).train()
    generator = torch.Generator().manual_seed(0)
    given = {"tokens": torch.randint(K, (4, *GRID), generator=generator), "caption": CAPTIONS}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for i in range(150):
        loss, _ = module.loss(given, source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    start, end = losses[0], sum(losses[-20:]) / 20
    assert start == pytest.approx(math.log(K), abs=1e-4)  # all labels alike
    assert end < 0.3 * start
    drawn = draw(module.eval(), CAPTIONS[:2] + CAPTIONS[3:])
    wanted = given["tokens"][[0, 1, 3]]  # type: ignore[index]
    assert (drawn == wanted).float().mean() > 0.9


# Conditions and their drop ----


def loss_of(
    module: PaellaModule,
    captions: list[str],
    pictures: Tensor,
    text: float = 0.0,
    pooled: float = 0.0,
    image: float = 0.0,
) -> Tensor:
    objective = module.config.objective
    objective.text_drop, objective.pooled_drop, objective.image_drop = text, pooled, image
    given = {**batch(), "caption": captions, "image": pictures}
    return module.loss(given, source())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_text_is_the_empty_caption(kind: str, make: Make) -> None:
    module, image = make(kind, random=0.3), batch()["image"]
    dropped = loss_of(module, CAPTIONS, image, text=1.0, pooled=1.0)
    shown = loss_of(module, CAPTIONS, image)
    assert not torch.isclose(dropped, shown, rtol=1e-3)
    if kind == "v1":  # whose null condition is a vector of zeros
        module._pooled = lambda captions: torch.zeros(4, 12)  # type: ignore[method-assign]
        torch.testing.assert_close(loss_of(module, CAPTIONS, image), dropped)
    else:
        torch.testing.assert_close(loss_of(module, [""] * 4, image), dropped)


def test_text_pooled_and_image_drop_independently(make: Make) -> None:
    module, image = make("full", random=0.3), batch()["image"]
    losses = {
        (t, p, i): loss_of(module, CAPTIONS, image, text=t, pooled=p, image=i).item()
        for t in (0.0, 1.0)
        for p in (0.0, 1.0)
        for i in (0.0, 1.0)
    }
    assert len({round(v, 6) for v in losses.values()}) == 8
    # what is hidden has no influence left
    other = batch(9)["image"]
    for t, p in ((0.0, 0.0), (1.0, 1.0)):
        hidden = loss_of(module, CAPTIONS, other, text=t, pooled=p, image=1.0).item()
        assert hidden == pytest.approx(losses[t, p, 1.0], rel=1e-5)
        shown = loss_of(module, CAPTIONS, other, text=t, pooled=p).item()
        assert shown != pytest.approx(losses[t, p, 0.0], rel=1e-5)


def test_a_hidden_image_equals_no_image(make: Make) -> None:
    module = make("full", random=0.3)
    network: Any = module.network
    masked = loss_of(module, CAPTIONS, batch()["image"], image=1.0)
    without = lambda text, hide: network.prepare(  # noqa: E731
        *network.condition(text.tokens, text.pooled, None, text.mask)
    )
    module._training_condition = without  # type: ignore[method-assign]
    torch.testing.assert_close(loss_of(module, CAPTIONS, batch()["image"]), masked)


def test_images_are_hidden_one_by_one(make: Make) -> None:
    module = make("full", random=0.3, objective={"image_drop": 0.5, "text_drop": 0.0})
    given = batch(n=32)
    condition = module._training_condition(**module._training_inputs(given, source()))
    mask = condition.blocks[0][0].mask
    hidden = ~mask[:, -2:]
    assert torch.equal(hidden[:, 0], hidden[:, 1]) and 6 < hidden[:, 0].sum() < 26
    assert not torch.equal(hidden[:16, 0], hidden[16:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_gets_a_gradient(kind: str, drop: float, make: Make) -> None:
    """Whatever is hidden: DDP waits for the gradient of a parameter that was not used."""
    objective = {"text_drop": drop, "pooled_drop": drop, "image_drop": drop}
    module = make(kind, random=0.3, objective=objective)
    module.loss(batch(), source())[0].backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_how_often_each_is_dropped(per: str, make: Make) -> None:
    rates = {"text_drop": 0.3, "pooled_drop": 0.6, "image_drop": 0.8}
    module = make("full", objective={**rates, "drop_per": per})
    asked: list[list[str]] = []

    def encode(captions: list[str]) -> Condition:
        asked.append(captions)
        n = len(captions)
        return Condition(torch.zeros(n, 1, 16), None, torch.ones(n, 12) * (n > 1))

    pooled: list[Tensor] = []
    network: Any = module.network
    condition = network.condition
    network.condition = lambda tokens, clip, image, mask: (
        pooled.append(clip) or condition(tokens, clip, image, mask)
    )
    module.encode_text = encode  # type: ignore[method-assign]
    module.encode_images = lambda image: torch.zeros(len(image), 12)  # type: ignore[method-assign]
    count, rounds = (1500, 1) if per == "sample" else (3, 500)
    hidden = []
    for i in range(rounds):
        asked.clear()
        given = {"caption": ["x"] * count, "image": torch.zeros(count, 3, 1, 1)}
        prepared = module._training_condition(**module._training_inputs(given, source(i)))
        mask = prepared.blocks[0][0].mask
        image = torch.zeros(count, dtype=torch.bool) if mask is None else ~mask[:, -1]
        text = torch.tensor([c == "" for c in asked[0]])
        hidden.append(torch.stack([text, pooled[-1][:, 0] == 0, image], dim=1))  # [B, 3]
    each = torch.stack(hidden)  # [rounds, B, 3]
    if per == "batch":
        assert (each == each[:, :1]).all()
        each = each[:, :1]
    found = each.flatten(0, 1).double()
    for column, rate in enumerate(rates.values()):
        assert found[:, column].mean() == pytest.approx(rate, abs=0.07)
    assert found.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15


def test_what_a_condition_lacks_is_said(make: Make) -> None:
    module = make("full")
    with pytest.raises(ValueError, match=r"add data\.cache=false"):
        module.loss({k: v for k, v in batch().items() if k != "image"}, source())
    with pytest.raises(ValueError, match=r"text\.name=bytes has no image vectors"):
        make().encode_images(batch()["image"])


# Sampling ----


@pytest.mark.parametrize("kind", ["full", "v1"])
@pytest.mark.parametrize("mode", ["start", "rand"])
def test_a_picture_is_its_prompt_and_seed(kind: str, mode: str, make: Make) -> None:
    module, seeds = exact(make(kind, random=0.3)), [3, 1, 4, 1]
    sampling = {"typical_mass": 0.5, "renoise_mode": mode}
    together = draw(module, CAPTIONS, seeds, sampling=sampling)
    for i in (1, 3):
        alone = draw(module, [CAPTIONS[i]], [seeds[i]], sampling=sampling)
        assert torch.equal(alone[0], together[i])
    turned = draw(module, CAPTIONS[::-1], seeds[::-1], sampling=sampling)
    assert torch.equal(turned.flip(0), together)
    assert not torch.equal(draw(module, CAPTIONS, [5, 6, 7, 8], sampling=sampling), together)


@pytest.mark.parametrize("kind", ["full", "v1"])
def test_the_prompt_matters(kind: str, make: Make) -> None:
    module = make(kind, random=0.3)
    prompts = ["a red circle"] * 8 + ["two blue squares"] * 8
    drawn = draw(module, prompts, [*range(8), *range(8)])
    assert not torch.equal(drawn[:8], drawn[8:])


@pytest.mark.parametrize("kind", KINDS)
def test_negative_prompts(kind: str, make: Make) -> None:
    module = exact(make(kind, random=0.3))
    plain = draw(module)
    assert not torch.equal(draw(module, negative=["blur"] * 4), plain)
    # away from the prompt itself: w f + (1 - w) f = f, the picture without guidance
    unguided = draw(module, sampling={"guidance_start": 1.0, "guidance_end": 1.0})
    assert torch.equal(draw(module, negative=CAPTIONS), unguided)
    if kind != "v1":  # whose null condition is zeros, not the empty caption
        assert torch.equal(draw(module, negative=[""] * 4), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_blends_run_from_one_prompt_to_the_other(kind: str, make: Make) -> None:
    module = exact(make(kind, random=0.3))
    a, b = ["a red circle"] * 8, ["two blue squares"] * 8
    plain = [draw(module, prompts) for prompts in (a, b)]
    blended = [draw(module, a, blend_with=b, blend=weight) for weight in (0, 1, 0.5)]
    assert torch.equal(blended[0], plain[0]) and torch.equal(blended[1], plain[1])
    assert not torch.equal(blended[0], blended[1])
    assert torch.equal(draw(module, a, blend_with=a, blend=0.3), plain[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_a_mask_keeps_known_tokens(kind: str, mode: str, make: Make) -> None:
    module = make(kind, random=0.3)
    start = batch(3)["tokens"]
    mask = torch.zeros(4, *GRID, dtype=torch.int64)
    mask[0] = 1
    mask[1, 1:3] = 1
    mask[2, 0, 0] = 1  # nothing is left to generate in the last
    seen: list[Tensor] = []

    def note(i: int, x: Tensor, out: Tensor) -> None:
        seen.extend((x, out))

    sampling = {"renoise_mode": mode}
    drawn = draw(module, on_step=note, sampling=sampling, start=start, mask=mask)
    for tokens in (*seen, drawn):
        assert torch.equal(tokens[mask == 0], start[mask == 0])
    assert not torch.equal(drawn[0], start[0])
    whole = draw(module, CAPTIONS[:1], sampling=sampling)
    assert torch.equal(drawn[:1], whole)  # of a picture of which nothing is known


@pytest.mark.parametrize(("kind", "schedule"), [("v3", "linear"), ("v1", "cosine")])
def test_a_variation_starts_from_the_picture_noised(kind: str, schedule: str, make: Make) -> None:
    module = make(kind, random=0.3)
    start = torch.randint(K, (2, 32, 32), generator=source())
    kept = []
    for first in (1, 4, 7):
        settings = {"steps": 8, "first_step": first, "schedule": schedule}
        inputs: list[Tensor] = []
        note = lambda i, x, out, inputs=inputs: inputs.append(x)  # noqa: E731
        draw(module, CAPTIONS[:2], on_step=note, sampling=settings, start=start)
        assert len(inputs) == 8 - first
        rate = process.start_rate(SamplingConfig(**settings)).item()  # type: ignore[arg-type]
        kept.append((inputs[0] == start).float().mean().item())
        assert kept[-1] == pytest.approx(1 - rate * (1 - 1 / K), abs=0.04)
    assert kept == sorted(kept)
    # the noise is the picture's own, not the batch's
    settings = {"steps": 8, "first_step": 4}
    one = draw(module, CAPTIONS[1:2], [1], sampling=settings, start=start[1:])
    two = draw(module, CAPTIONS[:2], sampling=settings, start=start)
    assert (one[0] == two[1]).float().mean() > 0.99  # float32 sums differ by the batch


def test_image_vectors_and_attention_weights(make: Make) -> None:
    module, images = make("full", random=0.3), batch()["image"]
    image = module.image_condition(images)
    assert image is not None and torch.equal(image, module.encode_images(images))
    assert image.shape == (4, 12)
    shown = draw(module, image_condition=image)
    assert not torch.equal(draw(module), shown)
    ones, more = (torch.full((2,), w) for w in (1.0, 4.0))
    weighted = [draw(module, image_condition=image, attention=w) for w in (ones, more)]
    assert torch.equal(weighted[0], shown) and not torch.equal(weighted[1], shown)
    v1 = make("v1", random=0.3)
    vectors = v1.encode_text(CAPTIONS).pooled
    assert torch.equal(draw(v1), draw(v1, [""] * 4, image_condition=vectors))
    assert v1.image_condition(images) is None and make().image_condition(images) is None


def test_another_grid(make: Make) -> None:
    module = make(random=0.3)
    assert module.size_unit == 2 * 2
    assert draw(module, ["x"], grid=(6, 2)).shape == (1, 6, 2)
    with pytest.raises(ValueError, match="multiple of 2 on both sides, got 5x4"):
        draw(module, ["x"], grid=(5, 4))


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("v3", {"num_codes": 10}, "model.num_labels must be the tokenizer's 10 codes, got 12"),
        ("v1", {"num_codes": 10}, "v1.num_labels must be the tokenizer's 10 codes, got 12"),
        ("v3", {"grid": [6, 5]}, r"data.resolution must be a multiple of 2, got 5"),
        ("v3", {"text": {"width": 8}}, r"model.byt5_embd must be text.width \(8\) with"),
        ("v3", {"model": {"clip_embd": 4}}, "model.clip_embd must be 0 without a CLIP encoder"),
        ("full", {"text": {"clip": None}}, "got 12 with text.name=byt5 and text.clip=None"),
        ("full", {"text": {"name": "t5"}}, "model.clip_embd must be 0 without a CLIP encoder"),
        ("v1", {"text": BYTES}, "network=v1 needs one CLIP vector per caption: add text=open_clip"),
        ("v1", {"sampling": {"schedule": "linear"}}, "sampling.schedule must be cosine with"),
    ],
)
def test_sections_that_do_not_fit(
    kind: str, sections: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        module = make(kind, **sections)
        module.config.check_sampling(module.config.sampling, module.geometry)


def test_a_schedule_of_the_other_network(make: Make) -> None:
    with pytest.raises(ValueError, match=r"sampling\.schedule must be linear with network=v3"):
        draw(make(), sampling={"schedule": "cosine"})


def test_the_draw_is_the_common_one() -> None:
    """Random numbers in, tokens out: what the golden cases test is what samples."""
    assert process.sample.__kwdefaults__["draw"] is draw_rows
