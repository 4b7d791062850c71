"""The categorical draw against a slow float64 version, and against its own distribution."""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from lightning_modules.common.categorical import DRAWN_AT_ONCE, draw, draw_rows, likeliest

BELOW_ONE = 1 - 2**-24  # the largest uniform that torch.rand gives


def slow_draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """The definition, row by row in float64: how many cumulated probabilities are <= u."""
    tokens = []
    for row, u in zip(logits.double().tolist(), uniforms.double().tolist(), strict=True):
        p = (torch.tensor(row, dtype=torch.float64) / temperature).softmax(0).tolist()
        below, cumulated = 0, 0.0
        for share in p:
            cumulated += share
            below += cumulated <= u
        tokens.append(min(below, max(k for k, share in enumerate(p) if share > 0)))
    return torch.tensor(tokens)


def rows(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * 3, torch.rand(n, generator=generator)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("labels", [1, 2, 17, 300, 1025, 2887])
def test_equals_the_definition(labels: int, temperature: float) -> None:
    logits, uniforms = rows(200, labels)
    expected = slow_draw(logits, uniforms, temperature)
    assert torch.equal(draw(logits.double(), uniforms.double(), temperature), expected)
    # float32 may fall on the other side of a border, once in many thousand draws
    assert (draw(logits, uniforms, temperature) != expected).sum() <= 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    logits, _ = rows(1, 12)
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits.expand(40_000, 12), uniforms, temperature)
    expected = (logits[0].double() / temperature).softmax(0) * 40_000
    often = expected >= 5
    counts = torch.bincount(tokens, minlength=12).double()
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    keep = wanted > 0
    assert chisquare(seen[keep].numpy(), wanted[keep].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("labels", [40, 2000])
def test_labels_at_minus_infinity_are_never_drawn(labels: int) -> None:
    logits, _ = rows(64, labels)
    hidden = torch.rand(64, labels, generator=torch.Generator().manual_seed(2)) < 0.7
    hidden[:, 7] = False
    hidden[0] = True
    hidden[0, 7] = False  # one label is left
    logits[hidden] = -torch.inf
    for u in (0.0, 1e-7, 0.3, 0.999, BELOW_ONE):
        tokens = draw(logits, torch.full((64,), u))
        assert not hidden.gather(1, tokens[:, None]).any()
        assert tokens[0] == 7


@pytest.mark.parametrize("labels", [3, 1000, 8192])
def test_uniform_just_below_one(labels: int) -> None:
    logits, _ = rows(50, labels)
    logits[:, -1] = -torch.inf  # the last label is excluded, and so the last possible one counts
    logits[:25, -2] = -200.0  # possible in words, of probability 0 in float32
    tokens = draw(logits, torch.full((50,), BELOW_ONE))
    p = logits.softmax(1).gather(1, tokens[:, None])
    assert (p > 0).all() and (tokens < labels - 1).all()
    assert torch.equal(draw(torch.zeros(1, labels), torch.tensor([0.0])), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = (rows(20, 8192)[0] / 6).to(dtype)
    uniforms = rows(20, 1)[1]
    expected = draw(logits.double(), uniforms.double())
    assert (draw(logits, uniforms) - expected).abs().max() <= 1


def test_leaves_its_arguments_alone() -> None:
    logits, uniforms = rows(5, 9)
    before = logits.clone(), uniforms.clone()
    draw(logits, uniforms, 0.5)
    draw(logits.double(), uniforms.double())
    assert torch.equal(logits, before[0]) and torch.equal(uniforms, before[1])


@pytest.mark.parametrize("n", [0, 1, DRAWN_AT_ONCE, 256, 257, 700])
def test_rows_are_drawn_through_the_head_in_chunks(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    features, table = (torch.randn(size, 8, generator=generator) for size in (n, 50))
    uniforms = torch.rand(n, generator=generator)
    alive = []

    def head(part: Tensor) -> Tensor:
        alive.append(len(part))
        return part @ table.T

    def only_even(logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(50) % 2 == 1, -torch.inf)

    for chunk in (256, 64):
        alive.clear()
        tokens = draw_rows(features, uniforms, head, temperature=0.7, chunk=chunk)
        assert torch.equal(tokens, draw(features @ table.T, uniforms, 0.7))
        assert tokens.dtype == torch.int64 and tokens.shape == (n,)
        assert sum(alive) == n and max(alive, default=0) <= chunk
    filtered = draw_rows(features, uniforms, head, logits_filter=only_even)
    assert torch.equal(filtered, draw(only_even(features @ table.T), uniforms))
    assert not (filtered % 2).any()


def test_the_filter_sees_temperature_one() -> None:
    seen = []

    def note(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    logits, uniforms = rows(4, 6)
    draw_rows(logits, uniforms, lambda part: part, temperature=0.1, logits_filter=note)
    assert torch.equal(seen[0], logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        draw_rows(torch.zeros(1, 2), torch.zeros(1), lambda x: x, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("labels", "column"), [(9, 0), (9, 5), (9, 8), (1100, 0), (1100, 1099)])
def test_rows_without_probabilities_are_refused(
    value: float, labels: int, column: int, dtype: torch.dtype
) -> None:
    logits, uniforms = rows(300, labels)
    logits = logits.to(dtype)
    good = draw_rows(logits, uniforms, lambda part: part)
    logits[7, column] = logits[290, column] = value
    with pytest.raises(ValueError, match=r"^the logits of 2 of 300 tokens are not finite numbers"):
        draw_rows(logits, uniforms, lambda part: part)
    # the plain draw marks them behind all labels, and disturbs no other row
    tokens, rest = draw(logits, uniforms), uniforms < 2
    rest[[7, 290]] = False
    assert torch.equal(tokens[rest], good[rest]) and tokens[[7, 290]].tolist() == [labels, labels]


def test_the_likeliest_label() -> None:
    logits = rows(20, 9)[0]
    logits[3] = torch.tensor([-torch.inf] * 4 + [2.0] + [-torch.inf] * 4)
    assert torch.equal(likeliest(logits), logits.argmax(1))
    logits[5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^the logits of 1 of 20 tokens"):
        likeliest(logits)
