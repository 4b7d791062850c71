"""Checkpoints as modules: what they name, what stands beside them, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.files import file_hash
from lightning_modules.common.checkpoint import save_weights
from lightning_modules.common.request import Request
from lightning_modules.improved_vqd.module import ImprovedVQDModule
from lightning_modules.registry import load_first_stage, load_generator
from lightning_modules.vqgan.module import VQGANModule
from tests.tiny_generators import MUSE, K, same, tiny

TOKENIZER = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
    "embed_dim": 4,
    "num_codes": K,
    "norm_groups": 4,
}
SAMPLING = {"steps": 3, "guidance_end": 2.0, "superres": {"steps": 4, "top_k": 5}}
HIGH = {"grid": [8, 8], "num_codes": K}
SUPERRES = {
    "enabled": True,
    "model": {**MUSE, "low_num_codes": K, "low_layers": 1, "low_max_side": 4, "block": 2},
}
ASKED = Request(["a red circle", "two"], [1, 2])

Save = Callable[..., Path]


def named(file: Path, folder: Path) -> dict[str, str]:
    return {"file": str(file.relative_to(folder)), "sha256": file_hash(file)}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a module of random weights, and with `settings` more of its settings."""

    def write(name: str, kind: str, seed: int = 0, **settings: Any) -> Path:
        if kind == "vqgan":
            module: Any = VQGANModule({"model": TOKENIZER, "objective": {"disc_weight": 0.0}})
        elif kind == "superres":
            module = tiny("muse", sampling=SAMPLING, superres=SUPERRES, high=HIGH).superres
        else:
            module = tiny(kind, sampling=SAMPLING if kind == "muse" else {})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
        state, config = module.export()
        save_weights(tmp_path / name, state, {**config, **settings})
        return tmp_path / name

    return write


@pytest.fixture
def run(save: Save, tmp_path: Path) -> Path:
    """A run folder: a base, its first stage below it, and what names it."""
    first = save("stages/first.safetensors", "vqgan")
    save("checkpoint.safetensors", "muse")
    note(tmp_path, first_stage=named(first, tmp_path))
    return tmp_path


def note(folder: Path, **content: Any) -> None:
    """Add to what stands beside a checkpoint."""
    file = folder / "checkpoint.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **content}))


def test_a_run_folder_its_file_and_an_older_one_are_the_same(run: Path, save: Save) -> None:
    module = load_generator(run)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    pictures = module.sample(ASKED)
    assert pictures.shape == (2, 3, 8, 8)
    assert torch.equal(load_generator(run / "checkpoint.safetensors").sample(ASKED), pictures)
    first = named(run / "stages/first.safetensors", run)
    (run / "checkpoint.json").unlink()
    for key in ("tokenizer", "first_stage"):
        save("checkpoint.safetensors", "muse", **{key: first})
        assert torch.equal(load_generator(run).sample(ASKED), pictures)


def test_settings_of_the_call_then_beside_then_inside(run: Path) -> None:
    def read(**sampling: Any) -> tuple[Any, ...]:
        s = load_generator(run, sampling=sampling).config.sampling
        return s.steps, s.guidance_end, s.superres.steps, s.superres.top_k

    assert read() == (3, 2.0, 4, 5)
    note(run, sampling={"steps": 7, "superres": {"steps": 6}})
    assert read() == (7, 2.0, 6, 5)
    assert read(steps=8, superres={"top_k": 2}) == (8, 2.0, 6, 2)
    with pytest.raises(ValueError, match="has no setting 'stepz'"):
        read(stepz=3)


def test_settings_of_a_call_are_those_that_draw(run: Path) -> None:
    module, changed = load_generator(run), load_generator(run, sampling={"steps": 1})
    expected = module.sample(ASKED, module.settings({"steps": 1}))
    assert torch.equal(changed.sample(ASKED), expected)
    assert not torch.equal(module.sample(ASKED), expected)


def test_parts_of_a_checkpoint(run: Path, save: Save) -> None:
    base: Any = load_generator(run)
    part = save("stages/superres.safetensors", "superres", seed=1)
    note(run, parts={"superres": named(part, run)}, sampling={"superres": {"steps": 2}})
    whole: Any = load_generator(run)
    assert base.superres is None and whole.superres.first_stage is whole.first_stage
    assert torch.equal(whole.sample_tokens(ASKED), base.sample_tokens(ASKED))
    assert whole.sample(ASKED).shape == (2, 3, 16, 16)
    assert not whole.superres.training
    # settings beside the checkpoint reach both stages
    asked = whole.settings({"superres": {"steps": 2}})
    assert torch.equal(whole.sample(ASKED), whole.sample(ASKED, asked))
    part.write_bytes(save("stages/other.safetensors", "superres", seed=2).read_bytes())
    with pytest.raises(ValueError, match=r"superres\.safetensors is not the part superres that"):
        load_generator(run)
    part.unlink()
    with pytest.raises(FileNotFoundError, match="needs its part superres, and there is no"):
        load_generator(run)


@pytest.mark.parametrize("key", ["first_stage", "tokenizer"])
def test_further_first_stages(key: str, run: Path, save: Save) -> None:
    high = save("high.safetensors", "vqgan", seed=3)
    own = {**HIGH, key: named(high, run)}
    part = save("stages/superres.safetensors", "superres", seed=1, high=own)
    note(run, parts={"superres": named(part, run)})
    module: Any = load_generator(run)
    expected = load_first_stage(high).state_dict()
    assert same(module.superres.first_stage.state_dict(), expected)
    assert not same(module.first_stage.state_dict(), expected)
    moved = high.rename(run / "stages/high.safetensors")
    with pytest.raises(FileNotFoundError, match=r"first stage high, and .*high\.safetensors"):
        load_generator(run)
    note(run, further={"high": named(moved, run)})
    assert same(load_generator(run).superres.first_stage.state_dict(), expected)  # type: ignore[union-attr]


def test_first_stages_are_known_by_their_content(run: Path, save: Save, tmp_path: Path) -> None:
    first = run / "stages/first.safetensors"
    elsewhere = first.rename(run / "stages/moved.safetensors")
    with pytest.raises(FileNotFoundError, match=r"first\.safetensors; copy it there or name it"):
        load_generator(run)
    module = load_generator(run, elsewhere)
    other = save("other.safetensors", "vqgan", seed=5)
    with pytest.raises(ValueError, match=r"other\.safetensors is not the first stage that"):
        load_generator(run, other)
    # a decoder that was trained further
    finer = save("finer.safetensors", "vqgan", seed=5, tokens_of=file_hash(elsewhere))
    assert torch.equal(load_generator(run, finer).sample_tokens(ASKED), module.sample_tokens(ASKED))
    (run / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"nor a checkpoint\.json beside it names its first stage"):
        load_generator(run, elsewhere)
    (run / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint\.json is no readable JSON"):
        load_generator(run)


def test_files_of_another_kind(run: Path) -> None:
    first, checkpoint = run / "stages/first.safetensors", run / "checkpoint.safetensors"
    with pytest.raises(
        ValueError,
        match="is a checkpoint of vqgan, a first stage, which draws nothing alone, not of paella",
    ):
        load_generator(first)
    for paper, wanted in ((None, "a first stage"), ("vqgan", "a tokenizer")):
        with pytest.raises(ValueError, match=f"is a checkpoint of muse, not {wanted}"):
            load_first_stage(checkpoint, paper=paper)
    with pytest.raises(ValueError, match="is a checkpoint of vqgan, not an autoencoder"):
        load_first_stage(first, paper="autoencoder")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_generator(run / "stages")


def test_a_paper_samples_what_it_adopts(run: Path, save: Save) -> None:
    save("checkpoint.safetensors", "vq_diffusion")
    note(run, sampling={"steps": 2})
    plain, module = (
        load_generator(run),
        load_generator(run, paper="improved_vqd", sampling={"guidance": 1.5}),
    )
    assert isinstance(module, ImprovedVQDModule) and not isinstance(plain, ImprovedVQDModule)
    assert same(plain.state_dict(), module.state_dict())
    assert plain.config.sampling.steps == module.config.sampling.steps == 2
    assert module.config.sampling.guidance == 1.5
    for paper in ("paella", "muse", "none"):
        wanted = f"a checkpoint of vq_diffusion, which {paper} cannot sample"
        with pytest.raises(ValueError, match=wanted):
            load_generator(run, paper=paper)
