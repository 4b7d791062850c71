"""States of captions that a cache brings stand for the frozen encoder in training."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.common.config import TextConfig
from lightning_modules.common.text import (
    ClipTextEncoder,
    Condition,
    FrozenEncoder,
    KnownStates,
    T5Encoder,
)
from tests.tiny_generators import CAPTIONS, KINDS, batch, tiny

CPU = torch.device("cpu")
BY_TEXT = [
    kind for kind in KINDS if not kind.endswith(("class", "none", "mean", "label", "causal"))
]


class Letters(FrozenEncoder):
    """A vector of 16 numbers for every letter, and their mean; notes what it was asked."""

    masked = True

    def __init__(self, masked: bool = True) -> None:
        super().__init__(TextConfig())
        self.masked = masked  # type: ignore[misc]
        self.asked: list[str] = []

    def _load(self, device: torch.device) -> Any:
        raise AssertionError("nothing is loaded")

    def encode(self, captions: list[str], device: torch.device) -> Condition:
        self.asked += captions
        numbers = torch.arange(16.0)
        rows = [torch.stack([(ord(c) * numbers / 7).sin() for c in f"{t}."]) for t in captions]
        if not self.masked:
            rows = [row[:1] for row in rows]
        tokens = pad_sequence(rows, batch_first=True)  # [B, L, 16]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        pooled = torch.stack([row.mean(0) for row in rows])
        return Condition(tokens, mask if self.masked else None, pooled)


def stored(encoder: FrozenEncoder, captions: list[str]) -> dict[str, Tensor]:
    """What a cache holds of captions, and of the empty one."""
    made = encoder.encode([*captions, ""], CPU)
    rows = made.rows()
    assert made.pooled is not None
    lengths = torch.tensor([len(row) for row in rows])
    return {"states": torch.cat(rows), "lengths": lengths, "pooled": made.pooled}


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_known_equals_what_is_encoded(masked: bool) -> None:
    encoder = Letters(masked)
    known = KnownStates(CAPTIONS, **stored(encoder, CAPTIONS))
    for captions in (CAPTIONS, ["", "", CAPTIONS[1]], CAPTIONS[3:]):
        assert known.holds(captions)
        expected, found = encoder.encode(captions, CPU), known.condition(captions, masked)
        assert (found.mask is None) == (expected.mask is None)
        for one, other in zip(expected.rows(), found.rows(), strict=True):
            assert torch.equal(one, other)
        assert expected.pooled is not None and found.pooled is not None
        assert torch.equal(expected.pooled, found.pooled)
    assert not known.holds([*CAPTIONS, "another"])


def test_half_precision_becomes_float32() -> None:
    encoder = Letters()
    half = stored(encoder, CAPTIONS)
    half |= {name: half[name].bfloat16() for name in ("states", "pooled")}
    found = KnownStates(CAPTIONS, **half).condition(CAPTIONS, True)
    assert found.tokens.dtype == torch.float32 and found.pooled is not None
    assert found.pooled.dtype == torch.float32
    torch.testing.assert_close(found.tokens, encoder(CAPTIONS, CPU).tokens, rtol=0, atol=4e-3)


@pytest.mark.parametrize("kind", BY_TEXT)
def test_the_loss_is_the_same_and_nothing_is_encoded(kind: str) -> None:
    """With captions hidden behind the empty one, too: each is hidden in about every third step."""
    drop = {
        "paella": {"objective": {"text_drop": 0.3}},
        "improved_vqd": {"null_condition": {"drop": 0.3}},
        "muse": {"objective": {"text_drop": 0.3}},
        "ldmae": {"model": {"class_dropout_prob": 0.3}},
    }
    module = tiny(kind, 0.3, **drop.get(kind.split()[0], {})).train()
    encoder = Letters()
    module.share_text(SimpleNamespace(_attached={"text": encoder}))
    module.log_scalars = lambda *scalars: None
    given = {**batch(kind, n=16)}
    known = {**given, "text": stored(encoder, given["caption"])}
    losses = []
    for step in range(4):
        for found in (given, known):
            encoder.asked.clear()
            torch.manual_seed(step)  # of dropout
            module.generator = torch.Generator().manual_seed(step)
            losses.append(float(module.training_step(found, step).detach()))
            assert bool(encoder.asked) == (found is given)
    assert losses[::2] == losses[1::2] and len({*losses}) == 4
    assert encoder.known is None
    assert module.encode_text(["not known"]).tokens.shape == (1, 10, 16)


def test_padding_is_masked_by_encoders_that_pad() -> None:
    assert T5Encoder.masked and not ClipTextEncoder.masked
