"""What a training takes: the plan against modules that are really built, and what they keep."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from experiments import run as command
from experiments.papers.registry import PAPERS, load
from experiments.pipeline.memory import GIB, need, needs, parse_bytes, share
from experiments.pipeline.plan import plan
from experiments.pipeline.train import FirstStageRecipe, Train
from experiments.settings import ConfigError
from lightning_modules.common import meta
from lightning_modules.common.blocks import blocks_of, recompute_blocks
from lightning_modules.common.optim import adamw

GENERATORS = ["paella", "vq_diffusion", "improved_vqd", "muse", "ldmae"]
# attention that drops out keeps the matrix of all pairs on a CPU, and no such thing on a GPU
STILL = {
    "paella": ["model.dropout=0"],
    "muse": ["model.dropout=0", "superres.model.dropout=0"],
}


def trainings(paper: str, *words: str) -> tuple[Any, list[Train]]:
    run = load(paper, "micro", [*STILL.get(paper, []), "trainer.accelerator=cpu", *words])
    return run, [s for s in plan(paper, run).stages if isinstance(s, Train)]


def built(stage: Train, run: Any, monkeypatch: Any) -> Any:
    """The module itself, with numbers."""
    with monkeypatch.context() as patch:
        for module in ("experiments.pipeline.train", "experiments.papers.muse"):
            patch.setattr(f"{module}.blank", lambda make: make().train())
        first = isinstance(stage.recipe, FirstStageRecipe)
        return stage.recipe.blank(None if first else run.geometry())


def held(values: Any) -> int:
    return sum(v.nbytes for v in values)


@pytest.mark.parametrize("paper", list(PAPERS))
def test_weights_gradients_and_optimizer_are_exact(paper: str, monkeypatch) -> None:
    run, stages = trainings(paper, *(["optim.ema=0.9"] if paper in GENERATORS else []))
    assert stages
    for stage in stages:
        found, module = need(stage, run), built(stage, run, monkeypatch)
        optimizer = adamw(module.optim, [module])
        for p in module.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        trained = [p for p in module.parameters() if p.grad is not None]
        assert found.parameters == sum(p.numel() for p in trained)
        assert found.weights == held([*module.parameters(), *module.buffers()])
        assert found.gradients == held(p.grad for p in trained)
        assert found.optimizer == held(v for s in optimizer.state.values() for v in s.values())
        ema = getattr(module.optim, "ema", 0) > 0
        assert found.average == (held(module.state_dict().values()) if ema else 0)


def real_numbers(module: Any, run: Any, loop: Any) -> dict[str, Any]:
    """Give a module what `memory.kept` gives one without numbers; returns a batch."""
    text, (width, pooled), geometry = run.text, module.text_widths, run.geometry()

    def encode(captions: list[str]) -> meta.Condition:
        n = len(captions)
        tokens = torch.randn(n, text.max_length, width, requires_grad=True)
        vector = torch.randn(n, pooled, requires_grad=True) if pooled else None
        mask = torch.ones(n, text.max_length, dtype=torch.bool)
        return meta.Condition(tokens, mask, vector)

    module.encode_text = encode
    first = meta.BlankFirstStage(geometry.factor, geometry.channels)
    lower = hasattr(module, "low_tokens")
    module.attach(first, **({"low": first, "base": first} if lower else {}))
    count, grid = loop.batch_size, module.grid
    batch: dict[str, Any] = {"caption": ["a caption"] * count}
    batch["tokens"] = torch.zeros(count, *grid, dtype=torch.int64)
    batch["label"] = torch.zeros(count, dtype=torch.int64)
    if geometry.channels:
        batch["moments"] = torch.randn(count, 2 * geometry.channels, *grid)
    if lower:
        batch["low"] = torch.zeros(count, *module.low_grid, dtype=torch.int64)
    return batch


@pytest.mark.parametrize("paper", GENERATORS)
def test_activations_are_what_a_batch_keeps(paper: str, monkeypatch) -> None:
    run, stages = trainings(paper)
    for stage in stages:
        if isinstance(stage.recipe, FirstStageRecipe):
            continue
        module = built(stage, run, monkeypatch)
        batch = real_numbers(module, run, stage.loop)
        # every token is masked, which is the most that there can be
        monkeypatch.setattr(
            "lightning_modules.muse.process.scattered_mask",
            lambda number, scores: torch.ones_like(scores, dtype=torch.bool),
        )
        generator = torch.Generator().manual_seed(1)
        measured = meta.kept_by(module, lambda: module.loss(batch, generator)).bytes()  # noqa: B023
        estimated = need(stage, run).activations
        assert estimated == pytest.approx(measured, rel=0.02)


def test_what_is_kept_is_what_hooks_of_torch_see() -> None:
    """A slow independent count on a network of two layers: storages once, weights never."""
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    kept = meta.kept_by(net, lambda: net(x).square().sum())
    # x, the input of GELU, its output, and the output that is squared: float32
    assert kept.bytes() == 4 * 3 * (4 + 8 + 8 + 2)
    assert kept.blocks == [] and kept.bytes(recomputed=True) == kept.bytes()


def test_recomputing_keeps_what_enters_blocks() -> None:
    run, (*_, stage) = trainings("vq_diffusion", "model.n_layer=6")
    whole = need(stage, run).activations
    run.trainer.checkpoint_activations = True
    less = need(stage, run).activations
    assert less is not None and whole is not None and less < 0.6 * whole
    # a network that does so of itself is no other
    module = stage.recipe.blank(run.geometry())
    recompute_blocks(module)
    monkey = lambda geometry: module  # noqa: E731
    object.__setattr__(stage.recipe, "blank", monkey)
    run.trainer.checkpoint_activations = False
    assert need(stage, run).activations == less
    assert not any(block.recomputed for block in blocks_of(module))


def test_shards_are_rows_shared_out() -> None:
    tensor = torch.zeros(5, 3)
    assert [share(tensor, n) for n in (1, 2, 4, 8)] == [60, 36, 24, 12]
    one, stages = trainings("paella", "trainer.devices=2")
    copies = need(stages[-1], one)
    one.trainer.strategy = "fsdp"
    shards = need(stages[-1], one)
    assert copies.weights / 2 <= shards.weights < copies.weights * 0.6
    assert shards.optimizer < copies.optimizer * 0.6
    assert copies.copies >= copies.gradients  # buckets


def test_lower_precision_keeps_less_and_copies_weights() -> None:
    found = {}
    for precision in ("bf16-mixed", "32-true"):
        run, stages = trainings("muse", f"trainer.precision={precision}")
        found[precision] = next(need(s, run) for s in stages if s.name == "train")
    half, whole = found.values()
    assert half.activations is not None and whole.activations is not None
    assert half.activations < whole.activations and half.copies > 0 == whole.copies


# The command ----


def told(capsys, *words: str) -> str:
    assert command.run(["--plan", *words]) == 0
    return capsys.readouterr().out


def test_models_of_a_billion_are_planned_without_memory(capsys) -> None:
    out = json.loads(
        told(
            capsys,
            "--paper",
            "paella",
            "--scale",
            "paper",
            "data=scenes",
            "--memory",
            "80GiB",
            "--json",
        )
    )
    base = out["trainings"][-1]
    assert base["parameters"] == 1_008_350_592 and out["devices"] == 128
    assert base["samples"] == 1_500_000 * 2048 and base["tokens"] == base["samples"] * 64 * 64
    assert out["memory"] == 80 * GIB and out["fits"] is True


def test_what_does_not_fit_is_told_with_a_way_out(capsys) -> None:
    words = ["--paper", "vq_diffusion", "--scale", "micro", "model.n_layer=8"]
    run = load("vq_diffusion", "micro", words[4:])
    total = max(n.total for n in needs(plan("vq_diffusion", run), run))
    out = told(capsys, *words, "--memory", f"{total / 2**20 * 1.05:.6f}MiB")
    assert "does not fit: train takes" in out
    assert "with trainer.checkpoint_activations=true it does" in out
    out = told(capsys, *words, "--memory", "1MB")
    assert "take a smaller trainer.batch_size" in out
    assert "fits:" in told(capsys, *words, "--memory", "1GiB")


def test_words_that_are_wrong(monkeypatch) -> None:
    assert [parse_bytes(w) for w in ("80GiB", "1.5 GB", "2MiB")] == [80 * GIB, 1.5e9, 2**21]
    for words, message in (
        (["--memory", "80"], "--memory 80: write a number and a unit, such as 80GiB or 24GB"),
        (["--days", "0"], "--days must be a number above 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            command.run(["--plan", "--paper", "paella", "--scale", "micro", *words])
    with pytest.raises(ConfigError, match=r"^--memory goes with --plan"):
        command.run(["--paper", "paella", "--scale", "micro", "--memory", "80GiB"])


def test_a_device_that_is_not_here_is_asked_for(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = told(capsys, "--paper", "paella", "--scale", "micro", "trainer.accelerator=cuda")
    assert "say --memory 80GiB to know whether it fits" in out
