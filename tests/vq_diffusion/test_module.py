"""VQDiffusionModule: training, resuming, conditions, and every way to sample."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.labels import read_label
from lightning_modules.common.text import Condition
from lightning_modules.vq_diffusion import autoregressive, process
from lightning_modules.vq_diffusion.module import VQDiffusionModule

K, GRID, T, CLASSES = 12, (4, 4), 10, 5
MODEL = {"num_codes": K, "n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_hidden_times": 2,
         "spatial_size": [4, 4], "diffusion_steps": T, "condition_dim": 16}  # fmt: skip
BYTES = {"name": "bytes", "width": 16, "layers": 1, "buckets": 64}
SAMPLING = {"steps": 4, "truncation": 0.9}
CAPTIONS = ["a red circle", "one large blue square, right", "", "two things"]
BATCHES = 3
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "class": {"condition": "class", "class_number": CLASSES, "mlp_type": "conv_mlp"},
    "none": {"condition": "none", "timestep_type": "adalayernorm_abs"},
    "causal": {"causal": True},
}

Make = Callable[..., VQDiffusionModule]


class Colours(nn.Module):
    """A tokenizer without learning: a picture of 2x2 squares of K greys. Its weights are a trap."""

    num_codes, factor = K, 2

    def __init__(self) -> None:
        super().__init__()
        self.trap = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> Tensor:
        return ((images[:, 0, ::2, ::2] + 1) / 2 * (K - 1)).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        grey = tokens.float() / (K - 1) * 2 - 1
        return grey[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)

    def codebook(self) -> Tensor:
        return torch.linspace(-1, 1, K, dtype=self.trap.dtype)[:, None]


@pytest.fixture
def make() -> Make:
    """Make a module of one kind; keyword arguments extend its sections."""

    def build(kind: str = "text", random: float | None = None, **sections: Any) -> Any:
        config: dict[str, Any] = {
            "paper": "vq_diffusion", "seed": 5, "grid": [*GRID], "num_codes": K,
            "model": {**MODEL, **KINDS[kind]}, "text": BYTES, "sampling": SAMPLING,
        }  # fmt: skip
        for name, section in sections.items():
            both = isinstance(section, dict) and name in config
            config[name] = {**config[name], **section} if both else section
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = VQDiffusionModule(config)
            if random:  # at its start the network says next to nothing
                for p in module.parameters():
                    nn.init.normal_(p, std=random)
        module.attach(Colours())
        return module.eval()

    return build


def exact(module: VQDiffusionModule) -> VQDiffusionModule:
    """The module in float64, so that different orders of summing draw no other token."""
    module.double().attach(Colours().double())
    if module.config.model.condition == "text":
        encode_text = module.encode_text

        def double(captions: list[str]) -> Condition:
            c = encode_text(captions)
            return Condition(c.tokens.double(), c.mask)

        module.encode_text = double  # type: ignore[method-assign]
    return module


def batch(seed: int = 0, n: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(K, (n, *GRID), generator=generator),
        "caption": [CAPTIONS[i % 4] for i in range(n)],
        "label": torch.randint(CLASSES, (n,), generator=generator),
    }


def source(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(kind: str) -> list[str]:
    return ["1", "4", "0", "2"] if kind == "class" else CAPTIONS


def fit(
    module: VQDiffusionModule,
    epochs: int,
    ckpt: Path | None = None,
    callbacks: list[L.Callback] | None = None,
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    batches: Any = [batch(i) for i in range(BATCHES)]
    loader: Any = DataLoader(batches, batch_size=None)
    trainer.fit(module.train(), loader, loader, ckpt_path=ckpt)
    return trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(L.Callback):
    """Ends a training after so many epochs, with the schedule of the whole one."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


# Save, reload, resume ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    optim = {"lr": 1e-2, "ema": 0.9, "warmup_steps": 2, "schedule": "cosine"}
    whole = make(kind, optim=optim)
    fit(whole, 4)
    half = make(kind, optim=optim)
    fit(half, 4, callbacks=[Stop(2)]).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    resumed = make(kind, optim=optim)
    trainer = fit(resumed, 4, tmp_path / "half.ckpt")
    assert trainer.global_step == 4 * BATCHES
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict(), half.state_dict())
    assert whole.average is not None and resumed.average is not None
    assert same(whole.average.shadow, resumed.average.shadow)


@pytest.mark.parametrize("kind", KINDS)
def test_reloads_with_safe_loading(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    module = make(kind, random=0.3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = VQDiffusionModule.load_from_checkpoint(tmp_path / "x.ckpt").attach(Colours()).eval()
    assert same(module.state_dict(), again.state_dict())
    assert again.config == module.config and again.grid == GRID and again.seed == 5
    one, two = (m.sample_tokens(prompts(kind), seeds=[1, 2, 3, 4]) for m in (module, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_what_is_trained(kind: str, make: Make, tmp_path: Path) -> None:
    module = make(kind, optim={"ema": 0.5})
    trainer = fit(module, 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    rooms = {"network", "loss_history", "loss_count"}
    if kind in ("text", "causal"):
        rooms.add("text_encoder")
    for state in (content["state_dict"], content["ema"]["shadow"], module.export()[0]):
        assert {name.partition(".")[0] for name in state} == rooms
        assert state.keys() == module.state_dict().keys()
    trained = sum(len(g["params"]) for g in content["optimizer_states"][0]["param_groups"])
    assert trained == len(list(module.parameters()))


def test_a_frozen_text_encoder_is_in_no_checkpoint(make: Make) -> None:
    module = make(text={"name": "clip", "path": "nowhere"})
    assert module.text_encoder is None
    assert {name.partition(".")[0] for name in module.state_dict()} == {
        "network", "loss_history", "loss_count",
    }  # fmt: skip


# The loss ----


@pytest.mark.parametrize("times", ["uniform", "importance"])
@pytest.mark.parametrize("rate", [0.9, 0.99999])
def test_the_loss_is_the_papers(rate: float, times: str, make: Make) -> None:
    objective = {"auxiliary_weight": 0.01, "mask_weight": [1.0, 0.5], "times": times}
    module = make(random=0.3, objective=objective, schedule={"mask_rate": rate})
    module.loss_history.copy_(torch.rand(T, generator=source()) * 100)
    module.loss_count.fill_(20)
    given = batch(n=6)
    loss, scalars = module.loss(given, source())
    tokens, chance = given["tokens"], source()
    law = torch.full((T,), 1 / T)
    if times == "importance":
        law = process.time_law(module.loss_history, module.loss_count)
    t = process.draw_times(law, torch.rand(6, generator=chance))
    schedule = process.mask_schedule(T, K, rate)
    uniforms = torch.rand(2, *tokens.shape, generator=chance)
    numbers = (schedule.mask[t].float(), schedule.replaced[t].float())
    x_t = process.corrupt(tokens, *numbers, K, uniforms)
    text = module.encode_text(given["caption"])
    logits = module.network(x_t, t, text.tokens, text.mask).double()  # [B, N, K]
    kernel = schedule.kernel(t).map(lambda v: v[:, None])
    flat, x_0 = x_t.flatten(1), tokens.flatten(1)
    true = process.posterior(F.one_hot(x_0, K).double(), flat, kernel)
    model = process.posterior(logits.softmax(-1), flat, kernel)
    kl = (torch.xlogy(true, true) - true * model.clamp_min(1e-30).log()).sum(-1)
    nll = -model.gather(-1, x_0[..., None]).squeeze(-1).log()
    ce = F.cross_entropy(logits.flatten(0, 1), x_0.flatten(), reduction="none").view(x_0.shape)
    weight = torch.where(flat == K, 1.0, 0.5)
    bound = torch.where(t == 0, nll.sum(1), (weight * kl).sum(1))
    aux = torch.where(t == 0, nll.sum(1), (weight * ce).sum(1))
    expected = ((bound + (2 - t / T) * 0.01 * aux) / law[t]).sum() / tokens.numel()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    masked = flat == K
    right = (logits.argmax(-1) == x_0)[masked].float().mean()
    torch.testing.assert_close(scalars["accuracy"], right)
    torch.testing.assert_close(
        scalars["bound"], (bound / law[t]).mean().float() / 16, rtol=1e-4, atol=1e-5
    )


def test_the_causal_loss_is_next_token_cross_entropy(make: Make) -> None:
    module, given = make("causal", random=0.3), batch()
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


def test_statistics_of_t_grow_in_training_alone(make: Make) -> None:
    module = make()
    module.loss(batch(), source())
    assert module.loss_count.sum() == 0
    module.train()
    for i in range(3):
        module.loss(batch(), source(i))
    assert module.loss_count.sum() == 12 and (module.loss_history > 0).any()
    seen = module.loss_count > 0
    assert torch.equal(module.loss_history > 0, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_all_chance_is_the_generators(kind: str, make: Make) -> None:
    module = make(kind, random=0.3)
    before = torch.get_rng_state()
    one, two = (module.loss(batch(), source(7))[0] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)
    if kind != "causal":
        assert not torch.equal(one, module.loss(batch(), source(8))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str, make: Make) -> None:
    module = make(kind, random=0.3)
    module.loss(batch(), source())[0].backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_pictures_are_encoded_where_no_cache_gave_tokens(make: Make) -> None:
    module, given = make(random=0.3), batch()
    pictures = {"image": module.tokenizer.decode(given["tokens"]), "caption": given["caption"]}
    assert torch.equal(module.loss(pictures, source())[0], module.loss(given, source())[0])


@pytest.mark.parametrize(("kind", "rate"), [("text", 0.99999), ("class", 0.9), ("causal", 1.0)])
def test_overfits_one_batch_and_draws_it(kind: str, rate: float, make: Make) -> None:
    """A few conditions, a few grids: the loss falls, and each condition gives its grid back."""
    module = make(kind, model={"n_embd": 32, "n_head": 4}, schedule={"mask_rate": rate}).train()
    generator = torch.Generator().manual_seed(0)
    given = {
        "tokens": torch.randint(K, (4, *GRID), generator=generator), "caption": CAPTIONS,
        "label": torch.tensor([1, 4, 0, 2]),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for i in range(150):
        loss, scalars = module.loss(given, source(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(scalars["accuracy"].item())
    assert sum(losses[:5]) / 5 < 0.3 and sum(losses[-20:]) / 20 > 0.9
    drawn = module.eval().sample_tokens(prompts(kind), seeds=[0, 1, 2, 3], steps=5)
    assert (drawn == given["tokens"]).float().mean() > 0.9


# Conditions ----


def test_the_condition_matters(make: Make) -> None:
    for kind, pair in (("text", ["a red circle", "two blue squares"]), ("class", ["1", "2"])):
        module = make(kind, random=0.3)
        drawn = module.sample_tokens([pair[0]] * 8 + [pair[1]] * 8, seeds=[*range(8)] * 2)
        assert not torch.equal(drawn[:8], drawn[8:])
    module = make("none", random=0.3)
    drawn = module.sample_tokens(["x"] * 4 + ["y"] * 4, seeds=[*range(4)] * 2)
    assert torch.equal(drawn[:4], drawn[4:])


def test_labels_come_from_prompts_or_arguments(make: Make) -> None:
    names = ["zero", "one", "two", "three", "light house"]
    module = make("class", random=0.3, classes=names)
    by_name = module.sample_tokens(["a handwritten two", "The Light-house."], seeds=[0, 1])
    by_number = module.sample_tokens(["2", "4"], seeds=[0, 1])
    by_label = module.sample_tokens(["?", "?"], seeds=[0, 1], labels=[2, 4])
    assert torch.equal(by_name, by_number) and torch.equal(by_label, by_number)
    for wrong in ("5", "", "one or two", "house"):
        with pytest.raises(ValueError, match="must ask for one class: a number from 0 to 4"):
            module.check_prompts([wrong])
    module.check_prompts(["3"])
    assert read_label("7", [], 10) == 7 and read_label("a sea lion", ["lion", "sea lion"], 2) == 1
    with pytest.raises(ValueError, match="data with labels, such as data=digits"):
        module.loss({k: v for k, v in batch().items() if k != "label"}, source())
    with pytest.raises(ValueError, match="leaves labels 0 to 4, but the data hold 0 to 7"):
        module.loss({**batch(), "label": torch.tensor([0, 7, 1, 1])}, source())


def test_another_number_of_codes_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"model\.num_codes must be the tokenizer's 12 codes"):
        make(model={"num_codes": 13})


# Sampling ----

SAMPLERS: list[dict[str, Any]] = [
    {"steps": T, "truncation": 1.0},
    {"steps": 4, "truncation": 0.8},
    {"steps": 4, "rule": "released"},
    {"steps": 1},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_a_picture_is_its_prompt_and_seed(kind: str, settings: dict[str, Any], make: Make) -> None:
    module = exact(make(kind, random=0.3, schedule={"mask_rate": 0.9}))
    asked, seeds = prompts(kind), [3, 1, 4, 1]
    together = module.sample_tokens(asked, seeds=seeds, **settings)
    assert together.shape == (4, *GRID) and together.min() >= 0 and together.max() < K
    for i in (1, 3):
        alone = module.sample_tokens([asked[i]], seeds=[seeds[i]], **settings)
        assert torch.equal(alone[0], together[i])
    turned = module.sample_tokens(asked[::-1], seeds=seeds[::-1], **settings)
    assert torch.equal(turned.flip(0), together)
    other = module.sample_tokens(asked, seeds=[5, 6, 7, 8], **settings)
    assert not torch.equal(other, together)
    before = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(module.sample_tokens(asked, seeds=seeds, **settings), together)
    torch.set_rng_state(before)


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_the_network_is_told_the_time(rule: str, make: Make) -> None:
    module = make(random=0.3)
    told: list[int] = []
    mixed_rows = module.network.mixed_rows

    def record(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        told.append(int(t))
        return mixed_rows(x, t, *rest)

    module.network.mixed_rows = record  # type: ignore[method-assign]
    module.sample_tokens(CAPTIONS, seeds=[0, 1, 2, 3], steps=4, rule=rule)
    assert told == ([9, 7, 4, 2] if rule == "exact" else [9, 6, 3, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_keeps_known_tokens(kind: str, make: Make) -> None:
    module = make(kind, random=0.3)
    start = batch(3)["tokens"]
    mask = torch.zeros(4, *GRID, dtype=torch.int64)
    mask[0] = 1
    mask[1, 1:3] = 1
    mask[2, 0, 0] = 1  # nothing is left to generate in the last
    seen: list[Tensor] = []
    drawn = module.sample_tokens(
        prompts(kind), seeds=[0, 1, 2, 3], start=start, mask=mask,
        on_step=lambda i, x, out: seen.extend((x, out)),
    )  # fmt: skip
    for tokens in (*seen, drawn):
        assert torch.equal(tokens[mask == 0], start[mask == 0])
    assert drawn.max() < K and not torch.equal(drawn[0], start[0])
    with pytest.raises(ValueError, match="a mask needs tokens to start from"):
        module.sample_tokens(prompts(kind), seeds=[0, 1, 2, 3], mask=mask)


@pytest.mark.parametrize("rate", [0.5, 0.99999])
def test_a_variation_starts_from_the_picture_noised(rate: float, make: Make) -> None:
    module = make(random=0.3, schedule={"mask_rate": rate}, model={"spatial_size": [32, 32]})
    start = torch.randint(K, (2, 32, 32), generator=source())
    schedule, shares = process.mask_schedule(T, K, rate), []
    for first in (1, 3, 4):
        inputs: list[Tensor] = []
        module.sample_tokens(
            CAPTIONS[:2], seeds=[0, 1], start=start, steps=5, first_step=first,
            on_step=lambda i, x, out, inputs=inputs: inputs.append(x),
        )  # fmt: skip
        assert len(inputs) == 5 - first
        t = process.exact_steps(schedule, 5)[first].t
        expected = float(schedule.keep[t] + schedule.replace[t])
        shares.append((inputs[0] == start).float().mean().item())
        assert shares[-1] == pytest.approx(expected, abs=0.05)
    assert shares == sorted(shares)
    with pytest.raises(ValueError, match=r"first_step needs tokens to start from"):
        module.sample_tokens(CAPTIONS[:2], seeds=[0, 1], first_step=1)
    with pytest.raises(ValueError, match=r"VQ-AR .* makes no variations"):
        make("causal").sample_tokens(CAPTIONS, seeds=[0] * 4, start=batch()["tokens"], first_step=1)


def test_blends_run_from_one_prompt_to_the_other(make: Make) -> None:
    module = exact(make(random=0.3))
    a, b, seeds = ["a red circle"] * 8, ["two blue squares"] * 8, list(range(8))
    plain = [module.sample_tokens(texts, seeds=seeds) for texts in (a, b)]
    blended = [module.sample_tokens(a, seeds=seeds, blend_with=b, blend=s) for s in (0, 1, 0.5)]
    assert torch.equal(blended[0], plain[0]) and torch.equal(blended[1], plain[1])
    assert not torch.equal(blended[0], blended[1])


def test_writing_equals_reading_it_all_again(make: Make) -> None:
    """VQ-AR with remembered keys and values draws what whole forward passes draw."""
    for mlp in ("fc", "conv_mlp"):
        module = exact(make("causal", random=0.3, model={"mlp_type": mlp}))
        cached = module.sample_tokens(CAPTIONS, seeds=[0, 1, 2, 3], truncation=0.8)
        text = module.encode_text(CAPTIONS)
        draws = process.sample_noise([0, 1, 2, 3], 1, GRID)["draws"][0]
        t = torch.zeros(4, dtype=torch.int64)
        x = torch.zeros(4, 16, dtype=torch.int64)
        for i in range(16):
            logits = module.network(x.view(-1, *GRID), t, text.tokens, text.mask)[:, i]
            x[:, i] = draw_rows(
                logits, draws.flatten(1)[:, i], lambda rows: process.truncate(rows, 0.8)
            )
        assert torch.equal(cached.flatten(1), x)


def test_written_tokens_follow_their_law() -> None:
    """The chain rule: with the true conditionals the tokens follow the joint law."""
    joint = torch.rand(3, 3, generator=source()) + 0.05
    joint /= joint.sum()
    n, calls = 6000, iter(range(2))

    def predict(x: Tensor) -> Tensor:
        if next(calls) == 0:
            return joint.sum(1).log().expand(n, -1)
        return joint.log()[x[:, 0, 0]]

    drawn = autoregressive.sample(
        predict, lambda rows: rows, x=torch.zeros(n, 1, 2, dtype=torch.int64),
        draws=torch.rand(n, 1, 2, generator=source()),
    )  # fmt: skip
    counts = torch.bincount(drawn[:, 0, 0] * 3 + drawn[:, 0, 1], minlength=9) / n
    assert (counts - joint.flatten()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_another_grid(make: Make) -> None:
    module = make(random=0.3, model={"spatial_size": [8, 8]})
    assert module.sample_tokens(["x"], seeds=[0], grid=(6, 2)).shape == (1, 6, 2)
    with pytest.raises(ValueError, match="no place for 81 tokens"):
        module.sample_tokens(["x"], seeds=[0], grid=(9, 9))


def test_settings_of_a_call_win_over_the_checkpoints(make: Make) -> None:
    module = make(random=0.3)
    steps: list[int] = []
    module.sample_tokens(["x"], seeds=[0], steps=2, on_step=lambda i, x, out: steps.append(i))
    assert steps == [0, 1]
    with pytest.raises(ValueError, match="SamplingConfig has no setting 'step'"):
        module.sample_tokens(["x"], seeds=[0], step=2)
    with pytest.raises(ValueError, match="steps must be between 1 and the 10 steps"):
        module.sample_tokens(["x"], seeds=[0], steps=11)
    with pytest.raises(ValueError, match="negative prompt needs guidance"):
        module.sample_tokens(["x"], seeds=[0], negative=["y"])


def test_the_draw_is_the_common_one() -> None:
    """Random numbers in, tokens out: what the golden cases test is what samples."""
    for loop in (process.sample, autoregressive.sample):
        assert loop.__kwdefaults__["draw"] is draw_rows
    assert process.sample.__kwdefaults__["transition"] is process.transition
