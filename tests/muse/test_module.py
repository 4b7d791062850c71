"""MuseModule and its super-resolution stage: training, resuming, and every way to sample."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.common.request import Request
from lightning_modules.muse import process
from lightning_modules.muse.module import MuseModule, SuperResModule
from tests.tiny_generators import (
    BATCHES,
    BYTES,
    CAPTIONS,
    GRID,
    MUSE,
    Greys,
    K,
    Stop,
    batch,
    exact,
    same,
    source,
    tiny,
)

HIGH = (8, 8)
SUPERRES = {
    **MUSE,
    "low_num_codes": K,
    "low_layers": 1,
    "low_max_side": 8,
    "block": 2,
    "max_side": 16,
}
SEEDS = [1, 2, 3, 4]

Make = Callable[..., MuseModule]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP text model of random weights, 16 wide, with 12 pooled numbers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("clip_text")
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(clip_folder: str) -> Make:
    """Make a module of one kind; keyword arguments extend its sections."""
    clip = {
        "name": "clip",
        "path": clip_folder,
        "projected": True,
        "hidden_state": -2,
        "unit_norm": False,
    }
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "muse": ("muse", {}),
        "learned": ("muse learned", {}),
        "empty": ("muse", {"model": {"null_text": "empty"}}),
        "critic": ("muse critic", {}),
        "uvit": ("muse uvit", {"text": clip, "uvit": {"cond_embed_dim": 12}}),
        "superres": (
            "muse",
            {
                "superres": {"enabled": True, "model": SUPERRES},
                "high": {"grid": [*HIGH], "num_codes": K},
                "sampling": {"superres": {"steps": 3}},
            },
        ),
    }

    def build(kind: str = "muse", random: float = 0.0, **sections: Any) -> MuseModule:
        name, own = kinds[kind]
        for key, section in sections.items():
            both = isinstance(section, dict) and key in own
            own = {**own, key: {**own[key], **section} if both else section}
        return tiny(name, random, **own)

    return build


@pytest.fixture
def upscaler(make: Make) -> Callable[..., SuperResModule]:
    """Make the super-resolution stage alone, on top of a base of random weights."""

    def build(random: float = 0.0, **superres: Any) -> SuperResModule:
        base = make(random=0.3)
        whole = make("superres", random, superres={"enabled": True, "model": SUPERRES, **superres})
        assert whole.superres is not None
        return whole.superres.attach(base.first_stage, low=base.first_stage, base=base)

    return build


KINDS = ["muse", "learned", "empty", "critic", "uvit"]


def high_batch(seed: int = 0, n: int = 4) -> dict[str, Any]:
    low = batch("muse", seed, n)
    high = low["tokens"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    return {"tokens": high, "low": low["tokens"], "caption": low["caption"]}


def fit(
    module: SuperResModule,
    epochs: int,
    ckpt: Path | None = None,
    callbacks: list[L.Callback] | None = None,
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
    )
    batches: Any = [high_batch(i) for i in range(BATCHES)]
    loader: Any = DataLoader(batches, batch_size=None)
    trainer.fit(module.train(), loader, loader, ckpt_path=ckpt)
    return trainer


# Save, reload, resume ----


def test_a_resumed_stage_equals_an_uninterrupted_one(
    upscaler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    optim = {"lr": 1e-2, "ema": 0.9, "warmup_steps": 2, "schedule": "cosine"}
    whole, half, resumed = (upscaler(optim=optim, low="predicted") for _ in range(3))
    fit(whole, 4)
    fit(half, 4, callbacks=[Stop(2)]).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    assert fit(resumed, 4, tmp_path / "half.ckpt").global_step == 4 * BATCHES
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict(), half.state_dict())
    assert same(whole.average.shadow, resumed.average.shadow)


def test_both_stages_reload_with_safe_loading(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    module = make("superres", random=0.3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = MuseModule.load_from_checkpoint(tmp_path / "x.ckpt").attach(Greys()).eval()
    assert same(module.state_dict(), again.state_dict())
    rooms = {"network", "text_encoder", "superres"}
    assert {name.partition(".")[0] for name in module.state_dict()} == rooms
    one, two = (m.sample(Request(CAPTIONS, SEEDS)) for m in (module, again))
    assert torch.equal(one, two)


def test_the_stages_put_together_are_what_was_trained(make: Make, upscaler: Any) -> None:
    """From two files, or from one in which the second's tensors are called superres.*."""
    base = make(random=0.3, sampling={"superres": {"steps": 3}})
    stage = upscaler(random=0.3)
    own, part = base.export(), stage.export()
    joined = {**own[0], **{f"superres.{k}": v for k, v in part[0].items()}}
    settings = {**own[1], **{k: part[1][k] for k in ("superres", "high")}}
    tokens = base.sample_tokens(Request(CAPTIONS, SEEDS))
    high = stage.sample_tokens(Request(CAPTIONS, SEEDS, low=tokens))
    for state, config, parts in ((*own, {"superres": part}), (joined, settings, {})):
        whole = MuseModule.assemble(state, config, parts, "x").attach(Greys()).eval()
        assert whole.superres is not None and same(whole.superres.state_dict(), part[0])
        assert torch.equal(whole.sample_tokens(Request(CAPTIONS, SEEDS)), tokens)
        made = whole.sample(Request(CAPTIONS, SEEDS))
        assert torch.equal(made, stage.first_stage.decode(high)) and made.shape == (4, 3, 16, 16)


def test_without_its_part_a_checkpoint_is_the_base_alone(make: Make) -> None:
    """Whatever the settings say: they name what is trained."""
    state, config = make(random=0.3).export()
    settings = {**make("superres").export()[1], "seed": config["seed"]}
    alone = MuseModule.assemble(state, settings, {}, "x").attach(Greys()).eval()
    assert alone.superres is None and alone.config.superres.enabled
    assert alone.sample(Request(CAPTIONS, SEEDS)).shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="x: MuseModule has no part prior"):
        MuseModule.assemble(state, settings, {"prior": ({}, {})}, "x")


def test_the_first_stage_of_high_res_tokens(make: Make) -> None:
    other = Greys()
    for key in ("first_stage", "tokenizer"):  # the latter in older files
        named = {"file": "high.safetensors", "sha256": "0"}
        module = make("superres", high={"grid": [*HIGH], "num_codes": K, key: named})
        assert module.further_first_stages() == {"high": named}
    module.attach(Greys(), high=other)
    assert module.superres is not None and module.superres.first_stage is other
    assert module.final_first_stage is other is not module.first_stage
    assert make("superres").further_first_stages() == make().further_first_stages() == {}


# The loss ----


@pytest.mark.parametrize("kind", ["muse", "uvit"])
@pytest.mark.parametrize("reduction", ["tokens", "samples"])
@pytest.mark.parametrize("visible", [0.0, 0.3])
def test_the_loss_is_the_masked_cross_entropy(
    kind: str, reduction: str, visible: float, make: Make
) -> None:
    objective = {
        "label_smoothing": 0.2,
        "text_drop": 0.0,
        "reduction": reduction,
        "visible_weight": visible,
        "visible_law": "rate",
        "min_rate": 0.2,
    }
    module = make(kind, random=0.3, objective=objective)
    given, network = batch("muse", n=6), module.network
    loss, scalars = module.loss(given, source())
    tokens, chance = given["tokens"], source()
    rates = torch.cos(torch.rand(6, generator=chance) * torch.pi / 2).clamp(min=0.2)
    number = (rates * 16).round().clamp(min=1)
    uniforms = torch.rand(tokens.shape, generator=chance)
    mask = (uniforms.flatten(1).argsort(1) < number[:, None]).view(tokens.shape)
    x = tokens.masked_fill(mask, K if kind == "muse" else K + 1)
    text = module.encode_text(given["caption"])
    if kind == "muse":
        logits = network(x, text.tokens, text.mask)
    else:
        logits = network(x, text.tokens, text.pooled, torch.tensor([[8.0, 8, 0, 0, 6]]))
    ce = F.cross_entropy(logits.permute(0, 3, 1, 2), tokens, reduction="none", label_smoothing=0.2)
    seen = 1 - (1 - rates[:, None, None]) * 0.7 if visible else torch.zeros(6, 1, 1)
    weight = torch.where(mask, 1.0, seen)
    parts = (ce * weight).flatten(1).sum(1), weight.flatten(1).sum(1)
    expected = parts[0].sum() / parts[1].sum() if reduction == "tokens" else None
    expected = (parts[0] / parts[1]).mean() if expected is None else expected
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(-1) == tokens)[mask].float().mean()
    torch.testing.assert_close(scalars["accuracy"], right)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rectangles_are_masked_as_often_as_asked(share: float, make: Make) -> None:
    module = make(objective={"rectangle": share})
    tokens = torch.zeros(400, 8, 8, dtype=torch.int64)
    mask = module.masking(tokens, source())["mask"]
    rows, columns = mask.any(2), mask.any(1)
    boxes = mask.flatten(1).sum(1) == rows.sum(1) * columns.sum(1)
    several = (rows.sum(1) > 2) & (columns.sum(1) > 2) & (mask.flatten(1).sum(1) < 60)
    assert float(boxes[several].float().mean()) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_every_parameter_gets_a_gradient(kind: str, drop: float, make: Make) -> None:
    """Whatever is hidden: DDP waits for the gradient of a parameter that was not used."""
    module = make(kind, random=0.3, objective={"text_drop": drop})
    module.loss(batch("muse"), source())[0].backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_caption_leaves_no_trace(kind: str, make: Make) -> None:
    def loss(drop: float, captions: list[str]) -> Tensor:
        module = make(kind, random=0.3, objective={"text_drop": drop})
        return module.loss({**batch("muse"), "caption": captions}, source())[0]

    others = CAPTIONS[::-1]
    torch.testing.assert_close(loss(1.0, CAPTIONS), loss(1.0, others))
    assert not torch.isclose(loss(0.0, CAPTIONS), loss(0.0, others), rtol=1e-4)
    assert not torch.isclose(loss(0.0, CAPTIONS), loss(1.0, CAPTIONS), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dropped_caption_of_training_is_that_of_guidance(kind: str, make: Make) -> None:
    module = make(kind, random=0.3)
    x = torch.full((4, *GRID), module.network.mask_id)
    keep = torch.ones_like(x, dtype=torch.bool)
    x[:, 0] = 1  # not all alike
    trained = module.condition(CAPTIONS, torch.ones(4, dtype=torch.bool))
    guided = module.condition(None)
    rows = [module.network.mixed_rows(x, [c], [1.0], keep) for c in (trained, guided)]
    torch.testing.assert_close(*rows)


def test_overfits_one_batch_and_draws_it(make: Make) -> None:
    """A few captions, a few grids: the loss falls, and each caption gives its grid back."""
    module = make(model={**MUSE, "dropout": 0.0, "hidden": 32}).train()
    given = {**batch("muse"), "caption": CAPTIONS}
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for i in range(160):
        loss, _ = module.loss(given, source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(K), abs=0.1)
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]
    shown, sure = CAPTIONS[:2] + CAPTIONS[3:], {"guidance_end": 1.5, "temperature_start": 0.5}
    settings = module.settings({**sure, "temperature_end": 0.3})
    drawn = module.eval().sample_tokens(Request(shown, [0, 1, 2]), settings)
    wanted = given["tokens"][[0, 1, 3]]  # type: ignore[index]
    assert (drawn == wanted).float().mean() > 0.8


def test_the_critic_learns_what_is_drawn(make: Make) -> None:
    """Pictures of one and the same token; a generator that knows nothing draws others."""
    module = make("critic", model={**MUSE, "dropout": 0.0, "hidden": 32}).train()
    module.network.requires_grad_(False)
    critic: Any = module.critic
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for i in range(60):
        tokens = torch.full((8, *GRID), 3)
        loss, scalars = module.loss({"tokens": tokens, "caption": [""] * 8}, source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scalars["critic"] < 0.3
    tokens = torch.full((1, *GRID), 3)
    tokens[0, 1, 2] = 7
    scores = module.eval().critic_of([""], module.told([""]))(tokens)
    assert int(scores.flatten().argmin()) == 6


# Sampling ----


def test_guidance_runs_as_it_is_asked(make: Make) -> None:
    module, used = make(random=0.3), []
    mixed_rows = module.network.mixed_rows

    def record(x: Tensor, conditions: Any, weights: Any, keep: Tensor) -> Tensor:
        used.append(list(weights))
        return mixed_rows(x, conditions, weights, keep)

    module.network.mixed_rows = record  # type: ignore[method-assign, assignment]
    asked = Request(CAPTIONS[:1], [0])
    module.sample_tokens(asked)
    assert [len(w) for w in used] == [1, 2, 2, 2]  # the first step has scale 1
    assert [w[0] for w in used] == pytest.approx([1, 5 / 3, 7 / 3, 3])
    assert all(sum(w) == pytest.approx(1) for w in used)
    used.clear()
    module.sample_tokens(asked, module.settings({"guidance_start": 0.0, "guidance_end": 0.0}))
    assert used == [[1.0]] * 4


@pytest.mark.parametrize("kind", ["muse", "uvit"])
def test_negative_prompts_and_blends(kind: str, make: Make) -> None:
    module, seeds = exact(make(kind, random=0.3)), [1, 2]
    prompts, others = CAPTIONS[:2], [CAPTIONS[3]] * 2

    def draw(guidance: float | None = None, **options: Any) -> Tensor:
        scales = {} if guidance is None else {"guidance_start": guidance, "guidance_end": guidance}
        return module.sample_tokens(Request(prompts, seeds, **options), module.settings(scales))

    # guidance between two equal conditions is none
    assert torch.equal(draw(1.0), draw(3.0, negative=prompts))
    assert not torch.equal(draw(negative=others), draw())
    assert torch.equal(draw(blend_with=others, blend=0.0), draw())
    whole = module.sample_tokens(Request(others, seeds))
    assert torch.equal(draw(blend_with=others, blend=1.0), whole)


def test_known_tokens_never_change(make: Make) -> None:
    module, start = make(random=0.3), batch("muse", 3)["tokens"]
    mask = torch.rand(start.shape, generator=source(1)) < 0.4
    for sampling in ({}, {"order": "halton"}, {"frozen": False}, {"first_step": 2}):
        asked = Request(CAPTIONS, SEEDS, start=start, mask=mask)
        out = module.sample_tokens(asked, module.settings(sampling))
        assert torch.equal(out[~mask], start[~mask]) and bool((out < K).all())
        assert not torch.equal(out, start)


def test_variations_keep_what_their_first_step_has_opened(make: Make) -> None:
    module, start = make(random=0.3), batch("muse", 3)["tokens"]
    kept = []
    for first in (1, 2, 3):
        states: list[Tensor] = []
        note = partial(lambda found, i, before, after: found.append(before), states)
        settings = module.settings({"first_step": first})
        module.sample_tokens(Request(CAPTIONS, SEEDS, start=start), settings, note)
        ratio = process.mask_ratio("cosine", torch.tensor(first / 4))
        assert (states[0] == K).flatten(1).sum(1).tolist() == [round(16 * float(ratio))] * 4
        known = states[0] != K
        assert torch.equal(states[0][known], start[known]) and len(states) == 4 - first
        kept.append(int(known.sum()))
    assert kept == sorted(kept)


def test_settings_of_sections_are_replaced_one_by_one(make: Make) -> None:
    module = make("superres")
    settings = module.settings({"steps": 7, "superres": {"top_k": 2}})
    assert settings.steps == 7 and settings.guidance_end == 3.0
    assert settings.superres.steps == 3 and settings.superres.top_k == 2
    with pytest.raises(ValueError, match="trained without one"):
        module.sample_tokens(Request(["a"], [0]), module.settings({"order": "critic"}))


def test_a_frozen_encoder_reads_the_empty_caption_once(make: Make) -> None:
    module, asked = make("uvit", random=0.3), []
    encoder: Any = module._attached["text"]
    encode = encoder.encode
    encoder.encode = lambda c, device: (asked.append(c), encode(c, device))[1]
    for number in range(3):
        module.sample_tokens(Request([f"picture {number}"], [0]))
    assert asked.count([""]) == 1 and len(asked) == 4


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("muse", {"num_codes": 13}, r"model\.num_codes must be the tokenizer's 13 codes, got 12"),
    ("uvit", {"num_codes": 13}, r"uvit\.codebook_size must be the tokenizer's 13 codes, got 12"),
    ("muse", {"model": {"text_width": 8}}, r"model\.text_width must be text\.width \(16\)"),
    ("muse", {"model": {"max_side": 3}}, r"model\.max_side must be at least the token grid's 4"),
    ("uvit", {"uvit": {"cond_embed_dim": 8}, "text": BYTES}, "uvit.cond_embed_dim must be text"),
    ("uvit", {"text": {"projected": False}}, "add text.name=clip and text.projected=true"),
    ("uvit", {"critic": {"layers": 1}}, "critic.layers must be 0 with network=uvit"),
    ("uvit", {"uvit": {"downsample": True}, "grid": [5, 4]}, "data.resolution must be a multiple"),
    (
        "superres",
        {"num_codes": 13, "model": {"num_codes": 13}},
        r"superres\.model\.low_num_codes must be the tokenizer's 13 codes",
    ),
    ("superres", {"high": {"num_codes": 13}}, r"superres\.model\.num_codes must be the tokeni"),
    ("superres", {"high": {"grid": [32, 32]}}, r"superres\.model\.max_side must be at least"),
    ("superres", {"high": {"grid": [9, 8]}}, "data.resolution must be a multiple of 2, got 9"),
    (
        "superres",
        {"superres": {"model": {**SUPERRES, "low_max_side": 3}}},
        r"superres\.model\.low_max_side must be at least the token grid's 4, got 3",
    ),
    (
        "superres",
        {"superres": {"model": {**SUPERRES, "text_width": 8}}},
        r"superres\.model\.text_width must be text\.width \(16\)",
    ),
    ("superres", {"superres": {"factor": 8}}, r"superres\.model\.max_side must be at least"),
]


@pytest.mark.parametrize(("kind", "sections", "message"), MISFITS, ids=lambda v: str(v)[:40])
def test_sections_that_do_not_fit(
    kind: str, sections: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **sections)


# The super-resolution stage ----


def test_low_tokens_of_training(upscaler: Any) -> None:
    given = high_batch()
    real = upscaler()
    assert torch.equal(real.low_tokens(given, source()), given["low"])
    pictures = {"image": Greys().decode(given["tokens"]), "caption": given["caption"]}
    assert torch.equal(real.low_tokens(pictures, source()), given["low"])
    predicted, many = upscaler(low="predicted", low_rate=1.0), high_batch(n=64)
    low = predicted.low_tokens(many, source())
    share = float((low != many["low"]).float().mean())
    assert 0.3 < share < 0.6 and bool((low < K).all())  # half are masked, 11 of 12 guesses wrong
    assert torch.equal(low, predicted.low_tokens(many, source()))
    few = upscaler(low="predicted", low_rate=0.01).low_tokens(given, source())
    assert torch.equal(few, given["low"])  # less than half a token


def test_the_base_is_not_trained_by_its_super_resolution(upscaler: Any) -> None:
    stage = upscaler(low="predicted", optim={"lr": 1e-2})
    before = {k: v.clone() for k, v in stage._attached["base"].state_dict().items()}
    trainer = fit(stage, 1)
    assert same(before, stage._attached["base"].state_dict())
    assert not any("base" in name for name in stage.state_dict())
    groups = trainer.optimizers[0].param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(stage.parameters()))


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_of_the_stage_gets_a_gradient(drop: float, upscaler: Any) -> None:
    stage = upscaler(random=0.3, objective={"text_drop": drop})
    stage.loss(high_batch(), source())[0].backward()
    without = [n for n, p in stage.named_parameters() if p.grad is None]
    assert without == []


def test_learns_to_enlarge(upscaler: Any) -> None:
    """Each low token becomes its 2x2 square, for low tokens that training never showed."""
    model = {**SUPERRES, "dropout": 0.0, "hidden": 32, "low_layers": 0, "qk_norm": True}
    stage = upscaler(model=model).train()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    for i in range(80):
        loss, _ = stage.loss(high_batch(i, 16), source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = high_batch(999)
    settings = stage.settings({"superres": {"guidance_end": 1.0}})
    drawn = stage.eval().sample_tokens(Request(CAPTIONS, SEEDS, low=fresh["low"]), settings)
    assert (drawn == fresh["tokens"]).float().mean() > 0.9


def test_stages_do_not_depend_on_their_batch(make: Make) -> None:
    module = exact(make("superres", random=0.3))
    exact(module.superres)
    together = module.sample(Request(CAPTIONS, SEEDS))
    for i, caption in enumerate(CAPTIONS):
        assert torch.equal(module.sample(Request([caption], [SEEDS[i]]))[0], together[i])
    more = module.settings({"superres": {"steps": 5}})
    other = module.sample(Request(CAPTIONS, SEEDS), more)
    assert not torch.equal(other, together)


def test_sizes_of_pictures_masks_and_tokens(make: Make) -> None:
    base, both = make(), make("superres")
    assert (base.pixels_per_token, base.pixels_per_cell, base.size_unit) == (2, 2, 2)
    assert (both.pixels_per_token, both.pixels_per_cell, both.size_unit) == (4, 2, 4)
    model = {**SUPERRES, "block": 4}
    coarse = make("superres", superres={"model": model})
    assert coarse.size_unit == 8  # blocks of 4 high-res tokens of 2 pixels
    assert make("uvit", uvit={"downsample": True}).size_unit == 4
    assert base.fixed_size and both.fixed_size and not make("uvit").fixed_size


def test_a_frozen_encoder_is_held_once(make: Make, clip_folder: str) -> None:
    text = {"name": "clip", "path": clip_folder, "projected": True}
    module = make("superres", text=text)
    stage: Any = module.superres
    assert stage._attached["text"] is module._attached["text"]


def test_the_stage_needs_low_tokens(make: Make) -> None:
    stage: Any = make("superres").superres
    with pytest.raises(ValueError, match="needs low"):
        stage.sample_tokens(Request(CAPTIONS, SEEDS))
