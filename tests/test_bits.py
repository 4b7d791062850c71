"""How far pictures agree across batch sizes: up to float ties in float32, wholly in float64.

A matmul of another shape sums in another order; where two tokens are equally likely up to rounding,
another one is drawn. Whole batches of one shape and order agree to the last bit, which the tests
marked `bits` hold to.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_generators import CAPTIONS, draw, exact, tiny

pytestmark = pytest.mark.bits
PICTURES = 48
PROMPTS = [CAPTIONS[i % 4] for i in range(PICTURES)]


def in_batches(module: Any, size: int) -> Tensor:
    """Draw the same pictures in batches of one size: [PICTURES, h, w]."""
    return torch.cat(
        [
            draw(module, PROMPTS[first : first + size], range(first, min(first + size, PICTURES)))
            for first in range(0, PICTURES, size)
        ]
    )


@pytest.mark.parametrize("paper", ["paella", "muse", "vq_diffusion"])
def test_few_tokens_differ_across_batch_sizes(paper: str) -> None:
    module = tiny(paper, random=0.3)
    one, again, *others = (in_batches(module, size) for size in (16, 16, 1, 5, 48))
    assert torch.equal(one, again) and len(one.unique()) > 4
    flipped = max((one != other).double().mean().item() for other in others)
    print(f"{paper}: {flipped:.3%} of the tokens differ")
    assert flipped < 0.01


@pytest.mark.parametrize("paper", ["paella", "muse", "vq_diffusion"])
def test_no_token_differs_in_float64(paper: str) -> None:
    module = exact(tiny(paper, random=0.3))
    one, *others = (in_batches(module, size) for size in (16, 1, 5, 48))
    assert all(torch.equal(one, other) for other in others)
