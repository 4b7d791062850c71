"""Shared fixtures: the golden cases and a quiet environment."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

pytest_plugins = ["tests.pytest_golden"]
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the same examples every time in CI: a law that fails there can be looked at here
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)  # a busy machine is no fault of a law
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def processor_as_before() -> Iterator[None]:
    """Undo what a door does to a process's arithmetic; hypothesis insists on all floats."""
    yield
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision("highest")


@dataclass(frozen=True)
class GoldenCase:
    """One reference case: its description, tensors and (where there is a network) weights."""

    name: str
    case: dict
    io: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def config(self) -> dict:
        return self.case["config"]

    @property
    def tolerance(self) -> dict:
        return self.case["tolerance"]


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str], GoldenCase]:
    """Load a case by "topic/case"; a missing one fails the test that asks for it.

    Of a topic that the folder of --golden does not have, our own cases are taken; a folder
    without any case is the wrong folder.
    """
    own = Path(__file__).parent / "golden"
    given = Path(request.config.getoption("--golden") or own)
    holds = next(given.rglob("case.json"), None) is not None

    def load(name: str) -> GoldenCase:
        root = given if not holds or (given / name).parent.is_dir() else own
        folder = root / name
        if not (folder / "case.json").exists():
            pytest.fail(f"golden case {name} is missing under {root}")
        case = json.loads((folder / "case.json").read_text())
        weights = folder / "weights.safetensors"
        shared = case.get("weights_from")
        if isinstance(shared, str):  # a case of several networks names one file for each
            weights = folder / shared
        loaded = load_file(weights) if weights.exists() else {}
        # stored as float16 where every value is exact; all arithmetic is float32
        loaded = {k: v.float() if v.is_floating_point() else v for k, v in loaded.items()}
        return GoldenCase(name, case, load_file(folder / "io.safetensors"), loaded)

    return load


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a T5 encoder of random weights, 16 wide."""
    import torch
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    model = T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of an open_clip model, 12 wide, whose random weights lie in a file."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-for-tests")
    torch.save(model.state_dict(), folder / "weights.pt")
    return {"clip": "tiny-for-tests", "clip_pretrained": str(folder / "weights.pt")}
