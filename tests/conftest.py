"""Shared fixtures: the golden cases and a quiet environment."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

pytest_plugins = ["pytest_golden"]
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the same examples every time in CI: a law that fails there can be looked at here
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


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
    """Load a case by "topic/case"; a missing folder fails the test that asks for it."""
    root = Path(request.config.getoption("--golden") or Path(__file__).parent / "golden")

    def load(name: str) -> GoldenCase:
        folder = root / name
        if not (folder / "case.json").exists():
            pytest.fail(f"golden case {name} is missing under {root}")
        case = json.loads((folder / "case.json").read_text())
        weights = folder / "weights.safetensors"
        if "weights_from" in case:
            weights = folder / case["weights_from"]
        loaded = load_file(weights) if weights.exists() else {}
        # stored as float16 where every value is exact; all arithmetic is float32
        loaded = {k: v.float() if v.is_floating_point() else v for k, v in loaded.items()}
        return GoldenCase(name, case, load_file(folder / "io.safetensors"), loaded)

    return load
