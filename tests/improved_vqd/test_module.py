"""ImprovedVQDModule: nulls, fine-tuning, guidance and purity of one checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.common.checkpoint import save_weights
from lightning_modules.common.text import Condition
from lightning_modules.improved_vqd.module import ImprovedVQDModule, with_null
from lightning_modules.vq_diffusion.module import VQDiffusionModule

K, GRID, T, CLASSES = 12, (4, 4), 10, 5
MODEL = {"num_codes": K, "n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_hidden_times": 2,
         "spatial_size": [4, 4], "diffusion_steps": T, "condition_dim": 16}  # fmt: skip
BYTES = {"name": "bytes", "width": 16, "layers": 1, "buckets": 64}
CAPTIONS = ["a red circle", "one large blue square, right", "", "two things"]
SEEDS = [3, 1, 4, 1]
CLASS = {"condition": "class", "class_number": CLASSES}
KINDS: dict[str, dict[str, Any]] = {
    "learned": {"null_condition": {"name": "learned", "length": 3}},
    "empty": {"null_condition": {"name": "empty"}},
    "class learned": {"model": {**CLASS, "class_number": CLASSES + 1}},
    "class mean": {"model": CLASS, "null_condition": {"name": "empty"}},
    "none": {"model": {"condition": "none"}},
    "causal": {"model": {"causal": True}, "null_condition": {"name": "learned", "length": 3}},
}

Make = Callable[..., ImprovedVQDModule]


class Colours(nn.Module):
    """A tokenizer without learning: a picture of 2x2 squares of K greys."""

    num_codes, factor = K, 2

    def encode(self, images: Tensor) -> Tensor:
        return ((images[:, 0, ::2, ::2] + 1) / 2 * (K - 1)).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        grey = tokens.float() / (K - 1) * 2 - 1
        return grey[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def build(cls: type, kind: str, random: float | None = 0.3, **sections: Any) -> Any:
    config: dict[str, Any] = {
        "paper": "improved_vqd", "seed": 5, "grid": [*GRID], "num_codes": K, "model": MODEL,
        "text": BYTES, "sampling": {"steps": 5},
    }  # fmt: skip
    for more in (KINDS[kind] if cls is ImprovedVQDModule else {}, sections):
        for name, section in more.items():
            config[name] = {**config.get(name, {}), **section}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = cls(config)
        if random:
            for name, p in module.named_parameters():
                if name != "null":
                    nn.init.normal_(p, std=random)
    return module.attach(Colours()).eval()


@pytest.fixture
def make() -> Make:
    """Make a module of one kind; keyword arguments extend its sections."""
    return lambda kind="learned", *args, **more: build(ImprovedVQDModule, kind, *args, **more)


def exact(module: Any) -> Any:
    """The module in float64, so that different orders of summing draw no other token."""
    module.double()
    encode_text = module.encode_text

    def double(captions: list[str]) -> Condition:
        c = encode_text(captions)
        return Condition(c.tokens.double(), c.mask)

    module.encode_text = double
    return module


def asked(kind: str) -> list[str]:
    return ["1", "4", "0", "2"] if kind.startswith("class") else CAPTIONS


def batch(seed: int = 0, n: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(K, (n, *GRID), generator=generator),
        "caption": [CAPTIONS[i % 4] for i in range(n)],
        "label": torch.randint(CLASSES, (n,), generator=generator),
    }


def source(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(
    module: Any, epochs: int, ckpt: Path | None = None, callbacks: list[L.Callback] | None = None
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    batches: Any = [batch(i) for i in range(3)]
    loader: Any = DataLoader(batches, batch_size=None)
    trainer.fit(module.train(), loader, loader, ckpt_path=ckpt)
    return trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(L.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


# Save, reload, resume ----


@pytest.mark.parametrize("kind", ["learned", "class learned"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    optim = {"lr": 1e-2, "ema": 0.9, "warmup_steps": 2, "schedule": "cosine"}
    whole = make(kind, None, optim=optim)
    fit(whole, 4)
    half = make(kind, None, optim=optim)
    fit(half, 4, callbacks=[Stop(2)]).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(kind, None, optim=optim)
    fit(resumed, 4, tmp_path / "half.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict(), half.state_dict())
    assert same(whole.average.shadow, resumed.average.shadow)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_reloads_with_safe_loading(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    module = make(kind)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = ImprovedVQDModule.load_from_checkpoint(tmp_path / "x.ckpt").attach(Colours()).eval()
    assert same(module.state_dict(), again.state_dict()) and again.config == module.config
    rooms = {name.partition(".")[0] for name in module.state_dict()}
    text = {"text_encoder"} if kind in ("learned", "empty", "causal") else set()
    null = {"null"} if kind in ("learned", "causal") else set()
    assert rooms == {"network", "loss_history", "loss_count"} | text | null
    one, two = (m.sample_tokens(asked(kind), seeds=SEEDS) for m in (module, again))
    assert torch.equal(one, two)


# Dropped conditions ----


def loss_of(module: ImprovedVQDModule, given: dict[str, Any], drop: float) -> Tensor:
    module.config.null_condition.drop = drop
    return module.loss(given, source())[0]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "none"])
def test_a_dropped_condition_is_the_null(kind: str, make: Make) -> None:
    module, given = make(kind), batch()
    shown, dropped = (loss_of(module, given, drop) for drop in (0.0, 1.0))
    assert not torch.isclose(shown, dropped, rtol=1e-4)
    other = {**given, "caption": ["x"] * 4, "label": torch.zeros(4, dtype=torch.int64)}
    torch.testing.assert_close(loss_of(module, other, 1.0), dropped)  # nothing of it is left
    assert not torch.isclose(loss_of(module, other, 0.0), shown, rtol=1e-4)
    null = module._null_side(None)
    module._training_side = lambda batch, generator: (  # type: ignore[method-assign]
        torch.rand(4, generator=generator), null,
    )[1]  # fmt: skip
    torch.testing.assert_close(module.loss(given, source())[0], dropped)
    if kind == "empty":
        torch.testing.assert_close(loss_of(make(kind), {**given, "caption": [""] * 4}, 0), dropped)


def test_shares_of_what_is_dropped(make: Make) -> None:
    module = make("empty", null_condition={"drop": 0.3})
    asked: list[str] = []
    encode = module.encode_text
    module.encode_text = lambda texts: (  # type: ignore[method-assign]
        asked.extend(texts), encode(texts[:1]),
    )[1]  # fmt: skip
    given = {**batch(), "caption": ["x"] * 2000}
    module._training_side(given, source())
    assert sum(c == "" for c in asked) / 2000 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_every_parameter_gets_a_gradient(kind: str, drop: float, make: Make) -> None:
    """Whatever is hidden: DDP waits for the gradient of a parameter that was not used."""
    module = make(kind, null_condition={"drop": drop})
    module.loss(batch(), source())[0].backward()
    missing = [n for n, p in module.named_parameters() if p.grad is None]
    # the text encoder's learned null is the empty caption; all captions can be hidden from it
    assert missing == []


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

SAMPLERS: list[dict[str, Any]] = [
    {},
    {"order": "diffusion", "guidance": 2.0, "truncation": 0.8},
    {"order": "diffusion", "rule": "released"},
    {"order": "random", "tokens_per_call": 2, "guidance": 1.0},
    {"reveal": "constant", "tokens_per_call": 3, "purity_weight": 0.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_a_picture_is_its_prompt_and_seed(kind: str, settings: dict[str, Any], make: Make) -> None:
    module, prompts = exact(make(kind)), asked(kind)
    together = module.sample_tokens(prompts, seeds=SEEDS, **settings)
    assert together.shape == (4, *GRID) and together.min() >= 0 and together.max() < K
    for i in (1, 3):
        alone = module.sample_tokens([prompts[i]], seeds=[SEEDS[i]], **settings)
        assert torch.equal(alone[0], together[i])
    other = module.sample_tokens(prompts, seeds=[5, 6, 7, 8], **settings)
    assert not torch.equal(other, together)


@pytest.mark.parametrize("kind", ["learned", "empty", "class learned", "class mean", "causal"])
def test_guidance_is_in_log_space(kind: str, make: Make) -> None:
    """log p_null + s (log p - log p_null), the null told to all images alike."""
    module, prompts = exact(make(kind)), asked(kind)
    x = torch.randint(K, (4, *GRID), generator=source())
    t = torch.tensor([3])
    settings = module.settings({"guidance": 4.0})
    sides, shares = module._guided([module._side(prompts)], [1.0], settings, None)
    found = module.network.head(module.network.mixed_rows(x, t, sides, shares)).log_softmax(-1)
    log_p, log_null = (
        module.network.head(module.network.mixed_rows(x, t, [side], [1.0])).log_softmax(-1)
        for side in (module._side(prompts), module._null_side(None))
    )
    guided = (log_null + 4 * (log_p - log_null)).log_softmax(-1)
    torch.testing.assert_close(found, guided)
    off = module._guided([sides[0]], [1.0], module.settings({"guidance": 1.0}), None)
    assert off == ([sides[0]], [1.0])


def test_negative_prompts(make: Make) -> None:
    module = exact(make("empty"))

    def draw(**settings: Any) -> Tensor:
        return module.sample_tokens(CAPTIONS, seeds=SEEDS, **settings)

    plain = draw()
    assert torch.equal(draw(negative=[""] * 4), plain)
    assert not torch.equal(draw(negative=["blur"] * 4), plain)
    assert torch.equal(draw(negative=CAPTIONS), draw(guidance=1.0))
    with pytest.raises(ValueError, match=r"needs model\.condition=text, not class"):
        make("class mean").sample_tokens(["1"], seeds=[0], negative=["x"])


def test_one_checkpoint_is_sampled_both_ways(make: Make) -> None:
    """Beside its pictures those that VQ-Diffusion draws of the same weights."""
    module = exact(make("empty"))
    plain = exact(build(VQDiffusionModule, "empty"))
    plain.load_state_dict(module.state_dict())
    settings = {"steps": 5, "guidance": 4.0, "compare_truncation": 0.7}
    made = module.pictures(CAPTIONS, seeds=SEEDS, **settings)
    assert list(made) == ["vq_diffusion", "improved_vqd"]
    expected = plain.sample(CAPTIONS, seeds=SEEDS, steps=5, truncation=0.7)
    assert torch.equal(made["vq_diffusion"], expected)
    assert torch.equal(made["improved_vqd"], module.sample(CAPTIONS, seeds=SEEDS, **settings))
    assert not torch.equal(made["improved_vqd"], made["vq_diffusion"])
    alone = module.pictures(CAPTIONS, seeds=SEEDS, compare=False, **settings)
    assert list(alone) == ["improved_vqd"]


@pytest.mark.parametrize("order", ["purity", "random", "diffusion"])
def test_a_mask_keeps_known_tokens(order: str, make: Make) -> None:
    module = make(schedule={"mask_rate": 0.5})
    start = batch(3)["tokens"]
    mask = torch.zeros(4, *GRID, dtype=torch.int64)
    mask[0] = 1
    mask[1, 1:3] = 1
    seen: list[Tensor] = []
    drawn = module.sample_tokens(
        CAPTIONS, seeds=SEEDS, start=start, mask=mask, order=order,
        on_step=lambda i, x, out: seen.extend((x, out)),
    )  # fmt: skip
    for tokens in (*seen, drawn):
        assert torch.equal(tokens[mask == 0], start[mask == 0])
    assert drawn.max() < K and not torch.equal(drawn[0], start[0])
    # a fixed number of masks opens per call, from masks alone; the posterior starts from noise
    assert (seen[0][mask == 1] == K).all() == (order != "diffusion")
    varied = module.sample_tokens(CAPTIONS, seeds=SEEDS, start=start, first_step=2, order=order)
    assert varied.max() < K


# One model, two papers ----


def saved(module: Any, path: Path, paper: str, **more: Any) -> Path:
    save_weights(path, module.state_dict(), {**module.hparams["config"], "paper": paper, **more})
    return path


def test_a_plain_checkpoint_is_guided_without_training(make: Make) -> None:
    plain = build(VQDiffusionModule, "empty")
    state, config = plain.export()
    module = ImprovedVQDModule.from_plain(state, config).attach(Colours()).eval()
    assert same(module.state_dict(), plain.state_dict())
    assert module.config.null_condition.name == "empty" and module.config.sampling.steps == 5
    drawn = module.sample_tokens(CAPTIONS, seeds=SEEDS)
    assert not torch.equal(drawn, plain.sample_tokens(CAPTIONS, seeds=SEEDS))
    one = {"guidance": 1.0, "order": "diffusion", "truncation": 0.86}
    same_again = module.sample_tokens(CAPTIONS, seeds=SEEDS, **one)
    assert torch.equal(same_again, plain.sample_tokens(CAPTIONS, seeds=SEEDS, truncation=0.86))


@pytest.mark.parametrize("kind", ["learned", "empty", "class learned", "class mean"])
def test_fine_tuning_starts_from_a_plain_checkpoint(kind: str, make: Make, tmp_path: Path) -> None:
    more = {"model": CLASS} if kind.startswith("class") else {}
    plain = build(VQDiffusionModule, kind, **more)
    path = saved(plain, tmp_path / "checkpoint.safetensors", "vq_diffusion")
    fresh = make(kind)
    for name in (path, tmp_path):  # a file, or the folder of a run
        module = make(kind, init={"ckpt": str(name)})
        assert module.begin("hash")
        for key, value in plain.state_dict().items():
            assert torch.equal(module.state_dict()[key][: len(value)], value), key
    if module.null is not None:
        assert torch.equal(module.null, fresh.null)  # type: ignore[arg-type]
    if kind == "class learned":
        table = module.state_dict()["network.blocks.0.ln2.emb.weight"]
        torch.testing.assert_close(table[-1], table[:-1].mean(0))
    zero_shot = make(kind, init={"ckpt": str(path), "train": False})
    if kind in ("empty", "class mean"):
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
    assert not torch.equal(module.state_dict()["network.to_logits.1.bias"],
                           plain.state_dict()["network.to_logits.1.bias"])  # fmt: skip


def test_checkpoints_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    assert make().begin("hash")
    plain = build(VQDiffusionModule, "empty")
    other = saved(plain, tmp_path / "a.safetensors", "paella")
    with pytest.raises(ValueError, match=r"a\.safetensors is a checkpoint of paella, not of vq_di"):
        make(init={"ckpt": str(other)}).begin("hash")
    known = saved(plain, tmp_path / "b.safetensors", "vq_diffusion", tokenizer={"sha256": "x"})
    with pytest.raises(ValueError, match=r"b\.safetensors was trained on another tokenizer"):
        make(init={"ckpt": str(known)}).begin("hash")
    assert make(init={"ckpt": str(known)}).begin("x")
    with pytest.raises(ValueError, match=r"init\.ckpt .*b\.safetensors does not fit"):
        make(init={"ckpt": str(known)}, model={"n_layer": 3}).begin("x")
    with pytest.raises(ValueError, match="train must be true without ckpt"):
        make(init={"train": False})
    with pytest.raises(FileNotFoundError):
        make(init={"ckpt": str(tmp_path / "c.safetensors")}).begin("x")
