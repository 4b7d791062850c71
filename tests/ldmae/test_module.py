"""LDMAEModule: its losses, conditions and ways to sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.common.request import Request
from lightning_modules.ldmae import process
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.module import LDMAEModule
from tests.tiny_generators import CHANNELS as C
from tests.tiny_generators import GRID, Squares, source

SIZES = {"input_size": 4, "in_channels": C, "hidden_size": 32, "depth": 2, "num_heads": 2}
TEXT = {**SIZES, "text_width": 16}
CLASSES = ["zero", "one", "sea lion", "lion"]
CONDITIONS: dict[str, dict[str, Any]] = {
    "text": {"condition": "text", "model": TEXT, "text": {"width": 16, "buckets": 64}},
    "label": {"condition": "label", "classes": CLASSES, "model": {**SIZES, "num_classes": 4}},
    "none": {"condition": "none", "model": SIZES},
}
SAMPLING = {
    "steps": 5,
    "guidance": 3.0,
    "guidance_channels": None,
    "guidance_start": 0.3,
    "timestep_shift": 0.7,
}
CAPTIONS = ["one lion", "a zero", "", "one large red square"]

Make = Callable[..., LDMAEModule]


@pytest.fixture
def make() -> Make:
    def build(kind: str = "text", speak: bool = True, **sections: Any) -> LDMAEModule:
        config: dict[str, Any] = {"paper": "ldmae", "seed": 5, "grid": [*GRID]}
        config["sampling"] = SAMPLING if kind != "none" else {**SAMPLING, "guidance": 1.0}
        for name, section in [*CONDITIONS[kind].items(), *sections.items()]:
            both = isinstance(section, dict) and name in config
            config[name] = {**config[name], **section} if both else section
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = LDMAEModule(config)
            for p in module.network.parameters():
                if speak and not p.any():  # a new network predicts nothing
                    nn.init.normal_(p, std=0.2)
        return module.attach(Squares()).eval()

    return build


def batch(seed: int = 0, n: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "moments": torch.cat([torch.randn(n, C, *GRID, generator=g), -torch.ones(n, C, *GRID)], 1),
        "caption": [CAPTIONS[i % 4] for i in range(n)],
        "label": torch.arange(n) % 4,
    }


def asked(prompts: list[str], first_seed: int = 0, **more: Any) -> Request:
    return Request(prompts, [*range(first_seed, first_seed + len(prompts))], **more)


def draw(
    module: LDMAEModule,
    prompts: list[str] = CAPTIONS[:1],
    on_step: Any = None,
    sampling: dict[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    """Sample latents with some of the checkpoint's settings replaced."""
    settings = module.settings(sampling or {})
    return module.sample_tokens(asked(prompts, **more), settings, on_step)


# The loss ----


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("cosine", [False, True])
def test_the_loss_is_the_papers(condition: str, cosine: bool, make: Make) -> None:
    drop = 0.0 if condition == "none" else 0.5
    module = make(
        condition,
        objective={"cosine_loss": cosine},
        model={**CONDITIONS[condition]["model"], "class_dropout_prob": drop},
    )
    given, generator = batch(n=6), source()
    loss, scalars = module.loss(given, source())
    means = given["moments"][:, :C]
    drawn = means + (0.5 * given["moments"][:, C:]).exp() * torch.randn(
        means.shape, generator=generator
    )
    x1 = drawn * 2 + 0.1
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.randn(6, generator=generator).sigmoid()
    hidden = torch.rand(6, generator=generator) < drop
    assert hidden.any() == (drop > 0) and not hidden.all()
    xt = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
    network = module.network
    if condition == "text":
        shown = ["" if h else c for c, h in zip(given["caption"], hidden, strict=True)]
        text = module.encode_text(shown)
        side = network.text_side(text.tokens, text.mask)
    else:
        labels = given["label"].masked_fill(hidden, 4)
        side = network.label_side(labels * 0 if condition == "none" else labels)
    predicted = network(xt, t, [side])[0]
    expected = ((predicted - (x1 - x0)) ** 2).mean()
    if cosine:
        torch.testing.assert_close(scalars["squared"], expected)
        direction = 1 - torch.cosine_similarity(predicted, x1 - x0, dim=1)
        expected = expected + direction.mean()
    torch.testing.assert_close(loss, expected)


def test_the_loss_of_ddpm(make: Make) -> None:
    objective = {"kind": "ddpm", "train_steps": 50}
    module = make("none", objective=objective, sampling={"solver": "ddim"})
    given, generator = batch(), source()
    loss, _ = module.loss(given, source())
    x = module.latents_of(given, generator)
    noise = torch.randn(x.shape, generator=generator)
    k = torch.randint(50, (4,), generator=generator)
    share = process.signal_shares(module.config.objective)[k].view(-1, 1, 1, 1).float()
    side = module.network.label_side(torch.tensor([0]))
    predicted = module.network(share**0.5 * x + (1 - share) ** 0.5 * noise, k, [side])[0]
    torch.testing.assert_close(loss, ((predicted - noise) ** 2).mean())


def test_latents_are_drawn_afresh(make: Make) -> None:
    module, given = make(), batch()
    first, second = (module.latents_of(given, source(seed)) for seed in (1, 2))
    mean = module.first_stage.normalise(given["moments"][:, :C])
    assert 0.1 < (first - second).std() < 3
    many = torch.stack([module.latents_of(given, source(seed)) for seed in range(300)])
    torch.testing.assert_close(many.mean(0), mean, rtol=0, atol=0.35)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_half_precision_learns_the_same(condition: str, make: Make) -> None:
    module = make(condition)
    full, _ = module.loss(batch(), source())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = module.loss(batch(), source())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)
    full.backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    half.backward()
    ours = [p.grad for p in module.parameters() if p.grad is not None]
    off = sum(float((a - b).square().sum()) for a, b in zip(grads, ours, strict=True))
    assert off < 0.05**2 * sum(float(a.square().sum()) for a in grads)


def test_labels_that_cannot_be(make: Make) -> None:
    module, given = make("label"), batch()
    with pytest.raises(ValueError, match="num_classes is 4, but the data have the label 7"):
        labels = torch.tensor([0, 7, 1, 1])
        module.transfer_batch_to_device({**given, "label": labels}, torch.device("cpu"), 0)
    with pytest.raises(ValueError, match="num_classes is 4, but there is asked for the label -1"):
        draw(module, ["", ""], labels=[3, -1])
    with pytest.raises(ValueError, match="labels needs condition=label, not text"):
        draw(make("text"), ["", ""], labels=[3, 1])
    del given["label"]
    with pytest.raises(ValueError, match="condition=label needs data with labels"):
        module.loss(given, source())


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_learns_what_belongs_to_a_label(kind: str, make: Make) -> None:
    """Four labels, four latents without spread: each label gives its own back."""
    sampling: dict[str, Any] = {"solver": "heun", "steps": 12, "guidance": 1.0}
    if kind == "ddpm":
        sampling |= {"solver": "ddim", "steps": 25, "eta": 0.5}
    # steep betas: 1000 small ones take longer to learn than a test may
    objective = {"kind": kind, "train_steps": 100, "beta_start": 0.0085, "beta_end": 0.12}
    module = make("label", speak=False, objective=objective, sampling=sampling).train()
    given = batch()
    given["moments"][:, C:] = -30
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for i in range(300):
        repeated = {k: [*v] * 8 if k == "caption" else torch.cat([v] * 8) for k, v in given.items()}
        loss, _ = module.loss(repeated, source(i))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.35 * losses[0]
    drawn = draw(module.eval(), [""] * 4, labels=[0, 1, 2, 3])
    wanted = module.latents_of(given, source())
    distance = (drawn[:, None] - wanted).square().mean((2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]
    assert distance.diagonal().mean() < 0.3 * wanted.var()


# Sampling ----


def test_guidance_one_is_no_guidance(make: Make) -> None:
    module, passes = make(), []
    forward = module.network.forward

    def counted(x: Tensor, t: Tensor, sides: Any) -> Tensor:
        passes.append(len(sides))
        return forward(x, t, sides)

    module.network.forward = counted  # type: ignore[method-assign]
    own, null = (draw(module, [p], sampling={"guidance": 1.0}) for p in (CAPTIONS[0], ""))
    assert set(passes) == {1}
    passes.clear()
    one = draw(module, sampling={"guidance": 1.0001, "guidance_start": 0.0})
    assert passes == [2] * 5
    torch.testing.assert_close(one, own, rtol=1e-3, atol=1e-3)
    passes.clear()
    draw(module, sampling={"timestep_shift": 1.0})
    assert passes == [1, 1, 2, 2, 2]  # times 0, 0.2 lie before 0.3
    assert module.calls.tolist() == [5] * len(module.calls)
    passes.clear()
    nothing = draw(module, sampling={"guidance": 0.0, "guidance_start": 0.0})
    assert passes == [1] * 5
    torch.testing.assert_close(nothing, null, rtol=1e-4, atol=1e-4)


def test_guidance_of_some_channels_and_away_from_a_caption(make: Make) -> None:
    module, first = make(sampling={"steps": 1, "guidance_start": 0.0}), []

    def ask(prompt: str = CAPTIONS[0], negative: Any = None, **sampling: Any) -> Tensor:
        note = lambda i, before, after: first.append(before)  # noqa: E731
        return draw(module, [prompt], note, sampling, negative=negative)

    own, all_channels = ask(guidance=1.0), ask(guidance=5.0)
    some = ask(guidance=5.0, guidance_channels=2)
    torch.testing.assert_close(some[:, :2], all_channels[:, :2])
    torch.testing.assert_close(some[:, 2:], own[:, 2:])
    away = ask(guidance=5.0, negative=[CAPTIONS[3]])
    other = ask(CAPTIONS[3], guidance=1.0)
    x0 = first[0]
    torch.testing.assert_close(away - x0, 5 * (own - x0) - 4 * (other - x0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5", "ddim"])
def test_a_mask_keeps_what_is_given(solver: str, make: Make) -> None:
    kind = "ddpm" if solver == "ddim" else "flow"
    module = make(objective={"kind": kind, "train_steps": 50}, sampling={"solver": solver})
    images = torch.rand(2, 3, 8, 8, generator=source()) * 2 - 1
    mask = torch.zeros(2, *GRID)
    mask[:, :2] = 1
    out = module.sample(asked(CAPTIONS[:2], 1, start=images, mask=mask))
    known = module.first_stage.decode(module.first_stage.encode(images))
    torch.testing.assert_close(out[:, :, 4:], known[:, :, 4:], rtol=0, atol=1e-4)
    assert (out - known)[:, :, :4].abs().mean() > 0.05


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_a_variation_stays_near_its_picture(solver: str, make: Make) -> None:
    kind = "ddpm" if solver == "ddim" else "flow"
    module = make(objective={"kind": kind}, sampling={"solver": solver, "steps": 50})
    images = torch.rand(2, 3, 8, 8, generator=source()) * 2 - 1
    images = images[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    distances = []
    for first in (1, 25, 49):
        settings = module.settings({"first_step": first})
        out = module.sample(asked(CAPTIONS[:2], 1, start=images), settings)
        distances.append(float((out - images).abs().mean()))
    assert distances[2] < 0.25 and distances == sorted(distances, reverse=True)


def test_steps_can_be_followed(make: Make) -> None:
    module, seen = make(), []
    out = draw(module, on_step=lambda i, before, after: seen.append((i, before, after)))
    assert [i for i, _, _ in seen] == list(range(5))
    assert torch.equal(seen[0][1], process.sample_noise([0], (C, *GRID)))
    assert torch.equal(seen[1][1], seen[0][2]) and torch.equal(seen[-1][2], out)


def test_prompts_name_labels(make: Make) -> None:
    module = make("label")
    read = ["a zero", "One, by hand", "3", "the sea lion", "a lion.", ""]
    assert module.labels_of(read) == [0, 1, 3, 2, 3, 4]
    for prompt in ("4", "nothing", "zero or one", "-1 0", "two sea lions"):
        with pytest.raises(ValueError, match="must ask for one class: a number from 0 to 3"):
            module.check_prompts([prompt])
    named = draw(module, ["zero", "2"])
    told = draw(module, ["", "zero"], labels=[0, 2])
    assert torch.equal(named, told)


def test_on_a_real_autoencoder() -> None:
    vit = {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "decoder_embed_dim": 16,
        "depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "decoder_num_heads": 2,
    }
    autoencoder = AutoencoderModule({"kind": "vmae", "channels": C, "vit": vit}).eval()
    autoencoder.set_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
    module = LDMAEModule({"grid": [*GRID], "sampling": SAMPLING, **CONDITIONS["label"]})
    module.attach(autoencoder)
    images = torch.rand(4, 3, 16, 16, generator=source()) * 2 - 1
    loss, _ = module.loss({**batch(), "image": images}, source())
    loss.backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    request = asked(["zero", "one"], start=images[:2])
    out = module.sample(request, module.settings({"first_step": 2}))
    assert out.shape == (2, 3, 16, 16) and out.abs().max() <= 1


# Settings that do not fit ----


def test_one_setting_of_sizes_serves_all_conditions(make: Make) -> None:
    """Only what the condition needs is built, so that a word on the command line changes it."""
    sizes = {**SIZES, "text_width": 16, "num_classes": 4}
    shapes: dict[str, Any] = {}
    for condition, guidance in (("text", 3.0), ("label", 3.0), ("none", 1.0)):
        module = make("text", condition=condition, model=sizes, sampling={"guidance": guidance})
        own = module.network
        shapes[condition] = (
            own.blocks[0].cross is not None,
            own.y_embedder.embedding_table.num_embeddings if condition != "text" else 0,
            module.text_encoder is not None,
        )
        assert module.sample(asked(["1"])).isfinite().all()
        assert module.labelled == (condition == "label")
    assert shapes == {
        "text": (True, 0, True),
        "label": (False, 5, False),
        "none": (False, 1, False),
    }


@pytest.mark.parametrize(
    ("condition", "sections", "message"),
    [
        ("text", {"text": {"width": 8}}, r"model.text_width must be text.width \(8\)"),
        ("label", {"condition": "text"}, "model.text_width must be above 0 with condition=text"),
        ("label", {"model": {"num_classes": 0}}, "model.num_classes must be above 0 with"),
        ("label", {"condition": "none"}, "sampling.guidance must be 1 with condition=none"),
        ("text", {"model": {"class_dropout_prob": 0.0}}, "sampling.guidance must be 1 without"),
        ("label", {"classes": ["a"]}, r"classes must name all of model.num_classes \(4\)"),
        ("text", {"grid": [8, 8]}, "model.input_size must be the side of the latents 8x8"),
        ("text", {"sampling": {"solver": "ddim"}}, "must be euler, heun or dopri5 with"),
        ("text", {"objective": {"kind": "ddpm"}}, "sampling.solver must be ddim with"),
        (
            "text",
            {"objective": {"kind": "ddpm", "train_steps": 4}, "sampling": {"solver": "ddim"}},
            r"sampling.steps must be at most objective.train_steps \(4\)",
        ),
        (
            "text",
            {"sampling": {"solver": "dopri5", "first_step": 1}},
            "sampling.first_step must be 0 with",
        ),
        ("text", {"sampling": {"first_step": 5}}, "first_step must be from 0 to steps - 1"),
    ],
)
def test_settings_that_do_not_fit(
    condition: str, sections: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        module = make(condition, **sections)
        module.config.check_sampling(module.config.sampling, module.geometry)


def test_an_autoencoder_or_a_request_that_does_not_fit(make: Make) -> None:
    class Wide(Squares):
        channels = 5

    with pytest.raises(ValueError, match=r"in_channels must be the autoencoder's 5 channels"):
        make().attach(Wide())
    with pytest.raises(ValueError, match="negative needs condition=text, not label"):
        draw(make("label"), ["zero"], negative=["one"])
    with pytest.raises(ValueError, match="makes latents of 4x4 alone"):
        draw(make(), start=torch.zeros(1, C, 8, 8), mask=torch.zeros(1, 8, 8))
