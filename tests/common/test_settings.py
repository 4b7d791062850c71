"""Settings to plain containers and back."""

import json
from dataclasses import dataclass, field

import pytest

from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.settings import build, plain
from lightning_modules.paella.config import PRESETS, PaellaConfig
from lightning_modules.vqgan.config import VQGANConfig


@dataclass
class Inner:
    size: int = 3
    names: list[str] = field(default_factory=lambda: ["a"])


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    rate: float = 0.5


def test_nested_sections_come_back() -> None:
    made = Outer(Inner(5, ["x", "y"]), Inner(1), 0.25)
    assert build(Outer, plain(made)) == made
    assert build(Outer, json.loads(json.dumps(plain(made)))) == made


@pytest.mark.parametrize("cls", [PaellaConfig, VQGANConfig, OptimConfig, TextConfig])
def test_the_papers_settings_come_back_through_json(cls: type) -> None:
    assert build(cls, json.loads(json.dumps(plain(cls())))) == cls()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset: str) -> None:
    made = PaellaConfig(sampling=PRESETS[preset])
    assert build(PaellaConfig, plain(made)) == made


def test_missing_keys_take_their_defaults() -> None:
    assert build(Outer, {}) == Outer()
    assert build(Outer, {"inner": {"size": 7}, "maybe": None}) == Outer(Inner(7))
    assert build(Outer, {"maybe": {"size": 7}}).maybe == Inner(7)
    given = Inner(9)
    assert build(Outer, {"inner": given}).inner is given


def test_unknown_keys_are_named_with_their_section() -> None:
    with pytest.raises(ValueError, match=r"Outer has no setting 'rat'.*'rate'"):
        build(Outer, {"rat": 1})
    with pytest.raises(ValueError, match="Inner has no setting 'sizes'"):
        build(Outer, {"inner": {"sizes": 1}})


@pytest.mark.parametrize(
    ("cls", "wrong", "said"),
    [
        (TextConfig, {"width": 9}, "width must be even and at least 2, got 9"),
        (TextConfig, {"max_length": 0}, "max_length must be at least 1, got 0"),
        (OptimConfig, {"lr": 0.0}, "lr must be positive"),
        (OptimConfig, {"betas": [0.9]}, "betas must be two numbers"),
        (OptimConfig, {"ema": 1.0}, r"ema must be in \[0, 1\)"),
        (PaellaConfig, {"sampling": {"steps": 0}}, "steps must be at least 1, got 0"),
    ],
)
def test_ranges_are_checked_when_built(cls: type, wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(cls, wrong)
