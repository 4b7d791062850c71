"""Editing: larger canvases, editing without a mask, both stages; what is known never changes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.common.request import Request
from lightning_modules.muse import editing
from lightning_modules.muse.config import EditConfig
from lightning_modules.muse.module import MuseModule
from tests.tiny_generators import MUSE, Greys, K, source, tiny

MASK = K


# Windows ----


@given(
    canvas=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    window=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    seed=st.integers(0, 50),
)
@settings(deadline=None)
def test_windows_cover_all_that_is_hidden(canvas, window, seed):
    size = (min(window[0], canvas[0]), min(window[1], canvas[1]))
    hidden = torch.rand(canvas, generator=source(seed)) < 0.5
    left = hidden.clone()
    for top, right in editing.windows(hidden, size):
        part = left[top : top + size[0], right : right + size[1]]
        assert part.shape == size  # none reaches over the edge
        assert bool(part.any())  # each has something to do
        part.fill_(False)
    assert not left.any()


@pytest.mark.parametrize("unit", [2, 4])
def test_places_of_windows_are_multiples(unit):
    hidden = torch.ones(16, 24, dtype=torch.bool)
    places = editing.windows(hidden, (8, 8), unit)
    assert len(places) >= 6 and all(top % unit == left % unit == 0 for top, left in places)


def test_windows_begin_where_something_is_known():
    hidden = torch.ones(4, 12, dtype=torch.bool)
    hidden[:, :4] = False  # a picture on the left
    lefts = [left for _, left in editing.windows(hidden, (4, 4))]
    assert lefts == sorted(lefts) and lefts[0] == 2  # half of it is seen, half is new


def test_outpainting_keeps_the_known_and_shows_it_to_the_network():
    start = torch.full((2, 4, 10), MASK)
    start[:, :, :4] = torch.randint(K, (2, 4, 4), generator=source())
    seen: list[int] = []

    def decode(part: Tensor, number: int, place: tuple[int, int]) -> Tensor:
        assert number == len(seen) and part.shape == (2, 4, 4)
        seen.append(int((part != MASK).sum()))
        return torch.where(part == MASK, number, part)

    out = editing.outpaint(decode, start, MASK, (4, 4))
    assert torch.equal(out[:, :, :4], start[:, :, :4]) and bool((out < K).all())
    assert len(seen) == 3 and min(seen) >= 2 * 8  # at least half a window is known


# Without a mask ----


class Wish:
    """A network whose tokens are all `token`, whatever it sees."""

    def __init__(self, token: int) -> None:
        self.token, self.kept, self.weights = token, [], []

    def predict(self, x: Tensor, weight: float, keep: Tensor) -> Tensor:
        assert torch.equal(x == MASK, keep)  # what is drawn is masked, nothing else
        self.kept.append(keep)
        self.weights.append(weight)
        return torch.nn.functional.one_hot(torch.full((int(keep.sum()),), self.token), K) * 20.0


def rewrite(network: Wish, start: Tensor, steps: int, **options: Any) -> Tensor:
    shape = (steps, *start.shape)
    return editing.rewrite(
        network.predict,
        lambda rows: rows,
        start,
        EditConfig(**options),
        mask_id=MASK,
        places=torch.rand(shape, generator=source(1)),
        draws=torch.rand(shape, generator=source(2)),
    )


def test_a_share_of_the_tokens_is_drawn_in_every_iteration():
    start, network = torch.zeros(3, 16, 16, dtype=torch.int64), Wish(5)
    out = rewrite(network, start, 4)
    assert [k.flatten(1).sum(1).tolist() for k in network.kept] == [[20] * 3] * 4  # 8 % of 256
    assert network.weights == [4.0] * 4
    touched = torch.stack(network.kept).any(0)
    assert torch.equal(out, torch.where(touched, 5, start))
    assert len({tuple(k.flatten().tolist()) for k in network.kept[0]}) == 3  # each its own places
    assert torch.equal(rewrite(Wish(5), start, 0), start)
    every = rewrite(Wish(5), start, 60)
    assert float((every == 5).float().mean()) > 0.95


def test_rewriting_draws_among_the_likeliest():
    start = torch.zeros(4, 8, 8, dtype=torch.int64)

    def predict(x: Tensor, weight: float, keep: Tensor) -> Tensor:
        logits = torch.tensor([0.0, 3.0, 2.9, 2.8, 2.7] + [0.0] * (K - 5))
        return logits.expand(int(keep.sum()), K)

    network = Wish(0)
    network.predict = predict  # type: ignore[method-assign]
    drawn = rewrite(network, start, 40)
    assert set(drawn.unique().tolist()) - {0} == {1, 2, 3}
    all_codes = rewrite(network, start, 40, top_k=None)
    assert {1, 2, 3, 4} <= set(all_codes.unique().tolist())
    likeliest = rewrite(network, start, 40, temperature=0.0)
    assert set(likeliest.unique().tolist()) - {0} == {1}


# Through the stages ----


@pytest.fixture(params=[False, True], ids=["base", "superres"])
def module(request: pytest.FixtureRequest) -> MuseModule:
    """A base of random weights for 4x4 tokens, with or without super-resolution to 8x8."""
    high = {**MUSE, "low_num_codes": K, "low_layers": 1, "low_max_side": 4, "block": 2}
    further = {
        "superres": {"enabled": True, "model": high},
        "high": {"grid": [8, 8], "num_codes": K},
    }
    sampling = {"steps": 3, "superres": {"steps": 2}, "edit": {"iterations": 5}}
    return tiny("muse", 0.3, sampling=sampling, **(further if request.param else {}))


def pictures(n: int, height: int, width: int) -> Tensor:
    """Pictures of which the tokens of both stages can be read off: squares of 4x4 pixels."""
    tokens = torch.randint(K, (n, height // 4, width // 4), generator=source(4))
    return Greys().decode(tokens).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_inpainting_keeps_the_known_pixels(module: MuseModule) -> None:
    side = 4 * module.pixels_per_token
    start = pictures(2, side, side)
    cells = side // module.pixels_per_cell
    mask = torch.zeros(2, cells, cells, dtype=torch.bool)
    mask[0, : cells // 2], mask[1, 0, 1] = True, True
    out = module.sample(Request(["a", "b"], [1, 2], start=start, mask=mask))
    f = module.pixels_per_cell
    hidden = mask.repeat_interleave(f, 1).repeat_interleave(f, 2)[:, None].expand_as(out)
    assert torch.equal(out[~hidden], start[~hidden])
    assert not torch.equal(out, start)


def test_the_base_generates_every_token_that_the_mask_touches(module: MuseModule) -> None:
    side, states = 4 * module.pixels_per_token, []
    cells = side // module.pixels_per_cell
    mask = torch.zeros(1, cells, cells, dtype=torch.bool)
    mask[0, 0, 1] = True  # with super-resolution a quarter of the base's token (0, 0)
    asked = Request(["a"], [1], start=pictures(1, side, side), mask=mask)
    module.sample(asked, on_step=lambda i, before, after: states.append(before))
    place = (0, 0) if module.superres is not None else (0, 1)
    assert (states[0][0] == MASK).nonzero().tolist() == [list(place)]


@pytest.mark.parametrize("where", ["left", "right", "all around"])
def test_outpainting_beyond_the_trained_size(where: str, module: MuseModule) -> None:
    side, f = 4 * module.pixels_per_token, module.pixels_per_cell
    inner = pictures(2, side, side)
    left, right, top, bottom = {
        "left": (side, 0, 0, 0),
        "right": (0, side // 2, 0, 0),
        "all around": (8, 8, 8, 16),
    }[where]
    canvas = torch.nn.functional.pad(inner, (left, right, top, bottom))
    known = torch.zeros(canvas.shape[-2:], dtype=torch.bool)
    known[top : top + side, left : left + side] = True
    mask = ~known[::f, ::f].expand(2, -1, -1)
    out = module.sample(Request(["a", "b"], [1, 2], start=canvas, mask=mask))
    assert out.shape == canvas.shape
    assert torch.equal(out[..., known], canvas[..., known])
    again = module.sample(Request(["b"], [2], start=canvas[1:], mask=mask[1:]))
    assert torch.equal(again[0], out[1])  # whatever else is in the batch


def test_larger_pictures_from_text(module: MuseModule) -> None:
    out = module.sample(Request(["a"], [1], grid=(4, 7)))
    assert out.shape == (1, 3, 4 * module.pixels_per_token, 7 * module.pixels_per_token)


def test_editing_without_a_mask(module: MuseModule) -> None:
    side = 4 * module.pixels_per_token
    start, low = pictures(2, side, side), []
    asked = Request(["a", "b"], [1, 2], start=start, rewrite=True)
    both = module.sample(asked, on_step=lambda i, before, after: low.append(after))
    small = start[..., ::2, ::2] if module.superres is not None else start
    edited = module.first_stage.decode(low[-1])
    unchanged = (edited == small).float().mean()
    assert len(low) == 5 and 0.6 < float(unchanged) < 1  # at most 5 of 16 tokens, one at a time
    assert (edited.shape == both.shape) == (module.superres is None)
    alone = module.sample(Request(["b"], [2], start=start[1:], rewrite=True))
    assert torch.equal(alone[0], both[1])
    tokens = module.first_stage.encode(small)
    none = module.settings({"edit": {"iterations": 0}})
    asked = Request(["a", "b"], [1, 2], start=tokens, rewrite=True)
    assert torch.equal(module.sample_tokens(asked, none), tokens)
