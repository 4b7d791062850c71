"""The order of training samples: decided once for all ranks and workers, which only divide it.

A pass goes through the shards, or parts of them where they are few, in an order drawn from (seed,
pass). The rows of a pass, laid end to end in that order, are cut into as many runs of equal length
as a global batch has places, and slot j, which fills place j of every global batch, reads one run
after the other, shuffled in windows. So what a slot reads depends on nobody who reads it, and a
process reads its own slots alone.

Where every row becomes a sample, the samples of all batches laid end to end go through the data
pass by pass. A row that is left out lets its slot go on to the next one, so that slot reaches the
following pass earlier; each pass of each slot still has every good row once.

The mechanism knows of a shard only how many rows it has and how to read them from a number on
(`Source`): tars, listings and cached tokens of the same rows have the same order.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple, Protocol

PARTS = 1024  # least number of parts whose order a pass draws, where there are so many rows


class Source(Protocol):
    """Shards of numbered rows, and what becomes of a row."""

    def rows(self, shard: int, first: int) -> Iterator[Any]:
        """Yield the rows of a shard from a number on; None in place of one that is left out."""

    def show(self, row: Any, visit: int) -> Any:
        """Make a sample of a row for a pass; None leaves it out."""

    def stack(self, samples: list[Any]) -> Any:
        """Put the samples of some places of a batch together, in the process that made them."""

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return what was left out since the last call, counted by kind, and examples of it."""


class Cursor(NamedTuple):
    """Where a slot stands."""

    visit: int = 0
    """Number of the pass."""
    window: int = 0
    """Number of the window in the slot's run of that pass."""
    used: int = 0
    """Rows of the shuffled window that are used up."""


class Part(NamedTuple):
    """Rows [first, last) of a shard, by the counted numbers."""

    shard: int
    first: int
    last: int


class Piece(NamedTuple):
    """Rows [first, last) of a shard; last is None where they go to its end."""

    shard: int
    first: int
    last: int | None
    length: int
    """How many rows it should have; of a shard whose count was estimated there may be others."""


@dataclass(frozen=True)
class GlobalOrder:
    """The order of the rows of some shards in global batches.

    Args:
        rows: number of rows of every shard, good and bad. An estimate costs only balance: the rows
            of a shard that has more are read too.
        slots: places of a global batch, all ranks together.
        seed: draws the order of the shards in a pass and of the rows in a window.
        window: rows of a slot that are shuffled together, within a pass.

    Raises:
        ValueError: no rows at all.
    """

    rows: tuple[int, ...]
    slots: int
    seed: int = 0
    window: int = 1
    _passes: dict[int, tuple[list[Part], list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.total:
            raise ValueError(f"the {len(self.rows)} training shards hold no sample at all")

    @cached_property
    def total(self) -> int:
        """Number of rows of a pass."""
        return sum(self.rows)

    @cached_property
    def name(self) -> str:
        """What tells this order from others: a cursor belongs to one order."""
        fields = repr((self.rows, self.slots, self.seed, self.window))
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def run(self, slot: int, visit: int) -> tuple[int, int]:
        """Return where in a pass a slot's rows begin, and how many there are.

        Batches do not end with a pass: place j of batch b holds position b slots + j of all passes
        laid end to end, so in pass p slot j has the rows of place (j - p total) mod slots.
        """
        place = (slot - visit * self.total) % self.slots
        length, longer = divmod(self.total, self.slots)
        return place * length + min(place, longer), length + (place < longer)

    def windows(self, slot: int, visit: int) -> int:
        """Return how many windows the run of a slot has in a pass."""
        return -(-self.run(slot, visit)[1] // self.window)

    def pieces(self, slot: int, cursor: Cursor) -> Iterator[Piece]:
        """Yield what has to be read for a window of a slot."""
        start, length = self.run(slot, cursor.visit)
        position = start + cursor.window * self.window
        end = min(position + self.window, start + length)
        parts, ends = self._laid_out(cursor.visit)
        place = bisect_right(ends, position)
        while position < end:
            part = parts[place]
            first = part.last - (ends[place] - position)
            count = min(end, ends[place]) - position
            last = first + count
            yield Piece(part.shard, first, None if last == self.rows[part.shard] else last, count)
            position, place = position + count, place + 1

    def shuffled(self, slot: int, cursor: Cursor, count: int) -> list[int]:
        """Return the order of the rows of a window."""
        order = list(range(count))
        random.Random(f"{self.seed}/{cursor.visit}/{slot}/{cursor.window}").shuffle(order)
        return order

    def _laid_out(self, visit: int) -> tuple[list[Part], list[int]]:
        """Return the parts in the order of a pass, and where each ends in it."""
        if visit not in self._passes:
            parts = list(self._parts())
            random.Random(f"{self.seed}/{visit}").shuffle(parts)
            for old in [known for known in self._passes if known < visit - 1]:
                del self._passes[old]
            self._passes[visit] = parts, list(accumulate(last - first for _, first, last in parts))
        return self._passes[visit]

    def _parts(self) -> Iterator[Part]:
        """Cut every shard into equally many parts."""
        each = -(-PARTS // len(self.rows))
        for shard, rows in enumerate(self.rows):
            cuts = sorted({rows * k // each for k in range(each + 1)})
            yield from (Part(shard, first, last) for first, last in pairwise(cuts))


class Slot:
    """What one slot of a global order yields, without end: samples, with the cursor after each.

    Args:
        order: the order.
        source: reads the rows.
        number: of the slot.
        cursor: where it goes on.
    """

    def __init__(self, order: GlobalOrder, source: Source, number: int, cursor: Cursor):
        self.order, self.source, self.number, self.cursor = order, source, number, cursor
        self._open: Iterator[Any] = iter(())
        self._next: tuple[int, int] = (-1, 0)  # shard and number of the row that `_open` gives

    def __iter__(self) -> Iterator[tuple[Any, Cursor]]:
        """Yield samples.

        Raises:
            ValueError: in many passes there was not one.
        """
        order, number = self.order, self.number
        visit, window, used = self.cursor
        last = visit  # in which there was a sample
        while True:
            for index in range(window, order.windows(number, visit)):
                here = Cursor(visit, index)
                rows: list[Any] = []
                for piece in order.pieces(number, here):
                    rows += self._read(piece)
                for place, row in enumerate(order.shuffled(number, here, len(rows))):
                    taken, rows[row] = rows[row], None
                    if place < used or taken is None:
                        continue
                    sample = self.source.show(taken, visit)
                    if sample is not None:
                        last = visit
                        yield sample, Cursor(visit, index, place + 1)
                used = 0
            visit, window = visit + 1, 0
            if visit - last > 1000 * order.slots:
                raise ValueError(f"{visit - last} passes over the training shards gave no sample")

    def _read(self, piece: Piece) -> Sequence[Any]:
        """Read the rows of a piece, going on where the one before ended."""
        if self._next != (piece.shard, piece.first):
            self._open = self.source.rows(piece.shard, piece.first)
        if piece.last is None:
            rows = list(self._open)
        else:
            rows = list(islice(self._open, piece.length))
        self._next = (piece.shard, piece.first + piece.length)
        return rows + [None] * (piece.length - len(rows))
