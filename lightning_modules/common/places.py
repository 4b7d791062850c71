"""Which places of a grid a step computes: those that it needs, or all of them behind a mask.

The results are the same for the same uniforms, up to float ties where matmuls of two shapes round
differently.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_modules.common.categorical import (
    check_numbers,
    draw_rows,
    drawn_rows,
    likeliest,
)

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def whole(values: Any) -> bool:
    """Say whether numbers, or numbers of numbers, are integers."""
    return isinstance(values, int) or (
        isinstance(values, Sequence) and all(whole(value) for value in values)
    )


class Picked:
    """Picks places by indexing: the least work, and on a GPU a wait for every number of places."""

    looks: ClassVar[bool] = True
    """Whether a step may depend on numbers that it has computed."""
    calls: int = 0
    """Steps that asked the network unheard, once for every picture."""

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function of a loop's step as it is to be called."""
        return function

    def send(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the CPU where steps read it."""
        return tensor

    def numbers(self, values: Sequence[Any], plain: Sequence[float] = ()) -> list[Any]:
        """Return the numbers of a loop's steps as each step takes its own.

        Args:
            values: a number, or as many as every other step has, per step.
            plain: numbers that choose what a step does, and not only how much.
        """
        return list(values)

    def keep(self, keep: Tensor) -> Tensor | None:
        """Return what networks take for places [B, ...] bool: None keeps all."""
        return keep

    def any(self, keep: Tensor) -> bool:
        """Say whether there is any such place [B, ...] bool."""
        return bool(keep.any())

    def among(self, rows: Tensor, keep: Tensor, some: Tensor) -> Tensor:
        """Return the rows of some of the places that were kept."""
        return rows[some[keep]]

    def pick(self, values: Tensor, keep: Tensor) -> Tensor:
        """Map values [B, ...] to rows [n], in the order of keep.nonzero()."""
        return values[keep]

    def put(self, x: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
        """Return x [B, ...] with rows [n] in the places that are kept."""
        return x.masked_scatter(keep, rows.to(x.dtype))

    def draw(self, rows: Tensor, uniforms: Tensor, head: Any, **options: Any) -> Tensor:
        """Draw a token per row, see `draw_rows`."""
        return draw_rows(rows, uniforms, head, **options)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Take the likeliest token per row of [n, K]."""
        return likeliest(logits)

    def check(self) -> None:
        """Refuse logits of any step that were no numbers."""


class Masked(Picked):
    """Computes all places and masks: shapes never change, and no step waits for a number.

    A step is then one graph: it takes tensors, and the same code serves all steps of its kind.

    Args:
        device: where the tokens are.
        compiler: makes a step fast (`torch.compile`, a capture as a CUDA graph); None leaves it.
    """

    looks: ClassVar[bool] = False

    def __init__(self, device: torch.device, compiler: Compiler | None = None) -> None:
        self.device, self.compiler = device, compiler
        # written in place, so that a captured step goes on writing here
        self.bad = torch.zeros((), dtype=torch.bool, device=device)

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function of a step, compiled; each step is a call of the network."""
        made = function if self.compiler is None else self.compiler(function)

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return made(*arguments)

        return counted

    def send(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        return tensor.to(self.device)

    def numbers(self, values: Sequence[Any], plain: Sequence[float] = ()) -> list[Any]:
        """Return tensors [] (or [n]), float64 or int64, sent at once; plain ones as they are."""
        tensors = self.send(torch.tensor(values, dtype=None if whole(values) else torch.float64))
        pairs = zip(values, tensors.unbind(), strict=True)
        return [value if value in plain else tensor for value, tensor in pairs]

    def keep(self, keep: Tensor) -> Tensor | None:
        """Return None: all places."""
        return None

    def any(self, keep: Tensor) -> bool:
        """Return True without a look."""
        return True

    def among(self, rows: Tensor, keep: Tensor, some: Tensor) -> Tensor:
        """Return all rows."""
        return rows

    def pick(self, values: Tensor, keep: Tensor) -> Tensor:
        """Map values [B, ...] to all rows [n]."""
        return values.flatten(0, keep.ndim - 1)

    def put(self, x: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
        """Return x [B, ...] with those of all rows [n] that are kept."""
        return torch.where(keep, rows.view_as(x).to(x.dtype), x)

    def draw(self, rows: Tensor, uniforms: Tensor, head: Any, **options: Any) -> Tensor:
        """Draw a token per row; what has no law is remembered and becomes any token."""
        tokens, labels = drawn_rows(rows, uniforms, head, **options)
        self.bad.logical_or_((tokens >= labels).any())
        return tokens.clamp(max=labels - 1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Take the likeliest token per row of [n, K]; NaN is remembered."""
        best, tokens = logits.max(1)
        self.bad.logical_or_(best.isnan().any())
        return tokens

    def check(self) -> None:
        """Refuse logits of any step that were no numbers; waits for the device."""
        check_numbers(~self.bad[None])
