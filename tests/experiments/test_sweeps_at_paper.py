"""Every point of every sweep fits its paper at full size: planned, and built without numbers."""

from pathlib import Path

import pytest

from experiments.distributions import listed
from experiments.grid import make_runs, read_sweep
from experiments.papers.base import GeneratorRun

FILES = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
DRAWN = ["data=scenes", "data.root=null", "data.shards=null"]
CODES = ["tokenizer.ckpt=null", "tokenizer.model.num_codes=2887"]
# in place of files that nobody has here
STAND_INS = {
    "paella": ["tokenizer.ckpt=null"],
    "vq_diffusion": CODES,
    "improved_vqd": CODES,
    "muse": ["tokenizer.ckpt=null", "superres.enabled=false"],
    "ldmae": ["autoencoder.ckpt=null", "data.flip=false"],
    "autoencoder": ["data.flip=false"],
    "vqgan": [],
}
FULL = [path for path in FILES if path.stem != "common_grid"]  # whose networks are small by design


@pytest.fixture(scope="module")
def built() -> dict[str, int]:
    """Key of a training -> parameters of its module; sweeps share many."""
    return {}


@pytest.mark.parametrize("path", FULL, ids=lambda p: p.stem)
def test_every_point_is_built(path: Path, built: dict[str, int]) -> None:
    sweep = read_sweep(path)
    (paper,) = listed(sweep.forms["paper"]) or []
    _, runs = make_runs(sweep, ["--scale=paper", *DRAWN, *STAND_INS[paper]], None)
    for run in runs:
        assert run.scale == "paper" and run.plan.trainings
        geometry = run.config.geometry() if isinstance(run.config, GeneratorRun) else None
        for training in run.plan.trainings:
            if training.key not in built:
                parameters = [*training.recipe.blank(geometry).parameters()]
                assert all(p.is_meta for p in parameters)
                built[training.key] = sum(p.numel() for p in parameters)
