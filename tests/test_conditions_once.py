"""Captions are encoded, and what networks read of them is prepared, once however many the steps."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.common.config import TextConfig
from lightning_modules.common.request import Request
from lightning_modules.common.text import Condition, FrozenEncoder
from tests.test_sampling_graph import make
from tests.tiny_generators import CAPTIONS

SEEDS = [0, 1, 2, 3]
# kind, settings, encodings and preparations: of the captions, and of a null that is a text
ASKED: list[tuple[str, dict[str, Any], int, int]] = [
    ("paella", {}, 2, 2),
    ("vq_diffusion", {}, 1, 1),
    ("improved_vqd", {}, 1, 2),
    ("improved_vqd empty", {"order": "diffusion"}, 2, 2),
    ("muse", {}, 1, 2),
    ("muse learned", {}, 1, 2),
    ("muse critic", {"order": "critic"}, 1, 3),
    ("muse uvit", {}, 2, 2),
    ("superres", {}, 1, 2),
    ("ldmae", {"guidance": 2.0}, 2, 2),
]


def counted(counts: Counter[str], owner: Any, name: str) -> None:
    """Count the calls of a method."""
    method = getattr(owner, name)

    def counting(*args: Any, **named: Any) -> Any:
        counts[name] += 1
        return method(*args, **named)

    setattr(owner, name, counting)


@pytest.mark.parametrize(("kind", "changes", "encodings", "preparations"), ASKED)
def test_once_per_prompt(
    kind: str, changes: dict[str, Any], encodings: int, preparations: int
) -> None:
    for steps in (2, 4):
        module, more = make(kind)
        counts: Counter[str] = Counter()
        counted(counts, module, "encode_text")
        prepare = "text_side" if kind == "ldmae" else "prepare"
        for network in (module.network, getattr(module, "critic", None)):
            if network is not None:
                counted(counts, network, prepare)
        own = {"superres": {"steps": steps}} if kind == "superres" else {"steps": steps}
        request = Request(CAPTIONS, SEEDS, **more)
        module.sample_tokens(request, module.settings({**changes, **own}))
        assert counts == {"encode_text": encodings, prepare: preparations}


class Frozen(FrozenEncoder):
    """Says how long captions are, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(TextConfig())
        self.asked: list[tuple[str, ...]] = []

    def encode(self, captions: list[str], device: torch.device) -> Condition:
        self.asked.append(tuple(captions))
        return Condition(torch.tensor([[[float(len(c))]] for c in captions]))

    def _load(self, device: torch.device) -> Any:
        return torch.nn.Identity()


def states(encoder: Frozen, *captions: str) -> Tensor:
    return encoder(list(captions), torch.device("cpu")).tokens.flatten()


def test_a_frozen_encoder_remembers_its_last_captions() -> None:
    encoder = Frozen()
    with torch.no_grad():
        for prompts in (("a", "bb"), ("ccc",), ("dddd", "e")):
            for _ in range(2):  # a base and its super-resolution
                assert states(encoder, *prompts).tolist() == [float(len(c)) for c in prompts]
                assert states(encoder, "").tolist() == [0.0]
    assert encoder.asked == [("a", "bb"), ("",), ("ccc",), ("dddd", "e")]
    with torch.no_grad():
        states(encoder, "a", "bb")
        encoder.use(torch.nn.Identity(), torch.device("cpu"))
        states(encoder, "")
    assert encoder.asked[4:] == [("a", "bb"), ("",)]


def test_in_training_captions_change_and_nothing_is_kept() -> None:
    encoder = Frozen()
    for _ in range(2):
        states(encoder, "a")
    assert encoder.asked == [("a",)] * 2
