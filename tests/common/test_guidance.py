"""Guidance along the way, and its rows picture by picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.common.guidance import Guidance, mix, mixed_rows

quick = settings(max_examples=30, deadline=None)


def test_laws() -> None:
    assert Guidance(1, 5).scales(5) == pytest.approx([1, 2, 3, 4, 5])
    assert Guidance(1, 5, "ratio").scales(4) == pytest.approx([1, 2, 3, 4])
    assert Guidance(1, 3, "cosine").scales(2) == pytest.approx([1, 2])
    assert Guidance.constant(4.0).scales(3) == [4, 4, 4]
    assert Guidance(2, 3).scales(1) == [2]


def test_outside_of_the_interval_there_is_none() -> None:
    right = Guidance.constant(4.0, 0.5)
    assert right.scales(5) == [1, 1, 4, 4, 4]
    assert Guidance.constant(4.0, last=0.5).scales(5) == [4, 4, 4, 1, 1]
    assert right.at(torch.tensor([0.0, 0.49, 0.5, 1.0])).tolist() == [1, 1, 4, 4]


@quick
@given(
    start=st.floats(0, 8),
    end=st.floats(0, 8),
    steps=st.integers(1, 30),
    law=st.sampled_from(["linspace", "ratio", "cosine"]),
    power=st.floats(0.2, 3),
    interval=st.tuples(st.integers(0, 10), st.integers(0, 10)),
)
def test_a_share_of_the_way_has_the_scale_of_its_step(
    start, end, steps, law, power, interval
) -> None:
    first, last = (n / 10 for n in sorted(interval))
    guidance = Guidance(start, end, law, power, first, last)
    for dtype in (torch.float32, torch.float64):  # borders of an interval fall on steps
        done = torch.arange(steps, dtype=dtype) / steps
        found = guidance.at(done, steps)
        assert found.dtype == dtype
        torch.testing.assert_close(found.tolist(), guidance.scales(steps), rtol=1e-5, atol=1e-5)


def test_where_no_step_is_known_to_be_the_last_what_is_done_is_the_way() -> None:
    guidance = Guidance(1, 5)
    assert guidance.at(torch.tensor([0.0, 0.5, 0.75])).tolist() == [1, 3, 4]
    assert guidance.at(torch.tensor([0.0, 0.5, 0.75]), 4).tolist() == pytest.approx(
        [1, 3.667, 5], abs=1e-3
    )
    assert guidance.at(torch.tensor([1.0]), 4).tolist() == [5]  # a call after the last step


def test_there_is_a_null_only_where_it_is_needed() -> None:
    assert not Guidance().guides and Guidance(1, 2).guides and Guidance.constant(0).guides


@quick
@given(scale=st.floats(0, 8))
def test_mixing_some_channels(scale: float) -> None:
    own, null = torch.randn(2, 3, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    whole = mix(own, null, scale)
    torch.testing.assert_close(whole, null + scale * (own - null))
    some = mix(own, null, scale, 2)
    assert torch.equal(some[:, :2], whole[:, :2]) and torch.equal(some[:, 2:], own[:, 2:])


class Sides:
    """Rows of 3 pictures whose own are 1 and whose null is 10 times the picture's number."""

    def __init__(self, keep: Tensor) -> None:
        self.keep, self.asked = keep, []

    def __call__(self, scale: float, pictures: Tensor) -> Tensor:
        self.asked.append((scale, pictures.tolist()))
        of = pictures[self.keep[pictures].nonzero()[:, 0]].float()
        return (10 * of + scale * (1 - 10 * of))[:, None]


def test_pictures_of_one_scale_are_asked_together() -> None:
    keep = torch.tensor([[True, False], [True, True], [False, True]])
    for scale in (0.0, 1.0, 2.5):
        sides = Sides(keep)
        rows = mixed_rows(sides, torch.full((3,), scale), keep)
        assert sides.asked == [(scale, [0, 1, 2])] and rows.shape == (4, 1)


def test_every_picture_has_its_own_scale_and_asks_no_side_in_vain() -> None:
    keep = torch.tensor([[True, False], [True, True], [False, True]])
    sides = Sides(keep)
    rows = mixed_rows(sides, torch.tensor([1.0, 0.0, 3.0]), keep)
    assert sides.asked == [(1.0, [0, 2]), (0.0, [1, 2])]
    assert rows[:, 0].tolist() == [1, 10, 10, 20 + 3 * (1 - 20)]
