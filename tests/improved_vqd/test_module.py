"""ImprovedVQDModule: nulls, fine-tuning, guidance and purity of one checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import save_weights
from lightning_modules.common.request import Request
from lightning_modules.improved_vqd.module import ImprovedVQDModule, with_null
from lightning_modules.vq_diffusion.module import VQDiffusionModule
from tests.tiny_generators import (
    CAPTIONS,
    GRID,
    Greys,
    K,
    asked,
    batch,
    draw,
    exact,
    fit,
    same,
    source,
    tiny,
)

SEEDS = [3, 1, 4, 1]
NULLS = ["", "empty", "class", "mean"]  # learned and zero-shot, of texts and of classes


def make(kind: str = "", random: float = 0.3, **sections: Any) -> ImprovedVQDModule:
    """Make a tiny module; keyword arguments extend its sections."""
    return tiny(f"improved_vqd {kind}".strip(), random, **sections)


def make_plain(kind: str = "", **sections: Any) -> VQDiffusionModule:
    return tiny(f"vq_diffusion {kind}".strip(), 0.3, **sections)


# Dropped conditions ----


def loss_of(module: ImprovedVQDModule, given: dict[str, Any], drop: float) -> Tensor:
    module.config.null_condition.drop = drop
    return module.loss(given, source())[0]


@pytest.mark.parametrize("kind", [*NULLS, "causal"])
def test_a_dropped_condition_is_the_null(kind: str) -> None:
    module, given = make(kind), batch()
    shown, dropped = (loss_of(module, given, drop) for drop in (0.0, 1.0))
    assert not torch.isclose(shown, dropped, rtol=1e-4)
    other = {**given, "caption": ["x"] * 4, "label": torch.zeros(4, dtype=torch.int64)}
    torch.testing.assert_close(loss_of(module, other, 1.0), dropped)  # nothing of it is left
    assert not torch.isclose(loss_of(module, other, 0.0), shown, rtol=1e-4)
    null = module._null_condition()
    module._training_condition = lambda given: null  # type: ignore[method-assign]
    torch.testing.assert_close(module.loss(given, source())[0], dropped)
    if kind == "empty":
        untold = {**given, "caption": [""] * 4}
        torch.testing.assert_close(loss_of(make(kind), untold, 0), dropped)


def test_shares_of_what_is_dropped() -> None:
    module = make("empty", null_condition={"drop": 0.3})
    told: list[str] = []
    encode = module.encode_text
    module.encode_text = (
        lambda texts: (  # type: ignore[method-assign]
            told.extend(texts),
            encode(texts[:1]),
        )[1]
    )
    given = {**batch(), "caption": ["x"] * 2000}
    module._training_inputs(given, source())
    assert sum(c == "" for c in told) / 2000 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("kind", [*NULLS, "causal"])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_gets_a_gradient(kind: str, drop: float) -> None:
    """Whatever is hidden: DDP waits for the gradient of a parameter that was not used."""
    module = make(kind, null_condition={"drop": drop})
    module.loss(batch(), source())[0].backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("length", [2, 5, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_the_null_takes_the_place_of_the_text(length: int, masked: bool) -> None:
    tokens, null = torch.randn(3, 5, 4, generator=source()), torch.ones(length, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 5])
    hide = torch.tensor([False, False, True])
    shown, real = with_null(tokens, mask if masked else None, null, hide)
    assert shown.shape == (3, max(5, length), 4)
    if real is None:
        assert length == 5 and not masked
        real = torch.ones(3, 5, dtype=torch.bool)
    assert real.sum(1).tolist() == [5, 2 if masked else 5, length]
    assert torch.equal(shown[2][real[2]], null)
    for i in (0, 1):
        assert torch.equal(shown[i][real[i]], tokens[i][real[i][:5]])


# Guidance and purity ----


@pytest.mark.parametrize("kind", [*NULLS, "causal"])
def test_guidance_is_in_log_space(kind: str) -> None:
    """log p_null + s (log p - log p_null), the null told to all images alike."""
    module, prompts = exact(make(kind)), asked(kind)
    x = torch.randint(K, (4, *GRID), generator=source())
    t = torch.tensor([3])
    own, null = module._condition(prompts), module._null_condition()
    guidance = module.guidance_of(module.settings({"guidance": 4.0}))
    sides, shares = module._sides(Request(prompts, SEEDS), guidance)
    both, weights = shares(4.0, sides(None))
    network = module.network
    found = network.head(network.mixed_rows(x, t, both, weights)).log_softmax(-1)
    log_p, log_null = (
        network.head(network.mixed_rows(x, t, [side], [1.0])).log_softmax(-1)
        for side in (own, null)
    )
    guided = (log_null + 4 * (log_p - log_null)).log_softmax(-1)
    torch.testing.assert_close(found, guided)
    assert not module.guidance_of(module.settings({"guidance": 1.0})).guides


def test_negative_prompts() -> None:
    module = exact(make("empty"))
    plain = draw(module, CAPTIONS, SEEDS)
    assert torch.equal(draw(module, CAPTIONS, SEEDS, negative=[""] * 4), plain)
    # away from the prompt itself: the picture without guidance
    own = draw(module, CAPTIONS, SEEDS, negative=CAPTIONS)
    assert torch.equal(own, draw(module, CAPTIONS, SEEDS, changes={"guidance": 1.0}))
    with pytest.raises(ValueError, match=r"needs model\.condition=text, not class"):
        draw(make("mean"), ["1"], [0], negative=["x"])


def test_plain_settings_sample_as_vq_diffusion_does() -> None:
    module = exact(make("empty"))
    plain = exact(make_plain())
    plain.load_state_dict(module.state_dict())
    changes = {
        "guidance": 4.0,
        "reveal": "constant",
        "tokens_per_call": 3,
        "compare_truncation": 0.7,
    }
    settings = module.settings(changes).plain()
    found = module.sample_tokens(Request(CAPTIONS, SEEDS), settings)
    expected = draw(plain, CAPTIONS, SEEDS, changes={"steps": 5, "truncation": 0.7})
    assert torch.equal(found, expected)
    assert not torch.equal(draw(module, CAPTIONS, SEEDS, changes=changes), found)


@pytest.mark.parametrize("order", ["purity", "random", "diffusion"])
def test_a_mask_keeps_known_tokens(order: str) -> None:
    module = make(schedule={"mask_rate": 0.5})
    start = batch(seed=3)["tokens"]
    mask = torch.zeros(4, *GRID, dtype=torch.int64)
    mask[0] = 1
    mask[1, 1:3] = 1
    seen: list[Tensor] = []

    def note(i: int, x: Tensor, out: Tensor) -> None:
        seen.extend((x, out))

    changes = {"order": order}
    drawn = draw(module, CAPTIONS, SEEDS, note, changes, start=start, mask=mask)
    for x in (*seen, drawn):
        assert torch.equal(x[mask == 0], start[mask == 0])
    assert drawn.max() < K and not torch.equal(drawn[0], start[0])
    # a fixed number of masks opens per call, from masks alone; the posterior starts from noise
    assert (seen[0][mask == 1] == K).all() == (order != "diffusion")
    varied = draw(module, CAPTIONS, SEEDS, None, {**changes, "first_step": 2}, start=start)
    assert varied.max() < K


def test_the_released_tables_fit_what_they_were_made_for() -> None:
    with pytest.raises(ValueError, match=r"^sampling\.reveal=released knows 1024 tokens .* 16 tok"):
        draw(make(sampling={"reveal": "released"}), CAPTIONS, SEEDS)
    draw(make(sampling={"reveal": "released", "order": "diffusion"}), CAPTIONS, SEEDS)  # no table


# One model, two papers ----


def saved(module: Any, path: Path, paper: str, **more: Any) -> Path:
    save_weights(path, module.state_dict(), {**module.hparams["config"], "paper": paper, **more})
    return path


def test_a_plain_checkpoint_is_guided_without_training() -> None:
    plain = make_plain()
    state, config = plain.export()
    module = ImprovedVQDModule.adopt(state, config).attach(Greys()).eval()
    assert same(module.state_dict(), plain.state_dict())
    assert module.config.null_condition.name == "empty" and module.config.sampling.steps == 4
    drawn = draw(module, CAPTIONS, SEEDS)
    assert not torch.equal(drawn, draw(plain, CAPTIONS, SEEDS))
    one = {"guidance": 1.0, "order": "diffusion", "truncation": 0.86}
    same_again = draw(plain, CAPTIONS, SEEDS, changes={"truncation": 0.86})
    assert torch.equal(draw(module, CAPTIONS, SEEDS, changes=one), same_again)
    with pytest.raises(ValueError, match="ImprovedVQDModule takes no checkpoint of muse"):
        ImprovedVQDModule.adopt(state, {**config, "paper": "muse"})


@pytest.mark.parametrize("kind", NULLS)
def test_fine_tuning_starts_from_a_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    plain = make_plain("class" if kind in ("class", "mean") else "")
    path = saved(plain, tmp_path / "checkpoint.safetensors", "vq_diffusion")
    fresh = make(kind)
    for name in (path, tmp_path):  # a file, or the folder of a run
        module = make(kind, init={"ckpt": str(name)})
        assert module.begin("hash")
        for key, value in plain.state_dict().items():
            assert torch.equal(module.state_dict()[key][: len(value)], value), key
    if module.null is not None:
        assert torch.equal(module.null, fresh.null)  # type: ignore[arg-type]
    if kind == "class":
        table = module.state_dict()["network.blocks.0.ln2.emb.weight"]
        torch.testing.assert_close(table[-1], table[:-1].mean(0))
    zero_shot = make(kind, init={"ckpt": str(path), "train": False})
    if kind in ("empty", "mean"):
        assert not zero_shot.begin("hash")
    else:
        with pytest.raises(
            ValueError, match=r"null_condition must be empty with init\.train=false"
        ):
            zero_shot.begin("hash")
    # and from an improved one, whose null it keeps
    module.config.init.ckpt = str(saved(module, tmp_path / "again.safetensors", "improved_vqd"))
    module.begin("hash")
    fit(module, 1)
    assert not torch.equal(
        module.state_dict()["network.to_logits.1.bias"],
        plain.state_dict()["network.to_logits.1.bias"],
    )


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    assert make().begin("hash")
    plain = make_plain()
    other = saved(plain, tmp_path / "a.safetensors", "paella")
    with pytest.raises(ValueError, match=r"a\.safetensors is a checkpoint of paella, not of vq_di"):
        make(init={"ckpt": str(other)}).begin("hash")
    known = saved(plain, tmp_path / "b.safetensors", "vq_diffusion", tokenizer={"sha256": "x"})
    with pytest.raises(ValueError, match=r"b\.safetensors was trained on another first stage"):
        make(init={"ckpt": str(known)}).begin("hash")
    assert make(init={"ckpt": str(known)}).begin("x")
    new = saved(plain, tmp_path / "d.safetensors", "vq_diffusion", first_stage={"sha256": "x"})
    with pytest.raises(ValueError, match=r"d\.safetensors was trained on another first stage"):
        make(init={"ckpt": str(new)}).begin("hash")
    with pytest.raises(ValueError, match=r"init\.ckpt .*b\.safetensors does not fit"):
        make(init={"ckpt": str(known)}, model={"n_layer": 3}).begin("x")
    with pytest.raises(ValueError, match="train must be true without ckpt"):
        make(init={"train": False})
    with pytest.raises(FileNotFoundError):
        make(init={"ckpt": str(tmp_path / "c.safetensors")}).begin("x")
