"""What `sweeps/common_grid.yaml` says is equal in all papers is."""

from pathlib import Path
from typing import Any

import pytest

from experiments.grid import SweepRun, make_runs, read_sweep
from experiments.papers.base import GeneratorRun
from experiments.pipeline.train import GeneratorRecipe, Train

SWEEP = Path(__file__).parents[2] / "sweeps" / "common_grid.yaml"
BUDGETS, GUIDANCE = [4, 8, 12, 16, 32, 64], [1.0, 2.0, 4.0, 8.0]
PAPERS = ["paella", "improved_vqd", "muse", "ldmae"]


@pytest.fixture(scope="module")
def runs() -> list[SweepRun]:
    return make_runs(read_sweep(SWEEP), [], None)[1]


@pytest.fixture(scope="module")
def trainings(runs) -> dict[str, tuple[Any, Train]]:
    """Paper -> settings and training of its first run; all its runs share that one."""
    found: dict[str, tuple[Any, Train]] = {}
    for run in runs:
        (train,) = run.plan.trainings
        assert found.setdefault(run.paper, (run.config, train))[1].key == train.key
    return found


def test_every_paper_has_every_budget_and_guidance(runs) -> None:
    asked = [tuple(r.settings.values()) for r in runs]
    assert asked == [(p, n, g) for p in PAPERS for n in BUDGETS for g in GUIDANCE]
    for run in runs:
        sampling, (paper, steps, scale) = run.config.sampling, run.settings.values()
        own = {"muse": "guidance_end", "paella": "guidance_end"}.get(paper, "guidance")
        assert sampling.steps == steps and getattr(sampling, own) == scale
        starts = {"muse": 1.0, "paella": scale}
        assert paper not in starts or sampling.guidance_start == starts[paper]


def test_plain_vq_diffusion_is_drawn_once_per_budget(runs) -> None:
    drawn = {r.plan.samples["vq_diffusion"].key for r in runs if r.paper == "improved_vqd"}
    assert len(drawn) == len(BUDGETS)


def test_networks_have_one_size_and_text_encoders_are_equal(trainings) -> None:
    sizes, texts = {}, {}
    for paper, (config, train) in trainings.items():
        assert isinstance(config, GeneratorRun) and isinstance(train.recipe, GeneratorRecipe)
        module = train.recipe.blank(config.geometry())
        every = sum(p.numel() for p in module.parameters())
        texts[paper] = {n: tuple(p.shape) for n, p in module.text_encoder.named_parameters()}
        sizes[paper] = every - sum(p.numel() for p in module.text_encoder.parameters())
    assert list(sizes) == PAPERS and max(sizes.values()) < 1.05 * min(sizes.values())
    assert 1.9e6 < min(sizes.values()) and all(t == texts["muse"] for t in texts.values())


def test_samples_data_and_prompts_are_equal(trainings) -> None:
    (first, train), *others = trainings.values()
    assert (train.loop.epochs * train.loop.length, train.loop.batch_size) == (1600, 64)
    for config, other in others:
        assert other.loop == train.loop and other.seed == train.seed
        assert config.data == first.data and config.eval == first.eval
        assert config.text == first.text
        assert config.geometry().grid == first.geometry().grid == (8, 8)
    tokens = [config.geometry().num_codes for config, _ in trainings.values()]
    assert tokens == [512, 512, 512, None]
    files = {config.first_stage_file() for config, _ in trainings.values()}
    assert len(files) == 2  # one tokenizer, and the autoencoder of LDMAE


def test_as_many_captions_are_hidden_in_training(trainings) -> None:
    shares = {
        "paella": trainings["paella"][0].objective.text_drop,
        "improved_vqd": trainings["improved_vqd"][0].null_condition.drop,
        "muse": trainings["muse"][0].objective.text_drop,
        "ldmae": trainings["ldmae"][0].model.class_dropout_prob,
    }
    assert set(shares.values()) == {0.1}
