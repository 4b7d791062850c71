"""What every paper's generator promises, whichever it is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.request import Request
from tests import tiny_generators
from tests.tiny_generators import (
    BATCHES,
    CAPTIONS,
    GRID,
    KINDS,
    PAPERS,
    Stop,
    asked,
    batch,
    exact,
    fit,
    same,
    source,
    tiny,
    tokens,
)

SEEDS = [3, 1, 4, 1]
OPTIM = {"lr": 1e-2, "ema": 0.9, "warmup_steps": 2, "schedule": "cosine"}
FIELDS = {f.name for f in dataclasses.fields(Request)} - {"prompts", "seeds", "blend"}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_paper = pytest.mark.parametrize("paper", PAPERS)


def close(a: Tensor, b: Tensor) -> None:
    """Tokens are equal; latents are up to what float32 leaves of them after a few steps."""
    torch.testing.assert_close(a, b, rtol=1e-3 * a.is_floating_point(), atol=1e-3)


# Sampling ----


def ways() -> list[Any]:
    found = [(kind, {}) for kind in KINDS]
    found += [
        (paper, changes) for paper, more in tiny_generators.SAMPLERS.items() for changes in more
    ]
    found += [("muse critic", {"order": "critic", "frozen": False})]
    found += [("muse critic", {"sampler": {"name": name}}) for name in ("critic", "p2_critic")]
    found += [("muse learned", {"sampler": {"name": "p2"}})]
    found += [("muse uvit", {"sampler": {"name": "eb", "gamma": 1.0}})]
    found += [
        ("vq_diffusion replacing", {"sampler": {"name": name, "corrections": 2}})
        for name in ("gibbs", "gidd")
    ]
    found += [("vq_diffusion class", {"sampler": {"name": "klass"}})]
    return [pytest.param(*way, id=f"{way[0]} {way[1] or ''}") for way in found]


@pytest.mark.parametrize(("kind", "changes"), ways())
def test_a_picture_is_its_prompt_and_seed(kind: str, changes: dict[str, Any]) -> None:
    module, prompts = exact(tiny(kind, 0.3)), asked(kind)

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return module.sample_tokens(Request(prompts, seeds), module.settings(changes))

    before = torch.get_rng_state()
    together = draw(prompts, SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert together.shape == tokens(kind).shape and together.isfinite().all()
    if not together.is_floating_point():
        assert together.min() >= 0 and together.max() < tiny_generators.K
    for i in (1, 3):
        close(draw([prompts[i]], [SEEDS[i]])[0], together[i])
    close(draw(prompts[::-1], SEEDS[::-1]).flip(0), together)
    other = draw(prompts, [5, 6, 7, 8])
    assert (other != together).flatten(1).any(1).sum() >= 3  # one picture of 16 codes may recur


@every_kind
def test_prompts_matter(kind: str) -> None:
    module, seeds = exact(tiny(kind, 0.3)), list(range(8))
    first, second = (module.sample_tokens(Request([p] * 8, seeds)) for p in asked(kind)[:2])
    assert torch.equal(first, second) == kind.endswith("none")


@every_paper
def test_what_is_asked_besides_matters(paper: str) -> None:
    module, others = exact(tiny(paper, 0.3)), ["blur"] * 4
    plain = module.sample_tokens(Request(CAPTIONS, SEEDS))

    def draw(**more: Any) -> Tensor:
        return module.sample_tokens(Request(CAPTIONS, SEEDS, **more))

    if "negative" in module.ABILITIES:
        assert not torch.equal(draw(negative=others), plain)
    if "blend_with" in module.ABILITIES:
        close(draw(blend_with=others, blend=0.0), plain)
        close(draw(blend_with=others, blend=1.0), module.sample_tokens(Request(others, SEEDS)))
        assert not torch.equal(draw(blend_with=others, blend=0.5), plain)
    if "grid" in module.ABILITIES:
        assert draw(grid=(4, 2)).shape[-2:] == (4, 2)


@every_kind
def test_a_mask_keeps_what_it_keeps(kind: str) -> None:
    module, start = tiny(kind, 0.3), tokens(kind, 3)
    mask = torch.zeros(4, *GRID, dtype=torch.int64)
    mask[0] = 1
    mask[1, 1:3] = 1
    mask[2, 0, 0] = 1  # nothing is left to generate in the last
    drawn = module.sample_tokens(Request(asked(kind), SEEDS, start=start, mask=mask))
    known = (mask == 0).view(4, *[1] * (start.ndim - 3), *GRID).expand_as(start)
    close(drawn[known], start[known])
    assert not torch.equal(drawn[0], start[0]) and not torch.equal(drawn[1], start[1])


@every_kind
def test_what_it_lacks_is_refused_in_one_line(kind: str) -> None:
    module = tiny(kind)
    assert module.ABILITIES <= FIELDS and FIELDS - module.ABILITIES
    for name in FIELDS - module.ABILITIES:
        request = dataclasses.replace(Request(asked(kind), SEEDS), **{name: True})
        with pytest.raises(ValueError, match=f"^this checkpoint's paper cannot take `{name}`$"):
            module.sample_tokens(request)


@every_kind
def test_a_mask_and_a_variation_need_a_picture(kind: str) -> None:
    module, prompts = tiny(kind), asked(kind)
    with pytest.raises(ValueError, match=r"^a mask needs a picture to start from \(start\)$"):
        module.sample_tokens(Request(prompts, SEEDS, mask=torch.ones(4, *GRID)))
    with pytest.raises(ValueError, match=r"^sampling\.first_step needs a picture to start from"):
        module.sample_tokens(Request(prompts, SEEDS), module.settings({"first_step": 1}))


@every_paper
def test_settings_are_replaced_and_checked(paper: str) -> None:
    module = tiny(paper)
    before = dataclasses.asdict(module.config.sampling)
    changed = module.settings({"steps": 2})
    assert dataclasses.asdict(changed) == {**before, "steps": 2}
    assert dataclasses.asdict(module.config.sampling) == before
    with pytest.raises(ValueError, match="SamplingConfig has no setting 'stepz'"):
        module.settings({"stepz": 3})
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0$"):
        module.settings({"steps": 0})
    calls: list[int] = []
    module.sample_tokens(
        Request(CAPTIONS, SEEDS), changed, on_step=lambda i, x, out: calls.append(i)
    )
    assert calls == [0, 1]


@every_paper
def test_pictures_go_through_the_first_stage(paper: str) -> None:
    module = tiny(paper, 0.3)
    images = module.first_stage.decode(tokens(paper, 3))
    mask = torch.zeros(4, *GRID)
    mask[:, 0] = 1
    drawn = module.sample(Request(CAPTIONS, SEEDS, start=images, mask=mask))
    start = module.first_stage.encode(images)
    wanted = module.sample_tokens(Request(CAPTIONS, SEEDS, start=start, mask=mask))
    close(drawn, module.first_stage.decode(wanted))
    with pytest.raises(ValueError, match=r"no first stage yet: call attach\(first_stage\)"):
        PAPERS[paper](module.hparams["config"]).sample(Request(CAPTIONS, SEEDS))


@every_kind
def test_network_calls_are_counted_afresh(kind: str) -> None:
    module, steps, found = tiny(kind), list[int](), list[Tensor]()
    request = Request(asked(kind), SEEDS)
    for _ in range(2):
        steps.clear()
        module.sample_tokens(request, on_step=lambda i, x, out: steps.append(i))
        found.append(module.calls)
    assert torch.equal(*found) and found[0].dtype == torch.int64
    per_step = GRID[1] if kind.endswith("causal") else 1  # whose step is a row
    assert found[0].tolist() == [len(steps) * per_step] * 4


@every_kind
def test_a_listener_hears_of_every_call_and_changes_nothing(kind: str) -> None:
    module, heard = tiny(kind), list[Tensor]()
    request = Request(asked(kind), SEEDS)
    plain = module.sample_tokens(request)
    with module.heard_by(lambda pictures, keep, rows: heard.append(pictures)):
        assert torch.equal(module.sample_tokens(request), plain)
    assert module.calls is not None and sum(map(len, heard)) == int(module.calls.sum())


# The loss ----


@every_kind
def test_all_noise_is_the_generators(kind: str) -> None:
    module, given = tiny(kind, 0.3), batch(kind)
    before = torch.get_rng_state()
    one, two = (module.loss(given, source(7))[0] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)
    other = module.loss(given, source(8))[0]
    if not kind.endswith("causal"):  # which has none but that of dropped captions
        assert not torch.equal(one, other)


@every_kind
def test_the_loss_reaches_every_parameter(kind: str) -> None:
    module = tiny(kind, 0.3)
    loss, scalars = module.loss(batch(kind), source())
    loss.backward()
    assert loss.isfinite() and all(torch.as_tensor(v).isfinite() for v in scalars.values())
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert [n for n, grad in trained.items() if grad is None or not grad.isfinite().all()] == []


@every_paper
def test_pictures_are_encoded_where_no_cache_was(paper: str) -> None:
    module = tiny(paper, 0.3)
    images = module.first_stage.decode(tokens(paper))
    given = {"image": images, "caption": CAPTIONS}
    cached = {"moments": module.first_stage.moments(images)} if paper == "ldmae" else batch(paper)
    one, two = (module.loss({**g, "caption": CAPTIONS}, source())[0] for g in (given, cached))
    assert torch.equal(one, two)


# Training ----


@every_kind
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    whole, half, resumed = (tiny(kind, optim=OPTIM) for _ in range(3))
    fit(whole, 4)
    fit(half, 4, callbacks=[Stop(2)]).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    trainer = fit(resumed, 4, tmp_path / "half.ckpt")
    assert trainer.global_step == whole.average.updates == resumed.average.updates == 4 * BATCHES
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict(), half.state_dict())
    assert same(whole.average.shadow, resumed.average.shadow)


@every_kind
def test_validation_sees_the_exported_weights_and_gives_the_trained_ones_back(kind: str) -> None:
    module, blind = tiny(kind, optim=OPTIM), tiny(kind, optim=OPTIM)
    seen = float(fit(module, 2).callback_metrics["val/loss"])
    fit(blind, 2, limit_val_batches=0)
    assert same(module.state_dict(), blind.state_dict())
    assert same(module.average.shadow, blind.average.shadow)
    trained = module.eval().state_dict()
    losses = []
    for state in (module.export()[0], trained):
        exported = tiny(kind)
        exported.load_state_dict(state)
        with torch.no_grad():
            found = [exported.loss(batch(kind, i), source(i))[0] for i in range(BATCHES)]
        losses.append(float(torch.stack(found).mean()))
    assert seen == pytest.approx(losses[0], rel=1e-5)
    assert seen != pytest.approx(losses[1], rel=1e-5)


@every_paper
def test_a_checkpoint_holds_what_is_trained(paper: str, tiny_t5: str, tmp_path: Path) -> None:
    """Neither the first stage nor a frozen encoder, though both are used."""
    frozen = {"name": "byt5", "path": tiny_t5, "clip": None}
    for text in ({}, frozen):
        module = tiny(paper, text=text, optim={"ema": 0.5})
        own = {name.partition(".")[0] for name in module.state_dict()}
        assert ("text_encoder" in own) == (not text)
        trainer = fit(module, 1)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        for state in (content["state_dict"], content["ema"]["shadow"], module.export()[0]):
            assert state.keys() == module.state_dict().keys()
            assert {name.partition(".")[0] for name in state} == own
        count = sum(len(g["params"]) for g in content["optimizer_states"][0]["param_groups"])
        assert count == len([p for p in module.parameters() if p.requires_grad])


@every_kind
def test_both_kinds_of_checkpoint_draw_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    module, paper = tiny(kind, 0.3), kind.split()[0]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    save_weights(tmp_path / "x.safetensors", *module.export())
    cls, request = PAPERS[paper], Request(asked(kind), SEEDS)
    loaded = cls.load_from_checkpoint(tmp_path / "x.ckpt")
    assembled = cls.assemble(*load_weights(tmp_path / "x.safetensors"), {}, "x.safetensors")
    for again in (loaded, assembled):
        assert again.config == module.config and again.grid == GRID and again.seed == 5
        assert same(module.state_dict(), again.state_dict())
        drawn = again.attach(tiny_generators.first_stage(paper)).eval().sample_tokens(request)
        assert torch.equal(drawn, module.sample_tokens(request))
