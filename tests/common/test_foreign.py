"""What all readers of foreign checkpoints share: each refusal is one sentence with the name."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.common.foreign import (
    check_types,
    count,
    fitted,
    numbers,
    pad_id,
    read_settings,
    shape,
    trained_side,
)


@dataclass
class Config:
    size: int = 1
    rate: float = 0.5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    sizes: list[int] = field(default_factory=list)
    name: str | None = None


def test_good_types_pass() -> None:
    check_types(Config, {"size": 2, "rate": 1, "on": True, "kind": "b", "sizes": [1], "name": None})
    check_types(Config, {"unknown": object()})


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "2"},
        {"size": True},
        {"size": 1.0},
        {"rate": "x"},
        {"on": 1},
        {"kind": "c"},
        {"sizes": 3},
        {"sizes": ["1"]},
        {"name": 3},
        {"size": None},
        {"kind": []},
    ],
    ids=str,
)
def test_wrong_types_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
        check_types(Config, wrong)


def test_shapes_and_numbered_parts() -> None:
    state = {
        "a": torch.zeros(2, 3),
        "none": torch.zeros(0, 3),
        "b.0.x": torch.zeros(1),
        "b.1.x": torch.zeros(1),
        "c.9999999.x": torch.zeros(1),
    }
    assert shape(state, "a", 2) == (2, 3)
    for key, ndim, message in (("a", 4, "a must have 4"), ("none", 2, "none of 0"), ("z", 1, "z")):
        with pytest.raises(ValueError, match=message):
            shape(state, key, ndim)
    assert (count(state, "b"), count(state, "z")) == (2, 0)
    with pytest.raises(ValueError, match=r"lacks z\.0"):
        count(state, "z", 1)
    with pytest.raises(ValueError, match=r"c\.9999999, but not all before"):
        count(state, "c")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, float("inf")]).half(), "not finite"),
        (torch.tensor([1e300, 1.0], dtype=torch.float64), "not finite"),
        (torch.tensor([1, 2]), r"real numbers, got torch\.int64"),
        (torch.tensor([True, False]), r"real numbers, got torch\.bool"),
        (torch.tensor([1j, 2]), r"real numbers, got torch\.complex64"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(value: Tensor, message: str) -> None:
    state = {"weight": torch.zeros(2, 2), "bias": value}
    for check in (
        lambda: fitted(lambda: nn.Linear(2, 2), state, "x"),
        lambda: numbers("bias", value),
    ):
        with pytest.raises(ValueError, match=f"^bias (must )?holds? .*{message}"):
            check()


def test_tensors_get_the_precision_of_the_network() -> None:
    state = nn.BatchNorm1d(2).state_dict()
    found = fitted(
        lambda: nn.BatchNorm1d(2),
        {k: v.half() if v.ndim else v.int() for k, v in state.items()},
        "x",
    )
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in state.items()}
    with pytest.raises(ValueError, match="num_batches_tracked must hold whole numbers"):
        fitted(lambda: nn.BatchNorm1d(2), {k: v.float() for k, v in state.items()}, "x")


def test_settings_beside_a_network(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert read_settings(file) == {}
    file.write_text('{"a": 1}')
    assert read_settings(file) == {"a": 1}
    for text, message in (("[1]", "must hold a mapping"), ("{", "no readable JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json .*{message}|{message}"):
            read_settings(file)
    assert trained_side({}) is None and trained_side({"sample_size": 4}) == 4
    for side in ("4", 0, [4], 4.0, True):
        with pytest.raises(ValueError, match="sample_size must be"):
            trained_side({"sample_size": side})


@pytest.mark.parametrize(
    ("token", "wanted"),
    [("!", 0), ("<|endoftext|>", 49407), ({"content": "!"}, 0), ("[PAD]", None), (3, None)],
)
def test_the_token_that_pads(token: Any, wanted: int | None, tmp_path: Path) -> None:
    assert pad_id(tmp_path) == 49407
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    if wanted is not None:
        assert pad_id(tmp_path) == wanted
    else:
        with pytest.raises(ValueError, match=r"pad_token .*give text\.pad_id"):
            pad_id(tmp_path)
